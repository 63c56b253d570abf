"""Classify spoken words: a student of a trained teacher against the same student from scratch, at equal steps.

    python examples/benchmarks/spoken_words.py --output spoken_words.json

espeak-ng synthesizes twenty words in 54 voices, each at a rate and a pitch of its own, and noise is added; 24 other voices are
the test. The teacher is an audio spectrogram transformer of six blocks that is trained here; the students have half its width
and half its blocks. Every arm of a seed has the same batches; the learning rate is the same for all and was not tuned. With
`--espeak` the program may be anywhere; `--table` prints the table of --output alone.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import ASTConfig, ASTFeatureExtractor, ASTForAudioClassification, PreTrainedModel, set_seed

sys.path.insert(0, str(Path(__file__).parents[2]))

from examples.common.results import mean_and_spread
from hf_guide import DistillationArguments, DistillationTrainer, from_teacher
from hf_guide.data.sounds import decode_sound

WORDS = "zero one two three four five six seven eight nine yes no up down left right on off stop go".split()
ACCENTS = ("en-us", "en-gb", "en-gb-scotland", "en-gb-x-rp", "en-gb-x-gbclan", "en-029")
VARIANTS = ("m1", "m2", "m3", "m4", "m5", "m6", "m7", "f1", "f2", "f3", "f4", "f5", "croak")
HELD_OUT = ("m4", "m7", "f2", "f5")
RATE = 16_000
EXTRACTOR = ASTFeatureExtractor(num_mel_bins=32, max_length=80)
DROPS = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
LABELS = {"id2label": dict(enumerate(WORDS)), "label2id": {word: number for number, word in enumerate(WORDS)}}
TEACHER = {"hidden_size": 96, "num_hidden_layers": 6, "num_attention_heads": 6, "intermediate_size": 192}
STUDENT = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 96}
PATCHES = {"num_mel_bins": 32, "max_length": 80, "patch_size": 8, "frequency_stride": 8, "time_stride": 8}
ARMS = {
    "scratch": ("random", {"ce": 1.0}),
    "scratch, distilled": ("random", {"ce": 0.3, "kd": 0.7}),
    "calibrated, distilled": ("calibrated", {"ce": 0.3, "kd": 0.7}),
}


def synthesize(espeak: list[str], variants: tuple[str, ...], seed: int) -> list[dict[str, Any]]:
    """Return the features and the label of each word in each accent and variant of the voice."""
    draw = np.random.default_rng(seed)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "word.wav")
        for accent in ACCENTS:
            for variant in variants:
                for label, word in enumerate(WORDS):
                    speed, pitch = draw.integers(130, 260), draw.integers(20, 80)
                    voice = ["-v", f"{accent}+{variant}", "-s", str(speed), "-p", str(pitch)]
                    subprocess.run([*espeak, *voice, "-w", path, word], check=True, capture_output=True)
                    sound = decode_sound(path, RATE, row=label, column="audio", dataset="espeak-ng")
                    sound = sound + draw.normal(0, 0.02, len(sound)).astype(np.float32)
                    features = EXTRACTOR(sound, sampling_rate=RATE)["input_values"][0]
                    rows.append({"input_values": features, "labels": label})
    return rows


def train(
    model: PreTrainedModel, rows: list[dict[str, Any]], steps: int, losses: dict[str, float], seed: int, **options: Any
) -> None:
    """Train a model for a number of steps of 32 words."""
    args = DistillationArguments(
        tempfile.mkdtemp(),
        losses=losses,
        max_steps=steps,
        per_device_train_batch_size=32,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        warmup_steps=20,
        weight_decay=0.01,
        temperature=2.0,
        seed=seed,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = DistillationTrainer(model, args, train_dataset=rows, processing_class=EXTRACTOR, **options)
    trainer.train()


@torch.no_grad()
def accuracy(model: PreTrainedModel, rows: list[dict[str, Any]]) -> float:
    """Return the share of words that a model names."""
    model.eval()
    inputs = torch.tensor(np.stack([row["input_values"] for row in rows]))
    labels = torch.tensor([row["labels"] for row in rows])
    predicted = torch.cat([model(part).logits.argmax(-1) for part in inputs.split(128)])
    return float((predicted == labels).double().mean())


def table(rows: list[dict[str, Any]]) -> str:
    """Return the mean and the spread over the seeds of each arm, in percent, as a Markdown table."""
    lines = ["| arm | before training | accuracy |", "|---|---|---|"]
    for arm in dict.fromkeys(row["arm"] for row in rows):
        mine = [row for row in rows if row["arm"] == arm]
        accuracies = mean_and_spread([100 * row["accuracy"] for row in mine], 1)
        before = f"{100 * statistics.mean(row['before'] for row in mine):.1f}" if "before" in mine[0] else ""
        lines.append(f"| {arm} | {before} | {accuracies} |")
    return "\n".join(lines)


def main() -> None:
    """Train the teacher and all students, and write a row for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("spoken_words.json"))
    parser.add_argument("--espeak", nargs="+", default=["espeak-ng"], help="the program, and its own flags")
    parser.add_argument("--teacher-steps", type=int, default=1500)
    parser.add_argument("--steps", type=int, nargs="+", default=[150])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--table", action="store_true", help="print the table of --output alone")
    args = parser.parse_args()
    if args.table:
        print(table(json.loads(args.output.read_text())))
        return

    seen = synthesize(args.espeak, tuple(name for name in VARIANTS if name not in HELD_OUT), seed=0)
    unseen = synthesize(args.espeak, HELD_OUT, seed=1)
    set_seed(0)
    teacher = ASTForAudioClassification(ASTConfig(**TEACHER, **PATCHES, **LABELS, **DROPS))
    train(teacher, seen, args.teacher_steps, {"ce": 1.0}, seed=0)
    teacher.eval()
    rows = [{"arm": "teacher", "steps": args.teacher_steps, "seed": 0, "accuracy": accuracy(teacher, unseen)}]
    print(len(seen), len(unseen), rows[-1], flush=True)
    for steps in args.steps:
        for seed in range(args.seeds):
            for arm, (method, losses) in ARMS.items():
                set_seed(seed)
                options = {"calibration_dataset": seen} if method == "calibrated" else {}
                student = from_teacher(
                    teacher, **STUDENT, method={"method": method, "seed": seed}, show_progress=False, **options
                )
                start, began = accuracy(student, unseen), time.monotonic()
                train(student, seen, steps, losses, seed, teacher=teacher if "kd" in losses else None)
                row = {
                    "arm": arm,
                    "steps": steps,
                    "seed": seed,
                    "before": start,
                    "accuracy": accuracy(student, unseen),
                }
                rows.append(row | {"seconds": round(time.monotonic() - began, 1)})
                print(rows[-1], flush=True)
                args.output.write_text(json.dumps(rows, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
