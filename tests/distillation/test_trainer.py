"""The laws that a distillation keeps on one process."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

from hf_guide import DistillationArguments, DistillationTrainer
from hf_guide.data.speech import SpeechCollator
from hf_guide.errors import OptionError
from hf_guide.hub.metadata import load_record
from tests.distillation.small import TASKS, collate, copy_of, examples_for, llama, model_for
from tests.small_speech import PITCHES, RATE, ctc_model, ctc_processor, tone

OBJECTIVES = {
    "kd": {"ce": 0.3, "kd": 0.7},
    "reverse": {"kd": 1.0},
    "hidden_states": {"hidden_states": 1.0},
    "features": {"features": 1.0, "ce": 0.5},
    "dkd": {"dkd": 1.0},
}


def arguments(folder: Path, **changes: Any) -> DistillationArguments:
    plain: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 1,
        "per_device_train_batch_size": 8,
        "learning_rate": 1.0,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
    }
    return DistillationArguments(**(plain | changes))


def step_of(model: torch.nn.Module, before: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return what one SGD step at rate 1 took off, which is the gradient, as one vector."""
    return torch.cat(
        [(before[name] - value).flatten() for name, value in model.state_dict().items() if name in before]
    )


def gradient(task: str, folder: Path, objective: dict[str, float], **changes: Any) -> torch.Tensor:
    student = model_for(task, 1)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    trainer = DistillationTrainer(
        student,
        arguments(folder, losses=objective, temperature=2.0, **changes),
        data_collator=collate,
        train_dataset=examples_for(task),
        teacher=model_for(task, 2, width=48 if objective.keys() & {"kd", "dkd"} else 32),
    )
    trainer.train()
    return step_of(student, before)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("task", TASKS)
def test_accumulation_leaves_gradients_as_they_are(task: str, objective: str, tmp_path: Path) -> None:
    if objective == "dkd" and task.endswith("lm"):
        pytest.skip("dkd is for classifiers")
    weights = OBJECTIVES[objective]
    changes = {"kd_loss_type": "reverse_kl"} if objective == "reverse" else {}
    at_once = gradient(task, tmp_path, weights, **changes)
    one_by_one = gradient(
        task, tmp_path, weights, per_device_train_batch_size=1, gradient_accumulation_steps=8, **changes
    )
    assert at_once.norm() > 1e-3
    assert (at_once - one_by_one).norm() < 1e-5 * at_once.norm()


@pytest.mark.sampled(3)
@pytest.mark.parametrize("task", TASKS)
def test_the_task_loss_alone_is_plain_trainer(task: str, tmp_path: Path) -> None:
    ours, plain = model_for(task, 1), model_for(task, 1)
    changes: dict[str, Any] = {"max_steps": 5, "optim": "adamw_torch", "learning_rate": 1e-2, "max_grad_norm": 1.0}
    args = arguments(tmp_path, losses="ce", **changes)
    own = DistillationTrainer(ours, args, collate, examples_for(task), teacher=model_for(task, 2))
    own.train()
    same = {
        name: getattr(args, name)
        for name in TrainingArguments.__dataclass_fields__
        if name in arguments(tmp_path).to_dict()
    }
    kept = {name: value for name, value in same.items() if TrainingArguments.__dataclass_fields__[name].init}
    theirs = Trainer(plain, TrainingArguments(**kept), collate, examples_for(task))
    theirs.train()
    for name, value in ours.state_dict().items():
        assert torch.equal(value, plain.state_dict()[name]), name
    losses = [[entry["loss"] for entry in each.state.log_history if "loss" in entry] for each in (own, theirs)]
    assert losses[0] == losses[1] and len(losses[0]) == 5


@pytest.mark.sampled(4)
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("kd_loss_type", ["forward_kl", "reverse_kl", "jsd"])
def test_a_student_distilled_from_itself_is_unchanged(task: str, kd_loss_type: str, tmp_path: Path) -> None:
    student = model_for(task, 1)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    args = arguments(tmp_path, losses="kd", kd_loss_type=kd_loss_type, temperature=3.0)
    trainer = DistillationTrainer(student, args, collate, examples_for(task), teacher=copy_of(student))
    trainer.train()
    assert abs(trainer.state.log_history[0]["kd"]) < 1e-6
    assert step_of(student, before).abs().max() < 1e-6


def test_dense_and_chunked_losses_agree(tmp_path: Path) -> None:
    found = []
    for loss_chunk_size in (61 * 3, 2**24):
        found.append(gradient("causal-lm", tmp_path, {"ce": 0.5, "kd": 0.5}, loss_chunk_size=loss_chunk_size))
    smooth = gradient("causal-lm", tmp_path, {"ce": 0.5, "kd": 0.5}, label_smoothing_factor=1e-9)  # takes whole logits
    for other in (found[1], smooth):
        assert (found[0] - other).norm() < 1e-5 * other.norm()


def test_terms_are_logged_raw_and_weighted_and_evaluation_reports_the_task(tmp_path: Path) -> None:
    student, teacher = llama(1), llama(2)
    args = arguments(tmp_path, losses={"kd": 0.25, "ce": 0.5}, learning_rate=0.1)
    trainer = DistillationTrainer(
        student,
        args,
        collate,
        examples_for("causal-lm"),
        eval_dataset=examples_for("causal-lm", 11, seed=5),
        teacher=teacher,
    )
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["kd_weighted"] == pytest.approx(0.25 * log["kd"]) and log["ce_weighted"] == pytest.approx(
        0.5 * log["ce"]
    )
    assert log["loss"] == pytest.approx(log["kd_weighted"] + log["ce_weighted"], rel=1e-5)
    metrics = trainer.evaluate()
    nats, count, same = 0.0, 0, 0
    for example in examples_for("causal-lm", 11, seed=5):
        batch = collate([example])
        with torch.no_grad():
            logits, others = (
                model(**{k: v for k, v in batch.items() if k != "labels"}).logits[0, :-1]
                for model in (student, teacher)
            )
        labels = batch["labels"][0, 1:]
        keep = labels != -100
        nats += torch.nn.functional.cross_entropy(logits[keep], labels[keep], reduction="sum").item()
        same += (logits[keep].argmax(-1) == others[keep].argmax(-1)).sum().item()
        count += int(keep.sum())
    assert metrics["eval_ce"] == pytest.approx(nats / count, rel=1e-5)
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(nats / count), rel=1e-4)
    assert metrics["eval_teacher_agreement"] == pytest.approx(same / count)


def test_a_card_reports_the_metrics_of_each_of_several_datasets(tmp_path: Path) -> None:
    trainer = DistillationTrainer(
        llama(1),
        arguments(tmp_path, losses="kd", max_steps=2, learning_rate=0.05, eval_strategy="steps", eval_steps=1),
        collate,
        examples_for("causal-lm"),
        eval_dataset={"near": examples_for("causal-lm", 4, seed=5), "far": examples_for("causal-lm", 6, seed=6)},
        teacher=llama(2),
    )
    trainer.train()
    trainer.create_model_card()
    record, last = load_record(tmp_path), trainer.state.log_history
    assert len(record.history) == 2
    for name in ("near", "far"):
        (measured,) = [entry for entry in last if f"eval_{name}_ce" in entry and entry["step"] == 2]
        assert record.metrics[f"eval_{name}_perplexity"] == measured[f"eval_{name}_perplexity"]
        assert record.teacher_metrics[f"eval_{name}_ce"] == measured[f"eval_{name}_teacher_ce"]
    assert "near_perplexity" in (tmp_path / "README.md").read_text()


def test_metrics_see_the_logits_alone(tmp_path: Path) -> None:
    seen: list[Any] = []

    def measure(prediction: Any) -> dict[str, float]:
        seen.append(prediction.predictions)
        return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    task = "sequence-classification"
    trainer = DistillationTrainer(
        model_for(task, 1),
        arguments(tmp_path, losses={"hidden_states": 1.0, "ce": 1.0}),
        collate,
        examples_for(task),
        eval_dataset=examples_for(task, 6),
        compute_metrics=measure,
        teacher=model_for(task, 2),
    )
    metrics = trainer.evaluate()
    assert seen[0].shape == (6, 5) and "eval_accuracy" in metrics and "eval_hidden_states" in metrics
    assert trainer.predict(examples_for(task, 4)).predictions.shape == (4, 5)


def test_the_teacher_is_left_alone(tmp_path: Path) -> None:
    student, teacher = llama(1), llama(2, width=48)
    before = copy.deepcopy(teacher.state_dict())
    teacher.train()
    trainer = DistillationTrainer(
        student, arguments(tmp_path, losses="kd"), collate, examples_for("causal-lm"), teacher=teacher
    )
    trainer.train()
    assert not teacher.training
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    learned = {id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]}
    assert not learned & {id(parameter) for parameter in teacher.parameters()}
    trainer.save_model(str(tmp_path / "saved"))
    from safetensors.torch import load_file

    assert load_file(tmp_path / "saved" / "model.safetensors").keys() <= student.state_dict().keys()


def test_projections_are_trained_resumed_and_not_published(tmp_path: Path) -> None:
    def run(folder: Path, **changes: Any) -> DistillationTrainer:
        args = arguments(
            folder,
            losses={"hidden_states": 1.0, "features": 1.0},
            max_steps=4,
            learning_rate=0.05,
            save_steps=2,
            save_strategy="steps",
            **changes,
        )
        return DistillationTrainer(
            llama(1), args, collate, examples_for("causal-lm"), teacher=llama(2, width=48, blocks=4)
        )

    whole = run(tmp_path / "whole")
    first = {name: value.clone() for name, value in whole.distillation_objective.projections.state_dict().items()}
    whole.train()
    assert whole.distillation_objective.layers == {1: 2, 2: 4}
    assert all(
        not torch.equal(value, first[name])
        for name, value in whole.distillation_objective.projections.state_dict().items()
    )
    again = run(tmp_path / "whole")
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for one, other in (
        (whole.model, again.model),
        (whole.distillation_objective.projections, again.distillation_objective.projections),
    ):
        for name, value in one.state_dict().items():
            assert torch.equal(value, other.state_dict()[name]), name
    whole.save_model(str(tmp_path / "saved"))
    assert not list((tmp_path / "saved").glob("*projections*"))


def test_several_teachers_are_weighed(tmp_path: Path) -> None:
    def losses(teacher: Any, **changes: Any) -> float:
        trainer = DistillationTrainer(
            llama(1),
            arguments(tmp_path, losses="kd", **changes),
            collate,
            examples_for("causal-lm"),
            teacher=teacher,
        )
        trainer.train()
        return trainer.state.log_history[0]["kd"]

    one, other = losses(llama(2)), losses(llama(3, width=48))
    both = losses([llama(2), llama(3, width=48)], teacher_weights=[3, 1])
    assert both == pytest.approx(0.75 * one + 0.25 * other, rel=1e-5)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("task", ["causal-lm", "sequence-classification"])
def test_a_users_own_loss_and_smoothing_are_the_task_loss(task: str, tmp_path: Path) -> None:
    def doubled(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        logits = outputs["logits"]
        if task == "causal-lm":
            logits, labels = logits[:, :-1], labels[:, 1:]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="sum")
        return 2 * loss / num_items_in_batch

    def ce(**given: Any) -> float:
        trainer = DistillationTrainer(
            model_for(task, 1),
            arguments(tmp_path, losses={"ce": 0.5, "kd": 0.5}, **given.pop("changes", {})),
            collate,
            examples_for(task),
            teacher=model_for(task, 2),
            **given,
        )
        trainer.train()
        return trainer.state.log_history[0]["ce"]

    plain = ce()
    assert ce(compute_loss_func=doubled) == pytest.approx(2 * plain, rel=1e-5)
    assert ce(changes={"label_smoothing_factor": 0.5}) != pytest.approx(plain, rel=1e-3)


def test_a_term_of_ones_own(tmp_path: Path) -> None:
    from hf_guide.distillation.losses.registry import _LOSSES, register_loss
    from hf_guide.teachers.signals import DenseTarget

    @register_loss("squared", requires="logits", help="squared difference of logits")
    def squared(student: torch.Tensor, teacher: DenseTarget, labels: Any, config: Any) -> torch.Tensor:
        return (student - teacher.logits).square().mean(-1)

    try:
        trainer = DistillationTrainer(
            llama(1),
            arguments(tmp_path, losses={"squared": 1.0}),
            collate,
            examples_for("causal-lm"),
            teacher=llama(2),
        )
        trainer.train()
        assert trainer.state.log_history[0]["squared"] > 0
    finally:
        del _LOSSES["squared"]


def test_model_init_makes_a_fresh_student_each_time(tmp_path: Path) -> None:
    trainer = DistillationTrainer(
        model_init=lambda: llama(1),
        args=arguments(tmp_path, losses="kd"),
        data_collator=collate,
        train_dataset=examples_for("causal-lm"),
        teacher=llama(2),
    )
    curves = []
    for _ in range(2):
        trainer.train()
        curves.append(trainer.state.log_history[0]["kd"])
    assert curves[0] == curves[1] and trainer.distillation_objective.head.module is trainer.model.lm_head


MAKERS: dict[str, Callable[[], Any]] = {
    "a config": lambda: llama(0, width=16, blocks=1).config,
    "arguments": lambda: {
        "method": "guide",
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "intermediate_size": 32,
        "head_dim": 4,
    },
}


@pytest.mark.parametrize("maker", MAKERS)
def test_a_student_is_made_out_of_its_teacher(maker: str, tmp_path: Path) -> None:
    llama(2).save_pretrained(tmp_path / "teacher")
    trainer = DistillationTrainer(
        MAKERS[maker](),
        arguments(tmp_path, losses="kd"),
        collate,
        examples_for("causal-lm"),
        teacher=str(tmp_path / "teacher"),
    )
    trainer.train()
    assert trainer.model.config.hidden_size == 16
    assert trainer.model.initialization_report.options["method"] == "guide"


def test_a_calibrated_student_is_made_with_what_it_is_trained_on(tmp_path: Path) -> None:
    llama(2).save_pretrained(tmp_path / "teacher")
    asked = MAKERS["arguments"]() | {"method": "calibrated"}
    options = arguments(tmp_path, losses="kd")
    teacher = {"teacher": str(tmp_path / "teacher")}
    examples = examples_for("causal-lm")
    trainer = DistillationTrainer(asked, options, collate, examples, **teacher)
    trainer.train()
    report = trainer.model.initialization_report
    assert report.options["method"] == "calibrated"
    assert report.calibration["tokens"] == sum(len(example["input_ids"]) for example in examples)
    # Where there is nothing to train on, an error names what is missing.
    with pytest.raises(OptionError, match="no calibration_dataset was given"):
        DistillationTrainer(asked, options, collate, eval_dataset=examples, **teacher)


def test_a_calibrated_student_of_sounds_is_made_with_batches_of_the_collator(tmp_path: Path) -> None:
    """Clips differ in length, and their feature extractor pads them."""
    processor = ctc_processor(tmp_path / "processor")
    teacher = ctc_model(processor)
    clips = [tone(name, seconds=0.4 + 0.1 * index, seed=index) for index, name in enumerate(PITCHES)]
    extractor, labels = processor.feature_extractor, processor.tokenizer("low").input_ids
    examples = [
        {"input_values": extractor(clip, sampling_rate=RATE)["input_values"][0], "labels": labels} for clip in clips
    ]
    seen: list[int] = []

    def collate_clips(batch: Any) -> Any:
        seen.append(len(batch))
        return SpeechCollator(extractor)(batch)

    asked = {"method": {"method": "calibrated", "refit": "none"}, "num_hidden_layers": 1}
    trainer = DistillationTrainer(asked, arguments(tmp_path, losses="kd"), collate_clips, examples, teacher=teacher)
    assert seen == [len(examples)]
    report = trainer.model.initialization_report
    assert report.options["method"] == "calibrated" and report.calibration["tokens"] > 0
