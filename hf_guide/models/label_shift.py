"""Find whether a language model's own loss compares the logits of token i with the label of token i + 1.

Nearly all decoders shift their labels so, also audio models that Transformers lists with encoder-decoders. XLNet and XLM do
not, for permutation language modelling and `run_mlm`. The model is run on labels of one token; its name does not decide.
"""

from typing import Any

import torch
from torch import Tensor, nn

from hf_guide.errors import TaskError
from hf_guide.models.adapters import is_encoder_decoder, stock_module, without_adapter
from hf_guide.models.lm_head import FORWARD_ERRORS, probe_inputs
from hf_guide.models.modes import eval_preserving_state
from hf_guide.tasks import Task
from hf_guide.utils.labels import IGNORE_INDEX

_UNSHIFTED = ("XLNetLMHeadModel", "XLMWithLMHeadModel")
"""Stock classes that do not shift their labels, for models that cannot be run because they are sharded."""


def shifts_labels(model: nn.Module, task: Task) -> bool:
    """Return whether a model's own loss shifts its labels; restore its mode and the random state.

    The loss of a model that shifts does not depend on the label of the first token. For a model that cannot be run on token
    ids alone its class decides.
    """
    bare: Any = without_adapter(model)
    if task is not Task.CAUSAL_LM and (not task.row.targets_in_decoder or is_encoder_decoder(bare)):
        return False
    by_class = not any(each.__name__ in _UNSHIFTED for each in type(bare).__mro__)
    table = stock_module(bare.get_input_embeddings())
    weight = getattr(table, "weight", None)
    if weight is None or weight.is_meta or not weight.numel() or hasattr(weight, "to_local") or weight.ndim != 2:
        return by_class
    with eval_preserving_state(model, weight.device):
        try:
            probe = probe_inputs(bare, weight.shape[0])
            shifts = None if probe is None else _ignores_first_label(bare, probe)
            return by_class if shifts is None else shifts
        except FORWARD_ERRORS:
            return by_class


def check_label_shift(teacher: nn.Module, student: nn.Module, task: Task) -> None:
    """Check that the logits of teacher and student at one position predict the same token.

    Raises:
        TaskError: One of them shifts its labels, the other does not.
    """
    shifts = {"teacher": shifts_labels(teacher, task), "student": shifts_labels(student, task)}
    if shifts["teacher"] != shifts["student"]:
        which, model = ("student", student) if shifts["student"] else ("teacher", teacher)
        raise TaskError(
            f"Only the {which}'s logits ({type(without_adapter(model)).__name__}) predict the next token; those of "
            "both must predict the same one. Use a teacher whose own loss shifts its labels as the student's does."
        )


def _ignores_first_label(model: nn.Module, probe: dict[str, Tensor]) -> bool | None:
    """Return whether the loss does not depend on the first label; None where the loss is not finite."""
    losses = []
    for label in (1, 2):
        labels = torch.full_like(probe["input_ids"], IGNORE_INDEX)
        labels[:, 0], labels[:, -1] = label, 3
        losses.append(model(**probe, labels=labels, return_dict=True)["loss"])
    finite = all(bool(loss.isfinite()) for loss in losses)
    return bool(losses[0] == losses[1]) if finite else None
