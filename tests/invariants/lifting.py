"""Lift a small model into a wider, deeper teacher that computes the same function.

Written without the library's transfer code: of hf_guide only the layouts (what the axes mean) are read, so a wrong
layout shows as a lifted teacher that does not compute the small model's function, before `from_teacher` is ever called.
"""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_guide.layouts.grammar import Axis, AxisName, AxisProduct, axis_names, solve_sizes
from hf_guide.layouts.registry import Layout, LayoutMatch, LayoutRow, config_sizes


def shake(
    model: PreTrainedModel, layout: Layout, seed: int, *, stream_gains: str = "random", length: float = 1.0
) -> None:
    """Move every parameter away from its default; gains that cannot be folded stay constant if `stream_gains` says so.

    `length` multiplies all that is written onto the residual stream, as the norms of a pre-norm model let it.
    """
    generator = torch.Generator().manual_seed(seed)
    present = [match.row for match in (layout.find(short(name, model)) for name in model.state_dict()) if match]
    folded = norms_read(present, layout) | {row.output_diagonal for row in present if row.output_diagonal}
    tied, stream = tied_norms(model, layout), [AxisName(name) for name in layout.projected_axes()]
    done: set[int] = set()
    with torch.no_grad():
        for name, tensor in model.state_dict(keep_vars=True).items():
            if not tensor.is_floating_point() or id(tensor) in done:
                continue
            done.add(id(tensor))
            match = layout.find(short(name, model))
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            written = match is not None and match.row.kind != "norm" and not match.row.input_norms
            if written and any(axis in stream for axis in match.axes):
                noise = noise * length
            if match is not None and match.row.kind == "norm" and not name.endswith("bias"):
                free = match.row.pattern in folded and match.row.pattern not in tied or stream_gains == "random"
                if match.axes[-1] not in (AxisName("embed"), *map(AxisName, layout.projected_axes())):
                    free = True
                gain = 1.0 + 0.3 * noise.clamp(-2, 2) if free else torch.full(tensor.shape, 0.8, dtype=torch.float64)
                tensor.copy_(gain - layout.norm_offset)
            elif match is not None and match.row.kind == "table":
                tensor.copy_(noise)
            elif match is not None:
                tensor.copy_(noise * (0.3 if match.is_bias or tensor.ndim < 2 else 1.0 / math.sqrt(tensor.shape[-1])))


def norms_read(rows: Iterable[LayoutRow], layout: Layout) -> set[str]:
    """The norms that some of `rows` read along the residual stream."""
    stream = set(layout.projected_axes())
    along = [row for row in rows if row.input_norms and set(axis_names(row.axes[row.input_axis])) <= stream]
    return {read for row in along for read in row.input_norms if read}


def short(name: str, model: PreTrainedModel) -> str:
    return name.removeprefix(model.base_model_prefix + ".")


def tied_norms(model: PreTrainedModel, layout: Layout) -> set[str]:
    """Norms read by a head that shares its weight with a table."""
    groups: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        groups.setdefault(id(tensor), []).append(short(name, model))
    found: set[str] = set()
    for names in groups.values():
        rows = [match.row for match in map(layout.find, names) if match]
        if any(row.kind == "table" for row in rows):
            found |= {read for row in rows for read in row.input_norms if read}
    return found


def spread(big: int, small: int) -> list[int]:
    """Where the small model's places stand in the big one: the rule of weight selection, written again."""
    step, rest = divmod(big, small)
    return (
        [i * step for i in range(small)] if rest == 0 else [round(i * (big - 1) / (small - 1)) for i in range(small)]
    )


def outer(big: int, small: int) -> list[int]:
    """Where the small model's blocks stand in the big one: at both ends, of an odd number one more at the first."""
    return [i if 2 * i < small else big - small + i for i in range(small)]


def positions(axis: Axis, big: dict[str, int], small: dict[str, int]) -> list[int]:
    """Where each of the small model's places of `axis` stands in the big model's."""
    if isinstance(axis, AxisName):
        if axis.name.isdigit():
            return list(range(int(axis.name)))
        if axis.name in ("positions", "token_types") or big[axis.name] == small[axis.name]:
            return list(range(small[axis.name]))
        if axis.name in ("heads", "kv_heads", "group") and big.get("alibi"):
            return [(i + 1) * (big[axis.name] // small[axis.name]) - 1 for i in range(small[axis.name])]
        return spread(big[axis.name], small[axis.name])
    if isinstance(axis, AxisProduct):
        found = [0]
        for factor in axis.factors:
            inner, length = positions(factor, big, small), total(factor, big)
            found = [place * length + other for place in found for other in inner]
        return found
    found, offset = [], 0
    for term in axis.terms:
        found += [offset + place for place in positions(term, big, small)]
        offset += total(term, big)
    return found


def total(axis: Axis, sizes: dict[str, int]) -> int:
    if isinstance(axis, AxisName):
        return int(axis.name) if axis.name.isdigit() else sizes[axis.name]
    lengths = [total(part, sizes) for part in (axis.factors if isinstance(axis, AxisProduct) else axis.terms)]
    return math.prod(lengths) if isinstance(axis, AxisProduct) else sum(lengths)


def orthonormal(big: int, small: int, seed: int, *, keep_mean: bool) -> Tensor:
    """A random (big, small) matrix with orthonormal columns; with `keep_mean` it carries all-ones onto all-ones."""
    generator = torch.Generator().manual_seed(seed)

    def outside_ones(width: int) -> Tensor:
        start = torch.randn(width, width, generator=generator, dtype=torch.float64)
        start[:, 0] = 1
        return torch.linalg.qr(start)[0][:, 1:]

    if not keep_mean:
        return torch.linalg.qr(torch.randn(big, small, generator=generator, dtype=torch.float64))[0]
    return outside_ones(big)[:, : small - 1] @ outside_ones(small).T + torch.ones(
        big, small, dtype=torch.float64
    ) / math.sqrt(big * small)


class Lifter:
    """Fills `big` so that it computes what `small` does: its residual stream lies in the span of a random Q."""

    def __init__(self, small: PreTrainedModel, big: PreTrainedModel, layout: Layout, seed: int = 0):
        self.small, self.big, self.layout, self.seed = small, big, layout, seed
        self.source = {short(name, small): tensor for name, tensor in small.state_dict().items()}
        self.targets = {short(name, big): tensor for name, tensor in big.state_dict(keep_vars=True).items()}
        self.generator = torch.Generator().manual_seed(seed + 1)
        self.projected = [AxisName(name) for name in layout.projected_axes()]
        present = [match.row for match in map(layout.find, self.targets) if match]
        self.read = norms_read(present, layout) - tied_norms(big, layout)
        bare = [
            norm for norm in tied_norms(big, layout) if norm not in self.source and norm + ".weight" not in self.source
        ]
        self.bare = {
            axis.name
            for row in present
            if set(row.input_norms) & set(bare)
            for axis in row.axes
            if axis in self.projected
        }
        self.learned_scales = {row.output_diagonal for row in layout.rows if row.output_diagonal}
        self.bases: dict[str, Tensor] = {}
        self.gains: dict[str, Tensor] = {}
        self.counts: dict[str, tuple[int, int]] = {}
        for name in self.targets:
            match = layout.find(name)
            if match and "block" in match.numbers:
                stack = match.row.pattern.partition("{block}")[0]
                self.counts[stack] = (self._count(stack, self.targets), self._count(stack, self.source))

    def _count(self, stack: str, tensors: dict[str, Tensor]) -> int:
        matches = [
            match
            for match in map(self.layout.find, tensors)
            if match and match.row.pattern.startswith(stack + "{block}")
        ]
        return 1 + max(int(match.numbers["block"]) for match in matches)

    @torch.no_grad()
    def lift(self) -> None:
        done: set[int] = set()
        for name, target in self.targets.items():
            if id(target) in done:
                continue
            done.add(id(target))
            match = self.layout.find(name)
            assert match is not None, f"the layout says nothing of {name}"
            twin, added = self._twin(match, name)
            if added:
                self._fill_added(match, name, target)
            else:
                target.copy_(self._lifted(match, name, twin))

    def _twin(self, match: LayoutMatch, name: str) -> tuple[str, bool]:
        """The small model's parameter of the same meaning, or that the block is an added one."""
        twin = match.row.pattern + match.suffix
        for placeholder, number in match.numbers.items():
            kept = self._kept(match, placeholder)
            if int(number) not in kept:
                return name, True
            twin = twin.replace("{" + placeholder + "}", str(kept.index(int(number))))
        return twin, False

    def _kept(self, match: LayoutMatch, placeholder: str) -> list[int]:
        """Where the small model's numbered modules stand among the big one's."""
        if placeholder == "block":
            return outer(*self.counts[match.row.pattern.partition("{block}")[0]])
        axis = (
            AxisProduct((AxisName("kv_heads"), AxisName("group"))) if placeholder == "heads" else AxisName(placeholder)
        )
        big, small = config_sizes(self.layout, self.big.config), config_sizes(self.layout, self.small.config)
        unsized = isinstance(axis, AxisName) and axis.name not in big
        return list(range(int(match.numbers[placeholder]) + 1)) if unsized else positions(axis, big, small)

    def _fill_added(self, match: LayoutMatch, name: str, target: Tensor) -> None:
        """A block that writes nothing onto the stream, whatever it reads."""
        if match.row.kind == "norm":
            target.fill_(0.0 if name.endswith("bias") else 1.0 - self.layout.norm_offset)
        elif not match.row.input_norms and any(axis in self.projected for axis in match.axes):
            target.zero_()
        else:
            target.copy_(0.1 * torch.randn(target.shape, generator=self.generator, dtype=torch.float64))

    def _basis(self, axis: AxisName, wide: int, narrow: int) -> Tensor:
        if axis.name not in self.bases:
            self.bases[axis.name] = orthonormal(
                wide, narrow, self.seed + 7 + len(self.bases), keep_mean=self.layout.norm == "layer"
            )
        found = self.bases[axis.name]
        assert found.shape == (wide, narrow), f"{axis} is {wide} x {narrow} here, {tuple(found.shape)} elsewhere"
        return found

    def _copies(self, axis: Axis) -> int:
        """How often a projected axis stands side by side in `axis`; 0 where it is no projected axis."""
        if isinstance(axis, AxisProduct) and len(axis.factors) == 2 and axis.factors[1] in self.projected:
            return int(axis.factors[0].name)
        return int(axis in self.projected)

    def _normed(self, name: str, pattern: str) -> bool:
        """Whether the big model has this norm; one that no block has is a norm without parameters."""
        has_it = {match.row.pattern for match in map(self.layout.find, self.targets) if match}
        return name in self.targets or name + ".weight" in self.targets or pattern not in has_it

    def _ratio(self, scale: "Callable | None") -> float:
        return 1.0 if scale is None else scale(self.small.config) / scale(self.big.config)

    def _gain(self, tensors: dict[str, Tensor], name: str) -> Tensor | None:
        found = tensors.get(name + ".weight", tensors.get(name))
        return None if found is None else found.double() + self.layout.norm_offset

    def _own_gain(self, name: str) -> Tensor | None:
        """The big model's own random gain for a folded norm or a learned scale."""
        found = self.targets.get(name + ".weight", self.targets.get(name))
        if found is None:
            return None
        if name not in self.gains:
            self.gains[name] = 1.0 + 0.5 * torch.rand(found.shape, generator=self.generator, dtype=torch.float64)
        return self.gains[name]

    def _named(self, pattern: str, match: LayoutMatch, *, of_small: bool) -> str:
        for placeholder, number in match.numbers.items():
            stack, marker, _ = pattern.partition("{" + placeholder + "}")
            if of_small and marker and stack in self.counts:
                place = outer if placeholder == "block" else spread
                number = str(place(*self.counts[stack]).index(int(number)))
            pattern = pattern.replace("{" + placeholder + "}", number)
        return pattern

    def _lifted(self, match: LayoutMatch, name: str, twin: str) -> Tensor:
        target, value = self.targets[name], self.source[twin].double()
        row = match.row
        if row.kind == "norm":
            return self._lifted_norm(match, name, twin)
        kept = [
            dim
            for dim, axis in enumerate(match.axes)
            if not self._copies(axis) or target.shape[dim] == value.shape[dim]
        ]
        value = self._placed(match, value, target, kept)
        terms, big = [row.input_norms[0] if row.input_norms else None], self._sizes(self.big, match, target)
        if len(row.input_norms) > 1 and not match.is_bias:
            lengths = [total(term, big) for term in row.output_axis.terms]
            output = len(match.axes) - 1 if row.transposed else 0
            parts = value.split(lengths, dim=output)
            return torch.cat(
                [self._widened(match, part, target, norm) for part, norm in zip(parts, row.input_norms, strict=True)],
                dim=output,
            )
        return self._widened(match, value, target, terms[0])

    def _placed(self, match: LayoutMatch, value: Tensor, target: Tensor, dims: Iterable[int]) -> Tensor:
        """`value` among zeros, at the places along `dims` where the method looks for it."""
        big, small = self._sizes(self.big, match, target), self._sizes(self.small, match, value)
        for dim in dims:
            wide = torch.zeros(*value.shape[:dim], target.shape[dim], *value.shape[dim + 1 :], dtype=torch.float64)
            value = wide.index_copy(dim, torch.tensor(positions(match.axes[dim], big, small)), value)
        return value

    def _widened(self, match: LayoutMatch, value: Tensor, target: Tensor, norm: str | None) -> Tensor:
        row = match.row
        for dim, axis in enumerate(match.axes):
            copies = self._copies(axis)
            if not copies or target.shape[dim] == value.shape[dim]:
                continue
            axis = axis.factors[1] if copies > 1 else axis
            wide, narrow = target.shape[dim] // copies, value.shape[dim] // copies
            matrix = self._basis(axis, wide, narrow)
            reads = not match.is_bias and dim == row.input_axis and norm is not None and norm in self.read
            if reads and self._normed(self._named(norm, match, of_small=False), norm):
                small, big = (
                    self._gain(self.source, self._named(norm, match, of_small=True)),
                    self._own_gain(self._named(norm, match, of_small=False)),
                )
                if small is not None:
                    matrix = matrix * small[None, :] / big[:, None]
                matrix = matrix * math.sqrt(narrow / wide)
            elif row.output_diagonal is not None and (match.is_bias or dim != row.input_axis):
                small, big = (
                    self._gain(self.source, self._named(row.output_diagonal, match, of_small=True)),
                    self._own_gain(self._named(row.output_diagonal, match, of_small=False)),
                )
                matrix = matrix if small is None else matrix * small[None, :] / big[:, None]
            written = (
                row.kind == "table" or match.is_bias or AxisName("positions") in match.axes or dim != row.input_axis
            )
            if axis.name in self.bare and written:
                matrix = matrix * math.sqrt(narrow / wide)
            value = (value.movedim(dim, -1).unflatten(-1, (copies, narrow)) @ matrix.T).flatten(-2).movedim(-1, dim)
        if row.kind == "table" and AxisName("vocab") in match.axes:
            value = value * self._ratio(self.layout.embedding_scale)
        elif row.pattern in self.layout.scales:
            value = value * self._ratio(self.layout.scales[row.pattern])
        elif AxisName("vocab") in match.axes and row.input_norms and not match.is_bias:
            value = value * self._ratio(self.layout.tied_head_scale)
        return value

    def _lifted_norm(self, match: LayoutMatch, name: str, twin: str) -> Tensor:
        target, value = self.targets[name], self.source[twin].double()
        axis, pattern, offset = match.axes[-1], match.row.pattern, self.layout.norm_offset
        if len(match.axes) > 1:
            return self._placed(match, value, target, range(len(match.axes)))
        norm = name.removesuffix(".weight").removesuffix(".bias")
        if axis not in self.projected or target.shape[-1] == value.shape[-1]:
            return self._placed(match, value, target, [0])
        wide, narrow = target.shape[-1], value.shape[-1]
        if pattern in self.read:
            own = self._own_gain(norm)
            if not name.endswith(".bias"):
                return own - offset
            gain = self._gain(self.source, twin.removesuffix(".bias"))
            return math.sqrt(wide / narrow) * own * (self._basis(axis, wide, narrow) @ (value / gain))
        if pattern in self.learned_scales:
            return self._own_gain(norm) - offset
        before_head = any(pattern in row.input_norms for row in self.layout.rows)
        scale = (
            self._ratio(self.layout.tied_head_scale) / self._ratio(self.layout.embedding_scale) if before_head else 1.0
        )
        if name.endswith(".bias"):
            return scale * (self._basis(axis, wide, narrow) @ value)
        gain = scale * (value + offset).mean() * math.sqrt(narrow / wide)
        return torch.full(target.shape, gain.item() - offset, dtype=torch.float64)

    def _sizes(self, model: PreTrainedModel, match: LayoutMatch, tensor: Tensor) -> dict[str, int]:
        stated = solve_sizes(match.axes, tensor.shape, config_sizes(self.layout, model.config), match.row.pattern)
        if self.layout.alibi is not None and self.layout.alibi(model.config):
            stated["alibi"] = 1
        return stated


def lift(small: PreTrainedModel, big: PreTrainedModel, layout: Layout, seed: int = 0) -> None:
    """Fill `big` so that it computes what `small` does."""
    Lifter(small, big, layout, seed).lift()
