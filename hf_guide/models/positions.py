"""How long a text a model reads where it has a table of positions, and whether padding on the left shifts its positions.

Families count positions from 0 (BERT), from 2 (BART, OPT) or from one after the padding token (RoBERTa), by place, by
attention mask or by the tokens that are not padding. That is not read from a list of families: a tiny model of the same
config class is run, and the rows that it looks up are recorded.
"""

import functools
import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import MODEL_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from hf_guide.models.tiny_models import MODEL_ERRORS, tiny_config

_TOKEN, _OTHER_TOKEN = 9, 7
_PADS = (3, 5)
_LENGTHS = ((6, 4), (9, 7))
"""Of the encoder's (or only) text and of the decoder's, so that lookups of one are not taken for the other's."""


@dataclass(frozen=True)
class TextPositions:
    """What a model's tables of positions allow.

    Attributes:
        longest: tokens of a text; None where no table limits them.
        longest_target: tokens that a decoder reads, of an encoder-decoder.
        shifts: padding on the left moves the positions of the tokens after it.
        needs_pad: positions are right under padding on the left only where it is this token; None where any will do.
        begins: the token id after which positions are counted, where they are; None otherwise.
    """

    longest: int | None = None
    max_target_tokens: int | None = None
    shifted_by_left_padding: bool = False
    required_padding_token: int | None = None
    offset_token: int | None = None


def text_positions(config: PreTrainedConfig) -> TextPositions:
    """Return what the tables of positions of a config's model allow; no limit where it has none, or cannot be tried."""
    if type(config) not in MODEL_MAPPING:
        return TextPositions()
    try:
        entries = json.dumps({key: value for key, value in config.to_dict().items() if key != "_name_or_path"})
        return _probe_cached(type(config).model_type, entries)
    except MODEL_ERRORS:  # an entry that JSON does not know, or that the config does not take back
        return _probe(config)


def max_input_tokens(config: "PreTrainedConfig | None", *, target: bool = False) -> int | None:
    """Return how many tokens of a text a model reads: what its table of positions and `max_position_embeddings` allow.

    Args:
        config: of the model, composite ones included; None is unlimited.
        target: what the decoder of an encoder-decoder reads.
    """
    if config is None:
        return None
    positions = text_positions(config)
    text = config.get_text_config(**({"decoder": target, "encoder": not target} if config.is_encoder_decoder else {}))
    limits = [positions.max_target_tokens if target else positions.longest]
    limits += [getattr(text, name, None) for name in (_TARGET_LENGTH_FIELDS if target else _LENGTH_FIELDS)]
    return min((limit for limit in limits if isinstance(limit, int) and limit > 0), default=None)


def position_padding_token(model: nn.Module) -> int | None:
    """Return the padding token by which a loaded model counts positions; None where it does not, or no padding shifts them.

    It is fixed when the model is made, whatever its config says afterwards.
    """
    needed = text_positions(model.config).required_padding_token  # type: ignore[arg-type]
    if needed is None:
        return None
    own = (getattr(module, "padding_idx", None) for module in model.modules() if not isinstance(module, nn.Embedding))
    return next((pad for pad in own if isinstance(pad, int)), needed)


_LENGTH_FIELDS = ("max_position_embeddings", "max_encoder_position_embeddings")
_TARGET_LENGTH_FIELDS = ("max_position_embeddings", "max_decoder_position_embeddings", "max_target_positions")


@functools.lru_cache(maxsize=64)
def _probe_cached(model_type: str, entries: str) -> TextPositions:
    settings = json.loads(entries)
    settings.pop("model_type", None)
    return _probe(AutoConfig.for_model(model_type, **settings))


def _probe(config: PreTrainedConfig) -> TextPositions:
    kinds: Any = MODEL_MAPPING[type(config)]
    model_class = kinds[0] if isinstance(kinds, tuple) else kinds
    try:
        with torch.device("meta"), no_init_weights():
            whole = model_class._from_config(config)
    except MODEL_ERRORS:
        return TextPositions()
    if sum("Embedding" in type(module).__name__ for module in whole.modules()) < 2:
        return TextPositions()
    try:
        return _probe_lookups(model_class, config, whole)
    except MODEL_ERRORS:
        return _by_padding_index(whole)


def _probe_lookups(model_class: type[PreTrainedModel], config: PreTrainedConfig, whole: nn.Module) -> TextPositions:
    twins = [_TinyModel(model_class, config, pad) for pad in _PADS]
    found = [twin.lookups() for twin in twins]
    limits: dict[int, int] = {}
    pad, begins = _pad_token(config), None
    for (name, stack), offset in found[0].items():
        other = found[1].get((name, stack), offset)
        if other - offset == _PADS[1] - _PADS[0] and pad is not None:
            begins = pad
            offset += pad - _PADS[0]
        rows = whole.get_parameter(name).shape[0]
        limits[stack] = min(limits.get(stack, rows), rows - offset)
    if not any(stack == 0 for _, stack in found[0]):
        return TextPositions(None, limits.get(1))
    own = twins[0].keeps_positions(found[0], twins[0].pad)
    if not own and pad is not None and pad < twins[0].tokens:
        own = twins[0].keeps_positions(found[0], pad)  # of families that have it in their code
    every = own and twins[0].keeps_positions(found[0], _OTHER_TOKEN)
    return TextPositions(limits.get(0), limits.get(1), not own, pad if own and not every else None, begins)


def _by_padding_index(model: nn.Module) -> TextPositions:
    """Return what can be told without a run: a table of positions with a padding row begins after it."""
    limits, pad = [], None
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(getattr(module, "padding_idx", None), int):
            pad = int(module.padding_idx)
            limits.append(int(module.weight.shape[0]) - pad - 1)
    return TextPositions(min(limits), required_padding_token=pad, offset_token=pad) if limits else TextPositions()


def _pad_token(config: PreTrainedConfig) -> int | None:
    token = getattr(config.get_text_config(), "pad_token_id", None)
    return token if isinstance(token, int) else None


_ONE_BLOCK = dict.fromkeys(
    (
        "num_hidden_layers",
        "num_layers",
        "n_layer",
        "n_layers",
        "encoder_layers",
        "decoder_layers",
        "num_decoder_layers",
    ),
    1,
)


class _TinyModel:
    """A tiny model of a family, with its own padding token, and what it looks up."""

    def __init__(self, model_class: type[PreTrainedModel], config: PreTrainedConfig, pad: int):
        tiny = tiny_config(config, pad_token_id=pad, **_ONE_BLOCK)
        with no_init_weights():  # what is looked up does not depend on the numbers
            self.model = model_class._from_config(tiny).float().eval()
        self.pad = pad
        self.tokens = int(getattr(tiny.get_text_config(), "vocab_size", 0) or 0)
        self.names = {parameter.data_ptr(): name for name, parameter in self.model.named_parameters()}
        self.has_decoder = bool(config.is_encoder_decoder)

    def lookups(self) -> dict[tuple[str, int], int]:
        """Return the first row that is looked up of each table that is looked up row after row.

        Returns:
            The row by the table's name and the stack: 0 of the (only) encoder or decoder, 1 of an encoder-decoder's decoder.
        """
        seen = []
        for lengths in _LENGTHS:
            rows = self._run([torch.full((1, length), _TOKEN) for length in lengths])
            seen.append(
                {
                    (name, stack): first
                    for name, indices in rows
                    for stack, length in enumerate(lengths)
                    if (first := _first_row(indices, length)) is not None
                }
            )
        return {key: first for key, first in seen[0].items() if seen[1].get(key) == first}

    def keeps_positions(self, tables: dict[tuple[str, int], int], pad: int) -> bool:
        """Return whether a text's positions are the same with two padding tokens before it."""
        length, padding = _LENGTHS[0][0], 2
        mask = torch.ones(1, length + padding, dtype=torch.long)
        mask[:, :padding] = 0
        ids = torch.full((1, length + padding), _TOKEN)
        ids[:, :padding] = pad
        rows = self._run([ids, torch.full((1, _LENGTHS[0][1]), _TOKEN)], attention_mask=mask)
        return all(
            any(of == name and _counts_up_from(indices, first, length, padding) for of, indices in rows)
            for (name, stack), first in tables.items()
            if stack == 0
        )

    def _run(self, texts: list[Tensor], **more: Tensor) -> list[tuple[str, Tensor]]:
        given = {"input_ids": texts[0], **more} | ({"decoder_input_ids": texts[1]} if self.has_decoder else {})
        recorder = _RecordLookups()
        with torch.no_grad(), recorder:
            self.model(**given)
        named = ((self.names.get(pointer), indices) for pointer, indices in recorder.seen)
        return [(name, indices) for name, indices in named if name is not None]


class _RecordLookups(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.embedding.default:
            self.seen.append((args[0].data_ptr(), args[1].clone()))
        return func(*args, **(kwargs or {}))


def _first_row(indices: Tensor, length: int) -> int | None:
    """Return the first index where those of one text of `length` tokens count upward from it, one a token, and no further."""
    rows = indices.reshape(-1).tolist()
    first = rows[0] if rows else 0
    return first if indices.shape[-1] == indices.numel() and _counts_up_from(indices, first, length, 0) else None


def _counts_up_from(indices: Tensor, first: int, length: int, skipped: int) -> bool:
    rows = indices.reshape(-1).tolist()[skipped:]
    further = rows[length : length + 1]  # some families pad a text to a multiple of their window
    return rows[:length] == list(range(first, first + length)) and further != [first + length]
