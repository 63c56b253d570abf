"""`calibrated`: a teacher is heard on real data, the student is planned by it, carried over, and fitted again.

What it costs: one pass of the calibration tokens through the teacher without repair, and one more where experts are chosen;
with repair three through the teacher (two where its head is not tied) and about four through the student; more of a stack
whose blocks hand on more than the stream. While a block is repaired each process holds, of all its tokens, the teacher's
stream and up to three more of its width (the stream between attention and MLP, and what either reads), and the student's; one
more of the teacher's where the head is tied; of an encoder-decoder's decoder both encoders' outputs; and of each model what a
batch's attention is masked with, (batch, length, length) bytes where there is padding. For 65,536 tokens and a teacher of
width 2,048 in float32 that is about 2.5 GiB. Without repair memory does not depend on how many tokens there are, but for the
tokens (or pixels) themselves. With a folder to keep what is done, a run that was killed goes on where it was, after one pass
through the blocks that are repaired already.
"""

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from hf_guide.calibration.config import BasisKind, CalibratedConfig, Refit
from hf_guide.calibration.data import (
    Batch,
    check_calibration_dataset,
    default_num_tokens,
    is_self_generated,
    load_calibration_batches,
)
from hf_guide.calibration.forward import calibration_mode
from hf_guide.calibration.head_fitting import (
    find_head_pair,
    fit_final_norm,
    fit_logit_scale,
    fit_tied_embedding,
    token_counts,
)
from hf_guide.calibration.head_rotation import head_dim_name, rotate_queries_keys, rotate_values
from hf_guide.calibration.importance import (
    collect_expert_importance,
    prunable_experts,
    select_experts,
    select_units,
    top_influence_blocks,
)
from hf_guide.calibration.modules import ModuleRef, find_modules, linear_weight
from hf_guide.calibration.reconstruction import BlockReconstructor
from hf_guide.calibration.resume import (
    CalibrationCheckpoint,
    check_calibration_dir,
    describe_call,
    describe_data,
    load_text,
)
from hf_guide.calibration.self_generation import generate_calibration_text
from hf_guide.calibration.statistics import ActivationStatistics, collect_statistics, mlp_width
from hf_guide.errors import OptionError, TeacherError
from hf_guide.initialization.build import untie_like_teacher
from hf_guide.initialization.config import LayerSelection, PlanOptions
from hf_guide.initialization.infer_layout import layout_for
from hf_guide.initialization.plan import Plan
from hf_guide.initialization.planning import make_plan
from hf_guide.initialization.registry import InitializationMethod, StudentSetup
from hf_guide.initialization.report import InitializationReport
from hf_guide.initialization.transfer import fit_bases, projected_axes
from hf_guide.initialization.validate_plan import validate_plan
from hf_guide.layouts.registry import Layout
from hf_guide.teachers.checkpoint import TeacherCheckpoint
from hf_guide.utils.distributed import default_device, rank_and_world_size


@dataclass
class CalibrationResult:
    """What was heard: the running teacher, its data, and the sums; and where what follows is kept, if anywhere."""

    model: PreTrainedModel
    batches: list[Batch]
    statistics: ActivationStatistics
    seconds: float
    checkpoint: CalibrationCheckpoint | None = None
    own_text: bool = False


class CalibratedMethod(InitializationMethod):
    """Collect activations of the teacher, plan and transfer by them, then refit the student's weights."""

    requires_data: ClassVar[bool] = True
    config: CalibratedConfig

    def check_data(self, calibration_dataset: Any, calibration_cache_dir: Any) -> None:
        """Check that there is a dataset, and that the folder is new or an earlier run's."""
        check_calibration_dataset(calibration_dataset, self.config.method)
        if calibration_cache_dir is not None:
            check_calibration_dir(Path(calibration_cache_dir))

    def plan_options(self) -> PlanOptions:
        """Return the options of a plan that projects."""
        return PlanOptions(
            layer_selection=self.config.layer_selection,
            projects=True,
            logit_scale=self.config.logit_scale,
            seed=self.config.seed,
        )

    def collect(self, setup: StudentSetup) -> dict[str, list[float]]:
        """Check the student's plan, then run the teacher on the data; return each block's influence by stack."""
        plan = validate_plan(setup.model_class, setup.config, setup.teacher, setup.options)
        self.stacks = plan.stacks
        folder, call = setup.calibration_cache_dir, None
        if folder is not None:
            folder = Path(folder)
            call = describe_call(setup.teacher, setup.model_class, setup.config, setup.dtype, self.config)
            call |= setup.identity
        self.calibration = collect_calibration(
            setup.source,
            setup.teacher,
            setup.calibration_dataset,
            self.config,
            folder=folder,
            call=call,
            show_progress=setup.show_progress,
            **setup.hub,
        )
        return {stack: values.tolist() for stack, values in self.calibration.statistics.block_influence.items()}

    def initialize(self, student: PreTrainedModel, setup: StudentSetup) -> InitializationReport:
        """Fill `student` by the activations that `collect` has."""
        options = setup.options
        if self.config.layer_selection == LayerSelection.BLOCK_INFLUENCE:
            options = select_blocks_by_influence(self.calibration, options, self.stacks)
        return initialize_calibrated(
            student,
            setup.teacher,
            setup.layout,
            options,
            self.config,
            self.calibration,
            vocab_indices=setup.vocab_indices,
            label_indices=setup.label_indices,
            show_progress=setup.show_progress,
        )


@torch.no_grad()
def collect_calibration(
    teacher: "PreTrainedModel | Any",
    opened: TeacherCheckpoint,
    dataset: Any,
    config: CalibratedConfig,
    *,
    folder: Path | None = None,
    call: Mapping[str, Any] | None = None,
    show_progress: bool = False,
    **hub: Any,
) -> CalibrationResult:
    """Run a teacher on the calibration dataset once and return what was heard.

    Args:
        teacher: what `from_teacher` was given; a loaded model is used as it is and where it is, anything else is loaded from
            `opened`, and runs on this process's GPU where there is one.
        folder: where what is done is kept, and gone on with. call: all else that the student depends on, as JSON has it.

    Raises:
        OptionError: a dataset of which no batches can be made, or fewer batches than there are processes; a folder of another
            call.
        TeacherError: activations that are not finite, or a model that is spread over several devices.
    """
    started = time.perf_counter()
    layout = layout_for(opened.config, opened.model_class)
    model = teacher if isinstance(teacher, PreTrainedModel) else materialize_teacher(opened, default_device())
    check_single_device(model)
    anatomy = find_modules(model, layout)
    tokens = config.calibration_tokens or default_num_tokens(mlp_width(anatomy, layout, model))
    written = None
    if is_self_generated(dataset):
        written = load_text(folder) if folder is not None else None
        if written is None:
            written = generate_calibration_text(model, opened, config, tokens=tokens, show_progress=show_progress)
        dataset = [{"input_ids": rows} for rows in written.split(config.calibration_batch_size)]
    batches = load_calibration_batches(dataset, model, opened, config, tokens=tokens, **hub)
    processes = rank_and_world_size()[1]
    if len(batches) < processes:
        raise OptionError(
            f"calibration_dataset makes {len(batches)} batches for {processes} processes: pass more data, or lower "
            "calibration_batch_size."
        )
    checkpoint = None
    if folder is not None:
        checkpoint = CalibrationCheckpoint.begin(folder, {**(call or {}), **describe_data(model, batches)})
        if written is not None:
            checkpoint.save_text(written)
    statistics = collect_statistics(
        model,
        anatomy,
        layout,
        batches,
        checkpoint=checkpoint,
        show_progress=show_progress,
    )
    seconds = time.perf_counter() - started
    return CalibrationResult(model, batches, statistics, seconds, checkpoint, own_text=written is not None)


def check_single_device(model: PreTrainedModel) -> None:
    """Refuse a model of which parts are on several devices: what is heard in one is compared with what is heard in another.

    Raises:
        TeacherError: names the devices.
    """
    devices = sorted({str(parameter.device) for parameter in model.parameters()})
    if len(devices) > 1:
        raise TeacherError(
            f"The teacher is spread over {', '.join(devices)}, and calibrated runs it on one device. Load it on one "
            "(device_map={'': 0}, or none for the CPU), or pass its folder or Hub id."
        )


def materialize_teacher(opened: TeacherCheckpoint, device: torch.device) -> PreTrainedModel:
    """Return a model with an opened teacher's weights, in the dtype they are stored in, on a device."""
    with no_init_weights():
        model = opened.model_class._from_config(opened.config, dtype=opened.dtype)
    model.tie_weights()
    tensors = model.state_dict(keep_vars=True)
    with torch.no_grad():
        for name in opened.weights.keys():
            tensors[name].copy_(opened.weights.get(name))
    return model.eval().to(device)


def select_blocks_by_influence(
    calibration: CalibrationResult, options: PlanOptions, stacks: Mapping[str, list[int]]
) -> PlanOptions:
    """Return the plan's options with every stack's blocks listed, where they are selected by their influence.

    Stacks whose blocks `options` lists already, because the student's config depends on them, keep those.
    """
    layers = dict(options.layer_selection) if isinstance(options.layer_selection, dict) else {}
    influence = calibration.statistics.block_influence
    for stack, blocks in stacks.items():
        name = stack.removesuffix(".{block}")
        if stack in influence and name not in layers:
            layers[name] = top_influence_blocks(influence[stack], len(blocks))
    return dataclasses.replace(options, layer_selection=layers) if layers else options


@torch.no_grad()
def initialize_calibrated(
    student: PreTrainedModel,
    teacher: TeacherCheckpoint,
    layout: Layout,
    options: PlanOptions,
    config: CalibratedConfig,
    calibration: CalibrationResult,
    *,
    vocab_indices: Tensor | None = None,
    label_indices: Tensor | None = None,
    show_progress: bool = False,
) -> InitializationReport:
    """Fill `student` from a teacher that was heard; return where all came from.

    Raises:
        ShapeError, LayoutError: what the plan refuses.
        OptionError: fewer tokens heard than directions are to be found.
    """
    started = time.perf_counter()
    untie_like_teacher(student, teacher)
    plan = make_plan(student, teacher, layout, options, vocab_indices=vocab_indices, label_indices=label_indices)
    statistics = calibration.statistics
    activations = None
    basis = config.basis
    if basis == BasisKind.AUTO:
        basis = BasisKind.CHANNELS if plan.has_unfoldable_norms() else BasisKind.ACTIVATIONS
    if basis != BasisKind.EMBEDDINGS:
        activations = {axis: statistics.moments[axis] for axis in projected_axes(plan) if axis in statistics.moments}
    if basis == BasisKind.ACTIVATIONS:
        _check_enough_tokens(plan, statistics)
    transfer, fitted = fit_bases(plan, activations, channels=basis == BasisKind.CHANNELS)
    units, notes = select_units(plan, statistics, config)
    transfer.notes += notes
    plan.keep(units)
    experts, notes = prunable_experts(plan, find_modules(calibration.model, layout), config)
    transfer.notes += notes
    if experts:
        plan.keep(select_experts(plan, _expert_importance(experts, plan, calibration, show_progress)))
    if config.rotate_values:
        rotate_values(transfer, statistics.inner)
    rotate_queries_keys(transfer, statistics.projected)
    seconds = {"hearing": calibration.seconds, "basis": time.perf_counter() - started}
    transfer.fill_parameters(student, show_progress=show_progress)
    seconds["transfer"] = time.perf_counter() - started - seconds["basis"]

    mended = time.perf_counter()
    model = calibration.model
    home = student.device
    student.to(model.device)  # type: ignore[arg-type]
    mender = BlockReconstructor(
        model,
        student,
        transfer,
        calibration.batches,
        config,
        progress=show_progress,
        checkpoint=calibration.checkpoint,
    )
    head = find_head_pair(mender)
    facts: dict[str, Any] = {
        "tokens": statistics.tokens,
        "self_generated": calibration.own_text,
        "block_influence": _by_stack(statistics.block_influence),
    }
    with calibration_mode(model), calibration_mode(student):
        if head is not None and head.tied and config.fit_tied_embedding and not mender.resume_step("table"):
            fit_tied_embedding(mender, head, token_counts(mender, len(linear_weight(head.student.module))))
            mender.keep("table")
        if config.refit != Refit.NONE:
            mender.refit()
            facts["residual_error"] = mender.lost
        if head is not None and head.tied and config.fit_final_norm:
            fit_final_norm(mender, head)
        if head is not None and config.fit_logit_scale:
            facts["logit_scale"] = fit_logit_scale(mender, head)
    student.to(home)  # type: ignore[arg-type]
    seconds["repair"] = time.perf_counter() - mended
    transfer.notes += mender.notes
    named = {
        *mender.student_modules.writers,
        *(f"{name}.{part.parameter}" for name, part in mender.student_modules.experts.items()),
    }
    facts["selected"] = {
        site.canonical: {
            axis: places.tolist()
            for axis, places in plan.selected_indices[site.name].items()
            if axis != head_dim_name(site)
        }
        for site in plan.parameters.values()
        if site.name in plan.selected_indices and site.canonical.removesuffix(".weight") in named
    }
    report = transfer.report(student, fitted, seconds)
    report.calibration = facts
    return report


def _check_enough_tokens(plan: Plan, statistics: ActivationStatistics) -> None:
    """Refuse to look for directions that no token lies in: they would be any."""
    for axis in projected_axes(plan):
        wanted, heard = plan.widths[axis][1], statistics.heard.get(axis)
        if heard is not None and heard < wanted:
            raise OptionError(
                f"calibration_dataset has {heard} tokens, and the student's stream {axis!r} is {wanted} wide: that many "
                f"directions are looked for among the tokens. Pass at least {wanted}, better thousands, or choose "
                "basis='embeddings', which needs none."
            )


def _expert_importance(
    experts: Mapping[str, ModuleRef], plan: Plan, calibration: CalibrationResult, show_progress: bool
) -> dict[str, Tensor]:
    """Return what each expert writes, as an earlier run of the same call has heard it or as it is heard now."""
    checkpoint = calibration.checkpoint
    kept = None if checkpoint is None else checkpoint.load_step("experts")
    if kept is not None:
        return kept[0]
    energies = collect_expert_importance(
        calibration.model, experts, plan, calibration.batches, show_progress=show_progress
    )
    if checkpoint is not None:
        checkpoint.save_step("experts", energies, {})
    return energies


def _by_stack(turned: Mapping[str, Tensor]) -> dict[str, list[float]]:
    return {stack.removesuffix(".{block}"): values.tolist() for stack, values in turned.items()}
