"""`hf-guide distill` of regressions, several labels, questions, choices: a student is measured, and saved as a stock one."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import transformers

from hf_guide.errors import OptionError
from hf_guide.scripts.distill import distill, read_config
from tests.examples.local import QUICK, SMALLER, make_model
from tests.examples.test_text_tasks import ROWS, TEACHERS, sentences, write_rows

METRICS = {"qa": "eval_exact_match", "choice": "eval_accuracy", "regression": "eval_mse", "labels": "eval_f1"}


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """Leave nothing in the user's cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def settings_of(name: str, folder: Path, **changes: Any) -> dict[str, Any]:
    rows = [ROWS[name](text, number) for number, (text, _) in enumerate(sentences(24))]
    plain = QUICK | {"output_dir": str(folder / "student"), "max_length": 48, "validation_split_percentage": 25}
    return plain | {"data_files": [str(write_rows(folder / "rows.json", rows))]} | changes


@pytest.mark.sampled(2)
@pytest.mark.parametrize("task", METRICS)
def test_each_is_distilled_from_a_file_of_options(task, tmp_path):
    family, head, changes = TEACHERS[task]
    teacher = make_model(tmp_path / "teacher", family, head, **changes)
    settings = settings_of(task, tmp_path, teacher=str(teacher), student_init_kwargs=SMALLER[family])
    (tmp_path / "run.json").write_text(json.dumps(settings))  # JSON is YAML
    measured = distill(read_config(tmp_path / "run.json"))
    assert METRICS[task] in measured and measured["eval_kd"] > 0 and measured["eval_ce"] > 0
    auto_class = getattr(transformers, f"AutoModel{head}")
    _, loading = auto_class.from_pretrained(tmp_path / "student", output_loading_info=True)
    assert not any(loading.values())


def test_a_new_head_gets_the_problem_type_of_its_labels(tmp_path):
    """Of a model that was saved for another task, without a teacher."""
    base = make_model(tmp_path / "base", "bert", "ForMaskedLM", width=16, blocks=1)
    settings = settings_of(
        "labels", tmp_path, model_name_or_path=str(base), task="sequence-classification", losses="ce"
    )
    (tmp_path / "run.json").write_text(json.dumps(settings))
    assert "eval_f1" in distill(read_config(tmp_path / "run.json"))
    config = transformers.AutoConfig.from_pretrained(tmp_path / "student")
    assert config.problem_type == "multi_label_classification" and config.label2id == {"bad": 0, "good": 1, "short": 2}


def test_labels_that_the_teacher_does_not_predict_are_refused(tmp_path):
    teacher = make_model(tmp_path / "teacher", "bert", "ForSequenceClassification", num_labels=3)
    settings = settings_of("regression", tmp_path, teacher=str(teacher), student_init_kwargs=SMALLER["bert"])
    (tmp_path / "run.json").write_text(json.dumps(settings))
    with pytest.raises(OptionError, match="contains real numbers, and .*teacher predicts one class"):
        distill(read_config(tmp_path / "run.json"))
