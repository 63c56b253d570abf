"""Models of every family for the law of depth: a tiny teacher, its inputs, and the teacher with blocks bypassed.

Nothing here uses the library's check of depth: blocks are found as modules of the model, and their forward is replaced.
"""

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_guide.models.tiny_models import build_tiny_model, randomize_parameters, tiny_config

DEPTH_NAMES = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "depth",
    "encoder_layers",
    "decoder_layers",
    "num_encoder_layers",
    "num_decoder_layers",
)
OUTPUTS = (
    "logits",
    "prediction_logits",
    "seq_relationship_logits",
    "start_logits",
    "last_hidden_state",
    "logits_per_image",
)
VOCABULARY = 90


def teacher_for(model_class: type[PreTrainedModel], config: PreTrainedConfig, depth: int = 5) -> PreTrainedModel:
    """Return a tiny float64 model with `depth` blocks in each stack, its parameters away from their defaults."""
    sizes = dict.fromkeys(DEPTH_NAMES, depth)
    model = build_tiny_model(model_class, tiny_config(config, **sizes))
    randomize_parameters(model, seed=1)
    return model


def depths(config: PreTrainedConfig) -> dict[str, Any]:
    """Return each depth of a config as overrides, nested as the config is: {"text_config": {"num_layers": 5}}."""
    stated = config.to_dict()
    found: dict[str, Any] = {}
    for name in DEPTH_NAMES:
        if isinstance(stated.get(name), int) and name not in config.attribute_map:
            found[name] = stated[name]
    if "encoder_layers" in found:
        found.pop("num_hidden_layers", None)
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if isinstance(part, PreTrainedConfig) and (nested := depths(part)):
            found[name] = nested
    return found


def cut(depth: Mapping[str, Any], to: int) -> dict[str, Any]:
    """Return `depth` with every number above `to` lowered to it."""
    return {name: cut(value, to) if isinstance(value, Mapping) else min(value, to) for name, value in depth.items()}


def inputs_for(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return a batch that a model of any modality runs on."""
    generator = torch.Generator().manual_seed(5)
    config, parameters = model.config, inspect.signature(model.forward).parameters

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def tokens(length: int) -> Tensor:
        vocabulary = getattr(config.get_text_config(), "vocab_size", None) or VOCABULARY
        return torch.randint(3, min(vocabulary, VOCABULARY), (2, length), generator=generator)

    batch: dict[str, Tensor] = {}
    if "input_ids" in parameters:
        batch["input_ids"] = tokens(11)
    vision = getattr(config, "vision_config", config)
    if "pixel_values" in parameters and ("input_ids" not in parameters or hasattr(model, "logit_scale")):
        size = getattr(vision, "image_size", 16)
        height, width = (size, size) if isinstance(size, int) else size
        batch["pixel_values"] = draw(2, getattr(vision, "num_channels", 3), height, width)
    if "input_features" in parameters and "input_ids" not in parameters:
        batch["input_features"] = draw(
            2, getattr(config, "num_mel_bins", 7), 2 * getattr(config, "max_source_positions", 10)
        )
    if "input_values" in parameters and "input_ids" not in parameters:
        batch["input_values"] = draw(2, 4000)
    if "decoder_input_ids" in parameters:
        batch["decoder_input_ids"] = tokens(7)
    return batch


@torch.no_grad()
def outputs_of(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
    """Return a model's first known output on a batch."""
    model.set_attn_implementation("eager")
    model.set_experts_implementation("eager")  # the others do not support float64
    torch.manual_seed(0)
    outputs = model(**batch)
    return next(outputs[name] for name in OUTPUTS if outputs.get(name) is not None)


@contextlib.contextmanager
def bypassed(model: PreTrainedModel, selected: Mapping[str, list[int]], *, branches: bool = False) -> Iterator[None]:
    """Make every block of the stacks in `selected` that is not selected return its input, for the duration of the context.

    With `branches` the modules that are not norms are parts of blocks, whose output is added: they return zeros.
    `forward` is replaced rather than hooked, because SqueezeBERT calls it directly.
    """

    def replace_forward(module: nn.Module, zero: bool) -> Any:
        forward = module.forward

        def call(*arguments: Any, **keywords: Any) -> Any:
            output = forward(*arguments, **keywords)
            hidden_states = keywords.get("hidden_states", arguments[0] if arguments else None)
            assert hidden_states is not None, f"{type(module).__name__} has no hidden states as input"
            hidden_states = torch.zeros_like(hidden_states) if zero else hidden_states
            if isinstance(output, Mapping):
                return {**output, next(iter(output)): hidden_states}
            if not isinstance(output, (tuple, list)):
                assert output.shape == hidden_states.shape
                return hidden_states
            assert output[0].shape == hidden_states.shape
            return type(output)((hidden_states, *output[1:]))

        return call

    changed = []
    try:
        for stack, blocks in selected.items():
            for number, module in enumerate(stack_of(model, stack)):
                if number not in blocks:
                    module.forward = replace_forward(module, branches and "norm" not in stack)
                    changed.append(module)
        yield
    finally:
        for module in changed:
            del module.forward


def stack_of(model: PreTrainedModel, stack: str) -> list[nn.Module]:
    """Return the blocks of a stack, named relative to the base model or to the model."""
    for root in (model.base_model, model):
        with contextlib.suppress(AttributeError):
            return list(root.get_submodule(stack))
    raise AssertionError(f"{type(model).__name__} has no {stack}")


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference, of the largest expected value."""
    finite = torch.isfinite(expected)
    assert torch.equal(finite, torch.isfinite(found))
    return ((found - expected)[finite].abs().max() / expected[finite].abs().max()).item()


@torch.no_grad()
def generates_alike_with_and_without_cache(student: PreTrainedModel, teacher: PreTrainedModel) -> bool:
    """Return whether a student that generates gives the same tokens and logits with the cache as without.

    The result is True for a family whose whole teacher does not do so.
    """
    if not student.can_generate() or "input_ids" not in inputs_for(student):
        return True

    def continued(model: PreTrainedModel, use_cache: bool) -> tuple[Tensor, Tensor]:
        found = model.generate(
            inputs_for(model)["input_ids"][:1],
            max_new_tokens=4,
            do_sample=False,
            use_cache=use_cache,
            pad_token_id=0,
            eos_token_id=None,
            decoder_start_token_id=1 if model.config.is_encoder_decoder else None,
            return_dict_in_generate=True,
            output_logits=True,
        )
        return found.sequences, torch.stack(found.logits)

    def same_with_cache(model: PreTrainedModel) -> bool:
        (tokens, logits), (expected, expected_logits) = continued(model, True), continued(model, False)
        return torch.equal(tokens, expected) and relative_error(logits, expected_logits) <= 1e-5

    try:
        whole = same_with_cache(teacher)
    except (ValueError, RuntimeError, TypeError, AttributeError, IndexError, KeyError):
        return True
    return not whole or same_with_cache(student)
