"""Each metric loads by its path without a Hub, merges what batches and processes added, and raises where it is undefined."""

import json
import math
import os
import random
import subprocess
import sys
import textwrap
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch

from hf_guide import metrics
from hf_guide.errors import OptionError


@pytest.fixture
def load(tmp_path):
    """Load a metric whose cache is in a temporary folder."""
    return lambda name, **options: evaluate.load(metrics.path(name), cache_dir=str(tmp_path / "tables"), **options)


def test_every_metric_is_a_folder_of_its_own_name():
    folder = Path(metrics.__file__).parent
    assert {file.parent.name for file in folder.glob("*/*.py")} == set(metrics.NAMES)
    assert all((Path(metrics.path(name)) / f"{name}.py").is_file() for name in metrics.NAMES)
    with pytest.raises(OptionError, match="Did you mean 'gap_closed'"):
        metrics.path("gap_close")


def test_perplexity_weighs_each_mean_by_its_tokens(load):
    metric = load("perplexity_from_losses")
    losses = torch.linspace(0.5, 4.0, 60, dtype=torch.float64)
    sizes = [10, 1, 30, 19]
    for chunk in losses.split(sizes):
        metric.add(prediction=chunk.mean(), reference=len(chunk))
    results = metric.compute()
    assert results["perplexity"] == pytest.approx(losses.mean().exp().item(), rel=1e-12)
    assert results["loss"] == pytest.approx(losses.mean().item(), rel=1e-12) and results["tokens"] == 60
    assert metric.compute(predictions=[1.0, math.nan], references=[3, 0])["loss"] == 1.0, (
        "a batch without tokens is left out"
    )
    assert metric.compute(predictions=[1e4], references=[1])["perplexity"] == math.inf


@pytest.mark.parametrize(
    "losses,tokens,message",
    [([math.nan], [1], "Row 0"), ([1.0], [-1], "Row 0"), ([1.0, 2.0], [0, 0], "No batch has tokens")],
)
def test_perplexity_of_nothing_is_an_error(load, losses, tokens, message):
    with pytest.raises(ValueError, match=message):
        load("perplexity_from_losses").compute(predictions=losses, references=tokens)


def test_gap_closed_is_a_share_of_the_gap_to_the_teacher(load):
    metric = load("gap_closed")
    assert metric.compute(predictions=[21.5], references=[16.5], baselines=[41.5]) == {
        "gap_closed": 0.8,
        "gaps": [0.8],
    }
    metric.add_batch(predictions=np.array([41.5, 16.5]), references=[16.5, 16.5], baselines=[41.5, 41.5])
    metric.add(prediction=0.75, reference=1.0, baselines=0.5)
    assert metric.compute() == {"gap_closed": 0.5, "gaps": [0.0, 1.0, 0.5]}, "for accuracies too"
    assert "baselines" in metric.inputs_description and metric.features.keys() >= {"baselines"}


@pytest.mark.parametrize("teacher", [41.5, math.nan])
def test_a_gap_that_is_none_is_an_error(load, teacher):
    with pytest.raises(ValueError, match="Row 1.*no gap"):
        load("gap_closed").compute(predictions=[1.0, 1.0], references=[16.5, teacher], baselines=[41.5, 41.5])


def test_agreement_counts_examples_or_tokens(load):
    metric = load("teacher_agreement")
    assert metric.compute(predictions=[1, 2, 0, 2], references=[1, 2, 2, 2]) == {
        "teacher_agreement": 0.75,
        "positions": 4,
    }
    metric.add_batch(
        predictions=torch.tensor([[5, 6, 7], [8, 0, 0]]), references=torch.tensor([[5, 6, 9], [8, -100, -100]])
    )
    metric.add_batch(predictions=[[1]], references=[[1]])
    assert metric.compute() == {"teacher_agreement": 0.8, "positions": 5}
    metric.add_batch(predictions=np.array([[3], [4]]), references=np.array([[3], [5]]))
    assert metric.compute() == {"teacher_agreement": 0.5, "positions": 2}, "lists of one token are lists"
    assert metric.compute(predictions=[0, 1], references=[0, 7], ignore_index=7)["positions"] == 1


@pytest.mark.parametrize(
    "student,teacher,message",
    [([[1, 2]], [[1]], "Row 0 has 2 predictions of the student and 1 of the teacher"), ([[1]], [[-100]], "left out")],
)
def test_agreement_of_nothing_is_an_error(load, student, teacher, message):
    with pytest.raises(ValueError, match=message):
        load("teacher_agreement").compute(predictions=student, references=teacher)


def edits(first, second):
    """Return the edit distance by its definition: the recursion over both last items."""
    row = list(range(len(second) + 1))
    for index, one in enumerate(first, start=1):
        before, row = row, [index]
        for column, other in enumerate(second):
            row.append(min(before[column] + (one != other), before[column + 1] + 1, row[column] + 1))
    return row[-1]


def test_word_and_character_error_rates_equal_a_plain_edit_distance(load):
    draw = random.Random(0)
    texts = [
        " ".join("".join(draw.choices("abc", k=draw.randint(1, 4))) for _ in range(draw.randint(0, 9)))
        for _ in range(120)
    ]
    predictions, references = texts[::2], texts[1::2]
    metric = load("word_error_rate")
    metric.add_batch(predictions=predictions[:7], references=references[:7])
    metric.add_batch(predictions=predictions[7:], references=references[7:])
    results = metric.compute()
    words = sum(len(text.split()) for text in references)
    assert results["words"] == words and results["characters"] == sum(map(len, references))
    pairs = list(zip(predictions, references, strict=True))
    assert results["wer"] == sum(edits(one.split(), other.split()) for one, other in pairs) / words
    assert results["cer"] == sum(edits(one, other) for one, other in pairs) / results["characters"]


def test_word_error_rate_counts_missing_and_added_words_and_no_spaces(load):
    metric = load("word_error_rate")
    assert metric.compute(predictions=["", "a  b\n"], references=["x y", "a b"])["wer"] == 0.5
    assert metric.compute(predictions=["a b c", "d"], references=["a", ""])["wer"] == 3.0, "above 1"
    assert metric.compute(predictions=["ab"], references=["ba"])["cer"] == 1.0
    with pytest.raises(ValueError, match="No reference has a word"):
        metric.compute(predictions=["a"], references=["  "])


WORKER = """
    import json, sys
    import evaluate
    rank, cache, *folders = sys.argv[1:]
    rank = int(rank)
    rows = {
        "perplexity_from_losses": [{"predictions": [0.0], "references": [200]}, {"predictions": [3.0], "references": [100]}],
        "gap_closed": [
            {"predictions": [21.5], "references": [16.5], "baselines": [41.5]},
            {"predictions": [16.5], "references": [16.5], "baselines": [41.5]},
        ],
        "teacher_agreement": [
            {"predictions": [[5, 6], [7]], "references": [[5, 9], [7]]},
            {"predictions": [[8]], "references": [[8]]},
        ],
        "word_error_rate": [
            {"predictions": ["a b"], "references": ["a c"]},
            {"predictions": ["d e"], "references": ["d e"]},
        ],
    }
    results = {}
    for folder in folders:
        metric = evaluate.load(folder, num_process=2, process_id=rank, experiment_id="both", cache_dir=cache)
        assert (metric.num_process, metric.process_id) == (2, rank)
        metric.add_batch(**rows[metric.name][rank])
        results[metric.name] = metric.compute()
    assert "hf_guide" not in sys.modules
    print(json.dumps(results))
"""


@pytest.mark.extended
def test_what_two_processes_added_is_merged_in_the_first(tmp_path):
    """Real processes, which are offline and do not import hf_guide."""
    script = textwrap.dedent(WORKER)
    folders = [metrics.path(name) for name in metrics.NAMES]
    command = [sys.executable, "-c", script]
    workers = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path), *folders],
            env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1", "HF_HOME": str(tmp_path)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [worker.communicate(timeout=300) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], outputs
    first, second = (json.loads(output) for output, _ in outputs)
    assert first == {
        "perplexity_from_losses": {"perplexity": math.e, "loss": 1.0, "tokens": 300},
        "gap_closed": {"gap_closed": 0.9, "gaps": [0.8, 1.0]},
        "teacher_agreement": {"teacher_agreement": 0.75, "positions": 4},
        "word_error_rate": {"wer": 0.25, "cer": 1 / 6, "words": 4, "characters": 6},
    }
    assert second == dict.fromkeys(metrics.NAMES)
