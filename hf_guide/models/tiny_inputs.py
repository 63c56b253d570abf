"""Inputs for a model of any modality, from its config and the signature of its forward alone.

`tiny_inputs` are the smallest that a user's model runs on; `example_batch` is a fixed batch on which tiny models are compared.
"""

import inspect
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_guide.errors import ShapeError

NUM_TOKENS = 8
IMAGE_SIDE = 64
"""Of models whose config names no image size: convolutional ones, which take any that survives their strides."""


def tiny_inputs(model: PreTrainedModel) -> list[dict[str, Tensor]]:
    """Return the smallest inputs of a model, in the order to try them: its main input alone, then all that can be constructed.

    The list is empty where the main input, or one that `forward` requires, is of an unknown kind.

    Example:
        >>> from transformers import LlamaConfig, LlamaModel
        >>> model = LlamaModel(LlamaConfig(vocab_size=64, hidden_size=8, intermediate_size=8, num_attention_heads=2))
        >>> [tuple(inputs["input_ids"].shape) for inputs in tiny_inputs(model)]
        [(1, 8)]
    """
    accepted = inspect.signature(model.forward).parameters
    required = {
        name
        for name, parameter in accepted.items()
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }
    known = {name: value for name in accepted if (value := _make_input(name, model)) is not None}
    declared = model.main_input_name  # a list in OneFormer
    main = {name for name in ([declared] if isinstance(declared, str) else declared) if name in accepted}
    least = {name for name in known if name in main or name in required}
    if not known or not required <= known.keys():
        return []
    has_main = bool(main) and main <= known.keys()
    choices = [least] if has_main else []
    if model.config.is_encoder_decoder and "decoder_input_ids" in known and has_main:
        choices.insert(0, least | {"decoder_input_ids"})  # classifiers make their own
    for choice in (set(known), set(known) - {"decoder_input_ids"}):
        if choice not in choices:
            choices.append(choice)
    return [{name: known[name] for name in choice} for choice in choices if choice]


def count_positions(inputs: dict[str, Tensor]) -> int:
    """Return about how many positions a forward on these inputs has: tokens, patches of 16 x 16 pixels or frames."""
    counts = [0]
    for name, value in inputs.items():
        if name.endswith("ids"):
            counts.append(value.numel())
        elif value.ndim >= 4:
            counts.append(value.numel() // value.shape[-3] // 256 + 1)
        else:
            counts.append(value.shape[-1] // 320 + 1 if value.ndim == 2 else max(value.shape[1:]))
    return sum(counts)


def _make_input(name: str, model: PreTrainedModel) -> Tensor | None:
    config = model.config
    if name == "input_ids":
        return _tokens(config.get_text_config())
    if name == "decoder_input_ids":
        start, vocabulary = getattr(config, "decoder_start_token_id", None), _first_attribute(config, "vocab_size")
        fits = isinstance(start, int) and 0 <= start < (vocabulary if isinstance(vocabulary, int) else 0)
        return torch.tensor([[start if fits else 0, 1]])
    if name in ("pixel_values", "pixel_values_videos"):
        return _pixels(config, model.dtype)
    if name in ("input_features", "input_values"):
        return _audio(config, name, model.dtype)
    if name == "task_inputs":  # the tokens of a task's name, as many as positions
        length = getattr(config, "task_seq_len", None)
        return torch.ones(1, length, dtype=torch.long) if isinstance(length, int) else None
    return None


def _tokens(config: PreTrainedConfig) -> Tensor | None:
    vocabulary = _first_attribute(config, "vocab_size")
    if not isinstance(vocabulary, int) or vocabulary < 1:
        return None
    special = {value for name, value in _all_values(config) if name.endswith("token_id") and isinstance(value, int)}
    plain = [token for token in range(min(vocabulary, 64 + len(special))) if token not in special] or [0]
    limit = _first_attribute(config, "max_position_embeddings", "n_positions", "max_target_positions")
    length = NUM_TOKENS
    if isinstance(limit, int) and limit >= 1:
        pad = getattr(config, "pad_token_id", None)
        offset = pad + 1 if isinstance(pad, int) and pad >= 0 else 0  # RoBERTa's positions begin there
        length = max(1, min(NUM_TOKENS, limit - offset if limit > offset else limit))
    ids = [plain[number % len(plain)] for number in range(length)]
    end = getattr(config, "eos_token_id", None)
    if isinstance(end, int) and 0 <= end < vocabulary and length > 1:
        ids[-1] = end  # BART's classifier takes the state at the end token
    return torch.tensor([ids])


def _pixels(config: PreTrainedConfig, dtype: torch.dtype) -> Tensor | None:
    vision = next((each for each in _iter_configs(config) if hasattr(each, "image_size")), None)
    vision = vision or next((each for each in _iter_configs(config) if hasattr(each, "num_channels")), None)
    if vision is None:
        return None
    size = getattr(vision, "image_size", None) or IMAGE_SIDE
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    channels = getattr(vision, "num_channels", None) or getattr(vision, "in_channels", None)
    if not all(isinstance(value, int) for value in (height, width)):
        return None
    shape = [channels if isinstance(channels, int) else 3, height, width]
    frames = getattr(vision, "num_frames", None)
    if isinstance(frames, int):
        shape.insert(0, frames)
    return _sine_wave(shape, dtype)


def _audio(config: PreTrainedConfig, name: str, dtype: torch.dtype) -> Tensor | None:
    bands = getattr(config, "num_mel_bins", None)
    if name == "input_features":
        positions = getattr(config, "max_source_positions", None)
        if isinstance(bands, int) and isinstance(positions, int):
            return _sine_wave([bands, 2 * positions], dtype)  # Whisper accepts no other length
        width = next(
            (
                getattr(config, each)
                for each in ("input_feat_per_channel", "feature_projection_input_dim")
                if isinstance(getattr(config, each, None), int)
            ),
            None,
        )
        return None if width is None else _sine_wave([32, width], dtype)
    kernels, strides = getattr(config, "conv_kernel", None), getattr(config, "conv_stride", None)
    if isinstance(kernels, (list, tuple)) and isinstance(strides, (list, tuple)):
        return _sine_wave([math.prod(strides) * 8 + sum(kernels) * max(strides)], dtype)
    frames = getattr(config, "max_length", None)
    return _sine_wave([frames, bands], dtype) if isinstance(frames, int) and isinstance(bands, int) else None


def _sine_wave(shape: list[int], dtype: torch.dtype) -> Tensor:
    count = math.prod(shape)
    return torch.linspace(-1, 1, count, dtype=torch.float32).mul(7).sin().view(1, *shape).to(dtype)


def _iter_configs(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    yield config
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield from _iter_configs(value)


def _all_values(config: PreTrainedConfig) -> Iterator[tuple[str, Any]]:
    for each in _iter_configs(config):
        yield from vars(each).items()


def _first_attribute(config: PreTrainedConfig, *names: str) -> Any:
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)


# ---------------------------------------------------------------------------------------------------------------------
# A fixed batch

_COMPARED_OUTPUTS = (
    "logits",
    "prediction_logits",
    "start_logits",
    "logits_per_image",
    "last_hidden_state",
    "pooler_output",
)


def example_tokens() -> Tensor:
    """Return the ids of one text of 11 tokens, (1, 11), on which tiny language models are compared."""
    return torch.arange(3, 14)[None]


def example_batch(model: nn.Module) -> dict[str, Tensor]:
    """Return two rows of fixed tokens, pixels or sounds, by the names of the arguments of the model's `forward`; float64."""
    config: Any = model.config
    arguments = inspect.signature(model.forward).parameters
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    vocabulary = getattr(config.get_text_config(), "vocab_size", None) or 64
    tokens = torch.randint(3, max(4, min(vocabulary, 60)), (2, 11), generator=generator)
    batch: dict[str, Tensor] = {}
    if "input_ids" in arguments:
        batch["input_ids"] = tokens
    if "pixel_values" in arguments and ("input_ids" not in arguments or hasattr(model, "logit_scale")):
        vision = getattr(config, "vision_config", config)
        size = getattr(vision, "image_size", None) or 16
        height, width = (size, size) if isinstance(size, int) else size
        batch["pixel_values"] = draw(2, getattr(vision, "num_channels", 3), height, width)
    if not batch and "input_features" in arguments:
        bands, frames = getattr(config, "num_mel_bins", 80), 2 * getattr(config, "max_source_positions", 10)
        batch["input_features"] = draw(2, bands, frames)
    if not batch and "input_values" in arguments:
        batch["input_values"] = draw(2, 4000)
    if not batch and "inputs_embeds" in arguments:
        batch["inputs_embeds"] = draw(2, 11, config.hidden_size)
    if "decoder_input_ids" in arguments:
        batch["decoder_input_ids"] = tokens[:, :7]
    return batch


@torch.no_grad()
def run_on_example(model: nn.Module) -> Tensor:
    """Return a model's output on `example_batch`: the first of logits, hidden states and a pooled output that it has.

    Raises:
        ShapeError: it has none of these.
    """
    batch = example_batch(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        outputs = model(**batch)
    for name in _COMPARED_OUTPUTS:
        if (output := getattr(outputs, name, None)) is not None:
            return output
    raise ShapeError(f"{type(model).__name__} has none of the outputs {', '.join(_COMPARED_OUTPUTS)}")
