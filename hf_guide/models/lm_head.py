"""The language head taken out of a model, so that a loss of its logits needs only a few of them at a time.

Does: find the head and what the model does to its logits, and prove both on the model itself; run a model up to its
head; sum losses over chunks of logits, forward and backward in one walk.
Does not: know what the losses are, pick items, or divide by their number.

What models do to the output of their language head: scales, soft-caps, added biases, by the names of their configs.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from hf_guide.errors import HfGuideError, OptionError
from hf_guide.models.adapters import active_module, is_plain_linear, stock_module, without_adapter
from hf_guide.models.modes import eval_preserving_state

logger = logging.get_logger(__name__)

_PROBE_LENGTH = 6
# Elements of logits walked over at once: on a CPU few enough to stay in its cache, elsewhere enough to keep it busy.
_CPU_CHUNK_SIZE = 2**19
_DEVICE_CHUNK_SIZE = 2**26
# What a model may raise that is fed too little: it is then not one whose head we know.
FORWARD_ERRORS = (TypeError, ValueError, RuntimeError, LookupError, AttributeError, AssertionError)


class _HeadForward:
    """Stands in for a head's `forward`. One object for the head's life: compiled code is compiled anew for another."""

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
    """How hidden states become logits in one model: `transform(module(hidden))`.

    Attributes:
        module: the output embeddings, weight (vocabulary, width), with or without a bias.
        transform: what the model does to the head's output: a scale, a soft-cap, an added bias.
        shifted: whether the model's own loss compares the logits of place i with the label of place i + 1.
    """

    module: nn.Linear
    transform: Callable[[Tensor], Tensor]
    shifted: bool = False
    tap: _HeadForward = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tap", _HeadForward(self.module))

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the model's logits, (..., vocabulary), of what its head is fed, (..., width), even while it is tapped."""
        dtype = linear_compute_dtype(hidden, self.module.weight)
        bias = None if self.module.bias is None else self.module.bias.to(dtype)
        return self.transform(nn.functional.linear(hidden.to(dtype), self.module.weight.to(dtype), bias))


def find_lm_head(model: nn.Module) -> LMHead | None:
    """Return the head of a causal, masked or sequence-to-sequence language model, or None where it is not certain.

    It is proved on the model itself, which is run on a few tokens without gradients, its mode and the random state kept:
    the model's logits must be `transform` of the head's output, and its loss the plain cross-entropy of its logits, with
    nothing added, in training either. A model of several processes is looked at before it is wrapped or sharded.

    None means that the model's whole logits must be taken: a LoRA on the head, router losses, logits cropped or masked,
    a head that is no plain linear layer, or a model that needs more than token ids (or Whisper's features) to run.
    """
    bare: Any = without_adapter(model)
    module: Any = bare.get_output_embeddings() if hasattr(bare, "get_output_embeddings") else None
    module = active_module(module)  # with modules_to_save PEFT trains a copy of the head
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
        except FORWARD_ERRORS as refusal:
            logger.info(f"The head of {type(bare).__name__} is not taken out of it: {refusal}")
            return None


@contextlib.contextmanager
def skip_lm_head(model: nn.Module, head: LMHead, on_hidden: Callable[[Tensor], None]) -> Iterator[None]:
    """Within, `model` runs up to its head, hands the head's input to `on_hidden`, and has logits for no place at all.

    What the model does after its head still runs, on (batch, 0, vocabulary). `on_hidden` is called with (batch, length,
    width), once for every forward, in place of the head's own `forward`: within its hooks, so that weights that FSDP,
    DeepSpeed or accelerate bring along are there. Call the model without labels: there is nothing to compare them with.

    Args:
        model: the head's model, or what a wrapper made of it.
        head: what `find_head` returned for it.
        on_hidden: takes what the head is fed, with its graph.

    Raises:
        HfGuideError: the head is tapped already, or the model ran to the end without its head.
    """
    if head.tap.on_hidden is not None:
        raise HfGuideError("This head is tapped already; one without_logits at a time for one model.")
    fed = False

    def hand_over(hidden: Tensor) -> None:
        nonlocal fed
        fed = True
        on_hidden(hidden)

    with _patched_forward(head.tap, hand_over):
        yield
    if not fed:
        raise HfGuideError(
            f"{type(model).__name__} was run without its head being called, so there is nothing to make a loss of; was the "
            "head found on this very model?"
        )


def chunked_loss(
    hidden: Tensor,
    head: LMHead,
    loss: Callable[[Tensor, slice], Mapping[str, Tensor]],
    weights: Mapping[str, float],
    *,
    max_logits: int = 2**23,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the sum over items of weighted losses of their logits, without ever holding all logits.

        sum_items sum_name weights[name] * loss(transform(hidden W^T + b))[name]

    Gradients of the sum are found in the same walk and kept, in float32 or better: as much again as `hidden` and the
    head's parameters, whatever the number of items. So `backward` goes through it once, and divides (by the number of
    items) afterwards: nothing underflows in half precision that would not in the model's own loss.

    Args:
        hidden: what the head is fed at the items, (items, width), any floating dtype.
        head: as `find_head` returned it. Under autocast it multiplies in autocast's precision, as in its model.
        loss: given (some items, vocabulary) logits, float32 or better, and which of the items these are, returns (some
            items,) for each of its names. Names that `weights` has not are summed too, without gradient. It is called
            for few items at a time, one run of them after the other.
        weights: by name; all of them must be among what `loss` returns.
        max_logits: the logits of so many items exist at a time as fit in it, and one item's at least. On a CPU nothing
            else is that large; elsewhere about six buffers are.

    Returns:
        The sum, with gradient to `hidden` and the head's weight and bias, and each name's own sum, without. Scalars,
        float64 for a float64 head and float32 for all others.

    Raises:
        OptionError: `loss` does not return what `weights` asks for.
        HfGuideError: `hidden` or what `loss` returns has another shape, or backward is asked for twice.
    """
    if hidden.dim() != 2 or hidden.shape[-1] != head.module.weight.shape[-1]:
        raise HfGuideError(
            f"The head is fed (items, {head.module.weight.shape[-1]}) here; found {tuple(hidden.shape)}. Pick the items first."
        )
    sums: dict[str, Tensor] = {}
    walk = ChunkedLossState(head.transform, loss, dict(weights), max_logits, torch.is_grad_enabled(), sums)
    return ChunkedLoss.apply(hidden, head.module.weight, head.module.bias, walk), sums


@contextlib.contextmanager
def _patched_forward(tap: _HeadForward, on_hidden: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    # Where accelerate has put a hook around `forward`, what it wraps is the head's own.
    slot = "_old_forward" if hasattr(tap.module, "_hf_hook") else "forward"
    before = vars(tap.module).get(slot)
    tap.on_hidden = on_hidden
    setattr(tap.module, slot, tap)
    try:
        yield
    finally:
        tap.on_hidden = None
        if before is None:
            delattr(tap.module, slot)
        else:
            setattr(tap.module, slot, before)


def probe_inputs(model: Any, vocabulary: int) -> dict[str, Tensor] | None:
    """A few tokens that mean nothing special to the model; None where it wants something else."""
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
        [ordinary[(7 * place + 3) % len(ordinary)] for place in range(batch * _PROBE_LENGTH)], device=device
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
    tap = _HeadForward(module)

    def run(given: Tensor | None, **more: Tensor) -> tuple[list[Tensor], Any]:
        """Run the model with `given` in place of its head's output; return what the head was fed, and the outputs."""
        fed: list[Tensor] = []

        def take(hidden: Tensor) -> Tensor | None:
            fed.append(hidden)
            return given

        with _patched_forward(tap, take):
            return fed, model(**probe, **more, return_dict=True)

    # Large enough for a soft-cap to show, and not what the weights would give: those of a tied, young model are too tame.
    raw = 20.0 * torch.randn(*ids.shape, vocabulary, generator=generator)
    raw = raw.to(device, dtype)
    fed, outputs = run(raw)
    if [hidden.shape[:-1] for hidden in fed] != [ids.shape] or outputs["logits"].shape != raw.shape:
        return None
    transform = next(
        (each for each in logit_transforms(bare) if _allclose(each(raw), outputs["logits"], tolerance)),
        None,
    )
    if transform is None:
        return None
    for shifted in (True, False):
        # Of sure and right logits the cross-entropy is next to nothing: whatever else is in the loss shows beside it.
        aims = labels.roll(-1, 1) if shifted else labels
        sure = torch.zeros_like(raw).scatter_(-1, aims.clamp_min(0).unsqueeze(-1), 1e4)
        if all(_is_plain_loss(run(given, labels=labels)[1], labels, shifted, tolerance) for given in (sure, raw)):
            break
    else:
        return None
    # Some models add to their loss in training alone; dropout does not matter to logits that are given.
    model.train()
    in_training = _is_plain_loss(run(sure, labels=labels)[1], labels, shifted, tolerance)
    model.eval()
    if not in_training:
        return None
    again, outputs = run(None)
    if outputs["logits"].numel() or len(again) != 1 or not torch.equal(again[0], fed[0]):
        return None
    return LMHead(module, transform, shifted)


def _is_plain_loss(outputs: Any, labels: Tensor, shifted: bool, tolerance: float) -> bool:
    logits = outputs["logits"].float()
    if shifted:
        logits, labels = logits[:, :-1], labels[:, 1:]
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    return bool((outputs["loss"] - expected).abs() <= tolerance * expected + 1e-6)


def _allclose(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    if found.shape != expected.shape:
        return False
    found, expected = found.float(), expected.float()
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max())


_SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")
_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


def logit_transforms(model: Any) -> Iterator[Callable[[Tensor], Tensor]]:
    """Everything that a model of this config might do to its head's output, the simplest first."""
    configs = [model.config, model.config.get_text_config(decoder=True)]

    def numbers(names: tuple[str, ...]) -> list[float]:
        found = [getattr(config, name, None) for config in configs for name in names]
        return list(dict.fromkeys(value for value in found if isinstance(value, (int, float)) and value))

    scales: list[Callable[[Tensor], Tensor]] = [_identity]
    for value in numbers(_SCALES):
        scales += [_multiply(value), _divide(value)]
    caps: list[Callable[[Tensor], Tensor]] = [_identity, *(_softcap(value) for value in numbers(_CAPS))]
    owners = [module for module in model.modules() if isinstance(getattr(module, "final_logits_bias", None), Tensor)]
    biases: list[Callable[[Tensor], Tensor]] = [*(_add_final_bias(owner) for owner in owners), _identity]
    for bias, cap, scale in itertools.product(biases, caps, scales):
        parts = [part for part in (scale, cap, bias) if part is not _identity]
        yield parts[0] if len(parts) == 1 else _compose(parts)


def _identity(logits: Tensor) -> Tensor:
    return logits


def _multiply(value: float) -> Callable[[Tensor], Tensor]:
    return lambda logits: logits * value


def _divide(value: float) -> Callable[[Tensor], Tensor]:
    return lambda logits: logits / value


def _softcap(value: float) -> Callable[[Tensor], Tensor]:
    return lambda logits: torch.tanh(logits / value) * value


def _add_final_bias(owner: Any) -> Callable[[Tensor], Tensor]:
    # Read anew each time: a buffer moves with its model, and tokens are added to it.
    return lambda logits: logits + owner.final_logits_bias.to(logits.device)


def _compose(parts: list[Callable[[Tensor], Tensor]]) -> Callable[[Tensor], Tensor]:
    def chained(logits: Tensor) -> Tensor:
        for part in parts:
            logits = part(logits)
        return logits

    return chained if parts else _identity


def row_chunks(logits: Tensor) -> Iterator[slice]:
    """Yield the rows of (items, classes) in runs that stay in a processor's cache; once where there are none."""
    items, classes = logits.shape
    rows = max(1, (_CPU_CHUNK_SIZE if logits.device.type == "cpu" else _DEVICE_CHUNK_SIZE) // max(1, classes))
    return (slice(start, min(start + rows, items)) for start in range(0, max(1, items), rows))


@dataclass(frozen=True)
class ChunkedLossState:
    """What is done on the way: see `heads.chunked_loss`. `sums` is filled."""

    transform: Callable[[Tensor], Tensor]
    loss: Callable[[Tensor, slice], Mapping[str, Tensor]]
    weights: Mapping[str, float]
    max_logits: int
    grad_enabled: bool
    sums: dict[str, Tensor]

    def backward_chunk(self, raw: Tensor, first: int, *, with_slope: bool) -> tuple[Tensor, bool]:
        """Return the weighted sum of a chunk's losses, and whether `raw` has become its slope by what it was.

        Args:
            raw: what the head says of some items, (some items, vocabulary).
            first: which of the items the first of them is.
        """
        finest = torch.promote_types(raw.dtype, torch.float32)
        total, has_slope = torch.zeros((), dtype=finest, device=raw.device), False
        for rows in row_chunks(raw):
            part = raw[rows].detach()
            with torch.set_grad_enabled(with_slope):
                part.requires_grad_(with_slope)
                weighed = self.weighted_sum(
                    self.transform(part).to(finest), slice(first + rows.start, first + rows.stop)
                )
            total += weighed.detach()
            if weighed.requires_grad:
                (slope,) = torch.autograd.grad(weighed, part)
                raw[rows], has_slope = slope, True
        return total, has_slope

    def weighted_sum(self, logits: Tensor, rows: slice) -> Tensor:
        """Return the weighted sum of a chunk's losses, with its graph, and add each to `sums`."""
        terms = self.loss(logits, rows)
        missing = sorted(set(self.weights) - set(terms))
        if missing:
            raise OptionError(f"The loss gives {sorted(terms)}, and weights asks for {missing} too.")
        total = logits.new_zeros(())
        for name, term in terms.items():
            if term.shape != logits.shape[:1]:
                raise HfGuideError(
                    f"The loss {name!r} must be one number an item, ({len(logits)},); found {tuple(term.shape)}."
                )
            summed = term.sum(dtype=logits.dtype)
            self.sums[name] = self.sums.get(name, 0.0) + summed.detach()
            if self.weights.get(name):
                total = total + self.weights[name] * summed
        return total


class ChunkedLoss(torch.autograd.Function):
    """The weighted sum, and with it the gradients by the hidden states, the weight and the bias."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, walk: ChunkedLossState) -> Tensor:
        items, vocabulary = len(hidden), weight.shape[0]
        dtype = linear_compute_dtype(hidden, weight)
        finest = torch.promote_types(dtype, torch.float32)
        matrix, offset = weight.to(dtype), None if bias is None else bias.to(dtype)
        wanted = [walk.grad_enabled and needed for needed in ctx.needs_input_grad[:3]]
        slopes = [
            torch.zeros_like(tensor, dtype=finest) if tensor is not None and want else None
            for tensor, want in zip((hidden, weight, bias), wanted, strict=True)
        ]
        total = torch.zeros((), dtype=finest, device=hidden.device)
        step = max(1, walk.max_logits // vocabulary)
        # Once even where there are no items, so that every name has a sum.
        for start in range(0, max(1, items), step):
            rows = slice(start, min(start + step, items))
            fed = hidden[rows].detach().to(dtype)
            raw = nn.functional.linear(fed, matrix, offset)
            weighed, has_slope = walk.backward_chunk(raw, start, with_slope=any(wanted))
            total += weighed
            if has_slope:
                _add_gradients(slopes, raw, fed, matrix, rows)
        ctx.slopes = slopes
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (hidden, weight, bias)]
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.slopes is None:
            raise HfGuideError("chunked_loss can be gone backward through once; call it again for a second time.")
        slopes, ctx.slopes = ctx.slopes, None
        scaled = [
            None if slope is None else slope.mul_(factor).to(dtype)
            for slope, dtype in zip(slopes, ctx.dtypes, strict=True)
        ]
        return (*scaled, None)


def _add_gradients(slopes: list[Tensor | None], slope: Tensor, fed: Tensor, matrix: Tensor, rows: slice) -> None:
    of_hidden, of_weight, of_bias = slopes
    if of_hidden is not None:
        of_hidden[rows] = slope @ matrix
    if of_weight is not None:
        if slope.dtype == torch.bfloat16:
            of_weight += slope.T @ fed
        else:
            # A sum over many items may be too large for float16.
            of_weight.addmm_(slope.T.to(of_weight.dtype), fed.to(of_weight.dtype))
    if of_bias is not None:
        of_bias += slope.sum(0, dtype=of_bias.dtype)


def linear_compute_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """What precision `nn.Linear` would multiply in here."""
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind) and weight.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return weight.dtype
