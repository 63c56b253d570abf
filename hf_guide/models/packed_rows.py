"""Recognise batches whose rows have several texts each, and verify that a model keeps them apart.

The texts of a packed row are distinguished by their `position_ids`, which begin at 0 for each of them. Transformers' masks
follow them where there is no attention mask; recurrent layers, position embeddings by index and attention biases do not. There
is no list of families: a tiny model of the same config is run on two texts, in one row and alone.
"""

import functools
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PreTrainedConfig
from transformers.utils import logging

from hf_guide.errors import OptionError
from hf_guide.models.adapters import forward_parameters, without_adapter
from hf_guide.models.tiny_models import MODEL_ERRORS, build_tiny_model, randomize_parameters, tiny_config

logger = logging.get_logger(__name__)


def packed_padding_mask(batch: Mapping[str, Any]) -> Tensor | None:
    """Return which positions of a batch of packed rows are texts, (batch, length); None if the batch is not packed.

    A batch is packed if it has `position_ids` and no `attention_mask`; what fills its rows up has position 0 throughout.

    Example:
        >>> packed_padding_mask({"position_ids": torch.tensor([[0, 1, 0, 1], [0, 1, 0, 0]])}).tolist()
        [[True, True, True, True], [True, True, False, False]]
    """
    positions = batch.get("position_ids")
    if positions is None or batch.get("attention_mask") is not None:
        return None
    positions = torch.as_tensor(positions)
    if positions.ndim != 2:
        return None
    mask = (positions != 0).flip(1).cumsum(1).flip(1) > 0
    mask[:, 0] = True
    return mask


def check_packed_rows(model: Any, batch: Mapping[str, Any], role: str) -> None:
    """Check that a model keeps the texts in the rows of a batch apart; a batch without packed rows passes.

    Args:
        model: The model that is called with the batch.
        batch: Its inputs.
        role: "student" or "teacher", for the error.

    Raises:
        OptionError: It does not; states why.
    """
    positions = batch.get("position_ids")
    if not isinstance(positions, Tensor) or positions.ndim != 2 or positions.shape[1] < 2:
        return
    bare = without_adapter(model)
    known = bare.__dict__.setdefault("_packed_rows_checked", set())
    mask = batch.get("attention_mask")
    key = (role, len(positions) > 1, mask is None, batch.get("cu_seq_lens_q") is None)
    if key in known or not _has_restart(positions, mask):
        return
    name = type(bare).__name__
    if mask is not None and mask.ndim == 2:
        logger.warning(
            f"The batch has position_ids that begin again within a row, and an attention_mask of the {role}: Transformers "
            "then lets every text of a row attend to those before it. Leave attention_mask out to keep them apart."
        )
    elif mask is None:
        check_keeps_packed_texts_apart(bare.config, role)
        if role == "student" and getattr(bare.config, "use_cache", False) and batch.get("use_cache") is not False:
            raise OptionError(
                f"The student {name} has use_cache=True, and Transformers keeps the texts of packed rows apart only without a "
                "cache. Set use_cache to false in the arguments of the trainer."
            )
        implementation = str(getattr(bare.config, "_attn_implementation", "") or "")
        if "flash" in implementation and len(positions) > 1 and batch.get("cu_seq_lens_q") is None:
            raise OptionError(
                f"The {role} {name} has attn_implementation={implementation!r}, which keeps the texts of packed rows apart in "
                f"batches of one row only; the batch has {len(positions)}. Set the batch sizes per device to 1, "
                f"use attn_implementation='sdpa', or set packing to false."
            )
    known.add(key)


def check_keeps_packed_texts_apart(config: PreTrainedConfig, role: str) -> None:
    """Check that models of a config keep texts apart by their position ids.

    Raises:
        OptionError: They do not.
    """
    reason = _reason_packed_texts_mix(config)
    if reason is not None:
        raise OptionError(
            f"Rows that have several texts each cannot be given to the {role}, of type {config.model_type}: {reason}. Set "
            "packing to false, or pad instead of packing."
        )


def _has_restart(positions: Tensor, mask: Any) -> bool:
    restarts = positions[:, 1:] <= positions[:, :-1]
    if isinstance(mask, Tensor) and mask.shape == positions.shape:
        restarts = restarts & mask[:, 1:].bool() & mask[:, :-1].bool()
    return bool(restarts.any())


def _reason_packed_texts_mix(config: PreTrainedConfig) -> str | None:
    """Return why the models of a config mix the texts of a row; None if they do not, or cannot be tried."""
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        logger.warning(
            f"It was not verified that models of type {config.model_type} keep the texts of packed rows apart, for "
            "Transformers has no causal language model of this type. Set packing to false if they do not."
        )
        return None
    try:
        entries = json.dumps({key: value for key, value in config.to_dict().items() if key != "_name_or_path"})
        return _probe_cached(type(config).model_type, entries)
    except MODEL_ERRORS:  # a value that JSON cannot hold, or that the config does not accept again
        return _probe(config)


@functools.lru_cache(maxsize=64)
def _probe_cached(model_type: str, entries: str) -> str | None:
    settings = json.loads(entries)
    settings.pop("model_type", None)
    return _probe(AutoConfig.for_model(model_type, **settings))


_FIRST, _SECOND = 7, 5
"""Lengths of the texts: different, so that a position by index is not that of the text."""


def _probe(config: PreTrainedConfig) -> str | None:
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if "position_ids" not in forward_parameters(model_class):
        return f"{model_class.__name__} takes no position_ids, by which the texts of a row are distinguished"
    try:
        model = build_tiny_model(model_class, tiny_config(config)).float()  # some masks have values of float32 only
        randomize_parameters(model, 0)
        apart = _keeps_apart(model)
    except MODEL_ERRORS as error:
        logger.warning(
            f"It was not verified that {model_class.__name__} keeps the texts of packed rows apart: {error}. Set packing to "
            "false if it does not."
        )
        return None
    return (
        None
        if apart
        else f"a text in {model_class.__name__} depends on those before it in its row, whatever its position_ids"
    )


@torch.no_grad()
def _keeps_apart(model: Any) -> bool:
    """Return whether the second text of two rows has the logits that it has alone."""
    vocabulary = min(model.get_input_embeddings().weight.shape[0], 60)
    ids = torch.randint(3, vocabulary, (2, _FIRST + _SECOND), generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([[*range(_FIRST), *range(_SECOND)]] * 2)
    packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits[:, _FIRST:]
    alone = model(input_ids=ids[:, _FIRST:], use_cache=False).logits
    return bool((packed - alone).abs().max() <= 1e-4 * alone.abs().max())
