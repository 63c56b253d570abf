"""Which initialization of a deep teacher is best after very few tokens?

Variants of GUIDE (subsequent blocks projected, selected or random; which blocks are kept) and of `calibrated`, which uses some
of the training text.

Every arm is a student of half the width and a third of the depth of SmolLM2-135M, trained on the same tokens in the
same order with the same distillation loss, from one capture of the teacher. Seeds change the text's split and order
and whatever is random. One JSON line a seed and arm is appended to --output; what is there already is not run again.

    python examples/benchmarks/few_tokens.py --output few_tokens.jsonl --seeds 0 1 2 --steps 150
"""

import argparse
import dataclasses
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from baselines import NOTHING_FITTED
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

sys.path.insert(0, str(Path(__file__).parents[2]))

from examples.common.data import pack, read_documents, split_documents
from examples.common.language_model import (
    LEARNING_RATES,
    TrainingRecipe,
    cache_teacher,
    draw_blocks,
    evaluate,
    train,
)
from examples.common.machine import describe_machine
from examples.common.malloc import keep_freed_memory
from examples.common.results import append_row, mean_and_spread, read_rows
from examples.common.teachers import default_language_model
from hf_guide import AutoStudentForCausalLM, register_method
from hf_guide.initialization.config import PlanOptions
from hf_guide.methods import GuideConfig, GuideMethod

LENGTH = 256


@dataclasses.dataclass
class UncorrectedConfig(GuideConfig):
    """Options of an ablation of guide."""

    method: str = "guide_without_norm_correction"


class UncorrectedGuide(GuideMethod):
    """guide, in which a projected vector that is shorter than the teacher's is not made up for after norms."""

    def plan_options(self) -> PlanOptions:
        return dataclasses.replace(super().plan_options(), norm_correction=False)


register_method("guide_without_norm_correction", UncorrectedConfig, UncorrectedGuide)

ARMS: dict[str, dict[str, Any]] = {
    "random": {"method": "random"},
    "uniform, uniform blocks": {"method": "uniform", "layer_selection": "uniform"},
    "uniform, first blocks": {"method": "uniform", "layer_selection": "first"},
    "guide, uniform blocks": {"method": "guide", "layer_selection": "uniform"},
    "guide, first blocks": {"method": "guide", "layer_selection": "first"},
    "guide, first blocks, logit_scale 0.3": {"method": "guide", "layer_selection": "first", "logit_scale": 0.3},
    "guide, first blocks, subsequent layers uniform": {
        "method": "guide",
        "layer_selection": "first",
        "subsequent_layers": "uniform",
    },
    "uniform, first and last blocks": {"method": "uniform", "layer_selection": "first_last"},
    "guide, first and last blocks": {"method": "guide", "layer_selection": "first_last"},
    "guide, first and last blocks, logit_scale 0.3": {
        "method": "guide",
        "layer_selection": "first_last",
        "logit_scale": 0.3,
    },
    "guide, subsequent layers random": {"method": "guide", "layer_selection": "first", "subsequent_layers": "random"},
    "calibrated": {"method": "calibrated", "calibration_tokens": 16384},
    "calibrated, 8,192 tokens": {"method": "calibrated", "calibration_tokens": 8192},
    "calibrated, self-generated text": {"method": "calibrated", "calibration_tokens": 16384},
    "calibrated, no fitting": {"method": "calibrated", "calibration_tokens": 8192} | NOTHING_FITTED,
    "calibrated, basis only": {
        "method": "calibrated_basis_only",
        "calibration_tokens": 8192,
        "layer_selection": "first_last",
    }
    | NOTHING_FITTED,
    "guide, first blocks, no norm correction": {
        "method": "guide_without_norm_correction",
        "layer_selection": "first",
    },
}


def half_shape(config: PreTrainedConfig) -> dict[str, Any]:
    """Return overrides for half the width, a third of the depth and as many heads of half the size: that of these rows.

    `student_shapes.py` has better ones of as many parameters.
    """
    shape = {"hidden_size": config.hidden_size // 2, "num_hidden_layers": max(1, config.num_hidden_layers // 3)}
    for key in ("intermediate_size", "head_dim"):
        if isinstance(getattr(config, key, None), int):
            shape[key] = getattr(config, key) // 2
    return shape


def run_seed(seed: int, arms: list[str], args: argparse.Namespace) -> list[dict]:
    """Train arms from one seed and return a row for each."""
    if not arms:
        return []
    texts = split_documents(read_documents("wikipedia"), seed=seed)
    name = args.teacher or default_language_model(None)
    tokenizer = AutoTokenizer.from_pretrained(name)
    teacher = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    recipe = TrainingRecipe(args.steps, args.batch_size, args.kd_weight, seed)
    train_blocks = draw_blocks(pack(texts.train, tokenizer, LENGTH), recipe.steps * recipe.batch_size, seed)
    held_out = draw_blocks(pack(texts.held_out, tokenizer, LENGTH), args.held_out_blocks, seed)
    target = evaluate(teacher, held_out, args.batch_size, "teacher").perplexity
    shape = half_shape(teacher.config)
    students = {}
    for arm in arms:
        calibration: dict[str, Any] = {}
        if ARMS[arm]["method"] == "calibrated":
            arm_rows = arm == "calibrated, self-generated text"
            calibration["calibration_dataset"] = (
                "self_generated" if arm_rows else [{"input_ids": batch} for batch in train_blocks.split(8)]
            )
        students[arm] = AutoStudentForCausalLM.from_teacher(
            name, method=ARMS[arm] | {"seed": seed}, dtype=torch.float32, show_progress=False, **calibration, **shape
        )
    before = {arm: evaluate(student, held_out, args.batch_size, arm).perplexity for arm, student in students.items()}
    by_method = LEARNING_RATES | {"calibrated": args.calibrated_rate}
    rates = {arm: by_method[ARMS[arm]["method"]] for arm in students}
    with tempfile.TemporaryDirectory(prefix="later-blocks-") as scratch:
        cache = cache_teacher(teacher, train_blocks, Path(scratch, "capture"), recipe)
        for arm, student in students.items():
            train(student, cache, train_blocks, rates[arm], recipe, Path(scratch))
    after = {arm: evaluate(student, held_out, args.batch_size, arm).perplexity for arm, student in students.items()}
    return [
        {
            "seed": seed,
            "arm": arm,
            "teacher": target,
            "perplexity_before": before[arm],
            "perplexity_after": after[arm],
            "steps": args.steps,
            "tokens": train_blocks[:, 1:].numel(),
            "learning_rate": rates[arm],
            "kd_weight": args.kd_weight,
        }
        for arm in students
    ]


def table(rows: list[dict]) -> str:
    """Return mean and spread (standard deviation) over seeds as text."""
    lines = [f"{'':42} {'at start':>12} {'at end':>18} {'gap closed':>18}"]
    end = {(row["seed"], row["arm"]): row["perplexity_after"] for row in rows}
    for arm in dict.fromkeys(row["arm"] for row in rows):
        arm_rows = [row for row in rows if row["arm"] == arm]
        gaps = [
            (end[row["seed"], "random"] - row["perplexity_after"]) / (end[row["seed"], "random"] - row["teacher"])
            for row in arm_rows
            if (row["seed"], "random") in end
        ]
        lines.append(
            f"{arm:42} {statistics.mean(row['perplexity_before'] for row in arm_rows):12.4g} "
            f"{mean_and_spread([row['perplexity_after'] for row in arm_rows], 1):>18} "
            f"{mean_and_spread([100 * gap for gap in gaps], 1):>17}%"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("few_tokens.jsonl"))
    parser.add_argument("--teacher", help="by default SmolLM2-135M")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch-size", type=int, default=2, help="blocks of 256 tokens in a step")
    usual = LEARNING_RATES["calibrated"]
    parser.add_argument("--calibrated-rate", type=float, default=usual, help="peak learning rate of calibrated")
    parser.add_argument("--held-out-blocks", type=int, default=32)
    parser.add_argument("--kd-weight", type=float, default=0.5)
    args = parser.parse_args()
    keep_freed_memory()
    rows = read_rows(args.output)
    for seed in args.seeds:
        done = {row["arm"] for row in rows if (row["seed"], row["steps"]) == (seed, args.steps)}
        new_rows = run_seed(seed, [arm for arm in args.arms if arm not in done], args)
        for row in new_rows:
            append_row(args.output, row)
        rows += new_rows
    print(f"\n{describe_machine()}")
    print(
        f"seeds {sorted({row['seed'] for row in rows})}, perplexity on held-out text, mean ± standard deviation over seeds; "
        f"teacher {statistics.mean(row['teacher'] for row in rows):.1f}"
    )
    print(table(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
