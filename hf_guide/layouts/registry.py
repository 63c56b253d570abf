"""What the axes of every parameter of a family mean: the table that all methods read.

A layout is written as text, a line a module or parameter, its name relative to the base model:

    embed_tokens: table vocab embed
    layers.{block}
      .input_layernorm: norm embed
      .self_attn.q_proj: (kv_heads group q_dim) embed < .input_layernorm
      .self_attn.o_proj: embed (kv_heads group head_dim)
    norm: norm embed
    lm_head: vocab embed < norm

- A line without a colon is the prefix of the lines that begin with a dot. `{block}` stands for a block's number; other
  placeholders, such as `{expert}`, for a number in a list of modules.
- `axes` are those of the weight as it is stored; a bias has the weight's first axis, or the last where the axes are written
  `in -> out` (GPT-2's Conv1D). A line may name a full parameter (`experts.gate_up_proj`) instead of a module. A
  parameter without axes is a `scalar`.
- `blocks` is an axis with an entry for each block of a stack: of the first one, where `block_tables` says no other.
- `norm` marks a gain (and bias): a diagonal on its axis. `table` marks what the residual stream is made from.
- `< norm` says which norm's output the weight reads (with `a | - | b` for the terms of a fused weight), `> scale` which
  learned diagonal its output is multiplied with, `>> norm` which norm stands between its output and the residual stream.
"""

import functools
import importlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor
from transformers import PreTrainedConfig
from transformers.integrations.heterogeneity.configuration_utils import AmbiguousGlobalPerLayerAttributeError

from hf_guide.errors import LayoutError
from hf_guide.layouts.grammar import Axis, AxisConcat, AxisName, parse_axes
from hf_guide.validation import did_you_mean

FIXED_AXES = ("channels", "kernel", "buckets", "groups", "patches", "one")
"""Axes that must be as long in the student as in the teacher."""

PREFIX_AXES = ("positions", "token_types")
"""Axes of which a shorter student keeps the first places."""

BlockScale = Callable[[PreTrainedConfig, int], float]
"""What a model multiplies something with in one block: a function of its config and of the block's index."""


@dataclass(frozen=True)
class BlockTransfer:
    """One block's transfer: both configs and block indices, and how the teacher's tensors of that block are read.

    `read` takes a name relative to the block, such as "self_attn.lambda_k1".
    """

    teacher_config: PreTrainedConfig
    teacher_block: int
    student_config: PreTrainedConfig
    student_block: int
    read: Callable[[str], Tensor]


BlockValue = Callable[[Tensor, BlockTransfer], Tensor]
"""What becomes of a transferred parameter in another block than the teacher's, where one factor does not do."""

UNPROJECTED_AXES = ("vocab", "filters", *FIXED_AXES, *PREFIX_AXES)
"""Axes along which a table is long; its other axes are projected."""


@dataclass(frozen=True)
class LayoutRow:
    """One line of a layout."""

    pattern: str
    axes: tuple[Axis, ...]
    kind: str = "weight"
    input_norms: tuple[str | None, ...] = ()
    output_diagonal: str | None = None
    transposed: bool = False
    output_norm: str | None = None

    @functools.cached_property
    def expression(self) -> re.Pattern[str]:
        escaped = re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>\\d+)", re.escape(self.pattern))
        return re.compile(escaped + r"(?:[._](?P<parameter>weight|bias))?")

    @property
    def output_axis(self) -> Axis:
        return self.axes[-1] if self.transposed else self.axes[0]

    @property
    def input_axis(self) -> int:
        """The number of the axis along which a linear map reads."""
        return len(self.axes) - (2 if self.transposed else 1)


@dataclass(frozen=True)
class LayoutMatch:
    """A parameter found in a layout: its row, what it adds to the row's name, and the numbers its placeholders stand for."""

    row: LayoutRow
    axes: tuple[Axis, ...]
    suffix: str
    is_bias: bool
    numbers: Mapping[str, str]


@dataclass(frozen=True)
class Layout:
    """What `register_layout` registers. Functions take the config (of either model) and return a number."""

    family: str
    rows: tuple[LayoutRow, ...]
    norm: str = "rms"
    norm_offset: float = 0.0
    rope: str | None = None
    sizes: Mapping[str, "str | Callable[[PreTrainedConfig], int]"] = field(default_factory=dict)
    embedding_scale: Callable[[PreTrainedConfig], float] | None = None
    scales: Mapping[str, Callable[[PreTrainedConfig], float]] = field(default_factory=dict)
    tied_head_scale: Callable[[PreTrainedConfig], float] | None = None
    attention_scale: Callable[[PreTrainedConfig], float] | None = None
    rotary_size: Callable[[PreTrainedConfig], int] | None = None
    alibi: Callable[[PreTrainedConfig], bool] | None = None
    variant: Callable[[PreTrainedConfig], str] | None = None
    alike: tuple[tuple[str, str, str], ...] = ()
    exactness: str = "exact"
    block_fields: Mapping[str, str] = field(default_factory=dict)
    block_scale: Mapping[str, BlockScale] = field(default_factory=dict)
    block_attention_scale: BlockScale | None = None
    block_value: Mapping[str, BlockValue] = field(default_factory=dict)
    fixed_depth: str = ""
    block_tables: Mapping[str, str] = field(default_factory=dict)

    def find(self, name: str) -> LayoutMatch | None:
        """Return what the layout says of parameter `name` (relative to the base model), or None.

        A row that names the parameter itself goes before one that names its module.
        """
        best: LayoutMatch | None = None
        for row in self.rows:
            found = row.expression.fullmatch(name)
            if found is None:
                continue
            groups = {key: value for key, value in found.groupdict().items() if value is not None}
            parameter = groups.pop("parameter", "")
            is_bias = parameter == "bias" and row.kind != "norm"
            suffix = name[-len(parameter) - 1 :] if parameter else ""
            match = LayoutMatch(row, (row.output_axis,) if is_bias else row.axes, suffix, is_bias, groups)
            if not parameter:
                return match
            best = best or match
        return best

    def projected_axes(self) -> list[str]:
        """Return the axes that are projected: those on which a `table` lies, other than those a table is long."""
        names = [
            axis.name for row in self.rows if row.kind == "table" for axis in row.axes if isinstance(axis, AxisName)
        ]
        return list(dict.fromkeys(name for name in names if name not in UNPROJECTED_AXES and not name.isdigit()))


_LAYOUTS: dict[str, Layout] = {}


def parse_rows(text: str) -> tuple[LayoutRow, ...]:
    """Return the rows that a layout's `text` describes.

    Raises:
        LayoutError: a line that does not parse; names the line.
    """
    rows: list[LayoutRow] = []
    prefix = ""
    for raw in text.splitlines():
        line = raw.split("#")[0].strip()
        if not line:
            continue
        if ":" not in line:
            prefix = line
            continue
        pattern, _, meaning = (part.strip() for part in line.partition(":"))
        full = prefix + pattern if pattern.startswith(".") else pattern
        transposed = "->" in meaning
        meaning, _, after = (part.strip() for part in meaning.replace("->", " ").partition(">>"))
        meaning, _, scale = (part.strip() for part in meaning.partition(">"))
        meaning, _, reads = (part.strip() for part in meaning.partition("<"))
        words = meaning.split(maxsplit=1)
        kind = words[0] if words and words[0] in ("norm", "table") else "weight"
        meaning = words[1] if kind != "weight" and len(words) > 1 else meaning
        axes = () if meaning == "scalar" else parse_axes(meaning)
        if not axes and meaning != "scalar":
            raise LayoutError(
                f"The layout's line {raw.strip()!r} names no axes; write for example 'embed' or '(heads head_dim) embed'."
            )

        def absolute(name: str, prefix: str = prefix) -> str | None:
            name = name.strip()
            return None if name == "-" else prefix + name if name.startswith(".") else name

        normed = tuple(absolute(name) for name in reads.split("|")) if reads else ()
        output = axes[-1 if transposed else 0] if axes else None
        if len(normed) > 1 and not (isinstance(output, AxisConcat) and len(output.terms) == len(normed)):
            raise LayoutError(
                f"The layout's line {raw.strip()!r} names {len(normed)} norms for an output axis that has not as many terms."
            )
        rows.append(
            LayoutRow(
                full,
                axes,
                kind,
                normed,
                absolute(scale) if scale else None,
                transposed,
                absolute(after) if after else None,
            )
        )
    return tuple(rows)


def register_layout(
    family: str,
    rows: str = "",
    *,
    like: str | None = None,
    overwrite: bool = False,
    norm: str | None = None,
    norm_offset: float | None = None,
    rope: str | None = None,
    sizes: Mapping[str, "str | Callable[[PreTrainedConfig], int]"] | None = None,
    embedding_scale: Callable[[PreTrainedConfig], float] | None = None,
    scales: Mapping[str, Callable[[PreTrainedConfig], float]] | None = None,
    tied_head_scale: Callable[[PreTrainedConfig], float] | None = None,
    attention_scale: Callable[[PreTrainedConfig], float] | None = None,
    rotary_size: Callable[[PreTrainedConfig], int] | None = None,
    alibi: Callable[[PreTrainedConfig], bool] | None = None,
    variant: Callable[[PreTrainedConfig], str] | None = None,
    alike: tuple[tuple[str, str, str], ...] | None = None,
    exactness: str | None = None,
    block_fields: Mapping[str, str] | None = None,
    block_scale: Mapping[str, BlockScale] | None = None,
    block_attention_scale: BlockScale | None = None,
    block_value: Mapping[str, BlockValue] | None = None,
) -> Layout:
    """Register what the axes of a family's parameters mean, and return the layout.

    Args:
        family: the `model_type` of the family's config.
        rows: the table; see this module's docstring for how it is written. Rows here replace those of `like` of the same name.
        like: another family whose rows and settings this one shares, where it does not say otherwise.
        overwrite: whether a family that is registered already may be replaced.
        norm: "rms", or "layer" where norms subtract a mean.
        norm_offset: what a norm adds to its stored gain (1 for Gemma, which stores gain - 1).
        rope: "half" (pairs i, i + l/2), "interleaved" (pairs 2i, 2i + 1), or "" for none.
        sizes: axis name -> the config's attribute, or a function of the config; for names inside products.
        embedding_scale: what the model multiplies its embeddings with.
        scales: row -> what the model's arithmetic makes of the width for this parameter, which the student's then carries.
        tied_head_scale: what the model multiplies the last hidden state with before a tied head.
        attention_scale: what the model multiplies q k with; by default head_dim ** -0.5.
        rotary_size: how many of a head's dimensions are rotated; by default all, or `partial_rotary_factor` of them.
        alibi: whether the model has ALiBi slopes, by which its heads are then chosen.
        variant: which layout, by the name it is registered under, serves a config; not passed on by `like`.
        alike: (module, axis, same axis) triples: where the model has no such module, the two axes are one.
        exactness: "exact", or what the family's arithmetic does not let pass exactly through a projection.
        block_fields: how fields of the config go by block where that cannot be found, by dotted path: "entries" (a list with
            an entry per block), "keyed" (a mapping from a block's number), "numbers" (those of the blocks that differ),
            "after" (of blocks whose output is used), "state_numbers" (of hidden states, 0 being the input), "first" or "last"
            (how many blocks at the start or the end differ), "end" (the number of the last that differs), or "none"; followed
            by the path of the depth where it is not the same config's, as in {"layers_used": "after vision_config.depth"}.
        block_scale: row -> what the model multiplies this row's output with in a block, by the config and the block's
            index. A block that moves, or whose model gets shallower, then has the ratio in its weights.
        block_attention_scale: the same for the products of queries and keys; the ratio goes into the queries.
        block_value: row -> a function of the transferred tensor and a `BlockTransfer` that returns the student's, for what
            depends on the block's index other than by a factor.

    Raises:
        LayoutError: a family that is registered already, an unknown `like`, or a row that does not parse.
    """
    _load_builtin_layouts()
    if family in _LAYOUTS and not overwrite:
        raise LayoutError(f"A layout for {family!r} is registered already; pass overwrite=True to replace it.")
    if like is not None and like not in _LAYOUTS:
        raise LayoutError(f"No layout is registered for like={like!r}.{did_you_mean(like, _LAYOUTS)}")
    rules = _BLOCK_RULES.get(family, BlockRules({}, {}))
    base = _LAYOUTS[like] if like else Layout(family, (), block_scale=rules.scale, block_value=rules.value)
    own = parse_rows(rows)
    replaced = {row.pattern for row in own}

    layout = Layout(
        family,
        own + tuple(row for row in base.rows if row.pattern not in replaced),
        norm or base.norm,
        base.norm_offset if norm_offset is None else norm_offset,
        base.rope if rope is None else rope or None,
        {**base.sizes, **(sizes or {})},
        embedding_scale or base.embedding_scale,
        base.scales if scales is None else scales,
        tied_head_scale or base.tied_head_scale,
        attention_scale or base.attention_scale,
        rotary_size or base.rotary_size,
        alibi or base.alibi,
        variant,
        base.alike if alike is None else alike,
        exactness or base.exactness,
        block_fields={**base.block_fields, **(block_fields or {})},
        block_scale=base.block_scale if block_scale is None else block_scale,
        block_attention_scale=block_attention_scale or base.block_attention_scale,
        block_value=base.block_value if block_value is None else block_value,
    )
    _LAYOUTS[family] = layout
    return layout


@dataclass(frozen=True)
class BlockRules:
    """What a family's blocks compute from their index or from the depth; see `register_layout`."""

    scale: Mapping[str, BlockScale]
    value: Mapping[str, BlockValue]


_BLOCK_RULES: dict[str, BlockRules] = {}


def register_block_rules(
    family: str,
    *,
    block_scale: Mapping[str, BlockScale] | None = None,
    block_value: Mapping[str, BlockValue] | None = None,
) -> None:
    """Register `block_scale` and `block_value`, as `register_layout` takes them, for a family whose layout is derived."""
    _BLOCK_RULES[family] = BlockRules(block_scale or {}, block_value or {})


def block_rules(family: str) -> BlockRules | None:
    """Return what is registered of a family's blocks, alone or with its layout."""
    _load_builtin_layouts()
    layout = _LAYOUTS.get(family)
    return BlockRules(layout.block_scale, layout.block_value) if layout is not None else _BLOCK_RULES.get(family)


def registered_layouts() -> dict[str, Layout]:
    """Return every registered layout by family, the built-in ones included."""
    _load_builtin_layouts()
    return dict(_LAYOUTS)


def _load_builtin_layouts() -> None:
    """Register the built-in layouts; while they are being registered this does nothing."""
    importlib.import_module("hf_guide.layouts.families")


def variant_for(layout: Layout, config: PreTrainedConfig) -> Layout:
    """Return the variant of a family's layout that serves `config`."""
    return layout if layout.variant is None else _LAYOUTS[layout.variant(config)]


def config_sizes(layout: Layout, config: PreTrainedConfig) -> dict[str, int]:
    """Return the sizes of a family's named axes that `config` states."""
    heads = _uniform_size(config, "num_attention_heads")
    width = _uniform_size(config, "hidden_size")
    kv_heads = _uniform_size(config, "num_key_value_heads") or heads
    head_dim = _uniform_size(config, "head_dim") or (width // heads if isinstance(heads, int) and width else None)
    sizes = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
    for name, source in layout.sizes.items():
        value = source(config) if callable(source) else getattr(config, source)
        if value is None:
            raise LayoutError(
                f"The config of {layout.family!r} has no {source!r}, from which its axis {name!r} takes its size."
            )
        sizes[name] = value
    sizes.setdefault("q_dim", sizes["head_dim"])
    sizes.setdefault("k_dim", sizes["q_dim"])
    if "group" not in sizes and isinstance(sizes["heads"], int) and isinstance(sizes["kv_heads"], int):
        sizes["group"] = sizes["heads"] // sizes["kv_heads"]
    return {name: size for name, size in sizes.items() if isinstance(size, int)}


def _uniform_size(config: PreTrainedConfig, name: str) -> int | None:
    """Return a size that a config states; None where it states none, or another for some blocks."""
    try:
        return getattr(config, name, None)
    except AmbiguousGlobalPerLayerAttributeError:
        return None


def rotary_size(layout: Layout, config: PreTrainedConfig, head_dim: int) -> int:
    """Return how many of a head's `head_dim` dimensions are rotated."""
    if layout.rope is None:
        return 0
    if layout.rotary_size is not None:
        return layout.rotary_size(config)
    parameters = getattr(config, "rope_parameters", None) or {}
    factor = getattr(config, "partial_rotary_factor", None) or parameters.get("partial_rotary_factor") or 1.0
    return int(head_dim * factor)
