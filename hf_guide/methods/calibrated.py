"""`calibrated`: collect statistics of the teacher's activations, plan and transfer by them, then refit the weights.

Stacks run one block at a time: all tokens go through a block before the next (`calibration/sequential.py`). So a teacher that
is read from files, or that accelerate has spread over devices and a disk, needs one block in memory, its embeddings and its
head; its blocks are read once to verify that they run one after another, and once for the statistics. A model in memory, on
one device, takes the same way. Where a stack cannot run so, the blocks of a teacher of files are all held, and the report
states why.

Cost: one forward pass of the teacher over the calibration tokens, and one more where experts are selected; with a refit about
three of the student; more of a stack whose blocks pass on more than the hidden states. The refit needs what the modules of
each block were called with. On a CPU it is kept in temporary files, as long as these take a quarter of the free space at most
(`calibration/recorded_inputs.py`); of other blocks, and on a GPU, the refit runs the teacher once more.

With `layer_selection="local_search"` the 20 sets of blocks around those of most influence are tried on 128 tokens, which
takes 7 to 11 forward passes over these of a teacher of 30 blocks, and reads it once more; not for a student of another
width (`calibration/block_selection.py`).

Memory: of activations, for all tokens of a process, the teacher's hidden states after each stack; and while a block is
refitted those before it, up to four more tensors of that width (the residual stream between attention and MLP, the inputs of
both, and the projected output), and the student's before the block. What is beyond `activation_memory` is kept in a temporary
file. In memory remain of each model the attention masks, (batch, length, length) bytes where there is padding. For 65,536
tokens and a teacher of width 2,048 in float32 the activations are about 3 GB.

With a `calibration_cache_dir`, a run that was killed continues after one pass through the blocks that are refitted already.
"""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import PreTrainedModel

from hf_guide.calibration.basis import fit_activation_bases
from hf_guide.calibration.block_selection import keeps_width, select_blocks
from hf_guide.calibration.collection import CalibrationResult, collect_calibration
from hf_guide.calibration.config import CalibratedConfig, Refit
from hf_guide.calibration.cost import calibration_parts
from hf_guide.calibration.data import check_calibration_dataset
from hf_guide.calibration.forward import calibration_mode, running_device
from hf_guide.calibration.head_fitting import find_head
from hf_guide.calibration.head_rotation import head_dim_name, rotate_queries_keys, rotate_values
from hf_guide.calibration.importance import (
    BlockSelection,
    load_or_collect_expert_importance,
    prunable_experts,
    select_experts,
    select_units,
    top_influence_blocks,
)
from hf_guide.calibration.modules import ModuleMap, find_modules
from hf_guide.calibration.output_comparison import IncomparableOutputs
from hf_guide.calibration.reconstruction import BlockReconstructor
from hf_guide.calibration.refit import RefitState
from hf_guide.calibration.resume import calibration_cache_folder, describe_call
from hf_guide.initialization.basis import ResidualBasis
from hf_guide.initialization.build import untie_like_teacher
from hf_guide.initialization.config import MEASURED_SELECTIONS, LayerSelection, PlanOptions
from hf_guide.initialization.cost import CostEstimate
from hf_guide.initialization.plan import Plan
from hf_guide.initialization.planning import make_plan
from hf_guide.initialization.registry import InitializationMethod, StudentSetup
from hf_guide.initialization.report import InitializationReport
from hf_guide.initialization.transfer import Transfer
from hf_guide.utils.files import check_can_create


class CalibratedMethod(InitializationMethod):
    """Collect activations of the teacher, plan and transfer by them, then refit the student's weights."""

    requires_data: ClassVar[bool] = True
    config: CalibratedConfig
    searched: dict[str, BlockSelection] | None = None

    def check_data(self, calibration_dataset: Any, calibration_cache_dir: Any) -> None:
        """Check that there is a dataset, and that the folder is new or of an earlier run, and writable."""
        check_calibration_dataset(calibration_dataset, self.config.method)
        if calibration_cache_dir is not None:
            folder = Path(calibration_cache_dir).expanduser()
            calibration_cache_folder(folder).check()
            check_can_create(folder)

    def plan_options(self) -> PlanOptions:
        """Return the options of a plan that projects."""
        return PlanOptions(
            layer_selection=self.config.layer_selection,
            projects=True,
            logit_scale=self.config.logit_scale,
            seed=self.config.seed,
        )

    def estimate_cost(self, setup: StudentSetup) -> CostEstimate:
        """Return the memory and the time of the transfer, of the passes of both models and of the fits.

        Raises:
            ShapeError, LayoutError: The student cannot be made.
        """
        setup.check_single_stream()
        return CostEstimate([*super().estimate_cost(setup).parts, *calibration_parts(setup, self.config)])

    def collect(self, setup: StudentSetup) -> dict[str, list[float]]:
        """Check the student's plan, then run the teacher on the data; return each block's influence by stack."""
        plan = setup.validate_plan()
        self.stacks, self.widths = plan.block_mapping, plan.widths
        folder = None if setup.calibration_cache_dir is None else Path(setup.calibration_cache_dir).expanduser()
        call = describe_call(setup.teacher, setup.model_class, setup.config, setup.dtype, self.config)
        self.calibration = collect_calibration(
            setup.source,
            setup.teacher,
            setup.calibration_dataset,
            self.config,
            student=setup.config,
            calibration_cache_dir=folder,
            call={**call, **setup.identity},
            show_progress=setup.show_progress,
            **setup.hub,
        )
        self.setup = setup
        return _to_lists(self.calibration.block_scores)

    def reuse(self, calibration: CalibrationResult, setup: StudentSetup) -> None:
        """Take what another student of the same teacher collected, instead of `collect`; `searched` may be its search."""
        plan = setup.validate_plan()
        self.stacks, self.widths, self.calibration, self.setup = plan.block_mapping, plan.widths, calibration, setup

    def reselect(self, layers: Mapping[str, Sequence[int]]) -> dict[str, list[float]] | None:
        """Choose the blocks as a set: at first that of a search, and while the config cannot have it the next best one."""
        calibration = self.calibration
        if not calibration.block_selections:
            self.searched = self._search(layers) if self.searched is None else self.searched
            calibration.block_selections = dict(self.searched)
            is_changed = any(each.kept != each.by_influence for each in self.searched.values())
            return _to_lists(calibration.block_scores) if is_changed else None
        refused = {
            stack: each
            for stack, each in calibration.block_selections.items()
            if each.next_best and list(layers.get(stack, each.kept)) != each.kept
        }
        for stack, each in refused.items():
            calibration.block_selections[stack] = each.without_best()
            note = f"The config cannot have all sets of blocks that were tried in {stack.removesuffix('.{block}')}."
            calibration.notes += [note] if note not in calibration.notes else []
        return _to_lists(calibration.block_scores) if refused else None

    def searched_stacks(self) -> list[str]:
        """Return the stacks that lose blocks and whose sets of blocks are compared; note those that are too narrow."""
        if self.config.layer_selection != LayerSelection.LOCAL_SEARCH:
            return []
        calibration = self.calibration
        norms = find_modules(calibration.teacher.model, self.setup.layout).norms.values()
        axes, found = {ref.stack: ref.axis for ref in norms}, []
        for stack, influence in sorted(calibration.statistics.block_influence.items()):
            if len(self.stacks.get(stack, influence)) == len(influence):
                continue
            if keeps_width(self.widths.get(axes.get(stack) or "")):
                found.append(stack)
                continue
            note = (
                f"The blocks of greatest influence were kept in {stack.removesuffix('.{block}')}: sets of blocks are compared "
                "at the teacher's width, and the student has another."
            )
            calibration.notes += [note] if note not in calibration.notes else []
        return found

    def _search(self, layers: Mapping[str, Sequence[int]]) -> dict[str, BlockSelection]:
        """Return, by stack that loses blocks, the set that was chosen; not of stacks where no search is possible.

        Args:
            layers: By stack, the blocks of greatest influence of those that the student's config can have.
        """
        calibration = self.calibration
        found: dict[str, BlockSelection] = {}
        for stack in self.searched_stacks():
            influence = calibration.statistics.block_scores[stack]
            count = len(self.stacks[stack])
            by_influence = sorted(layers.get(stack) or top_influence_blocks(influence, count))
            try:
                found[stack] = select_blocks(calibration, stack, by_influence, self.setup)
            except IncomparableOutputs as error:
                name = stack.removesuffix(".{block}")
                calibration.notes.append(f"The blocks of greatest influence were kept in {name}. {error}")
        return found

    @torch.no_grad()
    def initialize(self, student: PreTrainedModel, setup: StudentSetup) -> InitializationReport:
        """Fill `student` by what `collect` returned, and refit it.

        Raises:
            ShapeError, LayoutError: The student's shape cannot be made from the teacher's.
            OptionError: There are fewer tokens than directions of the residual stream to find.
        """
        started = time.perf_counter()
        transfer, bases, notes = self._plan(student, setup)
        planned = time.perf_counter()
        transfer.fill_parameters(student, show_progress=setup.show_progress)
        transferred = time.perf_counter()
        facts, modules = self._refit(student, transfer, show_progress=setup.show_progress)
        seconds = {
            "statistics": self.calibration.seconds,
            "basis": planned - started,
            "transfer": transferred - planned,
            "refit": time.perf_counter() - transferred,
        }
        report = transfer.report(student, bases, seconds)
        report.notes += [*self.calibration.notes, *notes]
        report.calibration = facts | {"selected": _selected_units(transfer.plan, modules)}
        return report

    def _plan(
        self, student: PreTrainedModel, setup: StudentSetup
    ) -> tuple[Transfer, dict[str, ResidualBasis], list[str]]:
        """Return a transfer with blocks, bases, heads, neurons and experts chosen by the statistics, the bases, and notes."""
        config, statistics = self.config, self.calibration.statistics
        untie_like_teacher(student, setup.teacher)
        plan = make_plan(
            student,
            setup.teacher,
            setup.layout,
            self._with_selected_blocks(setup.options),
            vocab_indices=setup.vocab_indices,
            label_indices=setup.label_indices,
        )
        num_contexts = self.calibration.num_contexts
        transfer, bases, notes = fit_activation_bases(plan, statistics, config, num_contexts)
        self._select_units(transfer, setup)
        return transfer, bases, notes

    def _select_units(self, transfer: Transfer, setup: StudentSetup) -> None:
        """Have the plan select heads, neurons and experts by the statistics, and rotate heads before they are truncated."""
        plan, statistics = transfer.plan, self.calibration.statistics
        units, notes = select_units(plan, statistics)
        transfer.notes += notes
        plan.select(units)
        experts, notes = prunable_experts(plan, find_modules(self.calibration.teacher.model, setup.layout))
        transfer.notes += notes
        if experts:
            importance = load_or_collect_expert_importance(
                self.calibration.teacher,
                experts,
                plan,
                self.calibration.checkpoint,
                show_progress=setup.show_progress,
            )
            plan.select(select_experts(plan, importance))
        rotate_values(transfer, statistics.input_second_moments)
        rotate_queries_keys(transfer, statistics.qk_second_moments)

    def _with_selected_blocks(self, options: PlanOptions) -> PlanOptions:
        """Return the plan's options with every stack's blocks listed, where they are selected by their influence.

        Stacks whose blocks `options` lists already, because the student's config depends on them, keep those.
        """
        if self.config.layer_selection not in MEASURED_SELECTIONS:
            return options
        layers = dict(options.layer_selection) if isinstance(options.layer_selection, dict) else {}
        influence = self.calibration.block_scores
        for stack, blocks in self.stacks.items():
            name = stack.removesuffix(".{block}")
            if stack in influence and name not in layers:
                layers[name] = top_influence_blocks(influence[stack], len(blocks))
        return dataclasses.replace(options, layer_selection=layers) if layers else options

    def _refit(
        self, student: PreTrainedModel, transfer: Transfer, *, show_progress: bool
    ) -> tuple[dict[str, Any], ModuleMap]:
        """Refit the student on the teacher's device; return its entry of the report, and the student's modules."""
        config, calibration, teacher = self.config, self.calibration, self.calibration.teacher.model
        statistics, student_device = calibration.statistics, student.device
        student.to(running_device(teacher))  # type: ignore[arg-type]
        state = RefitState(calibration.teacher, student, transfer, config, calibration.checkpoint, show_progress)
        head = find_head(state)
        influence = {
            stack.removesuffix(".{block}"): blocks for stack, blocks in _to_lists(statistics.block_influence).items()
        }
        facts: dict[str, Any] = {
            "tokens": statistics.num_tokens,
            "self_generated": calibration.self_generated,
            "block_influence": influence,
        }
        massive = {stack: tokens.nonzero()[:, 0].tolist() for stack, tokens in statistics.massive_tokens.items()}
        for stack, blocks in massive.items():
            if blocks:
                facts.setdefault("massive_blocks", {})[stack.removesuffix(".{block}")] = blocks
        for stack, selection in calibration.block_selections.items():
            facts.setdefault("exchanged_blocks", {})[stack.removesuffix(".{block}")] = selection.exchange()
        with calibration_mode(teacher), calibration_mode(student):
            tied_head = head if head is not None and head.is_tied and config.refit != Refit.NONE else None
            if tied_head is not None and not state.resume_step("tied_embedding"):
                tied_head.fit_tied_embedding()
                state.save_step("tied_embedding")
            if config.refit != Refit.NONE:
                BlockReconstructor(state).refit()
                facts["residual_error"] = state.residual_error
            if tied_head is not None:
                tied_head.fit_final_norm()
            if head is not None and config.fit_logit_scale:
                facts["logit_scale"] = head.fit_logit_scale()
        student.to(student_device)  # type: ignore[arg-type]
        transfer.notes += [*state.notes, *calibration.teacher.notes]
        return facts, state.student_modules


def _to_lists(influence: Mapping[str, Any]) -> dict[str, list[float]]:
    return {stack: values.tolist() for stack, values in influence.items()}


def _selected_units(plan: Plan, modules: ModuleMap) -> dict[str, dict[str, list[int]]]:
    """Return, by output projection or experts parameter, the teacher's indices that were selected on each axis."""
    names = {*modules.residual_out, *(f"{name}.{ref.parameter}" for name, ref in modules.experts.items())}
    return {
        parameter.canonical: {
            axis: indices.tolist()
            for axis, indices in plan.selected_indices[parameter.name].items()
            if axis != head_dim_name(parameter)
        }
        for parameter in plan.parameters.values()
        if parameter.name in plan.selected_indices and parameter.canonical.removesuffix(".weight") in names
    }
