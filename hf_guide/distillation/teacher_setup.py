"""Live teachers of a student: loaded, checked against it, and moved to its device or shards."""

from collections.abc import Mapping, Sequence
from typing import Any

import accelerate
import torch

from hf_guide.errors import OptionError, TaskError
from hf_guide.models.label_shift import check_label_shift
from hf_guide.models.lm_head import find_lm_head
from hf_guide.tasks import Task
from hf_guide.teachers.alignment import align_labels, shared_vocabulary_size
from hf_guide.teachers.forward import LiveTeacher
from hf_guide.teachers.inputs import build_teacher_inputs
from hf_guide.teachers.loading import load_teachers, model_name, prepare_teacher, teacher_tokenizer


def build_live_teachers(
    teacher: Any,
    student: Any,
    task: Task,
    *,
    init_kwargs: Mapping[str, Any] | None,
    weights: Sequence[float] | None,
    compile: bool,
    processing_class: Any,
    accelerator: accelerate.Accelerator,
) -> list[LiveTeacher]:
    """Return teachers that are loaded, agree with the student, and stand where it is trained.

    Raises:
        OptionError, TaskError, TeacherError: as `load_teachers`, or weights of another number than teachers.
        VocabularyError: vocabularies or labels that do not agree.
    """
    models = load_teachers(teacher, task, init_kwargs=init_kwargs, student=student)
    shares = [1.0] * len(models) if weights is None else list(weights)
    if len(shares) != len(models):
        raise OptionError(f"There are {len(shares)} teacher_weights for {len(models)} teachers; give one weight each.")
    made = []
    for model, share in zip(models, shares, strict=True):
        if model.main_input_name != student.main_input_name:
            raise TaskError(
                f"The teacher {model_name(model)} reads {model.main_input_name}, the student {student.main_input_name}: "
                "they cannot be fed the same batch."
            )
        check_label_shift(model, student, task)
        classes, order = None, None
        if task.is_language_model:
            sizes = [each.get_output_embeddings().weight.shape[0] for each in (student, model)]
            own = teacher_tokenizer(model, init_kwargs)
            tokenizer = getattr(processing_class, "tokenizer", processing_class)
            classes = shared_vocabulary_size(tokenizer, own, *sizes)
        else:
            order = align_labels(student.config, model.config)
        inputs = build_teacher_inputs(model, task, processing_class, student=student, init_kwargs=init_kwargs)
        # Before it is sharded: what is proved on whole weights still holds then, but they are no longer whole.
        head = find_lm_head(model) if task.is_language_model and not compile else None
        placed, sharded = prepare_teacher(model, accelerator)
        if compile:
            placed = torch.compile(placed)  # type: ignore[assignment]
        head = None if sharded else head
        made.append(LiveTeacher(placed, task, classes, order, share / sum(shares), head, inputs))
    return made
