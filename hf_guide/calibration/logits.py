"""The end of the stream: a table that is head as well, the gain before it, and one factor of all logits."""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_guide.calibration.anatomy import Part, bias_of, gain_of, weight_of
from hf_guide.calibration.batches import Batch
from hf_guide.calibration.listening import Heard, heard_at, hooks, on_input, real_tokens, run
from hf_guide.calibration.regression import Sums, in_single, rounding_of, with_one
from hf_guide.calibration.repair import Mender, store
from hf_guide.errors import ShapeError
from hf_guide.worlds import add_up, world

SCALE_TOKENS = 1024  # one number is fitted: more would cost a product with the vocabulary each, and tell no more
STEPS = 8
BALANCE, FLOOR = 0.003, 0.1  # of `fit_table`


@dataclass
class Head:
    """A student's head over its vocabulary, the teacher's, and the norm before it, by its canonical name.

    `wanted` is what the teacher's head was given when the table was fitted, (tokens, d_T) for each batch: held, because
    another pass through the teacher costs more than one stream.
    """

    student: Part
    teacher: Part
    norm: str | None
    tied: bool
    wanted: list[Tensor] = field(default_factory=list)

    def heard_of_teacher(self, mender: Mender, batch: int) -> Tensor:
        """Return what the teacher's head is given, (tokens, d_T), as it was heard for the table or as it is heard now."""
        if batch < len(self.wanted):
            return self.wanted[batch]
        return _heard_rows(mender, mender.teacher, self.teacher, mender.batches[batch])


def find_head(mender: Mender) -> Head | None:
    """Return the head that makes logits over a vocabulary; None where there is none, or where the teacher has none."""
    for name, part in mender.of_student.readers.items():
        twin = mender.of_teacher.readers.get(name)
        if part.is_language_head and twin is not None:
            reads = part.match.row.reads
            tied = name + ".weight" in mender.plan.shared
            return Head(part, twin, reads[0] if reads else None, tied)
    return None


def fit_table(mender: Mender, head: Head, counts: Tensor) -> None:
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
    sums: list[Sums] = []
    for batch in mender.batches:
        stream, wanted = _last_streams(mender, head, batch)
        head.wanted.append(wanted)
        stream = in_single(stream)
        carried = stream @ matrix.to(stream)
        if mender.plan.layout.norm == "layer":
            carried = carried - carried.mean(-1, keepdim=True)
        carried = carried / carried.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-30)
        if not sums:
            sums.append(Sums.of(carried.shape[1] + 1, wanted.shape[1] + 1))
        sums[0].add(with_one(carried, True), with_one(wanted, True))
    biased = norm + ".bias" in mender.plan.sites
    gram, cross, _, _ = _moments(sums[0].gather(), centered=biased)  # (d_S, d_S), (d_T, d_S)
    part = head.student
    weight = weight_of(part.module)
    had = mender.plan.read(mender.plan.sites[mender.plan.shared[part.name + ".weight"]].source or "").double()
    if len(had) != len(weight) or len(counts) != len(weight):
        return
    plain = weight.detach().double().cpu()
    image = had @ cross  # (V, d_S): what the logits of a token are along each direction of the student's
    gain = ((plain * image).sum() / ((plain @ gram) * plain).sum()).item()
    size, loud = plain.square().sum(1).mean().item(), (plain @ gram * plain).sum(1).mean().item() * gain**2
    share = (counts / counts.mean().clamp(min=1e-300)).clamp(min=FLOOR, max=1.0) * BALANCE
    values, vectors = torch.linalg.eigh(gram)
    right = share[:, None] * plain / size + gain * image / loud
    turned = (right @ vectors) / (share[:, None] / size + gain**2 * values[None] / loud)
    mender.write(part, turned @ vectors.T)
    mender.transfer.note_step(
        mender.plan.sites[mender.plan.shared[part.name + ".weight"]], "fitted to be embeddings and head at once"
    )


def fit_gain(mender: Mender, head: Head) -> None:
    """Fit the diagonal before a tied head, and its bias, to the teacher's logits, after the blocks are repaired.

    It minimises sum_t |E_S (h * n_S) - E_T n_T|^2, less what all tokens of a vocabulary have in common, for the diagonal h
    that multiplies the gain: (A_SS * C_SS) h = diag(A_ST C_TS), with A the moments of the tables over the vocabulary and C
    those of the last hidden states over the calibration tokens, their means apart.
    """
    norm = mender.of_student.norms.get(head.norm or "")
    site = mender.plan.sites.get((head.norm or "") + ".weight")
    if norm is None or site is None or head.norm is None:
        return
    sums: list[Sums] = []
    for number, batch in enumerate(mender.batches):
        has = _heard_rows(mender, mender.student, head.student, batch)
        wanted = head.heard_of_teacher(mender, number)
        if not sums:
            sums.append(Sums.of(has.shape[1] + 1, wanted.shape[1] + 1))
        sums[0].add(with_one(has, True), with_one(wanted, True))
    biased = head.norm + ".bias" in mender.plan.sites
    gram, cross, mean_s, mean_t = _moments(sums[0].gather(), centered=biased)
    own, had = (weight_of(part.module).detach().double().cpu() for part in (head.student, head.teacher))
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
    gain = gain_of(norm.module).detach().double().cpu() + offset
    store(gain_of(norm.module), gain * diagonal - offset, head.norm + ".weight")
    bias = bias_of(norm.module)
    if biased and bias is not None:
        lost = outer @ mean_t - inner @ (diagonal * mean_s)
        fitted = diagonal * bias.detach().double().cpu() + torch.linalg.pinv(inner, hermitian=True) @ lost
        store(bias, fitted, head.norm + ".bias")
    mender.transfer.note_step(site, "fitted in the logits on the calibration tokens")


def _moments(total: Sums, *, centered: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the mean products x^T x and y^T x of rows that end in a one, and the means of x and y."""
    tokens = total.gram[-1, -1]
    mean_x, mean_y = total.gram[-1, :-1] / tokens, total.cross[:-1, -1] / tokens
    gram, cross = total.gram[:-1, :-1] / tokens, total.cross[:-1, :-1] / tokens
    if centered:
        gram, cross = gram - torch.outer(mean_x, mean_x), cross - torch.outer(mean_y, mean_x)
    return gram, cross, mean_x, mean_y


def fit_logit_scale(mender: Mender, head: Head) -> float:
    """Fit the s that minimises the divergence of softmax(s z_S) from the teacher's predictions, and multiply the logits by it.

    Newton's steps on one convex number, from 1.

    Raises:
        ShapeError: logits that are not finite, or weights too large for their dtype when they are multiplied.
    """
    ratio = _logits_per_output(mender, head)
    if ratio is None:
        mender.notes.append(
            "The logits' scale is not fitted: the model does more to its head's output than multiply it."
        )
        return 1.0
    hidden: list[Tensor] = []
    goals: list[Tensor] = []
    seen = 0
    for whole in mender.batches:
        batch = first_rows(whole, SCALE_TOKENS // world()[1] - seen)
        has = _heard_rows(mender, mender.student, head.student, batch)
        expected = run(mender.teacher, batch)
        logits = real_tokens(expected.logits, batch, of_decoder=mender.teacher.config.is_encoder_decoder)
        raw, wanted = head.student.module(has), logits.to(torch.promote_types(logits.dtype, torch.float32))
        rows = min(raw.shape[-1], wanted.shape[-1])
        chance = wanted[:, :rows].softmax(-1)
        goals.append((chance * raw[:, :rows].to(chance)).sum(-1))
        hidden.append(has)
        seen += len(has)
        if seen * world()[1] >= SCALE_TOKENS:
            break
    scale = 1.0
    for _ in range(STEPS):
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
        add_up([numbers])
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


def _scale_logits(mender: Mender, head: Head, scale: float) -> None:
    sites, offset = mender.plan.sites, mender.plan.layout.norm_offset
    if head.tied:
        norm = mender.of_student.norms.get(head.norm or "")
        if norm is None or (head.norm or "") + ".weight" not in sites:
            mender.notes.append(
                "The logits' scale is not fitted: the head is tied, and the norm before it has no gain."
            )
            return
        gain, norm_bias = gain_of(norm.module), bias_of(norm.module)
        changed = (head.norm or "") + ".weight"
        store(gain, (gain.double() + offset) * scale - offset, changed)
        if norm_bias is not None:
            store(norm_bias, in_single(norm_bias) * scale, (head.norm or "") + ".bias")
    else:
        weight = weight_of(head.student.module)
        changed = head.student.name + ".weight"
        store(weight, in_single(weight) * scale, changed)
    bias = bias_of(head.student.module)
    if bias is not None:
        store(bias, in_single(bias) * scale, head.student.name + ".bias")
    mender.transfer.note_step(sites[changed], f"logits times {scale:.6g}, fitted on the calibration tokens")


def _logits_per_output(mender: Mender, head: Head) -> float | None:
    """Return what the model multiplies its head's output with (1 but for Granite and its like); None where it caps or adds."""
    heard: list[Tensor] = []
    with hooks() as handles:
        handles.append(head.student.module.register_forward_hook(lambda _, args, output: heard.append(output)))
        logits = run(mender.student, first_rows(mender.batches[0], 1)).logits
    raw = heard[-1].double()
    ratio = ((raw * logits).sum() / raw.square().sum()).item()
    rounding = rounding_of(heard[-1].dtype, logits.dtype)
    if (logits - ratio * raw).abs().max() > max(1e-4, rounding) * logits.abs().max():
        return None
    return 1.0 if abs(ratio - 1) < 1e-6 else ratio


def _last_streams(mender: Mender, head: Head, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the teacher's stream before its last norm and what its head reads, (tokens, d_T) each."""
    heard: list[Tensor] = []

    def stop(tensor: Tensor) -> None:
        heard.append(tensor)
        raise Heard

    with hooks() as handles:
        handles.append(on_input(mender.of_teacher.norms[head.norm or ""].module, heard.append))
        handles.append(on_input(head.teacher.module, stop))
        run(mender.teacher, batch)
    of_decoder = mender.teacher.config.is_encoder_decoder
    stream, wanted = (real_tokens(each, batch, of_decoder=of_decoder) for each in heard[-2:])
    return stream, wanted


def _heard_rows(mender: Mender, model: PreTrainedModel, part: Part, batch: Batch) -> Tensor:
    """Return what a head is given, (tokens, d)."""
    heard = heard_at(model, part.module, batch)
    assert heard is not None  # it makes the logits
    return real_tokens(heard, batch, of_decoder=mender.teacher.config.is_encoder_decoder)


def first_rows(batch: Batch, tokens: int) -> Batch:
    """Return so many of a batch's first rows that they have so many tokens; all of a batch that is not one row an example."""
    tokens_of = batch.get("input_ids")
    if tokens_of is None or any(len(value) != len(tokens_of) for value in batch.values()):
        return batch
    rows = max(1, -(-tokens // tokens_of.shape[1]))
    return {name: value[:rows] for name, value in batch.items()}


def token_counts(mender: Mender, size: int) -> Tensor:
    """Return how often each token stands in the calibration text, padding apart, (V,) float64, over all processes."""
    counts = torch.zeros(size, dtype=torch.float64)
    for batch in mender.batches:
        if "input_ids" in batch:
            tokens = real_tokens(batch["input_ids"][..., None], batch).flatten()
            counts += torch.bincount(tokens, minlength=size)[:size]
    add_up([counts])
    return counts
