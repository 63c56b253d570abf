"""The registry of layouts: what the axes of every parameter of a family mean. All methods read it.

A layout is written as text, one line for each module or parameter, named relative to the base model:

    embed_tokens: table vocab embed
    layers.{block}
      .input_layernorm: norm embed
      .self_attn.q_proj: (kv_heads group q_dim) embed < .input_layernorm
      .self_attn.o_proj: embed (kv_heads group head_dim)
    norm: norm embed
    lm_head: vocab embed < norm

- A line without a colon is the prefix of the following lines that begin with a dot. `{block}` is a block's index; other
  placeholders, such as `{expert}`, are indices in a list of modules.
- The axes are those of the weight as it is stored (`grammar.py`). A bias has the weight's first axis, or its last where the
  axes are written `in -> out` (GPT-2's Conv1D). A line may name a parameter (`experts.gate_up_proj`) instead of a module. A
  parameter without axes is a `scalar`.
- `blocks` is an axis with an entry for each block of a stack: of the first stack, unless `block_tables` names another; `gaps`
  one with an entry between each two blocks, which is added there to the residual stream.
- `labels` counts `config.num_labels`, alone or in a sum such as `(labels + 1)` for a class that is no label.
- `norm` marks a gain (and bias): a diagonal on its axis. `table` marks an embedding: what the residual stream starts from.
- `< norm` is the norm whose output the weight takes as its input (`< a | - | b` for the terms of a fused weight),
  `> scale` the learned diagonal that its output is multiplied with, `>> norm` the norm between its output and the
  residual stream.
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

_KERNEL_AXES = (AxisName("kernel"), AxisName("one"))

PREFIX_AXES = ("positions", "token_types")
"""Axes of which a shorter student keeps the first entries."""

BlockScale = Callable[[PreTrainedConfig, int], float]
"""A factor that a model applies in one block: a function of its config and of the block's index."""


@dataclass(frozen=True)
class BlockTransfer:
    """The transfer of one block.

    Attributes:
        teacher_config: the teacher's config.
        teacher_block: the index of the block in the teacher.
        student_config: the student's config.
        student_block: the index of the block in the student.
        read: returns one of the teacher's tensors by its name relative to the block, such as "self_attn.lambda_k1".
    """

    teacher_config: PreTrainedConfig
    teacher_block: int
    student_config: PreTrainedConfig
    student_block: int
    read: Callable[[str], Tensor]


BlockValue = Callable[[Tensor, BlockTransfer], Tensor]
"""Adjusts a transferred parameter to its index in the student, where a factor is not enough."""

UNPROJECTED_AXES = ("vocab", "filters", *FIXED_AXES, *PREFIX_AXES)
"""Axes of an embedding that are not projected; its others are."""


@dataclass(frozen=True)
class LayoutRow:
    """One line of a layout.

    Attributes:
        pattern: the name of a module or parameter, with placeholders.
        axes: of the weight as it is stored.
        kind: "weight", "norm" or "table" (an embedding).
        input_norms: the norm whose output the weight takes as its input, one for each term of a fused weight.
        output_diagonal: the learned diagonal that the output is multiplied with.
        transposed: whether the weight is stored as (in, out).
        output_norm: the norm between the output and the residual stream.
    """

    pattern: str
    axes: tuple[Axis, ...]
    kind: str = "weight"
    input_norms: tuple[str | None, ...] = ()
    output_diagonal: str | None = None
    transposed: bool = False
    output_norm: str | None = None

    @functools.cached_property
    def expression(self) -> re.Pattern[str]:
        """The pattern as a regular expression of parameter names."""
        escaped = re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>\\d+)", re.escape(self.pattern))
        return re.compile(escaped + r"(?:[._](?P<parameter>weight|bias))?")

    @property
    def output_axis(self) -> Axis:
        """The axis along which a linear map writes, and that its bias has."""
        return self.axes[-1] if self.transposed else self.axes[0]

    @property
    def input_axis(self) -> int:
        """The dimension along which a linear map or a convolution takes its input."""
        dims = [dim for dim, axis in enumerate(self.axes) if axis not in _KERNEL_AXES] or list(range(len(self.axes)))
        return dims[-2] if self.transposed else dims[-1]


@dataclass(frozen=True)
class LayoutMatch:
    """A parameter that matches a row of a layout.

    Attributes:
        axes: of the parameter, which are the row's or those of its bias.
        suffix: what the parameter's name adds to the row's: ".weight", ".bias" or "".
        numbers: the index for each placeholder of the row, as text.
    """

    row: LayoutRow
    axes: tuple[Axis, ...]
    suffix: str
    is_bias: bool
    numbers: Mapping[str, str]


@dataclass(frozen=True)
class Layout:
    """What `register_layout` registers; see there. Functions take the config of the teacher or of the student.

    Attributes:
        fixed_depth: why a student may not have fewer blocks; "" where it may.
        block_tables: row -> the stack that its `blocks` axis has an entry for each block of.
    """

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
        """Return the match of parameter `name` (relative to the base model), or None where no row matches.

        A row that names the parameter itself takes precedence over one that names its module.
        """
        of_module: LayoutMatch | None = None
        for row in self.rows:
            matched = row.expression.fullmatch(name)
            if matched is None:
                continue
            numbers = {key: value for key, value in matched.groupdict().items() if value is not None}
            parameter = numbers.pop("parameter", "")
            is_bias = parameter == "bias" and row.kind != "norm"
            suffix = name[-len(parameter) - 1 :] if parameter else ""
            match = LayoutMatch(row, (row.output_axis,) if is_bias else row.axes, suffix, is_bias, numbers)
            if not parameter:
                return match
            of_module = of_module or match
        return of_module

    def projected_axes(self) -> list[str]:
        """Return the names of the axes that are projected: those of the embeddings, without `UNPROJECTED_AXES`."""
        names = [
            axis.name for row in self.rows if row.kind == "table" for axis in row.axes if isinstance(axis, AxisName)
        ]
        return list(dict.fromkeys(name for name in names if name not in UNPROJECTED_AXES and not name.isdigit()))


_LAYOUTS: dict[str, Layout] = {}


def parse_rows(text: str) -> tuple[LayoutRow, ...]:
    """Parse the rows of a layout; this module's docstring describes the text.

    Raises:
        LayoutError: a line that does not parse; names the line.

    Example:
        >>> row = parse_rows("layers.{block}.mlp.up_proj: mlp embed < layers.{block}.norm")[0]
        >>> row.pattern, [str(axis) for axis in row.axes], row.input_norms
        ('layers.{block}.mlp.up_proj', ['mlp', 'embed'], ('layers.{block}.norm',))
    """
    rows: list[LayoutRow] = []
    prefix = ""
    for raw_line in text.splitlines():
        line = raw_line.split("#")[0].strip()
        if not line:
            continue
        if ":" not in line:
            prefix = line
            continue
        pattern, _, description = (part.strip() for part in line.partition(":"))
        rows.append(_parse_row(prefix + pattern if pattern.startswith(".") else pattern, description, prefix, line))
    return tuple(rows)


def _parse_row(pattern: str, description: str, prefix: str, line: str) -> LayoutRow:
    """Return the row of `pattern`, whose axes, norms and scales `description` gives."""

    def absolute(name: str) -> str | None:
        name = name.strip()
        return None if name == "-" else prefix + name if name.startswith(".") else name

    transposed = "->" in description
    description, _, output_norm = (part.strip() for part in description.replace("->", " ").partition(">>"))
    description, _, diagonal = (part.strip() for part in description.partition(">"))
    axes_text, _, norms = (part.strip() for part in description.partition("<"))
    first, _, others = axes_text.partition(" ")
    kind = first if first in ("norm", "table") else "weight"
    axes_text = others.strip() if kind != "weight" else axes_text
    axes = () if axes_text == "scalar" else parse_axes(axes_text)
    if not axes and axes_text != "scalar":
        raise LayoutError(
            f"The layout's line {line!r} names no axes; write for example 'embed' or '(heads head_dim) embed'."
        )
    input_norms = tuple(absolute(name) for name in norms.split("|")) if norms else ()
    output = axes[-1 if transposed else 0] if axes else None
    if len(input_norms) > 1 and not (isinstance(output, AxisConcat) and len(output.terms) == len(input_norms)):
        raise LayoutError(
            f"The layout's line {line!r} names {len(input_norms)} norms for an output axis that has not as many terms."
        )
    return LayoutRow(
        pattern,
        axes,
        kind,
        input_norms,
        absolute(diagonal) if diagonal else None,
        transposed,
        absolute(output_norm) if output_norm else None,
    )


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
        rows: the table, written as this module's docstring describes. A row here replaces the row of `like` of the same name.
        like: another family whose rows and settings apply wherever this one gives none.
        overwrite: whether a registered family may be replaced.
        norm: "rms" (default), or "layer" where norms subtract a mean.
        norm_offset: what a norm adds to its stored gain (default 0; 1 for Gemma, which stores gain - 1).
        rope: "half" (pairs i, i + l/2), "interleaved" (pairs 2i, 2i + 1), or "" (default) for none.
        sizes: axis name -> the config's attribute, or a function of the config; for names inside products.
        embedding_scale: the factor that the model applies to its embeddings.
        scales: row -> a factor of this parameter that follows from the width; the student's weights compensate for it.
        tied_head_scale: the factor that the model applies to the last hidden state before a tied head.
        attention_scale: the factor of the products of queries and keys; by default head_dim ** -0.5.
        rotary_size: how many of a head's dimensions are rotated; by default all, or `partial_rotary_factor` of them.
        alibi: whether the model has ALiBi slopes, by which its heads are then selected.
        variant: the name under which the layout for a config is registered; `like` does not inherit it.
        alike: (module, axis, same axis) triples: where the model has no such module, the two axes are one.
        exactness: "exact", or what the family's arithmetic does not preserve through a projection.
        block_fields: how fields of the config depend on the blocks where that cannot be found, by dotted path: "entries" (a
            list with an entry per block), "keyed" (a mapping from a block's index), "numbers" (indices of the blocks that
            differ), "after" (indices of blocks whose output is used), "state_numbers" (indices of hidden states, 0 being the
            input), "first" or "last" (how many blocks at the start or the end differ), "end" (the index of the last that
            differs), or "none"; followed by the path of the depth where it is not in the same config, as in
            {"layers_used": "after vision_config.depth"}.
        block_scale: row -> the factor of this row's output in a block, by the config and the block's index. The weights of a
            block that moves, or whose model becomes shallower, compensate for the ratio.
        block_attention_scale: the same for the products of queries and keys; the queries compensate for it.
        block_value: row -> a function of the transferred tensor and a `BlockTransfer` that returns the student's tensor, for
            what depends on the block's index other than by a factor.

    Raises:
        LayoutError: a family that is registered already, an unknown `like`, or a row that does not parse.

    Example:
        >>> layout = register_layout(
        ...     "my_llama", "layers.{block}.self_attn.sinks: (kv_heads group)", like="llama", overwrite=True
        ... )
        >>> match = layout.find("layers.3.self_attn.sinks")
        >>> str(match.axes[0]), dict(match.numbers)
        ('(kv_heads group)', {'block': '3'})
    """
    _load_builtin_layouts()
    if family in _LAYOUTS and not overwrite:
        raise LayoutError(f"A layout for {family!r} is registered already; pass overwrite=True to replace it.")
    if like is not None and like not in _LAYOUTS:
        raise LayoutError(f"No layout is registered for like={like!r}.{did_you_mean(like, _LAYOUTS)}")
    rules = _BLOCK_RULES.get(family, BlockRules({}, {}))
    base = _LAYOUTS[like] if like else Layout(family, (), block_scale=rules.scale, block_value=rules.value)
    own_rows = parse_rows(rows)
    replaced = {row.pattern for row in own_rows}
    layout = Layout(
        family,
        own_rows + tuple(row for row in base.rows if row.pattern not in replaced),
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
    """What a family's blocks compute from their index or from the depth: `block_scale` and `block_value`."""

    scale: Mapping[str, BlockScale]
    value: Mapping[str, BlockValue]


_BLOCK_RULES: dict[str, BlockRules] = {}


def register_block_rules(
    family: str,
    *,
    block_scale: Mapping[str, BlockScale] | None = None,
    block_value: Mapping[str, BlockValue] | None = None,
) -> None:
    """Register `block_scale` and `block_value`, as `register_layout` takes them, for a family whose layout is inferred."""
    _BLOCK_RULES[family] = BlockRules(block_scale or {}, block_value or {})


def block_rules(family: str) -> BlockRules | None:
    """Return the rules for a family's blocks, registered alone or with its layout; None where there are none."""
    _load_builtin_layouts()
    layout = _LAYOUTS.get(family)
    return BlockRules(layout.block_scale, layout.block_value) if layout is not None else _BLOCK_RULES.get(family)


def registered_layouts() -> dict[str, Layout]:
    """Return every registered layout by family, the built-in ones included.

    Example:
        >>> registered_layouts()["phi3"].rope
        'half'
    """
    _load_builtin_layouts()
    return dict(_LAYOUTS)


def _load_builtin_layouts() -> None:
    """Register the built-in layouts; a no-op while they are being registered."""
    importlib.import_module("hf_guide.layouts.families")


def variant_for(layout: Layout, config: PreTrainedConfig) -> Layout:
    """Return the variant of a family's layout that `config` selects."""
    return layout if layout.variant is None else _LAYOUTS[layout.variant(config)]


def config_sizes(layout: Layout, config: PreTrainedConfig) -> dict[str, int]:
    """Return the sizes of a family's named axes that `config` gives.

    Example:
        >>> from transformers import LlamaConfig
        >>> config = LlamaConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=2)
        >>> sizes = config_sizes(registered_layouts()["llama"], config)
        >>> sizes["heads"], sizes["group"], sizes["head_dim"]
        (4, 2, 16)

    Raises:
        LayoutError: the config lacks an attribute that the layout names.
    """
    heads = _uniform_size(config, "num_attention_heads")
    width = _uniform_size(config, "hidden_size")
    head_dim = _uniform_size(config, "head_dim") or (width // heads if isinstance(heads, int) and width else None)
    sizes = {"heads": heads, "head_dim": head_dim}
    for name, source in layout.sizes.items():
        value = source(config) if callable(source) else getattr(config, source)
        if value is None:
            raise LayoutError(
                f"The config of {layout.family!r} has no {source!r}, from which its axis {name!r} takes its size."
            )
        sizes[name] = value
    # After the layout's own sizes: in an encoder-decoder `num_attention_heads` is the encoder's, and `heads` the decoder's.
    sizes.setdefault("kv_heads", _uniform_size(config, "num_key_value_heads") or sizes["heads"])
    sizes.setdefault("q_dim", sizes["head_dim"])
    sizes.setdefault("k_dim", sizes["q_dim"])
    if "group" not in sizes and isinstance(sizes["heads"], int) and isinstance(sizes["kv_heads"], int):
        sizes["group"] = sizes["heads"] // sizes["kv_heads"]
    return {name: size for name, size in sizes.items() if isinstance(size, int)}


def _uniform_size(config: PreTrainedConfig, name: str) -> int | None:
    """Return a size of the config; None where it has none, or different ones for different blocks."""
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
