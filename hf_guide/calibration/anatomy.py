"""Where to listen in a model: its blocks, the norms that read the residual stream, and the modules that read or write it.

Found by the names that a layout gives, so the same in every family whose axes are known.
"""

from dataclasses import dataclass, field
from typing import cast

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_guide.initialization.axes import Name
from hf_guide.initialization.layouts import Layout, Match
from hf_guide.initialization.planning import canonical


@dataclass(frozen=True)
class Part:
    """A module of a model with what the layout says of it; `axis` is the projected axis on which it lies."""

    name: str
    module: nn.Module
    match: Match
    axis: str

    @property
    def block(self) -> int | None:
        """The number of the block it is in, None outside of blocks."""
        number = self.match.numbers.get("block")
        return None if number is None else int(number)

    @property
    def stack(self) -> str:
        """The stack it is in, such as "layers.{block}"; "" outside of blocks."""
        before, found, _ = self.match.row.pattern.partition("{block}")
        return before + found if found else ""


@dataclass
class Anatomy:
    """The parts of one model by their canonical names.

    Attributes:
        blocks: the modules of each stack, in order.
        norms: every norm whose axis is on the stream.
        read_norms: those norms that other weights read (of a pre-norm model all), by name.
        readers: linear modules that read along the stream; writers: those that write onto it, and read elsewhere.
    """

    blocks: dict[str, list[nn.Module]] = field(default_factory=dict)
    norms: dict[str, Part] = field(default_factory=dict)
    read_norms: dict[str, Part] = field(default_factory=dict)
    readers: dict[str, Part] = field(default_factory=dict)
    writers: dict[str, Part] = field(default_factory=dict)


def study(model: PreTrainedModel, layout: Layout) -> Anatomy:
    """Return where to listen in `model`."""
    found = Anatomy()
    projected = set(layout.projected())
    reads = {norm for row in layout.rows for norm in row.reads if norm}
    stacks = {row.pattern.partition("{block}")[0] + "{block}" for row in layout.rows if "{block}" in row.pattern}
    modules = {canonical(name, model.base_model_prefix): module for name, module in model.named_modules()}
    for stack in sorted(stacks):
        held: list[nn.Module] = []
        while (name := stack.replace("{block}", str(len(held)))) in modules:
            held.append(modules[name])
        if held:
            found.blocks[stack] = held
    for name, module in modules.items():
        match = layout.find(name)
        if match is None or match.suffix or not match.axes:
            continue
        row = match.row
        if row.kind == "norm":
            axis = match.axes[-1]
            if len(match.axes) == 1 and isinstance(axis, Name) and axis.name in projected:
                found.norms[name] = Part(name, module, match, axis.name)
                if row.pattern in reads:
                    found.read_norms[name] = found.norms[name]
        elif row.kind == "weight" and len(match.axes) == 2 and is_linear(module):
            read, written = row.axes[row.input_axis], row.output_axis
            if isinstance(read, Name) and read.name in projected:
                found.readers[name] = Part(name, module, match, read.name)
            elif isinstance(written, Name) and written.name in projected:
                found.writers[name] = Part(name, module, match, written.name)
    return found


def is_linear(module: nn.Module) -> bool:
    """Whether a module multiplies with a matrix, and adds a bias at most."""
    return isinstance(module, (nn.Linear, Conv1D))


def weight_of(module: nn.Module) -> Tensor:
    """Return the weight of a linear module, (out, in), sharing memory with it."""
    weight = cast(Tensor, module.weight)
    return weight.T if isinstance(module, Conv1D) else weight


def bias_of(module: nn.Module) -> Tensor | None:
    """Return the bias of a linear module or a norm, (out,), sharing memory with it; None where it has none."""
    return cast("Tensor | None", getattr(module, "bias", None))


def gain_of(norm: nn.Module) -> Tensor:
    """Return the stored gain of a norm, (d,), sharing memory with it."""
    return cast(Tensor, norm.weight)
