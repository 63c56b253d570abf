"""Run a model in evaluation mode, or build one on the meta device, for the duration of a block; restore what it was."""

import contextlib
import random
from collections.abc import Iterator

import numpy
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode; restore the mode of each of its modules afterwards.

    `model.train(was_training)` would put modules that are frozen in evaluation mode back into training mode.

    Example:
        >>> model = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
        >>> with eval_mode(model):
        ...     model.training
        False
        >>> [module.training for module in model]
        [True, False]
    """
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, was_training in training:
            module.training = was_training


@contextlib.contextmanager
def eval_preserving_state(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Enter `eval_mode` without gradients; restore the random state of the CPU and of `device` as well."""
    devices = [] if device.type == "cpu" else [device]
    device_type = "cuda" if device.type == "cpu" else device.type
    with eval_mode(model), torch.no_grad(), torch.random.fork_rng(devices, device_type=device_type):
        yield


@contextlib.contextmanager
def on_meta_device() -> Iterator[None]:
    """Build modules without memory for their weights; restore the random state.

    Some classes draw values on the CPU all the same (`torch.Tensor(size).uniform_()` in wav2vec 2.0), and looking at a model
    must not change how another is trained.

    Example:
        >>> with on_meta_device():
        ...     linear = nn.Linear(2, 2)
        >>> linear.weight.device
        device(type='meta')
    """
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        yield


@contextlib.contextmanager
def without_initialization() -> Iterator[None]:
    """Build models without initializing their weights; restore the random state, as some constructors draw numbers anyway.

    Example:
        >>> state = torch.get_rng_state()
        >>> with without_initialization():
        ...     table = nn.Parameter(torch.randn(1, 2))
        >>> torch.equal(torch.get_rng_state(), state)
        True
    """
    with preserved_random_state(), no_init_weights():
        yield


@contextlib.contextmanager
def preserved_random_state() -> Iterator[None]:
    """Restore the random states of torch (CPU), NumPy and Python at the end."""
    states = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            random.setstate(states[0])
            numpy.random.set_state(states[1])


@contextlib.contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Have no part of a model keep keys and values, whose config would have it do so, for the duration of the block.

    An argument of the model's forward pass does not reach its language model where that is a part of it and the argument is
    not in its signature, as in LLaVA. A block that is run again with a cache attends to its first run's keys as well.

    Example:
        >>> from transformers import GPT2Config, GPT2Model
        >>> model = GPT2Model(GPT2Config(n_layer=1, n_embd=12, vocab_size=8))
        >>> with without_cache(model), torch.no_grad():
        ...     model(torch.zeros(1, 2, dtype=torch.long)).past_key_values is None
        True
        >>> model.config.use_cache
        True
    """
    configs = {
        id(config): config for module in model.modules() if (config := getattr(module, "config", None)) is not None
    }
    caching = [config for config in configs.values() if getattr(config, "use_cache", False) is True]
    for config in caching:
        config.use_cache = False
    try:
        yield
    finally:
        for config in caching:
            config.use_cache = True


@contextlib.contextmanager
def eager_experts(model: PreTrainedModel) -> Iterator[None]:
    """Run the experts of a mixture one by one, where its family allows it, for the duration of the block.

    So their weights can be loaded one by one, with the same result as in memory, and in float64, which the grouped kernels
    do not have.
    """
    if not model._can_set_experts_implementation():
        yield
        return
    implementation = model.get_experts_implementation()
    model.set_experts_implementation("eager")
    try:
        yield
    finally:
        model.set_experts_implementation(implementation)
