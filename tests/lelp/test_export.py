"""The three export formats: each loads without hf_guide, and outputs exactly what it states."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    BertTokenizer,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    DeiTConfig,
    DeiTForImageClassification,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    ViTImageProcessor,
    pipeline,
)

import hf_guide
from hf_guide import DistillationTrainer, from_teacher, save_subclass_student
from hf_guide.distillation.subclass_logits import class_logits
from hf_guide.errors import OptionError, TaskError
from hf_guide.hub.metadata import SUBCLASS_HEAD_AGREEMENT, load_record
from hf_guide.lelp.export import refit_class_head, with_class_logits
from tests.distillation.small import CLASSES, collate, examples_for, model_for
from tests.distillation.test_trainer import arguments
from tests.initialization.test_subclass_head import IMAGE, TEXT, logits_of
from tests.lelp.test_collator import NAMES, SUBCLASSES, teacher_of
from tests.lelp.test_loss import some_targets, student_of, with_targets
from tests.tiny import KINDS

LABELLED: dict[str, Any] = {
    "id2label": {
        number: f"{NAMES[number // SUBCLASSES]}/{number % SUBCLASSES}" for number in range(CLASSES * SUBCLASSES)
    },
    "num_subclasses": SUBCLASSES,
}
AUTO = {TEXT: AutoModelForSequenceClassification, IMAGE: AutoModelForImageClassification}


def classes_of(student: PreTrainedModel, task: str) -> Tensor:
    return class_logits(logits_of(student, task), SUBCLASSES)


def logits_without_hf_guide(folder: Path, task: str, count: int, scratch: Path) -> Tensor:
    """Return the logits of a saved model in a new process that cannot import hf_guide and saves the model again."""
    batch = {name: value for name, value in collate(examples_for(task, count)).items() if name != "labels"}
    torch.save(batch, scratch / "batch.pt")
    program = f"""
import sys
sys.modules["hf_guide"] = None  # importing it fails
import torch, transformers
model = transformers.{AUTO[task].__name__}.from_pretrained({str(folder)!r}, trust_remote_code=True).eval()
with torch.no_grad():
    logits = model(**torch.load({str(scratch / "batch.pt")!r})).logits
model.save_pretrained({str(scratch / "again")!r})
torch.save(logits, {str(scratch / "logits.pt")!r})
"""
    environment = {"HF_MODULES_CACHE": str(scratch / "modules"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", program], check=True, cwd=scratch, env=os.environ | environment)
    return torch.load(scratch / "logits.pt")


@pytest.mark.parametrize("task", [TEXT, IMAGE])
def test_with_remote_code_class_logits_are_exact(task: str, tmp_path: Path) -> None:
    student = student_of(task)
    published = save_subclass_student(student, tmp_path, "remote_code")
    assert torch.equal(logits_of(published, task), classes_of(student, task))
    again = (
        hf_guide.SubclassModelForSequenceClassification
        if task == TEXT
        else hf_guide.SubclassModelForImageClassification
    )
    loaded = again.from_pretrained(tmp_path)
    assert torch.equal(logits_of(loaded, task), classes_of(student, task))
    assert loaded.config.id2label == dict(enumerate(NAMES)) and loaded.config.num_labels == CLASSES
    # Imported from hf_guide, the Auto classes know it without trust.
    assert torch.equal(logits_of(AUTO[task].from_pretrained(tmp_path), task), classes_of(student, task))
    batch = collate(examples_for(task, 6))
    torch.testing.assert_close(
        loaded.eval()(**batch).loss, torch.nn.functional.cross_entropy(classes_of(student, task), batch["labels"])
    )


@pytest.mark.extended
@pytest.mark.parametrize("task", [TEXT, IMAGE])
def test_the_remote_code_does_not_import_hf_guide(task: str, tmp_path: Path) -> None:
    student = student_of(task)
    save_subclass_student(student, tmp_path / "student", "remote_code")
    logits = logits_without_hf_guide(tmp_path / "student", task, 6, tmp_path)
    torch.testing.assert_close(logits, classes_of(student, task))
    # Saved again without hf_guide it is complete, too.
    assert (tmp_path / "again" / "modeling_subclass.py").is_file()
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("student", "again"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_text_pipelines_output_classes_or_subclasses(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(str, range(50))])
    )
    tokenizer = BertTokenizer(str(tmp_path / "vocab.txt"))
    student = student_of(TEXT)
    save_subclass_student(student, tmp_path / "remote_code", "remote_code", processing_class=tokenizer)
    save_subclass_student(student, tmp_path / "subclass_head", "subclass_head", processing_class=tokenizer)
    inputs = tokenizer("7 8 9", return_tensors="pt")
    with torch.no_grad():
        logits = student.eval()(**inputs).logits
    expected = class_logits(logits, SUBCLASSES).softmax(-1)[0]
    actual = pipeline("text-classification", model=str(tmp_path / "remote_code"), trust_remote_code=True)(
        "7 8 9", top_k=None
    )
    assert {each["label"]: each["score"] for each in actual} == pytest.approx(
        dict(zip(NAMES, expected.tolist(), strict=True)), rel=1e-5
    )
    named = pipeline("text-classification", model=str(tmp_path / "subclass_head"))("7 8 9")[0]
    best = int(logits.argmax())
    assert named["label"] == f"{NAMES[best // SUBCLASSES]}/{best % SUBCLASSES}"


def test_image_pipelines_output_classes(tmp_path: Path) -> None:
    from PIL import Image

    processor = ViTImageProcessor(size={"height": 8, "width": 8})
    save_subclass_student(student_of(IMAGE), tmp_path, "remote_code", processing_class=processor)
    actual = pipeline("image-classification", model=str(tmp_path), trust_remote_code=True)(
        Image.new("RGB", (8, 8), "red")
    )
    assert {each["label"] for each in actual} <= set(NAMES) and len(actual) == CLASSES
    assert isinstance(AutoImageProcessor.from_pretrained(tmp_path), ViTImageProcessor)


@pytest.mark.extended
def test_predictions_of_a_saved_model_equal_the_trainers(tmp_path: Path) -> None:
    examples = examples_for(TEXT, 16)
    data = with_targets(examples, some_targets(16))
    args = arguments(tmp_path / "out", losses="lelp", max_steps=3, learning_rate=0.1)
    trainer = DistillationTrainer(student_of(TEXT), args, collate, data, data)
    trainer.train()
    predicted = torch.tensor(trainer.predict(data).predictions)
    save_subclass_student(trainer.model, tmp_path / "remote_code", "remote_code")
    save_subclass_student(trainer.model, tmp_path / "subclass_head", "subclass_head")
    exact = AutoModelForSequenceClassification.from_pretrained(tmp_path / "remote_code")
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path / "subclass_head")
    assert type(stock).__module__.startswith("transformers.models.bert")
    torch.testing.assert_close(logits_of(exact, TEXT, 16), predicted)
    torch.testing.assert_close(class_logits(logits_of(stock, TEXT, 16), SUBCLASSES), predicted)
    assert torch.equal(logits_of(exact, TEXT, 16).argmax(-1), predicted.argmax(-1))
    remote_logits = logits_without_hf_guide(tmp_path / "remote_code", TEXT, 16, tmp_path)
    torch.testing.assert_close(remote_logits, predicted)
    assert torch.equal(remote_logits.argmax(-1), predicted.argmax(-1))


@pytest.mark.parametrize("task", [TEXT, IMAGE])
def test_a_head_of_one_row_a_class_is_refitted_and_its_agreement_is_recorded(
    task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student = student_of(task)
    examples, others = examples_for(task, 200), examples_for(task, 60, seed=4)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    model = save_subclass_student(
        student, tmp_path, "refit_head", dataset=examples, eval_dataset=others, data_collator=collate
    )
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    stock = AUTO[task].from_pretrained(tmp_path)
    assert type(stock) is type(student) and stock.config.id2label == dict(enumerate(NAMES))
    assert not hasattr(stock.config, "num_subclasses")
    assert torch.equal(logits_of(stock, task), logits_of(model, task))
    batch = {name: value for name, value in collate(others).items() if name != "labels"}
    with torch.no_grad():
        exact = class_logits(student.eval()(**batch).logits, SUBCLASSES).argmax(-1)
        actual = (stock.eval()(**batch).logits.argmax(-1) == exact).double().mean().item()
    reported = load_record(tmp_path).metrics[SUBCLASS_HEAD_AGREEMENT]
    assert reported == pytest.approx(actual) and 0.7 < actual <= 1
    assert f"{actual:.2%} of 60 examples" in capsys.readouterr().out
    assert SUBCLASS_HEAD_AGREEMENT.replace("_", " ") in (tmp_path / "README.md").read_text().replace("_", " ")


def test_equal_rows_are_refitted_exactly() -> None:
    """A class whose subclasses have one row has a log-sum-exp that is linear."""
    student = from_teacher(teacher_of(TEXT), num_subclasses=SUBCLASSES, show_progress=False)
    actual = refit_class_head(student, examples_for(TEXT, 100), data_collator=collate, show_progress=False)
    assert (actual.agreement, actual.examples) == (1.0, 20)
    exact = classes_of(student, TEXT).log_softmax(-1)
    torch.testing.assert_close(logits_of(actual.model, TEXT).log_softmax(-1), exact, rtol=2e-2, atol=2e-2)


def test_a_head_without_a_bias_is_refitted_without(tmp_path: Path) -> None:
    kind = "llama classifier" if "llama classifier" in KINDS else None
    from tests.signal_cache.tiny_teachers import TEACHERS, Pad
    from tests.signal_cache.tiny_teachers import examples_for as decoder_examples

    teacher = (KINDS[kind] if kind else TEACHERS["sequence-classification of a decoder"]).teacher()
    student = from_teacher(teacher, num_subclasses=2, show_progress=False)
    examples = decoder_examples("sequence-classification", 60)
    actual = refit_class_head(student, examples, data_collator=Pad(), show_progress=False)
    assert actual.model.score.bias is None and actual.model.score.out_features == teacher.config.num_labels
    assert actual.agreement == 1.0


FAMILIES = {
    "deberta": lambda: DebertaV2ForSequenceClassification(
        DebertaV2Config(
            vocab_size=60, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, **LABELLED
        )
    ),
    "resnet": lambda: ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], **LABELLED)
    ),
    "deit": lambda: DeiTForImageClassification(
        DeiTConfig(
            image_size=8,
            patch_size=4,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            **LABELLED,
        )
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_remote_code_saves_families_without_sdpa_or_with_several_heads(family: str, tmp_path: Path) -> None:
    student = FAMILIES[family]().eval()
    task = TEXT if family == "deberta" else IMAGE
    save_subclass_student(student, tmp_path, "remote_code")
    loaded = AUTO[task].from_pretrained(tmp_path)
    assert loaded.config._attn_implementation == student.config._attn_implementation
    assert torch.equal(logits_of(loaded, task), class_logits(logits_of(student, task), SUBCLASSES))


def test_remote_code_follows_dtype_and_return_dict(tmp_path: Path) -> None:
    student = student_of(TEXT)
    save_subclass_student(student, tmp_path, "remote_code")
    load = AutoModelForSequenceClassification.from_pretrained
    assert {each.dtype for each in load(tmp_path, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}
    assert {each.dtype for each in load(tmp_path).parameters()} == {torch.float32}
    inputs = {name: value for name, value in collate(examples_for(TEXT, 6)).items() if name != "labels"}
    (logits,) = load(tmp_path).eval()(**inputs, return_dict=False)
    assert torch.equal(logits, classes_of(student, TEXT))
    with pytest.raises(ValueError, match="labels; the student that it contains has"):
        load(tmp_path, num_labels=CLASSES + 1)


def test_the_card_of_a_trainers_student_describes_its_run_and_labels(tmp_path: Path) -> None:
    examples = examples_for(TEXT, 16)
    data = with_targets(examples, some_targets(16))
    student = from_teacher(teacher_of(TEXT), num_subclasses=SUBCLASSES, show_progress=False)
    args = arguments(tmp_path / "out", losses="lelp", max_steps=2)
    trainer = DistillationTrainer(student, args, collate, data, data)
    trainer.train()
    cards = {}
    for export_format in ("remote_code", "subclass_head", "refit_head"):
        more: dict[str, Any] = {"dataset": examples, "data_collator": collate} if export_format == "refit_head" else {}
        save_subclass_student(trainer, tmp_path / export_format, export_format, show_progress=False, **more)
        cards[export_format] = (tmp_path / export_format / "README.md").read_text()
        assert "`lelp`" in cards[export_format] and "2 steps" in cards[export_format]
    assert "Its labels are classes" in cards["remote_code"]
    assert f"Its labels are {SUBCLASSES} pseudo-subclasses of each class" in cards["subclass_head"]
    assert "refitted to one row per class" in cards["refit_head"]


@pytest.fixture
def distilled(tmp_path: Path) -> Path:
    """Return the folder of a student with subclasses that a trainer has trained, evaluated and saved."""
    data = with_targets(examples_for(TEXT, 16), some_targets(16))
    student = from_teacher(teacher_of(TEXT), num_subclasses=SUBCLASSES, show_progress=False)
    args = arguments(tmp_path / "run", losses="lelp", max_steps=2, eval_strategy="steps", eval_steps=2)
    trainer = DistillationTrainer(student, args, collate, data, data)
    trainer.train()
    trainer.save_model()
    return tmp_path / "run"


@pytest.mark.parametrize("split", ["held out", "eval_dataset"])
def test_a_refitted_head_has_no_metrics_of_the_head_that_it_replaces(
    split: str, distilled: Path, tmp_path: Path
) -> None:
    student = AutoModelForSequenceClassification.from_pretrained(distilled)
    former = load_record(distilled)
    assert former.metrics["eval_loss"] and former.teacher_metrics == {}
    others = examples_for(TEXT, 30, seed=4) if split == "eval_dataset" else None
    options: dict[str, Any] = {"dataset": examples_for(TEXT, 40), "eval_dataset": others, "data_collator": collate}
    save_subclass_student(student, tmp_path / "export", "refit_head", show_progress=False, **options)
    record = load_record(tmp_path / "export")
    assert list(record.metrics) == [SUBCLASS_HEAD_AGREEMENT] and record.losses == former.losses
    name = "the refit's eval_dataset (30 examples)" if others else "held-out 20% of the refit's dataset (8 examples)"
    assert record.evaluated_on == name
    table = [line for line in (tmp_path / "export" / "README.md").read_text().splitlines() if line.startswith("| ")]
    assert len(table) == 2 and name in table[1] and "agreement" in table[1]


@pytest.mark.parametrize("export_format", ["remote_code", "subclass_head"])
def test_an_export_that_computes_the_same_keeps_the_metrics(
    export_format: str, distilled: Path, tmp_path: Path
) -> None:
    student = AutoModelForSequenceClassification.from_pretrained(distilled)
    save_subclass_student(student, tmp_path / "export", export_format)
    former, record = load_record(distilled), load_record(tmp_path / "export")
    assert record.metrics == former.metrics and record.trainings == former.trainings
    with torch.no_grad():
        student.classifier.weight.add_(1.0)
    del student.distillation_record
    save_subclass_student(student, tmp_path / "changed", export_format)
    record = load_record(tmp_path / "changed")
    assert not record.metrics and record.trainings == former.trainings, "the student is not the one of its folder"


def test_an_export_of_another_format_removes_the_code_of_the_one_before(tmp_path: Path) -> None:
    student = student_of(TEXT)
    save_subclass_student(student, tmp_path, "remote_code")
    code = tmp_path / "modeling_subclass.py"
    assert code.is_file()
    save_subclass_student(student, tmp_path, "subclass_head")
    assert not code.exists()
    code.write_text("# Mine.\n")
    save_subclass_student(student, tmp_path, "subclass_head")
    assert code.read_text() == "# Mine.\n"


def test_without_a_record_the_card_describes_no_training(tmp_path: Path) -> None:
    student = from_teacher(teacher_of(TEXT), num_subclasses=SUBCLASSES, show_progress=False)
    options: dict[str, Any] = {"dataset": examples_for(TEXT, 16), "data_collator": collate, "show_progress": False}
    save_subclass_student(student, tmp_path, "refit_head", **options)
    card = (tmp_path / "README.md").read_text()
    assert "distilled from" not in card and "## Training" not in card and "refitted" in card


def test_the_card_states_how_to_load_it(tmp_path: Path) -> None:
    student = from_teacher(teacher_of(TEXT), num_subclasses=SUBCLASSES, show_progress=False)
    save_subclass_student(student, tmp_path / "remote_code", "remote_code")
    card = (tmp_path / "remote_code" / "README.md").read_text()
    assert "AutoModelForSequenceClassification.from_pretrained" in card and "trust_remote_code=True" in card
    assert "stock Transformers model" not in card
    save_subclass_student(student, tmp_path / "subclass_head", "subclass_head")
    assert "trust_remote_code" not in (tmp_path / "subclass_head" / "README.md").read_text()
    config = (tmp_path / "remote_code" / "config.json").read_text()
    assert str(tmp_path) not in config and json.loads(config)["auto_map"]
    assert (tmp_path / "remote_code" / "initialization_report.json").is_file()


def test_invalid_arguments_of_a_save_raise(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="has no subclasses"):
        save_subclass_student(model_for(TEXT, 1), tmp_path)
    student: Any = student_of(TEXT)
    with pytest.raises(TaskError, match="outputs class logits already"):
        save_subclass_student(with_class_logits(student), tmp_path)
    with pytest.raises(OptionError, match="must be a PreTrainedModel; found a dict"):
        save_subclass_student({}, tmp_path)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="'remote-code'.*Did you mean 'remote_code'"):
        save_subclass_student(student, tmp_path, "remote-code")
    with pytest.raises(OptionError, match="pass dataset="):
        save_subclass_student(student, tmp_path, "refit_head")
    with pytest.raises(OptionError, match="too few"):
        refit_class_head(student, examples_for(TEXT, 4), data_collator=collate, show_progress=False)
    with pytest.raises(OptionError, match="above 0 and below 1"):
        refit_class_head(student, examples_for(TEXT, 40), data_collator=collate, held_out=1.0, show_progress=False)
    with pytest.raises(OptionError, match="empty"):
        refit_class_head(student, [], data_collator=collate, show_progress=False)
    assert with_class_logits(student).student is student
