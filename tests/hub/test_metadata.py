"""A record is loaded from its file as it was saved, and reports only the values that are known."""

import json
import math

import numpy as np
import pytest
import torch
from transformers import TrainingArguments

from hf_guide.errors import HfGuideError
from hf_guide.hub.metadata import (
    RECORD_NAME,
    DistillationRecord,
    MetricRow,
    TeacherRecord,
    lineage_of,
    load_record,
    reported_arguments,
    result_rows,
    save_record,
    to_eval_results,
)
from hf_guide.hub.model_card import format_metric


def test_a_record_of_the_previous_version_is_read(tmp_path):
    old = {"teachers": [], "objective": {"embedding": 0.5, "hidden": 0.5}, "divergence": "jsd", "temperature": 2.0}
    (tmp_path / "distillation.json").write_text(json.dumps(old))
    record = load_record(tmp_path)
    assert record.losses == {"features": 0.5, "hidden_states": 0.5} and record.kd_loss_type == "jsd"


def test_a_record_comes_back_from_its_file(tmp_path):
    record = DistillationRecord(
        teachers=[TeacherRecord("a/big", "f00d", 0.5), TeacherRecord("folder", captured=True)],
        losses={"ce": 0.5, "kd": 0.5},
        training={"learning_rate": 1e-3, "betas": (0.9, 0.95)},
        metrics={"eval_loss": np.float32(0.5), "eval_accuracy": torch.tensor(0.25)},
        history=[{"step": 10, "eval_loss": 2.0}, {"step": 20, "eval_loss": math.nan}],
    )
    assert record.metrics == {"eval_loss": 0.5, "eval_accuracy": 0.25}
    assert record.history[1] == {"step": 20, "eval_loss": None}, "JSON holds no NaN"
    assert save_record(tmp_path / "new", record) == tmp_path / "new" / RECORD_NAME
    assert load_record(tmp_path / "new") == load_record(tmp_path / "new" / RECORD_NAME) == record
    assert record.hf_guide_version and record.transformers_version


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"teachers": [], "unknown": 1}', '{"teachers": [{"nam": 1}]}'])
def test_a_file_that_is_no_record_is_an_error(tmp_path, text):
    (tmp_path / RECORD_NAME).write_text(text)
    with pytest.raises(HfGuideError, match=r"distillation\.json is not a distillation record"):
        load_record(tmp_path)


def test_a_value_that_json_cannot_hold_is_an_error_with_its_path():
    with pytest.raises(HfGuideError, match=r"training\['optimizer'\]\[1\] is of type object"):
        DistillationRecord(training={"optimizer": ["adam", object()]})


def test_the_training_arguments_of_a_record_are_those_that_matter(tmp_path):
    arguments = TrainingArguments(
        str(tmp_path),
        learning_rate=1e-3,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=3,
        lr_scheduler_type="cosine",
        label_smoothing_factor=0.1,
        report_to=[],
        use_cpu=True,
    )
    entries = reported_arguments(arguments)
    assert (entries["learning_rate"], entries["lr_scheduler_type"], entries["label_smoothing_factor"]) == (
        1e-3,
        "cosine",
        0.1,
    )
    assert entries["total_train_batch_size"] == 12 and "bf16" not in entries and "processes" not in entries
    assert str(tmp_path) not in json.dumps(entries)
    assert DistillationRecord(training=entries).training == entries


def test_figures_compare_the_student_with_the_teacher_and_a_random_initialization():
    record = DistillationRecord(
        task="text-generation",
        evaluated_on="held out",
        metrics={"eval_perplexity": 20.0, "eval_accuracy": 0.75, "eval_samples_per_second": 3.0, "epoch": 1.0},
        teacher_metrics={"eval_perplexity": 10.0, "eval_accuracy": 1.0},
        random_metrics={"perplexity": 60.0, "accuracy": 0.5},
    )
    perplexity, accuracy = result_rows(record)
    assert perplexity == MetricRow("held out", "perplexity", 20.0, 10.0, 60.0) and perplexity.gap_closed == 0.8
    assert accuracy.gap_closed == 0.5, "better is more for the one and less for the other"
    assert [(result.dataset_type, result.metric_type) for result in to_eval_results(record)] == [
        ("custom", "perplexity"),
        ("custom", "accuracy"),
    ]
    assert to_eval_results(DistillationRecord(metrics={"eval_loss": 1.0})) == []
    assert MetricRow("d", "m", 1.0, 2.0, 2.0).gap_closed is None
    assert MetricRow("d", "m", "1 ± 0.5", 1.0, 2.0).gap_closed is None


def test_figures_fit_into_a_table():
    assert [format_metric(value) for value in (None, 0.123456, 12345.6, 7, "a|b\nc")] == [
        "–",
        "0.1235",
        "1.235e+04",
        "7",
        "a\\|b c",
    ]


def test_a_damaged_report_of_a_teacher_is_left_out_with_a_warning(tmp_path, caplog):
    (tmp_path / "initialization_report.json").write_text("{}")
    assert lineage_of(tmp_path) == [] and "How the teacher was made is not recorded" in caplog.text
