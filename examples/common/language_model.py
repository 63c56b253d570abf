"""Make, train and evaluate the students of one language model: shared by the quickstart and the benchmarks.

The teacher's outputs are cached once; every student trains from the cache, on the same blocks in the same order.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, TrainerCallback, default_data_collator

from hf_guide import Capture, DistillationArguments, DistillationTrainer, capture_teacher
from hf_guide.errors import OptionError

LEARNING_RATES = {"random": 1e-3, "uniform": 3e-3, "guide": 3e-3, "calibrated": 1e-3}
"""Peak learning rate by method: the better of 1e-3 and 3e-3 for SmolLM2-135M on Wikipedia after 200 steps, one seed.

That of `calibrated` is the best of 5e-4, 1e-3, 2e-3 and 3e-3 after 51,200 tokens, of a seed that no figure is of: it ended at
losses of 5.027, 4.972, 5.040 and 5.107.
"""

_CHUNK_ROWS = 16
"""Rows of logits processed at once: few enough to stay in the processor's cache, many enough to hide the loop."""


@dataclass(frozen=True)
class Evaluation:
    """Perplexity per token, and tokens per second of the forward passes."""

    perplexity: float
    tokens_per_second: float


@dataclass(frozen=True)
class TrainingRecipe:
    """Training options that all students share; only the peak learning rate depends on the method."""

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
        model: Its train or eval mode is restored afterwards.
        blocks: int64 (blocks, length).
        batch_size: Blocks per forward pass.
        title: Title of the progress bar.
    """
    was_training = model.training
    model.eval()
    nats, started = 0.0, time.perf_counter()
    for batch in tqdm(blocks.split(batch_size), desc=title, unit="batch", disable=not show_progress):
        ids = batch.to(model.device)
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits.flatten(0, 1)
        for rows, labels in zip(logits.split(_CHUNK_ROWS), ids[:, 1:].flatten().split(_CHUNK_ROWS), strict=True):
            nats += torch.nn.functional.cross_entropy(rows.float(), labels, reduction="sum").item()
    seconds = time.perf_counter() - started
    model.train(was_training)
    tokens = blocks.shape[0] * (blocks.shape[1] - 1)
    return Evaluation(perplexity=math.exp(nats / tokens), tokens_per_second=tokens / seconds)


def draw_blocks(blocks: Tensor, count: int, seed: int) -> Tensor:
    """Return `count` of the blocks in an order that only the seed decides.

    Raises:
        OptionError: There are fewer.
    """
    if len(blocks) < count:
        raise OptionError(
            f"{count} blocks of {blocks.shape[1] - 1} tokens are needed, but the text has {len(blocks)}: reduce the steps, "
            "the batch size or the held-out blocks, or add text."
        )
    return blocks[torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed))[:count]]


def to_examples(blocks: Tensor) -> list[dict[str, Tensor]]:
    """Return blocks of tokens, (blocks, length), as the examples of a causal language model."""
    return [{"input_ids": block, "labels": block} for block in blocks]


def cache_teacher(
    teacher: PreTrainedModel,
    blocks: Tensor,
    folder: Path,
    recipe: TrainingRecipe,
    tokenizer: Any = None,
    *,
    show_progress: bool = True,
) -> Capture:
    """Run the teacher over the training blocks and save its 64 largest log-probabilities for each token.

    Args:
        tokenizer: Of the blocks, where that is not the teacher's.
    """
    return capture_teacher(
        teacher,
        to_examples(blocks),
        folder,
        data_collator=default_data_collator,
        processing_class=tokenizer,
        config={"batch_size": recipe.batch_size, "top_k": min(64, teacher.get_output_embeddings().weight.shape[0])},
        show_progress=show_progress,
    )


def train(
    student: PreTrainedModel,
    teacher_cache: Capture,
    blocks: Tensor,
    learning_rate: float,
    recipe: TrainingRecipe,
    folder: Path,
    *,
    callbacks: "Sequence[TrainerCallback]" = (),
    show_progress: bool = True,
) -> tuple[DistillationTrainer, float]:
    """Train a student in place, each block once; return its trainer and the training tokens per second.

    Args:
        teacher_cache: The teacher's outputs on the blocks.
        blocks: int64 (steps * batch_size, length); every student sees them in the order that the seed decides.
        learning_rate: The peak; it rises for a tenth of the steps, then falls to a tenth of itself.
        folder: For what the trainer writes.
        callbacks: More of the trainer's.
    """
    options: dict[str, Any] = {
        "losses": {"ce": 1 - recipe.kd_weight, "kd": recipe.kd_weight},
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
        train_dataset=to_examples(blocks),
        teacher=teacher_cache,
        callbacks=list(callbacks),
    )
    result = trainer.train()
    return trainer, float(result.metrics["train_samples_per_second"]) * (blocks.shape[1] - 1)
