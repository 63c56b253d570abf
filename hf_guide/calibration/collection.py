"""Run the teacher on the calibration dataset and return what later stages need of it."""

import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from hf_guide.calibration.batches import Batch, count_contexts, count_tokens, first_rows, num_rows
from hf_guide.calibration.block_weights import BlockWeights, model_without_weights
from hf_guide.calibration.config import SELF_GENERATED, CalibratedConfig, Refit
from hf_guide.calibration.data import (
    default_num_tokens,
    is_self_generated,
    load_calibration_batches,
)
from hf_guide.calibration.forward import running_device
from hf_guide.calibration.importance import BlockSelection
from hf_guide.calibration.modules import ModuleMap, find_modules, linear_weight
from hf_guide.calibration.resume import CalibrationCheckpoint, data_fingerprint, describe_data, load_text
from hf_guide.calibration.self_generation import generate_calibration_text
from hf_guide.calibration.sequential import SequentialModel, find_probes
from hf_guide.calibration.statistics import ActivationStatistics, collect_statistics, mlp_width
from hf_guide.calibration.streams import StreamStore
from hf_guide.errors import OptionError
from hf_guide.initialization.infer_layout import layout_for
from hf_guide.layouts.registry import Layout
from hf_guide.teachers.checkpoint import TeacherCheckpoint
from hf_guide.teachers.quantized import is_quantized
from hf_guide.utils.distributed import (
    all_gather_values,
    default_device,
    local_shard,
    raise_on_all_ranks,
    rank_and_world_size,
)
from hf_guide.utils.resumable import differences, list_differences


@dataclass
class CalibrationResult:
    """What was collected.

    Attributes:
        teacher: The running teacher on this process's batches.
        statistics: The statistics of its activations.
        seconds: How long it took.
        self_generated: Whether the teacher generated the text.
        num_contexts: How many of all processes' tokens differ in themselves or in those shortly before them; None where they
            depend on more than text.
        checkpoint: Where later steps are saved and continued from.
        block_selections: By stack, the blocks that were chosen as a set, where that is how they are selected.
        notes: Why blocks were selected in another way than was asked for.
    """

    teacher: SequentialModel
    statistics: ActivationStatistics
    seconds: float
    self_generated: bool = False
    num_contexts: int | None = None
    checkpoint: CalibrationCheckpoint | None = None
    block_selections: dict[str, BlockSelection] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def block_scores(self) -> dict[str, Tensor]:
        """By stack, scores by which blocks are selected, the largest first: those of the set first."""
        scores = self.statistics.block_scores
        chosen = {stack: each.scores(scores[stack]) for stack, each in self.block_selections.items()}
        return scores | chosen


@torch.no_grad()
def collect_calibration(
    source: Any,
    teacher: TeacherCheckpoint,
    dataset: Any,
    config: CalibratedConfig,
    *,
    student: PreTrainedConfig | None = None,
    calibration_cache_dir: Path | None = None,
    call: Mapping[str, Any] | None = None,
    show_progress: bool = False,
    **hub: Any,
) -> CalibrationResult:
    """Run the teacher once on the first tokens of a dataset.

    Args:
        source: The teacher as passed to `from_teacher`. A model that is loaded on one device runs as it is; of another the
            blocks are loaded while they run, on this process's GPU, or the CPU if there is none.
        teacher: The opened checkpoint.
        dataset: As `calibration_dataset` of `from_teacher`.
        config: The options.
        student: The config of the student, which may have fewer positions.
        calibration_cache_dir: A folder where finished parts are saved and continued from.
        call: All else that the student depends on, as JSON values.
        show_progress: Whether to show progress bars.
        **hub: Keywords of `from_pretrained` for the teacher's tokenizer.

    Raises:
        OptionError: The dataset makes no batches, or of fewer rows than there are processes; the dataset or the call is not
            the same in all of them; the folder is of another call.
        TeacherError: Activations are not finite.
    """
    started = time.perf_counter()
    check_same_call(dataset, calibration_cache_dir, call or {})
    layout = layout_for(teacher.config, teacher.model_class)
    model, weights = running_teacher(source, teacher, layout)
    modules = find_modules(model, layout)
    data = read_calibration_data(
        dataset,
        model,
        weights,
        teacher,
        layout,
        config,
        student=student,
        calibration_cache_dir=calibration_cache_dir,
        show_progress=show_progress,
        **hub,
    )
    batches = split_for_processes(data.batches, data.token_limit)
    checkpoint = None
    if calibration_cache_dir is not None:
        checkpoint = CalibrationCheckpoint.begin(
            calibration_cache_dir, {**(call or {}), **describe_data(teacher, batches)}
        )
        if data.text is not None:
            checkpoint.save_text(data.text)
    store = StreamStore(config.activation_memory)
    store.check_space(_activation_bytes(modules, model, batches, refits=config.refit != Refit.NONE))
    own = local_shard(batches)
    sequential = SequentialModel(
        model, modules, own, is_teacher=True, probes=find_probes(own, batches), store=store, weights=weights
    )
    statistics = collect_statistics(
        model,
        modules,
        layout,
        batches,
        sequential=sequential,
        checkpoint=checkpoint,
        records=config.refit != Refit.NONE and running_device(model).type == "cpu",  # another runs faster than a disk
        show_progress=show_progress,
    )
    seconds = time.perf_counter() - started
    is_generated = data.text is not None
    return CalibrationResult(sequential, statistics, seconds, is_generated, count_contexts(batches), checkpoint)


@dataclass(frozen=True)
class CalibrationData:
    """What a calibration dataset is read as, the same in all processes.

    Attributes:
        batches: For the teacher's forward pass.
        num_tokens: How many were asked for.
        text: What the teacher has generated, (rows, length); None of other data.
        token_limit: `num_tokens` where they ended the reading; None where the dataset has no more.
    """

    batches: list[Batch]
    num_tokens: int
    text: Tensor | None
    token_limit: int | None


def read_calibration_data(
    dataset: Any,
    model: PreTrainedModel,
    weights: BlockWeights | None,
    teacher: TeacherCheckpoint,
    layout: Layout,
    config: CalibratedConfig,
    *,
    student: PreTrainedConfig | None = None,
    calibration_cache_dir: Path | None = None,
    show_progress: bool = False,
    **hub: Any,
) -> CalibrationData:
    """Read a dataset into batches; text that the teacher is to generate is generated first.

    Args:
        dataset, teacher, config, student, show_progress, **hub: As in `collect_calibration`.
        model, weights: The running teacher.
        layout: Its layout.
        calibration_cache_dir: Where text that was generated may be saved.

    Raises:
        OptionError: As `load_calibration_batches` and `generate_calibration_text`, or the dataset is not the same in all
            processes.
    """
    num_tokens = config.calibration_tokens or default_num_tokens(mlp_width(find_modules(model, layout), layout, model))
    text: Tensor | None = None
    if is_self_generated(dataset):
        text = None if calibration_cache_dir is None else load_text(calibration_cache_dir)
        if text is None:
            with all_held(weights):
                text = generate_calibration_text(
                    model, teacher, config, num_tokens=num_tokens, student=student, show_progress=show_progress
                )
        dataset = [{"input_ids": rows} for rows in text.split(config.calibration_batch_size)]
    with raise_on_all_ranks(OptionError):
        batches = load_calibration_batches(
            dataset, model, teacher, config, num_tokens=num_tokens, student=student, **hub
        )
    _check_same_data(batches)
    is_cut = sum(count_tokens(batch, model) for batch in batches) >= num_tokens
    return CalibrationData(batches, num_tokens, text, num_tokens if is_cut else None)


def all_held(weights: BlockWeights | None) -> contextlib.AbstractContextManager[None]:
    """Keep all weights of a teacher that is read from files in memory for the duration of the block; None reads none."""
    return contextlib.nullcontext() if weights is None else weights.all_held()


def check_same_call(dataset: Any, calibration_cache_dir: Path | None, call: Mapping[str, Any]) -> None:
    """Check that all processes make the same student, in the same steps: otherwise they would sum tensors of other shapes."""
    steps = {
        "calibration_dataset": SELF_GENERATED if is_self_generated(dataset) else "data",
        "calibration_cache_dir": "None" if calibration_cache_dir is None else "a folder",
    }
    everyone = all_gather_values({**call, **steps})
    for rank, other in enumerate(everyone):
        differing = differences(everyone[0], other, "in rank 0", f"in rank {rank}")
        if differing:
            raise OptionError(
                f"The processes do not make the same call: {list_differences(differing)}. Pass the same teacher, config and "
                "options in all of them; each processes its own share of the calibration dataset, and all get the same "
                "student."
            )


def _check_same_data(batches: list[Batch]) -> None:
    """Check that all processes read the same data: each runs every n-th batch, and would skip the rest of its own."""
    if rank_and_world_size()[1] == 1:
        return
    everyone = all_gather_values((len(batches), data_fingerprint(batches)))
    rank = next((rank for rank, each in enumerate(everyone) if each != everyone[0]), None)
    if rank is not None:
        first, other = everyone[0][0], everyone[rank][0]
        raise OptionError(
            f"calibration_dataset is not the same in all processes: it makes {first} batches in rank 0 and {other} "
            f"{'others ' if first == other else ''}in rank {rank}. Pass the whole dataset in each process, which reads its "
            "own share of it. If it is shuffled or transformed at random, set the same seed in all processes."
        )


def split_for_processes(batches: Sequence[Batch], token_limit: int | None, *, held_out: int = 0) -> list[Batch]:
    """Return the batches, the largest ones split between their rows until there is one for each process.

    Args:
        batches: The same in all processes.
        token_limit: The number of tokens that ended the reading of the dataset, for the error; None where it ended itself.
        held_out: How many more rows the dataset has, which are used for something else, for the error.

    Raises:
        OptionError: There are fewer rows than processes; names `calibration_tokens` where it ended the reading.
    """
    world_size, parts = rank_and_world_size()[1], list(batches)
    while len(parts) < world_size:
        sizes = [num_rows(batch) or 1 for batch in parts]
        if max(sizes, default=1) == 1:
            without = f", without the {held_out} rows that are held out to compare with" if held_out else ""
            advice = "pass more data" if token_limit is None else f"raise calibration_tokens above {token_limit}"
            fewer = ", or start fewer processes" if world_size > 1 else ""
            raise OptionError(
                f"calibration_dataset makes {len(parts)} batches that cannot be split{without}, for {world_size} "
                f"process{'es' if world_size > 1 else ''}, and each needs one: {advice}{fewer}."
            )
        index = sizes.index(max(sizes))
        half = sizes[index] // 2
        rest = {name: value[half:] for name, value in parts[index].items()}
        parts[index : index + 1] = [first_rows(parts[index], half), rest]
    return parts


def _activation_bytes(modules: ModuleMap, model: PreTrainedModel, batches: list[Batch], *, refits: bool) -> int:
    """Return how many bytes of activations this process keeps at most: each is one tensor of the teacher's width.

    They are the hidden states after each stack and before a block; with a refit those before another block, up to three more
    of the teacher's, its projected output in float32, and the student's.
    """
    width = max((linear_weight(ref.module).shape[1] for ref in modules.residual_in.values()), default=0)
    tokens = sum(count_tokens(batch, model) for batch in local_shard(batches))
    return (len(modules.blocks) + (8 if refits else 1)) * tokens * width * model.dtype.itemsize


def running_teacher(
    source: Any, teacher: TeacherCheckpoint, layout: Layout
) -> tuple[PreTrainedModel, BlockWeights | None]:
    """Return the teacher as a model that runs, and what loads the weights of its blocks; None where they are in memory.

    Args:
        source: The teacher as passed to `from_teacher`. A model that is loaded on one device is returned as it is, unless
            `teacher` has a part of its vocabulary.
        teacher: The opened checkpoint.
        layout: Its layout.
    """
    if is_on_one_device(source) and teacher.whole is None:
        return source, None
    model = model_without_weights(teacher)
    blocks = [block for stack in find_modules(model, layout).blocks.values() for block in stack]
    return model, BlockWeights(model, blocks, teacher, default_device())


def is_on_one_device(source: Any) -> bool:
    """Return whether a teacher is a model whose weights are all in the memory of one device, and not quantised."""
    if not isinstance(source, PreTrainedModel) or is_quantized(source):
        return False
    devices = {parameter.device for parameter in source.parameters()}
    return len(devices) == 1 and not any(device.type == "meta" for device in devices)
