"""The laws of learning subclasses: the loss of the student, and class logits for everything else."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from hf_guide import DistillationArguments, DistillationTrainer
from hf_guide.distillation.losses.registry import registered_losses
from hf_guide.distillation.subclass_logits import class_logits
from hf_guide.errors import OptionError, TaskError
from hf_guide.utils.labels import config_class_names, subclass_names
from tests.distillation.small import CLASSES, collate, examples_for, model_for
from tests.distillation.test_trainer import arguments, step_of

SUBCLASSES = 3
TASKS = ["sequence-classification", "image-classification"]


def student_of(task: str, num_subclasses: int = SUBCLASSES, seed: int = 1) -> PreTrainedModel:
    """Return a small student with subclasses."""
    plain = model_for(task, seed)
    config = copy.deepcopy(plain.config)
    names = subclass_names([f"class {number}" for number in range(CLASSES)], num_subclasses)
    config.id2label = dict(enumerate(names))
    config.label2id = {name: number for number, name in enumerate(names)}
    config.num_subclasses = num_subclasses
    torch.manual_seed(seed)
    return type(plain)(config)


def with_targets(examples: list[dict[str, Any]], targets: Tensor) -> list[dict[str, Any]]:
    return [example | {"subclass_probabilities": row} for example, row in zip(examples, targets, strict=True)]


def some_targets(count: int, outputs: int = CLASSES * SUBCLASSES) -> Tensor:
    return torch.randn(count, outputs, generator=torch.Generator().manual_seed(5)).mul(2).softmax(-1)


def gradient_of(student: PreTrainedModel, folder: Path, examples: list[dict[str, Any]], **changes: Any) -> Tensor:
    """Return the gradient of the first step, by the trainer."""
    before = {name: value.clone() for name, value in student.state_dict().items()}
    teacher = changes.pop("teacher", None)
    trainer = DistillationTrainer(student, arguments(folder, **changes), collate, examples, teacher=teacher)
    trainer.train()
    return step_of(trainer.model, before)


def by_hand(student: PreTrainedModel, examples: list[dict[str, Any]], loss: Any) -> Tensor:
    """Return the gradient of a loss of the student's logits and the batch, by autograd."""
    student = copy.deepcopy(student).train()
    batch = collate(examples)
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "subclass_probabilities")}
    loss(student(**inputs).logits, batch).backward()
    parameters = dict(student.named_parameters())
    return torch.cat(
        [
            (parameters[name].grad if name in parameters else torch.zeros_like(value)).flatten()
            for name, value in student.state_dict().items()
        ]
    )


@pytest.mark.parametrize("task", TASKS)
def test_the_gradient_is_that_of_the_unified_cross_entropy(task: str, tmp_path: Path) -> None:
    student, tau = student_of(task), 2.0
    examples = with_targets(examples_for(task, 8), some_targets(8))

    def unified(logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return -(tau**2) * (batch["subclass_probabilities"] * (logits / tau).log_softmax(-1)).sum(-1).mean()

    expected = by_hand(student, examples, unified)
    actual = gradient_of(student, tmp_path, examples, losses="lelp", temperature=tau)
    assert (actual - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.sampled(1)
@pytest.mark.parametrize("task", TASKS)
def test_one_subclass_is_exactly_distillation(task: str, tmp_path: Path) -> None:
    tau, teacher = 2.0, model_for(task, 2).eval()
    plain = examples_for(task, 8)
    inputs = {name: value for name, value in collate(plain).items() if name != "labels"}
    with torch.no_grad():
        targets = (teacher(**inputs).logits / tau).softmax(-1)
    kd = gradient_of(
        student_of(task, 1), tmp_path, plain, losses="kd", temperature=tau, teacher=copy.deepcopy(teacher)
    )
    actual = gradient_of(student_of(task, 1), tmp_path, with_targets(plain, targets), losses="lelp", temperature=tau)
    assert (actual - kd).norm() < 1e-5 * kd.norm()


def test_one_subclass_has_the_value_and_the_gradient_of_distillation_to_rounding() -> None:
    args = DistillationArguments("unused", temperature=3.0, losses={"lelp": 0.5, "kd": 0.5}, report_to="none")
    losses, configs = registered_losses(), args.loss_configs
    from hf_guide.teachers.signals import DenseTarget

    teacher, student = torch.randn(2, 6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mine, theirs = (student.clone().requires_grad_() for _ in range(2))
    actual = losses["lelp"].function(mine, (teacher / 3.0).softmax(-1), configs["lelp"])
    expected = losses["kd"].function(theirs, DenseTarget(teacher), None, configs["kd"])
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)
    actual.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-12, atol=1e-14)


def test_a_subclass_of_probability_zero_is_no_nan() -> None:
    config = DistillationArguments("unused", losses="lelp", report_to="none").loss_configs["lelp"]
    target = torch.tensor([[0.0, 0.25, 0.75, 0.0]])
    student = torch.zeros(1, 4, requires_grad=True)
    value = registered_losses()["lelp"].function(student, target, config)
    value.sum().backward()
    assert torch.isfinite(value).all() and torch.isfinite(student.grad).all()
    torch.testing.assert_close(student.grad, torch.full((1, 4), 0.25) - target)


def test_the_softmax_of_class_logits_is_the_sum_over_subclasses() -> None:
    logits = torch.randn(7, 12, dtype=torch.float64) * 10
    summed = logits.softmax(-1).view(7, 4, 3).sum(-1)
    torch.testing.assert_close(class_logits(logits, 3).softmax(-1), summed, rtol=1e-12, atol=1e-15)
    assert class_logits(logits.half(), 3).dtype == torch.float32


@pytest.mark.parametrize("task", TASKS)
def test_hard_labels_and_distillation_use_class_logits(task: str, tmp_path: Path) -> None:
    examples, student, teacher = examples_for(task, 8), student_of(task), model_for(task, 2).eval()
    inputs = {name: value for name, value in collate(examples).items() if name != "labels"}
    with torch.no_grad():
        teacher_probabilities = teacher(**inputs).logits.softmax(-1)

    def both(logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
        log_classes = logits.softmax(-1).unflatten(-1, (CLASSES, SUBCLASSES)).sum(-1).log()
        hard = torch.nn.functional.nll_loss(log_classes, batch["labels"])
        return 0.25 * hard + 0.75 * torch.nn.functional.kl_div(
            log_classes, teacher_probabilities, reduction="batchmean"
        )

    expected = by_hand(student, examples, both)
    actual = gradient_of(student, tmp_path, examples, losses={"ce": 0.25, "kd": 0.75}, teacher=teacher)
    assert (actual - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.sampled(2)
@pytest.mark.parametrize("objective", ["ce", "lelp", {"ce": 0.5, "lelp": 0.5}])
def test_accumulated_batches_are_one_batch(objective: Any, tmp_path: Path) -> None:
    task = "sequence-classification"
    examples = with_targets(examples_for(task, 8), some_targets(8))
    for example in examples[::3]:
        example["labels"] = -100
    whole = gradient_of(student_of(task), tmp_path, examples, losses=objective)
    parts = gradient_of(
        student_of(task),
        tmp_path,
        examples,
        losses=objective,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
    )
    assert (whole - parts).norm() < 1e-5 * whole.norm()


@pytest.mark.extended
def test_examples_without_a_label_are_learned_by_their_subclasses(tmp_path: Path) -> None:
    task = "sequence-classification"
    examples = with_targets(examples_for(task, 8), some_targets(8))
    labelled = gradient_of(student_of(task), tmp_path, examples, losses="lelp")
    for example in examples[1:]:
        example["labels"] = -100
    some = gradient_of(student_of(task), tmp_path, examples, losses="lelp")
    none = [{name: value for name, value in example.items() if name != "labels"} for example in examples]
    assert torch.equal(labelled, some)
    assert torch.equal(labelled, gradient_of(student_of(task), tmp_path, none, losses="lelp"))
    # Labels are averaged over the examples that have one, however few these are, and however they are cut into batches.
    examples[6]["labels"] = 2
    student = student_of(task)

    def mixed(logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
        rows = [0, 6]
        hard = torch.nn.functional.cross_entropy(class_logits(logits, SUBCLASSES)[rows], batch["labels"][rows])
        return hard - (batch["subclass_probabilities"] * logits.log_softmax(-1)).sum(-1).mean()

    expected = by_hand(student, examples, mixed)
    for size in (8, 2):
        parts: dict[str, Any] = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size}
        actual = gradient_of(copy.deepcopy(student), tmp_path, examples, losses={"ce": 1.0, "lelp": 1.0}, **parts)
        assert (actual - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("task", TASKS)
def test_predictions_and_metrics_use_class_logits(task: str, tmp_path: Path) -> None:
    examples, seen = examples_for(task, 6), []
    student = student_of(task)

    def metrics(prediction: Any) -> dict[str, float]:
        seen.append(prediction.predictions.shape)
        return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    trainer = DistillationTrainer(
        student,
        arguments(tmp_path, losses="lelp"),
        collate,
        None,
        with_targets(examples, some_targets(6)),
        compute_metrics=metrics,
        teacher=model_for(task, 2),
    )
    actual = trainer.evaluate()
    assert seen == [(6, CLASSES)]
    assert {"eval_accuracy", "eval_ce", "eval_lelp", "eval_lelp_weighted", "eval_teacher_agreement"} <= actual.keys()
    inputs = {name: value for name, value in collate(examples).items() if name != "labels"}
    with torch.no_grad():
        expected = class_logits(student.eval()(**inputs).logits, SUBCLASSES)
    torch.testing.assert_close(torch.tensor(trainer.predict(examples).predictions), expected)
    unlabelled = [{name: value for name, value in example.items() if name != "labels"} for example in examples]
    torch.testing.assert_close(torch.tensor(trainer.predict(unlabelled).predictions), expected)
    torch.testing.assert_close(
        torch.tensor(actual["eval_ce"]), torch.nn.functional.cross_entropy(expected, collate(examples)["labels"])
    )


def test_evaluation_without_subclass_probabilities_uses_the_task_loss(tmp_path: Path) -> None:
    task = "sequence-classification"
    trainer = DistillationTrainer(
        student_of(task), arguments(tmp_path, losses="lelp"), collate, None, examples_for(task, 6)
    )
    actual = trainer.evaluate()
    assert actual["eval_loss"] == pytest.approx(actual["eval_ce"]) and "eval_lelp" not in actual


def test_label_smoothing_and_a_custom_loss_use_class_logits(tmp_path: Path) -> None:
    task, shapes = "sequence-classification", []

    def own(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        shapes.append(outputs["logits"].shape)
        return torch.nn.functional.cross_entropy(outputs["logits"], labels)

    trainer = DistillationTrainer(
        student_of(task), arguments(tmp_path, losses="ce"), collate, examples_for(task, 8), compute_loss_func=own
    )
    trainer.train()
    assert shapes == [(8, CLASSES)]
    smoothed = DistillationTrainer(
        student_of(task),
        arguments(tmp_path, losses="ce", label_smoothing_factor=0.1),
        collate,
        examples_for(task, 8),
    )
    smoothed.train()


def test_the_names_of_classes_are_read_from_those_of_subclasses() -> None:
    config = student_of("sequence-classification").config
    assert config_class_names(config) == [f"class {number}" for number in range(CLASSES)]
    config.id2label = {number: f"LABEL_{number}" for number in range(CLASSES * SUBCLASSES)}
    assert config_class_names(config) == [f"LABEL_{number}" for number in range(CLASSES)]


def test_a_batch_without_subclass_probabilities_raises(tmp_path: Path) -> None:
    task = "sequence-classification"
    trainer = DistillationTrainer(student_of(task), arguments(tmp_path, losses="lelp"), collate, examples_for(task, 8))
    with pytest.raises(TaskError, match=r"no subclass_probabilities.*SubclassLabelCollator"):
        trainer.train()


def test_another_number_of_outputs_raises(tmp_path: Path) -> None:
    task = "sequence-classification"
    examples = with_targets(examples_for(task, 8), some_targets(8, CLASSES * 2))
    trainer = DistillationTrainer(student_of(task), arguments(tmp_path, losses="lelp"), collate, examples)
    with pytest.raises(TaskError, match=r"\(8, 10\); the student has 15 outputs, which are 5 classes of 3"):
        trainer.train()
    odd = student_of(task)
    odd.config.num_subclasses = 4
    with pytest.raises(TaskError, match="15 outputs, which is not a multiple of its 4"):
        DistillationTrainer(odd, arguments(tmp_path, losses="ce"), collate, examples)


def test_the_loss_needs_classes_that_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="'lelp' is for"):
        DistillationTrainer(
            model_for("causal-lm", 1), arguments(tmp_path, losses="lelp"), collate, examples_for("causal-lm")
        )
    student = student_of("sequence-classification")
    student.config.problem_type = "multi_label_classification"
    with pytest.raises(TaskError, match="multi_label_classification"):
        DistillationTrainer(student, arguments(tmp_path, losses="ce"), collate)
    with pytest.raises(OptionError, match="'lelpp'.*Did you mean 'lelp'"):
        arguments(tmp_path, losses="lelpp")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's own call
@pytest.mark.parametrize("on_classifier", ["a copy", "LoRA"])
def test_an_adapter_learns_subclasses_and_is_merged(on_classifier: str, tmp_path: Path) -> None:
    from peft import LoraConfig

    task = "sequence-classification"
    examples = with_targets(examples_for(task, 8), some_targets(8))
    if on_classifier == "a copy":
        adapter = LoraConfig(target_modules=["query"], modules_to_save=["classifier"], task_type="SEQ_CLS")
    else:
        adapter = LoraConfig(r=SUBCLASSES * CLASSES, target_modules=["query", "classifier"])
    trainer = DistillationTrainer(
        student_of(task),
        arguments(tmp_path, losses="lelp", max_steps=4, learning_rate=0.1),
        collate,
        examples,
        examples,
        peft_config=adapter,
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()["eval_lelp"]
    assert after < before["eval_lelp"]
    assert trainer.predict(examples).predictions.shape == (8, CLASSES)
    trainer.save_merged_model(tmp_path / "merged")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    again = DistillationTrainer(merged, arguments(tmp_path, losses="lelp"), collate, eval_dataset=examples)
    assert again.evaluate()["eval_lelp"] == pytest.approx(after, rel=1e-5)


def test_bfloat16_is_near_float32(tmp_path: Path) -> None:
    task = "sequence-classification"
    examples = with_targets(examples_for(task, 8), some_targets(8))
    exact = gradient_of(student_of(task), tmp_path, examples, losses={"ce": 0.5, "lelp": 0.5})
    rounded = gradient_of(student_of(task), tmp_path, examples, losses={"ce": 0.5, "lelp": 0.5}, bf16=True)
    assert 0 < (exact - rounded).norm() < 0.05 * exact.norm()
