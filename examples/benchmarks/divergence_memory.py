"""Memory and time of a distillation loss over chunks of logits, against the same loss of whole logits.

    python examples/benchmarks/divergence_memory.py
    python examples/benchmarks/divergence_memory.py --tokens 1024 --rounds 1   # a quick look

From the hidden states of student and teacher (float32, one language head each) to the gradients of the student's hidden
states and head: 0.5 cross-entropy + 0.5 KL(teacher || student). The naive arm is the plain formula on whole logits. Each
arm runs in a fresh process; its memory is the peak resident above what stood before the first step: heads and hidden
states are counted in neither, gradients in both.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from peak_memory import peak_memory
from torch import Tensor, nn
from torch.nn import functional

from hf_guide.distillation.losses.chunked import chunked_loss
from hf_guide.distillation.losses.divergences import divergence
from hf_guide.models.lm_head import LMHead
from hf_guide.teachers.signals import DenseTarget


def naive_step(
    hidden: Tensor, teacher_hidden: Tensor, student: nn.Linear, teacher: nn.Linear, labels: Tensor
) -> Tensor:
    with torch.no_grad():
        target = teacher(teacher_hidden).log_softmax(-1)
    logits = student(hidden)
    kd = functional.kl_div(logits.log_softmax(-1), target, log_target=True, reduction="sum")
    ce = functional.cross_entropy(logits, labels, reduction="sum")
    return 0.5 * (kd + ce) / len(labels)


def chunked_step(
    hidden: Tensor,
    teacher_hidden: Tensor,
    student: nn.Linear,
    teacher: nn.Linear,
    labels: Tensor,
    max_logits: int = 2**24,
) -> Tensor:
    def loss(logits: Tensor, rows: slice) -> dict[str, Tensor]:
        with torch.no_grad():
            target = DenseTarget(teacher(teacher_hidden[rows]))
        return {
            "ce": functional.cross_entropy(logits, labels[rows], reduction="none"),
            "kd": divergence(logits, target),
        }

    head = LMHead(student, lambda logits: logits)
    total, _ = chunked_loss(hidden, head, loss, {"ce": 0.5, "kd": 0.5}, max_logits=max_logits)
    return total / len(labels)


def run_arm(arm: str, tokens: int, vocabulary: int, width: int, rounds: int, max_logits: int) -> dict[str, object]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (nn.Linear(width, vocabulary, bias=False) for _ in range(2))
    for head in (student, teacher):
        nn.init.normal_(head.weight, std=3 * width**-0.5, generator=generator)
    hidden, teacher_hidden = (torch.randn(tokens, width, generator=generator) for _ in range(2))
    labels = torch.randint(vocabulary, (tokens,), generator=generator)
    hidden.requires_grad_()
    step: Callable[..., Tensor] = naive_step if arm == "naive" else chunked_step
    more = {} if arm == "naive" else {"max_logits": max_logits}
    before, seconds = peak_memory(), []
    for _ in range(rounds + 1):
        hidden.grad = student.weight.grad = None
        start = time.perf_counter()
        value = step(hidden, teacher_hidden, student, teacher, labels, **more)
        value.backward()
        seconds.append(time.perf_counter() - start)
    assert hidden.grad is not None and student.weight.grad is not None
    return {
        "peak_memory": peak_memory() - before,
        "seconds": statistics.median(seconds[1:]),
        "loss": value.item(),
        "gradient": student.weight.grad.double().norm().item(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--width", type=int, default=576, help="of the hidden states; SmolLM2-135M's by default")
    parser.add_argument("--rounds", type=int, default=3, help="steps after a first one, of which the median counts")
    parser.add_argument("--max-logits", type=int, nargs="+", default=[2**20, 2**22, 2**24], help="of the chunked arms")
    parser.add_argument("--arm", choices=["naive", "chunked"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.arm:
        print(json.dumps(run_arm(args.arm, args.tokens, args.vocabulary, args.width, args.rounds, args.max_logits[0])))
        return 0
    print(f"command: python {' '.join(sys.argv)}")
    print(
        f"machine: {os.cpu_count()} CPUs, {platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} "
        f"threads, load {os.getloadavg()[0]:.2f}\n{args.tokens} tokens, vocabulary {args.vocabulary}, width {args.width}; "
        f"the logits of one model take {args.tokens * args.vocabulary * 4 / 2**20:.0f} MiB",
        flush=True,
    )
    results: dict[str, dict[str, float]] = {}
    for arm, size in [("naive", args.max_logits[0]), *(("chunked", size) for size in args.max_logits)]:
        words = ["--arm", arm, "--max-logits", str(size), "--rounds", str(args.rounds), "--tokens", str(args.tokens)]
        words += ["--vocabulary", str(args.vocabulary), "--width", str(args.width)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
        done = subprocess.run(
            [sys.executable, __file__, *words], capture_output=True, text=True, check=False, env=environment
        )
        if done.returncode:
            raise RuntimeError(f"The measured process failed:\n{done.stderr}")
        one = results[f"{arm} {size}"] = json.loads(done.stdout.splitlines()[-1])
        naive = next(iter(results.values()))
        name = arm if arm == "naive" else f"chunks of {size / 2**20:g} Mi logits"
        loss, gradient = (abs(one[what] / naive[what] - 1) for what in ("loss", "gradient"))
        print(
            f"{name}: peak {one['peak'] / 2**20:.0f} MiB, {one['seconds']:.2f} s; ratio to naive: memory "
            f"{one['peak'] / naive['peak']:.3f}, time {one['seconds'] / naive['seconds']:.2f}; loss differs by "
            f"{loss:.1e}, gradient's length by {gradient:.1e}",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
