"""How a student comes to learn: its head, its layers beside the teacher's, and the maps between their widths."""

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from hf_guide.distillation.arguments import DistillationArguments
from hf_guide.distillation.heads import Head, find_head
from hf_guide.distillation.layers import pair_layers
from hf_guide.distillation.learning import Learning
from hf_guide.distillation.objectives import Needs, terms_of_classes
from hf_guide.distillation.playback import CapturedTeacher
from hf_guide.distillation.projections import Projections
from hf_guide.distillation.tasks import Task
from hf_guide.distillation.teachers import LiveTeacher
from hf_guide.errors import OptionError, VocabularyError

Teachers = Sequence[LiveTeacher | CapturedTeacher]


def make_learning(
    student: Any,
    task: Task,
    teachers: Teachers,
    args: DistillationArguments,
    accelerator: Accelerator,
    *,
    head: Head | None,
) -> Learning:
    """Return how `student` learns from its teachers.

    Raises:
        VocabularyError: the vocabularies share one token.
        OptionError: the objective needs a teacher and there is none, or what was not captured; or maps between widths,
            where weights are sharded.
    """
    learning = Learning(task, args, args.weights)
    if learning.needs and not teachers:
        names = sorted(name for name, term in learning.terms.items() if term.needs is not Needs.LABELS)
        raise OptionError(f"The objective's {', '.join(names)} need a teacher: pass teacher=, or a capture.")
    learning.classes = min((each.classes for each in teachers if each.classes is not None), default=None)
    names = terms_of_classes(args.weights)
    if names and learning.classes is not None and learning.classes < 2:
        raise VocabularyError(
            f"Student and teacher share {learning.classes} token of their vocabularies, and {' and '.join(map(repr, names))} "
            "compare distributions over two at least. Take a teacher of the student's vocabulary."
        )
    learning.head = head
    if Needs.HIDDEN_STATES in learning.needs:
        learning.layers = pair_layers(student, [each.depth for each in teachers], args.hidden_layers)  # type: ignore[arg-type]
    widths = _widths(student, task, teachers, learning)
    projections = Projections(widths, seed=args.seed)
    if len(projections.maps):
        if is_sharded(accelerator):
            raise OptionError(
                f"The student's widths differ from the teacher's ({sorted(set(widths.values()))}), and the maps between "
                "them cannot be sharded. Leave 'hidden' and 'embedding' out, or train without FSDP and DeepSpeed."
            )
        learning.projections = projections.to(args.device)
    return learning


def _widths(student: Any, task: Task, teachers: Teachers, learning: Learning) -> dict[str, tuple[int, int]]:
    """Return how wide what is compared is, in the student and in the teacher, by name."""
    widths: dict[str, tuple[int, int]] = {}
    for number, teacher in enumerate(teachers):
        pairs = [(f"{number}_{mine}", f"hidden_{theirs}") for mine, theirs in learning.layers.items()]
        if Needs.EMBEDDING in learning.needs:
            pairs.append((f"{number}_embedding", "embedding"))
        for name, asked in pairs:
            theirs_wide = teacher.width(asked)
            if theirs_wide is None:
                raise OptionError(f"The capture holds no {asked}. Capture again with it, or change the objective.")
            own = LiveTeacher(student, task).width(asked)
            widths[name] = (own or theirs_wide, theirs_wide)
    return widths


def is_sharded(accelerator: Accelerator) -> bool:
    """Return whether weights, or the state of the optimizer, are spread over processes."""
    return accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)


def find_head_everywhere(student: Any, task: Task, accelerator: Accelerator) -> Head | None:
    """Return the student's language head, or None where it is not certain in any of the processes: all do the same."""
    if not task.is_language_model:
        return None
    if (
        accelerator.distributed_type is DistributedType.DEEPSPEED
        and accelerator.state.deepspeed_plugin.zero_stage == 3
    ):
        return None  # ZeRO-3 does not gather the last norm for a backward pass that begins inside the head
    head = find_head(student)
    found = torch.tensor(float(head is not None), device=accelerator.device)
    # Where only one process has the weights the others may not find it.
    return head if accelerator.reduce(found, reduction="sum").item() == accelerator.num_processes else None
