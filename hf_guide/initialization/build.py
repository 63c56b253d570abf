"""Build a student: its modules, the weights it ties, and the parameters that no teacher fills."""

import contextlib
from collections.abc import Iterator

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from hf_guide.errors import ShapeError
from hf_guide.models.model_classes import strip_base_prefix
from hf_guide.models.tiny_models import MODEL_ERRORS
from hf_guide.teachers.checkpoint import TeacherCheckpoint


def build_student(
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    dtype: torch.dtype,
    *,
    seed: int = 0,
    initialize: bool = False,
) -> PreTrainedModel:
    """Return a model of `config`, on the CPU, its weights tied.

    Args:
        initialize: Initialize the parameters as `from_config` does; otherwise they are uninitialized memory.

    Raises:
        ShapeError: The family rejects the shape; with its reason.
    """
    try:
        with rng_seed(seed):  # constructors draw random numbers whether their weights are initialized or not
            if initialize:
                return model_class._from_config(config, dtype=dtype)
            with no_init_weights():
                student = model_class._from_config(config, dtype=dtype)
    except MODEL_ERRORS as error:
        reason = str(error) if isinstance(error, (ValueError, RuntimeError)) else f"{type(error).__name__}: {error}"
        raise ShapeError(f"{model_class.__name__} rejects this config: {reason}") from error
    student.tie_weights()
    return student


def untie_like_teacher(student: PreTrainedModel, teacher: TeacherCheckpoint) -> dict[str, str]:
    """Untie weights that the teacher's checkpoint holds separately though its config ties them (mT5, T5 v1.1).

    Transformers loads such a checkpoint untied, and will load the student's untied too.

    Returns:
        The names of these weights, which are uninitialized memory now, and of those that they were tied to.
    """
    untied: dict[str, str] = {}
    if not getattr(teacher.config, "tie_word_embeddings", False):
        return untied
    stored = {strip_base_prefix(name, teacher.base_model_prefix) for name in teacher.weights.keys()}
    prefix = student.base_model_prefix
    for name, source in list(student.all_tied_weights_keys.items()):
        if {strip_base_prefix(name, prefix), strip_base_prefix(source, prefix)} <= stored:
            parent, _, attribute = name.rpartition(".")
            module = student.get_submodule(parent)
            setattr(module, attribute, torch.nn.Parameter(torch.empty_like(getattr(module, attribute))))
            del student.all_tied_weights_keys[name]
            untied[name] = source
    return untied


def init_missing_weights(student: PreTrainedModel, seed: int) -> None:
    """Initialize every parameter that is not marked as initialized the way the model itself does."""
    with rng_seed(seed):
        student.initialize_weights()
    student.tie_weights(recompute_mapping=False)


@contextlib.contextmanager
def rng_seed(seed: int) -> Iterator[None]:
    """Seed torch for the duration of the block, and restore the caller's random state."""
    device = torch.get_default_device()
    if device.type == "cpu":
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the other devices for good
            yield
    else:
        with torch.random.fork_rng(devices=[device], device_type=device.type):
            torch.manual_seed(seed)
            yield
