"""The script for embedding models, run for a few steps as a process of its own, on one process and on two."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModel

from hf_guide.models.sentence_files import modules_of_model
from tests.examples.local import QUICK, SMALLER, flags, make_model, run_example, sentences
from tests.examples.test_scripts import LAUNCHERS
from tests.sentence_folder import dense, pooling, sentence_folder

SCRIPT = "run_sentence_embedding_distillation.py"


def write_scored(path: Path, count: int, seed: int) -> Path:
    """Write a JSON-lines file of pairs of sentences, and whether both are of the same kind."""
    texts = sentences(2 * count, seed)
    pairs = zip(texts[::2], texts[1::2], strict=True)
    rows = ({"first": a, "second": b, "score": float(one == other)} for (a, one), (b, other) in pairs)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("embedding")
    teacher = make_model(folder / "teacher", "bert", "")
    sentence_folder(teacher, pooling("cls", "mean"), dense(64, 12), ("Normalize", None), prompts={"query": "query: "})
    return {
        "teacher": teacher,
        "student_init_kwargs": SMALLER["bert"] | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
        "train_file": write_scored(folder / "train.jsonl", 24, 0),
        "validation_file": write_scored(folder / "held_out.jsonl", 9, 1),
    }


def run(files: dict[str, Any], output: Path, *, launcher: tuple[str, ...] = (), **options: Any) -> dict[str, Any]:
    """Run the script, and return what it measured."""
    words = flags(**QUICK | files | options, output_dir=output)
    run_example(SCRIPT, "--do_train", "--do_eval", *words, launcher=launcher)
    measured: dict[str, Any] = json.loads((output / "all_results.json").read_text())
    return measured


@pytest.mark.extended
def test_texts_without_labels_train_a_sentence_transformers_folder(files: dict[str, Any], tmp_path: Path) -> None:
    measured = run(files, tmp_path, prompt="query: ")
    assert {
        "eval_features",
        "eval_score_spearman",
        "eval_teacher_score_spearman",
    } <= measured.keys()
    assert -1 <= measured["eval_similarity_spearman"] <= 1
    modules = modules_of_model(AutoModel.from_pretrained(tmp_path))
    assert modules.hidden_size == SMALLER["bert"]["hidden_size"] and modules.width == 12
    assert json.loads((tmp_path / "config_sentence_transformers.json").read_text()) == {
        "prompts": {"query": "query: "}
    }
    assert "sentence-similarity" in (tmp_path / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("narrower", [False, True], ids=["dense layer", "isometry"])
def test_two_processes_measure_what_one_does(narrower: bool, files: dict[str, Any], tmp_path: Path) -> None:
    """Nine pairs on two processes: the last batches are filled up with pairs that must not count."""
    options: dict[str, Any] = {"losses": {"features": 1.0}, "per_device_eval_batch_size": 2}
    if narrower:
        teacher = make_model(tmp_path / "teacher", "bert", "")
        options["teacher"] = sentence_folder(teacher, pooling("mean"), ("Normalize", None))
    alone = run(files, tmp_path / "one", per_device_train_batch_size=4, **options)
    two = run(files, tmp_path / "two", launcher=LAUNCHERS["torchrun"], per_device_train_batch_size=2, **options)
    for name in ("train_loss", "eval_features"):
        assert two[name] == pytest.approx(alone[name], rel=1e-4), name
    for name in ("eval_similarity_spearman", "eval_score_spearman"):  # equal texts differ by rounding between batches
        assert two[name] == pytest.approx(alone[name], rel=1e-2), name
