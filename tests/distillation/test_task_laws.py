"""The laws that every row of the task table keeps: a new task is a new case, and no law has a list of tasks."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainingArguments

from hf_guide import CaptureError, DistillationTrainer, capture_teacher
from hf_guide.tasks import OutputKind, Task, output_kind, task_of
from tests.distillation.small import TASKS, VOCABULARY, copy_of
from tests.distillation.task_cases import CASES, IMAGE, TaskCase, mixed_losses
from tests.distillation.test_trainer import arguments, step_of

TEMPERATURE = 2.0

VARIANTS = ("permutation-lm", "beam-search-question-answering", "siglip", "vision-encoder-decoder")
"""Further models for tasks that have a case already."""


def rows(*, slow: tuple[str, ...]) -> list[Any]:
    """Return all cases, those of some names marked slow."""
    return [pytest.param(name, marks=pytest.mark.slow if name in slow else ()) for name in CASES]


# What the first tasks are made of, `test_trainer.py` tests with every objective.
ROWS = rows(slow=(*TASKS, *VARIANTS))


def train_step(
    case: TaskCase, folder: Path, losses: dict[str, float], *, student: PreTrainedModel, teacher: Any, **changes: Any
) -> tuple[Tensor, dict[str, float]]:
    """Return the gradient of one step on eight examples, and its logs."""
    before = {name: value.clone() for name, value in student.named_parameters()}
    trainer = DistillationTrainer(
        student,
        arguments(folder, losses=losses, temperature=TEMPERATURE, remove_unused_columns=False, **changes),
        data_collator=case.collate,
        train_dataset=case.examples(8),
        teacher=teacher,
    )
    trainer.train()
    return step_of(student, before), trainer.state.log_history[0]


def test_there_is_a_case_for_every_task() -> None:
    assert {case.task for case in CASES.values()} == set(Task)
    for name, case in CASES.items():
        assert task_of(case.build(0, 16)) is case.task, name


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", ROWS)
def test_a_copy_has_loss_and_gradient_zero(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    teacher = case.build(1, 16)
    gradient, logs = train_step(
        case, tmp_path, dict.fromkeys(case.losses, 1.0), student=copy_of(teacher), teacher=teacher
    )
    assert all(abs(logs[loss]) < 1e-9 for loss in case.losses), logs
    assert gradient.abs().max() < 1e-6


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", CASES)
def test_the_gradient_of_kd_is_that_of_a_plain_formula_in_float64(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    if "kd" not in case.losses:
        pytest.skip("It has no logits.")
    student, teacher = case.build(1, 16), case.build(2, 24)
    batch = case.collate(case.examples(8))
    reference = copy_of(student).to(case.reference_dtype).train()
    with torch.no_grad():
        targets = plain_outputs(case, teacher.to(case.reference_dtype).eval(), batch)
    loss = plain_kd(case, reference, plain_outputs(case, reference, batch), targets, batch)
    loss.backward()
    expected = torch.cat(
        [(torch.zeros_like(each) if each.grad is None else each.grad).flatten() for each in reference.parameters()]
    )
    gradient, logs = train_step(case, tmp_path, {"kd": 1.0}, student=student, teacher=teacher.float())
    assert logs["kd"] == pytest.approx(loss.item(), rel=1e-4) and logs["kd"] > 1e-4
    assert (gradient - expected).norm() < 1e-3 * expected.norm()


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", ROWS)
def test_a_step_is_the_same_however_its_batch_is_split_up(name: str, tmp_path: Path) -> None:
    """Eight examples of unequal size at once, or one by one; losses of the batch as a whole only if they are `Trainer`'s."""
    case = CASES[name]
    losses = mixed_losses(case, invariant=True)
    if case.compares_examples:
        pytest.skip("Its outputs compare the examples of a batch.")
    teacher = case.build(2, 16)
    split = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}
    at_once, one_by_one = (
        train_step(case, tmp_path, losses, student=case.build(1, 16), teacher=teacher, **changes)[0]
        for changes in ({}, split)
    )
    assert at_once.norm() > 1e-3
    assert (at_once - one_by_one).norm() < 1e-4 * at_once.norm()


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", rows(slow=tuple(TASKS)))
def test_ce_is_the_models_own_loss_as_trainer_computes_it(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    if not case.has_own_loss:
        pytest.skip("It has no loss.")
    # Losses of a batch as a whole are averaged over micro-batches, as in Trainer.
    split = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2} if case.batch_coupled else {}
    gradient, logs = train_step(case, tmp_path, {"ce": 1.0}, student=case.build(1, 16), teacher=None, **split)
    student = case.build(1, 16)
    before = {name: value.clone() for name, value in student.named_parameters()}
    options = {
        "per_device_train_batch_size": 8, "max_steps": 1, "learning_rate": 1.0, "optim": "sgd", "seed": 3,
        "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "report_to": "none", "save_strategy": "no",
        "logging_steps": 1, "disable_tqdm": True, "use_cpu": True, "remove_unused_columns": False,
    }  # fmt: skip
    stock = Trainer(
        student,
        TrainingArguments(str(tmp_path / "stock"), **options | split),
        data_collator=lambda examples: {**case.collate(examples), **returned_loss(case)},
        train_dataset=case.examples(8),
    )
    stock.train()
    expected = step_of(student, before)
    assert logs["ce"] == pytest.approx(stock.state.log_history[0]["loss"], rel=1e-5)
    assert (gradient - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", ROWS)
def test_a_captured_run_is_a_live_one_or_refused(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    teacher = case.build(2, 16)
    options: dict[str, Any] = {"log_prob_dtype": "float32", "hidden_dtype": "float32", "batch_size": 3}
    losses = mixed_losses(case)
    losses.pop("boxes", None)
    if case.batch_coupled:  # it may draw points at random
        losses.pop("ce", None)
    if case.task is Task.MULTIPLE_CHOICE:
        losses.pop("hidden_states")
    if "hidden_states" in losses:
        options["hidden_layers"] = [1, 2]
    options["save_penultimate"] = "features" in losses
    if case.task.is_language_model:
        options["top_k"] = VOCABULARY
        options["temperatures"] = [1.0, TEMPERATURE]

    def capture() -> Any:
        folder, data = tmp_path / "capture", case.examples(8)
        options["remove_unused_columns"] = False
        return capture_teacher(teacher, data, folder, data_collator=case.collate, config=options, show_progress=False)

    if case.refused_by_cache is not None:
        with pytest.raises(CaptureError, match=case.refused_by_cache):
            capture()
        return
    live, cached = (
        train_step(case, tmp_path / "run", losses, student=case.build(1, 16), teacher=source)
        for source in (teacher, capture())
    )
    for loss in losses:
        assert cached[1][loss] == pytest.approx(live[1][loss], rel=1e-4, abs=1e-6), loss
    assert (live[0] - cached[0]).norm() < 1e-3 * live[0].norm()


@pytest.mark.parametrize("name", ROWS)
def test_evaluation_has_every_term(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    teacher, losses = case.build(2, 16), mixed_losses(case)
    trainer = DistillationTrainer(
        case.build(1, 16),
        arguments(tmp_path, losses=losses, remove_unused_columns=False, per_device_eval_batch_size=3),
        data_collator=case.collate,
        eval_dataset=case.examples(7),
        teacher=teacher,
    )
    metrics = trainer.evaluate()
    assert all(math.isfinite(metrics[f"eval_{loss}"]) for loss in losses), metrics
    is_categorical = "kd" in losses and output_kind(case.task, teacher.config) is OutputKind.CATEGORICAL
    assert ("eval_teacher_agreement" in metrics) is is_categorical


def returned_loss(case: TaskCase) -> dict[str, Any]:
    return {"return_loss": True} if case.task is Task.ZERO_SHOT_IMAGE_CLASSIFICATION else {}


# The plain formula, without the package


def plain_outputs(case: TaskCase, model: Any, batch: dict[str, Any]) -> Any:
    """Return a model's outputs in the dtype of the reference, the labels left out."""
    left_out = {"labels", "start_positions", "end_positions", "class_labels", "mask_labels"}
    inputs = {
        name: value.to(case.reference_dtype) if value.is_floating_point() else value
        for name, value in batch.items()
        if name not in left_out
    }
    if isinstance(getattr(model, "start_logits", None), nn.Module):  # a beam-search head, given the true start
        hidden = model.transformer(**inputs)[0]
        end = model.end_logits(hidden, start_positions=batch["start_positions"])
        return {"start_logits": model.start_logits(hidden), "end_logits": end}
    if case.task.row.targets_in_decoder and model.config.is_encoder_decoder:
        start = torch.full((len(batch["labels"]), 1), model.config.decoder_start_token_id)
        shifted = torch.cat([start, batch["labels"][:, :-1]], 1)
        inputs["decoder_input_ids"] = shifted.masked_fill(shifted == -100, model.config.pad_token_id)
    return model(**inputs)


def plain_kd(case: TaskCase, model: Any, mine: Any, theirs: Any, batch: dict[str, Any]) -> Tensor:
    """Return the mean over the items of the distance of two models' outputs, item by item."""
    values = [
        distance(output_kind(case.task, model.config), *pair)
        for pair in zip(items(case, model, mine, batch), items(case, model, theirs, batch), strict=True)
    ]
    return torch.stack(values).mean()


def distance(kind: OutputKind, mine: Tensor, theirs: Tensor) -> Tensor:
    if kind is OutputKind.REAL:
        return (mine - theirs).square().mean()
    if kind is OutputKind.CATEGORICAL:
        log_p, log_q = (theirs / TEMPERATURE).log_softmax(-1), (mine / TEMPERATURE).log_softmax(-1)
        return TEMPERATURE**2 * (log_p.exp() * (log_p - log_q)).sum()
    total = mine.new_zeros(())
    for sign in (1, -1):
        log_p = nn.functional.logsigmoid(sign * theirs / TEMPERATURE)
        log_q = nn.functional.logsigmoid(sign * mine / TEMPERATURE)
        total = total + (log_p.exp() * (log_p - log_q)).sum()
    return TEMPERATURE**2 * total


def items(case: TaskCase, model: Any, outputs: Any, batch: dict[str, Any]) -> list[Tensor]:
    """Return the logits of each item of a batch, found one by one."""
    task, shift = case.task, case.label_shift
    kind, labels = task.row.outputs[0].items, batch.get("labels")
    if kind == "token":
        rows, places = (labels != -100).nonzero(as_tuple=True)
        return [
            outputs["logits"][row, at - shift]
            for row, at in zip(rows.tolist(), places.tolist(), strict=True)
            if at >= shift
        ]
    if kind == "example":
        return list(outputs["logits"])
    if kind == "boundary":
        found = []
        for name in ("start", "end"):
            for row, position in enumerate(batch[f"{name}_positions"].tolist()):
                length = int(batch["attention_mask"][row].sum())
                if position < batch["input_ids"].shape[1]:
                    found.append(outputs[f"{name}_logits"][row, :length])
        return found
    if kind == "frame":
        lengths = model._get_feat_extract_output_lengths(batch["attention_mask"].sum(-1)).tolist()
        return [outputs["logits"][row, at] for row, length in enumerate(lengths) for at in range(length)]
    if kind == "pixel":
        step = IMAGE // outputs["logits"].shape[-1]
        known = (labels[:, ::step, ::step] != 255).nonzero().tolist()
        return [outputs["logits"][row, :, y, x] for row, y, x in known]
    if kind == "query":
        name = "logits" if task is Task.OBJECT_DETECTION else "class_queries_logits"
        return list(outputs[name].flatten(0, 1))
    if kind == "row":
        return [*outputs["logits_per_image"], *outputs["logits_per_text"]]
    if task is Task.IMAGE_PRETRAINING:
        return list(outputs["logits"][outputs["mask"].bool()])
    side = IMAGE // 4
    return [
        outputs["reconstruction"][
            row, :, 4 * (at // side) : 4 * (at // side) + 4, 4 * (at % side) : 4 * (at % side) + 4
        ]
        for row, at in batch["bool_masked_pos"].nonzero().tolist()
    ]
