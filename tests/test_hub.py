"""A model card parses with the Hub's own parser and says where the student came from."""

import dataclasses

import pytest
from huggingface_hub import EvalResult, ModelCard

from hf_guide.hub import teacher_repo_id, write_model_card
from hf_guide.initialization.report import InitializationReport

REPORT = InitializationReport(
    teacher="someone/teacher",
    revision="0123456789abcdef",
    teacher_class="LlamaForCausalLM",
    student_class="LlamaForCausalLM",
    options={"method": "guide"},
    hf_guide_version="0.1.0",
    transformers_version="5.0.0",
    teacher_parameters=134_515_008,
    student_parameters=33_400_000,
    approximations=["the final gain: fitted in the logits"],
)


def test_card_parses_and_names_the_teacher(tmp_path):
    path = write_model_card(tmp_path / "student", REPORT, license="apache-2.0", datasets=["someone/text"])
    card = ModelCard.load(path)
    assert card.data.to_dict() == {
        "base_model": "someone/teacher",
        "library_name": "transformers",
        "license": "apache-2.0",
        "datasets": ["someone/text"],
        "tags": ["hf_guide", "guide"],
    }
    for line in REPORT.summary().splitlines():
        assert f"- {line}\n" in card.text
    assert 'LlamaForCausalLM.from_pretrained("student")' in card.text
    assert "- the final gain: fitted in the logits\n" in card.text
    assert "Licence: apache-2.0." in card.text and "{" not in card.text


def test_results_are_in_the_table_and_in_the_metadata(tmp_path):
    result = EvalResult("text-generation", "someone/text", "Some text", "perplexity", 21.5)
    card = ModelCard.load(write_model_card(tmp_path, REPORT, model_id="me/student", results=[result]))
    assert card.data.model_name == "me/student"
    (parsed,) = card.data.eval_results
    assert (parsed.metric_type, parsed.metric_value, parsed.dataset_name) == ("perplexity", 21.5, "Some text")
    assert "| text-generation | Some text | perplexity | 21.5 |" in card.text


def test_a_card_that_is_there_is_left_alone(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    assert write_model_card(tmp_path, REPORT).read_text() == "mine"


def test_a_local_teacher_is_no_base_model_and_its_path_stays_private(tmp_path):
    report = dataclasses.replace(REPORT, teacher=str(tmp_path / "teacher-folder"), approximations=[])
    path = write_model_card(tmp_path / "student", report)
    card = ModelCard.load(path)
    assert card.data.base_model is None and card.data.license is None
    assert str(tmp_path) not in path.read_text() and "`teacher-folder`" in card.text
    assert "could not be carried over" not in card.text


@pytest.mark.parametrize(
    "teacher,revision,expected",
    [
        ("org/name", None, "org/name"),
        ("gpt2", "607a30d7", "gpt2"),
        ("LlamaForCausalLM", None, None),
        ("/data/teacher", None, None),
        ("./teacher", None, None),
        ("a/b/c", None, None),
    ],
)
def test_only_ids_of_the_hub_count_as_base_models(teacher, revision, expected):
    assert teacher_repo_id(dataclasses.replace(REPORT, teacher=teacher, revision=revision)) == expected
