"""What the trainers are timed on: a causal language model of real vocabulary and an image classifier, both random."""

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from interleaved_timing import StepGate
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    TrainerCallback,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)

CLASSES = 10
IMAGE = 64
LEARNING_RATE = 1e-4


def add_workload_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the sizes of models and batches."""
    parser.add_argument("--tokens", type=int, default=1024, help="of a language model's step")
    parser.add_argument("--length", type=int, default=512, help="tokens of an example")
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument(
        "--student", type=int, nargs=2, default=[4, 256], metavar=("BLOCKS", "WIDTH"), help="of language"
    )
    parser.add_argument(
        "--teacher", type=int, nargs=2, default=[8, 512], metavar=("BLOCKS", "WIDTH"), help="of language"
    )
    parser.add_argument("--images", type=int, default=16, help="of a classifier's step")


def _llama(seed: int, blocks: int, width: int, args: argparse.Namespace) -> LlamaForCausalLM:
    set_seed(seed)
    config = LlamaConfig(
        vocab_size=args.vocabulary,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=blocks,
        num_attention_heads=width // 64,
        max_position_embeddings=args.length,
        tie_word_embeddings=True,
        pad_token_id=0,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def _vit(seed: int, width: int, blocks: int) -> ViTForImageClassification:
    set_seed(seed)
    config = ViTConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=blocks,
        num_attention_heads=width // 64,
        image_size=IMAGE,
        patch_size=8,
        num_labels=CLASSES,
    )
    return ViTForImageClassification(config)


def language_models(args: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Return student and teacher, random, with tied heads."""
    return _llama(0, *args.student, args), _llama(1, *args.teacher, args).eval().requires_grad_(False)


def describe_sizes(args: argparse.Namespace) -> str:
    """Return the sizes of models and batches, for people."""
    (blocks, width), (teacher_blocks, teacher_width) = args.student, args.teacher
    return (
        f"{args.tokens} tokens a step, {args.length} an example, vocabulary {args.vocabulary}, student of {blocks} blocks of "
        f"width {width}, teacher of {teacher_blocks} of {teacher_width}, float32"
    )


def classifiers() -> tuple[PreTrainedModel, PreTrainedModel]:
    """Return student (4 blocks, width 192) and teacher (8 blocks, width 384)."""
    return _vit(0, 192, 4), _vit(1, 384, 8).eval().requires_grad_(False)


def texts(args: argparse.Namespace) -> list[dict[str, Tensor]]:
    """Return the examples of every step, each of `args.length` random tokens."""
    generator = torch.Generator().manual_seed(2)
    rows = []
    for _ in range((args.rounds + 1) * args.tokens // args.length):
        ids = torch.randint(1, args.vocabulary, (args.length,), generator=generator)
        labels = ids.clone()
        labels[0] = -100  # no position predicts it; some trainers count it nevertheless
        rows.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return rows


def images(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the examples of every step."""
    generator = torch.Generator().manual_seed(2)
    return [
        {
            "pixel_values": torch.randn(3, IMAGE, IMAGE, generator=generator),
            "labels": int(torch.randint(CLASSES, (), generator=generator)),
        }
        for _ in range((args.rounds + 1) * args.images)
    ]


def collate(examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Stack examples of equal length."""
    return {name: torch.stack([torch.as_tensor(each[name]) for each in examples]) for name in examples[0]}


def plain_arguments(args: argparse.Namespace, folder: str, batch: int) -> dict[str, Any]:
    """Return `TrainingArguments` that every arm has: the optimizer that `by_hand` makes, and nothing on the side."""
    return {
        "output_dir": folder,
        "max_steps": args.rounds + 1,
        "per_device_train_batch_size": batch,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch_fused",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "train_sampling_strategy": "sequential",
        "dataloader_pin_memory": False,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }


class GateCallback(TrainerCallback):
    """End a step of the timing after each step of a `Trainer`, so that fetching the next batch counts too."""

    def __init__(self, gate: StepGate):
        self.gate = gate

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Wait for the next step."""
        self.gate.end()
