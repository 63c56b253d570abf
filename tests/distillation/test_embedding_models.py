"""An embedding model is trained on plain texts against its teacher's embeddings, and a reranker on pairs without labels."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModel, AutoModelForSequenceClassification, PreTrainedModel

from hf_guide import (
    DistillationArguments,
    DistillationTrainer,
    OptionError,
    SentenceCollator,
    TaskError,
    TeacherError,
    from_teacher,
)
from hf_guide.models.sentence_files import embed, modules_of_model
from hf_guide.models.sentence_modules import attach_sentence_modules, attached_sentence_modules
from tests.sentence_folder import WORDS, batch, bert, dense, pooling, teacher_folder, tokenizer
from tests.tiny import run_python

CHAIN = (pooling("cls", "mean"), dense(64, 24), ("Normalize", None))
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
TEXTS = [" ".join(WORDS[(7 * row + 3 * word * word) % 91] for word in range(2 + row % 6)) for row in range(32)]
TEXT_DATA = Dataset.from_dict({"text": TEXTS})
SCORED = Dataset.from_dict({"one": TEXTS[:8], "two": TEXTS[8:16], "score": [0.1 * row for row in range(8)]})
TRIPLES = Dataset.from_dict({"query": TEXTS[:16], "positive": TEXTS[16:], "negative": TEXTS[8:24]})
ALL_LOSSES = {
    "features": {"features": 1.0},
    "similarity": {"similarity": 1.0},
    "both": {"features": 0.5, "similarity": 0.5},
}


def trainer(student: Any, teacher: Any, output_dir: Path, **options: Any) -> DistillationTrainer:
    """Return a trainer on texts with a `SentenceCollator`; options are arguments, or the trainer's own."""
    of_trainer = {
        "data_collator": SentenceCollator(tokenizer()),
        "train_dataset": TEXT_DATA,
        "eval_dataset": SCORED,
        "processing_class": tokenizer(),
    }
    of_trainer |= {name: options.pop(name) for name in of_trainer.keys() & options}
    arguments: dict[str, Any] = {
        "losses": {"features": 1.0},
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 3e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    args = DistillationArguments(str(output_dir), **arguments | options)
    return DistillationTrainer(student, args, teacher=teacher, **of_trainer)


def narrow(teacher: Path, **changes: Any) -> PreTrainedModel:
    """Return a student of half the width."""
    return from_teacher(teacher, hidden_size=16, num_hidden_layers=2, show_progress=False, **NO_DROPOUT, **changes)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return teacher_folder(tmp_path_factory.mktemp("teacher"), *CHAIN)


@pytest.mark.parametrize("losses", ALL_LOSSES)
def test_a_copy_of_the_teacher_has_loss_and_gradient_zero(losses: str, teacher: Path, tmp_path: Path) -> None:
    student = from_teacher(teacher, show_progress=False, **NO_DROPOUT)
    made = trainer(student, str(teacher), tmp_path, losses=ALL_LOSSES[losses])
    student.train()
    loss = made.compute_loss(student, made.data_collator([{"text": text} for text in TEXTS[:4]]))
    loss.backward()
    modules = modules_of_model(student).trainable["2_Dense"]
    gradients = [each.grad for each in [*student.parameters(), *modules.parameters()] if each.grad is not None]
    assert loss.item() < 1e-12 and gradients and all(each.abs().max() < 1e-5 for each in gradients)


def test_the_gradient_is_that_of_the_distance_of_the_embeddings(teacher: Path, tmp_path: Path) -> None:
    student, reference = narrow(teacher), narrow(teacher)
    made = trainer(student, str(teacher), tmp_path)
    made.compute_loss(student.train(), made.data_collator([{"text": text} for text in TEXTS[:4]])).backward()
    inputs = batch(TEXTS[:4])
    with torch.no_grad():
        model = AutoModel.from_pretrained(teacher)
        target = embed(model, model(**inputs).last_hidden_state, inputs)
    hidden, mask = reference(**inputs).last_hidden_state, inputs["attention_mask"][..., None]
    layer = modules_of_model(reference).trainable["2_Dense"].get_submodule("linear")
    pooled = torch.cat([hidden[:, 0], (hidden * mask).sum(1) / mask.sum(1)], -1)
    expected = torch.nn.functional.normalize(torch.tanh(layer(pooled)), dim=-1)
    (expected - target).square().mean(-1).mean().backward()
    trained = dict(student.named_parameters())
    for name, parameter in reference.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(trained[name].grad, parameter.grad, atol=1e-7, rtol=1e-4)
    mine = modules_of_model(student).trainable["2_Dense"].get_submodule("linear")
    torch.testing.assert_close(mine.weight.grad, layer.weight.grad, atol=1e-7, rtol=1e-4)


def test_training_evaluation_and_the_saved_folder(teacher: Path, tmp_path: Path) -> None:
    student = narrow(teacher)
    before = copy.deepcopy(modules_of_model(student).trainable["2_Dense"].state_dict())
    options: dict[str, Any] = {"losses": ALL_LOSSES["both"], "max_steps": 30, "per_device_train_batch_size": 8}
    made = trainer(student, str(teacher), tmp_path, **options)
    begin = made.evaluate()
    made.train()
    metrics = made.evaluate()
    assert metrics["eval_objective"] < 0.5 * begin["eval_objective"]
    assert metrics["eval_loss"] == pytest.approx(metrics["eval_objective"])
    assert {
        f"eval_{name}" for name in ("similarity_spearman", "score_spearman", "teacher_score_spearman")
    } <= metrics.keys()
    assert "eval_ce" not in metrics
    trained = modules_of_model(student).trainable["2_Dense"].state_dict()
    assert not torch.equal(trained["linear.weight"], before["linear.weight"]), "the dense layer is trained, too"
    made.save_model()
    made.create_model_card()
    assert {"modules.json", "1_Pooling", "2_Dense", "tokenizer.json", "distillation.json"} <= {
        path.name for path in tmp_path.iterdir()
    }
    assert not (tmp_path / "distillation_projections.safetensors").exists()
    again = trainer(AutoModel.from_pretrained(tmp_path), str(teacher), tmp_path / "again", **options).evaluate()
    for name in ("eval_objective", "eval_similarity_spearman", "eval_score_spearman"):
        assert again[name] == pytest.approx(metrics[name], abs=1e-6)


def test_the_spearman_correlation_is_that_over_all_pairs_of_texts(teacher: Path, tmp_path: Path) -> None:
    student = narrow(teacher)
    found = trainer(student, str(teacher), tmp_path, per_device_eval_batch_size=4).evaluate()[
        "eval_similarity_spearman"
    ]
    cosines = []
    for model in (student.eval(), AutoModel.from_pretrained(teacher)):
        inputs = batch([text for pair in zip(TEXTS[:8], TEXTS[8:16], strict=True) for text in pair])
        with torch.no_grad():
            vectors = torch.nn.functional.normalize(embed(model, model(**inputs).last_hidden_state, inputs), dim=-1)
        cosines.append((vectors @ vectors.T)[torch.triu_indices(16, 16, offset=1).unbind()])
    ranks: list[Tensor] = [each.argsort().argsort().double() for each in cosines]
    assert found == pytest.approx(float(torch.corrcoef(torch.stack(ranks))[0, 1]), abs=1e-2)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("kind", ["teacher", "pooled_teacher"], ids=["dense layer", "isometry"])
def test_a_resumed_run_is_the_uninterrupted_one(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    teacher: Path = request.getfixturevalue(kind)
    options: dict[str, Any] = {"losses": ALL_LOSSES["both"], "max_steps": 4, "lr_scheduler_type": "constant"}
    whole = narrow(teacher)
    trainer(whole, str(teacher), tmp_path / "whole", **options).train()
    trainer(narrow(teacher), str(teacher), tmp_path / "two", save_strategy="steps", save_steps=2, **options).train()
    resumed = narrow(teacher)
    made = trainer(resumed, str(teacher), tmp_path / "two", save_strategy="steps", save_steps=2, **options)
    made.train(resume_from_checkpoint=str(tmp_path / "two" / "checkpoint-2"))
    mine, theirs = (modules_of_model(each).layers.state_dict() for each in (resumed, whole))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), whole.parameters(), strict=True))


@pytest.fixture(scope="module")
def pooled_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a teacher without a dense layer: a narrower student's embedding is narrower, too."""
    return teacher_folder(tmp_path_factory.mktemp("pooled") / "teacher", pooling(), ("Normalize", None))


@pytest.mark.parametrize("width", [16, 48], ids=["narrower", "wider"])
def test_embeddings_of_two_widths_are_compared_in_the_wider_space_by_a_fixed_isometry(
    width: int, pooled_teacher: Path, tmp_path: Path
) -> None:
    """A map that is trained and dropped would let the cosines of what is left drift away from the teacher's."""
    student = bert(hidden_size=width, seed=3)
    attach_sentence_modules(student, modules_of_model(AutoModel.from_pretrained(pooled_teacher)).resized(width))
    made = trainer(student, str(pooled_teacher), tmp_path, max_steps=30, per_device_train_batch_size=8)
    begin = made.evaluate()
    fitted = made.distillation_objective.projections.isometry("0_features").clone()
    small = fitted.T @ fitted if width < 32 else fitted @ fitted.T
    torch.testing.assert_close(small, torch.eye(len(small)), atol=1e-5, rtol=0)
    texts = batch(TEXTS)
    with torch.no_grad():
        mine, theirs = (
            embed(each, each(**texts).last_hidden_state, texts)
            for each in (student.eval(), AutoModel.from_pretrained(pooled_teacher))
        )
    nuclear_norm = torch.linalg.svdvals(theirs.T @ mine).sum()  # the best that any isometry reaches
    torch.testing.assert_close((fitted * (theirs.T @ mine)).sum(), nuclear_norm, atol=1e-3, rtol=1e-4)
    made.train()
    assert torch.equal(made.distillation_objective.projections.isometry("0_features"), fitted)
    trained = made.evaluate()
    assert trained["eval_features"] < 0.9 * begin["eval_features"]
    assert trained["eval_similarity_spearman"] > begin["eval_similarity_spearman"]


def test_a_narrower_embedding_is_mapped_by_features_alone(pooled_teacher: Path, tmp_path: Path) -> None:
    folder = pooled_teacher
    for losses, has_maps in ((ALL_LOSSES["features"], True), (ALL_LOSSES["similarity"], False)):
        made = trainer(narrow(folder), str(folder), tmp_path / "out", losses=losses)
        assert (made.distillation_objective.projections is not None) is has_maps
        made.train()
        made.save_model()
        assert not (tmp_path / "out" / "distillation_projections.safetensors").exists()
        config = json.loads((tmp_path / "out" / "1_Pooling" / "config.json").read_text())
        assert config == {"embedding_dimension": 16, "pooling_mode": "mean"} or config["pooling_mode"] == ["mean"]


@pytest.mark.parametrize(
    "data", [TEXT_DATA, SCORED, [{"text": text} for text in TEXTS]], ids=["texts", "pairs", "list"]
)
def test_a_calibrated_student_is_calibrated_on_the_texts(data: Any, teacher: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"method": {"method": "calibrated", "calibration_tokens": 64}, "hidden_size": 16}
    made = trainer(options, str(teacher), tmp_path, train_dataset=data)
    assert made.model.initialization_report.calibration["tokens"] >= 64
    assert modules_of_model(made.model).width == 24


def test_a_model_without_modules_is_saved_with_the_pooling_that_it_was_trained_with(
    teacher: Path, tmp_path: Path
) -> None:
    student = bert(hidden_size=16, seed=3)
    made = trainer(student, str(teacher), tmp_path, losses={"similarity": 1.0}, max_steps=1)
    made.train()
    made.save_model()
    modules = attached_sentence_modules(student)
    assert modules is not None and modules.width == 16
    assert json.loads((tmp_path / "1_Pooling" / "config.json").read_text())["pooling_mode_mean_tokens"] is True


def test_sentence_transformers_gives_the_trained_embeddings(teacher: Path, tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers")
    student = narrow(teacher)
    made = trainer(student, str(teacher), tmp_path / "student", losses=ALL_LOSSES["both"])
    made.train()
    made.save_model()
    inputs = batch(TEXTS[:6])
    with torch.no_grad():
        torch.save(embed(student.eval(), student(**inputs).last_hidden_state, inputs), tmp_path / "expected.pt")
    script = """
        import sys, torch
        from sentence_transformers import SentenceTransformer
        found = torch.from_numpy(SentenceTransformer(sys.argv[1], device="cpu").encode(sys.argv[3:]))
        torch.testing.assert_close(found, torch.load(sys.argv[2]), atol=1e-6, rtol=0)
    """
    run_python(script, tmp_path / "student", tmp_path / "expected.pt", *TEXTS[:6])


def test_what_cannot_be_trained_is_an_error(teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="per_device_train_batch_size is 1"):
        trainer(narrow(teacher), str(teacher), tmp_path, losses="similarity", per_device_train_batch_size=1)
    with pytest.raises(TaskError, match="features"):
        trainer(narrow(teacher), str(teacher), tmp_path, losses="kd")
    with pytest.raises(TaskError, match="margin_mse"):
        trainer(narrow(teacher), str(teacher), tmp_path, losses="margin_mse")
    with pytest.raises(TeacherError, match="must be trained for sequence-classification"):
        trainer(bert(labels=1), str(teacher), tmp_path, losses="kd")


# Rerankers


def reranker(folder: Path) -> Path:
    """Save a cross-encoder with one output."""
    bert(labels=1).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("losses", ["kd", "margin_mse"])
def test_a_reranker_learns_from_pairs_without_labels(losses: str, tmp_path: Path) -> None:
    folder = reranker(tmp_path / "teacher")
    pairs = SentenceCollator(tokenizer(), [("query", "positive"), ("query", "negative")])
    options: dict[str, Any] = {
        "losses": losses,
        "data_collator": pairs,
        "train_dataset": TRIPLES,
        "eval_dataset": None,
    }
    same = from_teacher(folder, show_progress=False, **NO_DROPOUT)
    made = trainer(same, str(folder), tmp_path / "same", **options)
    loss = made.compute_loss(same.train(), pairs([TRIPLES[0], TRIPLES[1]]))
    loss.backward()
    assert loss.item() < 1e-12
    student = narrow(folder)
    made = trainer(student, str(folder), tmp_path / "student", max_steps=25, **options)
    made.train()
    curve = [entry[losses] for entry in made.state.log_history if losses in entry]
    assert sum(curve[-5:]) < 0.5 * sum(curve[:5])
    made.save_model()
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "student").config.num_labels == 1


def test_the_margin_is_that_of_the_scores_of_a_pair(tmp_path: Path) -> None:
    folder = reranker(tmp_path / "teacher")
    pairs = SentenceCollator(tokenizer(), [("query", "positive"), ("query", "negative")])
    student = narrow(folder)
    made = trainer(student, str(folder), tmp_path, losses="margin_mse", data_collator=pairs, train_dataset=TRIPLES)
    examples = [TRIPLES[row] for row in range(3)]
    loss = made.compute_loss(student.train(), pairs(examples)).item()
    margins = []
    for model in (student.eval(), AutoModelForSequenceClassification.from_pretrained(folder)):
        with torch.no_grad():
            positive, negative = (
                model(**batch([(each["query"], each[name]) for each in examples])).logits
                for name in ("positive", "negative")
            )
        margins.append((positive - negative)[:, 0].double())
    assert loss == pytest.approx(float((margins[0] - margins[1]).square().mean()), rel=1e-4)


def test_a_reranker_is_evaluated_on_gold_scores(tmp_path: Path) -> None:
    folder = reranker(tmp_path / "teacher")
    collator = SentenceCollator(tokenizer(), [("one", "two")], label_column="score")
    student = narrow(folder)
    made = trainer(
        student, str(folder), tmp_path, losses={"ce": 0.5, "kd": 0.5}, data_collator=collator, train_dataset=SCORED
    )
    metrics = made.evaluate()
    with torch.no_grad():
        scores = student.eval()(**batch(list(zip(TEXTS[:8], TEXTS[8:16], strict=True)))).logits[:, 0]
    gold = torch.tensor(SCORED["score"])
    assert (
        metrics["eval_ce"] == pytest.approx(float((scores - gold).square().mean()), rel=1e-4)
        and metrics["eval_kd"] > 0
    )


def test_padding_examples_of_several_processes_count_by_their_rows(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of three examples are real, of two texts each: four of six texts are measured."""
    student = narrow(teacher)
    made = trainer(student, str(teacher), tmp_path)
    monkeypatch.setattr("hf_guide.distillation.batch_builder._num_real_examples", lambda _, size: size - 1)
    built = made._batch_builder.build(made.data_collator([SCORED[row] for row in range(3)]), training=False)
    assert built.mask.tolist() == [True] * 4 + [False] * 2 and built.rows_per_example == 2
    assert not {"scores", "rows_per_example"} & built.inputs.keys()
