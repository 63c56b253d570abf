"""Run one tiny forward pass of a new student, so that a shape that cannot run is an error before any long computation.

A copy, which shares the parameters of a large student, is run in evaluation mode, without gradients, on the CPU; with one
cached decoding step where the model has a cache. The student itself, random states and module state do not change. The
outputs are checked for finite values only.
"""

import contextlib
import copy
import inspect
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import GenerationConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from hf_guide.errors import ShapeError
from hf_guide.models.modes import preserved_random_state, without_initialization
from hf_guide.models.tiny_inputs import count_positions, tiny_inputs
from hf_guide.models.tiny_models import MODEL_ERRORS
from hf_guide.utils.finite import overflow_advice

MAX_TRIAL_OPERATIONS = 1e12
"""Operations up to which a student is tried, 2 for each parameter and position: seconds on a CPU."""

MAX_COPIED_BYTES = 1 << 30
"""Bytes of parameters up to which they are copied; those of larger models are shared with the copy, read-only."""

_FRESH_MEMORY_BYTES = 64 << 20
"""Bytes above which the allocator takes zeroed pages from the kernel; smaller memory may contain anything."""


def check_forward(student: PreTrainedModel, teacher_config: PreTrainedConfig, *, filled: bool) -> list[str]:
    """Run one tiny forward pass of `student`; return notes for the report where that was not possible.

    An error is the student's only where a model of the teacher's shape accepts the same inputs: such a model is built, without
    weights, when the student fails.

    Args:
        student: the model, on the CPU. It does not change, but unfilled parameters may be set to zero.
        teacher_config: the teacher's config.
        filled: whether its parameters have their values; only then must its outputs be finite.

    Raises:
        ShapeError: the student cannot run, with the family's own error, or its outputs are not finite.
    """
    choices = tiny_inputs(student)
    name = type(student).__name__
    if not choices:
        return [f"whether {name} runs was not tried: no small input is known for it."]
    operations = 2.0 * student.num_parameters() * count_positions(choices[0])
    if operations > MAX_TRIAL_OPERATIONS:
        return [f"whether {name} runs was not tried: its smallest input costs {operations:.0e} operations on the CPU."]
    if not filled:
        _zero_parameters(student)
    errors: list[Exception] = []
    for inputs in choices:
        outputs, error = _try_forward(student, inputs)
        if error is None:
            if filled:
                _check_finite(outputs, student)
            return []
        errors.append(error)
    reference = _reference_model(type(student), teacher_config, student.dtype)
    if reference is None:
        return [f"whether {name} runs was not tried: {type(errors[0]).__name__}: {errors[0]}"]
    reference_inputs = {frozenset(inputs): inputs for inputs in tiny_inputs(reference)}
    for error, inputs in zip(errors, choices, strict=True):
        if _try_forward(reference, reference_inputs.get(frozenset(inputs), inputs))[1] is None:
            raise ShapeError(
                f"The student cannot run: {_describe_error(error)}. A {name} of the teacher's shape accepts the "
                "same input, so one of the requested sizes does not fit the others."
            ) from error
    return [f"whether {name} runs was not tried: no small input is known for it ({_describe_error(errors[0])})."]


def _try_forward(model: PreTrainedModel, inputs: dict[str, Tensor]) -> tuple[Any, Exception | None]:
    with _isolated_copy(model) as clone:
        try:
            return _forward_with_cache(clone, inputs), None
        except MODEL_ERRORS as error:
            return None, error


@torch.no_grad()
def _forward_with_cache(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Any:
    if _can_generate(model) and "input_ids" in inputs and set(inputs) <= {"input_ids", "decoder_input_ids"}:
        model.generation_config = GenerationConfig()  # of the copy: unset values would come from the model's own
        return model.generate(**inputs, generation_config=_two_token_config(model, inputs))  # type: ignore[operator]
    outputs = model(**inputs)
    cache = getattr(outputs, "past_key_values", None)
    last = "decoder_input_ids" if model.config.is_encoder_decoder else "input_ids"
    if cache is not None and last in inputs and "past_key_values" in inspect.signature(model.forward).parameters:
        step: dict[str, Any] = {last: inputs[last][:, -1:], "past_key_values": cache, "use_cache": True}
        if model.config.is_encoder_decoder:
            encoded = getattr(outputs, "encoder_last_hidden_state", None)
            if encoded is None:
                return outputs
            step["encoder_outputs"] = (encoded,)
        model(**step)
    return outputs


def _can_generate(model: PreTrainedModel) -> bool:
    return (
        model.main_input_name == "input_ids"
        and isinstance(model, GenerationMixin)
        and model.can_generate()
        and type(model).generate is GenerationMixin.generate
    )


def _two_token_config(model: PreTrainedModel, inputs: dict[str, Tensor]) -> GenerationConfig:
    """Return the config of plain generation: a first token, and one more that uses the cache."""
    absent = int(inputs["input_ids"].max()) + 1  # the padding token would be masked
    return GenerationConfig(
        max_new_tokens=2,
        do_sample=False,
        use_cache=True,
        pad_token_id=absent,
        decoder_start_token_id=0 if model.config.is_encoder_decoder else None,
        output_logits=True,
        return_dict_in_generate=True,
    )


def _check_finite(outputs: Any, student: PreTrainedModel) -> None:
    for name, tensor in _iter_tensors(outputs):
        if tensor.is_floating_point() and bool(torch.isnan(tensor).any() | torch.isposinf(tensor).any()):
            raise ShapeError(
                f"The student's {name} are not finite on {type(student).__name__}'s smallest input, in {student.dtype}. "
                + overflow_advice(student.dtype, "Check that the teacher's are, and its weights for extreme values")
            )


def _iter_tensors(outputs: Any, name: str = "outputs") -> Iterator[tuple[str, Tensor]]:
    if isinstance(outputs, Tensor):
        yield name, outputs
    elif isinstance(outputs, (ModelOutput, dict)):
        for key, value in outputs.items():
            yield from _iter_tensors(value, str(key))
    elif isinstance(outputs, (tuple, list)):
        for value in outputs:
            yield from _iter_tensors(value, name)


def _describe_error(error: Exception) -> str:
    """Return the error, and the method of the model's own code that raised it."""
    where = ""
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        owner = trace.tb_frame.f_locals.get("self")
        if ".models." in trace.tb_frame.f_globals.get("__name__", "") and owner is not None:
            where = f" in {type(owner).__name__}.{code.co_name}"
        trace = trace.tb_next
    text = " ".join(str(error).split())
    return f"{type(error).__name__}{where}: {text[:300].rstrip('.')}"


def _zero_parameters(model: PreTrainedModel) -> None:
    """Set parameters of uninitialised memory to zero, so that garbage cannot make a forward pass fail."""
    for parameter in model.parameters():
        if parameter.numel() * parameter.element_size() <= _FRESH_MEMORY_BYTES:
            parameter.data.zero_()


def _reference_model(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, dtype: torch.dtype
) -> PreTrainedModel | None:
    """Return a model without weights in evaluation mode, or None where it cannot be built here."""
    try:
        with without_initialization():
            model = model_class._from_config(copy.deepcopy(config), dtype=dtype)
    except MODEL_ERRORS:
        return None
    _zero_parameters(model)
    return model


class _ReadOnly(TorchFunctionMode):
    """Raise on operations that change one of the tensors of these ids in place."""

    def __init__(self, tensors: set[int]):
        super().__init__()
        self._tensors = tensors

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        changes = name.startswith("__i") or name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
        if changes and args and id(args[0]) in self._tensors:
            raise RuntimeError("its forward changes its own parameters")
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def _isolated_copy(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """Yield a copy in evaluation mode, and restore what its forward pass may change outside of it.

    Some models change their weights in the forward pass (RWKV rescales them): a large one, whose parameters are not copied,
    raises instead.
    """
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    shared = {id(parameter): parameter for parameter in model.parameters()} if size > MAX_COPIED_BYTES else {}
    read_only = _ReadOnly(set(shared)) if shared else contextlib.nullcontext()
    verbosity = transformers.logging.get_verbosity()
    with preserved_random_state(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers.logging.set_verbosity_error()
        try:
            clone = copy.deepcopy(model, shared).eval()
            if clone.dtype == torch.float64 and clone._can_set_experts_implementation():
                clone.set_experts_implementation("eager")  # the grouped kernels do not support float64
            with read_only:
                yield clone
        finally:
            transformers.logging.set_verbosity(verbosity)
