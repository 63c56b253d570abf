"""Where to listen in a model: its blocks, the norms that read the residual stream, and the modules that read or write it.

Found by the names that a layout gives, so the same in every family whose axes are known.
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
    """A module of a model with what the layout says of it; `axis` is the projected axis on which it lies."""

    name: str
    module: nn.Module
    match: LayoutMatch
    axis: str

    @property
    def block(self) -> int | None:
        """The number of the block it is in, None outside of blocks."""
        number = self.match.numbers.get("block")
        return None if number is None else int(number)

    @property
    def parameter(self) -> str:
        """The last word of the layout's name: of experts that of the parameter they are matched by."""
        return self.match.row.pattern.rpartition(".")[2]

    @property
    def is_language_head(self) -> bool:
        """Whether it makes logits over a vocabulary."""
        return self.block is None and AxisName("vocab") in self.match.axes

    @property
    def stack(self) -> str:
        """The stack it is in, such as "layers.{block}"; "" outside of blocks."""
        before, found, _ = self.match.row.pattern.partition("{block}")
        return before + found if found else ""


@dataclass
class ModuleMap:
    """The parts of one model by their canonical names.

    Attributes:
        blocks: the modules of each stack, in order.
        norms: every norm whose axis is on the stream.
        read_norms: those norms that other weights read (of a pre-norm model all), by name.
        readers: linear modules that read along the stream, routers of experts among them; writers: those that write onto it,
            and read elsewhere.
        experts: modules that hold a mixture's experts side by side, matched by the weight that writes onto the stream.
    """

    blocks: dict[str, list[nn.Module]] = field(default_factory=dict)
    norms: dict[str, ModuleRef] = field(default_factory=dict)
    read_norms: dict[str, ModuleRef] = field(default_factory=dict)
    readers: dict[str, ModuleRef] = field(default_factory=dict)
    writers: dict[str, ModuleRef] = field(default_factory=dict)
    experts: dict[str, ModuleRef] = field(default_factory=dict)


def find_modules(model: PreTrainedModel, layout: Layout) -> ModuleMap:
    """Return where to listen in `model`."""
    found = ModuleMap()
    projected = set(layout.projected_axes())
    reads = {norm for row in layout.rows for norm in row.input_norms if norm}
    stacks = {row.pattern.partition("{block}")[0] + "{block}" for row in layout.rows if "{block}" in row.pattern}
    modules = {strip_base_prefix(name, model.base_model_prefix): module for name, module in model.named_modules()}
    for stack in sorted(stacks):
        held: list[nn.Module] = []
        while (name := stack.replace("{block}", str(len(held)))) in modules:
            held.append(modules[name])
        if held:
            found.blocks[stack] = held
    for name, module in modules.items():
        for parameter, _ in module.named_parameters(recurse=False):
            match = layout.find(f"{name}.{parameter}")
            if match is not None and len(match.axes) == 3 and match.axes[0] == AxisName("experts"):
                axis = match.axes[2 if match.row.transposed else 1]
                if isinstance(axis, AxisName) and axis.name in projected and not match.row.input_norms:
                    found.experts[name] = ModuleRef(name, module, match, axis.name)
        match = layout.find(name)
        if match is None or match.suffix or not match.axes:
            continue
        row = match.row
        if row.kind == "norm":
            axis = match.axes[-1]
            if len(match.axes) == 1 and isinstance(axis, AxisName) and axis.name in projected:
                found.norms[name] = ModuleRef(name, module, match, axis.name)
                if row.pattern in reads:
                    found.read_norms[name] = found.norms[name]
        elif row.kind == "weight" and len(match.axes) == 2 and (is_linear(module) or is_router(module, match)):
            read, written = row.axes[row.input_axis], row.output_axis
            if isinstance(read, AxisName) and read.name in projected:
                found.readers[name] = ModuleRef(name, module, match, read.name)
            elif isinstance(written, AxisName) and written.name in projected:
                found.writers[name] = ModuleRef(name, module, match, written.name)
    return found


def is_linear(module: nn.Module) -> bool:
    """Whether a module multiplies with a matrix, and adds a bias at most."""
    return isinstance(module, (nn.Linear, Conv1D))


def is_router(module: nn.Module, match: LayoutMatch) -> bool:
    """Whether a module multiplies the stream with a matrix, a row an expert, before it chooses among them."""
    return match.axes[0] == AxisName("experts") and isinstance(getattr(module, "weight", None), nn.Parameter)


def linear_weight(module: nn.Module) -> Tensor:
    """Return the weight of a linear module, (out, in), sharing memory with it."""
    weight = cast(Tensor, module.weight)
    return weight.T if isinstance(module, Conv1D) else weight


def module_bias(module: nn.Module) -> Tensor | None:
    """Return the bias of a linear module or a norm, (out,), sharing memory with it; None where it has none."""
    return cast("Tensor | None", getattr(module, "bias", None))


def norm_weight(norm: nn.Module) -> Tensor:
    """Return the stored gain of a norm, (d,), sharing memory with it."""
    return cast(Tensor, norm.weight)
