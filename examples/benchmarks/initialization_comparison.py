"""Which initialization is best over a whole training run? Those of hf_guide and published ones, on the same tokens.

    python examples/benchmarks/initialization_comparison.py --output initialization_comparison.jsonl
    python examples/benchmarks/initialization_comparison.py --output initialization_comparison.jsonl --shapes "half width" \
        --objectives labels KD "reverse KL" JSD "hidden states" "top-k capture" --arms random guide calibrated \
        --tokens-per-parameter 2
    python examples/benchmarks/initialization_comparison.py --output initialization_comparison.jsonl --table

The teacher is the one of small_teacher.py, in whose folder the text that it was trained on is recorded; without one it is
trained first, as that script does by default. Students have half its width, or half its width and half its depth;
students of dropped blocks at full width have other numbers of parameters. Every arm is trained on labels
alone and with a live teacher (0.5 CE + 0.5 KD), at the learning rate that did best on a run of a third of the tokens
(its own seed, and held-out text that the table does not use); the other objectives take the rate of KD. One JSON line
a run is appended to --output; a run that is there already is not made again. The table has the gap closed, (random - x)
/ (random - teacher) in perplexity, the share of its tokens that an arm needs for random's final loss, and what the start
cost, in processor time as a share of the run; the plots have held-out loss against tokens, and the gap
that each initialization closes with each objective.
"""

import argparse
import itertools
import math
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from baselines import ARMS, SHAPES, SPENT, ArmInputs, sizes_of
from curves import interaction, plot, plot_interaction, table
from small_teacher import BATCH, LENGTH, as_examples, blocks, texts, train_teacher
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedModel, default_data_collator

sys.path.insert(0, str(Path(__file__).parents[2]))

from examples.common.malloc import keep_freed_memory
from examples.common.results import append_row, read_rows
from hf_guide import (
    CaptureConfig,
    DistillationArguments,
    DistillationTrainer,
    capture_teacher,
)

KD = {"ce": 0.5, "kd": 0.5}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "labels": {"losses": "ce"},
    "KD": {"losses": KD},
    "reverse KL": {"losses": KD, "kd_loss_type": "reverse_kl"},
    "JSD": {"losses": KD, "kd_loss_type": "jsd"},
    "hidden states": {"losses": {"ce": 0.5, "hidden_states": 0.5}},
    "top-k capture": {"losses": KD},
}
TUNED = ("labels", "KD")  # the others are run at the learning rate of KD
TOP_K = 16
RATES = (2e-4, 6e-4, 2e-3, 6e-3, 2e-2, 6e-2)
FIRST_RATES = RATES[2:5]  # those next to them are tried where the best is an end of what was tried
TUNING_SEED = 1000
TUNING_SHARE = 3  # a run that chooses the rate has a third of the tokens


def learn(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    objective: str,
    train_blocks: Tensor,
    held_out: Tensor,
    rate: float,
    points: int,
    seed: int,
    groups: dict[str, float] | None = None,
) -> list[tuple[int, float]]:
    """Train a student on every block once; return its held-out loss after so many tokens, from none on.

    `groups` has by parameter the factor of its learning rate; by default all have one rate.
    """
    steps = len(train_blocks) // BATCH
    examples = as_examples(train_blocks)
    with tempfile.TemporaryDirectory() as scratch:
        captured = None
        if objective == "top-k capture":
            captured = str(Path(scratch, "capture"))
            capture_teacher(
                teacher,
                examples,
                captured,
                config=CaptureConfig(top_k=TOP_K, batch_size=BATCH),
                data_collator=default_data_collator,
                show_progress=False,
            )
        trainer = DistillationTrainer(
            student,
            DistillationArguments(
                scratch,
                **OBJECTIVES[objective],
                teacher_cache=captured,
                max_steps=steps,
                per_device_train_batch_size=BATCH,
                per_device_eval_batch_size=BATCH,
                learning_rate=rate,
                warmup_steps=max(1, steps // 20),
                lr_scheduler_type="cosine_with_min_lr",
                lr_scheduler_kwargs={"min_lr_rate": 0.05},
                weight_decay=0.1,
                adam_beta2=0.95,
                eval_strategy="steps",
                eval_steps=max(1, steps // points),
                eval_on_start=True,
                logging_strategy="no",
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                seed=seed,
            ),
            data_collator=default_data_collator,
            train_dataset=examples,
            eval_dataset=as_examples(held_out),
            teacher=None if objective in ("labels", "top-k capture") else teacher,
        )
        if groups is not None:
            trainer.create_optimizer()
            _scale_rates(trainer, groups)
        trainer.train()
    evaluations = [(entry["step"], entry["eval_ce"]) for entry in trainer.state.log_history if "eval_ce" in entry]
    return [(step * BATCH * LENGTH, loss) for step, loss in evaluations]


def _scale_rates(trainer: DistillationTrainer, factors: dict[str, float]) -> None:
    """Split the groups of a trainer's optimizer so that each parameter has its factor of the learning rate."""
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    trainer.optimizer.param_groups = [
        {**group, "params": [parameter], "lr": group["lr"] * factors[names[id(parameter)]]}
        for group in trainer.optimizer.param_groups
        for parameter in group["params"]
    ]


def drawn(all_blocks: Tensor, count: int, seed: int) -> Tensor:
    """Return `count` blocks in an order of the seed's, over again where there are too few."""
    generator = torch.Generator().manual_seed(seed)
    rounds = [torch.randperm(len(all_blocks), generator=generator) for _ in range(-(-count // len(all_blocks)))]
    return all_blocks[torch.cat(rounds)[:count]]


@dataclass(frozen=True)
class Bench:
    """What all runs share: the teacher in its folder, the text to learn from, and that to tune and to measure on."""

    folder: Path
    teacher: LlamaForCausalLM
    train_blocks: Tensor
    tuning: Tensor
    measured: Tensor

    @classmethod
    def prepare(cls, args: argparse.Namespace) -> "Bench":
        """Return a bench with the teacher of a folder, which is trained first where it is not there."""
        sources = train_teacher(args.teacher)["text"]
        teacher = LlamaForCausalLM.from_pretrained(args.teacher, dtype=torch.float32)
        train_blocks, held_out = blocks(texts(tuple(sources)), AutoTokenizer.from_pretrained(args.teacher))
        return cls(args.teacher, teacher, train_blocks, *held_out.split(args.held_out_blocks)[:2])

    def sizes(self, shape: str) -> dict[str, int]:
        """Return what a student of a shape has other than the teacher."""
        return sizes_of(shape, self.teacher.config)

    def examples_for(self, shape: str, tokens_per_parameter: float) -> int:
        """Return how many blocks of text a student of a shape learns from: whole batches."""
        config = ArmInputs(
            self.folder, self.teacher, self.sizes(shape), 0, self.train_blocks, self.train_blocks
        ).config
        tokens = LlamaForCausalLM(config).num_parameters() * tokens_per_parameter
        return math.ceil(tokens / (BATCH * LENGTH)) * BATCH


def run(args: argparse.Namespace) -> None:
    """Make every run that is not there yet."""
    bench = Bench.prepare(args)
    teacher_losses = {True: loss_of(bench.teacher, bench.tuning), False: loss_of(bench.teacher, bench.measured)}
    for shape, objective, arm in itertools.product(args.shapes, args.objectives, args.arms):
        key = {"shape": shape, "arm": arm, "objective": objective, "tokens_per_parameter": args.tokens_per_parameter}
        while (job := next_job(read_rows(args.output), key, args.seeds)) is not None:
            row = key | job | {"teacher": teacher_losses[job["tuning"]]} | make_run(bench, key | job, args)
            append_row(args.output, row)
            start, end = row["curve"][0][1], row["curve"][-1][1]
            print(f"{shape}; {arm}; {objective}; {job}: {start:.3f} -> {end:.3f}", flush=True)


def next_job(rows: list[dict[str, Any]], key: dict[str, Any], seeds: list[int]) -> dict[str, Any] | None:
    """Return seed and learning rate of an arm's next run, and whether it only chooses the rate; None where all are there.

    Raises:
        SystemExit: the rate is that of KD, and no run has chosen it.
    """
    tuned = key | {"objective": key["objective"] if key["objective"] in TUNED else "KD"}
    ends = ends_by_rate(rows, tuned | {"tuning": True})
    if key == tuned and (rate := next_rate(ends)) is not None:
        return {"seed": TUNING_SEED, "learning_rate": rate, "tuning": True}
    if not ends:
        raise SystemExit(f"No run has chosen a learning rate for {tuned}: run this first.")
    jobs = [{"seed": seed, "learning_rate": best_rate(ends), "tuning": False} for seed in seeds]
    return next((job for job in jobs if not any((key | job).items() <= row.items() for row in rows)), None)


def ends_by_rate(rows: list[dict[str, Any]], tuned: dict[str, Any]) -> dict[float, float]:
    """Return the loss after each of the runs that choose a rate, by its rate; infinity where it is no number."""
    ends = {row["learning_rate"]: row["curve"][-1][1] for row in rows if tuned.items() <= row.items()}
    return {rate: loss if math.isfinite(loss) else math.inf for rate, loss in ends.items()}


def best_rate(ends: dict[float, float]) -> float:
    """Return the rate after which the loss is least."""
    return min(ends, key=lambda rate: ends[rate])


def next_rate(ends: dict[float, float], first: tuple[float, ...] = FIRST_RATES) -> float | None:
    """Return the learning rate to try next; None where those on both sides of the best were tried.

    Args:
        ends: by the rates that were tried, the loss after that run.
        first: the rates to try in any case.
    """
    for rate in first:
        if rate not in ends:
            return rate
    best = RATES.index(best_rate(ends))
    return next((rate for rate in RATES[max(best - 1, 0) : best + 2] if rate not in ends), None)


def make_run(bench: Bench, job: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Make one student, train it, and return its curve and what it cost in seconds of the processor."""
    count = bench.examples_for(job["shape"], job["tokens_per_parameter"])
    text = drawn(bench.train_blocks, max(count // TUNING_SHARE if job["tuning"] else count, BATCH), job["seed"])
    before = math.ceil(SPENT.get(job["arm"], 0) * len(text) / BATCH) * BATCH
    calibration, spent = text[: args.calibration_blocks, :LENGTH], text[:before, :LENGTH]
    torch.manual_seed(job["seed"])
    clock = time.process_time()
    student = ARMS[job["arm"]](
        ArmInputs(bench.folder, bench.teacher, bench.sizes(job["shape"]), job["seed"], calibration, spent)
    )
    initialization_seconds, clock = time.process_time() - clock, time.process_time()
    watched = bench.tuning if job["tuning"] else bench.measured
    curve = learn(
        student,
        bench.teacher,
        job["objective"],
        text[before:],
        watched,
        job["learning_rate"],
        args.points,
        job["seed"],
    )
    return {
        "parameters": student.num_parameters(),
        "initialization_seconds": round(initialization_seconds, 2),
        "seconds": round(time.process_time() - clock, 2),
        "curve": [(tokens + before * LENGTH, round(loss, 5)) for tokens, loss in curve],
    }


@torch.no_grad()
def loss_of(model: PreTrainedModel, tokens: Tensor) -> float:
    """Return a model's loss a token on blocks, (blocks, LENGTH + 1)."""
    losses = [model(input_ids=batch, labels=batch).loss.item() * len(batch) for batch in tokens.split(BATCH)]
    return sum(losses) / len(tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("initialization_comparison.jsonl"))
    parser.add_argument("--teacher", type=Path, default=Path("small_teacher"), help="the folder of small_teacher.py")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--objectives", nargs="+", choices=list(OBJECTIVES), default=list(TUNED))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tokens-per-parameter", type=float, default=20.0, help="of the student")
    parser.add_argument("--points", type=int, default=20, help="of each curve")
    parser.add_argument(
        "--held-out-blocks", type=int, default=256, help="to tune on, and as many others to measure on"
    )
    parser.add_argument("--calibration-blocks", type=int, default=256, help="blocks of text for calibration")
    parser.add_argument(
        "--table", action="store_true", help="print the table and draw the plot of what is there, and stop"
    )
    args = parser.parse_args()
    keep_freed_memory()
    if not args.table:
        run(args)
    rows = read_rows(args.output)
    print(table(rows))
    print(interaction(rows))
    plot(rows, args.output.with_suffix(".png"))
    plot_interaction(rows, args.output.with_name(f"{args.output.stem}_objectives.png"))


if __name__ == "__main__":
    main()
