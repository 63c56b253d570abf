"""`hf-guide distill` and `hf-guide capture` of embedding models, on plain texts: a sentence-transformers folder comes out."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import yaml
from transformers import AutoModel, AutoTokenizer

from hf_guide import OptionError, SentenceCollator, TaskError, capture_teacher
from hf_guide.cli.main import main
from hf_guide.models.sentence_files import modules_of_model
from hf_guide.scripts.distill import distill, read_config
from tests.examples.local import QUICK
from tests.sentence_folder import WORDS, pooling, teacher_folder, tokenizer

TEXTS = [" ".join(WORDS[(7 * row + 3 * word * word) % 91] for word in range(2 + row % 40)) for row in range(48)]
TRAINED = [{"text": text} for text in TEXTS[:24]]
SCORED = [{"one": TEXTS[row], "two": TEXTS[row + 24], "score": row / 24} for row in range(24)]
STUDENT = {"hidden_size": 16, "num_hidden_layers": 1, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("teacher") / "embedder"
    return str(teacher_folder(folder, pooling(), ("Normalize", None), prompts={"query": "w1 "}))


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def run(folder: Path, name: str = "student", **options: Any) -> dict[str, float]:
    options = QUICK | {"output_dir": str(folder / name), "losses": {"features": 1.0, "similarity": 1.0}} | options
    (folder / "run.yaml").write_text(yaml.safe_dump(options))
    return distill(read_config(folder / "run.yaml"))


def test_a_captured_teacher_of_texts_is_as_good_as_a_live_one_and_the_student_a_sentence_folder(
    teacher: str, tmp_path: Path
) -> None:
    file = write(tmp_path / "pairs.jsonl", SCORED)
    data = {"data_files": file, "source_prefix": "w1 ", "validation_split_percentage": 40}
    (tmp_path / "run.json").write_text(json.dumps(data | {"losses": {"similarity": 1.0}}))
    words = ["--config", str(tmp_path / "run.json"), "--hidden-dtype", "float32", "--no-progress"]
    assert main(["capture", teacher, "-o", str(tmp_path / "cached"), *words]) == 0
    live = run(tmp_path, teacher=teacher, student_init_kwargs=STUDENT, **data)
    cached = run(
        tmp_path,
        "other",
        teacher_cache=str(tmp_path / "cached"),
        student_init_kwargs=STUDENT | {"teacher": teacher},
        **data,
    )
    names = ("features", "similarity", "similarity_spearman", "score_spearman", "teacher_score_spearman")
    for name in names:
        assert cached[f"eval_{name}"] == pytest.approx(live[f"eval_{name}"], rel=1e-4), name
    student = AutoModel.from_pretrained(tmp_path / "student")
    modules = modules_of_model(student)
    assert modules.width == student.config.hidden_size == 16
    assert [type(layer).__name__ for layer in modules.layers] == ["Pooling", "Normalize"]
    assert (modules.files.model_config or {})["prompts"] == {"query": "w1 "}
    assert len(AutoTokenizer.from_pretrained(tmp_path / "student")) == len(tokenizer())
    assert "pipeline_tag: sentence-similarity" in (tmp_path / "student" / "README.md").read_text()


def test_texts_are_cut_where_the_teachers_folder_cuts_them(teacher: str, tmp_path: Path) -> None:
    """The folder has `max_seq_length` 30, and its tokenizer 40."""
    file = write(tmp_path / "train.jsonl", TRAINED)
    data = ["--data-files", file, "--save-penultimate", "--no-progress", "--train-only"]
    assert main(["capture", teacher, "-o", str(tmp_path / "c"), *data, "--validation-split-percentage", "0"]) == 0
    again = capture_teacher(
        teacher,
        datasets.Dataset.from_list(TRAINED),
        tmp_path / "c",  # finished: a dataset whose texts are cut otherwise is an error
        data_collator=SentenceCollator(AutoTokenizer.from_pretrained(teacher), max_length=30),
        processing_class=AutoTokenizer.from_pretrained(teacher),
        config={"save_penultimate": True},
        show_progress=False,
    )
    assert len(again) == len(TRAINED)


def test_pairs_of_texts_are_captured_row_by_row(teacher: str, tmp_path: Path) -> None:
    """Of a `SentenceCollator`, every text is an example, whatever batches a training makes."""
    collator = SentenceCollator(tokenizer(), ["one", "two"], prompts={"two": "w3 "})
    pairs = datasets.Dataset.from_list(SCORED)
    capture = capture_teacher(
        teacher,
        pairs,
        tmp_path / "c",
        data_collator=collator,
        processing_class=tokenizer(),
        config={"save_penultimate": True, "hidden_dtype": "float32"},
        show_progress=False,
    )
    assert len(capture) == 2 * len(pairs)
    batch = collator([pairs[index] for index in (7, 0, 3)])
    found = torch.stack([each.named()["teacher_features"] for each in capture.lookup(capture.keys(batch))])
    model = AutoModel.from_pretrained(teacher).eval()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        expected = modules_of_model(model).embed(model(**inputs).last_hidden_state, inputs)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("rows", "options", "error", "message"),
    [
        ([{"n": 1}] * 8, {}, OptionError, "has no column of texts; it has \\['n'\\]. Set text_column"),
        (TRAINED, {"text_column": "txt"}, OptionError, "no column 'txt'.*Did you mean 'text'"),
        (TRAINED, {"label_column": "score"}, OptionError, "no column 'score'"),
        ([*TRAINED, {"text": None}], {}, OptionError, "must contain text; row 24 has None"),
        (TRAINED, {"losses": {"kd": 1.0}}, TaskError, "features"),
        (TRAINED, {"predict_with_generate": True}, OptionError, "the task is feature-extraction. Leave it out"),
    ],
    ids=["no texts", "no column", "no scores", "no text", "kd", "generation"],
)
def test_what_cannot_be_embedded_is_an_error(
    rows: list[dict[str, Any]],
    options: dict[str, Any],
    error: type[Exception],
    message: str,
    teacher: str,
    tmp_path: Path,
) -> None:
    data = {"data_files": write(tmp_path / "t.jsonl", rows), "validation_split_percentage": 0}
    with pytest.raises(error, match=message):
        run(tmp_path, teacher=teacher, student_init_kwargs=STUDENT, **data | options)
