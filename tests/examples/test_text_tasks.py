"""The example scripts of question answering, multiple choice, summarization, translation; regression and several labels."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import transformers

from examples.run_qa_distillation import answer_tokens, f1, predict_answers
from examples.run_summarization_distillation import rouge
from examples.run_translation_distillation import chrf
from tests.examples.local import OBJECTS, QUICK, SMALLER, cache, flags, make_model, sentences


@pytest.fixture(scope="module", autouse=True)
def _datasets_folder():
    """Keep the prepared datasets apart from the user's."""
    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = Path(cache())
    yield
    datasets.config.HF_DATASETS_CACHE = before


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write a JSON-lines file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def question(text: str, number: int) -> dict[str, Any]:
    """Return an example of SQuAD's format about a sentence; every sixth has no answer."""
    answer = next(each for each in OBJECTS if each in text)
    context = " ".join(each for each, _ in sentences(4, seed=number)) + " " + text
    answers = {"text": [answer], "answer_start": [context.rindex(answer)]}
    if number % 6 == 0:
        answers = {"text": [], "answer_start": []}
    return {"id": str(number), "question": " What is it about?", "context": context, "answers": answers}


def swag(text: str, number: int) -> dict[str, Any]:
    """Return an example of SWAG's format about a sentence."""
    endings = {f"ending{each}": OBJECTS[(number + each) % len(OBJECTS)] for each in range(4)}
    return {"sent1": text, "sent2": "It is about", **endings, "label": number % 4}


ROWS = {
    "qa": question,
    "choice": swag,
    "summary": lambda text, number: {"text": text, "summary": text.split()[-1]},
    "translation": lambda text, number: {"translation": {"en": text, "de": " ".join(reversed(text.split()))}},
    "regression": lambda text, number: {"text": text, "label": number % 7 / 2},
    "labels": lambda text, number: {"text": text, "label": [["good", "short"], ["bad"], []][number % 3]},
}
SCRIPTS = {
    "qa": "run_qa_distillation",
    "choice": "run_multiple_choice_distillation",
    "summary": "run_summarization_distillation",
    "translation": "run_translation_distillation",
    "regression": "run_classification_distillation",
    "labels": "run_classification_distillation",
}
TEACHERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "qa": ("bert", "ForQuestionAnswering", {}),
    "choice": ("bert", "ForMultipleChoice", {}),
    "summary": ("t5", "ForSeq2SeqLM", {}),
    "translation": ("t5", "ForSeq2SeqLM", {}),
    "regression": ("bert", "ForSequenceClassification", {"num_labels": 1}),
    "labels": ("bert", "ForSequenceClassification", {"num_labels": 3, "problem_type": "multi_label_classification"}),
}
METRICS = {
    "qa": {"eval_exact_match", "eval_f1", "eval_teacher_agreement"},
    "choice": {"eval_accuracy", "eval_teacher_agreement"},
    "summary": {"eval_rouge1", "eval_rouge2", "eval_gen_len", "eval_teacher_agreement"},
    "translation": {"eval_chrf", "eval_gen_len", "eval_teacher_agreement"},
    "regression": {"eval_mse", "eval_pearson"},
    "labels": {"eval_f1"},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "qa": {"max_seq_length": 48, "doc_stride": 8},
    "summary": {"predict_with_generate": True, "max_target_length": 8, "source_prefix": "summarize: "},
    "translation": {"predict_with_generate": True, "max_target_length": 8, "label_smoothing_factor": 0.1},
}


def run(task: str, folder: Path, monkeypatch, **options: Any) -> dict[str, Any]:
    """Run a script in this process with a tiny teacher, and return what it measured."""
    family, head, changes = TEACHERS[task]
    teacher = make_model(folder / "teacher", family, head, **changes)
    files = {
        f"{split}_file": write_rows(
            folder / f"{split}.json", [ROWS[task](text, n) for n, (text, _) in enumerate(sentences(count, seed))]
        )
        for split, count, seed in (("train", 24, 0), ("validation", 8, 1))
    }
    settings = QUICK | OPTIONS.get(task, {}) | options
    words = flags(**settings, **files, teacher=teacher, output_dir=folder / "student")
    monkeypatch.setattr(sys, "argv", [SCRIPTS[task], "--do_train", "--do_eval", *words])
    importlib.import_module(f"examples.{SCRIPTS[task]}").main()
    return json.loads((folder / "student" / "all_results.json").read_text())


@pytest.mark.sampled(2)
@pytest.mark.parametrize("task", SCRIPTS)
def test_scripts_distill_their_task(task, tmp_path, monkeypatch):
    """Run each with a student that is made from the teacher; the folder loads as a stock model of the task."""
    measured = run(task, tmp_path, monkeypatch, student_init_kwargs=SMALLER[TEACHERS[task][0]])
    assert METRICS[task] <= measured.keys()
    assert measured["eval_ce"] > 0 and measured["eval_kd"] > 0
    assert all(np.isfinite(value) for name, value in measured.items() if "pearson" not in name)
    record = json.loads((tmp_path / "student" / "distillation.json").read_text())
    assert record["steps"] == QUICK["max_steps"] and {"ce", "kd"} <= record["losses"].keys()
    auto_class = getattr(transformers, f"AutoModel{TEACHERS[task][1]}")
    student, loading = auto_class.from_pretrained(tmp_path / "student", output_loading_info=True)
    assert not any(loading.values()) and (tmp_path / "student" / "README.md").is_file()
    assert student.config.hidden_size == 16


def test_a_students_own_folder_is_trained_for_regression(tmp_path, monkeypatch):
    base = make_model(tmp_path / "base", "bert", "ForMaskedLM", width=16, blocks=1)
    measured = run("regression", tmp_path, monkeypatch, model_name_or_path=base)
    assert measured["eval_mse"] == pytest.approx(measured["eval_ce"], rel=1e-4)


def test_answers_are_found_again_in_their_context():
    """The tokens of an answer, scored highest, give its text; a longer span or one that ends before it begins does not."""
    context, answer = "Nobody loves the great machine at all.", "the great machine"
    offsets = [[0, 0], [0, 6], [7, 12], [13, 16], [17, 22], [23, 30], [31, 33], [34, 37], [37, 38]]
    parts: list[int | None] = [None, *[1] * 8]
    answers = {"text": [answer], "answer_start": [context.index(answer)]}
    assert answer_tokens(offsets, parts, answers, 0) == (3, 5)
    assert answer_tokens(offsets, parts, {"text": [], "answer_start": []}, 0) == (0, 0)
    assert answer_tokens(offsets[:5], parts[:5], answers, 0) == (0, 0)  # this piece ends inside the answer
    examples = datasets.Dataset.from_dict({"id": ["a"], "context": [context]})
    feature = {"example_id": "a", "none": 0, "input_ids": [1, *range(2, 10)]}
    feature["offset_mapping"] = [offset if part else None for offset, part in zip(offsets, parts, strict=True)]
    features = datasets.Dataset.from_list([feature])
    start, end = np.zeros((1, 12)), np.zeros((1, 12))  # padded by the batch
    start[0, [3, 7, 11]] = 5, 6, 9
    end[0, [5, 1, 11]] = 5, 7, 9
    assert predict_answers(examples, features, (start, end), 4) == [answer]
    assert predict_answers(examples, features, (start, end), 2) == ["Nobody"]
    start[0, 0] = end[0, 0] = 20
    assert predict_answers(examples, features, (start, end), 4) == [""]
    assert (
        f1("The great machine!", answer) == 1
        and f1("machine", answer) == pytest.approx(2 / 3)
        and f1("sea", answer) == 0
    )


def test_generated_texts_are_scored_as_defined():
    """ROUGE by hand; chrF of one pair against counts by hand."""
    assert rouge("the cat sat", "the cat ran", 1) == pytest.approx(2 / 3)
    assert rouge("the cat sat", "the cat ran", 2) == pytest.approx(1 / 2)
    assert rouge("", "the cat", 1) == 0
    assert chrf(["same text"], ["same text"]) == pytest.approx(1)
    assert chrf(["ab"], ["ac"], length=1) == pytest.approx(0.5)
    assert chrf(["abc"], ["ab"], length=1) == pytest.approx(5 * (2 / 3) / (4 * 2 / 3 + 1))
    assert chrf(["x"], ["y"]) == 0
