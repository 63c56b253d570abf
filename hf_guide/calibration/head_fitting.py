"""The end of the stream: a table that is head as well, the gain before it, and one factor of all logits."""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_guide.calibration.data import Batch
from hf_guide.calibration.forward import capture_input, drop_padding, forward_no_cache
from hf_guide.calibration.least_squares import NormalEquations, append_bias_column, at_least_float32, max_eps
from hf_guide.calibration.modules import ModuleRef, linear_weight, module_bias, norm_weight
from hf_guide.calibration.reconstruction import BlockReconstructor, assign_checked
from hf_guide.errors import ShapeError
from hf_guide.models.hooks import StopForward, register_input_hook, removable_hooks
from hf_guide.utils.distributed import all_reduce_sum_, rank_and_world_size

LOGIT_SCALE_TOKENS = 1024  # one number is fitted: more would cost a product with the vocabulary each, and tell no more
NEWTON_STEPS = 8
EMBEDDING_WEIGHT, MIN_TOKEN_FREQUENCY = 0.003, 0.1  # of `fit_tied_embedding`


@dataclass
class HeadPair:
    """A student's head over its vocabulary, the teacher's, and the norm before it, by its canonical name.

    `wanted` is what the teacher's head was given when the table was fitted, (tokens, d_T) for each batch: held, because
    another pass through the teacher costs more than one stream.
    """

    student: ModuleRef
    teacher: ModuleRef
    norm: str | None
    tied: bool
    wanted: list[Tensor] = field(default_factory=list)

    def teacher_head_inputs(self, mender: BlockReconstructor, batch: int) -> Tensor:
        """Return what the teacher's head is given, (tokens, d_T), as it was heard for the table or as it is heard now."""
        if batch < len(self.wanted):
            return self.wanted[batch]
        return _head_inputs(mender, mender.teacher, self.teacher, mender.batches[batch])


def find_head_pair(mender: BlockReconstructor) -> HeadPair | None:
    """Return the head that makes logits over a vocabulary; None where there is none, or where the teacher has none."""
    for name, part in mender.student_modules.readers.items():
        twin = mender.of_teacher.readers.get(name)
        if part.is_language_head and twin is not None:
            reads = part.match.row.input_norms
            tied = name + ".weight" in mender.plan.tied_parameters
            return HeadPair(part, twin, reads[0] if reads else None, tied)
    return None


def fit_tied_embedding(mender: BlockReconstructor, head: HeadPair, counts: Tensor) -> None:
    """Fit a table that is embedding and head at once to both, before the blocks are repaired.

    Row v becomes the e that minimises b_v |e - E_v M|^2 / u + mean_t (g e x_t - E_v n_t)^2 / w: the embedding that GUIDE
    carries over, and the logits of the teacher's last hidden states n_t, seen from their projections x_t through a constant
    gain g; u and w are the mean squares of either. b_v is `BALANCE` times how often the token stands in the text, in units of
    an even share, between `FLOOR` and 1. Blocks that are repaired make up for what an embedding has lost, and nothing comes
    after the head to do so: that is why the logits weigh more.
    """
    axis, norm = head.student.axis, head.norm
    matrix = mender.plan.bases.get(axis)
    if matrix is None or norm is None or norm not in mender.of_teacher.norms:
        return
    sums: list[NormalEquations] = []
    for batch in mender.batches:
        stream, wanted = _final_hidden_states(mender, head, batch)
        head.wanted.append(wanted)
        stream = at_least_float32(stream)
        carried = stream @ matrix.to(stream)
        if mender.plan.layout.norm == "layer":
            carried = carried - carried.mean(-1, keepdim=True)
        carried = carried / carried.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-30)
        if not sums:
            sums.append(NormalEquations.of(carried.shape[1] + 1, wanted.shape[1] + 1))
        sums[0].add(append_bias_column(carried, True), append_bias_column(wanted, True))
    biased = norm + ".bias" in mender.plan.parameters
    gram, cross, _, _ = _mean_products(sums[0].gather(), centered=biased)  # (d_S, d_S), (d_T, d_S)
    part = head.student
    weight = linear_weight(part.module)
    had = mender.plan.read(
        mender.plan.parameters[mender.plan.tied_parameters[part.name + ".weight"]].source or ""
    ).double()
    if len(had) != len(weight) or len(counts) != len(weight):
        return
    plain = weight.detach().double().cpu()
    image = had @ cross  # (V, d_S): what the logits of a token are along each direction of the student's
    gain = ((plain * image).sum() / ((plain @ gram) * plain).sum()).item()
    size, loud = plain.square().sum(1).mean().item(), (plain @ gram * plain).sum(1).mean().item() * gain**2
    share = (counts / counts.mean().clamp(min=1e-300)).clamp(min=MIN_TOKEN_FREQUENCY, max=1.0) * EMBEDDING_WEIGHT
    values, vectors = torch.linalg.eigh(gram)
    right = share[:, None] * plain / size + gain * image / loud
    turned = (right @ vectors) / (share[:, None] / size + gain**2 * values[None] / loud)
    mender.write(part, turned @ vectors.T)
    mender.transfer.record_step(
        mender.plan.parameters[mender.plan.tied_parameters[part.name + ".weight"]],
        "fitted to be embeddings and head at once",
    )


def fit_final_norm(mender: BlockReconstructor, head: HeadPair) -> None:
    """Fit the diagonal before a tied head, and its bias, to the teacher's logits, after the blocks are repaired.

    It minimises sum_t |E_S (h * n_S) - E_T n_T|^2, less what all tokens of a vocabulary have in common, for the diagonal h
    that multiplies the gain: (A_SS * C_SS) h = diag(A_ST C_TS), with A the moments of the tables over the vocabulary and C
    those of the last hidden states over the calibration tokens, their means apart.
    """
    norm = mender.student_modules.norms.get(head.norm or "")
    site = mender.plan.parameters.get((head.norm or "") + ".weight")
    if norm is None or site is None or head.norm is None:
        return
    sums: list[NormalEquations] = []
    for number, batch in enumerate(mender.batches):
        has = _head_inputs(mender, mender.student, head.student, batch)
        wanted = head.teacher_head_inputs(mender, number)
        if not sums:
            sums.append(NormalEquations.of(has.shape[1] + 1, wanted.shape[1] + 1))
        sums[0].add(append_bias_column(has, True), append_bias_column(wanted, True))
    biased = head.norm + ".bias" in mender.plan.parameters
    gram, cross, mean_s, mean_t = _mean_products(sums[0].gather(), centered=biased)
    own, had = (linear_weight(part.module).detach().double().cpu() for part in (head.student, head.teacher))
    rows = min(len(own), len(had))
    own, had = (table[:rows] - table[:rows].mean(0) for table in (own, had))
    inner, outer = own.T @ own, own.T @ had
    system, right = inner * gram, (outer * cross.T).sum(1)
    at_one = system.sum(1)  # what h = 1 makes: the correction is fitted, so that where nothing is lost nothing changes
    system = system + 1e-6 * system.diagonal().mean() * torch.eye(len(system), dtype=torch.float64)
    diagonal = 1 + torch.linalg.solve(system, right - at_one)
    if (diagonal - 1).abs().max() < max(1e-6, mender.rounding):
        return  # a rounding error
    offset = mender.plan.layout.norm_offset
    gain = norm_weight(norm.module).detach().double().cpu() + offset
    assign_checked(norm_weight(norm.module), gain * diagonal - offset, head.norm + ".weight")
    bias = module_bias(norm.module)
    if biased and bias is not None:
        lost = outer @ mean_t - inner @ (diagonal * mean_s)
        fitted = diagonal * bias.detach().double().cpu() + torch.linalg.pinv(inner, hermitian=True) @ lost
        assign_checked(bias, fitted, head.norm + ".bias")
    mender.transfer.record_step(site, "fitted in the logits on the calibration tokens")


def _mean_products(total: NormalEquations, *, centered: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the mean products x^T x and y^T x of rows that end in a one, and the means of x and y."""
    tokens = total.gram[-1, -1]
    mean_x, mean_y = total.gram[-1, :-1] / tokens, total.cross[:-1, -1] / tokens
    gram, cross = total.gram[:-1, :-1] / tokens, total.cross[:-1, :-1] / tokens
    if centered:
        gram, cross = gram - torch.outer(mean_x, mean_x), cross - torch.outer(mean_y, mean_x)
    return gram, cross, mean_x, mean_y


def fit_logit_scale(mender: BlockReconstructor, head: HeadPair) -> float:
    """Fit the s that minimises the divergence of softmax(s z_S) from the teacher's predictions, and multiply the logits by it.

    Newton's steps on one convex number, from 1.

    Raises:
        ShapeError: logits that are not finite, or weights too large for their dtype when they are multiplied.
    """
    ratio = _logit_multiplier(mender, head)
    if ratio is None:
        mender.notes.append(
            "The logits' scale is not fitted: the model does more to its head's output than multiply it."
        )
        return 1.0
    hidden: list[Tensor] = []
    goals: list[Tensor] = []
    seen = 0
    for whole in mender.batches:
        batch = first_rows(whole, LOGIT_SCALE_TOKENS // rank_and_world_size()[1] - seen)
        has = _head_inputs(mender, mender.student, head.student, batch)
        expected = forward_no_cache(mender.teacher, batch)
        logits = drop_padding(expected.logits, batch, of_decoder=mender.teacher.config.is_encoder_decoder)
        raw, wanted = head.student.module(has), logits.to(torch.promote_types(logits.dtype, torch.float32))
        rows = min(raw.shape[-1], wanted.shape[-1])
        chance = wanted[:, :rows].softmax(-1)
        goals.append((chance * raw[:, :rows].to(chance)).sum(-1))
        hidden.append(has)
        seen += len(has)
        if seen * rank_and_world_size()[1] >= LOGIT_SCALE_TOKENS:
            break
    scale = 1.0
    for _ in range(NEWTON_STEPS):
        slope, curvature, count = 0.0, 0.0, 0.0
        for rows_of, goal in zip(hidden, goals, strict=True):
            raw = head.student.module(rows_of)
            raw = raw.to(goal)
            chance = (raw * (scale * ratio)).softmax(-1)
            mean = (chance * raw).sum(-1)
            slope += (mean - goal).sum().item()
            curvature += ((chance * raw.square()).sum(-1) - mean.square()).sum().item()
            count += len(goal)
        numbers = torch.tensor([slope, curvature * ratio, count], dtype=torch.float64)
        all_reduce_sum_([numbers])
        if not numbers.isfinite().all():
            raise ShapeError(
                f"The logits' scale cannot be fitted: the student's logits in {mender.student.dtype} or the teacher's in "
                f"{mender.teacher.dtype} are not finite on the calibration dataset. Make the student with "
                "dtype='bfloat16' or 'float32', or load the teacher in it."
            )
        if numbers[1] <= 0:
            break
        step = (-numbers[0] / numbers[1]).item()
        scale = min(max(scale + step, scale / 2), scale * 2)
        if abs(step) < 1e-3:
            break
    if abs(scale - 1) < max(1e-6, mender.rounding / 2):
        return 1.0  # a rounding error: no weight would be changed by more than storing it does
    _scale_logits(mender, head, scale)
    return scale


def _scale_logits(mender: BlockReconstructor, head: HeadPair, scale: float) -> None:
    sites, offset = mender.plan.parameters, mender.plan.layout.norm_offset
    if head.tied:
        norm = mender.student_modules.norms.get(head.norm or "")
        if norm is None or (head.norm or "") + ".weight" not in sites:
            mender.notes.append(
                "The logits' scale is not fitted: the head is tied, and the norm before it has no gain."
            )
            return
        gain, norm_bias = norm_weight(norm.module), module_bias(norm.module)
        changed = (head.norm or "") + ".weight"
        assign_checked(gain, (gain.double() + offset) * scale - offset, changed)
        if norm_bias is not None:
            assign_checked(norm_bias, at_least_float32(norm_bias) * scale, (head.norm or "") + ".bias")
    else:
        weight = linear_weight(head.student.module)
        changed = head.student.name + ".weight"
        assign_checked(weight, at_least_float32(weight) * scale, changed)
    bias = module_bias(head.student.module)
    if bias is not None:
        assign_checked(bias, at_least_float32(bias) * scale, head.student.name + ".bias")
    mender.transfer.record_step(sites[changed], f"logits times {scale:.6g}, fitted on the calibration tokens")


def _logit_multiplier(mender: BlockReconstructor, head: HeadPair) -> float | None:
    """Return what the model multiplies its head's output with (1 but for Granite and its like); None where it caps or adds."""
    heard: list[Tensor] = []
    with removable_hooks() as handles:
        handles.append(head.student.module.register_forward_hook(lambda _, args, output: heard.append(output)))
        logits = forward_no_cache(mender.student, first_rows(mender.batches[0], 1)).logits
    raw = heard[-1].double()
    ratio = ((raw * logits).sum() / raw.square().sum()).item()
    rounding = max_eps(heard[-1].dtype, logits.dtype)
    if (logits - ratio * raw).abs().max() > max(1e-4, rounding) * logits.abs().max():
        return None
    return 1.0 if abs(ratio - 1) < 1e-6 else ratio


def _final_hidden_states(mender: BlockReconstructor, head: HeadPair, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the teacher's stream before its last norm and what its head reads, (tokens, d_T) each."""
    heard: list[Tensor] = []

    def stop(tensor: Tensor) -> None:
        heard.append(tensor)
        raise StopForward

    with removable_hooks() as handles:
        handles.append(register_input_hook(mender.of_teacher.norms[head.norm or ""].module, heard.append))
        handles.append(register_input_hook(head.teacher.module, stop))
        forward_no_cache(mender.teacher, batch)
    of_decoder = mender.teacher.config.is_encoder_decoder
    stream, wanted = (drop_padding(each, batch, of_decoder=of_decoder) for each in heard[-2:])
    return stream, wanted


def _head_inputs(mender: BlockReconstructor, model: PreTrainedModel, part: ModuleRef, batch: Batch) -> Tensor:
    """Return what a head is given, (tokens, d)."""
    heard = capture_input(model, part.module, batch)
    assert heard is not None  # it makes the logits
    return drop_padding(heard, batch, of_decoder=mender.teacher.config.is_encoder_decoder)


def first_rows(batch: Batch, tokens: int) -> Batch:
    """Return so many of a batch's first rows that they have so many tokens; all of a batch that is not one row an example."""
    tokens_of = batch.get("input_ids")
    if tokens_of is None or any(len(value) != len(tokens_of) for value in batch.values()):
        return batch
    rows = max(1, -(-tokens // tokens_of.shape[1]))
    return {name: value[:rows] for name, value in batch.items()}


def token_counts(mender: BlockReconstructor, size: int) -> Tensor:
    """Return how often each token stands in the calibration text, padding apart, (V,) float64, over all processes."""
    counts = torch.zeros(size, dtype=torch.float64)
    for batch in mender.batches:
        if "input_ids" in batch:
            tokens = drop_padding(batch["input_ids"][..., None], batch).flatten()
            counts += torch.bincount(tokens, minlength=size)[:size]
    all_reduce_sum_([counts])
    return counts
