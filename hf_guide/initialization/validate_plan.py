"""Validate a student's plan before its teacher is run: make the plan of a student that is then discarded."""

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from hf_guide.initialization.build import build_student
from hf_guide.initialization.config import PlanOptions
from hf_guide.initialization.infer_layout import layout_for
from hf_guide.initialization.plan import Plan
from hf_guide.initialization.planning import make_plan
from hf_guide.initialization.resolve import label_row_indices
from hf_guide.initialization.trial_forward import check_forward
from hf_guide.layouts.hierarchy import check_single_stage_width
from hf_guide.models.model_classes import strip_base_prefix
from hf_guide.teachers.checkpoint import TeacherCheckpoint


def validate_plan(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, teacher: TeacherCheckpoint, options: PlanOptions
) -> Plan:
    """Return the plan of a student of this class and config.

    Raises:
        ShapeError, LayoutError: The student cannot be made, or cannot run.
    """
    layout = layout_for(teacher.config, teacher.model_class)
    prefix = teacher.base_model_prefix
    shapes = {strip_base_prefix(name, prefix): teacher.weights.shape(name) for name in teacher.weights.keys()}
    check_single_stage_width(layout, shapes)
    student = build_student(model_class, config, teacher.dtype, seed=options.seed)
    all_rows = torch.arange(getattr(config, "vocab_size", None) or 0)  # `vocab_row_indices` checks the rows
    labels = label_row_indices(teacher.config, config)
    plan = make_plan(student, teacher, layout, options, vocab_indices=all_rows, label_indices=labels)
    check_forward(student, teacher.config, filled=False)
    return plan
