"""Run the teacher on the calibration dataset and return what later stages need of it."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from hf_guide.calibration.config import CalibratedConfig
from hf_guide.calibration.data import Batch, default_num_tokens, is_self_generated, load_calibration_batches
from hf_guide.calibration.modules import find_modules
from hf_guide.calibration.resume import CalibrationCheckpoint, describe_data, load_text
from hf_guide.calibration.self_generation import generate_calibration_text
from hf_guide.calibration.statistics import ActivationStatistics, collect_statistics, mlp_width
from hf_guide.errors import OptionError, TeacherError
from hf_guide.initialization.infer_layout import layout_for
from hf_guide.teachers.checkpoint import TeacherCheckpoint
from hf_guide.utils.distributed import default_device, rank_and_world_size


@dataclass
class CalibrationResult:
    """What was collected.

    Attributes:
        model: The running teacher.
        batches: The calibration batches of all processes, on the CPU.
        statistics: The statistics of its activations.
        seconds: How long it took.
        self_generated: Whether the teacher generated the text.
        checkpoint: Where later steps are saved and continued from.
    """

    model: PreTrainedModel
    batches: list[Batch]
    statistics: ActivationStatistics
    seconds: float
    self_generated: bool = False
    checkpoint: CalibrationCheckpoint | None = None


@torch.no_grad()
def collect_calibration(
    source: Any,
    teacher: TeacherCheckpoint,
    dataset: Any,
    config: CalibratedConfig,
    *,
    calibration_cache_dir: Path | None = None,
    call: Mapping[str, Any] | None = None,
    show_progress: bool = False,
    **hub: Any,
) -> CalibrationResult:
    """Run the teacher once on the first tokens of a dataset.

    Args:
        source: The teacher as passed to `from_teacher`. A loaded model runs as it is and where it is; otherwise `teacher`
            is loaded on this process's GPU, or the CPU if there is none.
        teacher: The opened checkpoint.
        dataset: As `calibration_dataset` of `from_teacher`.
        config: The options.
        calibration_cache_dir: A folder where finished parts are saved and continued from.
        call: All else that the student depends on, as JSON values.
        show_progress: Whether to show progress bars.
        **hub: Keywords of `from_pretrained` for the teacher's tokenizer.

    Raises:
        OptionError: The dataset makes no batches, or fewer than there are processes; the folder is of another call.
        TeacherError: Activations are not finite, or the model is on several devices.
    """
    started = time.perf_counter()
    layout = layout_for(teacher.config, teacher.model_class)
    model = source if isinstance(source, PreTrainedModel) else materialize_teacher(teacher, default_device())
    check_single_device(model)
    modules = find_modules(model, layout)
    num_tokens = config.calibration_tokens or default_num_tokens(mlp_width(modules, layout, model))
    text: Tensor | None = None
    if is_self_generated(dataset):
        text = None if calibration_cache_dir is None else load_text(calibration_cache_dir)
        if text is None:
            text = generate_calibration_text(
                model, teacher, config, num_tokens=num_tokens, show_progress=show_progress
            )
        dataset = [{"input_ids": rows} for rows in text.split(config.calibration_batch_size)]
    batches = load_calibration_batches(dataset, model, teacher, config, num_tokens=num_tokens, **hub)
    _check_enough_batches(batches)
    checkpoint = None
    if calibration_cache_dir is not None:
        checkpoint = CalibrationCheckpoint.begin(
            calibration_cache_dir, {**(call or {}), **describe_data(model, batches)}
        )
        if text is not None:
            checkpoint.save_text(text)
    statistics = collect_statistics(
        model, modules, layout, batches, checkpoint=checkpoint, show_progress=show_progress
    )
    seconds = time.perf_counter() - started
    return CalibrationResult(model, batches, statistics, seconds, text is not None, checkpoint)


def _check_enough_batches(batches: list[Batch]) -> None:
    world_size = rank_and_world_size()[1]
    if len(batches) < world_size:
        raise OptionError(
            f"calibration_dataset makes {len(batches)} batches for {world_size} processes, and each needs one: pass more "
            "data, or lower calibration_batch_size."
        )


def check_single_device(model: PreTrainedModel) -> None:
    """Raise if parts of a model are on several devices: activations of one are compared with those of another.

    Raises:
        TeacherError: Names the devices.
    """
    devices = sorted({str(parameter.device) for parameter in model.parameters()})
    if len(devices) > 1:
        raise TeacherError(
            f"The teacher is spread over {', '.join(devices)}, and method='calibrated' runs it on one device. Load it on one "
            "(device_map={'': 0}, or none for the CPU), or pass its folder or Hub id."
        )


def materialize_teacher(teacher: TeacherCheckpoint, device: torch.device) -> PreTrainedModel:
    """Return a model with the checkpoint's weights, in the dtype in which they are stored, in evaluation mode."""
    with no_init_weights():
        model = teacher.model_class._from_config(teacher.config, dtype=teacher.dtype)
    model.tie_weights()
    tensors = model.state_dict(keep_vars=True)
    with torch.no_grad():
        for name in teacher.weights.keys():
            tensors[name].copy_(teacher.weights.get(name))
    return model.eval().to(device)
