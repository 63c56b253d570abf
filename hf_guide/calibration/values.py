"""Heads that get smaller: what each says is put into the directions that say most, before places are dropped.

A head's values and the weight that writes them can be turned into one another: W_o W_v = (W_o D)(E^T W_v) wherever D E^T = 1.
So where the head size shrinks, values are not selected place by place. With the second moment C of what a group of heads
hands to W_o, the D and E of rank l_S are taken for which |M^T W_o (1 - D E^T) z|^2 is least in the mean: from the leading
eigenvectors V of C^1/2 (W_o^T M M^T W_o) C^1/2, D = C^1/2 V and E = C^-1/2 V.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_guide.calibration.choosing import is_writer, module_name, nearest, seen_weight
from hf_guide.initialization.axes import Name, Product, axis_names, places_of
from hf_guide.initialization.plan import Plan, Site
from hf_guide.initialization.transfer import Transfer

FAINT = 1e-10
"""Directions with less than this share of the loudest one's energy are taken to be silent."""


@dataclass(frozen=True)
class Turn:
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


def turn_values(transfer: Transfer, inner: Mapping[str, Tensor]) -> None:
    """Have the plan read values and output weights turned, where heads get smaller; note what could not be turned and why.

    Args:
        inner: the second moment among a head's own places of what each writer is given, (heads, l, l), by module.
    """
    plan = transfer.plan
    writers = [
        site
        for site in plan.sites.values()
        if is_writer(plan, site)
        and size_of_heads(site)
        and module_name(site) in inner
        and inner[module_name(site)].ndim == 3
    ]
    for writer in writers:
        size = size_of_heads(writer)
        teacher, student = plan.sizes(writer)
        if teacher[size] == student[size]:
            continue
        rivals = [other for other in writers if size_of_heads(other) == size]
        makers = [
            site
            for site in plan.sites.values()
            if site.source is not None and site not in writers and _has(site, size) and writer in nearest(site, rivals)
        ]
        reason = _reason_not_to(writer, makers, rivals)
        if reason:
            note = f"{writer.match.row.pattern}: its heads' values are chosen evenly, for {reason}."
            transfer.notes += [] if note in transfer.notes else [note]
            continue
        _turn(plan, writer, makers, size, inner[module_name(writer)])
        for site in (writer, *makers):
            transfer.note_step(site, f"values of each head turned, the {student[size]} directions kept that say most")


def _turn(plan: Plan, writer: Site, makers: Sequence[Site], size: str, moment: Tensor) -> None:
    dim = writer.match.row.input_axis
    teacher, student = plan.sizes(writer)
    groups = axis_names(writer.axes[dim])[0]
    members = len(moment) // teacher[groups]
    heard = moment * kept_heads(plan, writer, len(moment)).view(-1, 1, 1)
    weight = seen_weight(plan, writer).unflatten(1, (teacher[groups], members, teacher[size]))
    encoders, decoders = [], []
    for group, moments in enumerate(heard.unflatten(0, (teacher[groups], members))):
        read = weight[:, group].reshape(-1, teacher[size])  # all that its members write
        encoder, decoder = factors(moments.sum(0), read.T @ read, student[size])
        encoders.append(encoder)
        decoders.append(decoder)
    kept = {}
    for site, matrices in [(writer, decoders), *((maker, encoders) for maker in makers)]:
        along = next(dim for dim, axis in enumerate(site.axes) if size in axis_names(axis))
        sizes, _ = plan.sizes(site)
        places = torch.stack(
            [places_of(site.axes[along], groups, group, size, sizes) for group in range(len(matrices))]
        )
        rows = places.view(len(matrices), -1, sizes[size])  # of a writer a row for each member
        each = torch.stack(matrices).repeat_interleave(rows.shape[1], 0)
        plan.turns[site.source or ""] = Turn(along, rows.flatten(0, 1), each)
        kept[site.name] = {size: torch.arange(student[size])}
    plan.keep(kept)


def kept_heads(plan: Plan, writer: Site, heads: int) -> Tensor:
    """Return 1 for each of the teacher's heads that the student keeps, as far as that was chosen, (heads,) float64."""
    units = plan.units.get(writer.name, {})
    chosen = next((places for name, places in units.items() if name.endswith("heads group")), None)
    if chosen is None:
        return torch.ones(heads, dtype=torch.float64)
    return torch.zeros(heads, dtype=torch.float64).index_fill_(0, chosen, 1.0)


def factors(moment: Tensor, weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return E with orthonormal columns and D, (l, rank), of the best D E^T for z with second moment C, read by W.

    Args:
        moment: C, (l, l). weight: W^T W, (l, l).
    """
    root, inverse = roots(moment)
    leading = torch.linalg.eigh(root @ weight.double() @ root).eigenvectors.flip(1)[:, :rank]
    encoder, triangle = torch.linalg.qr(inverse @ leading)
    return encoder, root @ leading @ triangle.T


def roots(moment: Tensor) -> tuple[Tensor, Tensor]:
    """Return C^1/2 and its pseudoinverse C^-1/2, (l, l) float64, of a second moment C."""
    energies, axes = torch.linalg.eigh(moment.double())
    heard = energies > FAINT * energies[-1].clamp(min=torch.finfo(torch.float64).tiny)
    root = torch.where(heard, energies, 0.0).sqrt()
    inverse = torch.where(heard, energies, 1.0).rsqrt() * heard
    return (axes * root) @ axes.T, (axes * inverse) @ axes.T


def _has(site: Site, name: str) -> bool:
    return any(name in axis_names(axis) for axis in site.axes)


def size_of_heads(writer: Site) -> str:
    """The name of the size of a writer's heads; "" where it reads something else."""
    axis = writer.axes[writer.match.row.input_axis]
    last = axis.factors[-1] if isinstance(axis, Product) else None
    return last.name if isinstance(last, Name) and not last.name.isdigit() else ""


def _reason_not_to(writer: Site, makers: Sequence[Site], rivals: Sequence[Site]) -> str:
    groups = axis_names(writer.axes[writer.match.row.input_axis])[0]
    weights = [maker for maker in makers if maker.match.row.kind == "weight" and not maker.match.is_bias]
    if len(weights) != 1 or any(maker.match.row.kind != "weight" for maker in makers):
        return "something else than one weight stands on them"
    if not all(_has(maker, groups) and len(nearest(maker, rivals)) == 1 for maker in makers):
        return "it is not known which heads they are of"
    if any("{heads}" in site.match.row.pattern for site in (writer, *makers)):
        return "they stand in a list of modules"
    return ""
