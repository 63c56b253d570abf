"""Find the modules of a model whose activations matter: its blocks, its norms, and its projections from and to the
residual stream.

They are found by the names that a layout gives, so alike in every family whose axes are known.
"""

from dataclasses import dataclass, field
from typing import cast

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_guide.layouts.grammar import AxisName
from hf_guide.layouts.registry import Layout, LayoutMatch
from hf_guide.models.model_classes import strip_base_prefix


@dataclass(frozen=True)
class ModuleRef:
    """A module and its row of the layout.

    Attributes:
        name: Its canonical name, without the base model's prefix.
        module: The module.
        match: The row of the layout that describes it.
        axis: The projected axis (the residual stream) that it reads or writes.
    """

    name: str
    module: nn.Module
    match: LayoutMatch
    axis: str

    @property
    def block(self) -> int | None:
        """Return the index of its block; None outside of blocks."""
        index = self.match.numbers.get("block")
        return None if index is None else int(index)

    @property
    def parameter(self) -> str:
        """Return the last word of the layout's name: for experts, the parameter by which they are matched."""
        return self.match.row.pattern.rpartition(".")[2]

    @property
    def is_language_head(self) -> bool:
        """Return whether it computes logits over a vocabulary."""
        return self.block is None and AxisName("vocab") in self.match.axes

    @property
    def stack(self) -> str:
        """Return its stack of blocks, such as "layers.{block}"; "" outside of blocks."""
        before, block, _ = self.match.row.pattern.partition("{block}")
        return before + block if block else ""


@dataclass
class ModuleMap:
    """The modules of one model, by canonical name.

    Attributes:
        blocks: The blocks of each stack, in order.
        norms: Norms over the residual stream.
        read_norms: Those whose output other weights read; in a pre-norm model, all of them.
        residual_in: Linear modules that read the residual stream, routers of experts included.
        residual_out: Linear modules that write to the residual stream and read something else (o_proj, down_proj).
        experts: Modules that hold a mixture's experts in one parameter, matched by their output projection.
    """

    blocks: dict[str, list[nn.Module]] = field(default_factory=dict)
    norms: dict[str, ModuleRef] = field(default_factory=dict)
    read_norms: dict[str, ModuleRef] = field(default_factory=dict)
    residual_in: dict[str, ModuleRef] = field(default_factory=dict)
    residual_out: dict[str, ModuleRef] = field(default_factory=dict)
    experts: dict[str, ModuleRef] = field(default_factory=dict)

    @property
    def linear(self) -> dict[str, ModuleRef]:
        """Return the linear modules that read or write the residual stream."""
        return {**self.residual_in, **self.residual_out}

    @property
    def language_heads(self) -> list[nn.Module]:
        """Return the modules that compute logits over a vocabulary."""
        return [ref.module for ref in self.residual_in.values() if ref.is_language_head]


def find_modules(model: PreTrainedModel, layout: Layout) -> ModuleMap:
    """Return the modules of `model` that the layout describes."""
    modules = ModuleMap()
    by_name = {strip_base_prefix(name, model.base_model_prefix): module for name, module in model.named_modules()}
    stacks = {row.pattern.partition("{block}")[0] + "{block}" for row in layout.rows if "{block}" in row.pattern}
    for stack in sorted(stacks):
        blocks: list[nn.Module] = []
        while (name := stack.replace("{block}", str(len(blocks)))) in by_name:
            blocks.append(by_name[name])
        if blocks:
            modules.blocks[stack] = blocks
    patterns_read = {norm for row in layout.rows for norm in row.input_norms if norm}
    for name, module in by_name.items():
        _add_experts(modules, name, module, layout)
        match = layout.find(name)
        if match is None or match.suffix or not match.axes:
            continue
        if match.row.kind == "norm":
            _add_norm(modules, name, module, match, layout, patterns_read)
        elif match.row.kind == "weight" and len(match.axes) == 2 and (is_linear(module) or is_router(module, match)):
            _add_linear(modules, name, module, match, layout)
    return modules


def _add_experts(modules: ModuleMap, name: str, module: nn.Module, layout: Layout) -> None:
    for parameter, _ in module.named_parameters(recurse=False):
        match = layout.find(f"{name}.{parameter}")
        if match is not None and len(match.axes) == 3 and match.axes[0] == AxisName("experts"):
            axis = match.axes[2 if match.row.transposed else 1]
            if isinstance(axis, AxisName) and axis.name in layout.projected_axes() and not match.row.input_norms:
                modules.experts[name] = ModuleRef(name, module, match, axis.name)


def _add_norm(
    modules: ModuleMap, name: str, module: nn.Module, match: LayoutMatch, layout: Layout, patterns_read: set[str]
) -> None:
    axis = match.axes[-1]
    if len(match.axes) == 1 and isinstance(axis, AxisName) and axis.name in layout.projected_axes():
        modules.norms[name] = ModuleRef(name, module, match, axis.name)
        if match.row.pattern in patterns_read:
            modules.read_norms[name] = modules.norms[name]


def _add_linear(modules: ModuleMap, name: str, module: nn.Module, match: LayoutMatch, layout: Layout) -> None:
    input_axis, output_axis = match.row.axes[match.row.input_axis], match.row.output_axis
    if isinstance(input_axis, AxisName) and input_axis.name in layout.projected_axes():
        modules.residual_in[name] = ModuleRef(name, module, match, input_axis.name)
    elif isinstance(output_axis, AxisName) and output_axis.name in layout.projected_axes():
        modules.residual_out[name] = ModuleRef(name, module, match, output_axis.name)


def is_linear(module: nn.Module) -> bool:
    """Return whether a module multiplies by a matrix, and at most adds a bias."""
    return isinstance(module, (nn.Linear, Conv1D))


def is_router(module: nn.Module, match: LayoutMatch) -> bool:
    """Return whether a module multiplies the residual stream by a matrix with one row per expert."""
    return match.axes[0] == AxisName("experts") and isinstance(getattr(module, "weight", None), nn.Parameter)


def linear_weight(module: nn.Module) -> Tensor:
    """Return the weight of a linear module, (out, in), sharing its memory."""
    weight = cast(Tensor, module.weight)
    return weight.T if isinstance(module, Conv1D) else weight


def module_bias(module: nn.Module) -> Tensor | None:
    """Return the bias of a linear module or a norm, (out,), sharing its memory; None if it has none."""
    return cast("Tensor | None", getattr(module, "bias", None))


def norm_weight(norm: nn.Module) -> Tensor:
    """Return the weight of a norm as it is stored, (d,), sharing its memory."""
    return cast(Tensor, norm.weight)
