"""Layouts of families that are not registered: inferred where that is certain, an error where it is not.

A tiny model is built from the config. The axes that follow the width of the residual stream are found by building it once
more, wider; the norm whose output a weight takes is found by running it; which modules are queries, keys, values, gates and
their counterparts is a convention of names. The result is believed only where the tiny model passes `check_equivalence`.
"""

import copy
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
from hf_guide.layouts.grammar import Axis, AxisConcat, AxisName, axis_names, axis_size, parse_axes
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
from hf_guide.models.hooks import register_input_hook, removable_hooks
from hf_guide.models.model_classes import meta_model, strip_base_prefix
from hf_guide.models.tiny_inputs import example_tokens
from hf_guide.models.tiny_models import MODEL_ERRORS, TINY_SIZES, build_tiny_model, randomize_parameters, tiny_config

WIDER_SIZE = 80
"""The second width of the probe; the first is 64. Both are multiples of the number of heads of a tiny model."""

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
"""The axes of modules by the names that Transformers gives them; believed where shapes and `check_equivalence` agree."""

_FIXED_AXES_TRIED = ((), ("kv_heads", "group"), ("mlp",), ("kv_heads", "group", "mlp"))

_inferred_layouts: dict[tuple[type, str], "Layout | str"] = {}
_blocks_only_layouts: dict[tuple[type, str], Layout] = {}


def layout_for(config: PreTrainedConfig, model_class: type[PreTrainedModel]) -> Layout:
    """Return the layout of a config's family: registered, inferred, or else one of its blocks alone.

    In a layout of blocks alone every axis must keep its length: a student of the same width is exact, and a narrower one is
    rejected with the reason why nothing more is known.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> layout_for(LlamaConfig(), LlamaForCausalLM).family
        'llama'
    """
    layouts = registered_layouts()
    try:
        if config.model_type in layouts:
            return variant_for(layouts[config.model_type], config)
        causal: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
        if causal is None:
            raise LayoutError(
                f"No layout is known for {config.model_type!r}, and layouts are inferred for causal language models only."
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
    """Return an inferred layout with the registered block rules of its family, and those of its nested configs."""
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
    def value_of_subconfig(tensor: Tensor, transfer: BlockTransfer) -> Tensor:
        configs = {
            "teacher_config": getattr(transfer.teacher_config, name),
            "student_config": getattr(transfer.student_config, name),
        }
        return value(tensor, dataclasses.replace(transfer, **configs))

    return value_of_subconfig if name else value


def infer_layout(config: PreTrainedConfig, model_class: type[PreTrainedModel]) -> Layout:
    """Return the layout of an unregistered family, inferred from a tiny model and believed only where the laws hold on it.

    A config is probed once: the layout, or the reason why there is none, is kept.

    Raises:
        LayoutError: the tiny model cannot be built or run, or the inferred layout does not pass the laws; the message names
            them.
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


def _describe_exactness(layout: Layout, report: EquivalenceReport) -> str:
    folded = {norm for row in layout.rows for norm in row.input_norms}
    unfolded = [
        row
        for row in layout.rows
        if row.kind == "norm"
        and row.axes[-1] == AxisName("embed")
        and row.pattern.removesuffix(".weight") not in folded
    ]
    exactness = "exact"
    if unfolded:
        exactness = f"exact but for {len(unfolded)} kinds of norms, whose gains become diagonals"
    depth = "; its depth is fixed" if report.depth else ""
    return f"inferred: {exactness} (the laws hold to {report.error:.0e}){depth}"


def width_dependence(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> str | None:
    """Return why a layout cannot be certain because a model may multiply by its width; None where it does not.

    The law of rotation does not see such a factor: it is compared between tiny models of two widths.
    """
    try:
        narrow, wide = (
            _embedding_and_logit_scales(
                build_tiny_model(
                    model_class,
                    tiny_config(
                        config,
                        **untying_override(config),
                        **{name: width for name, size in TINY_SIZES.items() if size == 64},
                    ),
                )
            )
            for width in (TINY_SIZES["hidden_size"], WIDER_SIZE)
        )
    except MODEL_ERRORS as error:
        return f"a wider tiny model of it cannot be tried: {type(error).__name__}: {error}"
    for what, first, second in zip(("embeddings", "logits"), narrow, wide, strict=True):
        if first is None or second is None or abs(first - second) > 1e-4 * abs(first):
            return f"the factor of its {what} is not known to be independent of its width (in tiny models: {first}, {second})"
    return None


@torch.no_grad()
def _embedding_and_logit_scales(model: PreTrainedModel) -> tuple[float | None, float | None]:
    """Return the factors of a model's embeddings and of its head's output; None where there is no single factor."""
    embedding = model.get_input_embeddings()
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module is not embedding:
            module.weight.zero_()
    first_block = next(
        (
            module
            for name, module in model.named_modules()
            if re.search(r"(^|\.)(layers|h|blocks|layer|block)\.0$", name)
        ),
        None,
    )
    head = model.get_output_embeddings()
    if first_block is None or head is None:
        return None, None
    recorded: dict[str, Tensor] = {}
    with removable_hooks() as handles:
        handles.append(embedding.register_forward_hook(lambda _, args, output: recorded.update(embedded=output)))
        handles.append(register_input_hook(first_block, lambda hidden: recorded.update(block_input=hidden)))
        handles.append(head.register_forward_hook(lambda _, args, output: recorded.update(head=output)))
        logits = model(input_ids=example_tokens()).logits
    if "block_input" not in recorded:
        return None, None  # a model with an image tower, whose blocks come first and are not run
    # A soft-capped head is no multiple of its logits; where it is capped does not depend on the width.
    return _scalar_ratio(recorded["block_input"], recorded["embedded"]), _scalar_ratio(logits, recorded["head"]) or 0.0


def _scalar_ratio(value: Tensor, base: Tensor) -> float | None:
    """Return the number c with `value = c * base`; None where there is none."""
    if value.shape != base.shape:
        return None
    value, base = value.double(), base.double()
    ratio = ((value * base).sum() / (base * base).sum()).item()
    return ratio if torch.allclose(value, ratio * base, rtol=1e-5, atol=1e-6 * base.abs().max().item()) else None


def untying_override(config: PreTrainedConfig) -> dict[str, bool]:
    """Return the override that unties a tiny model's head, where its config has one."""
    return {"tie_word_embeddings": False} if hasattr(config, "tie_word_embeddings") else {}


def trace_norms(model: PreTrainedModel) -> tuple[dict[str, set[str]], dict[str, nn.Module]]:
    """Run a tiny model, and return the norms whose very output each module takes, by module name, and the norms themselves."""
    outputs: list[tuple[str, Tensor]] = []
    input_norms: dict[str, set[str]] = {}
    norms = {
        name: module
        for name, module in model.named_modules()
        if re.search(r"norm|ln", name.rpartition(".")[2].lower() + type(module).__name__.lower())
        and [parameter.ndim for parameter in module.parameters()] in ([1], [1, 1])
    }

    def record_input(name: str):
        def hook(module: nn.Module, arguments: tuple, keywords: dict) -> None:
            for value in (*arguments, *keywords.values()):
                if isinstance(value, Tensor):
                    storage = value.untyped_storage().data_ptr()
                    input_norms.setdefault(name, set()).update(
                        norm for norm, output in outputs if output.untyped_storage().data_ptr() == storage
                    )

        return hook

    def record_output(name: str):
        def hook(module: nn.Module, arguments: tuple, keywords: dict, output: Tensor) -> None:
            if isinstance(output, Tensor):
                outputs.append((name, output))

        return hook

    with removable_hooks() as handles, torch.no_grad():
        for name, module in model.named_modules():
            if name in norms:
                handles.append(module.register_forward_hook(record_output(name), with_kwargs=True))
            elif any(True for _ in module.parameters(recurse=False)):
                handles.append(module.register_forward_pre_hook(record_input(name), with_kwargs=True))
        model(input_ids=example_tokens())
    return input_norms, norms


def detect_norm_type(model: PreTrainedModel, norms: dict[str, nn.Module]) -> tuple[str | None, float | None]:
    """Return "layer" or "rms", by whether norms subtract a mean, and what they add to their stored gain.

    Each is None where the norms differ, or cannot be called alone.
    """
    types, offsets = set(), set()
    for module in norms.values():
        weight = next(module.parameters())
        if len(weight) != TINY_SIZES["hidden_size"]:
            continue
        sample = torch.randn(2, 3, len(weight), dtype=weight.dtype, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            try:
                plain, shifted = module(sample), module(sample + 3.0)
                original = weight.clone()
                weight.zero_()
                bare = module(sample) - (module.bias if getattr(module, "bias", None) is not None else 0.0)
                weight.copy_(original)
            except (TypeError, RuntimeError, IndexError):
                return None, None  # a norm with other arguments, such as a gate
        types.add("layer" if torch.allclose(plain, shifted, atol=1e-5) else "rms")
        offsets.add(1.0 if bare.abs().max() > 1e-6 else 0.0)
    return (types.pop() if len(types) == 1 else None), (offsets.pop() if len(offsets) == 1 else None)


def infer_rows(
    model: PreTrainedModel,
    wider: PreTrainedModel,
    input_norms: dict[str, set[str]],
    norms: dict[str, nn.Module],
) -> tuple[LayoutRow, ...]:
    """Return a row for each kind of parameter: axes that grow with the width are `embed`, unless a convention names them."""
    sizes = config_sizes(Layout("", ()), model.config.get_text_config())
    wider_shapes = {name: tensor.shape for name, tensor in wider.state_dict().items()}
    rows: dict[str, LayoutRow] = {}
    for name, tensor in model.state_dict().items():
        module, _, parameter = name.rpartition(".")
        pattern = with_placeholders(strip_base_prefix(name, model.base_model_prefix))
        if parameter == "bias" and pattern.removesuffix(".bias") in rows:
            continue  # a module's row describes its bias as well
        pattern = pattern.removesuffix(".weight")
        grows = [
            length == TINY_SIZES["hidden_size"] and wider_length == WIDER_SIZE
            for length, wider_length in zip(tensor.shape, wider_shapes[name], strict=True)
        ]
        axes, kind = _axes_and_kind(model, name, tensor, grows, sizes, norms)
        takes_stream = kind == "weight" and AxisName("embed") in axes and not re.search(r"down|out|bias|w2", parameter)
        transposed = takes_stream and tensor.ndim == 3 and axes[1] == AxisName("embed")  # experts as (expert, in, out)
        norm = _input_norm(module, input_norms, model.base_model_prefix) if takes_stream else ()
        rows.setdefault(pattern, LayoutRow(pattern, axes, kind, norm, transposed=transposed))
    return tuple(rows.values())


def _axes_and_kind(
    model: PreTrainedModel,
    name: str,
    tensor: Tensor,
    grows: list[bool],
    sizes: dict[str, int],
    norms: dict[str, nn.Module],
) -> tuple[tuple[Axis, ...], str]:
    """Return the axes of a parameter, and whether it is a "weight", a "norm" or a "table"."""
    module, _, parameter = name.rpartition(".")
    vocab_size = getattr(model.config.get_text_config(), "vocab_size", None)
    if tensor.ndim == 2 and tensor.shape[0] == vocab_size and grows == [False, True]:
        is_embedding = isinstance(model.get_submodule(module), nn.Embedding)
        return (AxisName("vocab"), AxisName("embed")), "table" if is_embedding else "weight"
    convention = MODULE_CONVENTIONS.get(module.rpartition(".")[2]) if parameter == "weight" else None
    if convention is not None and _fits_convention(convention, tensor.shape, grows, sizes):
        return parse_axes(convention.removeprefix("norm ")), "norm" if convention.startswith("norm ") else "weight"
    axes = tuple(AxisName("embed" if grown else f"fixed{number}") for number, grown in enumerate(grows))
    is_norm = module in norms or (tensor.ndim == 1 and grows == [True] and parameter != "bias")
    return axes, "norm" if is_norm else "weight"


def _input_norm(module: str, input_norms: dict[str, set[str]], prefix: str) -> tuple[str | None, ...]:
    """Return the pattern of the one norm whose output a module takes, its block's index as placeholder; () for several."""
    patterns = {with_placeholders(strip_base_prefix(norm, prefix)) for norm in input_norms.get(module, ())}
    return (patterns.pop(),) if len(patterns) == 1 else ()


def _fits_convention(convention: str, shape: torch.Size, grows: list[bool], sizes: dict[str, int]) -> bool:
    """Return whether a convention fits a tensor: as many axes, `embed` among those that grow, heads that divide."""
    axes = parse_axes(convention.removeprefix("norm "))
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
    """Return `name` with `{block}` for its first index and `{item}`, `{item2}`, ... for the following ones.

    Args:
        literal: how many of the last indices stay as they are.

    Example:
        >>> with_placeholders("stages.2.layers.0.weight")
        'stages.{block}.layers.{item}.weight'
    """
    indices = re.findall(r"(?<=\.)\d+(?=\.|$)", name)
    placeholders = ["{block}", "{item}", "{item2}", "{item3}"][: len(indices)]
    replaced = max(0, len(indices) - literal)
    replacements = iter([*placeholders[:replaced], *indices[replaced:]])
    return re.sub(r"(?<=\.)\d+(?=\.|$)", lambda _: next(replacements), name)


def shared_position_biases(names: Iterable[str]) -> set[str]:
    """Return the tables of relative positions that the first block of a stack holds for all blocks (T5's, WavLM's).

    They stay in the first block, whichever block feeds it.
    """
    tables = [name for name in names if SHARED_POSITION_BIAS.search(name)]
    blocks: dict[str, set[str]] = {}
    for name in tables:
        blocks.setdefault(with_placeholders(name), set()).update(re.findall(r"(?<=\.)\d+(?=\.|$)", name)[:1])
    return {name for name in tables if blocks[with_placeholders(name)] == {"0"}}


def fix_axes(rows: Iterable[LayoutRow], names: tuple[str, ...]) -> tuple[LayoutRow, ...]:
    """Return `rows` in which an axis that contains one of `names` must keep its length."""
    return tuple(
        dataclasses.replace(
            row,
            axes=tuple(
                AxisName(f"fixed{number}") if set(names) & set(axis_names(axis)) else axis
                for number, axis in enumerate(row.axes)
            ),
        )
        for row in rows
    )


def without_folding(rows: Iterable[LayoutRow]) -> tuple[LayoutRow, ...]:
    """Return `rows` without the norms before their weights, so that no norm is folded."""
    return tuple(dataclasses.replace(row, input_norms=()) for row in rows)


def blocks_only_layout(config: PreTrainedConfig, model_class: type[PreTrainedModel], reason: str) -> Layout:
    """Return a layout in which every axis must keep its length and only blocks are selected.

    Args:
        reason: why no axis is known; it is part of the layout's `exactness`.
    """
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
    return add_block_rules(_with_label_axes(layout, model, config, model_class), config)


def _with_label_axes(
    layout: Layout, model: PreTrainedModel, config: PreTrainedConfig, model_class: type[PreTrainedModel]
) -> Layout:
    """Return a layout of blocks alone with the axis `labels` where a model with one label more has one entry more."""
    num_labels, more_labels = len(config.id2label or {}), copy.deepcopy(config)
    try:
        more_labels.num_labels = num_labels + 1
        wider = meta_model(model_class, more_labels)
    except MODEL_ERRORS:
        return layout
    shapes = {name: tensor.shape for name, tensor in wider.state_dict().items()}
    rows: dict[str, LayoutRow] = {}
    for name, tensor in model.state_dict().items():
        lengths = zip(tensor.shape, shapes.get(name, ()), strict=False)
        grown = [axis for axis, (length, other) in enumerate(lengths) if other == length + 1]
        match = layout.find(strip_base_prefix(name, model.base_model_prefix))
        if match is None or len(grown) != 1:
            continue
        extra = tensor.shape[grown[0]] - num_labels
        axes: list[Axis] = list(match.row.axes)
        labels = AxisName("labels")
        axes[grown[0]] = AxisConcat((labels, AxisName(str(extra)))) if extra > 0 else labels
        rows[match.row.pattern] = dataclasses.replace(match.row, axes=tuple(axes))
    return dataclasses.replace(layout, rows=tuple(rows.get(row.pattern, row) for row in layout.rows))


def _patterns_of_equal_rank(ndims: Mapping[str, int]) -> dict[str, int]:
    """Return patterns of parameters, with the number of axes that all parameters of a pattern have.

    Where a norm and a convolution are in one list (`downsampling_layer.0`, `.1`), the indices stay in the pattern.
    """
    ranks: dict[str, int] = {}
    literal_indices = dict.fromkeys(ndims, 0)  # by name, how many of its last indices stay
    while literal_indices:
        groups: dict[str, set[int]] = {}
        for name, literal in literal_indices.items():
            groups.setdefault(with_placeholders(name, literal), set()).add(ndims[name])
        ranks |= {pattern: group.pop() for pattern, group in groups.items() if len(group) == 1}
        literal_indices = {
            name: literal + 1
            for name, literal in literal_indices.items()
            if with_placeholders(name, literal) not in ranks
        }
    return ranks


def add_task_head(layout: Layout, config: PreTrainedConfig, model_class: type[PreTrainedModel]) -> Layout:
    """Return an inferred layout of a language model with the heads of another class of the same base model.

    Raises:
        LayoutError: a parameter of `model_class` that is neither of the base model nor a linear head on the last norm.
    """
    model = meta_model(model_class, config)
    width = config.get_text_config().hidden_size
    last_norm = next(
        (row.input_norms for row in layout.rows if row.kind == "weight" and AxisName("vocab") in row.axes), ()
    )
    rows: list[LayoutRow] = []
    for name, tensor in model.state_dict().items():
        relative = strip_base_prefix(name, model.base_model_prefix)
        if layout.find(relative) is not None:
            continue
        module, _, parameter = relative.rpartition(".")
        if name != relative or parameter not in ("weight", "bias") or tensor.shape[0] != config.num_labels:
            raise LayoutError(
                f"The inferred layout of {layout.family!r} does not know {name!r} of {model_class.__name__}"
            )
        if parameter == "weight" and tuple(tensor.shape) == (config.num_labels, width):
            rows.append(LayoutRow(module, (AxisName("labels"), AxisName("embed")), input_norms=last_norm))
    return dataclasses.replace(layout, rows=(*layout.rows, *rows)) if rows else layout
