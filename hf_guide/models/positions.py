"""The maximal length of a text where a model has position embeddings, and whether padding on the left shifts its positions.

Families count positions from 0 (BERT), from 2 (BART, OPT) or from one after the padding token (RoBERTa), by index, by
attention mask or by the tokens that are not padding. There is no list of families: a tiny model of the same config class is
run, and the rows that it looks up are recorded.
"""

import functools
import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import MODEL_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel

from hf_guide.models.modes import on_meta_device, without_initialization
from hf_guide.models.tiny_models import MODEL_ERRORS, tiny_config

_TOKEN, _OTHER_TOKEN = 9, 7
_PADS = (3, 5)
_LENGTHS = ((6, 4), (9, 7))
"""Lengths of the encoder's (or only) text and of the decoder's: different, so that their lookups can be distinguished."""


@dataclass(frozen=True)
class TextPositions:
    """What a model's position embeddings allow.

    Attributes:
        max_tokens: the maximal number of tokens of a text; None for no limit.
        max_target_tokens: the same for the decoder of an encoder-decoder.
        shifted_by_left_padding: whether padding on the left shifts the positions of the tokens after it.
        required_padding_token: the only padding token that shifts nothing on the left; None where any token will do.
        offset_token: the token id after which positions are counted, where they are; None otherwise.
    """

    max_tokens: int | None = None
    max_target_tokens: int | None = None
    shifted_by_left_padding: bool = False
    required_padding_token: int | None = None
    offset_token: int | None = None


def text_positions(config: PreTrainedConfig) -> TextPositions:
    """Return what the position embeddings of a config's model allow; no limit where it has none, or cannot be tried.

    Example:
        >>> from transformers import BertConfig
        >>> text_positions(BertConfig(max_position_embeddings=40)).max_tokens
        40
    """
    if type(config) not in MODEL_MAPPING:
        return TextPositions()
    try:
        entries = json.dumps({key: value for key, value in config.to_dict().items() if key != "_name_or_path"})
        return _probe_cached(type(config).model_type, entries)
    except MODEL_ERRORS:  # a value that JSON cannot hold, or that the config does not accept again
        return _probe(config)


def max_input_tokens(config: "PreTrainedConfig | None", *, target: bool = False) -> int | None:
    """Return the maximal number of input tokens, by the position embeddings and `max_position_embeddings`; None for no limit.

    Args:
        config: of the model, composite ones included; None has no limit.
        target: return the limit of the decoder of an encoder-decoder.

    Example:
        >>> from transformers import GPT2Config
        >>> max_input_tokens(GPT2Config(n_positions=33))
        33
    """
    if config is None:
        return None
    positions = text_positions(config)
    text = config.get_text_config(**({"decoder": target, "encoder": not target} if config.is_encoder_decoder else {}))
    limits = [positions.max_target_tokens if target else positions.max_tokens]
    limits += [getattr(text, name, None) for name in (_TARGET_LENGTH_FIELDS if target else _LENGTH_FIELDS)]
    return min((limit for limit in limits if isinstance(limit, int) and limit > 0), default=None)


def position_padding_token(model: nn.Module) -> int | None:
    """Return the padding token by which a loaded model counts positions; None where it does not, or no padding shifts them.

    It is fixed when the model is built; a later change of the config has no effect.
    """
    required = text_positions(model.config).required_padding_token  # type: ignore[arg-type]
    if required is None:
        return None
    built = (
        getattr(module, "padding_idx", None) for module in model.modules() if not isinstance(module, nn.Embedding)
    )
    return next((pad for pad in built if isinstance(pad, int)), required)


_LENGTH_FIELDS = ("max_position_embeddings", "max_encoder_position_embeddings")
_TARGET_LENGTH_FIELDS = ("max_position_embeddings", "max_decoder_position_embeddings", "max_target_positions")


@functools.lru_cache(maxsize=64)
def _probe_cached(model_type: str, entries: str) -> TextPositions:
    settings = json.loads(entries)
    settings.pop("model_type", None)
    return _probe(AutoConfig.for_model(model_type, **settings))


def _probe(config: PreTrainedConfig) -> TextPositions:
    mapped: Any = MODEL_MAPPING[type(config)]
    model_class = mapped[0] if isinstance(mapped, tuple) else mapped
    try:
        with on_meta_device(), without_initialization():
            model = model_class._from_config(config)
    except MODEL_ERRORS:
        return TextPositions()
    if sum("Embedding" in type(module).__name__ for module in model.modules()) < 2:
        return TextPositions()
    try:
        return _probe_lookups(model_class, config, model)
    except MODEL_ERRORS:
        return _by_padding_index(model)


def _probe_lookups(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, full_model: nn.Module
) -> TextPositions:
    tiny_models = [_TinyModel(model_class, config, pad) for pad in _PADS]
    lookups = [model.lookups() for model in tiny_models]
    limits: dict[int, int] = {}
    pad, offset_token = _pad_token(config), None
    for (name, stack), first_row in lookups[0].items():
        other = lookups[1].get((name, stack), first_row)
        if other - first_row == _PADS[1] - _PADS[0] and pad is not None:
            offset_token = pad
            first_row += pad - _PADS[0]
        rows = full_model.get_parameter(name).shape[0]
        limits[stack] = min(limits.get(stack, rows), rows - first_row)
    if not any(stack == 0 for _, stack in lookups[0]):
        return TextPositions(None, limits.get(1))
    keeps = tiny_models[0].keeps_positions(lookups[0], tiny_models[0].pad)
    if not keeps and pad is not None and pad < tiny_models[0].tokens:
        keeps = tiny_models[0].keeps_positions(lookups[0], pad)  # of families with the padding token in their code
    any_token = keeps and tiny_models[0].keeps_positions(lookups[0], _OTHER_TOKEN)
    return TextPositions(
        limits.get(0), limits.get(1), not keeps, pad if keeps and not any_token else None, offset_token
    )


def _by_padding_index(model: nn.Module) -> TextPositions:
    """Return what is known without running the model: position embeddings with a padding row begin after it."""
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
    """A tiny model of a family with its own padding token, which records its lookups."""

    def __init__(self, model_class: type[PreTrainedModel], config: PreTrainedConfig, pad: int):
        tiny = tiny_config(config, pad_token_id=pad, **_ONE_BLOCK)
        with without_initialization():  # lookups do not depend on the weights
            self.model = model_class._from_config(tiny).float().eval()
        self.pad = pad
        self.tokens = int(getattr(tiny.get_text_config(), "vocab_size", 0) or 0)
        self.names = {parameter.data_ptr(): name for name, parameter in self.model.named_parameters()}
        self.has_decoder = bool(config.is_encoder_decoder)

    def lookups(self) -> dict[tuple[str, int], int]:
        """Return the first row that is looked up of each embedding whose rows are looked up in order.

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
        """Return whether a text's positions stay the same with two padding tokens before it."""
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
        inputs = {"input_ids": texts[0], **more} | ({"decoder_input_ids": texts[1]} if self.has_decoder else {})
        recorder = _RecordLookups()
        with torch.no_grad(), recorder:
            self.model(**inputs)
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
    """Return the first index where the indices of one text of `length` tokens count up from it, one a token, and end there."""
    rows = indices.reshape(-1).tolist()
    first = rows[0] if rows else 0
    return first if indices.shape[-1] == indices.numel() and _counts_up_from(indices, first, length, 0) else None


def _counts_up_from(indices: Tensor, first: int, length: int, skipped: int) -> bool:
    rows = indices.reshape(-1).tolist()[skipped:]
    further = rows[length : length + 1]  # some families pad a text to a multiple of their window
    return rows[:length] == list(range(first, first + length)) and further != [first + length]
