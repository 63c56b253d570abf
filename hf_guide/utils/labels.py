"""Conventions of Transformers for labels: the ignored index, decoder inputs, column names, and names of classes."""

from typing import Any

from torch import Tensor

IGNORE_INDEX = -100
"""The label of a position without a target."""

TRAINER_LABEL_COLUMNS = ("labels", "label", "label_ids")
"""Columns of labels that `Trainer` and its collators recognize, the preferred name first."""


def decoder_ids_from_labels(labels: Tensor, model: Any) -> Tensor:
    """Return the decoder inputs that a model derives from labels of shape (batch, length): shifted right by one."""
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):
        return model.prepare_decoder_input_ids_from_labels(labels)
    ids = labels.new_full(labels.shape, model.config.decoder_start_token_id)
    ids[:, 1:] = labels[:, :-1]
    return ids.masked_fill(ids == IGNORE_INDEX, model.config.pad_token_id)


def config_class_names(config: Any) -> list[str]:
    """Return the names of the classes in order: "positive" for the subclasses "positive/0", "positive/1", ...

    Labels of a config with `num_subclasses` that are not named in this way give "LABEL_0", "LABEL_1", ...
    """
    names = [str(name) for _, name in sorted((config.id2label or {}).items())]
    count = getattr(config, "num_subclasses", None) or 1
    if count == 1:
        return names
    classes = [name.rpartition("/")[0] for name in names[::count]]
    if subclass_names(classes, count) == names:
        return classes
    return [f"LABEL_{number}" for number in range(len(names) // count)]


def subclass_names(classes: list[str], num_subclasses: int) -> list[str]:
    """Return the names of all subclasses, class by class.

    Example:
        >>> subclass_names(["negative", "positive"], 2)
        ['negative/0', 'negative/1', 'positive/0', 'positive/1']
    """
    return [f"{name}/{number}" for name in classes for number in range(num_subclasses)]
