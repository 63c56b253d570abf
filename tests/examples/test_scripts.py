"""The example scripts, each run for a few steps as a process of its own, on one process and on several."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoModelForSemanticSegmentation,
    AutoModelForSequenceClassification,
    AutoProcessor,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    SegformerImageProcessorPil,
)

from tests.examples.local import (
    LABELS,
    QUICK,
    SMALLER,
    flags,
    make_model,
    run_example,
    write_images,
    write_labelled,
    write_segmentation,
    write_text,
)
from tests.small_image_text import FAMILIES, write_conversations

LAUNCHERS = {
    "torchrun": ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
    "accelerate": ("-m", "accelerate.commands.launch", "--config_file", "examples/accelerate/cpu_ddp.yaml"),
}
CLM = "run_clm_distillation.py"


def run(script: str, folder: Path, *, launcher: tuple[str, ...] = (), **options: Any) -> tuple[str, dict[str, Any]]:
    """Run a script that trains and evaluates; return what it printed and what it measured."""
    words = flags(**QUICK | {"log_level": "info"} | options, output_dir=folder)
    printed = run_example(script, "--do_train", "--do_eval", *words, launcher=launcher)
    record = json.loads((folder / "distillation.json").read_text())
    assert record["steps"] == options.get("max_steps", QUICK["max_steps"]) and (folder / "README.md").is_file()
    assert {"kd", "ce"} <= record["losses"].keys()
    measured = json.loads((folder / "all_results.json").read_text())
    assert measured["eval_ce"] > 0 and 0 <= measured["eval_teacher_agreement"] <= 1
    return printed, measured


@pytest.fixture(scope="module")
def causal(tmp_path_factory) -> dict[str, Any]:
    """A teacher, what its student is to be, and a text."""
    folder = tmp_path_factory.mktemp("causal")
    teacher = make_model(folder / "teacher", "llama", "ForCausalLM")
    return {
        "teacher": teacher,
        "student_init_kwargs": SMALLER["llama"],
        "train_file": write_text(folder / "text.txt"),
        "block_size": 32,
    }


@pytest.fixture(scope="module")
def alone(causal, tmp_path_factory) -> Path:
    """The student that one process makes with all options from one file."""
    folder = tmp_path_factory.mktemp("alone")
    config = {name: str(value) if isinstance(value, Path) else value for name, value in causal.items()}
    config |= QUICK | {"do_train": True, "do_eval": True, "output_dir": str(folder / "student")}
    (folder / "run.yaml").write_text(json.dumps(config))  # JSON is YAML
    run_example(CLM, str(folder / "run.yaml"))
    return folder / "student"


def test_a_causal_language_model_is_trained_from_one_config_file(alone):
    student = AutoModelForCausalLM.from_pretrained(alone)
    assert student.config.hidden_size == SMALLER["llama"]["hidden_size"]
    assert json.loads((alone / "all_results.json").read_text())["eval_perplexity"] > 1
    assert json.loads((alone / "distillation.json").read_text())["training"]["total_train_batch_size"] == 4


@pytest.mark.extended
@pytest.mark.parametrize("launcher", [pytest.param("torchrun", marks=pytest.mark.slow), "accelerate"])
def test_two_processes_train_as_one_with_twice_the_batch(launcher, causal, alone, tmp_path):
    printed, measured = run(
        CLM, tmp_path / "two", launcher=LAUNCHERS[launcher], per_device_train_batch_size=2, **causal
    )
    assert "Num processes: 2" in printed and "Backend: gloo" in printed
    record = json.loads((tmp_path / "two" / "distillation.json").read_text())
    assert record["training"]["processes"] == 2 and record["training"]["total_train_batch_size"] == 4
    expected = json.loads((alone / "all_results.json").read_text())
    assert measured["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-4)
    assert measured["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-4)


@pytest.mark.extended
def test_masked_language_models(tmp_path):
    teacher = make_model(tmp_path / "teacher", "bert", "ForMaskedLM")
    run(
        "run_mlm_distillation.py",
        tmp_path / "student",
        teacher=teacher,
        student_init_kwargs=SMALLER["bert"],
        train_file=write_text(tmp_path / "text.txt"),
        max_seq_length=32,
    )
    assert AutoModelForMaskedLM.from_pretrained(tmp_path / "student").config.num_hidden_layers == 1


@pytest.mark.extended
def test_text_classifiers_keep_the_order_of_the_teachers_labels(tmp_path):
    labels = {"id2label": dict(enumerate(LABELS[::-1])), "label2id": {name: n for n, name in enumerate(LABELS[::-1])}}
    teacher = make_model(tmp_path / "teacher", "bert", "ForSequenceClassification", **labels)
    student = make_model(tmp_path / "base", "bert", "ForMaskedLM", width=16, blocks=1)
    _, measured = run(
        "run_classification_distillation.py",
        tmp_path / "student",
        teacher=teacher,
        model_name_or_path=student,
        train_file=write_labelled(tmp_path / "train.csv", 200),
        validation_file=write_labelled(tmp_path / "held_out.csv", 40, seed=1),
        text_column_name="sentence",
        losses={"ce": 1.0, "kd": 1e-4},
        max_steps=60,
        per_device_train_batch_size=16,
        learning_rate=1e-2,
    )
    made = AutoModelForSequenceClassification.from_pretrained(tmp_path / "student")
    assert made.config.id2label == {0: "good", 1: "bad"}
    assert measured["eval_accuracy"] > 0.9


@pytest.mark.extended
def test_image_classifiers(tmp_path):
    teacher = make_model(tmp_path / "teacher", "vit", "ForImageClassification")
    folder = write_images(tmp_path / "images")
    _, measured = run(
        "run_image_classification_distillation.py",
        tmp_path / "student",
        teacher=teacher,
        student_init_kwargs=SMALLER["vit"],
        train_dir=folder / "train",
    )
    assert 0 <= measured["eval_accuracy"] <= 1
    assert AutoModelForImageClassification.from_pretrained(tmp_path / "student").config.hidden_size == 16


@pytest.mark.extended
def test_semantic_segmentation(tmp_path):
    labels = {"id2label": {0: "none", 1: "one", 2: "two"}, "label2id": {"none": 0, "one": 1, "two": 2}}
    sizes = {"hidden_sizes": [8, 8, 16, 16], "num_attention_heads": [1, 1, 2, 2], "decoder_hidden_size": 16}
    config = SegformerConfig(**sizes, depths=[1, 1, 2, 1], **labels)
    SegformerForSemanticSegmentation(config).save_pretrained(tmp_path / "teacher")
    SegformerImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "teacher")
    _, measured = run(
        "run_semantic_segmentation_distillation.py",
        tmp_path / "student",
        teacher=tmp_path / "teacher",
        student_init_kwargs={"depths": [1, 1, 1, 1], "hidden_sizes": [4, 4, 8, 8]},
        train_dir=write_segmentation(tmp_path / "images"),
    )
    assert 0 <= measured["eval_mean_iou"] <= 1 and 0 <= measured["eval_overall_accuracy"] <= 1
    student = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "student")
    assert student.config.hidden_sizes == [4, 4, 8, 8] and student.config.id2label == labels["id2label"]


@pytest.mark.extended
def test_conversations_about_images(tmp_path):
    FAMILIES["llava"].save(tmp_path / "teacher")
    run(
        "run_image_text_to_text_distillation.py",
        tmp_path / "student",
        teacher=tmp_path / "teacher",
        student_init_kwargs={"text_config": {"num_hidden_layers": 2}},
        train_file=write_conversations(tmp_path / "data", 8),
        validation_split_percentage=25,
    )
    student = AutoModelForImageTextToText.from_pretrained(tmp_path / "student")
    assert student.config.text_config.num_hidden_layers == 2
    assert AutoProcessor.from_pretrained(tmp_path / "student").chat_template
