"""Who should set which option of the trainer and of the cache: two teachers, the layers compared, the dtype of a cache.

    python examples/benchmarks/trainer_options.py --folder trainer_options --output trainer_options.jsonl

1. teachers: KD from a good teacher and a worse one of the same tokenizer, alone and together with several `teacher_weights`.
2. layers: CE and hidden states with several `layer_mapping`.
3. cache: bytes per token of a cache, and what float16 changes of the KD loss, by `log_prob_dtype` and by `top_k`.

The good teacher is that of small_teacher.py at width 64, trained on 1.5 tokens a parameter, the worse one on 0.25. Students
have half the width and half the depth, random at first, and 0.6 tokens a parameter. One JSON line per run is appended to
--output; existing ones are not made again.
"""

import argparse
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from small_teacher import BATCH, SOURCES, as_examples, blocks, texts, train_teacher
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedModel, default_data_collator

sys.path.insert(0, str(Path(__file__).parents[2]))

from examples.common.malloc import keep_freed_memory
from examples.common.results import append_row, mean_and_spread, read_rows
from hf_guide import AutoStudentForCausalLM, DistillationArguments, DistillationTrainer, capture_teacher

TEACHERS = {"good": 1.5, "worse": 0.25}  # tokens a parameter
TOKENS_PER_PARAMETER = 0.6
STUDENT_BATCH = 16
LEARNING_RATE = 6e-3
KD = {"ce": 0.5, "kd": 0.5}
HIDDEN_STATES = {"ce": 0.5, "hidden_states": 0.5}
ARMS: dict[str, dict[str, dict[str, Any]]] = {
    "teachers": {
        "labels": {"losses": "ce"},
        "the good one": {"losses": KD, "teachers": ["good"]},
        "the worse one": {"losses": KD, "teachers": ["worse"]},
        "both, weights 1 and 1": {"losses": KD, "teachers": ["good", "worse"]},
        "both, weights 4 and 1": {"losses": KD, "teachers": ["good", "worse"], "teacher_weights": [4, 1]},
    },
    "layers": {
        "every block of the student (default)": {"losses": HIDDEN_STATES, "teachers": ["good"]},
        "the last": {"losses": HIDDEN_STATES, "teachers": ["good"], "layer_mapping": {4: 8}},
        "the first and the last": {"losses": HIDDEN_STATES, "teachers": ["good"], "layer_mapping": {1: 2, 4: 8}},
    },
}
CACHES = [{"top_k": top_k, "log_prob_dtype": dtype} for top_k in (64, 1024) for dtype in ("float16", "float32")]


def student_of(teacher: PreTrainedModel, seed: int) -> PreTrainedModel:
    """Return a random student of half the width and half the depth."""
    return AutoStudentForCausalLM.from_teacher(
        teacher,
        method={"method": "random", "seed": seed},
        hidden_size=teacher.config.hidden_size // 2,
        intermediate_size=teacher.config.intermediate_size // 2,
        num_hidden_layers=teacher.config.num_hidden_layers // 2,
        num_attention_heads=teacher.config.num_attention_heads // 2,
        num_key_value_heads=teacher.config.num_key_value_heads // 2,
        show_progress=False,
    )


def trainer_for(
    student: PreTrainedModel, folder: str, train: Tensor, held_out: Tensor, teacher: Any, **options: Any
) -> DistillationTrainer:
    """Return a trainer that sees each block once."""
    steps = max(1, len(train) // STUDENT_BATCH)
    args = DistillationArguments(
        folder,
        max_steps=steps,
        per_device_train_batch_size=STUDENT_BATCH,
        per_device_eval_batch_size=BATCH,
        learning_rate=LEARNING_RATE,
        warmup_steps=max(1, steps // 20),
        lr_scheduler_type="cosine",
        weight_decay=0.1,
        adam_beta2=0.95,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **options,
    )
    return DistillationTrainer(
        student, args, default_data_collator, as_examples(train), as_examples(held_out), teacher=teacher
    )


def run_arm(
    arm: dict[str, Any], seed: int, models: dict[str, PreTrainedModel], train: Tensor, held_out: Tensor
) -> dict[str, float]:
    """Train a student as an arm specifies; return its perplexity on held-out text and its seconds of processor time."""
    options = dict(arm)
    teachers: Any = [models[name] for name in options.pop("teachers", [])]
    student = student_of(models["good"], seed)
    count = math.ceil(student.num_parameters() * TOKENS_PER_PARAMETER / train.shape[1])
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[:count]
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_for(student, folder, train[order], held_out, teachers or None, seed=seed, **options)
        started = time.process_time()
        trainer.train()
        seconds = time.process_time() - started
        return {"perplexity": math.exp(trainer.evaluate()["eval_ce"]), "seconds": seconds}


def measure_cache(
    config: dict[str, Any], seed: int, models: dict[str, PreTrainedModel], train: Tensor, held_out: Tensor
) -> dict[str, float]:
    """Return a cache's bytes per token, and the KD loss of a student from it and from the live teacher."""
    student, examples = student_of(models["good"], seed), as_examples(held_out)
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder, "cache")
        options: dict[str, Any] = {"data_collator": default_data_collator, "show_progress": False}
        capture_teacher(models["good"], examples, cache, config={**config, "batch_size": BATCH}, **options)
        size = sum(path.stat().st_size for path in cache.glob("shard-*"))
        losses = {}
        for name, teacher in (("live", models["good"]), ("cached", str(cache))):
            arguments = {"teacher_cache": teacher} if name == "cached" else {}
            live = None if name == "cached" else teacher
            trainer = trainer_for(student, folder, train[:BATCH], held_out, live, losses="kd", **arguments)
            losses[name] = trainer.evaluate()["eval_kd"]
    return {"bytes_per_token": size / held_out[:, 1:].numel(), **losses}


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as Markdown tables."""
    lines = []
    for part, arms in ARMS.items():
        lines += [f"\n{part}", "| arm | perplexity | processor time, s |", "|---|---|---|"]
        for arm in arms:
            mine = [row for row in rows if row["part"] == part and row["arm"] == arm]
            if mine:
                perplexity = mean_and_spread([row["perplexity"] for row in mine], 1)
                seconds = statistics.mean(row["seconds"] for row in mine)
                lines.append(f"| {arm} | {perplexity} | {seconds:.0f} |")
    lines += ["\ncache", "| top_k | dtype | bytes per token | KD from the cache less KD live |", "|---|---|---|---|"]
    for config in CACHES:
        mine = [row for row in rows if row["part"] == "cache" and row["arm"] == config]
        if mine:
            error = statistics.mean((row["cached"] - row["live"]) / row["live"] for row in mine)
            size = statistics.mean(row["bytes_per_token"] for row in mine)
            lines.append(f"| {config['top_k']} | {config['log_prob_dtype']} | {size:.0f} | {error:+.4%} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("trainer_options"), help="for the two teachers")
    parser.add_argument("--output", type=Path, default=Path("trainer_options.jsonl"))
    parser.add_argument("--parts", nargs="+", choices=[*ARMS, "cache"], default=["cache", *ARMS])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--table", action="store_true", help="print the table of --output alone")
    args = parser.parse_args()
    keep_freed_memory()
    rows = read_rows(args.output)
    if not args.table:
        models = {}
        for name, tokens in TEACHERS.items():
            train_teacher(args.folder / name, tokens_per_parameter=tokens, width=64, vocabulary=1024)
            models[name] = LlamaForCausalLM.from_pretrained(args.folder / name).eval()
        train, held_out = blocks(texts(SOURCES), AutoTokenizer.from_pretrained(args.folder / "good"))
        held_out = held_out[:64]
        todo = [(part, arm, seed) for part in args.parts for seed in args.seeds for arm in ARMS.get(part, CACHES)]
        for part, arm, seed in todo:
            key: dict[str, Any] = {"part": part, "arm": arm, "seed": seed}
            if any(key.items() <= row.items() for row in rows):
                continue
            if part == "cache":
                row = key | measure_cache(arm, seed, models, train, held_out)
            else:
                row = key | run_arm(ARMS[part][arm], seed, models, train, held_out)
            rows.append(row)
            print(row, flush=True)
            append_row(args.output, row)
    print(table(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
