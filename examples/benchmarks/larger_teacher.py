"""Which initialization is best for students of SmolLM2-135M, over 100 M tokens on a GPU or fewer on a CPU?

    python examples/benchmarks/larger_teacher.py --text wikipedia shakespeare text/* --prepare tokens.safetensors
    python examples/benchmarks/larger_teacher.py --tokens tokens.safetensors --output results/larger_teacher.jsonl --minutes 60
    python examples/benchmarks/larger_teacher.py --tokens tokens.safetensors --output results/larger_teacher_cpu.jsonl \
        --millions 0.2 --batch 2 --tuning-share 4 --held-out-blocks 32 --calibration-blocks 32 --points 4 \
        --objectives labels
    python examples/benchmarks/larger_teacher.py --output results/larger_teacher.jsonl --table

The arms, the rows and the table are those of `initialization_comparison.py`; the loop is PyTorch's alone (bfloat16
autocast, each block
compiled once), for a GPU's time is dear. Text: `debian_text.py` makes folders of it. The learning rate of an arm is chosen at
the first shape on labels, on a run of a share of the tokens with its own seed and held-out text, looked for until the best
had worse ones on both sides, and kept for the other shapes and for KD. The most informative runs come first; a run
that would exceed --minutes is not started, and the same command resumes from the existing rows.
"""

import argparse
import functools
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from baselines import ARMS, ArmInputs
from curves import interaction, plot, table
from initialization_comparison import best_rate, drawn, ends_by_rate, next_rate
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional
from transformers import AutoTokenizer, LlamaForCausalLM, get_cosine_with_min_lr_schedule_with_warmup

sys.path.insert(0, str(Path(__file__).parents[2]))

from examples.common.data import pack, read_documents, split_documents
from examples.common.results import append_row, read_rows
from examples.common.teachers import default_language_model

LENGTH = 512
RATES = (6e-4, 2e-3, 6e-3)  # those next to them are tried where the best is an end of what was tried
TUNING_SEED = 1000
SHAPES: dict[str, dict[str, int]] = {
    "half width, half depth": {
        "hidden_size": 288,
        "intermediate_size": 768,
        "num_hidden_layers": 15,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 64,
    },
    "a third of the width, two thirds of the depth": {
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 20,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "head_dim": 64,
    },
    "two thirds of the width, a third of the depth": {
        "hidden_size": 384,
        "intermediate_size": 1024,
        "num_hidden_layers": 10,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 64,
    },
}
FIRST = next(iter(SHAPES))
LEADING = ("random", "calibrated, 8,192 tokens", "guide, first and last blocks")  # of the arms; with KD as well
OTHERS = ("subcloning", "uniform, first and last blocks")
OBJECTIVES = ("labels", "KD")


@dataclass(frozen=True)
class Bench:
    """What all runs share: the teacher in its folder and on the device, and text: (blocks, LENGTH + 1) token ids."""

    folder: Path
    teacher: LlamaForCausalLM
    train_blocks: Tensor
    tuning: Tensor
    measured: Tensor
    tokens: int
    batch: int
    teacher_losses: dict[bool, float]

    @classmethod
    def prepare(cls, args: argparse.Namespace) -> "Bench":
        """Return a bench of the teacher and the tokens that the command names."""
        texts = {name: rows.long() for name, rows in load_file(args.tokens).items()}
        teacher = LlamaForCausalLM.from_pretrained(args.teacher, dtype=torch.float32).eval().to(args.device)
        tuning, measured = texts["held_out"].to(args.device).split(args.held_out_blocks)[:2]
        teacher_losses = {
            True: held_out_loss(teacher, tuning, args.batch),
            False: held_out_loss(teacher, measured, args.batch),
        }
        tokens = int(args.millions * 1_000_000)
        return cls(Path(args.teacher), teacher, texts["learned"], tuning, measured, tokens, args.batch, teacher_losses)


def write_tokens(sources: list[str], teacher: str, file: Path, millions: int) -> None:
    """Write the tokens of texts: at most so many millions to learn from, and as many blocks as are held out."""
    split = split_documents((text for source in sources for text in read_documents(source)), seed=0)
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    train_blocks, held_out = pack(split.train, tokenizer, LENGTH), pack(split.held_out, tokenizer, LENGTH)
    train_blocks = train_blocks[: millions * 1_000_000 // (LENGTH + 1)]
    held_out = drawn(held_out, len(held_out), seed=0)
    save_file({"learned": train_blocks.int(), "held_out": held_out.int()}, file)
    print(f"{train_blocks.numel():,} tokens to learn from, {held_out.numel():,} held out, of {sources}")


def jobs(tokens: int, batch: int, seeds: list[int]) -> Iterator[dict[str, Any]]:
    """Yield the most informative runs first; a learning rate is chosen before it is used."""

    def job(arm: str, shape: str = FIRST, objective: str = "labels", seed: int = seeds[0]) -> dict[str, Any]:
        return {"shape": shape, "arm": arm, "objective": objective, "tokens": tokens, "batch": batch, "seed": seed}

    yield from (job(arm) for arm in LEADING + OTHERS)
    yield from (job(arm, shape) for shape in list(SHAPES)[1:] for arm in LEADING)
    yield from (job(arm, objective="KD") for arm in LEADING)
    yield from (job(arm, seed=seed) for seed in seeds[1:] for arm in LEADING)
    yield from (job(arm, shape, seed=seed) for seed in seeds for shape in SHAPES for arm in LEADING + OTHERS)


def next_run(rows: list[dict[str, Any]], job: dict[str, Any]) -> dict[str, Any] | None:
    """Return the next run that a job needs, one that chooses its rate or the job itself; None where it is done."""
    tuned = job | {"shape": FIRST, "objective": "labels", "tuning": True, "seed": TUNING_SEED}
    ends = ends_by_rate(rows, tuned)
    if (rate := next_rate(ends, RATES)) is not None:
        return tuned | {"learning_rate": rate}
    run_key = job | {"learning_rate": best_rate(ends), "tuning": False}
    return None if any(run_key.items() <= row.items() for row in rows) else run_key


def run(bench: Bench, args: argparse.Namespace) -> None:
    """Make the runs that are not there yet, while there is time."""
    end = time.monotonic() + 60 * args.minutes
    for job in jobs(bench.tokens, bench.batch, args.seeds):
        if job["shape"] not in args.shapes or job["arm"] not in args.arms or job["objective"] not in args.objectives:
            continue
        while (todo := next_run(rows := read_rows(args.output), job)) is not None:
            if time.monotonic() + expected_seconds(rows, todo, args.tuning_share) > end:
                break
            row = todo | {"teacher": round(bench.teacher_losses[todo["tuning"]], 5)} | make_run(bench, todo, args)
            append_row(args.output, row)
            first, last = (math.exp(min(row["curve"][scratch][1], 99.0)) for scratch in (0, -1))
            print(
                f"{row['shape']}; {row['arm']}; {row['objective']}; seed {row['seed']}; rate {row['learning_rate']:g}: "
                f"{first:.1f} -> {last:.2f} in {row['seconds']:.1f} s, start {row['initialization_seconds']:.1f} s",
                flush=True,
            )


def expected_seconds(rows: list[dict[str, Any]], todo: dict[str, Any], tuning_share: int) -> float:
    """Return how long a run may take, initialization included: by the median of its objective here, or by three times
    any other's.
    """
    alike = [row for row in rows if row["objective"] == todo["objective"] and row["device"] == device_name()]
    each = [row["seconds"] / row["curve"][-1][0] for row in alike or rows]
    starts = [row["initialization_seconds"] for row in rows if row["arm"] == todo["arm"]]
    tokens = todo["tokens"] / (tuning_share if todo["tuning"] else 1)
    return (statistics.median(each) * tokens if each else 0.0) * (1 if alike else 3) + max(starts, default=0.0)


def make_run(bench: Bench, todo: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Make one student, train it, and return its curve and what it cost in seconds."""
    steps = todo["tokens"] // (bench.batch * LENGTH) // (args.tuning_share if todo["tuning"] else 1)
    text = drawn(bench.train_blocks, steps * bench.batch, todo["seed"])
    inputs = ArmInputs(
        bench.folder,
        bench.teacher,
        SHAPES[todo["shape"]],
        todo["seed"],
        text[: args.calibration_blocks, :LENGTH].to(args.device),
        text[:0],
    )
    state, initialization_seconds = started(todo, inputs)
    model = compiled(todo["shape"], inputs.config, args)
    model.load_state_dict(state)
    watched = bench.tuning if todo["tuning"] else bench.measured
    loss_of = token_loss if todo["objective"] == "labels" else functools.partial(distilled_loss, bench.teacher)
    clock = time.perf_counter()
    points = 1 if todo["tuning"] else args.points
    curve = learn(model, loss_of, text.to(args.device), watched, todo["learning_rate"], points, bench.batch)
    return {
        "tokens_per_parameter": round(todo["tokens"] / model.num_parameters(), 2),
        "parameters": model.num_parameters(),
        "initialization_seconds": round(initialization_seconds, 2),
        "seconds": round(time.perf_counter() - clock, 2),
        "curve": curve,
        "device": device_name(),
    }


STARTED: dict[tuple[Any, ...], tuple[dict[str, Tensor], float]] = {}


def started(todo: dict[str, Any], inputs: ArmInputs) -> tuple[dict[str, Tensor], float]:
    """Return a student's weights before training, and the seconds it took to make them; the last ones are kept."""
    key = todo["arm"], todo["shape"], todo["seed"], todo["tokens"], todo["tuning"]
    if key not in STARTED:
        STARTED.clear()
        clock = time.perf_counter()
        torch.manual_seed(todo["seed"])
        state = ARMS[todo["arm"]](inputs).state_dict()
        STARTED[key] = state, time.perf_counter() - clock
    return STARTED[key]


def device_name() -> str:
    """Return what computes."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


MODELS: dict[str, LlamaForCausalLM] = {}


def compiled(shape: str, config: Any, args: argparse.Namespace) -> LlamaForCausalLM:
    """Return the model that all students of a shape are trained in, its blocks compiled once."""
    if shape not in MODELS:
        MODELS[shape] = LlamaForCausalLM(config).to(args.device)
        if not args.eager:
            for block in MODELS[shape].model.layers:
                block.compile(dynamic=False)
    return MODELS[shape]


Loss = Callable[[LlamaForCausalLM, Tensor], Tensor]


def hidden_states(model: LlamaForCausalLM, rows: Tensor) -> Tensor:
    """Return the input of a model's head, (blocks, LENGTH, width)."""
    return model.model(input_ids=rows[:, :-1], use_cache=False).last_hidden_state


def token_loss(model: LlamaForCausalLM, rows: Tensor) -> Tensor:
    """Return the mean loss a token, of rows, (blocks, LENGTH + 1)."""
    return _head(_cross_entropy)(hidden_states(model, rows), model.lm_head.weight, rows[:, 1:])


def distilled_loss(teacher: LlamaForCausalLM, model: LlamaForCausalLM, rows: Tensor) -> Tensor:
    """Return half of the loss a token and half of the forward KL from the teacher."""
    with torch.no_grad():
        teacher_hidden = hidden_states(teacher, rows)
    student_hidden = hidden_states(model, rows)
    return _head(_distilled)(student_hidden, model.lm_head.weight, teacher_hidden, teacher.lm_head.weight, rows[:, 1:])


HEADS: dict[Callable[..., Tensor], Callable[..., Tensor]] = {}  # compiled, but for --eager


def _head(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return HEADS.get(function, function)


def _cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(functional.linear(hidden, weight).flatten(0, 1).float(), labels.flatten())


def _distilled(student_hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    student = functional.linear(student_hidden, weight).flatten(0, 1).float().log_softmax(-1)
    teacher = functional.linear(teacher_hidden, head).flatten(0, 1).float().log_softmax(-1)
    divergence = (teacher.exp() * (teacher - student)).sum(-1).mean()
    return 0.5 * functional.nll_loss(student, labels.flatten()) + 0.5 * divergence


def learn(
    model: LlamaForCausalLM, loss_of: Loss, text: Tensor, watched: Tensor, rate: float, points: int, batch: int
) -> list[tuple[int, float]]:
    """Train a model on every block once; return its held-out loss after so many tokens, from none on."""
    steps = len(text) // batch
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    gains = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": gains, "weight_decay": 0.0}],
        lr=rate,
        betas=(0.9, 0.95),
        fused=True,
    )
    schedule = get_cosine_with_min_lr_schedule_with_warmup(optimizer, max(1, steps // 20), steps, min_lr_rate=0.05)
    every = max(1, steps // points)
    curve = [(0, round(held_out_loss(model, watched, batch), 5))]
    for step, rows in enumerate(text.split(batch)[:steps], start=1):
        with torch.autocast(rows.device.type, torch.bfloat16):
            loss = loss_of(model, rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % every == 0 or step == steps:
            curve.append((step * batch * LENGTH, round(held_out_loss(model, watched, batch), 5)))
    return curve


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, rows: Tensor, batch: int) -> float:
    """Return a model's loss a token on blocks, as many as whole batches of them are."""
    with torch.autocast(rows.device.type, torch.bfloat16):
        return torch.stack([token_loss(model, part) for part in rows.split(batch)]).mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("larger_teacher.jsonl"))
    parser.add_argument("--teacher", help="a folder; by default SmolLM2-135M", default=None)
    parser.add_argument(
        "--text", nargs="+", default=["wikipedia", "shakespeare"], help="names, or folders of .txt files"
    )
    parser.add_argument("--prepare", type=Path, help="write the tokens of --text to this file, and stop")
    parser.add_argument("--prepare-millions", type=int, default=40, help="tokens to write, at most")
    parser.add_argument("--tokens", type=Path, help="the file that --prepare wrote")
    parser.add_argument("--millions", type=float, default=100, help="tokens of a run")
    parser.add_argument("--tuning-share", type=int, default=15, help="a run that chooses a rate has tokens by this")
    parser.add_argument("--batch", type=int, default=64, help=f"blocks of {LENGTH} tokens in a step")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--arms", nargs="+", choices=LEADING + OTHERS, default=LEADING + OTHERS)
    parser.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=OBJECTIVES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--points", type=int, default=20, help="of each curve")
    parser.add_argument("--held-out-blocks", type=int, default=256, help="to tune on, and as many to measure on")
    parser.add_argument("--calibration-blocks", type=int, default=256, help="blocks of text for calibration")
    parser.add_argument("--minutes", type=float, default=math.inf, help="do not start a run that would end later")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--eager", action="store_true", help="compile nothing")
    parser.add_argument("--table", action="store_true", help="print the table and draw the plot, and stop")
    args = parser.parse_args()
    if not args.table:
        args.teacher = args.teacher or default_language_model()
    if args.prepare:
        write_tokens(args.text, args.teacher, args.prepare, args.prepare_millions)
        return
    if not args.table:
        if not args.eager:
            torch._dynamo.config.recompile_limit = 64  # the same code serves blocks and heads of every shape
            HEADS.update({head: torch.compile(head, dynamic=False) for head in (_cross_entropy, _distilled)})
        run(Bench.prepare(args), args)
    rows = read_rows(args.output)
    print(table(rows))
    print(interaction(rows))
    plot(rows, args.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
