"""What a trainer tells of its run, for the card: `distillation.json`."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hf_guide.cards import DistillationRecord, TeacherRecord, told_arguments
from hf_guide.distillation.playback import CapturedTeacher
from hf_guide.distillation.tasks import Task
from hf_guide.distillation.teachers import name_of
from hf_guide.provenance import describe_teacher

if TYPE_CHECKING:
    from hf_guide.distillation.trainer import DistillationTrainer

_ON_THE_HUB = {
    Task.CAUSAL_LM: "text-generation",
    Task.MASKED_LM: "fill-mask",
    Task.SEQ2SEQ_LM: "text2text-generation",
    Task.SEQUENCE_CLASSIFICATION: "text-classification",
    Task.TOKEN_CLASSIFICATION: "token-classification",
    Task.IMAGE_CLASSIFICATION: "image-classification",
}

_OF_TEACHER = "eval_teacher_"


def make_record(
    trainer: "DistillationTrainer",
    *,
    datasets: Sequence[str] = (),
    evaluated_on: Sequence[str] = (),
    languages: Sequence[str] = (),
) -> DistillationRecord:
    """Return what there is to tell of a run so far. The metrics are those of the last evaluation."""
    args, state = trainer.args, trainer.state
    student = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    history = [entry for entry in state.log_history if "eval_loss" in entry]
    found: dict[str, float | None] = dict(history[-1]) if history else {}
    of_teacher = {f"{_OF_TEACHER}{name}": f"eval_{name}" for name in ("ce", "perplexity")}
    return DistillationRecord(
        teachers=[_teacher(each, args) for each in trainer.teachers],
        objective=args.weights,
        temperature=args.temperature,
        divergence=args.divergence if "kd" in args.weights else None,
        student_class=type(student).__name__,
        student_parameters=student.num_parameters() if hasattr(student, "num_parameters") else None,
        task=_ON_THE_HUB[trainer.task],
        datasets=list(datasets),
        evaluated_on=", ".join(evaluated_on) or None,
        languages=list(languages),
        steps=state.global_step,
        epochs=state.epoch,
        training=told_arguments(args),
        metrics={
            name: value for name, value in found.items() if name not in of_teacher and not name.endswith("_weighted")
        },
        teacher_metrics={of_teacher[name]: value for name, value in found.items() if name in of_teacher},
        history=[dict(entry) for entry in history],
    )


def _teacher(teacher: Any, args: Any) -> TeacherRecord:
    if isinstance(teacher, CapturedTeacher):
        manifest = teacher.capture.manifest
        return describe_teacher(
            manifest.teacher, revision=manifest.teacher_revision, captured=True, token=args.hub_token
        )
    revision = getattr(teacher.bare.config, "_commit_hash", None)
    return describe_teacher(name_of(teacher.bare), revision=revision, weight=teacher.weight, token=args.hub_token)
