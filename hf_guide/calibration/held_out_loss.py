"""The loss of a model on calibration text: cross-entropy of language models, divergence from the teacher of others."""

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from hf_guide.calibration.data import Batch
from hf_guide.calibration.forward import forward_no_cache
from hf_guide.errors import OptionError
from hf_guide.models.outputs import task_logits
from hf_guide.tasks import OutputKind, Task, output_kind, task_of

_EXAMPLES = ("token", "example")


def check_scorable(model_class: type[PreTrainedModel], config: PreTrainedConfig, *, what: str, advice: str) -> Task:
    """Return the task of a model whose outputs can be compared with its teacher's.

    Args:
        model_class, config: The model's.
        what: What is scored, for the error.
        advice: What can be done instead, as a sentence.

    Raises:
        OptionError: They cannot.
    """
    task = task_of(model_class)
    if output_kind(task, config) is OutputKind.CATEGORICAL and task.row.outputs[0].items in _EXAMPLES:
        return task
    raise OptionError(
        f"{what} of a {model_class.__name__} cannot be scored on calibration data: that works for language models and for "
        f"classifiers of tokens, texts, images or sounds with classes that exclude each other. {advice}"
    )


def iter_rows(batch: Batch) -> Iterator[Batch]:
    """Yield a batch's rows, each as a batch of one: the logits of a large vocabulary are large."""
    for index in range(len(next(iter(batch.values())))):
        yield {name: value[index : index + 1] for name, value in batch.items()}


def row_logits(model: PreTrainedModel, row: Batch, task: Task) -> Tensor:
    """Return a model's logits for one row, (items, classes), float32 on the CPU, without padding."""
    logits = task_logits(task, forward_no_cache(model, row), row).float().cpu()
    mask = row.get("decoder_attention_mask" if model.config.is_encoder_decoder else "attention_mask")
    if logits.ndim == 3 and mask is not None and mask.shape == logits.shape[:2]:
        return logits[mask.bool()]
    return logits.flatten(0, -2)


def causal_loss(logits: Tensor, row: Batch) -> Tensor:
    """Return the cross-entropy of each next token, (tokens,).

    Args:
        logits: (tokens, vocabulary), of the tokens that are not padding.
        row: The inputs of one row.
    """
    ids, mask = row["input_ids"].flatten(), row.get("attention_mask")
    ids = ids if mask is None else ids[mask.flatten().bool()]
    return torch.nn.functional.cross_entropy(logits[:-1], ids[1:].to(logits.device), reduction="none")


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the divergence KL(teacher, student) of each item, in nats, (items,); classes of logit -inf do not count.

    Args:
        student, teacher: Logits, (items, classes).

    Example:
        >>> divergence(torch.zeros(1, 2), torch.tensor([[0.0, 100.0]]))
        tensor([0.6931])
    """
    own, target = student.log_softmax(-1), teacher.log_softmax(-1)
    possible = target > -torch.inf
    difference = torch.where(possible, target, 0) - torch.where(possible, own, 0)
    return (target.exp() * difference).sum(-1)
