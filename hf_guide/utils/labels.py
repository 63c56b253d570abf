"""Labels as Transformers has them: which of them are none, and what an encoder-decoder's decoder reads of them."""

from typing import Any

from torch import Tensor

IGNORE_INDEX = -100
"""The label of a place that has no target."""


def decoder_ids_from_labels(labels: Tensor, model: Any) -> Tensor:
    """Return what a model's decoder reads of labels (batch, length) where it is given nothing else, as the model makes it."""
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):
        return model.prepare_decoder_input_ids_from_labels(labels)
    ids = labels.new_full(labels.shape, model.config.decoder_start_token_id)
    ids[:, 1:] = labels[:, :-1]
    return ids.masked_fill(ids == IGNORE_INDEX, model.config.pad_token_id)
