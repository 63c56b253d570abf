"""The names of an earlier release still work, and warn with the new name."""

import pytest
import torch

from hf_guide import SubclassLabelCollator, SubclassProjector, fit_subclasses
from hf_guide.distillation.subclass_logits import TARGETS_KEY
from tests.distillation.small import collate, examples_for
from tests.lelp.synthetic_data import SUBCLASSES, make_embeddings
from tests.lelp.test_collator import COUNT, TEXT, projector_of, teacher_of


def test_subclass_labels_are_fine_labels() -> None:
    data = make_embeddings()
    arrays = (data.embeddings, data.labels, data.weight, SUBCLASSES)
    expected = SubclassProjector.fit(*arrays, splitter="labels", fine_labels=data.fine_labels)
    with pytest.warns(FutureWarning, match="'subclass_labels' is deprecated; use 'fine_labels'"):
        projector = SubclassProjector.fit(*arrays, splitter="labels", subclass_labels=data.fine_labels)
    targets = expected.transform(data.embeddings, data.logits, data.fine_labels)
    with pytest.warns(FutureWarning, match="use 'fine_labels'"):
        renamed = projector.transform(data.embeddings, data.logits, subclass_labels=data.fine_labels)
    assert torch.equal(renamed, targets)


def test_the_column_of_fine_labels() -> None:
    teacher, examples = teacher_of(TEXT), examples_for(TEXT, COUNT)
    rows = [row | {"fine": number % 10} for number, row in enumerate(examples)]
    options = {"splitter": "labels", "data_collator": collate, "show_progress": False}
    with pytest.warns(FutureWarning, match="'subclass_label_column' is deprecated; use 'fine_label_column'"):
        projector = fit_subclasses(teacher, rows, 10, subclass_label_column="fine", **options)
    collator = SubclassLabelCollator(projector, collate, teacher=teacher)
    expected = collator([row | {"fine_labels": row["fine"]} for row in rows[:6]])
    with pytest.warns(FutureWarning, match="'subclass_labels' is deprecated; use 'fine_labels'"):
        batch = collator([row | {"subclass_labels": row["fine"]} for row in rows[:6]])
    assert torch.equal(batch[TARGETS_KEY], expected[TARGETS_KEY]) and "subclass_labels" not in batch


def test_members_of_a_projector() -> None:
    projector = projector_of(teacher_of(TEXT), examples_for(TEXT, COUNT))
    with pytest.warns(FutureWarning, match="'at' is deprecated; use 'with_temperature'"):
        changed = projector.at(subclass_temperature=0.5)
    assert changed.settings() == projector.with_temperature(subclass_temperature=0.5).settings()
    with pytest.warns(FutureWarning, match="use 'explained_variance_ratio'"):
        assert torch.equal(projector.explained, projector.explained_variance_ratio)
