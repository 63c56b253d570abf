"""A student's card has a license and languages only as far as all models that it was made from have them."""

from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from hf_guide import DistillationTrainer, from_teacher
from hf_guide.hub.metadata import DistillationRecord, TeacherRecord, load_record, teacher_record
from hf_guide.hub.model_card import redraw_card, write_model_card
from tests.distillation.small import collate, examples_for, llama
from tests.distillation.test_trainer import arguments

SMALLER = {"num_hidden_layers": 1, "show_progress": False}


def save_teacher(folder: Path, metadata: str, seed: int = 1) -> Path:
    """Save a tiny teacher with a card of this metadata."""
    llama(seed).save_pretrained(folder)
    (folder / "README.md").write_text(f"---\n{metadata}---\n# A teacher\n")
    return folder


def distill(student: LlamaForCausalLM, teacher: object, folder: Path) -> ModelCard:
    """Train a student for one step, and return the card that the trainer writes."""
    args = arguments(folder, losses={"ce": 0.5, "kd": 0.5}, learning_rate=0.01)
    trainer = DistillationTrainer(student, args, collate, examples_for("causal-lm"), teacher=teacher)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    return ModelCard.load(folder / "README.md")


def test_the_licenses_of_initialization_and_training_are_both_named(tmp_path: Path) -> None:
    first = save_teacher(tmp_path / "first", "license: llama3\nlanguage: de\n")
    second = save_teacher(tmp_path / "second", "license: mit\nlanguage: en\n", seed=2)
    card = distill(from_teacher(str(first), **SMALLER), str(second), tmp_path / "student")
    assert card.data.license is None and card.data.language == ["de", "en"]
    assert "License: " not in card.text and "No license is specified" in card.text
    assert "Licenses of the models that it was made from: `first`: llama3; `second`: mit." in card.text
    assert "distilled from `second`." in card.text, "it was not distilled from the first"


def test_one_license_of_all_teachers_is_the_students(tmp_path: Path) -> None:
    first = save_teacher(tmp_path / "first", "license: mit\n")
    second = save_teacher(tmp_path / "second", "license: mit\n", seed=2)
    card = distill(from_teacher(str(first), **SMALLER), str(second), tmp_path / "student")
    assert card.data.license == "mit" and "License: mit (the teachers')." in card.text
    assert "Licenses of the models" not in card.text


@pytest.mark.parametrize("as_model", [False, True])
def test_a_teacher_of_initialization_and_training_is_one(tmp_path: Path, as_model: bool) -> None:
    folder = save_teacher(tmp_path / "teacher", "license: mit\n")
    teacher = AutoModelForCausalLM.from_pretrained(folder) if as_model else str(folder)
    card = distill(from_teacher(teacher, **SMALLER), teacher, tmp_path / "student")
    assert card.data.license == "mit" and "License: mit (the teacher" in card.text


def test_teachers_of_one_folder_name_are_two(tmp_path: Path) -> None:
    first = save_teacher(tmp_path / "a" / "teacher", "license: llama3\n")
    second = save_teacher(tmp_path / "b" / "teacher", "license: mit\n", seed=2)
    card = distill(from_teacher(str(first), **SMALLER), str(second), tmp_path / "student")
    assert card.data.license is None and "`teacher`: llama3; `teacher`: mit." in card.text


def test_a_license_that_is_not_recorded_is_none(tmp_path: Path) -> None:
    record = DistillationRecord(teachers=[TeacherRecord("a/big", license="mit"), TeacherRecord("folder")], steps=1)
    card = ModelCard.load(write_model_card(tmp_path, record=record))
    assert card.data.license is None
    assert "[a/big](https://huggingface.co/a/big): mit; `folder`: not recorded." in card.text


def test_a_chosen_license_does_not_hide_that_of_a_teacher(tmp_path: Path) -> None:
    record = DistillationRecord(teachers=[TeacherRecord("a/big", license="mit")], steps=1)
    card = ModelCard.load(write_model_card(tmp_path, record=record, license="apache-2.0"))
    assert card.data.license == "apache-2.0"
    assert "License: apache-2.0. Licenses of the models" in card.text and "/a/big): mit." in card.text


def test_a_license_that_was_given_to_a_student_counts_for_one_made_of_it(tmp_path: Path) -> None:
    first = save_teacher(tmp_path / "first", "license: apache-2.0\n")
    middle = from_teacher(str(first), **SMALLER)
    middle.save_pretrained(tmp_path / "middle")
    write_model_card(tmp_path / "middle", license="cc-by-nc-4.0")
    last = from_teacher(str(tmp_path / "middle"), intermediate_size=32, show_progress=False)
    card = ModelCard.load(write_model_card(tmp_path / "last", last.initialization_report))
    assert card.data.license is None and "`middle`: cc-by-nc-4.0" in card.text


def test_of_several_licenses_of_a_teacher_none_is_chosen(tmp_path: Path) -> None:
    teacher = save_teacher(tmp_path / "teacher", "license: [mit, cc-by-nc-4.0]\n")
    assert teacher_record(str(teacher)).license == ["mit", "cc-by-nc-4.0"]
    card = distill(from_teacher(str(teacher), **SMALLER), str(teacher), tmp_path / "student")
    assert card.data.license is None and "`teacher`: mit and cc-by-nc-4.0." in card.text
    assert load_record(tmp_path / "student").teachers[0].license == ["mit", "cc-by-nc-4.0"]


def test_a_list_of_one_license_is_that_license(tmp_path: Path) -> None:
    teacher = save_teacher(tmp_path / "teacher", "license:\n- mit\n")
    student = from_teacher(str(teacher), **SMALLER)
    card = ModelCard.load(write_model_card(tmp_path / "student", student.initialization_report))
    assert card.data.license == "mit" and "License: mit (the teacher's)." in card.text


def test_norwegian_is_a_language(tmp_path: Path) -> None:
    teacher = save_teacher(tmp_path / "teacher", "language: no\n")
    assert teacher_record(str(teacher)).languages == ["no"]
    (teacher / "README.md").write_text("---\nlanguage: [en, no]\n---\n")
    student = from_teacher(str(teacher), **SMALLER)
    card = ModelCard.load(write_model_card(tmp_path / "student", student.initialization_report))
    assert card.data.language == ["en", "no"]


LINKS = {
    "LICENSE": "https://huggingface.co/org/big/blob/main/LICENSE",
    "./LICENSE.md": "https://huggingface.co/org/big/blob/main/LICENSE.md",
    "https://example.org/a": "https://example.org/a",
}


@pytest.mark.parametrize("link", LINKS)
def test_a_link_to_a_teachers_license_leads_to_its_repository(tmp_path: Path, link: str) -> None:
    teacher = TeacherRecord("org/big", license="other", license_name="big", license_link=link)
    card = ModelCard.load(write_model_card(tmp_path, record=DistillationRecord(teachers=[teacher], steps=1)))
    assert card.data.to_dict()["license_link"] == LINKS[link] and "License: big (the teacher's)." in card.text


def test_a_link_leads_to_the_revision_of_the_teacher(tmp_path: Path) -> None:
    teacher = TeacherRecord("org/big", "f00d", license="other", license_name="big", license_link="LICENSE")
    card = ModelCard.load(write_model_card(tmp_path, record=DistillationRecord(teachers=[teacher], steps=1)))
    assert card.data.to_dict()["license_link"] == "https://huggingface.co/org/big/blob/f00d/LICENSE"


def test_another_license_comes_without_the_name_of_the_former(tmp_path: Path) -> None:
    teacher = save_teacher(
        tmp_path / "teacher", "license: other\nlicense_name: big\nlicense_link: https://example.org/a\n"
    )
    student = from_teacher(str(teacher), **SMALLER)
    student.save_pretrained(tmp_path / "student")
    first = ModelCard.load(write_model_card(tmp_path / "student", student.initialization_report)).data.to_dict()
    assert (first["license_name"], first["license_link"]) == ("big", "https://example.org/a")
    assert ModelCard.load(redraw_card(tmp_path / "student", license="other")).data.to_dict() == first
    data = ModelCard.load(redraw_card(tmp_path / "student", license="mit")).data.to_dict()
    assert data["license"] == "mit" and not {"license_name", "license_link"} & data.keys()


def test_a_license_of_ones_own_does_not_get_the_name_of_the_teachers(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    teacher = TeacherRecord("org/big", license="other", license_name="big", license_link="LICENSE")
    card = ModelCard.load(write_model_card(tmp_path, record=DistillationRecord(teachers=[teacher], steps=1)))
    assert card.data.license == "mit" and "license_name" not in card.data.to_dict()
    assert "License: mit. Licenses of the models" in card.text and "/org/big): big." in card.text
