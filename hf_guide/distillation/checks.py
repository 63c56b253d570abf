"""What a trainer is given, checked and brought into one form before `Trainer` sees it."""

import inspect
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from torch._dynamo import OptimizedModule
from transformers import PreTrainedTokenizerBase, ProcessorMixin
from transformers.trainer_utils import align_special_tokens, has_length

from hf_guide.distillation.arguments import DistillationArguments
from hf_guide.errors import OptionError
from hf_guide.models.adapters import has_adapter, parametrized_layers, validate_unwrapped, without_adapter
from hf_guide.signal_cache.reader import Capture
from hf_guide.utils.files import check_can_create


def validate_arguments(args: Any) -> None:
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


def validate_student(model: Any) -> None:
    """Refuse what is no student.

    Raises:
        OptionError: a name, which does not say what the student is for; or a model in a wrapper.
    """
    if isinstance(model, (str, os.PathLike)):
        raise OptionError(
            f"model is a student, not its name; found {os.fspath(model)!r}. Load it with the AutoModelFor... class of its "
            "task, or pass a config, or the arguments of from_teacher, to make it out of its teacher."
        )
    validate_unwrapped(model, "student")


def validate_trainable(student: nn.Module) -> None:
    """Check that a student can be trained, and saved as a model of its class.

    Raises:
        OptionError: all of its parameters are frozen; or `torch.compile` or `torch.nn.utils.parametrize` has renamed some,
            which its stock class does not know.
    """
    compiled = [name for name, module in student.named_modules() if isinstance(module, OptimizedModule)]
    if compiled:
        raise OptionError(
            f"{compiled[0]} of the student is compiled, and its weights would be saved by other names. Pass the model itself, "
            "and DistillationArguments(torch_compile=True)."
        )
    added = parametrized_layers(student)
    if added:
        raise OptionError(
            f"{len(added)} layers of the student are parametrized (weight_norm, spectral_norm, ...), such as {added[0]}: its "
            f"files would not load as a {type(without_adapter(student)).__name__}. Call "
            "torch.nn.utils.parametrize.remove_parametrizations on them first."
        )
    if not any(parameter.requires_grad for parameter in student.parameters()):
        raise OptionError(
            "No parameter of the student is trainable: all have requires_grad=False. Unfreeze some with requires_grad_(True), "
            "pass peft_config, or load a saved adapter with PeftModel.from_pretrained(..., is_trainable=True)."
        )


def align_student_special_tokens(student: Any, processing_class: Any) -> None:
    """Give a student's config the special tokens of the tokenizer, as `Trainer` does when training begins.

    Classifiers find the last token of a text by them: without this, an evaluation before the training would read padding.
    """
    if isinstance(processing_class, (PreTrainedTokenizerBase, ProcessorMixin)) and hasattr(student, "config"):
        align_special_tokens(student, processing_class)


def validate_not_empty(dataset: Any, name: str) -> None:
    """Refuse a dataset without an example; one whose length is not known passes.

    Raises:
        OptionError: names the dataset.
    """
    if isinstance(dataset, dict):
        for key, part in dataset.items():
            validate_not_empty(part, f"{name}[{key!r}]")
    elif dataset is not None and has_length(dataset) and len(dataset) == 0:
        raise OptionError(f"{name} is empty; it must have at least one example. Leave it out, or give it some.")


def resolve_teacher(teacher: Any, args: DistillationArguments) -> Any:
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


def validate_output_dir(args: DistillationArguments, source: Any, student: Any) -> None:
    """Refuse an `output_dir` into which a student cannot be saved without harm.

    Args:
        args: names `output_dir`.
        source: the teacher, teachers or capture.
        student: the student, or the arguments of `from_teacher`, which may name a teacher of their own.

    Raises:
        OptionError: it is a file, or the folder of a teacher or a capture, whose files the student's would replace.
        OSError: it cannot be made.
    """
    output_dir = args.output_dir or "."
    check_can_create(Path(output_dir))
    if os.path.exists(output_dir) and not os.path.isdir(output_dir):
        raise OptionError(
            f"output_dir {output_dir} is a file; it must be a folder, or new. Choose another output_dir."
        )
    several = source if isinstance(source, (list, tuple)) else [source]
    sources = [*several, student.get("teacher") if isinstance(student, Mapping) else None]
    for each in sources:
        what = "capture" if isinstance(each, Capture) else "teacher"
        for folder in _candidate_folders(each):
            if os.path.isdir(folder) and os.path.isdir(output_dir) and os.path.samefile(folder, output_dir):
                raise OptionError(
                    f"output_dir {output_dir} is the folder of the {what}, whose files the student's would replace. Choose "
                    "another output_dir."
                )


def _candidate_folders(source: Any) -> list[str]:
    """Return the names under which a teacher or capture may lie on the disk; a text may name several, with commas."""
    if isinstance(source, Capture):
        return [str(source.folder)]
    if isinstance(source, str):
        return [source, *(name.strip() for name in source.split(","))]
    if isinstance(source, os.PathLike):
        return [os.fspath(source)]
    return [str(getattr(source, "name_or_path", "") or "")]


def wrap_with_peft(model: Any, model_init: Any, peft_config: Any) -> tuple[Any, Any]:
    """Return the model, or what makes it, with an adapter.

    Raises:
        OptionError: the model has an adapter already, or `peft_config` is none of PEFT's.
    """
    from peft import PeftConfig, get_peft_model

    if not isinstance(peft_config, PeftConfig):
        raise OptionError(
            f"peft_config must be one of PEFT's configs, such as LoraConfig; found {type(peft_config).__name__}."
        )

    def with_adapter(student: Any) -> Any:
        if has_adapter(student):
            raise OptionError(
                "The student has an adapter already, so peft_config would put a second one around it. Leave peft_config out "
                "to train the adapter that is there, or pass the base model."
            )
        return get_peft_model(student, peft_config)

    if model is not None:
        return with_adapter(model), None
    takes_trial = model_init is not None and len(inspect.signature(model_init).parameters) > 0
    if takes_trial:
        return None, lambda trial: with_adapter(model_init(trial))
    return None, lambda: with_adapter(model_init())
