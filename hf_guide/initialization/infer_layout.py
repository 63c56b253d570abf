"""Layouts of families that are not in the table: derived where that is certain, refused where it is not.

A tiny twin of the model is built from its config. Which axes follow the residual stream's width is probed by building it once
more, wider; which norm feeds which weight is seen by running it; what queries, keys, values, gates and their
counterparts are called is convention. The result is believed only if the twin passes `certify`.
"""

import dataclasses
import itertools
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from hf_guide.errors import LayoutError
from hf_guide.initialization.blocks.depths import add_block_axes
from hf_guide.initialization.equivalence import EquivalenceReport, check_equivalence
from hf_guide.layouts.grammar import AxisName, axis_names, axis_size, parse_axes
from hf_guide.layouts.hierarchy import SHARED_POSITION_BIAS
from hf_guide.layouts.registry import (
    BlockScale,
    BlockTransfer,
    BlockValue,
    Layout,
    LayoutRow,
    block_rules,
    config_sizes,
    registered_layouts,
    variant_for,
)
from hf_guide.models.model_classes import meta_model, strip_base_prefix
from hf_guide.models.tiny_models import MODEL_ERRORS, TINY_SIZES, build_tiny_model, randomize_parameters, tiny_config

WIDER_SIZE = 80
"""The second width of the probe; the first is the twin's, 64. Both are multiples of the twin's heads."""

QUERY_AXES, KEY_AXES = "(kv_heads group fixed_head)", "(kv_heads fixed_head)"
MODULE_CONVENTIONS = {
    "q_proj": f"{QUERY_AXES} embed",
    "k_proj": f"{KEY_AXES} embed",
    "v_proj": f"{KEY_AXES} embed",
    "o_proj": f"embed {QUERY_AXES}",
    "out_proj": f"embed {QUERY_AXES}",
    "q_norm": f"norm {QUERY_AXES}",
    "k_norm": f"norm {KEY_AXES}",
    "gate_proj": "mlp embed",
    "up_proj": "mlp embed",
    "down_proj": "embed mlp",
    "fc1": "mlp embed",
    "fc2": "embed mlp",
    "fc_in": "mlp embed",
    "fc_out": "embed mlp",
    "c_fc": "mlp embed",
    "dense_h_to_4h": "mlp embed",
    "dense_4h_to_h": "embed mlp",
    "w1": "mlp embed",
    "w2": "embed mlp",
    "w3": "mlp embed",
}
"""What modules of these names hold, as Transformers calls them; believed where shapes and `certify` agree."""

_FIXED_AXES_TRIED = ((), ("kv_heads", "group"), ("mlp",), ("kv_heads", "group", "mlp"))

_inferred_layouts: dict[tuple[type, str], "Layout | str"] = {}
_blocks_only_layouts: dict[tuple[type, str], Layout] = {}


def layout_for(config: PreTrainedConfig, model_class: type[PreTrainedModel]) -> Layout:
    """Return the layout of a config's family: registered, or derived, or else one that knows its blocks alone.

    With the last every axis must keep its length: the copy is exact, and a narrower student is refused with the reason why
    nothing more is known.
    """
    layouts = registered_layouts()
    if config.model_type in layouts:
        return variant_for(layouts[config.model_type], config)
    try:
        causal: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
        if causal is None:
            raise LayoutError(
                f"No layout is known for {config.model_type!r}, and layouts are derived for causal language models only."
            )
        language_model = causal[0] if isinstance(causal, tuple) else causal
        layout = infer_layout(config, language_model)
        return layout if model_class is language_model else add_task_head(layout, config, model_class)
    except LayoutError as error:
        key = (model_class, repr(sorted(config.to_diff_dict().items(), key=str)))
        if key not in _blocks_only_layouts:
            _blocks_only_layouts[key] = add_block_axes(
                blocks_only_layout(config, model_class, str(error)), config, model_class
            )
        return _blocks_only_layouts[key]


def add_block_rules(layout: Layout, config: PreTrainedConfig) -> Layout:
    """Return a derived layout with what is registered of its family's blocks, and of those of its nested configs."""
    scales, values = dict(layout.block_scale), dict(layout.block_value)
    parts = {"": config} | {
        name: part for name in config.sub_configs if isinstance(part := getattr(config, name, None), PreTrainedConfig)
    }
    for name, part in parts.items():
        rules = block_rules(part.model_type)
        if rules is None:
            continue
        for row in layout.rows:
            module = "." + row.pattern.removesuffix(".weight").removesuffix(".bias")
            for key, scale in rules.scale.items():
                if module.endswith("." + key):
                    scales[row.pattern] = _scale_of_subconfig(scale, name)
            for key, value in rules.value.items():
                if module.endswith("." + key):
                    values[row.pattern] = _value_of_subconfig(value, name)
    return dataclasses.replace(layout, block_scale=scales, block_value=values)


def _scale_of_subconfig(scale: BlockScale, name: str) -> BlockScale:
    return (lambda config, block: scale(getattr(config, name), block)) if name else scale


def _value_of_subconfig(value: BlockValue, name: str) -> BlockValue:
    def of_part(tensor: Tensor, moved: BlockTransfer) -> Tensor:
        configs = {
            key: getattr(config, name)
            for key, config in (("teacher_config", moved.teacher_config), ("student_config", moved.student_config))
        }
        return value(tensor, dataclasses.replace(moved, **configs))

    return of_part if name else value


def infer_layout(config: PreTrainedConfig, model_class: type[PreTrainedModel]) -> Layout:
    """Return the layout of an unregistered family, inferred from a tiny model and believed only where the laws hold on it.

    A config is probed once: the layout, or the reason why there is none, is kept.

    Raises:
        LayoutError: the tiny model cannot be built or run, or the inferred layout does not pass the laws on it; says which.
    """
    key = (model_class, repr(sorted(config.to_diff_dict().items(), key=str)))
    if key not in _inferred_layouts:
        try:
            _inferred_layouts[key] = _probe_layout(config, model_class)
        except LayoutError as error:
            _inferred_layouts[key] = str(error)
    outcome = _inferred_layouts[key]
    if isinstance(outcome, str):
        raise LayoutError(outcome)
    return outcome


def _probe_layout(config: PreTrainedConfig, model_class: type[PreTrainedModel]) -> Layout:
    family = config.model_type
    untied = untying_override(config)
    wider_sizes = {name: WIDER_SIZE for name, size in TINY_SIZES.items() if size == 64}
    try:
        model = build_tiny_model(model_class, tiny_config(config, **untied))
        wider = meta_model(model_class, tiny_config(config, **untied, **wider_sizes))
        randomize_parameters(model, seed=0)
        reads, norms = trace_norms(model)
    except MODEL_ERRORS as error:
        raise LayoutError(
            f"No layout is known for {family!r}, and a tiny model of it cannot be tried: {type(error).__name__}: {error}"
        ) from error
    norm, offset = detect_norm_type(model, norms)
    reason = width_dependence(model_class, config)
    if reason is None and (norm is None or offset is None):
        reason = "its norms are of several kinds"
    if reason is None:
        rows = infer_rows(model, wider, reads, norms)
        for fixed, fold in itertools.product(_FIXED_AXES_TRIED, (True, False)):
            layout = Layout(
                family,
                fix_axes(rows if fold else without_folding(rows), fixed),
                norm=norm or "rms",
                norm_offset=offset or 0.0,
            )
            layout = add_block_axes(add_block_rules(layout, config), model.config, model_class)
            report = check_equivalence(layout, model)
            if report.passed:
                exactness = _describe_exactness(layout, report)
                return dataclasses.replace(layout, exactness=exactness, fixed_depth=report.depth)
            reason = report.reason
    raise LayoutError(f"No layout is known for {family!r}, and none could be inferred with certainty: {reason}.")


def _describe_exactness(layout: Layout, verdict: EquivalenceReport) -> str:
    read = {norm for row in layout.rows for norm in row.input_norms}
    stream = [
        row
        for row in layout.rows
        if row.kind == "norm" and row.axes[-1] == AxisName("embed") and row.pattern.removesuffix(".weight") not in read
    ]
    told = "exact" if not stream else f"exact but for {len(stream)} kinds of norms, whose gains become diagonals"
    depth = "; its depth is fixed" if verdict.depth else ""
    return f"derived: {told} (certified to {verdict.error:.0e}){depth}"


def width_dependence(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> str | None:
    """Return why a layout cannot be certain where a model multiplies by its width; None where it does not.

    The law of rotation does not see such a factor: it is compared between twins of two widths.
    """
    try:
        twins = [
            build_tiny_model(
                model_class,
                tiny_config(
                    config,
                    **untying_override(config),
                    **{name: width for name, size in TINY_SIZES.items() if size == 64},
                ),
            )
            for width in (TINY_SIZES["hidden_size"], WIDER_SIZE)
        ]
        narrow, wide = (_embedding_and_logit_scales(twin) for twin in twins)
    except MODEL_ERRORS as error:
        return f"a wider twin of it cannot be tried: {type(error).__name__}: {error}"
    for where, had, found in zip(("its embeddings", "its logits"), narrow, wide, strict=True):
        if had is None or found is None or abs(had - found) > 1e-4 * abs(had):
            return f"what it multiplies {where} with is not known to be independent of its width ({had} and {found} in twins)"
    return None


@torch.no_grad()
def _embedding_and_logit_scales(twin: PreTrainedModel) -> tuple[float | None, float | None]:
    """Return what a model multiplies its embeddings with, and its head's output with; None where that is no one number."""
    table = twin.get_input_embeddings()
    for module in twin.modules():
        if isinstance(module, nn.Embedding) and module is not table:
            module.weight.zero_()
    first = next(
        (
            module
            for name, module in twin.named_modules()
            if re.search(r"(^|\.)(layers|h|blocks|layer|block)\.0$", name)
        ),
        None,
    )
    head = twin.get_output_embeddings()
    if first is None or head is None:
        return None, None
    seen: dict[str, Tensor] = {}
    handles = [
        table.register_forward_hook(lambda module, arguments, output: seen.update(embedded=output)),
        first.register_forward_pre_hook(
            lambda module, arguments, keywords: seen.update(
                entered=arguments[0] if arguments else keywords["hidden_states"]
            ),
            with_kwargs=True,
        ),
        head.register_forward_hook(lambda module, arguments, output: seen.update(head=output)),
    ]
    try:
        logits = twin(input_ids=torch.arange(3, 14)[None]).logits
    finally:
        for handle in handles:
            handle.remove()
    if "entered" not in seen:
        return None, None  # a model with a tower of images, whose blocks come first and are not run
    # A soft-capped head is no multiple of its logits; where it is capped does not depend on the width.
    return _scalar_ratio(seen["entered"], seen["embedded"]), _scalar_ratio(logits, seen["head"]) or 0.0


def _scalar_ratio(found: Tensor, base: Tensor) -> float | None:
    """Return the number that `found` is of `base`; None where it is no one number."""
    if found.shape != base.shape:
        return None
    found, base = found.double(), base.double()
    ratio = ((found * base).sum() / (base * base).sum()).item()
    return ratio if torch.allclose(found, ratio * base, rtol=1e-5, atol=1e-6 * base.abs().max().item()) else None


def untying_override(config: PreTrainedConfig) -> dict[str, bool]:
    """Return the override that unties a twin's head, where its config knows one."""
    return {"tie_word_embeddings": False} if hasattr(config, "tie_word_embeddings") else {}


def trace_norms(twin: PreTrainedModel) -> tuple[dict[str, set[str]], dict[str, nn.Module]]:
    """Run a twin and return, by module name, the norms whose very output each module is fed, and the norms themselves."""
    outputs: list[tuple[str, Tensor]] = []
    fed: dict[str, set[str]] = {}
    norms = {
        name: module
        for name, module in twin.named_modules()
        if re.search(r"norm|ln", name.rpartition(".")[2].lower() + type(module).__name__.lower())
        and [parameter.ndim for parameter in module.parameters()] in ([1], [1, 1])
    }

    def before(name: str):
        def hook(module: nn.Module, arguments: tuple, keywords: dict) -> None:
            for value in (*arguments, *keywords.values()):
                if isinstance(value, Tensor):
                    owner = value.untyped_storage().data_ptr()
                    fed.setdefault(name, set()).update(
                        norm for norm, output in outputs if output.untyped_storage().data_ptr() == owner
                    )

        return hook

    def after(name: str):
        def hook(module: nn.Module, arguments: tuple, keywords: dict, output: Tensor) -> None:
            if isinstance(output, Tensor):
                outputs.append((name, output))

        return hook

    handles = []
    for name, module in twin.named_modules():
        if name in norms:
            handles.append(module.register_forward_hook(after(name), with_kwargs=True))
        elif any(True for _ in module.parameters(recurse=False)):
            handles.append(module.register_forward_pre_hook(before(name), with_kwargs=True))
    try:
        with torch.no_grad():
            twin(input_ids=torch.arange(3, 14)[None])
    finally:
        for handle in handles:
            handle.remove()
    return fed, norms


def detect_norm_type(twin: PreTrainedModel, norms: dict[str, nn.Module]) -> tuple[str | None, float | None]:
    """Return whether norms subtract a mean, and what they add to their stored gain; None where they differ."""
    kinds, offsets = set(), set()
    for module in norms.values():
        weight = next(module.parameters())
        if len(weight) != TINY_SIZES["hidden_size"]:
            continue
        sample = torch.randn(2, 3, len(weight), dtype=weight.dtype, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            try:
                plain, shifted = module(sample), module(sample + 3.0)
                kept = weight.clone()
                weight.zero_()
                bare = module(sample) - (module.bias if getattr(module, "bias", None) is not None else 0.0)
                weight.copy_(kept)
            except (TypeError, RuntimeError, IndexError):
                return None, None  # a norm with other arguments, such as a gate
        kinds.add("layer" if torch.allclose(plain, shifted, atol=1e-5) else "rms")
        offsets.add(1.0 if bare.abs().max() > 1e-6 else 0.0)
    return (kinds.pop() if len(kinds) == 1 else None), (offsets.pop() if len(offsets) == 1 else None)


def infer_rows(
    twin: PreTrainedModel, wider: PreTrainedModel, reads: dict[str, set[str]], norms: dict[str, nn.Module]
) -> tuple[LayoutRow, ...]:
    """Return a row for each kind of parameter: axes that grow with the stream are `embed`, unless convention knows better."""
    prefix = twin.base_model_prefix
    sizes = config_sizes(Layout("", ()), twin.config.get_text_config())
    wider_shapes = {name: tensor.shape for name, tensor in wider.state_dict().items()}
    rows: dict[str, LayoutRow] = {}
    for name, tensor in twin.state_dict().items():
        module, _, kind = name.rpartition(".")
        pattern = with_placeholders(strip_base_prefix(name, prefix))
        grows = [
            had == TINY_SIZES["hidden_size"] and grown == WIDER_SIZE
            for had, grown in zip(tensor.shape, wider_shapes[name], strict=True)
        ]
        if kind == "bias" and pattern.removesuffix(".bias") in rows:
            continue  # a module's row speaks for its bias as well
        pattern = pattern.removesuffix(".weight")
        meaning = MODULE_CONVENTIONS.get(module.rpartition(".")[2]) if kind == "weight" else None
        if meaning is not None and _fits_convention(meaning, tensor.shape, grows, sizes):
            axes = parse_axes(meaning.removeprefix("norm "))
            row_kind = "norm" if meaning.startswith("norm ") else "weight"
        else:
            axes = tuple(AxisName("embed" if grown else f"fixed{number}") for number, grown in enumerate(grows))
            row_kind = (
                "norm" if module in norms or (tensor.ndim == 1 and grows == [True] and kind != "bias") else "weight"
            )
        if (
            tensor.ndim == 2
            and tensor.shape[0] == getattr(twin.config.get_text_config(), "vocab_size", None)
            and grows == [False, True]
        ):
            axes = (AxisName("vocab"), AxisName("embed"))
            row_kind = "table" if isinstance(twin.get_submodule(module), nn.Embedding) else "weight"
        reading = row_kind == "weight" and AxisName("embed") in axes and not re.search(r"down|out|bias|w2", kind)
        arrow = reading and tensor.ndim == 3 and axes[1] == AxisName("embed")  # experts stored (expert, in, out)
        rows.setdefault(
            pattern,
            LayoutRow(
                pattern, axes, row_kind, _feeding_norms(module, reads, prefix) if reading else (), transposed=arrow
            ),
        )
    return tuple(rows.values())


def _feeding_norms(module: str, reads: dict[str, set[str]], prefix: str) -> tuple[str | None, ...]:
    """Return the pattern of the one norm that feeds a module, its block's own number as placeholder."""
    found = {with_placeholders(strip_base_prefix(norm, prefix)) for norm in reads.get(module, ())}
    return (found.pop(),) if len(found) == 1 else ()


def _fits_convention(meaning: str, shape: torch.Size, grows: list[bool], sizes: dict[str, int]) -> bool:
    """Whether what convention says of a module can be: as many axes, the stream's among those that grow, heads that divide."""
    axes = parse_axes(meaning.removeprefix("norm "))
    if len(axes) != len(shape):
        return False
    for axis, length, grown in zip(axes, shape, grows, strict=True):
        if axis == AxisName("embed") and not grown:
            return False
        known = [size for name in axis_names(axis) if (size := axis_size(AxisName(name), sizes))]
        if axis_names(axis)[-1] == "fixed_head" and (
            len(known) != len(axis_names(axis)) - 1 or length % torch.Size(known).numel()
        ):
            return False
    return True


def with_placeholders(name: str, literal: int = 0) -> str:
    """Return `name` with `{block}` for its first number and `{item}`, `{item2}`, ... for those in it.

    The last `literal` numbers stay.
    """
    numbers = re.findall(r"(?<=\.)\d+(?=\.|$)", name)
    marks = ["{block}", "{item}", "{item2}", "{item3}"][: len(numbers)]
    kept = iter([*marks[: max(0, len(numbers) - literal)], *numbers[max(0, len(numbers) - literal) :]])
    return re.sub(r"(?<=\.)\d+(?=\.|$)", lambda _: next(kept), name)


def shared_position_biases(names: Iterable[str]) -> set[str]:
    """Return the tables of relative positions that a stack's first block alone holds and hands on (T5's, WavLM's).


    They stay in the first block, whichever block feeds it.
    """
    tables = [name for name in names if SHARED_POSITION_BIAS.search(name)]
    blocks: dict[str, set[str]] = {}
    for name in tables:
        blocks.setdefault(with_placeholders(name), set()).update(re.findall(r"(?<=\.)\d+(?=\.|$)", name)[:1])
    return {name for name in tables if blocks[with_placeholders(name)] == {"0"}}


def fix_axes(rows: Iterable[LayoutRow], names: tuple[str, ...]) -> tuple[LayoutRow, ...]:
    """Return `rows` in which an axis that holds one of `names` must keep its length."""
    frozen = []
    for row in rows:
        axes = tuple(
            AxisName(f"fixed{number}") if set(names) & set(axis_names(axis)) else axis
            for number, axis in enumerate(row.axes)
        )
        frozen.append(LayoutRow(row.pattern, axes, row.kind, row.input_norms, row.output_diagonal, row.transposed))
    return tuple(frozen)


def without_folding(rows: Iterable[LayoutRow]) -> tuple[LayoutRow, ...]:
    """Return `rows` without what their weights read, so that no norm is folded."""
    return tuple(LayoutRow(row.pattern, row.axes, row.kind, (), row.output_diagonal, row.transposed) for row in rows)


def blocks_only_layout(config: PreTrainedConfig, model_class: type[PreTrainedModel], reason: str) -> Layout:
    """Return a layout in which every axis must keep its length and only blocks are chosen; with the reason why."""
    model = meta_model(model_class, config)
    ndims = {
        strip_base_prefix(name, model.base_model_prefix): tensor.ndim for name, tensor in model.state_dict().items()
    }
    shared = shared_position_biases(ndims)
    patterns = {name: ndims[name] for name in shared}
    patterns |= _patterns_of_equal_rank({name: ndim for name, ndim in ndims.items() if name not in shared})
    rows = [
        LayoutRow(pattern, tuple(AxisName(f"fixed{number}") for number in range(ndim)))
        for pattern, ndim in patterns.items()
    ]
    layout = Layout(config.model_type, tuple(rows), exactness=f"blocks only, at full width: {reason}")
    return add_block_rules(layout, config)


def _patterns_of_equal_rank(ndims: Mapping[str, int]) -> dict[str, int]:
    """Return the patterns of parameters with the number of axes that all of a pattern's parameters have.

    Where a norm and a convolution go by numbers in one list (`downsampling_layer.0`, `.1`), the numbers stay in the pattern.
    """
    found: dict[str, int] = {}
    named = dict.fromkeys(ndims, 0)  # how many of a name's last numbers stay
    while named:
        groups: dict[str, set[int]] = {}
        for name, literal in named.items():
            groups.setdefault(with_placeholders(name, literal), set()).add(ndims[name])
        found |= {pattern: shapes.pop() for pattern, shapes in groups.items() if len(shapes) == 1}
        named = {name: n + 1 for name, n in named.items() if with_placeholders(name, n) not in found}
    return found


def add_task_head(layout: Layout, config: PreTrainedConfig, model_class: type[PreTrainedModel]) -> Layout:
    """Return a layout derived from a family's language model with the heads of another class of the same base model.

    Raises:
        LayoutError: a parameter of `model_class` that is neither of the base model nor a linear head on the last norm.
    """
    model = meta_model(model_class, config)
    width = config.get_text_config().hidden_size
    reads = next(
        (row.input_norms for row in layout.rows if row.kind == "weight" and AxisName("vocab") in row.axes), ()
    )
    rows: list[LayoutRow] = []
    for name, tensor in model.state_dict().items():
        relative = strip_base_prefix(name, model.base_model_prefix)
        if layout.find(relative) is not None:
            continue
        module, _, kind = relative.rpartition(".")
        if name != relative or kind not in ("weight", "bias") or tensor.shape[0] != config.num_labels:
            raise LayoutError(f"What is derived of {layout.family!r} does not know {name!r} of {model_class.__name__}")
        if kind == "weight" and tuple(tensor.shape) == (config.num_labels, width):
            rows.append(LayoutRow(module, (AxisName("labels"), AxisName("embed")), input_norms=reads))
    return dataclasses.replace(layout, rows=(*layout.rows, *rows)) if rows else layout
