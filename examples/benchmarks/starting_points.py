"""Which start is best: ours and those of others, on the same tokens, over the whole curve.

    python examples/benchmarks/starting_points.py --output starting_points.jsonl
    python examples/benchmarks/starting_points.py --output starting_points.jsonl --table

The teacher is the one of small_teacher.py, in whose folder it stands with the text it was trained on; without one it is
trained first, as that script does by default. Students have half its width, or half its width and half its depth;
blocks dropped at full width stand beside them with their own number of parameters. Every arm is trained on labels
alone and with a live teacher (0.5 CE + 0.5 KD), at the learning rate that did best on a short run of its own (its own
seed, and held-out text that the table does not use). One JSON line a run is appended to --output; a run that is there
already is not made again. The table has the gap closed, (random - x) / (random - teacher) in perplexity, the share of
its tokens that an arm needs for random's final loss, and what the start cost; the plot has held-out loss against tokens.
"""

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from competitors import pruned_as_minitron, subcloned, with_blocks
from curves import plot, table
from healing import carrying_matrix, heal
from small_teacher import BATCH, LENGTH, as_examples, blocks, texts, train_teacher
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel, default_data_collator

from hf_guide import AutoStudentForCausalLM, DistillationArguments, DistillationTrainer
from hf_guide.quickstart.memory import keep_freed_memory

SHAPES: dict[str, dict[str, int]] = {
    "half width": {"hidden_size": 2, "intermediate_size": 2, "num_attention_heads": 2, "num_key_value_heads": 2},
    "half width, half depth": {
        "hidden_size": 2,
        "intermediate_size": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "num_hidden_layers": 2,
    },
}
OBJECTIVES: dict[str, dict[str, float]] = {"labels": {"ce": 1.0}, "KD": {"ce": 0.5, "kd": 0.5}}
RATES = (2e-3, 6e-3, 2e-2)
TUNING_SEED = 1000
TUNING_SHARE = 3  # a run that chooses the rate has a third of the tokens


@dataclass(frozen=True)
class Given:
    """What every arm is made of: the teacher and its folder, a shape, a seed, and text, (blocks, LENGTH).

    `text` may be listened to; `spent` is the share of the budget of tokens that the start itself learns from.
    """

    folder: Path
    teacher: LlamaForCausalLM
    shape: str
    seed: int
    text: Tensor
    spent: Tensor

    @property
    def batches(self) -> list[Tensor]:
        """The text in batches."""
        return list(self.text.split(BATCH))

    @property
    def sizes(self) -> dict[str, int]:
        """What the student's config changes."""
        return {name: getattr(self.teacher.config, name) // part for name, part in SHAPES[self.shape].items()}

    @property
    def config(self) -> LlamaConfig:
        """The student's config."""
        return LlamaConfig.from_dict(self.teacher.config.to_dict() | self.sizes)


def by(method: dict[str, Any]) -> Callable[[Given], PreTrainedModel]:
    """Return the arm of one of our methods."""

    def make(given: Given) -> PreTrainedModel:
        more: dict[str, Any] = {}
        if method["method"] == "calibrated":
            more["calibration_dataset"] = [{"input_ids": batch} for batch in given.batches]
        return AutoStudentForCausalLM.from_teacher(
            given.folder,
            method=method | {"seed": given.seed},
            dtype=torch.float32,
            show_progress=False,
            **more,
            **given.sizes,
        )

    return make


def dropped(first: bool) -> Callable[[Given], PreTrainedModel]:
    """Return the arm of blocks dropped at full width: as many are kept as have the student's parameters, or all but one."""

    def make(given: Given) -> PreTrainedModel:
        wanted = LlamaForCausalLM(given.config).num_parameters()
        each = sum(parameter.numel() for parameter in given.teacher.model.layers[0].parameters())
        rest = given.teacher.num_parameters() - each * given.teacher.config.num_hidden_layers
        had = given.teacher.config.num_hidden_layers
        count = min(max(1, round((wanted - rest) / each)), had - 1)
        return with_blocks(
            given.teacher, list(range(count)) if first else [round(place) for place in _spaced(had, count)]
        )

    return make


def _spaced(had: int, count: int) -> list[float]:
    return torch.linspace(0, had - 1, count).tolist()


def healed(given: Given) -> PreTrainedModel:
    """Return the arm of a calibrated student whose blocks are then regressed on the teacher's stream."""
    carried = by({"method": "calibrated", "repair": "none", "fit_table": False, "fit_gain": False})(given)
    student = by({"method": "calibrated"})(given)
    layers = student.initialization_report.blocks["layers"]
    matrix = carrying_matrix(given.teacher, carried)
    heal(student, given.teacher, matrix, layers, list(given.spent.split(BATCH)))
    return student


ARMS: dict[str, Callable[[Given], PreTrainedModel]] = {
    "random": by({"method": "random"}),
    "uniform": by({"method": "uniform"}),
    "subcloning": lambda given: subcloned(given.teacher, given.config, given.batches),
    "minitron": lambda given: pruned_as_minitron(given.teacher, given.config, given.batches),
    "first blocks, full width": dropped(first=True),
    "even blocks, full width": dropped(first=False),
    "guide": by({"method": "guide"}),
    "guide, later selected": by({"method": "guide", "later_blocks": "select"}),
    "guide, later random": by({"method": "guide", "later_blocks": "random"}),
    "calibrated": by({"method": "calibrated"}),
    "healed": healed,
}
SPENT = {"healed": 0.1}  # of the budget of tokens


def learn(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    objective: str,
    learned: Tensor,
    held_out: Tensor,
    rate: float,
    args: argparse.Namespace,
    seed: int,
) -> list[tuple[int, float]]:
    """Train a student on every block once; return its held-out loss after so many tokens, from none on."""
    steps = len(learned) // BATCH
    with tempfile.TemporaryDirectory() as place:
        trainer = DistillationTrainer(
            student,
            DistillationArguments(
                place,
                objective=OBJECTIVES[objective],
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
                eval_steps=max(1, steps // args.points),
                eval_on_start=True,
                logging_strategy="no",
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                seed=seed,
            ),
            data_collator=default_data_collator,
            train_dataset=as_examples(learned),
            eval_dataset=as_examples(held_out),
            teacher=None if objective == "labels" else teacher,
        )
        trainer.train()
    found = [(entry["step"], entry["eval_ce"]) for entry in trainer.state.log_history if "eval_ce" in entry]
    return [(step * BATCH * LENGTH, loss) for step, loss in found]


def drawn(all_blocks: Tensor, count: int, seed: int) -> Tensor:
    """Return `count` blocks in an order of the seed's, over again where there are too few."""
    generator = torch.Generator().manual_seed(seed)
    rounds = [torch.randperm(len(all_blocks), generator=generator) for _ in range(-(-count // len(all_blocks)))]
    return all_blocks[torch.cat(rounds)[:count]]


def run(args: argparse.Namespace) -> None:
    """Make every run that is not there yet."""
    sources = train_teacher(args.teacher)["text"]
    teacher = LlamaForCausalLM.from_pretrained(args.teacher, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(args.teacher)
    learned, held_out = blocks(texts(tuple(sources)), tokenizer)
    tuning, measured = held_out[: args.held_out_blocks], held_out[args.held_out_blocks :][: args.held_out_blocks]
    goals = {True: loss_of(teacher, tuning), False: loss_of(teacher, measured)}
    for shape in args.shapes:
        parameters = LlamaForCausalLM(Given(args.teacher, teacher, shape, 0, learned, learned).config).num_parameters()
        total = math.ceil(parameters * args.tokens_a_parameter / (BATCH * LENGTH)) * BATCH
        for objective in args.objectives:
            for arm in args.arms:
                jobs = [(TUNING_SEED, rate, total // TUNING_SHARE, tuning) for rate in RATES]
                jobs += [(seed, None, total, measured) for seed in args.seeds]
                for seed, rate, count, watched in jobs:
                    key = {"shape": shape, "arm": arm, "objective": objective, "seed": seed}
                    rows = read(args.output)
                    chosen = rate or best_rate(rows, shape, arm, objective)
                    if any(key.items() <= row.items() and row["rate"] == chosen for row in rows):
                        continue
                    text = drawn(learned, max(count, BATCH), seed)
                    before = math.ceil(SPENT.get(arm, 0) * count / BATCH) * BATCH
                    heard, spent = text[: args.calibration_blocks, :LENGTH], text[:before, :LENGTH]
                    given = Given(args.teacher, teacher, shape, seed, heard, spent)
                    torch.manual_seed(seed)
                    clock = time.perf_counter()
                    student = ARMS[arm](given)
                    cost, clock = time.perf_counter() - clock, time.perf_counter()
                    curve = learn(student, teacher, objective, text[before:], watched, chosen, args, seed)
                    curve = [(tokens + before * LENGTH, loss) for tokens, loss in curve]
                    row = key | {"rate": chosen, "tuning": rate is not None, "parameters": student.num_parameters()}
                    row |= {"curve": curve, "teacher": goals[rate is not None], "start_seconds": cost}
                    row |= {"seconds": time.perf_counter() - clock}
                    with args.output.open("a") as file:
                        file.write(json.dumps(row) + "\n")
                    print(
                        f"{shape}; {arm}; {objective}; seed {seed}; {chosen:g}: {curve[0][1]:.3f} -> {curve[-1][1]:.3f}"
                    )


@torch.no_grad()
def loss_of(model: PreTrainedModel, tokens: Tensor) -> float:
    """Return a model's loss a token on blocks, (blocks, LENGTH + 1)."""
    losses = [model(input_ids=batch, labels=batch).loss.item() * len(batch) for batch in tokens.split(BATCH)]
    return sum(losses) / len(tokens)


def read(output: Path) -> list[dict[str, Any]]:
    """Return the runs that were made."""
    return [json.loads(line) for line in output.read_text().splitlines()] if output.is_file() else []


def best_rate(rows: list[dict[str, Any]], shape: str, arm: str, objective: str) -> float:
    """Return the learning rate at which an arm's short run ended best."""
    wanted = {"shape": shape, "arm": arm, "objective": objective, "tuning": True}
    tried = [row for row in rows if wanted.items() <= row.items()]
    return float(
        min(tried, key=lambda row: row["curve"][-1][1] if math.isfinite(row["curve"][-1][1]) else math.inf)["rate"]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("starting_points.jsonl"))
    parser.add_argument("--teacher", type=Path, default=Path("small_teacher"), help="the folder of small_teacher.py")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--objectives", nargs="+", choices=list(OBJECTIVES), default=list(OBJECTIVES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tokens-a-parameter", type=float, default=20.0, help="of the student")
    parser.add_argument("--points", type=int, default=20, help="of each curve")
    parser.add_argument(
        "--held-out-blocks", type=int, default=256, help="to tune on, and as many others to measure on"
    )
    parser.add_argument("--calibration-blocks", type=int, default=256, help="blocks of text that a start may look at")
    parser.add_argument(
        "--table", action="store_true", help="print the table and draw the plot of what is there, and stop"
    )
    args = parser.parse_args()
    keep_freed_memory()
    if not args.table:
        run(args)
    rows = read(args.output)
    print(table(rows))
    plot(rows, args.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
