"""Which blocks, heads and neurons a student keeps, by what the teacher was heard to do with them."""

import os
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hf_guide.calibration.statistics import Statistics
from hf_guide.initialization.axes import Axis, Name, Product, Projection, axis_names, contract, joined
from hf_guide.initialization.block_choice import most_influential
from hf_guide.initialization.choices import UnitChoice
from hf_guide.initialization.plan import Plan, Site

Choice = dict[str, Tensor]


def influential_blocks(turned: Tensor, count: int) -> list[int]:
    """Return the `count` blocks that turn the residual stream most, in order; of equals the first.

    Args:
        turned: (blocks,), 1 - mean cosine of each block's input and output (ShortGPT, arXiv 2403.03853, equation 1).
    """
    return most_influential(turned.tolist(), count) or []


def choose_units(plan: Plan, statistics: Statistics) -> tuple[dict[str, Choice], list[str]]:
    """Return for each of the student's parameters which heads and neurons it keeps, and what could not be chosen so.

    A unit's energy is the mean of |M^T W_u a_u|^2: what it writes into the span of M (Minitron's importance,
    arXiv 2407.14679, seen after the output weight).
    """
    options, notes = plan.options, []
    units: dict[str, Choice] = {}
    families: dict[str, list[Site]] = {}
    for site in plan.sites.values():
        if is_writer(plan, site) and module_name(site) in statistics.inner:
            families.setdefault(site.match.row.pattern, []).append(site)
    writers = [site for family in families.values() for site in family]
    for family in families.values():
        names = _unit_names(family[0])
        wanted = options.neurons if len(names) == 1 and _is_flat(family[0]) else options.heads
        if wanted == UnitChoice.EVEN or not names or not _shrinks(plan, family[0], names):
            continue
        served = {writer.name: _served_by(plan, writer, writers, names) for writer in family}
        reason = _reason_not_to(plan, names, served)
        if reason:
            notes.append(f"{family[0].match.row.pattern}: its {' and '.join(names)} are chosen evenly, for {reason}.")
            continue
        energies = {
            writer.name: unit_energies(plan, writer, statistics.inner[module_name(writer)]) for writer in family
        }
        if _is_shared(plan, served, family, names):  # one parameter serves several blocks: they keep the same heads
            pooled = torch.stack(list(energies.values())).sum(0)
            energies = dict.fromkeys(energies, pooled)
        for writer in family:
            choice = _choose(plan, writer, names, energies[writer.name], served[writer.name])
            for site in [writer, *served[writer.name]]:
                units.setdefault(site.name, {}).update(choice)
    chosen = {name: _of_axes(choice, plan.sites, name, plan) for name, choice in units.items()}
    return chosen, notes


def unit_energies(plan: Plan, writer: Site, inner: Tensor) -> Tensor:
    """Return the energy that each head or neuron writes into the span of M, (units,) float64.

    Args:
        inner: the second moment of its input, (f,) of neurons or (heads, l, l) of heads.
    """
    weight = seen_weight(plan, writer)
    if inner.ndim == 1:
        return weight.square().sum(0) * inner
    heads, size, _ = inner.shape
    per_head = weight.unflatten(1, (heads, size)).movedim(1, 0)  # (heads, d, l)
    return ((per_head @ inner) * per_head).sum((1, 2))


def seen_weight(plan: Plan, writer: Site) -> Tensor:
    """Return what a writer writes into the span of M, M^T W, (d_S, in) float64."""
    weight = plan.read(writer.source or "").double()
    row = writer.match.row
    weight = weight.T if row.transposed else weight  # (d_T, in)
    chosen = plan.maps(writer)[len(writer.axes) - 1 if row.transposed else 0]
    if isinstance(chosen, Projection) and chosen.matrix.numel():
        weight = contract(weight, 0, chosen.matrix.cpu(), torch.float64)
    return weight


def is_writer(plan: Plan, site: Site) -> bool:
    """Whether a site is a weight in a block that writes onto the stream and reads something else."""
    row = site.match.row
    if row.kind != "weight" or site.match.is_bias or site.source is None or site.block is None or len(site.axes) != 2:
        return False
    stream = {Name(name) for name in plan.layout.projected()}
    return row.output_axis in stream and row.axes[row.input_axis] not in stream


def module_name(site: Site) -> str:
    """The teacher's module that feeds a site."""
    return (site.source or "").removesuffix(".weight")


def _is_flat(site: Site) -> bool:
    return isinstance(site.axes[site.match.row.input_axis], Name)


def _unit_names(site: Site) -> list[str]:
    """The names of the units that a writer reads: ["mlp"], ["heads"] or ["kv_heads", "group"]; none where they are not one."""
    axis = site.axes[site.match.row.input_axis]
    if isinstance(axis, Name):
        return [] if axis.name.isdigit() else [axis.name]
    factors = axis.factors[:-1] if isinstance(axis, Product) else ()
    names = [factor.name for factor in factors if isinstance(factor, Name) and not factor.name.isdigit()]
    return names if len(names) == len(factors) and len(names) in (1, 2) else []


def _shrinks(plan: Plan, site: Site, names: Sequence[str]) -> bool:
    teacher, student = plan.sizes(site)
    return any(teacher[name] != student[name] for name in names)


def _served_by(plan: Plan, writer: Site, writers: Sequence[Site], names: Sequence[str]) -> list[Site]:
    """The other parameters whose heads or neurons are this writer's: those nearest to it by name."""
    found = []
    for site in plan.sites.values():
        if (
            site.source is None
            or site is writer
            or not set(names) & {n for axis in site.axes for n in axis_names(axis)}
        ):
            continue
        if is_writer(plan, site) and site in writers:
            continue
        rivals = [other for other in writers if set(names) & set(_unit_names(other))]
        if writer in nearest(site, rivals) or site.block is None:
            found.append(site)
    return found


def nearest(site: Site, others: Sequence[Site]) -> list[Site]:
    """Return those of some parameters whose names agree longest with a site's."""
    best = max(_likeness(other, site) for other in others)
    return [other for other in others if _likeness(other, site) == best]


def _likeness(one: Site, other: Site) -> int:
    return len(os.path.commonprefix([one.canonical.split("."), other.canonical.split(".")]))


def _reason_not_to(plan: Plan, names: Sequence[str], served: Mapping[str, Sequence[Site]]) -> str:
    layout = plan.layout
    if any("{heads}" in row.pattern for row in layout.rows) and "mlp" not in names:
        return "they stand in a list of modules"
    if layout.alibi is not None and layout.alibi(plan.teacher.config) and not names[0].endswith("mlp"):
        return "their slopes (ALiBi) go by their place"
    if not any(served.values()):
        return "no weight is known that makes them"
    return ""


def _is_shared(plan: Plan, served: Mapping[str, Sequence[Site]], family: Sequence[Site], names: Sequence[str]) -> bool:
    counts: dict[str, int] = {}
    for sites in served.values():
        for site in sites:
            counts[site.match.row.pattern] = counts.get(site.match.row.pattern, 0) + 1
    outside = any(site.block is None for sites in served.values() for site in sites)
    weights = {site.match.row.pattern for sites in served.values() for site in sites if not site.match.is_bias}
    return outside or any(counts[pattern] < len(family) for pattern in weights)


def _choose(plan: Plan, writer: Site, names: Sequence[str], energies: Tensor, served: Sequence[Site]) -> Choice:
    teacher, student = plan.sizes(writer)
    if len(names) == 1:
        return {names[0]: _top(energies, student[names[0]])}
    groups, members = names
    table = energies.view(teacher[groups], teacher[members])
    keep_groups, keep_members = student[groups], student[members]
    if any(_is_nested(axis, groups, members) for site in served for axis in site.axes):
        places = _top(
            table.sum(0), keep_members
        )  # the same of every group, for the groups are not written side by side
        kept = _top(table[:, places].sum(1), keep_groups)
        return {groups: kept, members: places}
    best = table.sort(dim=1, descending=True, stable=True)
    kept = _top(best.values[:, :keep_members].sum(1), keep_groups)
    inside = best.indices[kept, :keep_members].sort(1).values
    return {groups: kept, f"{groups} {members}": (kept[:, None] * teacher[members] + inside).flatten()}


def _top(energies: Tensor, count: int) -> Tensor:
    """The places of the `count` greatest, in order; of equals the first."""
    return energies.argsort(descending=True, stable=True)[:count].sort().values


def _is_nested(axis: Axis, first: str, second: str) -> bool:
    return second in axis_names(joined(axis, first, second))


def _of_axes(choice: Choice, sites: Mapping[str, Site], name: str, plan: Plan) -> Choice:
    """Leave to a parameter the choices that its own axes name."""
    site = next(site for site in sites.values() if site.name == name)
    names = {found for axis in site.axes for found in axis_names(axis)}
    return {key: places for key, places in choice.items() if set(key.split()) <= names}
