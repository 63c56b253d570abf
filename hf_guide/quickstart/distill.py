"""The smallest useful distillation: cross-entropy and forward KL at temperature 1, several students in step.

All students see the same batches in the same order, so the teacher's forward pass is paid once for all of them.
What it does not do: accumulate, distribute, checkpoint, resume.
"""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

# Rows of logits handled at once: few enough to stay in the processor's cache, many enough to hide the loop.
_ROWS = 16


class Losses(NamedTuple):
    """Means over tokens, in nats. Only `total` carries a gradient."""

    total: Tensor
    cross_entropy: Tensor
    divergence: Tensor


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` measured: perplexity per token, and tokens through the model per second."""

    perplexity: float
    tokens_per_second: float


@dataclass(frozen=True)
class Recipe:
    """How all students are trained; only the peak learning rate is each student's own."""

    steps: int
    batch_size: int
    kd_weight: float = 0.5
    warmup: float = 0.1
    final_rate: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    max_grad_norm: float = 1.0

    def rate(self, step: int) -> float:
        """Share of the peak learning rate at `step`: a linear rise, then half a cosine down to `final_rate`."""
        rise = max(1, round(self.warmup * self.steps))
        if step < rise:
            return (step + 1) / rise
        progress = (step - rise) / max(1, self.steps - rise)
        return self.final_rate + (1.0 - self.final_rate) * 0.5 * (1.0 + math.cos(math.pi * progress))


def distillation_loss(logits: Tensor, teacher_logits: Tensor, labels: Tensor, kd_weight: float) -> Losses:
    """Mix cross-entropy with the teacher's forward KL divergence at temperature 1 (Hinton et al., arXiv 1503.02531).

        total = (1 - kd_weight) CE(labels, student) + kd_weight KL(teacher || student)

    Args:
        logits: the student's, (tokens, vocab).
        teacher_logits: (tokens, vocab), without gradient.
        labels: the true next tokens, int64 (tokens,).
        kd_weight: between 0 (no teacher) and 1 (teacher only).
    """
    return Losses(*_DistillationLoss.apply(logits, teacher_logits, labels, kd_weight))


class _DistillationLoss(torch.autograd.Function):
    """Loss and gradient in one walk over the logits: with a large vocabulary the walks cost as much as the student."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, teacher_logits: Tensor, labels: Tensor, kd_weight: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        gradient = torch.empty_like(logits)
        divergence = logits.new_empty(len(logits))
        cross_entropy = logits.new_empty(len(logits))
        for start in range(0, len(logits), _ROWS):
            rows = slice(start, start + _ROWS)
            teacher = teacher_logits[rows].log_softmax(-1)
            student = logits[rows].log_softmax(-1)
            probabilities = teacher.exp()
            label = labels[rows].unsqueeze(-1)
            cross_entropy[rows] = -student.gather(-1, label).squeeze(-1)
            divergence[rows] = teacher.sub_(student).mul_(probabilities).sum(-1)
            slope = torch.exp(student, out=gradient[rows]).sub_(probabilities, alpha=kd_weight)
            slope.scatter_add_(-1, label, slope.new_full(label.shape, kd_weight - 1.0))
        ctx.save_for_backward(gradient.div_(len(logits)))
        terms = cross_entropy.mean(), divergence.mean()
        ctx.mark_non_differentiable(*terms)
        return (1.0 - kd_weight) * terms[0] + kd_weight * terms[1], *terms

    @staticmethod
    def backward(ctx: Any, slope: Tensor, *_: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * slope, None, None, None


@torch.no_grad()
def evaluate(
    model: PreTrainedModel, blocks: Tensor, batch_size: int, title: str, *, show_progress: bool = True
) -> Evaluation:
    """Measure a causal language model's perplexity on blocks of tokens.

    Args:
        model: left in the mode it came in.
        blocks: int64 (blocks, length + 1).
        batch_size: blocks per forward pass.
        title: what the progress bar says.
    """
    was_training = model.training
    model.eval()
    nats, started = 0.0, time.perf_counter()
    for batch in tqdm(blocks.split(batch_size), desc=title, unit="batch", disable=not show_progress):
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits.flatten(0, 1)
        for rows, labels in zip(logits.split(_ROWS), batch[:, 1:].flatten().split(_ROWS), strict=True):
            nats += torch.nn.functional.cross_entropy(rows.float(), labels, reduction="sum").item()
    seconds = time.perf_counter() - started
    model.train(was_training)
    tokens = blocks.shape[0] * (blocks.shape[1] - 1)
    return Evaluation(perplexity=math.exp(nats / tokens), tokens_per_second=tokens / seconds)


def distill(
    teacher: PreTrainedModel,
    students: Mapping[str, PreTrainedModel],
    blocks: Tensor,
    learning_rates: Mapping[str, float],
    recipe: Recipe,
    *,
    show_progress: bool = True,
) -> dict[str, float]:
    """Train students in place on the same blocks in the same order.

    Args:
        teacher: of the students' vocabulary; runs in eval mode without gradients.
        students: one per name.
        blocks: int64 (at least steps * batch_size, length + 1), read from the first on, each once.
        learning_rates: the peak rate of each student.
        recipe: everything the students have in common.

    Returns:
        Each student's training tokens per second: its own forward, loss, backward and update, without the teacher.

    Raises:
        ValueError: there are fewer blocks than the recipe reads.
    """
    needed = recipe.steps * recipe.batch_size
    if len(blocks) < needed:
        raise ValueError(f"{recipe.steps} steps of {recipe.batch_size} need {needed} blocks; there are {len(blocks)}.")
    optimizers = {
        name: torch.optim.AdamW(student.parameters(), lr=learning_rates[name], betas=recipe.betas, weight_decay=0.0)
        for name, student in students.items()
    }
    seconds = dict.fromkeys(students, 0.0)
    teacher.eval()
    for student in students.values():
        student.train()
    bar = tqdm(blocks[:needed].split(recipe.batch_size), desc="training", unit="step", disable=not show_progress)
    for step, batch in enumerate(bar):
        inputs, labels = batch[:, :-1], batch[:, 1:].flatten()
        with torch.no_grad():
            teacher_logits = teacher(input_ids=inputs, use_cache=False).logits.flatten(0, 1)
        shown = {}
        for name, student in students.items():
            started = time.perf_counter()
            optimizers[name].param_groups[0]["lr"] = learning_rates[name] * recipe.rate(step)
            logits = student(input_ids=inputs, use_cache=False).logits.flatten(0, 1)
            losses = distillation_loss(logits, teacher_logits, labels, recipe.kd_weight)
            losses.total.backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), recipe.max_grad_norm)
            optimizers[name].step()
            optimizers[name].zero_grad()
            seconds[name] += time.perf_counter() - started
            shown[name] = f"{losses.cross_entropy.item():.2f}"
        bar.set_postfix(shown)
    tokens = needed * (blocks.shape[1] - 1)
    return {name: tokens / spent for name, spent in seconds.items()}
