"""`hf-guide init --vocab-size` and `hf-guide distill` of a student with a smaller vocabulary, on its own tokens."""

from pathlib import Path

import datasets
import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_guide.cli.main import main
from hf_guide.scripts.distill import distill, read_config
from tests.examples.local import QUICK
from tests.small_tokenizers import KINDS, TEXTS


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path, Path]:
    """Return the folders of a teacher and for a student, and a file of texts."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    KINDS["GPT-2"].teacher(tmp_path / "teacher")
    (tmp_path / "texts.txt").write_text("\n\n".join(TEXTS[::2]))
    return tmp_path / "teacher", tmp_path / "student", tmp_path / "texts.txt"


def check_folder(teacher: Path, student: Path) -> None:
    tokenizer, model = AutoTokenizer.from_pretrained(student), AutoModelForCausalLM.from_pretrained(student)
    assert len(tokenizer) == model.config.vocab_size == 450
    assert tokenizer.decode(tokenizer(TEXTS[1])["input_ids"]) == TEXTS[1]
    assert not {"merges.txt", "vocab.json"} & {file.name for file in student.iterdir()}  # of the teacher's tokenizer
    assert "Vocabulary: 450 of the teacher" in (student / "README.md").read_text()


def test_init_saves_the_tokenizer_of_the_smaller_vocabulary(files: tuple[Path, Path, Path]) -> None:
    teacher, student, texts = files
    words = ["--vocab-size", "450", "--calibration-dataset", str(texts), "--no-progress", "-o", str(student)]
    assert main(["init", str(teacher), *words]) == 0
    check_folder(teacher, student)


def test_distill_tokenizes_with_the_students_vocabulary(files: tuple[Path, Path, Path]) -> None:
    teacher, student, texts = files
    options = QUICK | {
        "output_dir": str(student),
        "teacher": str(teacher),
        "data_files": str(texts),
        "max_length": 16,
        "validation_split_percentage": 34,
        "student_init_kwargs": {"vocab_size": 450, "n_layer": 1},
    }
    (student.parent / "run.yaml").write_text(yaml.safe_dump(options))
    metrics = distill(read_config(student.parent / "run.yaml"))
    assert metrics["eval_kd"] > 0
    check_folder(teacher, student)


@pytest.mark.extended
def test_later_stages_keep_the_vocabulary_of_the_first(files: tuple[Path, Path, Path]) -> None:
    teacher, student, texts = files
    options = QUICK | {
        "output_dir": str(student),
        "teacher": str(teacher),
        "data_files": str(texts),
        "max_length": 16,
        "max_steps": 1,
        "stages": [{"student_init_kwargs": {"vocab_size": 450}}, {"student_init_kwargs": {"n_layer": 1}}],
    }
    (student.parent / "run.yaml").write_text(yaml.safe_dump(options))
    assert distill(read_config(student.parent / "run.yaml"))["eval_kd"] > 0
    tokenizer, model = AutoTokenizer.from_pretrained(student), AutoModelForCausalLM.from_pretrained(student)
    assert len(tokenizer) == model.config.vocab_size == 450 and model.config.n_layer == 1
