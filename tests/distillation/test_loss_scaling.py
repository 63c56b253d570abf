"""A step without any target has loss and gradient zero, whatever is learned and however it is computed."""

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_guide import DistillationTrainer, capture_teacher
from tests.distillation.small import TASKS, collate, examples_for, model_for
from tests.distillation.test_trainer import arguments

SIZE = 4
OBJECTIVES: dict[str, dict[str, Any]] = {
    "ce": {"losses": "ce"},
    "kd": {"losses": "kd"},
    "mixed": {"losses": {"ce": 0.5, "kd": 0.5}},
    "reverse": {"losses": {"kd": 1.0}, "kd_loss_type": "reverse_kl", "temperature": 2.0},
    "jsd": {"losses": {"kd": 1.0}, "kd_loss_type": "jsd"},
    "vectors": {"losses": {"hidden_states": 1.0, "features": 1.0}},
    "cosine": {
        "losses": {"hidden_states": 1.0, "features": 1.0, "ce": 1.0},
        "loss_options": {name: {"distance": "cosine"} for name in ("hidden_states", "features")},
    },
    "dkd": {"losses": {"dkd": 1.0, "ce": 1.0}},
    "smooth": {"losses": {"ce": 0.5, "kd": 0.5}, "label_smoothing_factor": 0.1},
}


def without_labels(example: dict[str, Any]) -> dict[str, Any]:
    labels = example["labels"]
    return example | {"labels": -100 if isinstance(labels, int) else [-100] * len(labels)}


def examples(task: str, empty: set[int], steps: int = 3) -> list[dict[str, Any]]:
    """Return batches of `SIZE` examples, of which those numbered in `empty` have no target."""
    made = examples_for(task, SIZE * steps, seed=4)
    return [without_labels(each) if number // SIZE in empty else each for number, each in enumerate(made)]


def run(task: str, folder: Path, data: list[dict[str, Any]], **changes: Any) -> tuple[list[Any], list[dict[str, Any]]]:
    """Return the weights after every step, those at first among them, and the log."""
    student = model_for(task, 1)
    weights = [torch.cat([each.detach().flatten().clone() for each in student.parameters()])]
    given = {name: changes.pop(name) for name in ("teacher", "compute_loss_func", "data_collator") if name in changes}
    trainer = DistillationTrainer(
        student,
        arguments(
            folder,
            **(
                {
                    "max_steps": 3,
                    "per_device_train_batch_size": SIZE,
                    "train_sampling_strategy": "sequential",
                    "learning_rate": 0.05,
                }
                | changes
            ),
        ),
        given.pop("data_collator", collate),
        data,
        **({"teacher": model_for(task, 2)} | given),
    )

    from transformers import TrainerCallback

    class Keep(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            weights.append(torch.cat([each.detach().flatten().clone() for each in student.parameters()]))

    trainer.add_callback(Keep())
    trainer.train()
    return weights, [entry for entry in trainer.state.log_history if "loss" in entry]


def cases() -> list[Any]:
    found = []
    for task, objective in itertools.product(TASKS, OBJECTIVES):
        if objective == "dkd" and task.endswith("lm"):
            continue
        often = objective in ("mixed", "kd") or (objective, task) in (
            ("ce", "seq2seq-lm"),
            ("dkd", "token-classification"),
        )
        found.append(pytest.param(task, objective, marks=() if often else pytest.mark.slow))
    return found


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("task", "objective"), cases())
def test_a_step_without_targets_has_loss_and_gradient_zero(task: str, objective: str, tmp_path: Path) -> None:
    weights, log = run(task, tmp_path, examples(task, {1}), **OBJECTIVES[objective])
    assert torch.equal(weights[1], weights[2]) and log[1]["loss"] == log[1]["grad_norm"] == 0.0
    assert not torch.equal(weights[0], weights[1]) and not torch.equal(weights[2], weights[3])
    assert bool(weights[-1].isfinite().all()) and log[2]["loss"] > 0
    assert all(math.isfinite(value) for entry in log for value in entry.values())
    assert all(log[1].get(name, 0.0) == 0.0 for name in OBJECTIVES[objective]["losses"] or ())


@pytest.mark.sampled(2)
@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("task", TASKS)
def test_micro_batches_without_targets_count_for_nothing(task: str, average: bool, tmp_path: Path) -> None:
    """Four micro-batches, two of them empty, are the two others; and the means of an interval are theirs."""
    data = examples(task, {1, 2}, steps=4)
    plain = [each for number, each in enumerate(data) if number // SIZE not in (1, 2)]
    common: dict[str, Any] = {
        "losses": {"ce": 0.5, "kd": 0.5},
        "max_steps": 1,
        "average_tokens_across_devices": average,
    }
    (_, some), log = run(task, tmp_path, data, gradient_accumulation_steps=4, **common)
    (first, others), other_log = run(task, tmp_path, plain, gradient_accumulation_steps=2, **common)
    step = first - others
    assert step.norm() > 1e-4 and (some - others).norm() < 1e-5 * step.norm()
    for name in ("loss", "ce", "kd"):
        assert log[0][name] == pytest.approx(other_log[0][name], rel=1e-5)
    # All four of them empty.
    (before, after), log = run(
        task, tmp_path, examples(task, {0, 1, 2, 3}, steps=4), gradient_accumulation_steps=4, **common
    )
    assert torch.equal(before, after) and log[0]["loss"] == 0.0


def test_means_over_a_logging_interval_are_those_of_the_steps_with_targets(tmp_path: Path) -> None:
    common = {"losses": {"ce": 0.5, "kd": 0.5}, "learning_rate": 0.0}
    _, log = run("causal-lm", tmp_path, examples("causal-lm", {1}), logging_steps=3, **common)
    _, each = run("causal-lm", tmp_path, examples("causal-lm", {1}), **common)
    assert min(each[0]["kd"], each[2]["kd"]) <= log[0]["kd"] <= max(each[0]["kd"], each[2]["kd"])


@pytest.mark.sampled(1)
@pytest.mark.parametrize("task", ["causal-lm", "seq2seq-lm", "token-classification"])
def test_a_users_own_loss_is_not_called_for_a_batch_without_targets(task: str, tmp_path: Path) -> None:
    def own(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        logits = outputs["logits"]
        if task == "causal-lm":
            logits, labels = logits[:, :-1], labels[:, 1:]
        kept = labels != -100
        loss = torch.nn.functional.cross_entropy(logits[kept], labels[kept], reduction="sum")
        return loss / kept.sum() if num_items_in_batch is None else loss / num_items_in_batch

    weights, log = run(task, tmp_path, examples(task, {1}), losses={"ce": 0.5, "kd": 0.5}, compute_loss_func=own)
    assert torch.equal(weights[1], weights[2]) and log[1]["loss"] == 0.0 and log[2]["loss"] > 0
    assert bool(weights[-1].isfinite().all())


@pytest.mark.parametrize("task", ["causal-lm", "token-classification"])
def test_a_cached_teacher_has_no_signals_without_targets_either(task: str, tmp_path: Path) -> None:
    data = examples(task, {1})
    capture = capture_teacher(
        model_for(task, 2), data, tmp_path / "capture", data_collator=collate, config={"top_k": 8}, show_progress=False
    )
    weights, log = run(task, tmp_path, data, losses={"ce": 0.5, "kd": 0.5}, teacher=capture)
    assert torch.equal(weights[1], weights[2]) and log[1]["loss"] == 0.0 and log[2]["kd"] > 0


@pytest.mark.sampled(1)
@pytest.mark.parametrize("task", ["causal-lm", "seq2seq-lm", "sequence-classification"])
def test_the_optimizer_does_what_it_does_with_zero_gradients(task: str, tmp_path: Path) -> None:
    """Weight decay and momentum go on, as they do in a plain `Trainer`."""
    weights, _ = run(
        task,
        tmp_path,
        examples(task, {0, 1, 2}),
        losses={"ce": 0.5, "kd": 0.5},
        optim="adamw_torch",
        weight_decay=0.1,
    )
    assert bool(weights[-1].isfinite().all())
    assert not torch.equal(weights[0], weights[-1]) and bool((weights[-1].abs() <= weights[0].abs()).all())


@pytest.mark.parametrize("task", ["causal-lm", "sequence-classification", "token-classification"])
def test_evaluation_without_targets_has_a_loss_of_nothing(task: str, tmp_path: Path) -> None:
    trainer = DistillationTrainer(
        model_for(task, 1),
        arguments(tmp_path, losses={"ce": 0.5, "kd": 0.5}, per_device_eval_batch_size=SIZE),
        collate,
        examples(task, set()),
        eval_dataset={"some": examples(task, {1}), "none": examples(task, {0, 1, 2})},
        teacher=model_for(task, 2),
    )
    metrics = trainer.evaluate()
    kept = [each for number, each in enumerate(examples(task, set())) if number // SIZE != 1]
    plain = trainer.evaluate({"some": kept})
    for name in ("loss", "ce", "kd", "objective", "teacher_agreement"):
        assert metrics[f"eval_some_{name}"] == pytest.approx(plain[f"eval_some_{name}"], rel=1e-5)
    assert all(math.isfinite(value) for value in metrics.values()) and "eval_none_kd" not in metrics
