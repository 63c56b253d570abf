"""Find the language head of a model, and run the model without it, so that a loss needs only some logits at a time.

Does: find the head and how the model transforms its output (scales, soft-caps, added biases), and verify both on the model
itself; run a model up to its head.
Does not: compute a loss (`distillation/losses/chunked.py` does).
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from hf_guide.errors import HfGuideError
from hf_guide.models.adapters import active_module, is_plain_linear, stock_module, without_adapter
from hf_guide.models.modes import eval_preserving_state

logger = logging.get_logger(__name__)

_PROBE_LENGTH = 6
FORWARD_ERRORS = (TypeError, ValueError, RuntimeError, LookupError, AttributeError, AssertionError)
"""What a model may raise on the probe inputs: its head is then not known."""


class _HeadForward:
    """Replaces the `forward` of a head. There is one for each head: torch.compile would recompile for another object."""

    def __init__(self, module: nn.Linear):
        self.module = module
        self.on_hidden: Callable[[Tensor], Tensor | None] | None = None

    @torch.compiler.disable
    def __call__(self, input: Tensor) -> Tensor:
        assert self.on_hidden is not None
        logits = self.on_hidden(input)
        if logits is not None:
            return logits
        shape = (*input.shape[:-2], 0, self.module.weight.shape[0])
        return input.new_empty(shape, dtype=linear_compute_dtype(input, self.module.weight))


@dataclass(frozen=True)
class LMHead:
    """The language head of one model: its logits are `transform(module(hidden))`.

    Attributes:
        module: The output embeddings, weight (vocabulary, width), with or without a bias.
        transform: What the model does to the output of the layer: a scale, a soft-cap, an added bias.
        shifted: Whether the model's own loss compares the logits at position i with the label at position i + 1.
        replacement: What replaces the layer's `forward` while it is skipped.
    """

    module: nn.Linear
    transform: Callable[[Tensor], Tensor]
    shifted: bool = False
    replacement: _HeadForward = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "replacement", _HeadForward(self.module))

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits (..., vocabulary) for inputs of the head, (..., width), also while the head is skipped."""
        dtype = linear_compute_dtype(hidden, self.module.weight)
        bias = None if self.module.bias is None else self.module.bias.to(dtype)
        return self.transform(nn.functional.linear(hidden.to(dtype), self.module.weight.to(dtype), bias))


def find_lm_head(model: nn.Module) -> LMHead | None:
    """Return the head of a causal, masked or sequence-to-sequence language model, or None where it cannot be verified.

    The model is run on a few tokens without gradients; its mode and the random state are restored. Its logits must be
    `transform` of the head's output, and its loss the plain cross-entropy of its logits, in training too. Call it before the
    model is wrapped or sharded for several processes.

    None means that all logits must be computed: LoRA on the head, router losses, logits cropped or masked, a head that is no
    plain linear layer, or a model that needs more than token ids (or Whisper's features) to run.
    """
    bare: Any = without_adapter(model)
    module: Any = bare.get_output_embeddings() if hasattr(bare, "get_output_embeddings") else None
    module = active_module(module)  # for `modules_to_save` PEFT trains a copy of the head
    if not is_plain_linear(module):
        return None
    weight = module.weight
    if (
        weight.device.type == "meta"
        or not weight.numel()
        or not weight.is_floating_point()
        or hasattr(weight, "to_local")
    ):
        return None
    probe = probe_inputs(bare, module.weight.shape[0])
    if probe is None:
        return None
    with eval_preserving_state(model, weight.device):
        try:
            return _verify_head(model, bare, module, probe)
        except FORWARD_ERRORS as error:
            logger.info(
                f"All logits of {type(bare).__name__} are computed, because its head was not verified: {error}"
            )
            return None


@contextlib.contextmanager
def skip_lm_head(model: nn.Module, head: LMHead, on_hidden: Callable[[Tensor], None]) -> Iterator[None]:
    """Pass the inputs of the head to `on_hidden` instead of running the head; the model then returns no logits.

    What the model does after its head still runs, on (batch, 0, vocabulary). `on_hidden` is called with (batch, length,
    width) once per forward pass, in place of the head's `forward` and within its hooks, so that weights that FSDP, DeepSpeed
    or accelerate gather are available. Call the model without labels.

    Args:
        model: The head's model, or a wrapper of it.
        head: As `find_lm_head` returned it.
        on_hidden: Takes the inputs of the head, with their graph.

    Raises:
        HfGuideError: The head is skipped already, or the model did not call its head.
    """
    if head.replacement.on_hidden is not None:
        raise HfGuideError("This head is skipped already; use one skip_lm_head at a time for one model.")
    called = False

    def record_call(hidden: Tensor) -> None:
        nonlocal called
        called = True
        on_hidden(hidden)

    with _patched_forward(head.replacement, record_call):
        yield
    if not called:
        raise HfGuideError(
            f"{type(model).__name__} did not call its head, so there are no inputs to compute a loss of. Pass the "
            "model that the head was found on."
        )


@contextlib.contextmanager
def _patched_forward(replacement: _HeadForward, on_hidden: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    # If accelerate has wrapped `forward`, the wrapped one is the head's own.
    slot = "_old_forward" if hasattr(replacement.module, "_hf_hook") else "forward"
    before = vars(replacement.module).get(slot)
    replacement.on_hidden = on_hidden
    setattr(replacement.module, slot, replacement)
    try:
        yield
    finally:
        replacement.on_hidden = None
        if before is None:
            delattr(replacement.module, slot)
        else:
            setattr(replacement.module, slot, before)


def probe_inputs(model: Any, vocabulary: int) -> dict[str, Tensor] | None:
    """Return a few ordinary tokens as inputs of a model; None if it takes other inputs."""
    device = model.device
    table = stock_module(model.get_input_embeddings())
    known = min(vocabulary, table.weight.shape[0]) if isinstance(table, nn.Embedding) else vocabulary
    special: set[Any] = set()
    for name, value in model.config.to_dict().items() if known > 64 else ():
        if name.endswith("token_id"):  # some configs have several end tokens
            special.update(value if isinstance(value, list) else [value])
    ordinary = [token for token in range(min(known, 4096)) if token not in special]
    speech = model.main_input_name == "input_features" and hasattr(model.config, "max_source_positions")
    batch = 1 if speech else 2
    ids = torch.tensor(
        [ordinary[(7 * position + 3) % len(ordinary)] for position in range(batch * _PROBE_LENGTH)], device=device
    )
    ids = ids.view(batch, _PROBE_LENGTH)
    if speech:
        frames = (batch, model.config.num_mel_bins, 2 * model.config.max_source_positions)
        return {"input_features": torch.zeros(frames, dtype=model.dtype, device=device), "decoder_input_ids": ids}
    if model.main_input_name != "input_ids":
        return None
    probe = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return probe | ({"decoder_input_ids": ids.flip(1)} if model.config.is_encoder_decoder else {})


def _verify_head(model: nn.Module, bare: Any, module: nn.Linear, probe: dict[str, Tensor]) -> LMHead | None:
    ids = probe.get("decoder_input_ids", probe.get("input_ids"))
    assert ids is not None
    vocabulary = module.weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(vocabulary, ids.shape, generator=generator).to(ids.device)
    labels[:, 2] = -100
    dtype, device = module.weight.dtype, ids.device
    # Many models take their loss in float32 even where they are of float64.
    tolerance = 8 * max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    replacement = _HeadForward(module)

    def run(head_output: Tensor | None, **more: Tensor) -> tuple[list[Tensor], Any]:
        """Run the model with `head_output` in place of its head's; return the inputs of the head, and the outputs."""
        head_inputs: list[Tensor] = []

        def take(hidden: Tensor) -> Tensor | None:
            head_inputs.append(hidden)
            return head_output

        with _patched_forward(replacement, take):
            return head_inputs, model(**probe, **more, return_dict=True)

    # Large enough for a soft-cap to show; the logits of a new model with tied weights would be too small.
    raw = 20.0 * torch.randn(*ids.shape, vocabulary, generator=generator)
    raw = raw.to(device, dtype)
    head_inputs, outputs = run(raw)
    if [hidden.shape[:-1] for hidden in head_inputs] != [ids.shape] or outputs["logits"].shape != raw.shape:
        return None
    transform = next(
        (each for each in logit_transforms(bare) if _allclose(each(raw), outputs["logits"], tolerance)),
        None,
    )
    if transform is None:
        return None
    for shifted in (True, False):
        # With confident, correct logits the cross-entropy is almost 0, so that anything else in the loss shows.
        targets = labels.roll(-1, 1) if shifted else labels
        confident = torch.zeros_like(raw).scatter_(-1, targets.clamp_min(0).unsqueeze(-1), 1e4)
        if all(
            _is_plain_loss(run(logits, labels=labels)[1], labels, shifted, tolerance) for logits in (confident, raw)
        ):
            break
    else:
        return None
    # Some models add to their loss in training only; dropout does not change logits that are passed in.
    model.train()
    in_training = _is_plain_loss(run(confident, labels=labels)[1], labels, shifted, tolerance)
    model.eval()
    if not in_training:
        return None
    again, outputs = run(None)
    if outputs["logits"].numel() or len(again) != 1 or not torch.equal(again[0], head_inputs[0]):
        return None
    return LMHead(module, transform, shifted)


def _is_plain_loss(outputs: Any, labels: Tensor, shifted: bool, tolerance: float) -> bool:
    logits = outputs["logits"].float()
    if shifted:
        logits, labels = logits[:, :-1], labels[:, 1:]
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    return bool((outputs["loss"] - expected).abs() <= tolerance * expected + 1e-6)


def _allclose(actual: Tensor, expected: Tensor, tolerance: float) -> bool:
    if actual.shape != expected.shape:
        return False
    actual, expected = actual.float(), expected.float()
    return bool((actual - expected).abs().max() <= tolerance * expected.abs().max())


_SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")
_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


def logit_transforms(model: Any) -> Iterator[Callable[[Tensor], Tensor]]:
    """Yield the transforms that a model of this config may apply to its head's output, the simplest first."""
    configs = [model.config, model.config.get_text_config(decoder=True)]

    def numbers(names: tuple[str, ...]) -> list[float]:
        values = [getattr(config, name, None) for config in configs for name in names]
        return list(dict.fromkeys(value for value in values if isinstance(value, (int, float)) and value))

    scales: list[Callable[[Tensor], Tensor]] = [_unchanged]
    for value in numbers(_SCALES):
        scales += [_multiply(value), _divide(value)]
    caps: list[Callable[[Tensor], Tensor]] = [_unchanged, *(_softcap(value) for value in numbers(_CAPS))]
    owners = [module for module in model.modules() if isinstance(getattr(module, "final_logits_bias", None), Tensor)]
    biases: list[Callable[[Tensor], Tensor]] = [*(_add_final_bias(owner) for owner in owners), _unchanged]
    for bias, cap, scale in itertools.product(biases, caps, scales):
        parts = [part for part in (scale, cap, bias) if part is not _unchanged]
        yield parts[0] if len(parts) == 1 else _compose(parts)


def _unchanged(logits: Tensor) -> Tensor:
    return logits


def _multiply(value: float) -> Callable[[Tensor], Tensor]:
    return lambda logits: logits * value


def _divide(value: float) -> Callable[[Tensor], Tensor]:
    return lambda logits: logits / value


def _softcap(value: float) -> Callable[[Tensor], Tensor]:
    return lambda logits: torch.tanh(logits / value) * value


def _add_final_bias(owner: Any) -> Callable[[Tensor], Tensor]:
    # Read on each call: a buffer moves with its model, and tokens may be added to it.
    return lambda logits: logits + owner.final_logits_bias.to(logits.device)


def _compose(parts: list[Callable[[Tensor], Tensor]]) -> Callable[[Tensor], Tensor]:
    def chained(logits: Tensor) -> Tensor:
        for part in parts:
            logits = part(logits)
        return logits

    return chained if parts else _unchanged


def linear_compute_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """Return the dtype that `nn.Linear` computes in here: of autocast, or of its weight."""
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind) and weight.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return weight.dtype
