"""Which blocks, heads and neurons a student keeps, by what the teacher was heard to do with them.

Which experts of a mixture a student keeps: those that write the most onto its stream, over the tokens routed to them.

What an expert writes is asked of the teacher's own experts module, one expert at a time with the tokens and weights that its
router has given it: so the arithmetic is the family's, whatever its activation and however it is run. It takes one more pass
through the teacher, for which directions the student keeps is known only after the first.
"""

import inspect
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hf_guide.calibration.config import CalibratedConfig, Importance
from hf_guide.calibration.data import Batch
from hf_guide.calibration.forward import calibration_mode, drop_padding, forward_no_cache
from hf_guide.calibration.modules import ModuleMap, ModuleRef
from hf_guide.calibration.statistics import ActivationStatistics
from hf_guide.initialization.blocks.selection import most_influential_blocks
from hf_guide.initialization.plan import ParameterPlan, Plan
from hf_guide.layouts.grammar import Axis, AxisName, AxisProduct, Projection, axis_names, merge_adjacent, project_axis
from hf_guide.models.hooks import removable_hooks
from hf_guide.utils.distributed import all_reduce_sum_, local_shard

SelectedIndices = dict[str, Tensor]


def top_influence_blocks(turned: Tensor, count: int) -> list[int]:
    """Return the `count` blocks that turn the residual stream most, in order; of equals the first.

    Args:
        turned: (blocks,), 1 - mean cosine of each block's input and output (ShortGPT, arXiv 2403.03853, equation 1).
    """
    return most_influential_blocks(turned.tolist(), count) or []


def select_units(
    plan: Plan, statistics: ActivationStatistics, config: CalibratedConfig
) -> tuple[dict[str, SelectedIndices], list[str]]:
    """Return for each of the student's parameters which heads and neurons it keeps, and what could not be chosen so.

    A unit's energy is the mean of |M^T W_u a_u|^2: what it writes into the span of M (Minitron's importance,
    arXiv 2407.14679, seen after the output weight).
    """
    notes: list[str] = []
    units: dict[str, SelectedIndices] = {}
    families: dict[str, list[ParameterPlan]] = {}
    for site in plan.parameters.values():
        if is_output_projection(plan, site) and source_module_name(site) in statistics.inner:
            families.setdefault(site.match.row.pattern, []).append(site)
    writers = [site for family in families.values() for site in family]
    for family in families.values():
        names = _unit_names(family[0])
        wanted = config.neuron_importance if len(names) == 1 and _is_flat(family[0]) else config.head_importance
        if wanted == Importance.UNIFORM or not names or not _shrinks(plan, family[0], names):
            continue
        served = {writer.name: _coupled_parameters(plan, writer, writers, names) for writer in family}
        reason = _why_units_unsupported(plan, names, served)
        if reason:
            notes.append(f"{family[0].match.row.pattern}: its {' and '.join(names)} are chosen evenly, for {reason}.")
            continue
        energies = {
            writer.name: unit_importance(plan, writer, statistics.inner[source_module_name(writer)])
            for writer in family
        }
        if _is_shared_across_blocks(
            plan, served, family, names
        ):  # one parameter serves several blocks: they keep the same heads
            pooled = torch.stack(list(energies.values())).sum(0)
            energies = dict.fromkeys(energies, pooled)
        for writer in family:
            choice = _select(plan, writer, names, energies[writer.name], served[writer.name])
            for site in [writer, *served[writer.name]]:
                units.setdefault(site.name, {}).update(choice)
    chosen = {name: _restrict_to_axes(choice, plan.parameters, name, plan) for name, choice in units.items()}
    return chosen, notes


def unit_importance(plan: Plan, writer: ParameterPlan, inner: Tensor) -> Tensor:
    """Return the energy that each head or neuron writes into the span of M, (units,) float64.

    Args:
        inner: the second moment of its input, (f,) of neurons or (heads, l, l) of heads.
    """
    weight = projected_output_weight(plan, writer)
    if inner.ndim == 1:
        return weight.square().sum(0) * inner
    heads, size, _ = inner.shape
    per_head = weight.unflatten(1, (heads, size)).movedim(1, 0)  # (heads, d, l)
    return ((per_head @ inner) * per_head).sum((1, 2))


def projected_output_weight(plan: Plan, writer: ParameterPlan) -> Tensor:
    """Return what a writer writes into the span of M, M^T W, (d_S, in) float64."""
    weight = plan.read(writer.source or "").double()
    row = writer.match.row
    weight = weight.T if row.transposed else weight  # (d_T, in)
    chosen = plan.maps(writer)[len(writer.axes) - 1 if row.transposed else 0]
    if isinstance(chosen, Projection) and chosen.matrix.numel():
        weight = project_axis(weight, 0, chosen.matrix.cpu(), torch.float64)
    return weight


def is_output_projection(plan: Plan, site: ParameterPlan) -> bool:
    """Whether a site is a weight in a block that writes onto the stream and reads something else."""
    row = site.match.row
    if row.kind != "weight" or site.match.is_bias or site.source is None or site.block is None or len(site.axes) != 2:
        return False
    stream = {AxisName(name) for name in plan.layout.projected_axes()}
    return row.output_axis in stream and row.axes[row.input_axis] not in stream


def source_module_name(site: ParameterPlan) -> str:
    """The teacher's module that feeds a site."""
    return (site.source or "").removesuffix(".weight")


def _is_flat(site: ParameterPlan) -> bool:
    return isinstance(site.axes[site.match.row.input_axis], AxisName)


def _unit_names(site: ParameterPlan) -> list[str]:
    """The names of the units that a writer reads: ["mlp"], ["heads"] or ["kv_heads", "group"]; none where they are not one."""
    axis = site.axes[site.match.row.input_axis]
    if isinstance(axis, AxisName):
        return [] if axis.name.isdigit() else [axis.name]
    factors = axis.factors[:-1] if isinstance(axis, AxisProduct) else ()
    names = [factor.name for factor in factors if isinstance(factor, AxisName) and not factor.name.isdigit()]
    return names if len(names) == len(factors) and len(names) in (1, 2) else []


def _shrinks(plan: Plan, site: ParameterPlan, names: Sequence[str]) -> bool:
    teacher, student = plan.sizes(site)
    return any(teacher[name] != student[name] for name in names)


def _coupled_parameters(
    plan: Plan, writer: ParameterPlan, writers: Sequence[ParameterPlan], names: Sequence[str]
) -> list[ParameterPlan]:
    """The other parameters whose heads or neurons are this writer's: those nearest to it by name."""
    found = []
    for site in plan.parameters.values():
        if (
            site.source is None
            or site is writer
            or not set(names) & {n for axis in site.axes for n in axis_names(axis)}
        ):
            continue
        if is_output_projection(plan, site) and site in writers:
            continue
        rivals = [other for other in writers if set(names) & set(_unit_names(other))]
        if writer in nearest_by_name(site, rivals) or site.block is None:
            found.append(site)
    return found


def nearest_by_name(site: ParameterPlan, others: Sequence[ParameterPlan]) -> list[ParameterPlan]:
    """Return those of some parameters whose names agree longest with a site's."""
    best = max(_common_prefix_length(other, site) for other in others)
    return [other for other in others if _common_prefix_length(other, site) == best]


def _common_prefix_length(one: ParameterPlan, other: ParameterPlan) -> int:
    return len(os.path.commonprefix([one.canonical.split("."), other.canonical.split(".")]))


def _why_units_unsupported(plan: Plan, names: Sequence[str], served: Mapping[str, Sequence[ParameterPlan]]) -> str:
    layout = plan.layout
    if any("{heads}" in row.pattern for row in layout.rows) and "mlp" not in names:
        return "they stand in a list of modules"
    if layout.alibi is not None and layout.alibi(plan.teacher.config) and not names[0].endswith("mlp"):
        return "their slopes (ALiBi) go by their place"
    if not any(served.values()):
        return "no weight is known that makes them"
    return ""


def _is_shared_across_blocks(
    plan: Plan, served: Mapping[str, Sequence[ParameterPlan]], family: Sequence[ParameterPlan], names: Sequence[str]
) -> bool:
    counts: dict[str, int] = {}
    for sites in served.values():
        for site in sites:
            counts[site.match.row.pattern] = counts.get(site.match.row.pattern, 0) + 1
    outside = any(site.block is None for sites in served.values() for site in sites)
    weights = {site.match.row.pattern for sites in served.values() for site in sites if not site.match.is_bias}
    return outside or any(counts[pattern] < len(family) for pattern in weights)


def _select(
    plan: Plan, writer: ParameterPlan, names: Sequence[str], energies: Tensor, served: Sequence[ParameterPlan]
) -> SelectedIndices:
    teacher, student = plan.sizes(writer)
    if len(names) == 1:
        return {names[0]: _top_indices(energies, student[names[0]])}
    groups, members = names
    table = energies.view(teacher[groups], teacher[members])
    keep_groups, keep_members = student[groups], student[members]
    if any(_is_nested(axis, groups, members) for site in served for axis in site.axes):
        places = _top_indices(
            table.sum(0), keep_members
        )  # the same of every group, for the groups are not written side by side
        kept = _top_indices(table[:, places].sum(1), keep_groups)
        return {groups: kept, members: places}
    best = table.sort(dim=1, descending=True, stable=True)
    kept = _top_indices(best.values[:, :keep_members].sum(1), keep_groups)
    inside = best.indices[kept, :keep_members].sort(1).values
    return {groups: kept, f"{groups} {members}": (kept[:, None] * teacher[members] + inside).flatten()}


def _top_indices(energies: Tensor, count: int) -> Tensor:
    """The places of the `count` greatest, in order; of equals the first."""
    return energies.argsort(descending=True, stable=True)[:count].sort().values


def _is_nested(axis: Axis, first: str, second: str) -> bool:
    return second in axis_names(merge_adjacent(axis, first, second))


def _restrict_to_axes(
    choice: SelectedIndices, sites: Mapping[str, ParameterPlan], name: str, plan: Plan
) -> SelectedIndices:
    """Leave to a parameter the choices that its own axes name."""
    site = next(site for site in sites.values() if site.name == name)
    names = {found for axis in site.axes for found in axis_names(axis)}
    return {key: places for key, places in choice.items() if set(key.split()) <= names}


def prunable_experts(
    plan: Plan, anatomy: ModuleMap, config: CalibratedConfig
) -> tuple[dict[str, ModuleRef], list[str]]:
    """Return the teacher's experts modules of which a student keeps a part, by name, and what is chosen evenly and why."""
    found: dict[str, ModuleRef] = {}
    notes: list[str] = []
    if config.expert_importance == Importance.UNIFORM:
        return found, notes
    for site in plan.parameters.values():
        part = anatomy.experts.get(_source_parent(site))
        if part is None or part.match.row != site.match.row:
            continue
        teacher, student = plan.sizes(site)
        if teacher["experts"] == student["experts"]:
            continue
        reason = _why_experts_unsupported(plan, part)
        note = f"{site.match.row.pattern}: its experts are chosen evenly, for {reason}."
        if not reason:
            found[part.name] = part
        elif note not in notes:
            notes.append(note)
    return found, notes


@torch.no_grad()
def collect_expert_importance(
    model: PreTrainedModel,
    experts: Mapping[str, ModuleRef],
    plan: Plan,
    batches: Sequence[Batch],
    *,
    show_progress: bool = False,
) -> dict[str, Tensor]:
    """Return by experts module the energy that each expert writes into the span of M, (experts,) float64.

    It is the sum over the tokens routed to it of |M^T w c|^2, with w the router's weight and c what the expert makes of the
    token. With several processes each hears its share, and all get the same sums.
    """
    energies: dict[str, Tensor] = {}
    current: Batch = {}

    def hear(part: ModuleRef, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        stream, chosen, weights = (drop_padding(each, current) for each in (*args, *kwargs.values()))
        matrix = plan.bases.get(part.axis)
        heard = energies[part.name]
        for expert in range(len(heard)):
            tokens, places = (chosen == expert).nonzero(as_tuple=True)
            if not len(tokens):
                continue
            # its own forward, and not the module itself, which would call this hook again
            written = part.module.forward(stream[tokens], chosen[tokens, places, None], weights[tokens, places, None])
            written = written if matrix is None else written @ matrix.to(written)
            heard[expert] += written.square().sum(dtype=torch.float64).cpu()

    with removable_hooks() as handles, calibration_mode(model):
        for name, part in experts.items():
            energies[name] = torch.zeros(count_experts(part), dtype=torch.float64)

            def hook(module: nn.Module, args: Any, kwargs: Any, part: ModuleRef = part) -> None:
                hear(part, args, kwargs)

            handles.append(part.module.register_forward_pre_hook(hook, with_kwargs=True))
        for current in tqdm(local_shard(batches), desc="hearing the experts", unit="batch", disable=not show_progress):
            forward_no_cache(model, current)
    all_reduce_sum_(energies.values())
    return energies


def select_experts(plan: Plan, energies: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return for each of the student's parameters with an axis of experts which it keeps: the loudest, in their order."""
    chosen: dict[tuple[str, int | None], Tensor] = {}
    for site in plan.parameters.values():
        if _source_parent(site) in energies:
            count = plan.sizes(site)[1]["experts"]
            loudest = energies[_source_parent(site)].argsort(descending=True, stable=True)[:count]
            chosen[_stack_prefix(site), site.block] = loudest.sort().values
    return {
        site.name: {"experts": chosen[_stack_prefix(site), site.block]}
        for site in plan.parameters.values()
        if (_stack_prefix(site), site.block) in chosen and any("experts" in axis_names(axis) for axis in site.axes)
    }


def count_experts(part: ModuleRef) -> int:
    """Return how many experts a module holds."""
    return len(getattr(part.module, part.parameter))


def _why_experts_unsupported(plan: Plan, part: ModuleRef) -> str:
    if (getattr(plan.teacher.config, "n_group", None) or 1) > 1:
        return "their router chooses groups of them first"
    if len(inspect.signature(part.module.forward).parameters) != 3:
        return "they are given something else than tokens, their experts and their weights"
    return ""


def _source_parent(site: ParameterPlan) -> str:
    """The teacher's module that holds what feeds a site."""
    return (site.source or "").rpartition(".")[0]


def _stack_prefix(site: ParameterPlan) -> str:
    return site.match.row.pattern.partition("{block}")[0]
