"""The initial rows of a head with S * C outputs."""

from typing import Any

import pytest
import torch
from torch import Tensor

from hf_guide import AutoStudentForImageClassification, AutoStudentForSequenceClassification, from_teacher
from hf_guide.distillation.subclass_logits import class_logits
from hf_guide.errors import OptionError, SubclassError, TaskError
from tests.distillation.small import CLASSES, collate, examples_for, model_for
from tests.lelp.benchmark_modules import import_benchmark
from tests.lelp.test_collator import COUNT, IMAGE, NAMES, SUBCLASSES, TEXT, projector_of, run_teacher, teacher_of
from tests.tiny import KINDS

import_benchmark("lelp_splitters")

AUTO_CLASSES = {TEXT: AutoStudentForSequenceClassification, IMAGE: AutoStudentForImageClassification}


def logits_of(model: Any, task: str, count: int = 6) -> Tensor:
    inputs = {name: value for name, value in collate(examples_for(task, count)).items() if name != "labels"}
    with torch.no_grad():
        return model.eval()(**inputs).logits


@pytest.mark.parametrize("task", [TEXT, IMAGE])
def test_every_row_of_a_class_is_initialized_from_the_teachers(task: str) -> None:
    teacher = teacher_of(task)
    student = AUTO_CLASSES[task].from_teacher(teacher, num_subclasses=SUBCLASSES, show_progress=False)
    assert type(student) is type(teacher) and student.config.num_labels == student.num_labels == CLASSES * SUBCLASSES
    assert student.config.num_subclasses == SUBCLASSES
    assert student.config.id2label[SUBCLASSES + 1] == f"{NAMES[1]}/1"
    actual, expected = logits_of(student, task), logits_of(teacher, task)
    # The classes' logits are the teacher's, and log S.
    torch.testing.assert_close(class_logits(actual, SUBCLASSES), expected + torch.tensor(float(SUBCLASSES)).log())
    assert teacher.config.num_labels == CLASSES


@pytest.mark.parametrize("kind", [name for name in KINDS if "classifier" in name or name == "vit"])
def test_every_family_can_have_subclasses(kind: str) -> None:
    teacher = KINDS[kind].teacher()
    classes = teacher.config.num_labels
    smaller = from_teacher(teacher, num_subclasses=2, show_progress=False)
    shape = next(value.shape for name, value in smaller.state_dict().items() if value.shape[0] == 2 * classes)
    assert shape[0] == 2 * classes and smaller.config.num_labels == 2 * classes


@pytest.mark.parametrize("task", [TEXT, IMAGE])
def test_a_head_is_initialized_from_the_projectors_directions(task: str) -> None:
    teacher = teacher_of(task)
    examples = examples_for(task, COUNT)
    projector = projector_of(teacher, examples, temperature=2.0, subclass_temperature=0.5)
    student = from_teacher(teacher, projector=projector, show_progress=False)
    tau = projector.temperature
    actual = (logits_of(student, task) / tau).unflatten(-1, (CLASSES, SUBCLASSES))
    # Within a class the shares are the projector's.
    expected = projector.transform(*run_teacher(teacher, examples_for(task, 6)))
    torch.testing.assert_close(actual.softmax(-1), expected / expected.sum(-1, keepdim=True), rtol=1e-3, atol=1e-5)


def test_labels_in_another_order_move_their_rows() -> None:
    teacher = teacher_of(TEXT)
    order = [2, 0, 4, 1, 3]
    names = {number: NAMES[each] for number, each in enumerate(order)}
    projector = projector_of(teacher, examples_for(TEXT, COUNT))
    for options in ({"num_subclasses": SUBCLASSES}, {"projector": projector}):
        straight = logits_of(from_teacher(teacher, show_progress=False, **options), TEXT)
        reordered = logits_of(from_teacher(teacher, id2label=names, show_progress=False, **options), TEXT)
        shuffled = straight.view(-1, CLASSES, SUBCLASSES)[:, order].flatten(1)
        torch.testing.assert_close(reordered, shuffled)


def test_a_smaller_student_and_its_folder_keep_the_subclasses(tmp_path: Any) -> None:
    teacher = teacher_of(TEXT)
    student = from_teacher(
        teacher, num_subclasses=SUBCLASSES, hidden_size=16, num_hidden_layers=1, show_progress=False
    )
    student.save_pretrained(tmp_path)
    again = type(student).from_pretrained(tmp_path)
    assert again.config.num_subclasses == SUBCLASSES
    assert torch.equal(logits_of(again, TEXT), logits_of(student, TEXT))
    # A student with subclasses is a teacher like any other: its students inherit them.
    heir = from_teacher(again, num_hidden_layers=1, show_progress=False)
    assert heir.config.num_subclasses == SUBCLASSES and heir.config.num_labels == CLASSES * SUBCLASSES


def test_random_students_and_one_subclass_are_unchanged() -> None:
    teacher = teacher_of(TEXT)
    random = from_teacher(teacher, method="random", num_subclasses=SUBCLASSES, show_progress=False)
    rows = random.classifier.weight.view(CLASSES, SUBCLASSES, -1)
    assert not torch.equal(rows[:, 0], rows[:, 1])
    one = from_teacher(teacher, num_subclasses=1, show_progress=False)
    assert torch.equal(logits_of(one, TEXT), logits_of(from_teacher(teacher, show_progress=False), TEXT))


def test_invalid_subclasses_raise() -> None:
    teacher = teacher_of(TEXT)
    examples = examples_for(TEXT, COUNT)
    for wrong in (0, -1, 2.5, True):
        with pytest.raises(OptionError, match="at least 1"):
            from_teacher(teacher, num_subclasses=wrong, show_progress=False)
    with pytest.raises(TaskError, match="causal-lm"):
        from_teacher(model_for("causal-lm", 1), num_subclasses=2, show_progress=False)
    projector = projector_of(teacher, examples)
    with pytest.raises(OptionError, match="num_subclasses is 4 and the projector's 3"):
        from_teacher(teacher, num_subclasses=4, projector=projector, show_progress=False)
    with pytest.raises(SubclassError, match="of another teacher"):
        from_teacher(teacher_of(TEXT, 3), projector=projector, show_progress=False)
    with pytest.raises(OptionError, match="finds no directions"):
        nothing = projector_of(teacher, examples, splitter="random-partition")
        from_teacher(teacher, projector=nothing, show_progress=False)
    with pytest.raises(OptionError, match="already"):
        from_teacher(
            from_teacher(teacher, num_subclasses=2, show_progress=False), num_subclasses=2, show_progress=False
        )
