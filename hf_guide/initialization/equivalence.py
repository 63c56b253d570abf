"""The laws of equivalence, for tests and for users: does a layout hold on a tiny model of its family?

Rotating the residual stream by a random rotation must leave the function as it is (SliceGPT's invariance,
arXiv 2401.15024), and so must dropping heads and neurons that write nothing.

A student of some blocks must be the teacher with its other blocks bypassed. A block may depend on more than its input: on
its index, on the depth, on another block's state. None of that shows in a layout, so a tiny model of the teacher's class,
switches and depth is built with random weights, a student is made of it with the same blocks, and both are run: the student
as it is, the teacher with the other blocks returning their input. A layout that fails there alone still serves a narrower
student of the same depth.
"""

import contextlib
import copy
import inspect
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
from hf_guide.initialization.config import LayerSelection, PlanOptions
from hf_guide.initialization.planning import make_plan, parameters_by_block, stack_sizes
from hf_guide.initialization.transfer import transfer_weights
from hf_guide.layouts.grammar import AxisName, Selection, axis_names
from hf_guide.layouts.registry import Layout
from hf_guide.models.model_classes import meta_model, strip_base_prefix
from hf_guide.models.module_signature import stack_modules
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
"""Parameters of a model that is tried in its own sizes."""

MAX_TESTED_PARAMETERS = 50_000_000
"""Parameters of a model that is tried at all."""

UNTESTED = "depth: whether the kept blocks alone compute what they did was not tested: "
_OUTPUTS = ("logits", "prediction_logits", "start_logits", "logits_per_image", "last_hidden_state", "pooler_output")
_depth_notes_cache: dict[tuple[object, ...], list[str]] = {}


@dataclass(frozen=True)
class EquivalenceReport:
    """Whether a layout passed, the largest relative error seen, and what failed; `depth` is why no block may be dropped."""

    passed: bool
    error: float
    reason: str = ""
    depth: str = ""


def check_equivalence(layout: Layout, twin: PreTrainedModel) -> EquivalenceReport:
    """Return whether `layout` holds on `twin`, a float64 model whose parameters are away from their defaults.

    The gains of norms that no weight is said to read are made constant first: then they turn with the stream, and the axes
    can be judged although these gains cannot be carried exactly.
    """
    teacher = copy.deepcopy(twin)
    width = _residual_width(layout, teacher)
    if width is None:
        return EquivalenceReport(False, math.inf, "no table on the residual stream was found")
    _constant_gains(layout, teacher)
    try:
        turned = rotation_error(layout, teacher, width)
        if not turned <= TOLERANCE:
            return EquivalenceReport(
                False, turned, f"turning its residual stream changed its logits by {turned:.1e} of the largest"
            )
        dropped = pruning_error(layout, teacher)
        if not dropped <= TOLERANCE:
            return EquivalenceReport(
                False,
                dropped,
                f"dropping heads and neurons that write nothing changed its logits by {dropped:.1e} of the largest",
            )
    except HfGuideError as error:
        return EquivalenceReport(False, math.inf, str(error).rstrip("."))
    return EquivalenceReport(True, max(turned, dropped), depth=depth_dependence(layout, twin))


def _options(*, fold_norms: bool = True) -> PlanOptions:
    """Return the options of a plan that must be exact: nothing is cut that a norm correction would make up for."""
    return PlanOptions(LayerSelection.FIRST_LAST.value, projects=True, norm_correction=False, fold_norms=fold_norms)


def rotation_error(layout: Layout, twin: PreTrainedModel, width: int) -> float:
    """Return by how much the function changes, of the largest logit, when the residual stream is turned at random."""
    student = build_tiny_model(type(twin), copy.deepcopy(twin.config), seed=1)
    rotation = random_stream_rotation(width, keep_mean=layout.norm == "layer")
    options = _options(fold_norms=any(row.input_norms for row in layout.rows))
    transfer_weights(student, open_teacher(twin), layout, options, bases={"embed": rotation})
    return relative_logit_error(student, twin)


def pruning_error(layout: Layout, twin: PreTrainedModel) -> float:
    """Return by how much the function changes when heads and neurons that write nothing are dropped."""
    names = {name for row in layout.rows for axis in row.axes for name in axis_names(axis)}
    sizes: dict[str, int] = {}
    if "kv_heads" in names:
        sizes["num_attention_heads"] = sizes["num_key_value_heads"] = 2
    if "mlp" in names:
        sizes |= {"intermediate_size": 48, "ffn_dim": 48, "n_inner": 48}
    if not sizes:
        return 0.0
    try:
        config = tiny_config(twin.config, **sizes)
        if "qk_rope_head_dim" not in config.to_dict():
            config.head_dim = TINY_SIZES["head_dim"]  # most families read it also where it is no field of theirs
        student = build_tiny_model(type(twin), config, seed=1)
    except MODEL_ERRORS as error:
        raise ShapeError(
            f"a twin with fewer heads and neurons cannot be built: {type(error).__name__}: {error}"
        ) from error
    teacher = copy.deepcopy(twin)
    options = _options()
    plan = make_plan(student, open_teacher(teacher), layout, options)
    tensors = {
        strip_base_prefix(name, teacher.base_model_prefix): tensor
        for name, tensor in teacher.state_dict(keep_vars=True).items()
    }
    with torch.no_grad():
        for site in plan.parameters.values():
            writes = AxisName("embed") in site.axes and not site.match.row.input_norms and len(site.axes) > 1
            for dim, chosen in enumerate(plan.maps(site) if writes and site.source else []):
                if isinstance(chosen, Selection):
                    dead = torch.ones(chosen.size, dtype=torch.bool)
                    dead[chosen.indices] = False
                    tensors[site.source or ""].index_fill_(dim, dead.nonzero().flatten(), 0.0)
    transfer_weights(student, open_teacher(teacher), layout, options)
    try:
        return relative_logit_error(student, teacher)
    except MODEL_ERRORS as error:
        raise ShapeError(f"a twin with fewer heads and neurons cannot run: {type(error).__name__}: {error}") from error


def random_stream_rotation(width: int, *, keep_mean: bool, seed: int = 2) -> Tensor:
    """Return a random (width, width) rotation, float64; with `keep_mean` one that leaves the all-ones vector where it is."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(width, width, generator=generator, dtype=torch.float64)
    if not keep_mean:
        return torch.linalg.qr(start)[0]
    start[:, 0] = 1.0
    outside = torch.linalg.qr(start)[0][:, 1:]
    inner = torch.linalg.qr(torch.randn(width - 1, width - 1, generator=generator, dtype=torch.float64))[0]
    return outside @ inner @ outside.T + 1.0 / width


@torch.no_grad()
def relative_logit_error(student: PreTrainedModel, teacher: PreTrainedModel) -> float:
    """Return the largest difference of two models' logits on fixed tokens, of the largest logit."""
    ids = torch.arange(3, 14)[None]
    expected = teacher(input_ids=ids).logits
    return ((student(input_ids=ids).logits - expected).abs().max() / expected.abs().max()).item()


def _residual_width(layout: Layout, twin: PreTrainedModel) -> int | None:
    for name, tensor in twin.state_dict().items():
        match = layout.find(strip_base_prefix(name, twin.base_model_prefix))
        if match is not None and match.row.kind == "table" and AxisName("embed") in match.axes:
            return tensor.shape[match.axes.index(AxisName("embed"))]
    return None


def _constant_gains(layout: Layout, twin: PreTrainedModel) -> None:
    read = {norm for row in layout.rows for norm in row.input_norms}
    with torch.no_grad():
        for name, tensor in twin.state_dict(keep_vars=True).items():
            match = layout.find(strip_base_prefix(name, twin.base_model_prefix))
            if match is not None and match.row.pattern.removesuffix(".weight").removesuffix(".bias") in read:
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
    """What was found by running a student of some blocks next to the bypassed teacher.

    `error` is the largest difference relative to the largest output. `untested` says why a stack was not compared.
    """

    error: float
    untested: Mapping[str, str] = field(default_factory=dict)


def depth_notes(
    layout: Layout, teacher: TeacherCheckpoint, student_config: PreTrainedConfig, blocks: Mapping[str, Sequence[int]]
) -> list[str]:
    """Return what is not exact about keeping `blocks` of a teacher, for the report; empty where the test finds nothing.

    Args:
        layout: the teacher's, by which the student was made.
        blocks: for each stack, such as "layers", the teacher block that feeds each student block.
    """
    config = teacher.config
    names = [strip_base_prefix(name, teacher.base_model_prefix) for name in teacher.weights.keys()]
    sizes = stack_sizes(layout, names)
    if all(list(kept) == list(range(sizes.get(f"{stack}.{{block}}", 0))) for stack, kept in blocks.items()):
        return []
    if any(list(kept) != sorted(set(kept)) for kept in blocks.values()):
        return ["depth: blocks are repeated or in another order, so no bypassed teacher computes the same."]
    fields = [
        path for path in stack_depths(teacher, layout) if value_at(config, path) != value_at(student_config, path)
    ]
    if not fields:
        return [f"{UNTESTED}no field of the config was found to state the depth."]
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
            return f"{UNTESTED}a tiny model still has {size} parameters, for the names of its sizes are not known."
        twin = build_tiny_model(teacher.model_class, config)
        randomize_parameters(twin, seed=0)
        found = compare_with_bypassed(layout, twin, overrides, blocks)
    except HfGuideError as error:
        return f"{UNTESTED}{str(error).rstrip('.')}."
    except MODEL_ERRORS as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0].rstrip(": .")
        return f"{UNTESTED}a tiny model of the family fails with {reason}."
    if not found.error <= TOLERANCE:
        return (
            f"depth: the blocks of {config.model_type!r} depend on their index, the depth or other blocks in a way that the "
            f"weights do not carry: in a tiny model, outputs differ by {found.error:.1e} of the largest from the teacher with "
            "its other blocks bypassed."
        )
    reasons = [f"{stack} ({reason.rstrip('.')})" for stack, reason in found.untested.items()]
    return f"depth: in a tiny model, the blocks of {', '.join(reasons)} were not compared." if reasons else ""


def compare_with_bypassed(
    layout: Layout, twin: PreTrainedModel, overrides: Mapping[str, Any], blocks: Mapping[str, Sequence[int]]
) -> DepthTest:
    """Make a student of a tiny model with the depth of `overrides`, and compare it with the bypassed model.

    Raises:
        HfGuideError: the student cannot be made. What the family raises in a forward pass is passed on.
    """
    options = PlanOptions({stack: list(kept) for stack, kept in blocks.items()}, projects=True)
    teacher = open_teacher(twin)
    resolved = resolve_blocks(teacher, layout, None, overrides, options)
    student = build_tiny_model(type(twin), resolved.config, seed=1)
    report = transfer_weights(student, teacher, layout, options)
    kept = report.blocks
    if {stack: list(each) for stack, each in blocks.items()} != kept:
        raise ShapeError(f"the tiny model's stacks are {kept}, not {dict(blocks)}")
    error = 0.0
    untested: dict[str, str] = {}
    ran: set[str] = set()
    for stack in _changed_stacks(twin, kept):
        if stack in ran:
            continue
        reason = "no input that was tried runs them"
        for name in _enclosing_models(twin, stack):
            model = twin.get_submodule(name)
            try:
                expected, entered = _run_bypassed(model, twin, kept)
            except (*MODEL_ERRORS, ShapeError) as failure:
                reason = f"{type(failure).__name__}: {failure}".splitlines()[0]
                continue
            if stack not in entered:
                continue
            found = run_on_example(student.get_submodule(name))
            off = relative_output_error(found, expected)
            if off > TOLERANCE and (branches := _branch_stacks(twin, kept)):
                off = min(off, relative_output_error(found, _run_bypassed(model, twin, kept, branches)[0]))
            error = max(error, off)
            ran |= entered
            break
        else:
            untested[stack] = reason
    return DepthTest(error, untested)


def depth_dependence(layout: Layout, twin: PreTrainedModel) -> str:
    """Return why a family's blocks cannot be dropped, tried with one block less in each stack; "" where they can.

    Where no block of the tiny model can be left out for other reasons, nothing is known, and the answer is "" as well.
    """
    overrides = _one_block_fewer(twin.config)
    sizes = {
        stack.removesuffix(".{block}"): len(blocks)
        for stack, blocks in parameters_by_block(
            layout, (strip_base_prefix(name, twin.base_model_prefix) for name in twin.state_dict())
        ).items()
    }
    for left_out in (1, 2, 0, 3) if overrides else ():
        blocks = {
            stack: [block for block in range(size) if block != left_out] if size > 1 else [0]
            for stack, size in sizes.items()
        }
        try:
            found = compare_with_bypassed(layout, twin, overrides, blocks)
        except HfGuideError:
            continue  # blocks of other kinds, or a stack whose depth has no name
        except MODEL_ERRORS as error:
            return f"a tiny model without its block {left_out} cannot run ({type(error).__name__}: {error})"
        if not found.error <= TOLERANCE:
            return (
                f"its blocks depend on their index, the depth or other blocks: without block {left_out}, a tiny model differs "
                f"by {found.error:.1e} of its largest output from one in which that block is bypassed"
            )
        return ""
    return ""


def _one_block_fewer(config: PreTrainedConfig) -> dict[str, Any]:
    found: dict[str, Any] = {
        name: config.__dict__[name] - 1 for name in DEPTH_FIELDS if isinstance(config.__dict__.get(name), int)
    }
    for name in config.sub_configs:
        if isinstance(part := getattr(config, name, None), PreTrainedConfig) and (nested := _one_block_fewer(part)):
            found[name] = nested
    return found


def _changed_stacks(model: PreTrainedModel, blocks: Mapping[str, Sequence[int]]) -> list[str]:
    return [stack for stack, kept in blocks.items() if list(kept) != list(range(len(_blocks_of(model, stack))))]


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
    entered: set[str] = set()
    with bypassed(whole, blocks, entered, branches=branches):
        return run_on_example(model), entered


@contextlib.contextmanager
def bypassed(
    model: PreTrainedModel,
    blocks: Mapping[str, Sequence[int]],
    entered: "set[str] | None" = None,
    *,
    branches: Collection[str] = (),
) -> Iterator[None]:
    """Let the blocks that are not among `blocks` return the hidden states they are given, within.

    Their `forward` is replaced, for some models call it without the hooks. The stacks whose blocks are run are added to
    `entered`; the modules of the stacks in `branches` are no whole blocks: they are added to the stream, so they return zeros.
    """

    def replaced(stack: str, module: nn.Module, kept: bool):
        forward = module.forward

        def call(*arguments: Any, **keywords: Any) -> Any:
            if entered is not None:
                entered.add(stack)
            output = forward(*arguments, **keywords)
            return output if kept else _bypass_output(module, output, arguments, keywords, zero=stack in branches)

        return call

    changed: list[nn.Module] = []
    try:
        for stack, kept in blocks.items():
            for index, block in enumerate(_blocks_of(model, stack)):
                block.forward = replaced(stack, block, index in kept)
                changed.append(block)
        yield
    finally:
        for block in changed:
            del block.forward


def _bypass_output(
    module: nn.Module, output: Any, arguments: tuple, keywords: Mapping[str, Any], *, zero: bool
) -> Any:
    """Return a block's output with the hidden states it was given (or zeros) for those it made."""
    key = 0 if isinstance(output, (tuple, list)) else next(iter(output)) if isinstance(output, Mapping) else None
    first = output if key is None else output[key]
    entered = [keywords.get("hidden_states"), *arguments, *keywords.values()]
    fitting = [value for value in entered if isinstance(value, Tensor) and value.shape == first.shape]
    if not fitting:
        raise ShapeError(f"{type(module).__name__} is given nothing of its output's shape, so it cannot be bypassed")
    given = torch.zeros_like(first) if zero else fitting[0]
    if isinstance(output, Mapping):
        return {**output, key: given}
    return given if key is None else type(output)((given, *output[1:]))


def _branch_stacks(model: PreTrainedModel, blocks: Mapping[str, Sequence[int]]) -> set[str]:
    """Return the stacks that may hold branches and no whole blocks: side by side in one module, and no norms (XLM)."""
    sides: dict[tuple[str, int], list[str]] = {}
    for stack in blocks:
        sides.setdefault((stack.rpartition(".")[0], len(_blocks_of(model, stack))), []).append(stack)
    return {stack for side in sides.values() if len(side) > 1 for stack in side if "norm" not in stack}


@torch.no_grad()
def run_on_example(model: nn.Module) -> Tensor:
    """Return what a model computes from a fixed batch of whatever it reads: its first known output."""
    batch = example_batch(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        outputs = model(**batch)
    for name in _OUTPUTS:
        if (found := getattr(outputs, name, None)) is not None:
            return found
    raise ShapeError(f"{type(model).__name__} has none of the outputs {', '.join(_OUTPUTS)}")


def example_batch(model: nn.Module) -> dict[str, Tensor]:
    """Return two rows of fixed tokens, pixels or sounds, by the names of the arguments that a model's `forward` takes."""
    config: Any = model.config
    takes = inspect.signature(model.forward).parameters
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    vocabulary = getattr(config.get_text_config(), "vocab_size", None) or 64
    tokens = torch.randint(3, max(4, min(vocabulary, 60)), (2, 11), generator=generator)
    batch: dict[str, Tensor] = {}
    if "input_ids" in takes:
        batch["input_ids"] = tokens
    if "pixel_values" in takes and ("input_ids" not in takes or hasattr(model, "logit_scale")):
        seen = getattr(config, "vision_config", config)
        size = getattr(seen, "image_size", None) or 16
        height, width = (size, size) if isinstance(size, int) else size
        batch["pixel_values"] = draw(2, getattr(seen, "num_channels", 3), height, width)
    if not batch and "input_features" in takes:
        bands, frames = getattr(config, "num_mel_bins", 80), 2 * getattr(config, "max_source_positions", 10)
        batch["input_features"] = draw(2, bands, frames)
    if not batch and "input_values" in takes:
        batch["input_values"] = draw(2, 4000)
    if not batch and "inputs_embeds" in takes:
        batch["inputs_embeds"] = draw(2, 11, config.hidden_size)
    if "decoder_input_ids" in takes:
        batch["decoder_input_ids"] = tokens[:, :7]
    return batch


def relative_output_error(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference, relative to the largest expected value; infinite where other places are finite."""
    finite = torch.isfinite(expected)
    if found.shape != expected.shape or not torch.equal(finite, torch.isfinite(found)):
        return float("inf")
    return ((found - expected)[finite].abs().max() / expected[finite].abs().max()).item()
