"""The sources of a batch's subclass probabilities: teacher, capture, targets and trainer give the same."""

import copy
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from transformers import PreTrainedModel

from hf_guide import Capture, DistillationTrainer, SubclassProjector, capture_teacher
from hf_guide.distillation.subclass_logits import TARGETS_KEY
from hf_guide.errors import CaptureError, OptionError, SubclassError, TaskError, VocabularyError
from hf_guide.lelp.collator import SubclassLabelCollator
from hf_guide.lelp.targets import capture_targets
from hf_guide.models.penultimate import capture_head_inputs, find_classifier
from hf_guide.tasks import task_of
from hf_guide.utils.labels import subclass_names
from tests.distillation.small import CLASSES, collate, examples_for, model_for
from tests.distillation.test_trainer import arguments, step_of
from tests.lelp.test_loss import student_of, with_targets

SUBCLASSES, COUNT = 3, 48
TEXT, IMAGE = "sequence-classification", "image-classification"
NAMES = [f"class {number}" for number in range(CLASSES)]


def teacher_of(task: str, seed: int = 2) -> PreTrainedModel:
    teacher = model_for(task, seed).eval()
    teacher.config.id2label = dict(enumerate(NAMES))
    return teacher


def run_teacher(teacher: PreTrainedModel, examples: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
    """Return embeddings and logits, one example after the other."""
    inputs = [{name: value for name, value in collate([each]).items() if name != "labels"} for each in examples]
    with torch.no_grad(), capture_head_inputs(find_classifier(teacher, task_of(teacher))) as fed:
        logits = [teacher(**each).logits for each in inputs]
    return torch.cat(fed), torch.cat(logits)


def projector_of(teacher: PreTrainedModel, examples: list[dict[str, Any]], **options: Any) -> SubclassProjector:
    from hf_guide.utils.fingerprint import weights_fingerprint

    embeddings, logits = run_teacher(teacher, examples)
    labels = torch.arange(len(examples)) % CLASSES
    weight = find_classifier(teacher, task_of(teacher)).weight
    plain: dict[str, Any] = {"id2label": NAMES, "temperature": 2.0, "num_subclasses": SUBCLASSES}
    actual = SubclassProjector.fit(embeddings, labels, weight.detach(), logits=logits, **(plain | options))
    import dataclasses

    return dataclasses.replace(actual, teacher_fingerprint=weights_fingerprint(teacher), teacher="tests/teacher")


def expected_of(projector: SubclassProjector, teacher: PreTrainedModel, examples: list[dict[str, Any]]) -> Tensor:
    return projector.transform(*run_teacher(teacher, examples)).flatten(1)


@pytest.mark.parametrize("task", [TEXT, IMAGE])
def test_teacher_capture_and_targets_give_the_same_probabilities(task: str, tmp_path: Path) -> None:
    examples, teacher = examples_for(task, COUNT), teacher_of(task)
    projector = projector_of(teacher, examples)
    unlabelled = [{name: value for name, value in each.items() if name != "labels"} for each in examples]
    config = {"save_penultimate": True, "hidden_dtype": "float32", "shard_size": 20}
    capture = capture_teacher(
        teacher, unlabelled, tmp_path / "capture", data_collator=collate, config=config, show_progress=False
    )
    options = {"config": {"shard_size": 20}, "show_progress": False, "data_collator": collate}
    run = capture_targets(projector, teacher, unlabelled, tmp_path / "run", **options)
    converted = capture_targets(projector, capture, None, tmp_path / "converted")
    chosen = [examples[number] for number in (40, 3, 17, 8)]
    expected = expected_of(projector, teacher, chosen)
    for source in (
        {"teacher": teacher},
        {"capture": capture},
        {"capture": run},
        {"capture": str(tmp_path / "converted")},
    ):
        batch = SubclassLabelCollator(projector, collate, **source)(chosen)
        assert batch["labels"].tolist() == [each["labels"] for each in chosen]
        torch.testing.assert_close(batch[TARGETS_KEY], expected, rtol=1e-4, atol=1e-6)
        assert not batch[TARGETS_KEY].is_inference()
    assert len(converted) == len(run) == COUNT
    # S * C numbers an example and its key: the embedding is not stored.
    assert converted.manifest.example_bytes(12) == 16 + 4 * SUBCLASSES * CLASSES


@pytest.mark.sampled(3)
@pytest.mark.parametrize("task", [TEXT, IMAGE])
@pytest.mark.parametrize(
    "way", ["the trainer's teacher", "the trainer's capture", "the collator's teacher", "targets"]
)
def test_a_student_learns_the_same_from_every_source(task: str, way: str, tmp_path: Path) -> None:
    examples, teacher = examples_for(task, 8), teacher_of(task)
    projector = projector_of(teacher, examples_for(task, COUNT, seed=1))
    plain = with_targets(examples, expected_of(projector, teacher, examples))
    before = {name: value.clone() for name, value in student_of(task).state_dict().items()}
    args = arguments(tmp_path / "out", losses="lelp", temperature=2.0)
    by_column = DistillationTrainer(student_of(task), args, collate, plain)
    by_column.train()
    source: dict[str, Any] = {}
    config = {"save_penultimate": True, "hidden_dtype": "float32"}
    options_of_capture: dict[str, Any] = {"data_collator": collate, "show_progress": False}
    if way == "the trainer's teacher":
        collator, source = SubclassLabelCollator(projector, collate), {"teacher": teacher}
    elif way == "the trainer's capture":
        capture = capture_teacher(teacher, examples, tmp_path / "capture", config=config, **options_of_capture)
        collator, source = SubclassLabelCollator(projector, collate), {"teacher": capture}
    elif way == "the collator's teacher":
        collator = SubclassLabelCollator(projector, collate, teacher=teacher)
    else:
        collator = SubclassLabelCollator(
            projector,
            collate,
            capture=capture_targets(projector, teacher, examples, tmp_path / "targets", **options_of_capture),
        )
    trainer = DistillationTrainer(student_of(task), args, collator, examples, **source)
    trainer.train()
    expected, actual = step_of(by_column.model, before), step_of(trainer.model, before)
    assert expected.norm() > 0 and (actual - expected).norm() < 1e-4 * expected.norm()


def test_classes_are_aligned_by_name(tmp_path: Path) -> None:
    examples, teacher = examples_for(TEXT, 8), teacher_of(TEXT)
    projector = projector_of(teacher, examples_for(TEXT, COUNT, seed=1))
    order = [2, 0, 4, 1, 3]
    student = student_of(TEXT)
    student.config.id2label = dict(enumerate(subclass_names([NAMES[number] for number in order], SUBCLASSES)))
    shuffled = expected_of(projector, teacher, examples).view(-1, CLASSES, SUBCLASSES)[:, order].flatten(1)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    args = arguments(tmp_path, losses="lelp", temperature=2.0)
    by_column = DistillationTrainer(copy.deepcopy(student), args, collate, with_targets(examples, shuffled))
    by_column.train()
    for collator, source in (
        (SubclassLabelCollator(projector, collate), teacher),
        (SubclassLabelCollator(projector, collate, teacher=teacher), None),
    ):
        trainer = DistillationTrainer(copy.deepcopy(student), args, collator, examples, teacher=source)
        trainer.train()
        expected = step_of(by_column.model, before)
        assert (step_of(trainer.model, before) - expected).norm() < 1e-4 * expected.norm()
    # The collator of one trainer may be another's, too: it learns nothing of the order.
    shared = SubclassLabelCollator(projector, collate, teacher=teacher)
    first = DistillationTrainer(student_of(TEXT), args, shared, examples, examples)
    known = first.evaluate()["eval_lelp"]
    DistillationTrainer(copy.deepcopy(student), args, shared, examples)
    assert first.evaluate()["eval_lelp"] == known
    student.config.id2label = dict(enumerate(subclass_names(list("abcde"), SUBCLASSES)))
    with pytest.raises(VocabularyError, match="aligned by name"):
        DistillationTrainer(student, args, SubclassLabelCollator(projector, collate, teacher=teacher), examples)


def test_a_stream_of_labeled_and_unlabeled_examples_is_learned(tmp_path: Path) -> None:
    examples, teacher = examples_for(TEXT, 24), teacher_of(TEXT)
    projector = projector_of(teacher, examples_for(TEXT, COUNT, seed=1))
    for number, each in enumerate(examples[::2]):
        each["labels"] = (-100, -1, None)[number % 3]
    stream = datasets.Dataset.from_list(examples).to_iterable_dataset(num_shards=2)
    args = arguments(tmp_path, losses={"ce": 0.5, "lelp": 0.5}, temperature=2.0, max_steps=3)
    collator = SubclassLabelCollator(projector, collate)
    trainer = DistillationTrainer(
        student_of(TEXT), args, collator, stream, datasets.Dataset.from_list(examples[1::2]), teacher=teacher
    )
    trainer.train()
    assert all(np.isfinite(each["lelp"]) for each in trainer.state.log_history if "lelp" in each)
    actual = trainer.evaluate()
    assert actual["eval_lelp"] > 0 and "eval_teacher_agreement" in actual


def test_targets_are_read_in_workers(tmp_path: Path) -> None:
    examples, teacher = examples_for(TEXT, 16), teacher_of(TEXT)
    projector = projector_of(teacher, examples_for(TEXT, COUNT, seed=1))
    targets = capture_targets(
        projector, teacher, examples, tmp_path / "targets", data_collator=collate, show_progress=False
    )
    args = arguments(tmp_path / "out", losses="lelp", temperature=2.0, dataloader_num_workers=1, max_steps=2)
    trainer = DistillationTrainer(
        student_of(TEXT), args, SubclassLabelCollator(projector, collate, capture=targets), examples
    )
    trainer.train()
    assert trainer.state.log_history[0]["lelp"] > 0
    running = SubclassLabelCollator(projector, collate, teacher=teacher)
    with pytest.raises(OptionError, match="dataloader_num_workers=0"):
        DistillationTrainer(student_of(TEXT), args, running, examples).train()


@pytest.mark.extended
def test_evaluation_examples_need_not_be_captured(tmp_path: Path) -> None:
    examples, teacher = examples_for(TEXT, 16), teacher_of(TEXT)
    projector = projector_of(teacher, examples_for(TEXT, COUNT, seed=1))
    targets = capture_targets(
        projector, teacher, examples[:8], tmp_path / "targets", data_collator=collate, show_progress=False
    )
    args = arguments(tmp_path / "out", losses="lelp", temperature=2.0)
    collator = SubclassLabelCollator(projector, collate, capture=targets)
    trainer = DistillationTrainer(student_of(TEXT), args, collator, examples[:8], examples[8:])
    trainer.train()
    actual = trainer.evaluate()
    assert actual["eval_loss"] == pytest.approx(actual["eval_ce"])
    with pytest.raises(CaptureError, match="has an example that is not in"):
        DistillationTrainer(student_of(TEXT), args, collator, examples[8:]).train()
    with pytest.raises(CaptureError, match="SubclassLabelCollator"):
        DistillationTrainer(student_of(TEXT), args, collate, examples[:8], teacher=targets)


def test_a_teacher_may_read_other_inputs_than_the_student(tmp_path: Path) -> None:
    """An image teacher for a student of text: pairs of both."""
    images, texts, teacher = examples_for(IMAGE, 16), examples_for(TEXT, 16), teacher_of(IMAGE)
    projector = projector_of(teacher, examples_for(IMAGE, COUNT, seed=1))
    pairs = [text | {"pixel_values": image["pixel_values"]} for text, image in zip(texts, images, strict=True)]

    def only(*names: str) -> Any:
        return lambda features: collate([{name: each[name] for name in names} for each in features])

    collator = SubclassLabelCollator(
        projector,
        only("input_ids", "attention_mask", "labels"),
        teacher=teacher,
        teacher_collator=only("pixel_values"),
    )
    torch.testing.assert_close(
        collator(pairs)[TARGETS_KEY], expected_of(projector, teacher, images), rtol=1e-4, atol=1e-6
    )
    args = arguments(tmp_path, losses="lelp", temperature=2.0, remove_unused_columns=False)
    DistillationTrainer(student_of(TEXT), args, collator, pairs).train()
    args = arguments(tmp_path, losses="lelp", temperature=2.0)
    with pytest.raises(OptionError, match="remove_unused_columns=False"):
        DistillationTrainer(student_of(TEXT), args, collator, pairs)


def test_a_teacher_of_another_library_teaches_by_a_column(tmp_path: Path) -> None:
    """scikit-learn's logistic regression on features that the student never sees."""
    examples = examples_for(TEXT, 60)
    features = np.random.default_rng(0).normal(size=(60, 12))
    labels = np.arange(60) % CLASSES
    teacher = LogisticRegression().fit(features, labels)
    logits = teacher.decision_function(features)
    projector = SubclassProjector.fit(features, labels, teacher.coef_, SUBCLASSES)
    rows = datasets.Dataset.from_list(examples).add_column(
        TARGETS_KEY, projector.transform(features, logits).flatten(1).tolist()
    )
    trainer = DistillationTrainer(
        student_of(TEXT), arguments(tmp_path, losses="lelp", max_steps=2), collate_columns, rows
    )
    trainer.train()
    assert trainer.state.log_history[0]["lelp"] > 0
    # So it does where the collator could make them, and there is no teacher to make them of.
    args = arguments(tmp_path, losses="lelp", max_steps=1)
    collator = SubclassLabelCollator(projector, collate_columns)
    DistillationTrainer(student_of(TEXT), args, collator, rows).train()
    with pytest.raises(OptionError, match=f"there are 0.*the column {TARGETS_KEY}"):
        DistillationTrainer(student_of(TEXT), args, collator, rows.remove_columns(TARGETS_KEY))
    tripled = rows.map(lambda row: {TARGETS_KEY: [3 * share for share in row[TARGETS_KEY]]})
    with pytest.raises(TaskError, match="no probabilities: they sum to 3"):
        DistillationTrainer(student_of(TEXT), args, collate_columns, tripled).train()


def collate_columns(features: list[dict[str, Any]]) -> dict[str, Tensor]:
    return collate([each | {TARGETS_KEY: torch.tensor(each[TARGETS_KEY])} for each in features])


def test_fine_labels_reach_a_projector_that_splits_by_them(tmp_path: Path) -> None:
    examples, teacher = examples_for(TEXT, COUNT), teacher_of(TEXT)
    labels = torch.arange(COUNT) % CLASSES
    fine_labels = labels * SUBCLASSES + torch.arange(COUNT) // CLASSES % SUBCLASSES
    embeddings, logits = run_teacher(teacher, examples)
    projector = SubclassProjector.fit(
        embeddings,
        labels,
        find_classifier(teacher, task_of(teacher)).weight.detach(),
        SUBCLASSES,
        splitter="labels",
        fine_labels=fine_labels,
        id2label=NAMES,
    )
    rows = [each | {"fine_labels": int(label)} for each, label in zip(examples, fine_labels, strict=True)]
    expected = projector.transform(embeddings[:8], logits[:8], fine_labels[:8]).flatten(1)
    actual = SubclassLabelCollator(projector, collate, teacher=teacher)(rows[:8])
    assert "fine_labels" not in actual
    torch.testing.assert_close(actual[TARGETS_KEY], expected, rtol=1e-4, atol=1e-6)
    before = {name: value.clone() for name, value in student_of(TEXT).state_dict().items()}
    args = arguments(tmp_path / "out", losses="lelp")
    steps = []
    data = with_targets(examples[:8], expected)
    for collator, options_of_capture, source in (
        (collate, data, None),
        (SubclassLabelCollator(projector, collate), datasets.Dataset.from_list(rows[:8]), teacher),
    ):
        trainer = DistillationTrainer(student_of(TEXT), args, collator, options_of_capture, teacher=source)
        trainer.train()
        steps.append(step_of(trainer.model, before))
    assert (steps[0] - steps[1]).norm() < 1e-4 * steps[0].norm()
    targets = capture_targets(projector, teacher, rows, tmp_path / "t", data_collator=collate, show_progress=False)
    read = SubclassLabelCollator(projector, collate, capture=targets)(rows[:8])
    torch.testing.assert_close(read[TARGETS_KEY], expected, rtol=1e-4, atol=1e-6)


def test_a_tokenizer_pads_and_an_image_processor_stacks() -> None:
    from transformers import ViTImageProcessor

    teacher = teacher_of(IMAGE)
    projector = projector_of(teacher, examples_for(IMAGE, COUNT))
    batch = SubclassLabelCollator(projector, ViTImageProcessor(), teacher=teacher)(examples_for(IMAGE, 4))
    assert batch["pixel_values"].shape == (4, 3, 8, 8) and batch[TARGETS_KEY].shape == (4, CLASSES * SUBCLASSES)


def test_mismatched_student_teacher_projector_or_capture_raises(tmp_path: Path) -> None:
    examples, teacher = examples_for(TEXT, 8), teacher_of(TEXT)
    projector = projector_of(teacher, examples_for(TEXT, COUNT, seed=1))
    args = arguments(tmp_path / "out", losses="lelp", temperature=2.0)

    def train(student: Any = None, args: Any = args, collator: Any = None, **options: Any) -> None:
        collator = collator or SubclassLabelCollator(projector, collate)
        DistillationTrainer(student or student_of(TEXT), args, collator, examples, **options)

    with pytest.raises(SubclassError, match="The student has 10 outputs, 2 for each class.*num_subclasses=3"):
        train(student_of(TEXT, 2), teacher=teacher)
    with pytest.raises(OptionError, match="temperature=1.0, but the projector.*at 2.0"):
        train(args=arguments(tmp_path, losses="lelp"), teacher=teacher)
    with pytest.raises(SubclassError, match="of another teacher"):
        train(teacher=teacher_of(TEXT, 3))
    with pytest.raises(SubclassError, match="of another teacher"):
        SubclassLabelCollator(projector, collate, teacher=teacher_of(TEXT, 3))
    with pytest.raises(OptionError, match="the signals of one teacher; there are 0"):
        train()
    with pytest.raises(OptionError, match="a capture were both given"):
        SubclassLabelCollator(projector, collate, teacher=teacher, capture="here")
    with pytest.raises(OptionError, match="teacher_collator"):
        SubclassLabelCollator(projector, collate, teacher_collator=collate)
    with pytest.raises(OptionError, match="found a int"):
        SubclassLabelCollator(projector, 3)
    with pytest.raises(
        OptionError, match=r"first argument must be .*; found a function. Call SubclassLabelCollator\(projector"
    ):
        SubclassLabelCollator(collate, projector)  # type: ignore[arg-type]
    student = student_of(TEXT)
    del student.config.num_subclasses
    with pytest.raises(VocabularyError, match="subclasses of each class.*num_subclasses=3"):
        train(student, teacher=teacher)
    options_of_capture: dict[str, Any] = {"data_collator": collate, "show_progress": False}
    bare = capture_teacher(teacher, examples, tmp_path / "bare", **options_of_capture)
    with pytest.raises(SubclassError, match="holds no embeddings.*'save_penultimate': True"):
        SubclassLabelCollator(projector, collate, capture=bare)
    targets = capture_targets(projector, teacher, examples, tmp_path / "targets", **options_of_capture)
    with pytest.raises(SubclassError, match="of another projector, with .*temperature 2.0"):
        SubclassLabelCollator(projector.with_temperature(temperature=1.0), collate, capture=targets)
    with pytest.raises(CaptureError, match="was begun with other settings"):
        capture_targets(
            projector.with_temperature(temperature=1.0), teacher, examples, tmp_path / "targets", **options_of_capture
        )
    assert isinstance(
        capture_targets(projector, teacher, examples, tmp_path / "targets", **options_of_capture), Capture
    )
    with pytest.raises(OptionError, match="needs a map-style dataset"):
        capture_targets(projector, teacher, None, tmp_path / "none")


def test_a_collators_teacher_that_shares_parameters_with_the_student_raises(tmp_path: Path) -> None:
    examples, teacher, student = examples_for(TEXT, COUNT), teacher_of(TEXT), student_of(TEXT)
    collator = SubclassLabelCollator(projector_of(teacher, examples), collate, teacher=teacher)
    student.bert = teacher.bert
    args = arguments(tmp_path, losses="lelp", temperature=2.0)
    with pytest.raises(OptionError, match=r"shares \d+ of its tensors.*bert"):
        DistillationTrainer(student, args, collator, examples)
