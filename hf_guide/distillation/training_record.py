"""The record of a trainer's run, for the model card: `distillation.json`."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from hf_guide.distillation.cached_teacher import CachedTeacher
from hf_guide.hub.metadata import (
    DistillationRecord,
    recorded_teacher,
    reported_arguments,
    teacher_record,
)
from hf_guide.initialization.report import TeacherRecord
from hf_guide.models.adapters import without_adapter
from hf_guide.tasks import pipeline_tag
from hf_guide.utils.public_names import public_name

_TEACHER_METRIC = re.compile(r"_teacher_(?=ce$|perplexity$)")


def build_training_record(
    trainer: Any,
    *,
    datasets: Sequence[str] = (),
    evaluated_on: Sequence[str] = (),
    languages: Sequence[str] = (),
) -> DistillationRecord:
    """Return the record of a run so far, with the metrics of the student as it is now, where it was evaluated."""
    args, state = trainer.args, trainer.state
    student = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    history = eval_history(state.log_history)
    last: dict[str, float | None] = dict(_present_metrics(trainer))
    teacher_names = {name: _TEACHER_METRIC.sub("_", name) for name in last if _TEACHER_METRIC.search(name)}
    return DistillationRecord(
        teachers=[_teacher_record(each, args) for each in trainer.teachers],
        losses=args.loss_weights,
        temperature=args.temperature,
        kd_loss_type=args.kd_loss_type if "kd" in args.loss_weights else None,
        student_class=type(without_adapter(student)).__name__,
        student_parameters=student.num_parameters() if hasattr(student, "num_parameters") else None,
        task=pipeline_tag(type(without_adapter(student))),
        datasets=[public_name(name) for name in datasets],
        evaluated_on=", ".join(map(public_name, evaluated_on)) or None,
        languages=list(languages),
        steps=state.global_step,
        epochs=state.epoch,
        tokens=round(state.num_input_tokens_seen) or None,
        training=reported_arguments(args),
        metrics={
            name: value for name, value in last.items() if name not in teacher_names and not name.endswith("_weighted")
        },
        teacher_metrics={teacher_names[name]: value for name, value in last.items() if name in teacher_names},
        history=[dict(entry) for entry in history],
        earlier=list(trainer.earlier_trainings),
    )


def _present_metrics(trainer: Any) -> dict[str, float]:
    """Return the metrics of the student's present weights; none if they were not evaluated since they were last changed.

    At its end a training may have loaded the weights of an earlier step, the best one.
    """
    args, state = trainer.args, trainer.state
    ends = [number for number, entry in enumerate(state.log_history) if "train_runtime" in entry]
    since = state.log_history[ends[-1] :] if ends else []
    step = state.global_step
    if ends and args.load_best_model_at_end and state.best_model_checkpoint is not None:
        evaluated_since = eval_history(since)
        if evaluated_since:
            return evaluated_since[-1]
        step = state.best_global_step
    return next((entry for entry in eval_history(state.log_history) if entry["step"] == step), {})


def eval_history(history: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
    """Return the metrics of each step at which a `Trainer` evaluated, on one dataset or on several, merged by step."""
    by_step: dict[float, dict[str, float]] = {}
    for entry in history:
        if any(name.startswith("eval_") and name.endswith("_loss") for name in entry):
            by_step.setdefault(entry["step"], {}).update(entry)
    return list(by_step.values())


def _teacher_record(teacher: Any, args: Any) -> TeacherRecord:
    if isinstance(teacher, CachedTeacher):
        manifest = teacher.capture.manifest
        record = recorded_teacher(
            manifest.teacher,
            revision=manifest.teacher_revision,
            source=manifest.teacher_source,
            fingerprint=manifest.files,
            token=args.hub_token,
        )
        return dataclasses.replace(record, captured=True, fingerprint=manifest.files)
    revision = getattr(teacher.bare.config, "_commit_hash", None)
    return teacher_record(
        teacher.name,
        revision=revision,
        weight=teacher.weight,
        source=teacher.source,
        token=args.hub_token,
    )
