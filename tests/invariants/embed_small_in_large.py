"""Embed a small model in a wider, deeper teacher that computes the same function: the construction of the law of lift.

It does not use the library's transfer code, only its layouts (the meaning of the axes). So with a wrong layout the teacher
does not compute the small model's function, which is checked before `from_teacher` is called.
"""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_guide.layouts.grammar import Axis, AxisName, AxisProduct, axis_names, solve_sizes
from hf_guide.layouts.registry import Layout, LayoutMatch, LayoutRow, config_sizes


def randomize(
    model: PreTrainedModel, layout: Layout, seed: int, *, stream_gains: str = "random", length: float = 1.0
) -> None:
    """Move every parameter away from its default; gains that cannot be folded are constant unless `stream_gains` is "random".

    `length` multiplies everything that is added to the residual stream; the norms of a pre-norm model divide it out.
    """
    generator = torch.Generator().manual_seed(seed)
    present = [
        match.row for match in (layout.find(relative_name(name, model)) for name in model.state_dict()) if match
    ]
    folded = input_norms_of(present, layout) | {row.output_diagonal for row in present if row.output_diagonal}
    tied, stream = norms_before_tied_head(model, layout), [AxisName(name) for name in layout.projected_axes()]
    done: set[int] = set()
    with torch.no_grad():
        for name, tensor in model.state_dict(keep_vars=True).items():
            if not tensor.is_floating_point() or id(tensor) in done:
                continue
            done.add(id(tensor))
            match = layout.find(relative_name(name, model))
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


def input_norms_of(rows: Iterable[LayoutRow], layout: Layout) -> set[str]:
    """Return the norms whose output some of `rows` take along the residual stream."""
    stream = set(layout.projected_axes())
    along = [row for row in rows if row.input_norms and set(axis_names(row.axes[row.input_axis])) <= stream]
    return {read for row in along for read in row.input_norms if read}


def relative_name(name: str, model: PreTrainedModel) -> str:
    return name.removeprefix(model.base_model_prefix + ".")


def norms_before_tied_head(model: PreTrainedModel, layout: Layout) -> set[str]:
    """Return the norms before a head that shares its weight with an embedding."""
    groups: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        groups.setdefault(id(tensor), []).append(relative_name(name, model))
    found: set[str] = set()
    for names in groups.values():
        rows = [match.row for match in map(layout.find, names) if match]
        if any(row.kind == "table" for row in rows):
            found |= {read for row in rows for read in row.input_norms if read}
    return found


def evenly_spaced(big: int, small: int) -> list[int]:
    """Return the big model's indices of the small model's entries: the rule of weight selection, implemented independently."""
    step, rest = divmod(big, small)
    return (
        [i * step for i in range(small)] if rest == 0 else [round(i * (big - 1) / (small - 1)) for i in range(small)]
    )


def first_and_last(big: int, small: int) -> list[int]:
    """Return the big model's indices of the small model's blocks: at both ends, of an odd number one more at the start."""
    return [i if 2 * i < small else big - small + i for i in range(small)]


def selected_indices(axis: Axis, big: dict[str, int], small: dict[str, int]) -> list[int]:
    """Return the index on the big model's `axis` of each entry of the small model's."""
    if isinstance(axis, AxisName):
        if axis.name.isdigit():
            return list(range(int(axis.name)))
        if axis.name in ("positions", "token_types") or big[axis.name] == small[axis.name]:
            return list(range(small[axis.name]))
        if axis.name in ("heads", "kv_heads", "group") and big.get("alibi"):
            return [(i + 1) * (big[axis.name] // small[axis.name]) - 1 for i in range(small[axis.name])]
        return evenly_spaced(big[axis.name], small[axis.name])
    if isinstance(axis, AxisProduct):
        found = [0]
        for factor in axis.factors:
            inner, length = selected_indices(factor, big, small), axis_length(factor, big)
            found = [index * length + other for index in found for other in inner]
        return found
    found, offset = [], 0
    for term in axis.terms:
        found += [offset + index for index in selected_indices(term, big, small)]
        offset += axis_length(term, big)
    return found


def axis_length(axis: Axis, sizes: dict[str, int]) -> int:
    if isinstance(axis, AxisName):
        return int(axis.name) if axis.name.isdigit() else sizes[axis.name]
    lengths = [axis_length(part, sizes) for part in (axis.factors if isinstance(axis, AxisProduct) else axis.terms)]
    return math.prod(lengths) if isinstance(axis, AxisProduct) else sum(lengths)


def random_orthonormal(big: int, small: int, seed: int, *, keep_mean: bool) -> Tensor:
    """Return a random (big, small) matrix with orthonormal columns; with `keep_mean` it maps all-ones onto all-ones."""
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


class Embedder:
    """Fills `big` so that it computes what `small` does: its residual stream is in the span of a random Q."""

    def __init__(self, small: PreTrainedModel, big: PreTrainedModel, layout: Layout, seed: int = 0):
        self.small, self.big, self.layout, self.seed = small, big, layout, seed
        self.source = {relative_name(name, small): tensor for name, tensor in small.state_dict().items()}
        self.targets = {relative_name(name, big): tensor for name, tensor in big.state_dict(keep_vars=True).items()}
        self.generator = torch.Generator().manual_seed(seed + 1)
        self.projected = [AxisName(name) for name in layout.projected_axes()]
        present = [match.row for match in map(layout.find, self.targets) if match]
        self.folded = input_norms_of(present, layout) - norms_before_tied_head(big, layout)
        bare = [
            norm
            for norm in norms_before_tied_head(big, layout)
            if norm not in self.source and norm + ".weight" not in self.source
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
    def fill(self) -> None:
        done: set[int] = set()
        for name, target in self.targets.items():
            if id(target) in done:
                continue
            done.add(id(target))
            match = self.layout.find(name)
            assert match is not None, f"the layout has no row for {name}"
            source, is_added = self._source_of(match, name)
            if is_added:
                self._fill_added(match, name, target)
            else:
                target.copy_(self._embedded(match, name, source))

    def _source_of(self, match: LayoutMatch, name: str) -> tuple[str, bool]:
        """Return the small model's parameter of the same meaning, and whether the block is an added one."""
        source = match.row.pattern + match.suffix
        for placeholder, number in match.numbers.items():
            indices = self._indices(match, placeholder)
            if int(number) not in indices:
                return name, True
            source = source.replace("{" + placeholder + "}", str(indices.index(int(number))))
        return source, False

    def _indices(self, match: LayoutMatch, placeholder: str) -> list[int]:
        """Return the big model's indices of the small model's modules in a list."""
        if placeholder == "block":
            return first_and_last(*self.counts[match.row.pattern.partition("{block}")[0]])
        axis = (
            AxisProduct((AxisName("kv_heads"), AxisName("group"))) if placeholder == "heads" else AxisName(placeholder)
        )
        big, small = config_sizes(self.layout, self.big.config), config_sizes(self.layout, self.small.config)
        unsized = isinstance(axis, AxisName) and axis.name not in big
        return list(range(int(match.numbers[placeholder]) + 1)) if unsized else selected_indices(axis, big, small)

    def _fill_added(self, match: LayoutMatch, name: str, target: Tensor) -> None:
        """Fill a block that adds nothing to the residual stream, whatever its input."""
        if match.row.kind == "norm":
            target.fill_(0.0 if name.endswith("bias") else 1.0 - self.layout.norm_offset)
        elif not match.row.input_norms and any(axis in self.projected for axis in match.axes):
            target.zero_()
        else:
            target.copy_(0.1 * torch.randn(target.shape, generator=self.generator, dtype=torch.float64))

    def _basis(self, axis: AxisName, wide: int, narrow: int) -> Tensor:
        if axis.name not in self.bases:
            self.bases[axis.name] = random_orthonormal(
                wide, narrow, self.seed + 7 + len(self.bases), keep_mean=self.layout.norm == "layer"
            )
        found = self.bases[axis.name]
        assert found.shape == (wide, narrow), f"{axis} is {wide} x {narrow} here, {tuple(found.shape)} elsewhere"
        return found

    def _copies(self, axis: Axis) -> int:
        """Return how often a projected axis is repeated in `axis`; 0 where it is not projected."""
        if isinstance(axis, AxisProduct) and len(axis.factors) == 2 and axis.factors[1] in self.projected:
            return int(axis.factors[0].name)
        return int(axis in self.projected)

    def _has_norm(self, name: str, pattern: str) -> bool:
        """Return whether the big model has this norm; one that no block has is a norm without parameters."""
        patterns = {match.row.pattern for match in map(self.layout.find, self.targets) if match}
        return name in self.targets or name + ".weight" in self.targets or pattern not in patterns

    def _ratio(self, scale: "Callable | None") -> float:
        return 1.0 if scale is None else scale(self.small.config) / scale(self.big.config)

    def _gain(self, tensors: dict[str, Tensor], name: str) -> Tensor | None:
        found = tensors.get(name + ".weight", tensors.get(name))
        return None if found is None else found.double() + self.layout.norm_offset

    def _big_gain(self, name: str) -> Tensor | None:
        """Return the big model's random gain of a folded norm or a learned diagonal."""
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
                rule = first_and_last if placeholder == "block" else evenly_spaced
                number = str(rule(*self.counts[stack]).index(int(number)))
            pattern = pattern.replace("{" + placeholder + "}", number)
        return pattern

    def _embedded(self, match: LayoutMatch, name: str, source: str) -> Tensor:
        target, value = self.targets[name], self.source[source].double()
        row = match.row
        if row.kind == "norm":
            return self._embedded_norm(match, name, source)
        kept = [
            dim
            for dim, axis in enumerate(match.axes)
            if not self._copies(axis) or target.shape[dim] == value.shape[dim]
        ]
        value = self._scattered(match, value, target, kept)
        terms, big = [row.input_norms[0] if row.input_norms else None], self._sizes(self.big, match, target)
        if len(row.input_norms) > 1 and not match.is_bias:
            lengths = [axis_length(term, big) for term in row.output_axis.terms]
            output = len(match.axes) - 1 if row.transposed else 0
            parts = value.split(lengths, dim=output)
            return torch.cat(
                [
                    self._projected(match, part, target, norm)
                    for part, norm in zip(parts, row.input_norms, strict=True)
                ],
                dim=output,
            )
        return self._projected(match, value, target, terms[0])

    def _scattered(self, match: LayoutMatch, value: Tensor, target: Tensor, dims: Iterable[int]) -> Tensor:
        """Return `value` scattered into zeros, at the indices along `dims` that the method selects."""
        big, small = self._sizes(self.big, match, target), self._sizes(self.small, match, value)
        for dim in dims:
            wide = torch.zeros(*value.shape[:dim], target.shape[dim], *value.shape[dim + 1 :], dtype=torch.float64)
            value = wide.index_copy(dim, torch.tensor(selected_indices(match.axes[dim], big, small)), value)
        return value

    def _projected(self, match: LayoutMatch, value: Tensor, target: Tensor, norm: str | None) -> Tensor:
        row = match.row
        for dim, axis in enumerate(match.axes):
            copies = self._copies(axis)
            if not copies or target.shape[dim] == value.shape[dim]:
                continue
            axis = axis.factors[1] if copies > 1 else axis
            wide, narrow = target.shape[dim] // copies, value.shape[dim] // copies
            matrix = self._basis(axis, wide, narrow)
            reads = not match.is_bias and dim == row.input_axis and norm is not None and norm in self.folded
            if reads and self._has_norm(self._named(norm, match, of_small=False), norm):
                small, big = (
                    self._gain(self.source, self._named(norm, match, of_small=True)),
                    self._big_gain(self._named(norm, match, of_small=False)),
                )
                if small is not None:
                    matrix = matrix * small[None, :] / big[:, None]
                matrix = matrix * math.sqrt(narrow / wide)
            elif row.output_diagonal is not None and (match.is_bias or dim != row.input_axis):
                small, big = (
                    self._gain(self.source, self._named(row.output_diagonal, match, of_small=True)),
                    self._big_gain(self._named(row.output_diagonal, match, of_small=False)),
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

    def _embedded_norm(self, match: LayoutMatch, name: str, source: str) -> Tensor:
        target, value = self.targets[name], self.source[source].double()
        axis, pattern, offset = match.axes[-1], match.row.pattern, self.layout.norm_offset
        if len(match.axes) > 1:
            return self._scattered(match, value, target, range(len(match.axes)))
        norm = name.removesuffix(".weight").removesuffix(".bias")
        if axis not in self.projected or target.shape[-1] == value.shape[-1]:
            return self._scattered(match, value, target, [0])
        wide, narrow = target.shape[-1], value.shape[-1]
        if pattern in self.folded:
            own = self._big_gain(norm)
            if not name.endswith(".bias"):
                return own - offset
            gain = self._gain(self.source, source.removesuffix(".bias"))
            return math.sqrt(wide / narrow) * own * (self._basis(axis, wide, narrow) @ (value / gain))
        if pattern in self.learned_scales:
            return self._big_gain(norm) - offset
        before_head = any(pattern in row.input_norms for row in self.layout.rows)
        scale = (
            self._ratio(self.layout.tied_head_scale) / self._ratio(self.layout.embedding_scale) if before_head else 1.0
        )
        if name.endswith(".bias"):
            return scale * (self._basis(axis, wide, narrow) @ value)
        gain = scale * (value + offset).mean() * math.sqrt(narrow / wide)
        return torch.full(target.shape, gain.item() - offset, dtype=torch.float64)

    def _sizes(self, model: PreTrainedModel, match: LayoutMatch, tensor: Tensor) -> dict[str, int]:
        sizes = solve_sizes(match.axes, tensor.shape, config_sizes(self.layout, model.config), match.row.pattern)
        if self.layout.alibi is not None and self.layout.alibi(model.config):
            sizes["alibi"] = 1
        return sizes


def embed_small_in_large(small: PreTrainedModel, big: PreTrainedModel, layout: Layout, seed: int = 0) -> None:
    """Fill `big` so that it computes what `small` does."""
    Embedder(small, big, layout, seed).fill()
