"""Measure what fitting a projector costs in addition to the teacher's own pass over the data, in processor time.

    python examples/benchmarks/lelp_fitting.py

The teacher is as large as MiniLM (6 blocks, 384 wide), random, on one thread; texts have 8 to 40 tokens. Each turn runs the
teacher alone over the data, then `fit_subclasses`. `added` is what is done with embeddings once they are there
(`StatisticsAccumulator.update`), free of the noise of the teacher's own time; `once` is what follows at the end,
however many there were.
"""

import argparse
import json
import statistics
import time
from typing import Any

import torch
from transformers import BertConfig, BertForSequenceClassification

from hf_guide.lelp.accumulator import StatisticsAccumulator
from hf_guide.lelp.fitting import fit_subclasses
from hf_guide.lelp.projector import SubclassProjector
from hf_guide.tasks import Task
from hf_guide.teachers.forward import TeacherRunner


def teacher(classes: int) -> BertForSequenceClassification:
    """Return a seeded encoder of MiniLM's shape."""
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
        num_labels=classes,
        initializer_range=0.1,
    )
    return BertForSequenceClassification(config).eval()


def texts(count: int, classes: int) -> list[dict[str, Any]]:
    """Return seeded texts of 8 to 40 tokens."""
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(8, 41, (count,), generator=draw).tolist()
    return [
        {"input_ids": torch.randint(5, 30000, (length,), generator=draw).tolist(), "label": number % classes}
        for number, length in enumerate(lengths)
    ]


def pad(features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Pad to the longest."""
    rows = [torch.tensor(feature["input_ids"]) for feature in features]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return {"input_ids": ids, "attention_mask": (ids > 0).long()}


def main() -> None:
    """Print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--classes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, data = teacher(args.classes), texts(args.examples, args.classes)
    runner = TeacherRunner(model, Task.SEQUENCE_CLASSIFICATION)
    alone, fitted, added, final = [], [], [], []
    for _ in range(args.rounds):
        start = time.process_time()
        signals = []
        for first in range(0, len(data), args.batch_size):
            outputs = runner.forward(pad(data[first : first + args.batch_size]), features=True)
            signals.append((outputs.features, outputs.logits))
        alone.append(time.process_time() - start)
        start = time.process_time()
        fit_subclasses(model, data, 8, data_collator=pad, batch_size=args.batch_size, show_progress=False)
        fitted.append(time.process_time() - start)
        start = time.process_time()
        accumulator = StatisticsAccumulator(args.classes, 384)
        for number, (embeddings, logits) in enumerate(signals):
            rows = data[number * args.batch_size : (number + 1) * args.batch_size]
            accumulator.update(embeddings, torch.tensor([row["label"] for row in rows]), logits)
        _ = accumulator.moments.counts
        added.append(time.process_time() - start)
        start = time.process_time()
        SubclassProjector.from_statistics(accumulator, model.classifier.weight.detach().double(), 8)
        final.append(time.process_time() - start)
    teacher_time = statistics.median(alone)
    print(
        json.dumps(
            {
                "examples": args.examples,
                "classes": args.classes,
                "teacher_seconds": round(teacher_time, 3),
                "fit_over_teacher": round(statistics.median(fitted) / teacher_time, 4),
                "added_over_teacher": round(statistics.median(added) / teacher_time, 4),
                "once_seconds": round(statistics.median(final), 3),
            }
        )
    )


if __name__ == "__main__":
    main()
