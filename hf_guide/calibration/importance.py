"""Select the teacher's blocks, heads, neurons and experts by their importance in its activations.

The importance of a head or neuron is the mean squared norm of what it adds to the student's residual stream (Minitron,
arXiv 2407.14679, measured after the output projection); that of an expert, the same over the tokens routed to it; that of a
block, its influence (ShortGPT, arXiv 2403.03853).

Experts take one more forward pass, because the student's residual basis is known only after the first. Each expert is
computed by the teacher's own experts module, for the tokens and weights that its router gave it, so the arithmetic is the
family's, whatever its activation function and however the module is implemented.
"""

import dataclasses
import inspect
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_guide.calibration.batches import Batch
from hf_guide.calibration.forward import calibration_mode, drop_padding
from hf_guide.calibration.modules import ModuleMap, ModuleRef
from hf_guide.calibration.resume import CalibrationCheckpoint
from hf_guide.calibration.sequential import SequentialModel
from hf_guide.calibration.statistics import ActivationStatistics
from hf_guide.initialization.blocks.selection import most_influential_blocks
from hf_guide.initialization.plan import ParameterPlan, Plan
from hf_guide.layouts.grammar import Axis, AxisName, AxisProduct, Projection, axis_names, merge_adjacent, project_axis
from hf_guide.utils.distributed import all_reduce_sum_

SelectedIndices = dict[str, Tensor]
"""The teacher's indices that are kept, by the name of an axis; "kv_heads group" where each group keeps its own."""


def top_influence_blocks(influence: Tensor, count: int) -> list[int]:
    """Return the `count` blocks with the largest influence, (blocks,), in order; of equal ones the first.

    Example:
        >>> top_influence_blocks(torch.tensor([0.9, 0.1, 0.4, 0.1]), 3)
        [0, 1, 2]
    """
    return most_influential_blocks(influence.tolist(), count) or []


@dataclass
class BlockSelection:
    """The blocks of one stack that were chosen as a set.

    Attributes:
        kept: The blocks that were chosen, in order.
        influence_loss: The sample's loss with the blocks of greatest influence instead.
        kept_loss: The sample's loss with the blocks that were chosen.
        by_influence: The blocks of greatest influence.
        next_best: The sets to choose if that one is not possible, best first, with their losses.
    """

    kept: list[int] = field(default_factory=list)
    influence_loss: float = float("nan")
    kept_loss: float = float("nan")
    by_influence: list[int] = field(default_factory=list)
    next_best: list[tuple[list[int], float]] = field(default_factory=list)

    def exchange(self) -> dict[str, Any]:
        """Return what was dropped of the blocks of greatest influence, what was kept instead, and both losses."""
        return {
            "dropped": [block for block in self.by_influence if block not in self.kept],
            "kept": [block for block in self.kept if block not in self.by_influence],
            "loss": self.kept_loss,
            "influence_loss": self.influence_loss,
        }

    def without_best(self) -> "BlockSelection":
        """Return what would have been chosen if the set that was were not possible."""
        (kept, loss), *others = self.next_best
        return dataclasses.replace(self, kept=kept, kept_loss=loss, next_best=others)

    def scores(self, influence: Tensor) -> Tensor:
        """Return scores of which the blocks that were kept have the largest, then others by influence, (blocks,) float64."""
        depth = len(influence)
        scores = torch.full((depth,), float(depth), dtype=torch.float64)
        by_influence: list[int] = influence.argsort(stable=True).tolist()
        for position, block in enumerate(block for block in by_influence if block not in self.kept):
            scores[block] = position
        return scores


# Heads and neurons


def select_units(plan: Plan, statistics: ActivationStatistics) -> tuple[dict[str, SelectedIndices], list[str]]:
    """Return, by the student's parameter, which heads and neurons it keeps; and notes on those selected evenly instead."""
    notes: list[str] = []
    selected: dict[str, SelectedIndices] = {}
    by_pattern: dict[str, list[ParameterPlan]] = {}
    for parameter in plan.parameters.values():
        if is_output_projection(plan, parameter) and source_module_name(parameter) in statistics.input_second_moments:
            by_pattern.setdefault(parameter.match.row.pattern, []).append(parameter)
    projections = [projection for group in by_pattern.values() for projection in group]
    for pattern, group in by_pattern.items():
        names = _unit_names(group[0])
        if not names or not _shrinks(plan, group[0], names):
            continue
        coupled = {each.name: _coupled_parameters(plan, each, projections, names) for each in group}
        reason = _why_units_unsupported(plan, names, coupled)
        if reason:
            notes.append(f"{pattern}: its {' and '.join(names)} are selected evenly, because {reason}.")
            continue
        scores = {
            each.name: unit_importance(plan, each, statistics.input_second_moments[source_module_name(each)])
            for each in group
        }
        if _is_shared_across_blocks(coupled, group):  # then all blocks keep the same units
            pooled = torch.stack(list(scores.values())).sum(0)
            scores = dict.fromkeys(scores, pooled)
        for projection in group:
            indices = _select(plan, projection, names, scores[projection.name], coupled[projection.name])
            for parameter in [projection, *coupled[projection.name]]:
                selected.setdefault(parameter.name, {}).update(indices)
    by_name = {parameter.name: parameter for parameter in plan.parameters.values()}
    return {name: _restrict_to_axes(indices, by_name[name]) for name, indices in selected.items()}, notes


def unit_importance(plan: Plan, projection: ParameterPlan, second_moment: Tensor) -> Tensor:
    """Return each unit's mean squared output after M^T W, (units,) float64.

    Args:
        plan: The plan, with its bases M.
        projection: An output projection W.
        second_moment: Of its input: (f,) for neurons, (heads, l, l) for heads.
    """
    weight = projected_output_weight(plan, projection)
    if second_moment.ndim == 1:
        return weight.square().sum(0) * second_moment
    heads, head_dim, _ = second_moment.shape
    per_head = weight.unflatten(1, (heads, head_dim)).movedim(1, 0)  # (heads, d, l)
    return ((per_head @ second_moment) * per_head).sum((1, 2))


def projected_output_weight(plan: Plan, projection: ParameterPlan) -> Tensor:
    """Return M^T W of an output projection W, (d_S, in) float64."""
    weight = plan.read(projection.source or "").double()
    transposed = projection.match.row.transposed
    weight = weight.T if transposed else weight  # (d_T, in)
    axis_map = plan.maps(projection)[len(projection.axes) - 1 if transposed else 0]
    if isinstance(axis_map, Projection) and axis_map.matrix.numel():
        weight = project_axis(weight, 0, axis_map.matrix.cpu(), torch.float64)
    return weight


def is_output_projection(plan: Plan, parameter: ParameterPlan) -> bool:
    """Return whether a parameter is a weight in a block that writes to the residual stream and reads something else."""
    row = parameter.match.row
    if row.kind != "weight" or parameter.match.is_bias or len(parameter.axes) != 2:
        return False
    if parameter.source is None or parameter.block is None:
        return False
    residual = {AxisName(name) for name in plan.layout.projected_axes()}
    return row.output_axis in residual and row.axes[row.input_axis] not in residual


def source_module_name(parameter: ParameterPlan) -> str:
    """Return the name of the teacher's module that a parameter comes from."""
    return (parameter.source or "").removesuffix(".weight")


def _unit_names(projection: ParameterPlan) -> list[str]:
    """Return the axes of its units: ["mlp"], ["heads"] or ["kv_heads", "group"]; [] where its input is something else."""
    axis = projection.axes[projection.match.row.input_axis]
    if isinstance(axis, AxisName):
        return [] if axis.name.isdigit() else [axis.name]
    factors = axis.factors[:-1] if isinstance(axis, AxisProduct) else ()
    names = [factor.name for factor in factors if isinstance(factor, AxisName) and not factor.name.isdigit()]
    return names if len(names) == len(factors) and len(names) in (1, 2) else []


def _shrinks(plan: Plan, parameter: ParameterPlan, names: Sequence[str]) -> bool:
    teacher, student = plan.sizes(parameter)
    return any(teacher[name] != student[name] for name in names)


def _coupled_parameters(
    plan: Plan, projection: ParameterPlan, projections: Sequence[ParameterPlan], names: Sequence[str]
) -> list[ParameterPlan]:
    """Return the other parameters with this projection's units on an axis: those nearest to it by name."""
    rivals = [other for other in projections if set(names) & set(_unit_names(other))]
    coupled = []
    for parameter in plan.parameters.values():
        if parameter.source is None or parameter in projections or not _has_any_axis(parameter, names):
            continue
        if projection in nearest_by_name(parameter, rivals) or parameter.block is None:
            coupled.append(parameter)
    return coupled


def _has_any_axis(parameter: ParameterPlan, names: Sequence[str]) -> bool:
    return bool(set(names) & {name for axis in parameter.axes for name in axis_names(axis)})


def nearest_by_name(parameter: ParameterPlan, others: Sequence[ParameterPlan]) -> list[ParameterPlan]:
    """Return those of some parameters whose names share the longest prefix with a parameter's."""
    longest = max(_common_prefix_length(other, parameter) for other in others)
    return [other for other in others if _common_prefix_length(other, parameter) == longest]


def _common_prefix_length(first: ParameterPlan, second: ParameterPlan) -> int:
    return len(os.path.commonprefix([first.canonical.split("."), second.canonical.split(".")]))


def _why_units_unsupported(plan: Plan, names: Sequence[str], coupled: Mapping[str, Sequence[ParameterPlan]]) -> str:
    layout = plan.layout
    if any("{heads}" in row.pattern for row in layout.rows) and "mlp" not in names:
        return "they are a list of modules"
    if layout.alibi is not None and layout.alibi(plan.teacher.config) and not names[0].endswith("mlp"):
        return "their ALiBi slopes depend on their index"
    if not any(coupled.values()):
        return "the weight that computes them is not known"
    return ""


def _is_shared_across_blocks(coupled: Mapping[str, Sequence[ParameterPlan]], group: Sequence[ParameterPlan]) -> bool:
    """Return whether one parameter has the units of several blocks on an axis."""
    parameters = [parameter for each in coupled.values() for parameter in each]
    counts: dict[str, int] = {}
    for parameter in parameters:
        counts[parameter.match.row.pattern] = counts.get(parameter.match.row.pattern, 0) + 1
    weights = {parameter.match.row.pattern for parameter in parameters if not parameter.match.is_bias}
    is_outside = any(parameter.block is None for parameter in parameters)
    return is_outside or any(counts[pattern] < len(group) for pattern in weights)


def _select(
    plan: Plan,
    projection: ParameterPlan,
    names: Sequence[str],
    importance: Tensor,
    coupled: Sequence[ParameterPlan],
) -> SelectedIndices:
    teacher, student = plan.sizes(projection)
    if len(names) == 1:
        return {names[0]: _top_indices(importance, student[names[0]])}
    groups, members = names
    table = importance.view(teacher[groups], teacher[members])
    if any(_is_nested(axis, groups, members) for parameter in coupled for axis in parameter.axes):
        # The groups are not adjacent in memory, so every group keeps the same members.
        member_indices = _top_indices(table.sum(0), student[members])
        group_indices = _top_indices(table[:, member_indices].sum(1), student[groups])
        return {groups: group_indices, members: member_indices}
    ranked = table.sort(dim=1, descending=True, stable=True)
    group_indices = _top_indices(ranked.values[:, : student[members]].sum(1), student[groups])
    within = ranked.indices[group_indices, : student[members]].sort(1).values
    return {
        groups: group_indices,
        f"{groups} {members}": (group_indices[:, None] * teacher[members] + within).flatten(),
    }


def _top_indices(importance: Tensor, count: int) -> Tensor:
    """Return the indices of the `count` largest, in order; of equal ones the first."""
    return importance.argsort(descending=True, stable=True)[:count].sort().values


def _is_nested(axis: Axis, first: str, second: str) -> bool:
    return second in axis_names(merge_adjacent(axis, first, second))


def _restrict_to_axes(selected: SelectedIndices, parameter: ParameterPlan) -> SelectedIndices:
    """Return the selections of those axes that a parameter has."""
    names = {name for axis in parameter.axes for name in axis_names(axis)}
    return {key: indices for key, indices in selected.items() if set(key.split()) <= names}


# Experts


def prunable_experts(plan: Plan, modules: ModuleMap) -> tuple[dict[str, ModuleRef], list[str]]:
    """Return the teacher's experts modules to prune by importance; and notes on those whose experts are selected evenly."""
    prunable: dict[str, ModuleRef] = {}
    notes: list[str] = []
    for parameter in plan.parameters.values():
        ref = modules.experts.get(_source_parent(parameter))
        if ref is None or ref.match.row != parameter.match.row:
            continue
        teacher, student = plan.sizes(parameter)
        if teacher["experts"] == student["experts"]:
            continue
        reason = _why_experts_unsupported(plan, ref)
        note = f"{parameter.match.row.pattern}: its experts are selected evenly, because {reason}."
        if not reason:
            prunable[ref.name] = ref
        elif note not in notes:
            notes.append(note)
    return prunable, notes


def load_or_collect_expert_importance(
    sequential: SequentialModel,
    experts: Mapping[str, ModuleRef],
    plan: Plan,
    checkpoint: CalibrationCheckpoint | None,
    *,
    show_progress: bool = False,
) -> dict[str, Tensor]:
    """Return `collect_expert_importance`, from the checkpoint if an earlier run has finished it."""
    saved = None if checkpoint is None else checkpoint.load_step("expert_importance")
    if saved is not None:
        return saved[0]
    importance = collect_expert_importance(sequential, experts, plan, show_progress=show_progress)
    if checkpoint is not None:
        checkpoint.save_step("expert_importance", importance, {})
    return importance


@torch.no_grad()
def collect_expert_importance(
    sequential: SequentialModel,
    experts: Mapping[str, ModuleRef],
    plan: Plan,
    *,
    show_progress: bool = False,
) -> dict[str, Tensor]:
    """Return, by experts module, the importance of each expert, (experts,) float64; the same in all processes.

    It is the sum over the tokens routed to the expert of |M^T w c|^2, with w the router's weight and c the expert's output.
    """
    importance = {name: torch.zeros(count_experts(ref), dtype=torch.float64) for name, ref in experts.items()}
    batch: Batch = {}

    def add(ref: ModuleRef, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tokens, expert_indices, weights = (
            drop_padding(each, batch, sequential.model) for each in (*args, *kwargs.values())
        )
        matrix = plan.bases.get(ref.axis)
        sums = importance[ref.name]
        for expert in range(len(sums)):
            rows, slots = (expert_indices == expert).nonzero(as_tuple=True)
            if not len(rows):
                continue
            # Its forward, because a call of the module would call this hook again.
            output = ref.module.forward(tokens[rows], expert_indices[rows, slots, None], weights[rows, slots, None])
            output = output if matrix is None else output @ matrix.to(output)
            sums[expert] += output.square().sum(dtype=torch.float64).cpu()

    def begin(index: int) -> None:
        nonlocal batch
        batch = sequential.batches[index]

    def register(handles: list[Any], stack: str | None, index: int) -> None:
        for ref in experts.values():
            if (ref.stack, ref.block) != (stack, index) and (stack is not None or ref.stack in sequential.visited):
                continue

            def hook(module: nn.Module, args: Any, kwargs: Any, ref: ModuleRef = ref) -> None:
                add(ref, args, kwargs)

            handles.append(ref.module.register_forward_pre_hook(hook, with_kwargs=True))

    blocks = sum(map(len, sequential.stacks.values()))
    with (
        calibration_mode(sequential.model),
        tqdm(total=blocks, desc="calibration: experts", unit="block", disable=not show_progress) as bar,
    ):
        sequential.visit(register, begin, after_block=lambda count: bar.update())
    all_reduce_sum_(importance.values())
    return importance


def select_experts(plan: Plan, importance: Mapping[str, Tensor]) -> dict[str, SelectedIndices]:
    """Return, by the student's parameter with an axis of experts, which it keeps: the most important, in their order."""
    selected: dict[tuple[str, int | None], Tensor] = {}
    for parameter in plan.parameters.values():
        if _source_parent(parameter) in importance:
            count = plan.sizes(parameter)[1]["experts"]
            selected[_stack_prefix(parameter), parameter.block] = _top_indices(
                importance[_source_parent(parameter)], count
            )
    return {
        parameter.name: {"experts": selected[_stack_prefix(parameter), parameter.block]}
        for parameter in plan.parameters.values()
        if (_stack_prefix(parameter), parameter.block) in selected and _has_any_axis(parameter, ["experts"])
    }


def count_experts(ref: ModuleRef) -> int:
    """Return how many experts a module holds."""
    return len(getattr(ref.module, ref.parameter))


def _why_experts_unsupported(plan: Plan, ref: ModuleRef) -> str:
    if (getattr(plan.teacher.config, "n_group", None) or 1) > 1:
        return "their router selects groups of them first"
    if len(inspect.signature(ref.module.forward).parameters) != 3:
        return "their module takes other arguments than tokens, their experts and their weights"
    return ""


def _source_parent(parameter: ParameterPlan) -> str:
    """Return the name of the teacher's module that holds the parameter's source."""
    return (parameter.source or "").rpartition(".")[0]


def _stack_prefix(parameter: ParameterPlan) -> str:
    return parameter.match.row.pattern.partition("{block}")[0]
