"""The laws of equivalence, for tests and for users: does a layout hold on a tiny model of its family?

Rotating the residual stream by a random rotation must leave the function as it is (SliceGPT's invariance,
arXiv 2401.15024), and so must dropping heads and neurons that write nothing.

A student of some blocks must be the teacher with its other blocks bypassed. A block may depend on more than its input: on
its index, on the depth, on another block's state. None of that shows in a layout, so a tiny model of the teacher's class,
switches and depth is built with random weights, a student is initialized from it with the same blocks, and both are run:
the student as it is, the teacher with the other blocks returning their input. A layout that fails there alone still serves
a narrower student of the same depth.
"""

import contextlib
import copy
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_guide.errors import HfGuideError, ShapeError
from hf_guide.initialization.blocks.config_fields import value_at
from hf_guide.initialization.blocks.mapping import nest_paths, resolve_blocks, stack_depths
from hf_guide.initialization.blocks.stacks import parameters_by_block, stack_sizes
from hf_guide.initialization.config import LayerSelection, PlanOptions
from hf_guide.initialization.planning import make_plan
from hf_guide.initialization.transfer import transfer_weights
from hf_guide.layouts.grammar import AxisName, Selection, axis_names
from hf_guide.layouts.registry import Layout
from hf_guide.models.model_classes import meta_model, strip_base_prefix
from hf_guide.models.module_signature import stack_modules
from hf_guide.models.tiny_inputs import example_tokens, run_on_example
from hf_guide.models.tiny_models import (
    DEPTH_FIELDS,
    MODEL_ERRORS,
    TINY_SIZES,
    build_tiny_model,
    randomize_parameters,
    tiny_config,
    tiny_config_of_same_depth,
)
from hf_guide.teachers.checkpoint import TeacherCheckpoint, open_teacher

TOLERANCE = 1e-5
"""Of the largest output: many families compute norms and softmax in float32."""


MAX_UNSHRUNK_PARAMETERS = 2_000_000
"""Parameters up to which depth is tested on a model of the teacher's own sizes."""

MAX_TESTED_PARAMETERS = 50_000_000
"""Parameters up to which depth is tested at all."""

UNTESTED = "depth: whether the selected blocks alone compute what they did in the teacher was not tested: "
_depth_notes_cache: dict[tuple[object, ...], list[str]] = {}


@dataclass(frozen=True)
class EquivalenceReport:
    """The outcome of `check_equivalence`.

    Attributes:
        passed: whether the laws of width hold.
        error: the largest error, relative to the largest output.
        reason: which law fails, and by how much; "" where none does.
        depth: why no block may be dropped; "" where they may.
    """

    passed: bool
    error: float
    reason: str = ""
    depth: str = ""


def check_equivalence(layout: Layout, model: PreTrainedModel) -> EquivalenceReport:
    """Test a layout on a tiny model of its family; run it before you register a layout of your own.

    The gains of norms that no weight takes as its input are made constant first: then they commute with a rotation, and the
    axes can be tested although such gains cannot be transferred exactly.

    Args:
        layout: registered or not.
        model: a float64 language model whose parameters are away from their defaults. It is not changed.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from hf_guide.layouts.registry import registered_layouts
        >>> model = build_tiny_model(LlamaForCausalLM, tiny_config(LlamaConfig()))
        >>> randomize_parameters(model, seed=0)
        >>> report = check_equivalence(registered_layouts()["llama"], model)
        >>> report.passed, report.depth
        (True, '')
    """
    teacher = copy.deepcopy(model)
    width = _residual_width(layout, teacher)
    if width is None:
        return EquivalenceReport(False, math.inf, "the layout has no embedding on the residual stream")
    _constant_gains(layout, teacher)
    try:
        rotated = rotation_error(layout, teacher, width)
        if not rotated <= TOLERANCE:
            return EquivalenceReport(
                False, rotated, f"a rotation of its residual stream changed its logits by {rotated:.1e} of the largest"
            )
        pruned = pruning_error(layout, teacher)
        if not pruned <= TOLERANCE:
            return EquivalenceReport(
                False,
                pruned,
                f"dropping heads and neurons that write nothing changed its logits by {pruned:.1e} of the largest",
            )
    except HfGuideError as error:
        return EquivalenceReport(False, math.inf, str(error).rstrip("."))
    return EquivalenceReport(True, max(rotated, pruned), depth=depth_dependence(layout, model))


def _exact_options(*, fold_norms: bool = True) -> PlanOptions:
    """Return the options of an exact plan: nothing is cut that a norm correction would compensate for."""
    return PlanOptions(LayerSelection.FIRST_LAST.value, projects=True, norm_correction=False, fold_norms=fold_norms)


def rotation_error(layout: Layout, model: PreTrainedModel, width: int) -> float:
    """Return the change of the logits under a random rotation of the residual stream, relative to the largest logit."""
    student = build_tiny_model(type(model), copy.deepcopy(model.config), seed=1)
    rotation = random_stream_rotation(width, keep_mean=layout.norm == "layer")
    options = _exact_options(fold_norms=any(row.input_norms for row in layout.rows))
    transfer_weights(student, open_teacher(model), layout, options, bases={"embed": rotation})
    return relative_logit_error(student, model)


def pruning_error(layout: Layout, model: PreTrainedModel) -> float:
    """Return the change of the logits without heads and neurons that write nothing, relative to the largest logit."""
    names = {name for row in layout.rows for axis in row.axes for name in axis_names(axis)}
    sizes: dict[str, int] = {}
    if "kv_heads" in names:
        sizes["num_attention_heads"] = sizes["num_key_value_heads"] = 2
    if "mlp" in names:
        sizes |= {"intermediate_size": 48, "ffn_dim": 48, "n_inner": 48}
    if not sizes:
        return 0.0
    try:
        config = tiny_config(model.config, **sizes)
        if "qk_rope_head_dim" not in config.to_dict():
            config.head_dim = TINY_SIZES["head_dim"]  # most families read it even where it is not a declared field
        student = build_tiny_model(type(model), config, seed=1)
    except MODEL_ERRORS as error:
        raise ShapeError(
            f"a tiny model with fewer heads and neurons cannot be built: {type(error).__name__}: {error}"
        ) from error
    teacher = copy.deepcopy(model)
    options = _exact_options()
    plan = make_plan(student, open_teacher(teacher), layout, options)
    tensors = {
        strip_base_prefix(name, teacher.base_model_prefix): tensor
        for name, tensor in teacher.state_dict(keep_vars=True).items()
    }
    with torch.no_grad():
        for parameter in plan.parameters.values():
            row = parameter.match.row
            is_output = AxisName("embed") in parameter.axes and not row.input_norms and len(parameter.axes) > 1
            for dim, selection in enumerate(plan.maps(parameter) if is_output and parameter.source else []):
                if isinstance(selection, Selection):
                    dropped = torch.ones(selection.size, dtype=torch.bool)
                    dropped[selection.indices] = False
                    tensors[parameter.source or ""].index_fill_(dim, dropped.nonzero().flatten(), 0.0)
    transfer_weights(student, open_teacher(teacher), layout, options)
    try:
        return relative_logit_error(student, teacher)
    except MODEL_ERRORS as error:
        raise ShapeError(
            f"a tiny model with fewer heads and neurons cannot run: {type(error).__name__}: {error}"
        ) from error


def random_stream_rotation(width: int, *, keep_mean: bool, seed: int = 2) -> Tensor:
    """Return a random (width, width) rotation, float64; with `keep_mean` one that maps the all-ones vector to itself."""
    generator = torch.Generator().manual_seed(seed)
    columns = torch.randn(width, width, generator=generator, dtype=torch.float64)
    if not keep_mean:
        return torch.linalg.qr(columns)[0]
    columns[:, 0] = 1.0
    mean_free = torch.linalg.qr(columns)[0][:, 1:]
    inner = torch.linalg.qr(torch.randn(width - 1, width - 1, generator=generator, dtype=torch.float64))[0]
    return mean_free @ inner @ mean_free.T + 1.0 / width


@torch.no_grad()
def relative_logit_error(student: PreTrainedModel, teacher: PreTrainedModel) -> float:
    """Return the largest difference of two models' logits on fixed tokens, relative to the largest logit."""
    ids = example_tokens()
    expected = teacher(input_ids=ids).logits
    return ((student(input_ids=ids).logits - expected).abs().max() / expected.abs().max()).item()


def _residual_width(layout: Layout, model: PreTrainedModel) -> int | None:
    """Return the width of the residual stream: of an embedding's `embed` axis; None where the layout has no embedding."""
    for name, tensor in model.state_dict().items():
        match = layout.find(strip_base_prefix(name, model.base_model_prefix))
        if match is not None and match.row.kind == "table" and AxisName("embed") in match.axes:
            return tensor.shape[match.axes.index(AxisName("embed"))]
    return None


def _constant_gains(layout: Layout, model: PreTrainedModel) -> None:
    """Make the gains of norms constant that no weight takes as its input."""
    folded = {norm for row in layout.rows for norm in row.input_norms}
    with torch.no_grad():
        for name, tensor in model.state_dict(keep_vars=True).items():
            match = layout.find(strip_base_prefix(name, model.base_model_prefix))
            if match is not None and match.row.pattern.removesuffix(".weight").removesuffix(".bias") in folded:
                continue
            if (
                match is not None
                and match.row.kind == "norm"
                and match.axes[-1] == AxisName("embed")
                and not name.endswith("bias")
            ):
                tensor.fill_(0.8 - layout.norm_offset)


# ---------------------------------------------------------------------------------------------------------------------
# Depth


@dataclass(frozen=True)
class DepthTest:
    """The outcome of `compare_with_bypassed`.

    Attributes:
        error: the largest difference, relative to the largest output.
        untested: by stack, why its blocks were not compared.
    """

    error: float
    untested: Mapping[str, str] = field(default_factory=dict)


def depth_notes(
    layout: Layout, teacher: TeacherCheckpoint, student_config: PreTrainedConfig, blocks: Mapping[str, Sequence[int]]
) -> list[str]:
    """Test whether a student of some of a teacher's blocks can be exact; return what is not, for the report.

    Args:
        layout: the teacher's.
        student_config: the config of the student, whose depth is compared with the teacher's.
        blocks: for each stack, such as "layers", the teacher block that feeds each student block.
    """
    config = teacher.config
    names = [strip_base_prefix(name, teacher.base_model_prefix) for name in teacher.weights.keys()]
    sizes = stack_sizes(layout, names)
    if all(list(selected) == list(range(sizes.get(f"{stack}.{{block}}", 0))) for stack, selected in blocks.items()):
        return []
    if any(list(selected) != sorted(set(selected)) for selected in blocks.values()):
        return ["depth: blocks are repeated or in another order, so no bypassed teacher computes the same."]
    fields = [
        path for path in stack_depths(teacher, layout) if value_at(config, path) != value_at(student_config, path)
    ]
    if not fields:
        return [f"{UNTESTED}no field of the config is known to be the depth."]
    overrides = nest_paths({path: value_at(student_config, path) for path in fields})
    key = (teacher.model_class, repr(sorted(config.to_dict().items(), key=str)), repr(overrides), repr(blocks))
    if key not in _depth_notes_cache:
        note = _test_depth(layout, teacher, overrides, blocks)
        _depth_notes_cache[key] = [note] if note else []
    return list(_depth_notes_cache[key])


def _test_depth(
    layout: Layout, teacher: TeacherCheckpoint, overrides: Mapping[str, Any], blocks: Mapping[str, Sequence[int]]
) -> str:
    size = sum(teacher.weights.shape(name).numel() for name in teacher.weights.keys())
    try:
        config = (
            copy.deepcopy(teacher.config)
            if size <= MAX_UNSHRUNK_PARAMETERS
            else tiny_config_of_same_depth(teacher.config)
        )
        size = meta_model(teacher.model_class, config).num_parameters()
        if size > MAX_TESTED_PARAMETERS:
            return f"{UNTESTED}a tiny model still has {size} parameters, because the names of its sizes are not known."
        model = build_tiny_model(teacher.model_class, config)
        randomize_parameters(model, seed=0)
        test = compare_with_bypassed(layout, model, overrides, blocks)
    except HfGuideError as error:
        return f"{UNTESTED}{str(error).rstrip('.')}."
    except MODEL_ERRORS as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0].rstrip(": .")
        return f"{UNTESTED}a tiny model of the family fails with {reason}."
    if not test.error <= TOLERANCE:
        return (
            f"depth: the blocks of {config.model_type!r} depend on their index, the depth or other blocks in a way that "
            f"weights cannot compensate for: in a tiny model, outputs differ by {test.error:.1e} of the largest from the "
            "teacher with its other blocks bypassed."
        )
    reasons = [f"{stack} ({reason.rstrip('.')})" for stack, reason in test.untested.items()]
    return f"depth: in a tiny model, the blocks of {', '.join(reasons)} were not compared." if reasons else ""


def compare_with_bypassed(
    layout: Layout, model: PreTrainedModel, overrides: Mapping[str, Any], blocks: Mapping[str, Sequence[int]]
) -> DepthTest:
    """Make a student of a tiny model with the depth of `overrides`, and compare it with the bypassed model.

    Raises:
        HfGuideError: the student cannot be made. What the family raises in a forward pass is not caught.
    """
    options = PlanOptions({stack: list(each) for stack, each in blocks.items()}, projects=True)
    teacher = open_teacher(model)
    resolved = resolve_blocks(teacher, layout, None, overrides, options)
    student = build_tiny_model(type(model), resolved.config, seed=1)
    report = transfer_weights(student, teacher, layout, options)
    selected = report.blocks
    if {stack: list(each) for stack, each in blocks.items()} != selected:
        raise ShapeError(f"the tiny model's stacks are {selected}, not {dict(blocks)}")
    error = 0.0
    untested: dict[str, str] = {}
    compared: set[str] = set()
    for stack in _changed_stacks(model, selected):
        if stack in compared:
            continue
        reason = "no input that was tried runs them"
        for name in _enclosing_models(model, stack):
            part = model.get_submodule(name)
            try:
                expected, run_stacks = _run_bypassed(part, model, selected)
            except (*MODEL_ERRORS, ShapeError) as failure:
                reason = f"{type(failure).__name__}: {failure}".splitlines()[0]
                continue
            if stack not in run_stacks:
                continue
            output = run_on_example(student.get_submodule(name))
            difference = relative_output_error(output, expected)
            if difference > TOLERANCE and (branches := _branch_stacks(model, selected)):
                difference = min(
                    difference, relative_output_error(output, _run_bypassed(part, model, selected, branches)[0])
                )
            error = max(error, difference)
            compared |= run_stacks
            break
        else:
            untested[stack] = reason
    return DepthTest(error, untested)


def depth_dependence(layout: Layout, model: PreTrainedModel) -> str:
    """Return why a family's blocks cannot be dropped, tested with one block fewer in each stack; "" where they can.

    Where no block of the tiny model can be dropped for other reasons, nothing is known, and "" is returned as well.
    """
    overrides = _one_block_fewer(model.config)
    sizes = {
        stack.removesuffix(".{block}"): len(blocks)
        for stack, blocks in parameters_by_block(
            layout, (strip_base_prefix(name, model.base_model_prefix) for name in model.state_dict())
        ).items()
    }
    for dropped in (1, 2, 0, 3) if overrides else ():
        blocks = {
            stack: [block for block in range(size) if block != dropped] if size > 1 else [0]
            for stack, size in sizes.items()
        }
        try:
            test = compare_with_bypassed(layout, model, overrides, blocks)
        except HfGuideError:
            continue  # blocks of different kinds, or a stack whose depth has no known field
        except MODEL_ERRORS as error:
            return f"a tiny model without its block {dropped} cannot run ({type(error).__name__}: {error})"
        if not test.error <= TOLERANCE:
            return (
                f"its blocks depend on their index, the depth or other blocks: without block {dropped}, a tiny model differs "
                f"by {test.error:.1e} of its largest output from one in which that block is bypassed"
            )
        return ""
    return ""


def _one_block_fewer(config: PreTrainedConfig) -> dict[str, Any]:
    overrides: dict[str, Any] = {
        name: config.__dict__[name] - 1 for name in DEPTH_FIELDS if isinstance(config.__dict__.get(name), int)
    }
    for name in config.sub_configs:
        if isinstance(part := getattr(config, name, None), PreTrainedConfig) and (nested := _one_block_fewer(part)):
            overrides[name] = nested
    return overrides


def _changed_stacks(model: PreTrainedModel, blocks: Mapping[str, Sequence[int]]) -> list[str]:
    return [
        stack for stack, selected in blocks.items() if list(selected) != list(range(len(_blocks_of(model, stack))))
    ]


def _blocks_of(model: PreTrainedModel, stack: str) -> list[nn.Module]:
    """Return the blocks of a stack that is named relative to the base model or to the model.

    Raises:
        ShapeError: the model has no such modules.
    """
    if not (blocks := stack_modules(model, stack)):
        raise ShapeError(f"{type(model).__name__} has no module {stack!r}")
    return blocks


def _enclosing_models(model: PreTrainedModel, stack: str) -> list[str]:
    """Return the names of the models that hold a stack, the whole one ("") first."""
    blocks = {id(block) for block in _blocks_of(model, stack)}
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, PreTrainedModel) and blocks & {id(child) for child in module.modules()}
    ]


def _run_bypassed(
    model: nn.Module, whole: PreTrainedModel, blocks: Mapping[str, Sequence[int]], branches: Collection[str] = ()
) -> tuple[Tensor, set[str]]:
    """Run a model (or a part of `whole`) with only `blocks`; return its output and the stacks whose blocks were run."""
    run_stacks: set[str] = set()
    with bypassed(whole, blocks, run_stacks, branches=branches):
        return run_on_example(model), run_stacks


@contextlib.contextmanager
def bypassed(
    model: PreTrainedModel,
    blocks: Mapping[str, Sequence[int]],
    run_stacks: "set[str] | None" = None,
    *,
    branches: Collection[str] = (),
) -> Iterator[None]:
    """Make the blocks that are not among `blocks` return their input hidden states, for the duration of the context.

    Their `forward` is replaced, because some models call it without running hooks.

    Args:
        run_stacks: the stacks whose blocks are run are added to this set.
        branches: stacks whose modules are not whole blocks but are added to the residual stream, so that they return zeros.
    """

    def replace_forward(stack: str, module: nn.Module, selected: bool):
        forward = module.forward

        def call(*arguments: Any, **keywords: Any) -> Any:
            if run_stacks is not None:
                run_stacks.add(stack)
            output = forward(*arguments, **keywords)
            return output if selected else _bypass_output(module, output, arguments, keywords, zero=stack in branches)

        return call

    changed: list[nn.Module] = []
    try:
        for stack, selected in blocks.items():
            for index, block in enumerate(_blocks_of(model, stack)):
                block.forward = replace_forward(stack, block, index in selected)
                changed.append(block)
        yield
    finally:
        for block in changed:
            del block.forward


def _bypass_output(
    module: nn.Module, output: Any, arguments: tuple, keywords: Mapping[str, Any], *, zero: bool
) -> Any:
    """Return a block's output with its input hidden states (or zeros) in place of those that it computed."""
    key = 0 if isinstance(output, (tuple, list)) else next(iter(output)) if isinstance(output, Mapping) else None
    computed = output if key is None else output[key]
    inputs = [keywords.get("hidden_states"), *arguments, *keywords.values()]
    candidates = [value for value in inputs if isinstance(value, Tensor) and value.shape == computed.shape]
    if not candidates:
        raise ShapeError(f"{type(module).__name__} has no input of its output's shape, so it cannot be bypassed")
    hidden_states = torch.zeros_like(computed) if zero else candidates[0]
    if isinstance(output, Mapping):
        return {**output, key: hidden_states}
    return hidden_states if key is None else type(output)((hidden_states, *output[1:]))


def _branch_stacks(model: PreTrainedModel, blocks: Mapping[str, Sequence[int]]) -> set[str]:
    """Return the stacks that may hold branches instead of whole blocks: several in one module, without norms (XLM)."""
    siblings: dict[tuple[str, int], list[str]] = {}
    for stack in blocks:
        siblings.setdefault((stack.rpartition(".")[0], len(_blocks_of(model, stack))), []).append(stack)
    return {stack for group in siblings.values() if len(group) > 1 for stack in group if "norm" not in stack}


def relative_output_error(output: Tensor, expected: Tensor) -> float:
    """Return the largest difference, relative to the largest expected value; infinite where other entries are finite."""
    finite = torch.isfinite(expected)
    if output.shape != expected.shape or not torch.equal(finite, torch.isfinite(output)):
        return float("inf")
    return ((output - expected)[finite].abs().max() / expected[finite].abs().max()).item()
