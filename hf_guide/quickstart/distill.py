"""The quickstart's training: the teacher's word is captured once, and every student learns from the capture."""

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, default_data_collator

from hf_guide.distillation.arguments import DistillationArguments
from hf_guide.distillation.trainer import DistillationTrainer
from hf_guide.signal_cache.reader import Capture
from hf_guide.signal_cache.writer import capture_teacher

# Rows of logits handled at once: few enough to stay in the processor's cache, many enough to hide the loop.
_ROWS = 16


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
    seed: int = 0


@torch.no_grad()
def evaluate(
    model: PreTrainedModel, blocks: Tensor, batch_size: int, title: str, *, show_progress: bool = True
) -> Evaluation:
    """Measure a causal language model's perplexity on blocks of tokens.

    Args:
        model: left in the mode it came in.
        blocks: int64 (blocks, length).
        batch_size: blocks per forward pass.
        title: what the progress bar says.
    """
    was_training = model.training
    model.eval()
    nats, started = 0.0, time.perf_counter()
    for batch in tqdm(blocks.split(batch_size), desc=title, unit="batch", disable=not show_progress):
        ids = batch.to(model.device)
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits.flatten(0, 1)
        for rows, labels in zip(logits.split(_ROWS), ids[:, 1:].flatten().split(_ROWS), strict=True):
            nats += torch.nn.functional.cross_entropy(rows.float(), labels, reduction="sum").item()
    seconds = time.perf_counter() - started
    model.train(was_training)
    tokens = blocks.shape[0] * (blocks.shape[1] - 1)
    return Evaluation(perplexity=math.exp(nats / tokens), tokens_per_second=tokens / seconds)


def examples_of(blocks: Tensor) -> list[dict[str, Tensor]]:
    """Return blocks of tokens, (blocks, length), as the examples of a causal language model."""
    return [{"input_ids": block, "labels": block} for block in blocks]


def capture(
    teacher: PreTrainedModel, blocks: Tensor, folder: Path, recipe: Recipe, *, show_progress: bool = True
) -> Capture:
    """Run the teacher over the blocks that the students will be trained on; its 64 likeliest tokens are kept at each place."""
    return capture_teacher(
        teacher,
        examples_of(blocks),
        folder,
        data_collator=default_data_collator,
        config={"batch_size": recipe.batch_size, "top_k": min(64, teacher.get_output_embeddings().weight.shape[0])},
        show_progress=show_progress,
    )


def train(
    student: PreTrainedModel,
    heard: Capture,
    blocks: Tensor,
    learning_rate: float,
    recipe: Recipe,
    folder: Path,
    *,
    show_progress: bool = True,
) -> float:
    """Train a student in place, each block once, and return its training tokens per second.

    Args:
        heard: what the teacher said of the blocks.
        blocks: int64 (steps * batch_size, length); every student sees them in the order that the seed decides.
        learning_rate: the peak; it rises for a tenth of the steps, then falls to a tenth of itself.
        folder: for what the trainer writes.
    """
    options: dict[str, Any] = {
        "objective": {"ce": 1 - recipe.kd_weight, "kd": recipe.kd_weight},
        "max_steps": recipe.steps,
        "per_device_train_batch_size": recipe.batch_size,
        "learning_rate": learning_rate,
        "warmup_steps": max(1, round(recipe.steps / 10)),
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
        "adam_beta2": 0.95,
        "max_grad_norm": 1.0,
        "logging_steps": max(1, recipe.steps // 4),
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": not show_progress,
        "seed": recipe.seed,
    }
    trainer = DistillationTrainer(
        student,
        DistillationArguments(str(folder), **options),
        data_collator=default_data_collator,
        train_dataset=examples_of(blocks),
        teacher=heard,
    )
    result = trainer.train()
    return float(result.metrics["train_samples_per_second"]) * (blocks.shape[1] - 1)
