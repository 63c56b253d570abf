"""The value of each of a student's norms: its gain and bias, which mostly stand in the weights that read it."""

import math

import torch
from torch import Tensor

from hf_guide.initialization.axes import Identity, Name, Projection, Selection, apply_selection
from hf_guide.initialization.plan import Site, is_even
from hf_guide.initialization.transfer import Transfer, root_mean_square


def norm_value(transfer: Transfer, site: Site) -> Tensor:
    """Return a norm's gain or bias, or another learned diagonal."""
    assert site.source is not None
    layout, maps = transfer.plan.layout, transfer.plan.maps(site)
    chosen = maps[-1]
    is_bias = site.canonical.endswith(".bias")
    stored = transfer.plan.read(site.source)
    offset = 0.0 if is_bias else layout.norm_offset
    if all(isinstance(each, Identity) for each in maps):
        return stored
    if not isinstance(chosen, Projection):
        kept = stored.to(transfer.dtype) + offset
        for dim, each in enumerate(maps):
            if isinstance(each, Selection):
                kept = apply_selection(kept, dim, each) * each.factors.to(transfer.dtype).view(
                    -1, *[1] * (kept.ndim - 1 - dim)
                )
        return kept - offset
    axis = site.axes[-1]
    assert isinstance(axis, Name)
    norm = site.module
    matrix, gain = chosen.matrix, stored.double() + offset
    if norm in transfer.folding.learned_scales:
        transfer.note_step(site, "folded into the weights it multiplies, its root mean square left")
        return torch.full(site.shape, (root_mean_square(gain) or 1.0) - offset, dtype=transfer.dtype)
    if (writer := transfer.folding.writers.get(norm)) is not None and not is_bias:
        transfer.note_step(site, f"folded into {writer.name}, whose output it norms; one number is left")
        transfer.note(
            f"{site.name}: its gain is folded into {writer.name}, before the norm, which then sees another length."
        )
        return torch.full(site.shape, scale_left(transfer, writer) - offset, dtype=transfer.dtype)
    if transfer.folding.is_folded(norm):
        transfer.note_step(site, "folded into the weights that read it, its root mean square left")
        if is_bias and (bias := norm_bias(transfer, norm)) is not None:
            return bias.to(transfer.dtype)
        left = None if is_bias else transfer.gain_left(norm, gain)
        one = (0.0 if is_bias else 1.0) if left is None else left * transfer.scale(axis.name)
        return torch.full(site.shape, one - offset, dtype=transfer.dtype)
    head_scale = (
        transfer.ratio(layout.tied_head_scale) / transfer.ratio(layout.embedding_scale)
        if transfer.folding.is_tied(norm)
        else 1.0
    )
    if is_bias:
        return (gain @ matrix * head_scale).to(transfer.dtype)
    if transfer.folding.is_tied(norm):
        diagonal = fit_tied_gain(transfer.moments[axis.name], matrix, gain) * head_scale
        transfer.note_step(site, "fitted in the logits of the tied head")
        transfer.note(
            f"{site.name}: the head is tied to the embedding table, so the gain before it is fitted, "
            "not folded; tie_word_embeddings=False folds it exactly."
        )
    else:
        diagonal = (matrix * (gain[:, None] * matrix)).sum(0)
        transfer.note_step(site, "diagonal of the projected gain")
        if not chosen.selects and not is_even(gain):
            transfer.note(
                f"{site.name}: {_why_kept(transfer, norm)}; the diagonal of the projected gain stands for it."
            )
    return (diagonal * transfer.scale(axis.name) - offset).to(transfer.dtype)


def norm_bias(transfer: Transfer, norm: str) -> Tensor | None:
    """Return the bias of a folded norm of the student, (d_S,) float64; None where it has none.

    It is zero where every weight that reads it has a bias to take it in; otherwise the least-squares solution of
    W_S b_S = W b over those that have not.
    """
    if norm + ".bias" not in transfer.plan.sites:
        return None
    if norm not in transfer.norm_biases:
        site = transfer.plan.sites[norm + ".bias"]
        width, length = site.shape[0], 0.0
        normal, right = torch.zeros(width, width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)
        for reader in transfer.folding.readers[norm]:
            if reader.match.is_bias or reader.canonical.removesuffix("weight") + "bias" in transfer.plan.sites:
                continue
            if not isinstance(transfer.plan.maps(reader)[reader.match.row.input_axis], Projection):
                continue  # a later block that is selected reads what it can
            vectors = [
                transfer.teacher_norm(read, reader, "bias") if read else None for read in reader.match.row.reads
            ]
            wanted = transfer.weight_value(reader, vectors).double().flatten()
            weight = transfer.weight_value(reader).movedim(reader.match.row.input_axis, -1).reshape(-1, width).double()
            normal += weight.T @ weight
            right += weight.T @ wanted
            length += wanted.square().sum().item()
        found = torch.linalg.pinv(normal, hermitian=True) @ right
        lost = math.sqrt(max(0.0, 1 - (found @ right).item() / length)) if length else 0.0
        if lost > 1e-6:
            transfer.note(
                f"{site.name}: fitted to what weights without a bias made of the teacher's; {lost:.1%} of that is lost."
            )
        transfer.norm_biases[norm] = found
    return transfer.norm_biases[norm]


def scale_left(transfer: Transfer, writer: Site) -> float:
    """Return sqrt(d_T / d_S) |M^T diag(c) W| / |W|: what is left of the gain c of a norm that norms W's output.

    The norm divides by the length of M^T diag(c) W h instead of that of W h; their ratio is that of the weights'
    lengths for a white h, and exactly so where c is constant and nothing is cut.
    """
    assert writer.source is not None
    tensor, width = transfer.plan.read(writer.source), (1, 1)
    for dim, chosen in enumerate(transfer.plan.maps(writer)):
        if isinstance(chosen, Selection):
            tensor = apply_selection(tensor, dim, chosen)
        elif isinstance(chosen, Projection):
            width = transfer.plan.widths[str(writer.axes[dim])]
    teacher, student = width
    length = transfer.weight_value(writer).double().norm() / tensor.double().norm()
    return math.sqrt(teacher / student) * length.item()


def _why_kept(transfer: Transfer, norm: str) -> str:
    if not transfer.plan.options.fold_norms:
        return "its gain is not folded, for fold_norms is off"
    match = transfer.plan.layout.find(norm + ".weight")
    if match is not None and any(match.row.pattern in row.reads for row in transfer.plan.layout.rows):
        return "no weight that reads it came from the teacher, so its gain is not folded"
    return "its output goes onto the residual stream, so its gain cannot be folded"


def fit_tied_gain(moment: Tensor, matrix: Tensor, gain: Tensor) -> Tensor:
    """Return the diagonal that stands for the gain c before a tied head, fitted in the logits.

    g_j = <E m_j, E diag(c) m_j> / |E m_j|^2 for column m_j of M, with `moment` E^T E, (d_T, d_T) float64.
    """
    image = moment @ matrix
    norms = (matrix * image).sum(0)
    fitted = (image * (gain[:, None] * matrix)).sum(0) / norms
    plain = (matrix * (gain[:, None] * matrix)).sum(0)
    return torch.where(norms > norms.max() * 1e-12, fitted, plain)
