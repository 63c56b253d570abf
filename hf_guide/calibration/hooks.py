"""Running a model to be listened to: hooks that go away again, masks of padding, and stopping halfway."""

import contextlib
import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_guide.calibration.data import Batch
from hf_guide.calibration.modules import ModuleRef

ActivationCallback = Callable[[Tensor], object]
CROSS_ATTENTION_KEY_VALUE = re.compile(r"\.(?:EncDecAttention|encoder_attn)\.[kv]")
"""Modules of a decoder that are given the encoder's tokens."""


class StopForward(Exception):  # noqa: N818  # not an error: what was wanted of a forward has been heard
    """Raised by a hook to end a forward; `run` swallows it."""


@contextlib.contextmanager
def removable_hooks() -> Iterator[list[Any]]:
    """Give a list for the handles of hooks, all of which are removed in the end."""
    handles: list[Any] = []
    try:
        yield handles
    finally:
        for handle in handles:
            handle.remove()


def register_input_hook(module: nn.Module, hear: ActivationCallback) -> Any:
    """Call `hear` with the stream or features that `module` is given; return the hook's handle."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hear(hidden_states_arg(args, kwargs))

    return module.register_forward_pre_hook(hook, with_kwargs=True)


def hidden_states_arg(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the tensor that a module was called with: its first argument, or `hidden_states`."""
    return args[0] if args else kwargs["hidden_states"] if "hidden_states" in kwargs else next(iter(kwargs.values()))


def first_output(output: Any) -> Tensor:
    """Return a module's output, or the first of several."""
    return output if isinstance(output, Tensor) else output[0]


@torch.no_grad()
def forward_no_cache(model: PreTrainedModel, batch: Batch) -> Any:
    """Run a forward without a cache; return its outputs, or None where a hook has heard enough."""
    inputs: dict[str, Any] = {name: _to_model(value, model) for name, value in batch.items()}
    accepted = inspect.signature(model.forward).parameters
    hands_on = any(each.kind == inspect.Parameter.VAR_KEYWORD for each in accepted.values())
    inside = inspect.signature(model.base_model.forward).parameters if hands_on else {}
    if "use_cache" in {*accepted, *inside}:
        inputs["use_cache"] = False  # of some families' heads it is one of the keywords that are handed on
    try:
        return model(**inputs)
    except StopForward:
        return None


def capture_input(model: PreTrainedModel, module: nn.Module, batch: Batch) -> Tensor | None:
    """Return what a module is given in a forward, which ends there; None where the forward never comes to it."""
    heard: list[Tensor] = []

    def stop(tensor: Tensor) -> None:
        heard.append(tensor)
        raise StopForward

    with removable_hooks() as handles:
        handles.append(register_input_hook(module, stop))
        forward_no_cache(model, batch)
    return heard[0] if heard else None


def _to_model(value: Tensor, model: PreTrainedModel) -> Tensor:
    value = value.to(model.device)
    return value.to(model.dtype) if value.is_floating_point() else value


@contextlib.contextmanager
def eval_mode(model: PreTrainedModel) -> Iterator[None]:
    """Put a model into evaluation mode, and back; of float64 its experts are run one by one, for no kernel groups them."""
    were_training = {module: module.training for module in model.modules()}  # a part may be frozen in its own mode
    experts = None
    model.eval()
    if model.dtype == torch.float64 and model._can_set_experts_implementation():
        experts = model.get_experts_implementation()
        model.set_experts_implementation("eager")
    try:
        yield
    finally:
        for module, was_training in were_training.items():
            module.training = was_training
        if experts is not None:
            model.set_experts_implementation(experts)


def reads_decoder_tokens(part: ModuleRef, config: PreTrainedConfig) -> bool:
    """Whether what a part is given are the tokens of an encoder-decoder's decoder: those that it reads, wherever it stands."""
    if CROSS_ATTENTION_KEY_VALUE.search(part.name):
        return False
    return is_decoder_stack(next((norm for norm in part.match.row.reads if norm), part.name), config)


def is_decoder_stack(name: str, config: PreTrainedConfig) -> bool:
    """Whether a stack, or the norm behind it, is an encoder-decoder's decoder; a head that names neither reads the decoder.

    A model that is a decoder and nothing else may call its blocks so as well (OPT): its mask is the only one.
    """
    return bool(config.is_encoder_decoder) and ("decoder" in name or "encoder" not in name)


def drop_padding(heard: Tensor, batch: Batch, *, of_decoder: bool = False) -> Tensor:
    """Return the rows, (tokens, width), of what was heard, (batch, length, width), that are not padding.

    What is heard within a mixture of experts has the two axes made one, (batch * length, width).
    """
    mask = batch.get("decoder_attention_mask" if of_decoder else "attention_mask")
    if mask is not None and mask.ndim == 2 and heard.shape[:-1] in (mask.shape, (mask.numel(),)):
        return heard.reshape(-1, heard.shape[-1])[mask.to(heard.device).bool().flatten()]
    return heard.reshape(-1, heard.shape[-1])
