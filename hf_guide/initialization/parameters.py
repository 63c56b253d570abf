"""The value of each of a student's parameters: weights, biases and norms, with what multiplies them."""

import torch
from torch import Tensor

from hf_guide.errors import ShapeError
from hf_guide.initialization.axes import Name, Projection, Selection, apply_selection, contract
from hf_guide.initialization.layouts import BlockTransfer
from hf_guide.initialization.norms import norm_bias, norm_value
from hf_guide.initialization.plan import Site
from hf_guide.initialization.transfer import Transfer


def parameter_value(transfer: Transfer, site: Site) -> Tensor:
    """Return the student's parameter, in the transfer's dtype or the teacher's own."""
    result, gain = _in_its_block(transfer, site, _value(transfer, site)), transfer.plan.options.logit_gain
    row = site.match.row
    if gain == 1.0:
        return result
    if row.kind == "norm" and transfer.folding.is_tied(site.module):
        offset = 0.0 if site.canonical.endswith(".bias") else transfer.plan.layout.norm_offset
        transfer.note_step(site, f"logits times {gain:.6g}")
        return (result.to(transfer.dtype) + offset) * gain - offset
    is_logit_bias = site.axes == (Name("vocab"),)  # also one that stands beside a tied head
    if is_logit_bias or (row.kind == "weight" and row.reads and Name("vocab") in row.axes):
        transfer.note_step(site, f"logits times {gain:.6g}")
        return _scaled(transfer, result, gain)
    return result


def _in_its_block(transfer: Transfer, site: Site, value: Tensor) -> Tensor:
    """Return a parameter of a block as it must be at the student's block index and depth."""
    plan, row = transfer.plan, site.match.row
    factor = plan.block_ratio(site, plan.layout.block_scale.get(row.pattern))
    if factor != 1.0:
        transfer.note_step(site, f"times {factor:.6g}: the model scales it by the block's index or by the depth")
        value = _scaled(transfer, value, factor)
    change = plan.layout.block_value.get(row.pattern)
    if change is not None and site.block is not None and site.source is not None:
        block = plan.teacher_block(site)
        home = row.pattern.partition("{block}")[0] + str(block)

        def read(name: str) -> Tensor:
            return plan.read(f"{home}.{name}")

        changed = change(value, BlockTransfer(plan.teacher.config, block, plan.student_config, site.block, read))
        if changed is not value:
            transfer.note_step(site, "changed for the block's index: see block_value of the layout")
        return changed
    return value


def _value(transfer: Transfer, site: Site) -> Tensor:
    if site.match.row.kind == "norm":
        return norm_value(transfer, site)
    if site.match.is_bias:
        return _scaled(transfer, bias_value(transfer, site), transfer.stream_scale(site))
    row = site.match.row
    result = _scaled(transfer, transfer.weight_value(site), transfer.stream_scale(site))
    if row.kind == "table" and Name("vocab") in row.axes and transfer.plan.options.projects:
        ratio = transfer.ratio(transfer.plan.layout.embedding_scale)
        if ratio != 1.0:
            transfer.note_step(site, f"times {ratio:.6g}: the model multiplies its embeddings by its width")
            result = _scaled(transfer, result, ratio)
    if row.pattern in transfer.plan.layout.scales and transfer.plan.options.projects:
        ratio = transfer.ratio(transfer.plan.layout.scales[row.pattern])
        if ratio != 1.0:
            transfer.note_step(site, f"times {ratio:.6g}: what it is added to is multiplied by the model's width")
            result = _scaled(transfer, result, ratio)
    if row.kind != "table" and Name("vocab") in row.axes and row.reads:
        ratio = transfer.ratio(transfer.plan.layout.tied_head_scale)
        result = _scaled(transfer, result, ratio)
    return result


def bias_value(transfer: Transfer, site: Site) -> Tensor:
    """Return a bias: the teacher's own, selected or projected, and what the norm's bias made of it through the weight."""
    row = site.match.row
    weight = transfer.plan.sites.get(site.canonical.removesuffix("bias") + "weight")
    if site.source is not None:
        (chosen,) = transfer.plan.maps(site)
        result = transfer.plan.read(site.source)
        if isinstance(chosen, Selection):
            result = apply_selection(result, 0, chosen).to(transfer.dtype) * chosen.factors.to(transfer.dtype)
        elif isinstance(chosen, Projection):
            result = contract(result, 0, chosen.matrix, transfer.dtype, diagonal=transfer.output_gain(site))
    else:
        result = torch.zeros(site.shape, dtype=transfer.dtype)
    if (
        weight is not None
        and weight.source is not None
        and any(_folds_bias(transfer, norm, weight) for norm in row.reads)
    ):
        result = result.to(transfer.dtype) + _read_norm_bias(transfer, weight)
        transfer.note_step(site, "takes in the bias of the norm before it")
    elif site.source is None:
        transfer.note_step(site, "zero: the teacher has none")
    return result


def _folds_bias(transfer: Transfer, norm: str | None, site: Site) -> bool:
    if norm is None or not isinstance(transfer.plan.maps(site)[site.match.row.input_axis], Projection):
        return False
    return (
        transfer.folding.is_folded(transfer.folding.name(norm, site, of_teacher=False))
        and transfer.teacher_norm(norm, site, "bias") is not None
    )


def _read_norm_bias(transfer: Transfer, weight: Site) -> Tensor:
    """Return W b for the bias b of the norm that `weight` reads, less what the student's own norm bias gives."""
    reads = weight.match.row.reads
    vectors = [transfer.teacher_norm(norm, weight, "bias") if norm else None for norm in reads]
    result = transfer.weight_value(weight, vectors)
    norm = transfer.folding.name(reads[0] or "", weight, of_teacher=False)
    own = norm_bias(transfer, norm)
    if own is not None and bool(own.any()):
        student = transfer.weight_value(weight).movedim(weight.match.row.input_axis, -1)
        result = result - student @ own.repeat(student.shape[-1] // len(own)).to(student)
    return result


def _scaled(transfer: Transfer, value: Tensor, factor: float) -> Tensor:
    return value if factor == 1.0 else value.to(transfer.dtype) * factor


def check_stored(stored: Tensor, value: Tensor, name: str) -> None:
    """Refuse a student's parameter that overflowed when `value` was `stored` in its dtype.

    Raises:
        ShapeError: says how large the value is, and how large a number the dtype holds.
    """
    if not stored.is_floating_point() or torch.isfinite(
        stored.sum(dtype=torch.promote_types(stored.dtype, torch.float32))
    ):
        return  # one pass without a copy; a sum that overflows is looked at again
    if not bool(torch.isfinite(stored).all()):
        raise ShapeError(
            f"{name} has values up to {value.abs().max().item():.3g}, more than {stored.dtype} holds "
            f"({torch.finfo(stored.dtype).max:.3g}). Make the student with dtype='bfloat16' or 'float32'."
        )
