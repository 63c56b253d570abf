"""What `DistillationTrainer` costs against a minimal loop for the same step.

    python examples/benchmarks/distillation_speed.py
    python examples/benchmarks/distillation_speed.py --only kd --tokens 4096 --rounds 2

1. kd, classes: a step from a live teacher, against a loop written by hand: one forward of the teacher, one forward and
   backward of the student, the plain formula on whole logits, gradients clipped, one step of the same optimizer. A language
   model (vocabulary 49152) and an image classifier.
2. capture: a step from a captured teacher's top 64, against fine-tuning the student with the stock `Trainer`, which
   has no teacher at all. Reading the capture is part of the step.

The objective is 0.5 task loss + 0.5 KL(teacher || student), temperature 2. See interleaved_timing.py for how time and
memory are taken.
"""

import argparse
import importlib.metadata
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from interleaved_timing import Arm, StepGate, add_timing_arguments, measure, print_header, print_table, run_arm
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainingArguments
from workloads import (
    LEARNING_RATE,
    GateCallback,
    add_workload_arguments,
    classifiers,
    collate,
    describe_sizes,
    images,
    language_models,
    plain_arguments,
    texts,
)

from hf_guide import DistillationArguments, DistillationTrainer

OBJECTIVE = {"ce": 0.5, "kd": 0.5}
TEMPERATURE = 2.0


def text_loss(student: PreTrainedModel, teacher: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        teacher_logits = teacher(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    outputs = student(**batch)
    kd = functional.kl_div(
        (outputs.logits[:, :-1] / TEMPERATURE).log_softmax(-1).flatten(0, 1),
        (teacher_logits / TEMPERATURE).log_softmax(-1).flatten(0, 1),
        log_target=True,
        reduction="batchmean",
    )
    return 0.5 * outputs.loss + 0.5 * TEMPERATURE**2 * kd


def image_loss(student: PreTrainedModel, teacher: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        teacher_logits = teacher(pixel_values=batch["pixel_values"]).logits
    outputs = student(**batch)
    kd = functional.kl_div(
        (outputs.logits / TEMPERATURE).log_softmax(-1),
        (teacher_logits / TEMPERATURE).log_softmax(-1),
        log_target=True,
        reduction="batchmean",
    )
    return 0.5 * outputs.loss + 0.5 * TEMPERATURE**2 * kd


def loop(
    gate: StepGate,
    models: tuple[PreTrainedModel, PreTrainedModel],
    batches: Iterable[dict[str, Tensor]],
    loss_of: Callable[[PreTrainedModel, PreTrainedModel, dict[str, Tensor]], Tensor],
) -> tuple[float, str]:
    """Train by hand; return the mean loss and the version of what did it."""
    student, teacher = models
    gate.ready()
    optimizer = torch.optim.AdamW(student.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    student.train()
    losses = []
    for batch in batches:
        loss = loss_of(student, teacher, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        del loss
        gate.end()
    return torch.stack(losses).mean().item(), f"torch {torch.__version__}"


def texts_by_hand(gate: StepGate, args: argparse.Namespace) -> tuple[float, str]:
    batches = DataLoader(texts(args), batch_size=args.tokens // args.length, collate_fn=collate)  # type: ignore[arg-type]
    return loop(gate, language_models(args), batches, text_loss)


def images_by_hand(gate: StepGate, args: argparse.Namespace) -> tuple[float, str]:
    batches = DataLoader(images(args), batch_size=args.images, collate_fn=collate)  # type: ignore[arg-type]
    return loop(gate, classifiers(), batches, image_loss)


def distil_texts(gate: StepGate, args: argparse.Namespace) -> tuple[float, str]:
    student, teacher = language_models(args)
    gate.ready()
    return _train(gate, student, texts(args), args, args.tokens // args.length, teacher=teacher)


def distil_images(gate: StepGate, args: argparse.Namespace) -> tuple[float, str]:
    student, teacher = classifiers()
    gate.ready()
    return _train(gate, student, images(args), args, args.images, teacher=teacher)


def distil_from_capture(gate: StepGate, args: argparse.Namespace) -> tuple[float, str]:
    student, _ = language_models(args)
    gate.ready()
    return _train(gate, student, texts(args), args, args.tokens // args.length, capture=args.capture)


def _train(
    gate: StepGate,
    student: PreTrainedModel,
    examples: list,  # type: ignore[type-arg]
    args: argparse.Namespace,
    batch: int,
    *,
    teacher: PreTrainedModel | None = None,
    capture: str | None = None,
) -> tuple[float, str]:
    with tempfile.TemporaryDirectory() as folder:
        arguments = DistillationArguments(
            **plain_arguments(args, folder, batch), losses=OBJECTIVE, temperature=TEMPERATURE, teacher_cache=capture
        )
        trainer = DistillationTrainer(
            student, arguments, collate, examples, teacher=teacher, callbacks=[GateCallback(gate)]
        )
        return trainer.train().training_loss, f"hf_guide {importlib.metadata.version('hf_guide')}"


def fine_tune(gate: StepGate, args: argparse.Namespace) -> tuple[float, str]:
    student, _ = language_models(args)
    gate.ready()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(**plain_arguments(args, folder, args.tokens // args.length))
        trainer = Trainer(student, arguments, collate, texts(args), callbacks=[GateCallback(gate)])
        return trainer.train().training_loss, f"transformers {importlib.metadata.version('transformers')}"


ARMS: dict[str, Arm] = {
    "distil_texts": distil_texts,
    "texts_by_hand": texts_by_hand,
    "distil_images": distil_images,
    "images_by_hand": images_by_hand,
    "distil_from_capture": distil_from_capture,
    "fine_tune": fine_tune,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_workload_arguments(parser)
    add_timing_arguments(parser)
    parser.add_argument("--only", choices=["kd", "classes", "capture"], help="one of the comparisons")
    args = parser.parse_args()
    if args.arm:
        return run_arm(ARMS, args)
    print_header(("torch", "transformers", "accelerate", "hf_guide"))
    of_text = describe_sizes(args)
    if args.only in (None, "kd"):
        results = measure(__file__, ["distil_texts", "texts_by_hand"], args)
        print_table(f"kd: {of_text}", results, {"texts_by_hand": (1.03, None)})
    if args.only in (None, "classes"):
        results = measure(__file__, ["distil_images", "images_by_hand"], args)
        print_table(f"classes: {args.images} images a step, float32", results, {"images_by_hand": (1.03, None)})
    if args.only in (None, "capture"):
        with tempfile.TemporaryDirectory() as folder:
            args.capture = capture(Path(folder) / "capture", args)
            results = measure(__file__, ["distil_from_capture", "fine_tune"], args)
        print_table(f"capture: {of_text}; the losses are two objectives", results, {"fine_tune": (1.05, None)})
    return 0


def capture(folder: Path, args: argparse.Namespace) -> str:
    """Cache the teacher's outputs for every example; return the folder."""
    from hf_guide import capture_teacher

    torch.set_num_threads(1)
    _, teacher = language_models(args)
    config = {"top_k": 64, "temperatures": [TEMPERATURE]}
    capture_teacher(teacher, texts(args), folder, data_collator=collate, config=config, show_progress=False)
    return str(folder)


if __name__ == "__main__":
    sys.exit(main())
