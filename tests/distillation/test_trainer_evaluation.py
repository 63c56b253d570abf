"""What evaluation reports: the task loss as `eval_loss`, the objective apart; and what it cannot compare is an error."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertForSequenceClassification, set_seed

from hf_guide import DistillationTrainer, VocabularyError, capture_teacher
from hf_guide.errors import OptionError, TaskError
from hf_guide.visualization import loss_curves
from tests.distillation.small import TASKS, _bert_config, collate, examples_for, llama, model_for
from tests.distillation.test_trainer import arguments


@pytest.mark.sampled(10)
@pytest.mark.parametrize("objective", [{"ce": 0.3, "kd": 0.7}, {"kd": 1.0}, {"hidden_states": 2.0}, {"ce": 1.0}])
@pytest.mark.parametrize("task", TASKS)
def test_the_loss_of_evaluation_is_the_task_loss(task: str, objective: dict[str, float], tmp_path: Path) -> None:
    held_out = examples_for(task, 7, seed=9)
    trainer = DistillationTrainer(
        model_for(task, 1),
        arguments(tmp_path, losses=objective, per_device_eval_batch_size=3),
        collate,
        eval_dataset=held_out,
        teacher=model_for(task, 2),
    )
    metrics = trainer.evaluate()
    model = trainer.model.eval()
    sums, items = 0.0, 0
    for example in held_out:
        batch = collate([example])
        labels = batch["labels"][:, 1:] if task == "causal-lm" else batch["labels"]
        count = int((labels != -100).sum())
        if count:
            with torch.no_grad():
                sums, items = sums + model(**batch).loss.item() * count, items + count
    assert metrics["eval_loss"] == metrics["eval_ce"] == pytest.approx(sums / items, rel=1e-4)
    weighted = sum(weight * metrics[f"eval_{name}"] for name, weight in objective.items())
    assert metrics["eval_objective"] == pytest.approx(weighted, rel=1e-5)
    if task.endswith("lm"):  # as run_clm.py and run_mlm.py write it
        assert math.exp(metrics["eval_loss"]) == pytest.approx(metrics["eval_perplexity"], rel=1e-6)
    predicted = trainer.predict(held_out).metrics
    assert predicted["test_loss"] == pytest.approx(metrics["eval_loss"], rel=1e-5)
    assert predicted["test_objective"] == pytest.approx(metrics["eval_objective"], rel=1e-5)


@pytest.mark.parametrize("metric", ["loss", "objective", "eval_kd", "perplexity", "eval_far_objective", "kd_weighted"])
def test_the_best_model_is_that_with_the_least_of_what_should_be_small(metric: str, tmp_path: Path) -> None:
    args = arguments(tmp_path, metric_for_best_model=metric, losses={"ce": 0.5, "kd": 0.5})
    assert args.greater_is_better is False
    assert arguments(tmp_path, metric_for_best_model="teacher_agreement").greater_is_better is True
    assert arguments(tmp_path, metric_for_best_model=metric, greater_is_better=True).greater_is_better is True


def test_the_best_model_by_the_objective_is_kept(tmp_path: Path) -> None:
    best = {
        "load_best_model_at_end": True,
        "metric_for_best_model": "objective",
        "eval_strategy": "steps",
        "eval_steps": 1,
    }
    trainer = DistillationTrainer(
        llama(1),
        arguments(tmp_path, max_steps=4, learning_rate=0.5, save_strategy="steps", save_steps=1, **best),
        collate,
        examples_for("causal-lm"),
        eval_dataset=examples_for("causal-lm", 6, seed=5),
        teacher=llama(2),
    )
    trainer.train()
    curve = {
        entry["step"]: entry["eval_objective"] for entry in trainer.state.log_history if "eval_objective" in entry
    }
    assert len(curve) == 4 and trainer.state.best_metric == min(curve.values())
    assert trainer.state.best_global_step == min(curve, key=lambda step: curve[step])
    drawn = loss_curves(trainer.state.log_history)
    assert dict(drawn["eval_objective"]) == curve and "eval_loss" not in drawn


# Where there are no classes to choose from


def scores(outputs: int, seed: int = 1, **changes: Any) -> BertForSequenceClassification:
    set_seed(seed)
    config = _bert_config(32, 2, **changes)
    config.num_labels = outputs
    return BertForSequenceClassification(config)


def rated(count: int = 8, *, outputs: int = 1) -> list[dict[str, Any]]:
    ratings = [number / count if outputs == 1 else [1.0] * outputs for number in range(count)]
    return [{"input_ids": [5 + number, 6, 7], "labels": rating} for number, rating in enumerate(ratings)]


def batch_of(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor([each[name] for each in examples]) for name in examples[0]}


@pytest.mark.parametrize("objective", ["dkd", {"ce": 0.5, "lelp": 0.5}])
@pytest.mark.parametrize("kind", [None, "regression", "multi_label_classification", "single_label_classification"])
def test_a_loss_of_classes_is_an_error_where_there_are_none(kind: str | None, objective: Any, tmp_path: Path) -> None:
    outputs = 3 if kind == "multi_label_classification" else 1
    student, teacher = (scores(outputs, seed, problem_type=kind) for seed in (1, 2))
    args = arguments(tmp_path, losses=objective)
    with pytest.raises(TaskError, match="outputs of the student.*cannot compare: use 'kd' or 'features'"):
        DistillationTrainer(student, args, batch_of, rated(outputs=outputs), teacher=teacher)


@pytest.mark.parametrize("kind", [None, "regression", "multi_label_classification", "single_label_classification"])
def test_kd_compares_what_the_outputs_are(kind: str | None, tmp_path: Path) -> None:
    """Mean squared error of one output, whatever its problem_type; binary divergences of several labels at once."""
    outputs = 3 if kind == "multi_label_classification" else 1
    student, teacher = (scores(outputs, seed, problem_type=kind).eval() for seed in (1, 2))
    data = rated(outputs=outputs)
    if kind == "single_label_classification":
        data = [each | {"labels": 0} for each in data]
    args = arguments(tmp_path, losses="kd", temperature=2.0)
    trainer = DistillationTrainer(student, args, batch_of, data, eval_dataset=data, teacher=teacher)
    inputs = {name: value for name, value in batch_of(data).items() if name != "labels"}
    with torch.no_grad():
        mine, theirs = (model(**inputs).logits.double() for model in (student, teacher))
    if outputs == 1:
        expected = (mine - theirs).square().mean()
    else:
        p, log_odds = (theirs / 2).sigmoid(), [(each / 2) for each in (theirs, mine)]
        yes, no = ([torch.nn.functional.logsigmoid(sign * each) for each in log_odds] for sign in (1, -1))
        expected = 4 * (p * (yes[0] - yes[1]) + (1 - p) * (no[0] - no[1])).sum(-1).mean()
    metrics = trainer.evaluate()
    assert metrics["eval_kd"] == pytest.approx(float(expected), rel=1e-5) and metrics["eval_kd"] > 0
    assert "eval_teacher_agreement" not in metrics
    trainer.train()
    assert all(math.isfinite(entry["kd"]) for entry in trainer.state.log_history if "kd" in entry)


def test_a_divergence_of_real_numbers_is_an_error(tmp_path: Path) -> None:
    args = arguments(tmp_path, losses="kd", kd_loss_type="reverse_kl")
    trainer = DistillationTrainer(scores(1), args, batch_of, rated(), teacher=scores(1, 2))
    with pytest.raises(OptionError, match="kd_loss_type is reverse_kl.*real numbers"):
        trainer.train()


def test_a_teacher_of_another_problem_type_is_an_error_live_and_cached(tmp_path: Path) -> None:
    teacher = scores(3, 2, problem_type="multi_label_classification")
    data = [each | {"labels": 1} for each in rated()]
    capture = capture_teacher(teacher, data, tmp_path / "capture", data_collator=batch_of, show_progress=False)
    for source in (teacher, capture):
        with pytest.raises((TaskError, VocabularyError), match="teacher's .*multi_label_classification"):
            DistillationTrainer(scores(3), arguments(tmp_path, losses="kd"), batch_of, data, teacher=source)


def test_labels_that_are_no_classes_are_an_error_at_the_first_batch(tmp_path: Path) -> None:
    """Transformers settles the kind of problem by the first batch's labels."""
    trainer = DistillationTrainer(
        scores(3), arguments(tmp_path, losses="kd"), batch_of, rated(outputs=3), teacher=scores(3, 2)
    )
    with pytest.raises(TaskError, match=r"torch.float32, \(8, 3\).*'kd' cannot learn.*problem_type"):
        trainer.train()


@pytest.mark.parametrize("outputs", [1, 3])
def test_a_regression_learns_vectors_and_is_evaluated(outputs: int, tmp_path: Path) -> None:
    trainer = DistillationTrainer(
        scores(outputs),
        arguments(tmp_path, losses={"ce": 1.0, "features": 1.0}),
        batch_of,
        rated(outputs=outputs),
        eval_dataset=rated(6, outputs=outputs),
        teacher=scores(outputs, 2),
    )
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == metrics["eval_ce"] > 0 and metrics["eval_features"] > 0
    assert "eval_teacher_agreement" not in metrics and "eval_teacher_ce" not in metrics


def test_one_shared_token_is_an_error(tmp_path: Path) -> None:
    from hf_guide.distillation.objective import build_objective
    from hf_guide.tasks import Task
    from hf_guide.teachers.forward import LiveTeacher

    args = arguments(tmp_path, losses="kd")
    trainer = DistillationTrainer(llama(1), args, collate, examples_for("causal-lm"), teacher=llama(2))
    teacher = LiveTeacher(llama(2), Task.CAUSAL_LM, classes=1)
    with pytest.raises(VocabularyError, match="share 1 token"):
        build_objective(trainer.model, Task.CAUSAL_LM, [teacher], args, trainer.accelerator, head=None)
