"""What a trainer is given, checked and brought into one form before `Trainer` sees it."""

import inspect
import os
from typing import Any

from hf_guide.capture.reading import Capture
from hf_guide.distillation.arguments import DistillationArguments
from hf_guide.distillation.tasks import Task
from hf_guide.errors import OptionError


def check_arguments(args: Any) -> None:
    """Refuse arguments under which a distillation cannot run.

    Raises:
        OptionError: names the option, and what to do instead.
    """
    if not isinstance(args, DistillationArguments):
        raise OptionError(
            f"DistillationTrainer takes DistillationArguments, found {type(args).__name__}: they have its fields and more."
        )
    if args.use_liger_kernel:
        raise OptionError(
            "use_liger_kernel makes the student's task loss without logits, which leaves nothing to compare with the "
            "teacher's. Leave it out: losses are computed over chunks of tokens here too."
        )
    if args.n_gpu > 1:
        raise OptionError(
            f"One process sees {args.n_gpu} GPUs, for which Trainer would use DataParallel. Launch one process a GPU, with "
            "`accelerate launch` or `torchrun`, or show the process one GPU with CUDA_VISIBLE_DEVICES."
        )


def check_student(model: Any) -> None:
    """Refuse what is no student.

    Raises:
        OptionError: a name, which does not say what the student is for.
    """
    if isinstance(model, (str, os.PathLike)):
        raise OptionError(
            f"model is a student, not its name; found {os.fspath(model)!r}. Load it with the AutoModelFor... class of its "
            "task, or pass a config, or the arguments of from_teacher, to make it out of its teacher."
        )


def check_adapter(student: Any, task: Task) -> None:
    """Refuse an adapter under which places of the student's logits are not those of its labels.

    Raises:
        OptionError: one that puts virtual tokens before the text.
    """
    if not task.is_per_token:
        return
    for config in getattr(student, "peft_config", {}).values():
        if config.is_prompt_learning and config.peft_type != "PREFIX_TUNING":
            raise OptionError(
                f"{config.peft_type.value} puts virtual tokens before the text, so that the student's logits do not stand "
                "where the teacher's do. Use another adapter, such as LORA or PREFIX_TUNING."
            )


def source_of(teacher: Any, args: DistillationArguments) -> Any:
    """Return the one teacher, teachers or capture that is given, None for none.

    Raises:
        OptionError: the teacher is given twice.
        CaptureError: the capture is not whole.
    """
    if teacher is not None and (args.teacher or args.capture):
        raise OptionError(
            "The teacher is given twice: to the trainer, and in args.teacher or args.capture. Give it once."
        )
    if teacher is None and args.capture:
        return Capture.open(args.capture)
    return args.teacher if teacher is None else teacher


def adapted(model: Any, model_init: Any, peft_config: Any) -> tuple[Any, Any]:
    """Return the model, or what makes it, with an adapter."""
    from peft import get_peft_model

    if model is not None:
        return get_peft_model(model, peft_config), None
    takes_trial = model_init is not None and len(inspect.signature(model_init).parameters) > 0
    if takes_trial:
        return None, lambda trial: get_peft_model(model_init(trial), peft_config)
    return None, lambda: get_peft_model(model_init(), peft_config)
