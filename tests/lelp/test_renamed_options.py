"""The names of an earlier release still work, and warn with the new name."""

import pytest
import torch

from hf_guide import SubclassLabelCollator, SubclassProjector, fit_subclasses, save_subclass_student
from hf_guide.cli import analyze_subclasses
from hf_guide.cli.main import main
from hf_guide.distillation.subclass_logits import TARGETS_KEY
from tests.distillation.small import collate, examples_for
from tests.lelp.synthetic_data import SUBCLASSES, make_embeddings
from tests.lelp.test_collator import COUNT, TEXT, projector_of, teacher_of
from tests.lelp.test_loss import student_of


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


def test_the_way_of_a_saved_student_is_its_export_format(tmp_path) -> None:
    with pytest.warns(FutureWarning, match="'way' is deprecated; use 'export_format'"):
        save_subclass_student(student_of(TEXT), tmp_path / "named", way="subclass_head")
    with pytest.warns(FutureWarning, match="export_format='subclasses' is deprecated; use 'subclass_head'"):
        save_subclass_student(student_of(TEXT), tmp_path / "by position", "subclasses")
    with pytest.warns(FutureWarning, match="export_format='code' is deprecated; use 'remote_code'"):
        save_subclass_student(student_of(TEXT), tmp_path / "code", export_format="code")
    assert (tmp_path / "code" / "modeling_subclass.py").is_file()


def test_the_command_and_its_flags(monkeypatch) -> None:
    parsed = []
    monkeypatch.setattr(analyze_subclasses, "run", lambda args: parsed.append(args) or 0)
    with pytest.warns(FutureWarning) as caught:
        main(["subclasses", "p", "d", "--finer-column", "x", "--nearest", "3", "--max-examples", "9", "--no-forecast"])
    main(["analyze-subclasses", "p", "d"])
    names = ("fine_label_column", "num_examples", "max_samples", "no_probe")
    assert [tuple(getattr(args, name) for name in names) for args in parsed] == [
        ("x", 3, 9, True),
        (None, 6, 4000, False),
    ]
    texts = " ".join(str(warning.message) for warning in caught).replace("_", "-")
    for new in ("analyze-subclasses", "fine-label-column", "num-examples", "max-samples", "no-probe"):
        assert new in texts
