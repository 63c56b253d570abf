"""`DistillationTrainer` compared with other libraries' trainers on the same task: the same models, batches, loss and
optimizer.

    pip install trl nvidia-modelopt torchdistill
    python examples/benchmarks/distillation_libraries.py
    python examples/benchmarks/distillation_libraries.py --only texts --tokens 4096 --rounds 2     # for memory

texts    KL(teacher || student) at temperature 1, without a task loss, from a live teacher, on a fixed dataset:
         TRL's GKDTrainer (lmbda 0, so that it never generates; beta 0, which is forward KL there; its temperature is for
         sampling only), and NVIDIA ModelOpt's Hugging Face plugin, KDTrainer.
images   0.5 task loss + 0.5 KL at temperature 2 on an image classifier: torchdistill's DistillationBox.

A library that is not installed is skipped with a message. torchdistill needs a torchvision built for the torch
that is installed. TRL's own DistillationTrainer always generates, so it cannot use a fixed dataset.

See interleaved_timing.py for how time and memory are taken.
Each row has the library's version; ours runs first, in the same environment.
"""

import argparse
import importlib.metadata
import importlib.util
import os
import sys
import tempfile

import torch
from interleaved_timing import Arm, StepGate, add_timing_arguments, measure, print_header, print_table, run_arm
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast, TrainingArguments
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

# What each arm needs, and how much of its time and memory ours may take.
PEERS = {
    "texts": {"trl_gkd": ("trl", 1.0, 0.5), "modelopt_kd": ("nvidia-modelopt", 1.0, None)},
    "images": {"torchdistill_box": ("torchdistill", 1.0, None)},
}


def ours_texts(gate: StepGate, args: argparse.Namespace) -> tuple[float, str]:
    from hf_guide import DistillationArguments, DistillationTrainer

    student, teacher = language_models(args)
    gate.ready()
    with tempfile.TemporaryDirectory() as folder:
        plain = plain_arguments(args, folder, args.tokens // args.length)
        trainer = DistillationTrainer(
            student,
            DistillationArguments(**plain, losses="kd"),
            collate,
            texts(args),
            teacher=teacher,
            callbacks=[GateCallback(gate)],
        )
        return trainer.train().training_loss, _version("hf_guide")


def trl_gkd(gate: StepGate, args: argparse.Namespace) -> tuple[float, str]:
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    student, teacher = language_models(args)
    gate.ready()
    with tempfile.TemporaryDirectory() as folder:
        plain = plain_arguments(args, folder, args.tokens // args.length)
        config = GKDConfig(
            **plain,
            lmbda=0.0,
            beta=0.0,
            seq_kd=False,
            bf16=False,
            gradient_checkpointing=False,
            max_length=args.length,
        )
        trainer = GKDTrainer(
            model=student,
            teacher_model=teacher,
            args=config,
            data_collator=collate,
            # It takes nothing else.
            train_dataset=Dataset.from_list(
                [{name: row.tolist() for name, row in each.items()} for each in texts(args)]
            ),
            processing_class=_tokenizer(args.vocabulary),
            callbacks=[GateCallback(gate)],
        )
        return trainer.train().training_loss, _version("trl")


def modelopt_kd(gate: StepGate, args: argparse.Namespace) -> tuple[float, str]:
    from modelopt.torch.distill.plugins.huggingface import KDTrainer

    student, teacher = language_models(args)
    gate.ready()
    with tempfile.TemporaryDirectory() as folder:
        trainer = KDTrainer(
            student,
            TrainingArguments(**plain_arguments(args, folder, args.tokens // args.length)),
            collate,
            texts(args),
            callbacks=[GateCallback(gate)],
            distill_args={"distill": True, "teacher_model": teacher, "temperature": 1.0},
        )
        return trainer.train().training_loss, _version("nvidia-modelopt")


def ours_images(gate: StepGate, args: argparse.Namespace) -> tuple[float, str]:
    from hf_guide import DistillationArguments, DistillationTrainer

    student, teacher = classifiers()
    gate.ready()
    with tempfile.TemporaryDirectory() as folder:
        plain = plain_arguments(args, folder, args.images)
        trainer = DistillationTrainer(
            student,
            DistillationArguments(**plain, losses={"ce": 0.5, "kd": 0.5}, temperature=2.0),
            collate,
            images(args),
            teacher=teacher,
            callbacks=[GateCallback(gate)],
        )
        return trainer.train().training_loss, _version("hf_guide")


def torchdistill_box(gate: StepGate, args: argparse.Namespace) -> tuple[float, str]:
    import torchdistill.losses.mid_level  # noqa: F401  # registers KDLoss
    from torch.utils.data import SequentialSampler
    from torchdistill.core.distillation import get_distillation_box

    class Logits(torch.nn.Module):
        """Its loops expect models that return tensors."""

        def __init__(self, model: PreTrainedModel):
            super().__init__()
            self.model = model

        def forward(self, pixels: Tensor) -> Tensor:
            return self.model(pixel_values=pixels).logits

    student, teacher = classifiers()
    gate.ready()
    optimizer = {"lr": LEARNING_RATE, "weight_decay": 0.0, "fused": True}
    logits = {}
    for whose in ("student", "teacher"):
        logits |= {f"{whose}_module_path": ".", f"{whose}_module_io": "output"}
    criterion = {"key": "KDLoss", "kwargs": {**logits, "temperature": 2.0, "alpha": 0.5, "reduction": "batchmean"}}
    config = {
        "num_epochs": 1,
        "train_data_loader": {
            "dataset_id": "train",
            "requires_supp": True,
            "sampler": {"class_or_func": SequentialSampler, "kwargs": {}},
            "kwargs": {"batch_size": args.images, "num_workers": 0},
        },
        "teacher": {"requires_grad": False, "forward_proc": "forward_batch_only"},
        "student": {"forward_proc": "forward_batch_only"},
        "optimizer": {"key": "AdamW", "kwargs": optimizer, "max_grad_norm": 1.0},
        "criterion": {
            "key": "WeightedSumLoss",
            "kwargs": {"sub_terms": {"kd": {"criterion": criterion, "weight": 1.0}}},
        },
    }
    pairs = [(each["pixel_values"], each["labels"]) for each in images(args)]
    box = get_distillation_box(
        Logits(teacher), Logits(student), {"train": pairs}, config, torch.device("cpu"), None, False, 1.0
    )
    box.teacher_model.eval()
    box.pre_epoch_process(epoch=0)
    losses = []
    for batch, labels, more in box.train_data_loader:
        box.pre_forward_process()
        loss = box.forward_process(batch, labels, more)
        losses.append(loss.detach().clone())
        box.post_forward_process(loss)
        gate.end()
    box.post_epoch_process()
    return torch.stack(losses).mean().item(), _version("torchdistill")


def _tokenizer(size: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer of as many words as the models know: TRL's trainer wants one, though the data are ids already."""
    words = {f"w{number}": number for number in range(size)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0")), pad_token="w0", eos_token="w1", unk_token="w0"
    )


def _version(package: str) -> str:
    return f"{package} {importlib.metadata.version(package)}"


ARMS: dict[str, Arm] = {
    "ours_texts": ours_texts,
    "trl_gkd": trl_gkd,
    "modelopt_kd": modelopt_kd,
    "ours_images": ours_images,
    "torchdistill_box": torchdistill_box,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_workload_arguments(parser)
    add_timing_arguments(parser)
    parser.add_argument("--only", choices=["texts", "images"], help="one of the tasks")
    parser.add_argument(
        "--peer", choices=[name for peers in PEERS.values() for name in peers], help="one of the peers"
    )
    args = parser.parse_args()
    if args.arm:
        return run_arm(ARMS, args)
    print_header(("torch", "transformers", "accelerate", "hf_guide"))
    sizes = {
        "texts": describe_sizes(args),
        "images": f"{args.images} images a step, float32",
    }
    for task, peers in PEERS.items():
        targets: dict[str, tuple[float | None, float | None]] = {}
        for name, (package, most, most_memory) in peers.items():
            if args.peer in (None, name) and args.only in (None, task):
                try:
                    importlib.metadata.version(package)
                except importlib.metadata.PackageNotFoundError:
                    print(f"\n{name} is left out: {package} is not installed.")
                    continue
                targets[name] = (most, most_memory)
        if targets:
            print_table(f"{task}: {sizes[task]}", measure(__file__, [f"ours_{task}", *targets], args), targets)
    return 0


if __name__ == "__main__":
    sys.exit(main())
