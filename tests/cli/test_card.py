"""`hf-guide card FOLDER` writes the card from the folder's records, and keeps what others wrote."""

import argparse

import pytest
from huggingface_hub import ModelCard

from hf_guide.cli import card as card_command
from hf_guide.errors import HfGuideError
from hf_guide.hub.metadata import DistillationRecord, save_record


def run(*words: object) -> int:
    parser = argparse.ArgumentParser()
    card_command.add_arguments(parser)
    return card_command.run(parser.parse_args([str(word) for word in words]))


def test_the_card_of_a_folder_is_drawn_again(tmp_path, capsys):
    save_record(
        tmp_path, DistillationRecord(student_class="BertForSequenceClassification", losses={"kd": 1.0}, steps=3)
    )
    flags = [
        "--model-id",
        "me/student",
        "--license",
        "mit",
        "--language",
        "en",
        "--language",
        "de",
        "--dataset",
        "me/data",
    ]
    assert run(tmp_path, *flags, "--tag", "small") == 0
    path = tmp_path / "README.md"
    assert str(path) in capsys.readouterr().out
    data = ModelCard.load(path).data.to_dict()
    assert (data["license"], data["language"], data["datasets"]) == ("mit", ["en", "de"], ["me/data"])
    assert data["tags"] == ["hf_guide", "distillation", "small"] and data["pipeline_tag"] == "text-classification"
    path.write_text(path.read_text() + "\nMine.\n")
    save_record(
        tmp_path, DistillationRecord(student_class="BertForSequenceClassification", losses={"kd": 1.0}, steps=4)
    )
    assert run(tmp_path) == 0
    text = path.read_text()
    assert "Length: 4 steps" in text and "3 steps" not in text and text.endswith("\nMine.\n")
    assert ModelCard.load(path).data.to_dict() == data and '("me/student")' in text


def test_a_folder_without_records_is_an_error(tmp_path):
    with pytest.raises(HfGuideError, match="nothing to write a card from"):
        run(tmp_path)
