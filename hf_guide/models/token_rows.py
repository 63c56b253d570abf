"""Cut a model's vocabulary: its rows in embedding tables and heads, the ids in its config, and its tokenizer.

Does: find the axes that count tokens, select rows, translate ids, and attach a tokenizer to a model.
Does not: choose tokens, or change a tokenizer's files.
"""

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from hf_guide.errors import ShapeError, VocabularyError
from hf_guide.models.adapters import has_adapter, without_adapter
from hf_guide.models.model_classes import meta_model
from hf_guide.models.modes import without_initialization

_TOKEN_FIELD = re.compile(r"(^|_)token_(id|ids|index)$")
_ID_LISTS = ("suppress_tokens", "begin_suppress_tokens")
_ID_SEQUENCES = ("bad_words_ids", "force_words_ids")
_UNTRANSLATED = ("sequence_bias", "forced_decoder_ids", "lang_to_id", "task_to_id")
"""Fields of a generation config that hold ids in other forms; speech recognizers use them."""

_ATTRIBUTE = "reduced_tokenizer"


def reduced_config(config: PreTrainedConfig, kept_ids: Sequence[int]) -> PreTrainedConfig:
    """Return a model's config with the vocabulary of the kept tokens: its size, and all ids of special tokens.

    Raises:
        ShapeError: A config of several vocabularies, or whose vocabulary is in a nested config.
        VocabularyError: The config names a token that is not kept.

    Example:
        >>> from transformers import LlamaConfig
        >>> config = reduced_config(LlamaConfig(vocab_size=32, bos_token_id=1, eos_token_id=30), [0, 1, 5, 30])
        >>> config.vocab_size, config.eos_token_id
        (4, 3)
    """
    check_one_vocabulary(config)
    reduced = copy.deepcopy(config)
    translate_token_ids(reduced, {old: new for new, old in enumerate(kept_ids)})
    reduced.vocab_size = len(kept_ids)
    return reduced


def check_one_vocabulary(config: PreTrainedConfig) -> None:
    """Check that a model has one vocabulary, of texts.

    Raises:
        ShapeError: Its config has several, or none of its own.
    """
    nested = [name for name, value in vars(config).items() if isinstance(value, PreTrainedConfig)]
    per_layer = getattr(config, "vocab_size_per_layer_input", None)
    if nested or per_layer is not None or not isinstance(getattr(config, "vocab_size", None), int):
        found = f"nested configs ({', '.join(nested)})" if nested else "embeddings of tokens in each block"
        found = found if nested or per_layer is not None else "no vocab_size"
        raise ShapeError(
            f"The vocabulary of a {type(config).__name__} cannot be reduced: it has {found}. A vocabulary is reduced of "
            "models of text whose config has one vocab_size. Leave it at the teacher's."
        )


def config_token_ids(config: Any) -> set[int]:
    """Return the ids of all tokens that a model's config or generation config names, such as `eos_token_id`.

    Example:
        >>> from transformers import LlamaConfig
        >>> sorted(config_token_ids(LlamaConfig(bos_token_id=1, eos_token_id=[2, 7])))
        [1, 2, 7]
    """
    found: set[int] = set()
    for name, value in vars(config).items():
        if is_token_field(name):
            found |= {index for index in (value if isinstance(value, (list, tuple)) else [value]) if _is_id(index)}
    return found


def is_token_field(name: str) -> bool:
    """Return whether a config field of this name holds ids of tokens, such as `eos_token_id`."""
    return _TOKEN_FIELD.search(name) is not None


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def translate_token_ids(config: Any, new_ids: Mapping[int, int]) -> list[str]:
    """Replace the token ids in a config or generation config, in place; return notes on entries that were dropped.

    Args:
        config: `eos_token_id` and its like must be kept; of lists of suppressed or bad words, those with other tokens go.
        new_ids: By id, the new one of each kept token.

    Raises:
        VocabularyError: A token that the config names is not kept, or the config holds ids in a form that is not translated.
    """
    notes = []
    for name, value in list(vars(config).items()):
        if value is None:
            continue
        if name in _UNTRANSLATED and value:
            raise VocabularyError(
                f"{type(config).__name__}.{name} holds token ids that cannot be translated to a smaller vocabulary. Remove "
                "it, or leave vocab_size at the teacher's."
            )
        if is_token_field(name):
            setattr(config, name, _translated(name, value, new_ids))
        elif name in _ID_LISTS:
            setattr(config, name, [new_ids[index] for index in value if index in new_ids])
            if len(getattr(config, name)) < len(value):
                notes.append(f"{name} names tokens that the smaller vocabulary does not have: they are left out.")
        elif name in _ID_SEQUENCES:
            kept = [words for words in value if all(index in new_ids for index in _flat(words))]
            setattr(config, name, [_map_nested(words, new_ids) for words in kept] or None)
            if len(kept) < len(value):
                notes.append(
                    f"{name} names words of tokens that the smaller vocabulary does not have: they are left out."
                )
    return notes


def _translated(name: str, value: Any, new_ids: Mapping[int, int]) -> Any:
    if isinstance(value, (list, tuple)):
        return [_translated(name, index, new_ids) for index in value]
    if not _is_id(value):
        return value  # -1 is no token
    if value not in new_ids:
        raise VocabularyError(
            f"The config's {name} is {value}, which is not a token of the teacher's tokenizer. Correct it, or leave "
            "vocab_size at the teacher's."
        )
    return new_ids[value]


def _flat(value: Any) -> list[int]:
    return [index for each in value for index in _flat(each)] if isinstance(value, (list, tuple)) else [value]


def _map_nested(value: Any, new_ids: Mapping[int, int]) -> Any:
    return [_map_nested(each, new_ids) for each in value] if isinstance(value, (list, tuple)) else new_ids[value]


def vocabulary_axes(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> dict[str, int]:
    """Return the tensors with an entry for each token, by their names in the state dict, with the axis that counts them.

    They are those whose shape follows `vocab_size`, so tables, heads and biases of every family, and no others.

    Example:
        >>> from transformers import BertConfig, BertForMaskedLM
        >>> vocabulary_axes(BertForMaskedLM, BertConfig(num_hidden_layers=1))["cls.predictions.bias"]
        0
    """
    shapes = []
    for extra in (0, 1):
        sized = copy.deepcopy(config)
        sized.vocab_size = config.vocab_size + extra
        shapes.append({name: tensor.shape for name, tensor in meta_model(model_class, sized).state_dict().items()})
    return {
        name: next(axis for axis, size in enumerate(shape) if size != shapes[1][name][axis])
        for name, shape in shapes[0].items()
        if shape != shapes[1][name]
    }


def select_token_rows(model: PreTrainedModel, kept_ids: Sequence[int]) -> PreTrainedModel:
    """Return a model with the rows of the kept tokens, which computes the same on them. All other weights are shared with it.

    Args:
        model: It is not modified.
        kept_ids: Ids, in the order of the new rows.

    Raises:
        ShapeError: As `check_one_vocabulary`.
        VocabularyError: A quantized model, one with an adapter or on several devices; or a token that the config names is not
            kept.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=32, bos_token_id=0, eos_token_id=1, **sizes))
        >>> small = select_token_rows(model, [0, 1, 5, 30])
        >>> torch.equal(small(torch.tensor([[2, 3]])).logits, model(torch.tensor([[5, 30]])).logits[..., [0, 1, 5, 30]])
        True
    """
    devices = {parameter.device for parameter in model.parameters()}
    if has_adapter(model) or getattr(model, "is_quantized", False) or len(devices) > 1:
        what = (
            "has an adapter"
            if has_adapter(model)
            else "is quantized"
            if len(devices) == 1
            else "is on several devices"
        )
        raise VocabularyError(
            f"The teacher has to be cut to a smaller vocabulary, and it {what}. Load it without, on one device."
        )
    config = reduced_config(model.config, kept_ids)
    axes = vocabulary_axes(type(model), model.config)
    with without_initialization():
        small = type(model)._from_config(
            config, dtype=model.dtype, attn_implementation=model.config._attn_implementation
        )
    tensors = model.state_dict()
    rows = torch.as_tensor(kept_ids, device=next(iter(devices)))
    cut: dict[int, Tensor] = {}
    for name, axis in axes.items():
        key = tensors[name].data_ptr()  # tied tensors stay one
        cut.setdefault(key, tensors[name].index_select(axis, rows))
        tensors[name] = cut[key]
    small.load_state_dict(tensors, assign=True)
    small.tie_weights()
    small.generation_config = copy.deepcopy(getattr(model, "generation_config", None))
    if small.generation_config is not None:
        translate_token_ids(small.generation_config, {old: new for new, old in enumerate(kept_ids)})
    return small.requires_grad_(False).train(model.training).to(rows.device)


def attach_tokenizer(model: PreTrainedModel, tokenizer: Any) -> None:
    """Attach to a model the tokenizer of its vocabulary, where that is not the one among its teacher's files."""
    model.__dict__[_ATTRIBUTE] = tokenizer


def attached_tokenizer(model: Any) -> Any:
    """Return the tokenizer that was attached to a model; None for none."""
    return None if model is None else without_adapter(model).__dict__.get(_ATTRIBUTE)
