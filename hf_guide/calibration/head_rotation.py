"""Heads that get smaller: what each says is put into the directions that say most, before places are dropped.

A head's values and the weight that writes them can be turned into one another: W_o W_v = (W_o D)(E^T W_v) wherever D E^T = 1.
So where the head size shrinks, values are not selected place by place. With the second moment C of what a group of heads
hands to W_o, the D and E of rank l_S are taken for which |M^T W_o (1 - D E^T) z|^2 is least in the mean: from the leading
eigenvectors V of C^1/2 (W_o^T M M^T W_o) C^1/2, D = C^1/2 V and E = C^-1/2 V.

Heads that get smaller: queries and keys are turned together, so that what is cut says least about their products.

Where nothing stands between the weights and the product q k^T, a head's queries and keys can be turned against each other:
q A k^T with A = E_q E_k^T is what q E_q and k E_k make. With C_q the second moment of a head's queries and C_k the covariance
of its keys (what all keys share moves every logit of a query alike, and softmax does not see it), the A of rank l_S for which
E |q (1 - A) k^T|^2 is least, query and key taken from any two tokens, has the leading singular vectors of C_q^1/2 C_k^1/2:
E_q = C_q^-1/2 U S^1/2 and E_k = C_k^-1/2 V S^1/2. A rotary embedding, or a norm of each head, does not turn along: there
places are selected as ever.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_guide.calibration.importance import (
    is_output_projection,
    nearest_by_name,
    projected_output_weight,
    source_module_name,
)
from hf_guide.initialization.plan import ParameterPlan, Plan
from hf_guide.initialization.transfer import Transfer
from hf_guide.layouts.grammar import AxisName, AxisProduct, axis_names, group_indices
from hf_guide.layouts.registry import rotary_size

NEGLIGIBLE = 1e-10
"""Directions with less than this share of the loudest one's energy are taken to be silent."""


@dataclass(frozen=True)
class HeadRotation:
    """A change of the teacher's tensor along an axis, group by group: places[g] become matrices[g]^T of themselves."""

    dim: int
    places: Tensor
    matrices: Tensor

    def __call__(self, tensor: Tensor) -> Tensor:
        """Return a turned copy, in float32 or better; a group's places beyond the matrix's columns hold zeros."""
        turned = tensor.to(torch.promote_types(tensor.dtype, torch.float32)).movedim(self.dim, 0).clone()
        for places, matrix in zip(self.places, self.matrices, strict=True):
            made = torch.tensordot(matrix.T.to(turned), turned[places], 1)
            turned[places] = 0
            turned[places[: len(made)]] = made
        return turned.movedim(0, self.dim)


def rotate_values(transfer: Transfer, inner: Mapping[str, Tensor]) -> None:
    """Have the plan read values and output weights turned, where heads get smaller; note what could not be turned and why.

    Args:
        inner: the second moment among a head's own places of what each writer is given, (heads, l, l), by module.
    """
    plan = transfer.plan
    writers = [
        site
        for site in plan.parameters.values()
        if is_output_projection(plan, site)
        and head_dim_name(site)
        and source_module_name(site) in inner
        and inner[source_module_name(site)].ndim == 3
    ]
    for writer in writers:
        size = head_dim_name(writer)
        teacher, student = plan.sizes(writer)
        if teacher[size] == student[size]:
            continue
        rivals = [other for other in writers if head_dim_name(other) == size]
        makers = [
            site
            for site in plan.parameters.values()
            if site.source is not None
            and site not in writers
            and _has_axis(site, size)
            and writer in nearest_by_name(site, rivals)
        ]
        reason = _why_values_unsupported(writer, makers, rivals)
        if reason:
            note = f"{writer.match.row.pattern}: its heads' values are chosen evenly, for {reason}."
            transfer.notes += [] if note in transfer.notes else [note]
            continue
        _rotate_value_heads(plan, writer, makers, size, inner[source_module_name(writer)])
        for site in (writer, *makers):
            transfer.record_step(
                site, f"values of each head turned, the {student[size]} directions kept that say most"
            )


def _rotate_value_heads(
    plan: Plan, writer: ParameterPlan, makers: Sequence[ParameterPlan], size: str, moment: Tensor
) -> None:
    dim = writer.match.row.input_axis
    teacher, student = plan.sizes(writer)
    groups = axis_names(writer.axes[dim])[0]
    members = len(moment) // teacher[groups]
    heard = moment * selected_head_mask(plan, writer, len(moment)).view(-1, 1, 1)
    weight = projected_output_weight(plan, writer).unflatten(1, (teacher[groups], members, teacher[size]))
    encoders, decoders = [], []
    for group, moments in enumerate(heard.unflatten(0, (teacher[groups], members))):
        read = weight[:, group].reshape(-1, teacher[size])  # all that its members write
        encoder, decoder = low_rank_factors(moments.sum(0), read.T @ read, student[size])
        encoders.append(encoder)
        decoders.append(decoder)
    kept = {}
    for site, matrices in [(writer, decoders), *((maker, encoders) for maker in makers)]:
        along = next(dim for dim, axis in enumerate(site.axes) if size in axis_names(axis))
        sizes, _ = plan.sizes(site)
        places = torch.stack(
            [group_indices(site.axes[along], groups, group, size, sizes) for group in range(len(matrices))]
        )
        rows = places.view(len(matrices), -1, sizes[size])  # of a writer a row for each member
        each = torch.stack(matrices).repeat_interleave(rows.shape[1], 0)
        plan.turns[site.source or ""] = HeadRotation(along, rows.flatten(0, 1), each)
        kept[site.name] = {size: torch.arange(student[size])}
    plan.keep(kept)


def selected_head_mask(plan: Plan, writer: ParameterPlan, heads: int) -> Tensor:
    """Return 1 for each of the teacher's heads that the student keeps, as far as that was chosen, (heads,) float64."""
    units = plan.selected_indices.get(writer.name, {})
    chosen = next((places for name, places in units.items() if name.endswith("heads group")), None)
    if chosen is None:
        return torch.ones(heads, dtype=torch.float64)
    return torch.zeros(heads, dtype=torch.float64).index_fill_(0, chosen, 1.0)


def low_rank_factors(moment: Tensor, weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return E with orthonormal columns and D, (l, rank), of the best D E^T for z with second moment C, read by W.

    Args:
        moment: C, (l, l). weight: W^T W, (l, l).
    """
    root, inverse = sqrt_and_pinv_sqrt(moment)
    leading = torch.linalg.eigh(root @ weight.double() @ root).eigenvectors.flip(1)[:, :rank]
    encoder, triangle = torch.linalg.qr(inverse @ leading)
    return encoder, root @ leading @ triangle.T


def sqrt_and_pinv_sqrt(moment: Tensor) -> tuple[Tensor, Tensor]:
    """Return C^1/2 and its pseudoinverse C^-1/2, (l, l) float64, of a second moment C."""
    energies, axes = torch.linalg.eigh(moment.double())
    heard = energies > NEGLIGIBLE * energies[-1].clamp(min=torch.finfo(torch.float64).tiny)
    root = torch.where(heard, energies, 0.0).sqrt()
    inverse = torch.where(heard, energies, 1.0).rsqrt() * heard
    return (axes * root) @ axes.T, (axes * inverse) @ axes.T


def _has_axis(site: ParameterPlan, name: str) -> bool:
    return any(name in axis_names(axis) for axis in site.axes)


def head_dim_name(writer: ParameterPlan) -> str:
    """The name of the size of a writer's heads; "" where it reads something else."""
    axis = writer.axes[writer.match.row.input_axis]
    last = axis.factors[-1] if isinstance(axis, AxisProduct) else None
    return last.name if isinstance(last, AxisName) and not last.name.isdigit() else ""


def _why_values_unsupported(
    writer: ParameterPlan, makers: Sequence[ParameterPlan], rivals: Sequence[ParameterPlan]
) -> str:
    groups = axis_names(writer.axes[writer.match.row.input_axis])[0]
    weights = [maker for maker in makers if maker.match.row.kind == "weight" and not maker.match.is_bias]
    if len(weights) != 1 or any(maker.match.row.kind != "weight" for maker in makers):
        return "something else than one weight stands on them"
    if not all(_has_axis(maker, groups) and len(nearest_by_name(maker, rivals)) == 1 for maker in makers):
        return "it is not known which heads they are of"
    if any("{heads}" in site.match.row.pattern for site in (writer, *makers)):
        return "they stand in a list of modules"
    return ""


@dataclass(frozen=True)
class Compose:
    """Changes of one tensor, one after another."""

    changes: tuple[Callable[[Tensor], Tensor], ...]

    def __call__(self, tensor: Tensor) -> Tensor:
        """Return the tensor with all changes made."""
        for change in self.changes:
            tensor = change(tensor)
        return tensor


def rotate_queries_keys(transfer: Transfer, projected: Mapping[str, Tensor]) -> None:
    """Have the plan read queries and keys turned, where heads get smaller; note what could not be turned and why.

    Args:
        projected: by module and size, "layers.0.attn.q_proj/q_dim", the second moment of what each head's places are given,
            with a one beside them, (heads, l + 1, l + 1).
    """
    plan = transfer.plan
    for home, sites in _by_attention(plan).items():
        queries, keys = (
            [site for site in sites if not site.match.is_bias and _dim_name(site, kind)] for kind in ("q_dim", "k_dim")
        )
        if not any(_head_dim_shrinks(plan, site) for site in sites):
            continue
        reason = _why_queries_unsupported(plan, sites, queries, keys, projected)
        if reason:
            note = (
                f"{sites[0].match.row.pattern.rpartition('.')[0]}: queries and keys are chosen evenly, for {reason}."
            )
            transfer.notes += [] if note in transfer.notes else [note]
            continue
        _rotate_query_key_heads(plan, sites, queries[0], keys[0], projected)
        for site in sites:
            transfer.record_step(
                site, f"queries and keys of {home} turned together, the directions kept that say most"
            )


def _rotate_query_key_heads(
    plan: Plan, sites: list[ParameterPlan], query: ParameterPlan, key: ParameterPlan, projected: Mapping[str, Tensor]
) -> None:
    names = {"q_dim": _dim_name(query, "q_dim"), "k_dim": _dim_name(key, "k_dim")}
    had, wanted = (sizes[names["q_dim"]] for sizes in plan.sizes(query))
    groups = _heads_axis_name(key)
    count = plan.sizes(key)[0][groups]
    asked, said = (
        projected[f"{source_module_name(query)}/{names['q_dim']}"],
        projected[f"{source_module_name(key)}/{names['k_dim']}"],
    )
    asked = (
        (asked[:, :-1, :-1] * selected_head_mask(plan, query, len(asked)).view(-1, 1, 1))
        .unflatten(0, (count, -1))
        .sum(1)
    )
    tokens = said[:, -1, -1].clamp(min=1)[:, None, None]
    said = said[:, :-1, :-1] / tokens - said[:, :-1, -1:] @ said[:, -1:, :-1] / tokens**2
    scale = plan.attention_scale(plan.teacher.config, had) / plan.attention_scale(plan.student_config, wanted)
    pairs = [low_rank_product_factors(asked[group], said[group], wanted) for group in range(count)]
    matrices = {"q_dim": [pair[0] * scale for pair in pairs], "k_dim": [pair[1] for pair in pairs]}
    for site in sites:
        for kind, name in names.items():
            if not _dim_name(site, kind):
                continue
            along = next(dim for dim, axis in enumerate(site.axes) if name in axis_names(axis))
            sizes, _ = plan.sizes(site)
            places = torch.stack(
                [group_indices(site.axes[along], groups, group, name, sizes) for group in range(count)]
            )
            rows = places.view(count, -1, had)  # of queries a row for each member of a group
            turn = HeadRotation(
                along, rows.flatten(0, 1), torch.stack(matrices[kind]).repeat_interleave(rows.shape[1], 0)
            )
            source = site.source or ""
            plan.turns[source] = Compose((plan.turns[source], turn)) if source in plan.turns else turn
            plan.keep({site.name: {name: torch.arange(wanted)}})


def low_rank_product_factors(queries: Tensor, keys: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return E_q and E_k, (l, rank), of the A = E_q E_k^T of this rank for which E |q (1 - A) k^T|^2 is least.

    Args:
        queries, keys: the second moments of independent q and k, (l, l).
    """
    root_q, inverse_q = sqrt_and_pinv_sqrt(queries)
    root_k, inverse_k = sqrt_and_pinv_sqrt(keys)
    left, values, right = torch.linalg.svd(root_q @ root_k)
    shares = values[:rank].sqrt()
    return inverse_q @ left[:, :rank] * shares, inverse_k @ right.T[:, :rank] * shares


def _by_attention(plan: Plan) -> dict[str, list[ParameterPlan]]:
    """Return by attention module the parameters in it that have an axis of queries' or keys' places."""
    having = [
        site
        for site in plan.parameters.values()
        if site.source and (_dim_name(site, "q_dim") or _dim_name(site, "k_dim"))
    ]
    homes = dict.fromkeys(site.module.rpartition(".")[0] for site in having if site.match.row.kind == "weight")
    return {home: [site for site in having if site.canonical.startswith(home + ".")] for home in homes}


def _dim_name(site: ParameterPlan, kind: str) -> str:
    """The name of the size of a site's queries ("q_dim") or keys ("k_dim") on its output axis; "" where it has none."""
    names = [name for axis in site.axes for name in axis_names(axis) if name.endswith(kind)]
    return names[0] if names else ""


def _heads_axis_name(key: ParameterPlan) -> str:
    """The name of the axis of heads that a key weight has."""
    return next(name for axis in key.axes for name in axis_names(axis) if name.endswith("heads"))


def _head_dim_shrinks(plan: Plan, site: ParameterPlan) -> bool:
    teacher, student = plan.sizes(site)
    return any(teacher[name] != student[name] for name in (_dim_name(site, "q_dim"), _dim_name(site, "k_dim")) if name)


def _why_queries_unsupported(
    plan: Plan,
    sites: list[ParameterPlan],
    queries: list[ParameterPlan],
    keys: list[ParameterPlan],
    projected: Mapping[str, Tensor],
) -> str:
    if any(site.match.row.kind != "weight" for site in sites):
        return "a norm stands between them"
    if len(queries) != 1 or len(keys) != 1:
        return "not one weight makes each"
    had = plan.sizes(queries[0])[0][_dim_name(queries[0], "q_dim")]
    if rotary_size(plan.layout, plan.teacher.config, had):
        return "a rotary embedding stands between them"
    if any("{heads}" in site.match.row.pattern for site in sites):
        return "they stand in a list of modules"
    for site, kind in ((queries[0], "q_dim"), (keys[0], "k_dim")):
        if f"{source_module_name(site)}/{_dim_name(site, kind)}" not in projected:
            return "they were not heard"
    return ""
