"""Enumerate the shapes of a budget: widths, depths, heads and experts on a grid, and the MLP that fills the budget.

Sizes are multiples that hardware likes: of 64 where the teacher's are 2,048 or more, of 16 from 256, of 8 from 64 and of 4
below; the teacher's own size is always among them, and MLPs of any width are tried where none of these fits. Heads are whole:
they keep the teacher's size, in groups as large as the teacher's, or smaller where the user's width or heads need it.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedConfig

from hf_guide.errors import ShapeError
from hf_guide.models.positions import max_input_tokens
from hf_guide.shapes.budget import TOLERANCE, Budget
from hf_guide.shapes.cache import CacheMeter
from hf_guide.shapes.counting import Cost, ParameterCounter
from hf_guide.shapes.fields import SizeField, SizeFields, SizeRole

MAX_HEAD_CHOICES = 16
"""Numbers of heads that are tried: all up to this, and evenly spaced ones of more."""


@dataclass(frozen=True)
class ShapeGrid:
    """The shapes of a budget.

    Attributes:
        sizes: For each size field its value in every shape.
        cost: Of every shape.
        memory: Bytes of weights and cache of every shape.
    """

    sizes: dict[str, np.ndarray]
    cost: Cost
    memory: np.ndarray

    def __len__(self) -> int:
        return len(self.memory)


def size_step(size: int) -> int:
    """Return the multiple that a student's size is of, by the teacher's.

    Example:
        >>> [size_step(size) for size in (48, 128, 576, 4096)]
        [4, 8, 16, 64]
    """
    return next(step for bound, step in ((2048, 64), (256, 16), (64, 8), (0, 4)) if size >= bound)


@dataclass(frozen=True)
class ShapeEnumerator:
    """Enumerates the shapes that a budget allows.

    Attributes:
        fixed: The user's overrides under the config's own names; a role of which one is given is not varied.
        sizes: The size fields of the teacher's config with these overrides, for roles that are not varied.
        itemsize: Bytes of a weight.
        cache: Measures the cache of a model.
        allows: Whether the family allows numbers of heads with the user's width.
        first_possible: Of shapes, in an order of their indices, the first that can be made; None where none can.
    """

    fields: SizeFields
    counter: ParameterCounter
    fixed: Mapping[str, Any]
    sizes: Mapping[str, int]
    itemsize: int
    cache: CacheMeter
    allows: Callable[[Mapping[str, int]], bool] = lambda heads: True
    first_possible: Callable[[Mapping[str, np.ndarray], np.ndarray], int | None] = lambda sizes, order: int(order[0])

    def enumerate(self, budget: Budget) -> ShapeGrid:
        """Return the shapes within `TOLERANCE` of the budget.

        Raises:
            ShapeError: There are none; states the smallest and the largest student.
        """
        grid = self._shapes(self._grid, budget)
        if not len(grid):
            raise self.unreachable(budget)
        return grid

    def _shapes(self, sizes: dict[str, np.ndarray], budget: Budget) -> ShapeGrid:
        """Return those of a grid within the budget, where the MLP is not fixed with the one that fills it."""
        mlp = self.fields.main(SizeRole.MLP)
        if mlp is None or self._is_fixed(SizeRole.MLP):
            return self._within(sizes, budget)
        steps = dict.fromkeys((size_step(mlp.size), 1))
        tried = (self._within(self._filled(sizes, mlp, budget, step), budget) for step in steps)
        return next((each for each in tried if len(each)), self._within(self._bounds(sizes)[-1], budget))

    def _bounds(self, sizes: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
        """Return a grid with the narrowest MLP, and with the widest; once where the MLP is not varied."""
        mlp = self.fields.main(SizeRole.MLP)
        if mlp is None or self._is_fixed(SizeRole.MLP):
            return [sizes]
        widths = (min(size_step(mlp.size), mlp.size), mlp.size)
        return [self._with_mlp(sizes, np.full(_length(sizes), float(each)), 1) for each in widths]

    def _filled(
        self, sizes: dict[str, np.ndarray], mlp: SizeField, budget: Budget, step: int
    ) -> dict[str, np.ndarray]:
        """Return shapes with the MLP that fills the budget, a multiple of `step`; without those that have none."""
        low, high = (
            self._used(self._with_mlp(sizes, np.full(_length(sizes), float(each)), 1), budget)
            for each in (1, mlp.size)
        )
        width = 1 + (self._targets(budget)[0] - low) * (mlp.size - 1) / np.maximum(high - low, 1e-9)
        rounded = np.where(np.abs(width - mlp.size) < step / 2, mlp.size, np.round(width / step) * step)
        possible = (rounded >= min(step, mlp.size)) & (rounded <= mlp.size)
        return {name: each[possible] for name, each in self._with_mlp(sizes, rounded, step).items()}

    def bounds(self) -> list[tuple[dict[str, np.ndarray], np.ndarray]]:
        """Return the shapes of every budget with the narrowest MLP, and with the widest, each with an order of their indices.

        The first in the order is the one whose sizes are all the smallest, and the one whose sizes are all the largest.
        """
        grids = self._bounds(self._grid)
        ascending = np.arange(_length(self._grid))
        return [(grids[0], ascending), (grids[-1], ascending[::-1])]

    def _is_fixed(self, role: SizeRole) -> bool:
        return any(each.name in self.fixed for each in self.fields.of(role))

    @functools.cached_property
    def _grid(self) -> dict[str, np.ndarray]:
        """Every combination of width, depth, heads and experts; the MLP is the teacher's."""
        axes = [self._widths(), self._depths(), self._heads(), self._experts()]
        combinations = [
            {name: value for part in parts for name, value in part.items()} for parts in itertools.product(*axes)
        ]
        combinations = [each for each in map(self._with_heads_of_width, combinations) if each is not None]
        if not combinations:
            raise ShapeError(
                f"With {self.describe_fixed()} the width does not divide into whole heads of {self.fields.head_size}, "
                f"the teacher's size: choose a multiple of {self._width_of_heads()}, or state the number of heads too."
            )
        names = [each.name for each in self.fields.fields]
        known = {each.name: self.sizes.get(each.name, each.size) for each in self.fields.fields}
        return {name: np.array([float(shape.get(name, known[name])) for shape in combinations]) for name in names}

    def _proportional(self, role: SizeRole, choices: "list[int]", step: int = 1) -> list[dict[str, int]]:
        """Return for each choice of a role's main field the values of all of its fields, in proportion."""
        main = self.fields.main(role)
        if main is None or self._is_fixed(role):
            return [{}]
        return [
            {
                each.name: choice
                if each.size == main.size
                else min(each.size, max(step, step * round(each.size * choice / main.size / step)))
                for each in self.fields.of(role)
            }
            for choice in choices
        ]

    def _widths(self) -> list[dict[str, int]]:
        main = self.fields.main(SizeRole.WIDTH)
        assert main is not None
        step, largest = size_step(main.size), main.size
        if self.fields.heads_follow_width and self.fields.head_size:
            step = self._width_of_heads()
            numbers = [self.fixed.get(each.name, each.size) for each in self.fields.of(SizeRole.HEADS)]
            largest = min([largest, *(number * self.fields.head_size for number in numbers)])  # no head is larger
        return self._proportional(SizeRole.WIDTH, [*range(step, largest, step), largest], min(step, 8))

    def _width_of_heads(self) -> int:
        """Return what the width must be a multiple of: the size of a head, or the number of heads that the user fixes."""
        heads = [self.fixed[each.name] for each in self.fields.of(SizeRole.HEADS) if each.name in self.fixed]
        assert self.fields.head_size is not None
        return math.lcm(*heads) if heads else self.fields.head_size

    def _depths(self) -> list[dict[str, int]]:
        main = self.fields.main(SizeRole.DEPTH)
        return self._proportional(SizeRole.DEPTH, list(range(1, main.size + 1)) if main else [])

    def _heads(self) -> list[dict[str, int]]:
        """Return numbers of heads and of key/value heads; where the width decides them, none here."""
        heads, groups = self.fields.main(SizeRole.HEADS), self.fields.main(SizeRole.KEY_VALUE_HEADS)
        if self.fields.heads_follow_width or heads is None:
            return [{}]
        if self._is_fixed(SizeRole.HEADS) and groups is not None and not self._is_fixed(SizeRole.KEY_VALUE_HEADS):
            return [{groups.name: self._groups_of(self.fixed.get(heads.name, heads.size), heads, groups)}]
        if self._is_fixed(SizeRole.HEADS):
            return [{}]
        if groups is None or heads.size % groups.size:
            return self._proportional(SizeRole.HEADS, _choices(heads.size))
        numbers = [self.fixed[groups.name]] if groups.name in self.fixed else _choices(groups.size)
        largest = heads.size // groups.size
        of_teacher = [{groups.name: each, heads.name: each * largest} for each in numbers]
        if not self._is_fixed(SizeRole.WIDTH) or any(map(self.allows, of_teacher)):
            return of_teacher
        smaller = [
            {groups.name: each, heads.name: each * size} for size in range(largest - 1, 0, -1) for each in numbers
        ]
        return [each for each in smaller if self.allows(each)] or of_teacher

    @staticmethod
    def _groups_of(number: int, heads: SizeField, groups: SizeField) -> int:
        """Return how many key/value heads go with a number of heads, in groups as large as the teacher's or nearly."""
        for size in range(heads.size // groups.size, 0, -1):
            if number % size == 0 and number // size <= groups.size:
                return number // size
        return math.gcd(number, groups.size)  # the plan of such a shape states what is possible

    def _experts(self) -> list[dict[str, int]]:
        main = self.fields.main(SizeRole.EXPERTS)
        if main is None:
            return [{}]
        least = self.counter.experts_per_token or 1
        choices = sorted({main.size, main.size * 3 // 4, main.size // 2, main.size // 4})
        return self._proportional(SizeRole.EXPERTS, [each for each in choices if each >= least])

    def _with_heads_of_width(self, shape: dict[str, int]) -> dict[str, int] | None:
        """Return a shape with as many whole heads as its width holds, where the width decides that."""
        fields = self.fields
        if not fields.heads_follow_width or not fields.head_size:
            return shape
        main = fields.main(SizeRole.WIDTH)
        assert main is not None
        width = shape.get(main.name, self.fixed.get(main.name, main.size))
        heads = {}
        for each in fields.of(SizeRole.HEADS):
            number = self.fixed.get(each.name) or each.size * width / main.size
            if number != int(number) or width % int(number or 1) or number < 1:
                return None
            heads[each.name] = int(number)
        groups = fields.main(SizeRole.KEY_VALUE_HEADS)
        if groups is not None and groups.name not in self.fixed:
            number = groups.size * width / main.size
            if number != int(number) or number < 1:
                return None
            heads[groups.name] = int(number)
        return {**shape, **{name: number for name, number in heads.items() if name not in self.fixed}}

    def _with_mlp(self, sizes: dict[str, np.ndarray], width: np.ndarray, step: int) -> dict[str, np.ndarray]:
        """Return sizes with the main MLP's width, a multiple of `step`, and other MLPs in proportion, also of their multiples.

        The grouped products of experts need rows of 16 bytes.
        """
        main = self.fields.main(SizeRole.MLP)
        assert main is not None
        others = {}
        for each in self.fields.of(SizeRole.MLP):
            own = min(step, size_step(each.size), each.size)
            share = np.maximum(1, np.round(width * each.size / main.size / own))
            others[each.name] = width if each.size == main.size else np.minimum(each.size, own * share)
        return {**sizes, **others}

    # What shapes use of the budget

    def memory(self, sizes: Mapping[str, np.ndarray], parameters: np.ndarray) -> np.ndarray:
        """Return bytes of the weights, and of the cache that a budget of memory counts."""
        return self.itemsize * parameters + self.counter.count_cache(sizes)

    def _used(self, sizes: Mapping[str, np.ndarray], budget: Budget) -> np.ndarray:
        """Return what shapes use of the budget's first entry."""
        return self._used_of(next(iter(budget.entries())), sizes)

    def _used_of(self, entry: str, sizes: Mapping[str, np.ndarray]) -> np.ndarray:
        cost = self.counter.count(sizes)
        if entry == "memory":
            return self.memory(sizes, cost.parameters)
        return cost.active if entry == "active_parameters" else cost.parameters

    @staticmethod
    def _targets(budget: Budget) -> list[float]:
        """Return the entries of the budget that are set, the one that the MLP is solved for first."""
        aimed = None if budget.memory is None else budget.memory * (1 - TOLERANCE / 2)
        return [each for each in (budget.active_parameters, budget.num_parameters, aimed) if each is not None]

    def _within(self, sizes: dict[str, np.ndarray], budget: Budget) -> ShapeGrid:
        cost = self.counter.count(sizes)
        memory = self.memory(sizes, cost.parameters)
        fits = fits_budget(budget, cost.parameters, cost.active, memory)
        kept = Cost(*(each[fits] for each in (cost.parameters, cost.active, cost.lookups, cost.tied_head)))
        return ShapeGrid({name: each[fits] for name, each in sizes.items()}, kept, memory[fits])

    def unreachable(self, budget: Budget) -> ShapeError:
        """Return the error of a budget within `TOLERANCE` of which no shape can be made."""
        grid = self._grid
        entries = list(budget.entries())
        for number in range(len(entries) - 1, 0, -1):
            alone = dataclasses.replace(budget, **dict.fromkeys(entries[number:]))
            shapes = self._shapes(grid, alone)
            if len(shapes):
                return self._contradiction(shapes, alone, entries[number], budget)
        bounds = self._bounds(grid)
        used = [self._used(each, budget) for each in bounds]
        fixed = f" with {self.describe_fixed()}" if self.fixed else ""
        smallest = self.first_possible(bounds[0], np.argsort(used[0], kind="stable"))
        largest = self.first_possible(bounds[-1], np.argsort(-used[-1], kind="stable"))
        if smallest is None or largest is None:
            return ShapeError(
                f"No student{fixed} is within {TOLERANCE:.0%} of {budget}, and none of those nearest to it in size that were "
                f"tried can be made of this teacher: {'fix other sizes, or ' if self.fixed else ''}pass all sizes by name."
            )
        low, high = used[0][smallest], used[-1][largest]
        name = entries[0]
        unit = " bytes" if name == "memory" else ""
        small, large = (self._describe(bounds[i], at) for i, at in ((0, smallest), (-1, largest)))
        least = {name: each[[smallest]] for name, each in bounds[0].items()}
        table = self.counter.count(least).lookups[0]
        tables = f", of which embedding tables are {table:,.0f} parameters" if table else ""
        cached = self.counter.count_cache(least)[0] if budget.memory is not None else 0
        positions = self.cache.positions + self.cache.encoder_positions
        if cached:
            tables += f"{' and' if table else ', of which'} the cache of {positions:,} positions {cached:,.0f} bytes"
        between = (
            f" Sizes between these are too far apart{': fix fewer of them' if self.fixed else ''}."
            if low <= self._targets(budget)[0] <= high
            else ""
        )
        return ShapeError(
            f"No student{fixed} is within {TOLERANCE:.0%} of {budget}. The smallest has {name} {low:,.0f}{unit} "
            f"({small}{tables}), the largest {high:,.0f}{unit} ({large}).{between}"
        )

    def _contradiction(self, shapes: ShapeGrid, alone: Budget, entry: str, budget: Budget) -> ShapeError:
        """Return the error of a budget of several entries, of which shapes have the first, `alone`, but not `entry`."""
        used = self._used_of(entry, shapes.sizes)
        found = [self.first_possible(shapes.sizes, np.argsort(each, kind="stable")) for each in (used, -used)]
        ends = [used[each] for each in found if each is not None]
        unit = " bytes" if entry == "memory" else ""
        reached = f" Those of {alone} have {entry} from {ends[0]:,.0f} to {ends[-1]:,.0f}{unit}." if ends else ""
        fixed = f" with {self.describe_fixed()}" if self.fixed else ""
        return ShapeError(
            f"No student{fixed} is within {TOLERANCE:.0%} of {budget} at once.{reached} Leave one out, or choose others."
        )

    def describe_fixed(self) -> str:
        """Return the user's overrides as they are passed."""
        return ", ".join(f"{name}={value!r}" for name, value in self.fixed.items())

    @staticmethod
    def _describe(sizes: Mapping[str, np.ndarray], index: int) -> str:
        return ", ".join(f"{name}={int(each[index])}" for name, each in sizes.items())


def fits_budget(budget: Budget, parameters: Any, active: Any, memory: Any) -> Any:
    """Return whether shapes use at least 98 % and at most 102 % of every entry of the budget, and at most 100 % of memory."""
    fits: Any = True
    for target, used in ((budget.num_parameters, parameters), (budget.active_parameters, active)):
        if target is not None:
            fits = fits & (np.abs(used - target) <= TOLERANCE * target)
    if budget.memory is not None:
        fits = fits & (memory <= budget.memory) & (memory >= (1 - TOLERANCE) * budget.memory)
    return fits


def cache_positions(budget: Budget, config: PreTrainedConfig) -> tuple[int, int]:
    """Return how many positions a student's cache is counted for: of self-attention, and of cross-attention (0 without any).

    Cross-attention keeps the encoder's tokens: of sounds as many as the encoder has positions, since they are padded to them;
    of text as many as the decoder's, or fewer where the encoder has fewer positions.

    Raises:
        OptionError: The budget's `cache_length` is more than the model has.
    """
    if not config.is_encoder_decoder:
        return budget.num_cached(max_input_tokens(config)), 0
    decoder = budget.num_cached(max_input_tokens(config, target=True))
    of_sounds, of_text = getattr(config, "max_source_positions", None), max_input_tokens(config)
    return decoder, of_sounds or min(decoder, of_text or decoder)


def _choices(size: int) -> list[int]:
    if size <= MAX_HEAD_CHOICES:
        return list(range(1, size + 1))
    return sorted({max(1, size * each // MAX_HEAD_CHOICES) for each in range(1, MAX_HEAD_CHOICES + 1)})


def _length(sizes: Mapping[str, np.ndarray]) -> int:
    return len(next(iter(sizes.values())))


def overrides_of(
    sizes: Mapping[str, np.ndarray], index: int, fields: SizeFields, fixed: Mapping[str, Any]
) -> dict[str, int]:
    """Return the overrides of the config that make one shape: what differs from the teacher's, without the user's own."""
    teacher: dict[str, SizeField] = {each.name: each for each in fields.fields}
    overrides = {
        name: int(values[index])
        for name, values in sizes.items()
        if name not in fixed and (int(values[index]) != teacher[name].size or name in fields.kept)
    }
    return {**{name: size for name, size in fields.kept.items() if name not in fixed}, **overrides}
