"""What kind of model a student is, and which places of its logits have a target.

An *item* is one thing that a loss is averaged over: a token with a target (language models, token classification) or an
example (sequence and image classification).
"""

import functools
import inspect
from collections.abc import Mapping
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto as auto

from hf_guide.errors import TaskError
from hf_guide.utils.labels import IGNORE_INDEX, decoder_ids_from_labels

NON_CATEGORICAL_PROBLEM_TYPES = ("regression", "multi_label_classification")
"""Kinds of problem (`config.problem_type`) whose logits are no distribution over classes that exclude each other."""


class Task(str, Enum):
    """What a model's head is for."""

    CAUSAL_LM = "causal-lm"
    MASKED_LM = "masked-lm"
    SEQ2SEQ_LM = "seq2seq-lm"
    SEQUENCE_CLASSIFICATION = "sequence-classification"
    TOKEN_CLASSIFICATION = "token-classification"
    IMAGE_CLASSIFICATION = "image-classification"

    def __str__(self) -> str:
        return str(self.value)

    @property
    def is_language_model(self) -> bool:
        """Whether its classes are a vocabulary."""
        return self in (Task.CAUSAL_LM, Task.MASKED_LM, Task.SEQ2SEQ_LM)

    @property
    def is_per_token(self) -> bool:
        """Whether its items are tokens rather than examples."""
        return self.is_language_model or self is Task.TOKEN_CLASSIFICATION


# Where one class serves several tasks (BART) the first counts.
_MAPPINGS: list[tuple[Task, Mapping[str, Any]]] = [
    (Task.SEQ2SEQ_LM, auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
    (Task.SEQ2SEQ_LM, auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES),
    (Task.CAUSAL_LM, auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    (Task.MASKED_LM, auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES),
    (Task.SEQUENCE_CLASSIFICATION, auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES),
    (Task.TOKEN_CLASSIFICATION, auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES),
    (Task.IMAGE_CLASSIFICATION, auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES),
]


def _tasks_by_class() -> dict[str, Task]:
    found: dict[str, Task] = {}
    for task, mapping in _MAPPINGS:
        for names in mapping.values():
            for name in (names,) if isinstance(names, str) else names:
                found.setdefault(name, task)
    return found


_TASKS = _tasks_by_class()


def without_adapter(model: Any) -> Any:
    """Return the model that PEFT wrapped, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def forward_parameters(model: Any) -> frozenset[str]:
    """Return what the `forward` of a model, or of a model's class, takes by name, within an adapter and hooks around it."""
    kind: Any = model if isinstance(model, type) else type(without_adapter(model))
    return _forward_parameters_of_class(kind)


@functools.cache
def _forward_parameters_of_class(kind: type) -> frozenset[str]:
    """Return the names that a class's `forward` takes; where it takes any keyword, those of the class it derives from, too."""
    found: frozenset[str] = frozenset()
    for each in kind.__mro__:
        forward = vars(each).get("forward")
        if each is nn.Module or forward is None:
            continue
        parameters = inspect.signature(forward).parameters
        found |= frozenset(parameters)
        if all(parameter.kind is not inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
            break
    return found - {"self"}


def task_of(model: nn.Module) -> Task:
    """Return what a model's head is for, told by its class or the stock class it derives from.

    Raises:
        TaskError: none of the tasks that can be distilled.
    """
    bare = without_adapter(model)
    for cls in type(bare).__mro__:
        if cls.__name__ in _TASKS:
            return _TASKS[cls.__name__]
    raise TaskError(_unsupported_model_message(bare))


def _unsupported_model_message(model: nn.Module) -> str:
    name, tasks = type(model).__name__, ", ".join(map(str, Task))
    if any(name in ((names,) if isinstance(names, str) else names) for names in auto.MODEL_MAPPING_NAMES.values()):
        return (
            f"{name} has no head, so there is nothing to distil. Load it with the AutoModelFor... class of its task, one of "
            f"{tasks}."
        )
    return f"{name} is for a task that cannot be distilled; expected a model for one of {tasks}."


def target_mask(task: Task, inputs: Mapping[str, Any], *, shifted: bool | None = None) -> Tensor:
    """Return which places of the logits have a target: bool, (batch, length) where items are tokens, else (batch,).

    Without labels every place that attention sees is one: a teacher can be listened to there.

    Args:
        task: the model's.
        inputs: of the model, with labels where there are any.
        shifted: whether the model's loss compares the logits of token i with the label of token i + 1, as
            `label_shift.shifts_labels` finds; the last place then never has a target. By default that of the task.

    Raises:
        TaskError: there are neither labels nor anything else that tells the shape.
    """
    labels = inputs.get("labels")
    if not task.is_per_token:
        if isinstance(labels, Tensor) and labels.ndim == 1 and not labels.is_floating_point():
            return labels != IGNORE_INDEX
        some = labels if isinstance(labels, Tensor) else _first_tensor(inputs)
        return torch.ones(some.shape[0], dtype=torch.bool, device=some.device)
    shifted = task is Task.CAUSAL_LM if shifted is None else shifted
    if shifted and isinstance(inputs.get("shift_labels"), Tensor):
        return inputs["shift_labels"] != IGNORE_INDEX
    if isinstance(labels, Tensor):
        return _next_is_visible(labels != IGNORE_INDEX) if shifted else labels != IGNORE_INDEX
    if task is Task.SEQ2SEQ_LM and not shifted:
        seen, ids = inputs.get("decoder_attention_mask"), inputs.get("decoder_input_ids")
    else:
        seen, ids = inputs.get("attention_mask"), inputs.get("input_ids", inputs.get("inputs_embeds"))
    if isinstance(seen, Tensor) and seen.ndim == 2:
        seen = seen.bool()
    elif isinstance(ids, Tensor):
        seen = torch.ones(ids.shape[:2], dtype=torch.bool, device=ids.device)
    else:
        raise TaskError(
            f"The batch has neither labels nor token ids to say where a {task} model has targets; it has "
            f"{sorted(inputs)}. Give labels."
        )
    return seen & _next_is_visible(seen) if shifted else seen


def item_labels(task: Task, inputs: Mapping[str, Any], mask: Tensor, *, shifted: bool | None = None) -> Tensor | None:
    """Return the labels of the items that `mask` picks, (items,) or (items, labels); None where there are none."""
    labels = inputs.get("labels")
    shifted = task is Task.CAUSAL_LM if shifted is None else shifted
    if shifted and isinstance(inputs.get("shift_labels"), Tensor):
        return inputs["shift_labels"][mask]
    if not isinstance(labels, Tensor):
        return None
    if shifted:
        return torch.nn.functional.pad(labels, (0, 1), value=IGNORE_INDEX)[:, 1:][mask]
    return labels[mask]


def is_encoder_decoder(model: Any) -> bool:
    """Return whether a model has a decoder with inputs of its own."""
    return bool(getattr(without_adapter(model).config, "is_encoder_decoder", False))


def add_decoder_inputs(model: PreTrainedModel, task: Task, inputs: dict[str, Any]) -> dict[str, Any]:
    """Return `inputs` with the decoder's inputs that an encoder-decoder would make from its labels, where they are missing."""
    given = "decoder_input_ids" in inputs or "decoder_inputs_embeds" in inputs
    made = task is Task.SEQ2SEQ_LM and is_encoder_decoder(model)
    if not made or given or not isinstance(inputs.get("labels"), Tensor):
        return inputs
    return inputs | {"decoder_input_ids": decoder_ids_from_labels(inputs["labels"], without_adapter(model))}


def mean_per_item(task: Task, values: Tensor, mask: Tensor, inputs: Mapping[str, Any]) -> Tensor:
    """Return one number an item, (items,), of numbers at every place, (batch, length).

    Where items are tokens it is the number at their place; otherwise the mean over the places that attention sees.
    """
    if task.is_per_token:
        return values[mask]
    seen = inputs.get("attention_mask")
    if isinstance(seen, Tensor) and seen.shape == values.shape:
        weights = seen.to(values)
        return ((values * weights).sum(1) / weights.sum(1).clamp(min=1))[mask]
    return values.mean(1)[mask]


def _next_is_visible(seen: Tensor) -> Tensor:
    """The places whose next one is in `seen`."""
    return torch.nn.functional.pad(seen[:, 1:], (0, 1), value=False)


def _first_tensor(inputs: Mapping[str, Any]) -> Tensor:
    for value in inputs.values():
        if isinstance(value, Tensor) and value.ndim > 0:
            return value
    raise TaskError(f"The batch has no tensor to tell its size from; it has {sorted(inputs)}.")
