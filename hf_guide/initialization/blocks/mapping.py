"""Settle a student's config and the teacher's blocks that feed it together: one follows the other.

What is asked for gives the number of blocks of each stack, and how they are chosen. The choice is checked against what the
config can state; where it cannot be, the nearest choice that can is taken, and the report says so. An explicit list is never
moved: it is refused, and the nearest admissible one named.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from hf_guide.errors import HfGuideError, ShapeError
from hf_guide.initialization.blocks.config_fields import (
    LAYER_WORDS,
    BlockField,
    ConfigPath,
    Depth,
    FieldKind,
    StackDepths,
    ambiguous_block_fields,
    find_block_fields,
    iter_subconfigs,
    kv_sharing_sources,
    name_words,
    remap_field,
    shared_entry_sources,
    value_at,
)
from hf_guide.initialization.blocks.depths import find_depths
from hf_guide.initialization.blocks.selection import (
    BlockRequirements,
    most_influential_blocks,
    nearest_blocks,
    stack_signatures,
)
from hf_guide.initialization.config import LayerSelection, PlanOptions
from hf_guide.initialization.planning import check_stack_names, stack_sizes, stage_names
from hf_guide.initialization.selection import select_blocks
from hf_guide.initialization.student_config import derive_student_config, overridden_values
from hf_guide.layouts.registry import Layout
from hf_guide.models.model_classes import meta_model, strip_base_prefix
from hf_guide.models.module_signature import ModuleSignature, describe_difference
from hf_guide.models.tiny_models import MODEL_ERRORS
from hf_guide.teachers.checkpoint import TeacherCheckpoint

COUNT_KINDS = (FieldKind.FIRST, FieldKind.LAST, FieldKind.END)


@dataclass(frozen=True)
class StudentBlocks:
    """A student's config and the teacher's blocks that feed it, by stack.

    Attributes:
        notes: what the report says of how they were chosen.
        approximations: what the config cannot state of the blocks that feed it.
    """

    config: PreTrainedConfig
    layers: dict[str, list[int]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    approximations: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _TeacherStacks:
    """What is known of a teacher's depths before a student is looked at."""

    teacher: TeacherCheckpoint
    layout: Layout
    sizes: dict[str, int]
    depths: StackDepths
    fields: list[BlockField]

    @functools.cached_property
    def kinds(self) -> dict[ConfigPath, list[tuple[ModuleSignature, ...]]]:
        """The kind of each of the teacher's blocks, by depth: one for each stack of that depth."""
        assert self.depths.model is not None
        return {
            path: signatures_at(self.depths.model, depth, depth.size) for path, depth in self.depths.depths.items()
        }

    def part(self, path: ConfigPath) -> PreTrainedConfig:
        """The (nested) config that states a depth."""
        return value_at(self.teacher.config, path[:-1]) if len(path) > 1 else self.teacher.config


def signatures_at(model: PreTrainedModel, depth: Depth, size: int) -> list[tuple[ModuleSignature, ...]]:
    """Return the kinds of the blocks of one depth, for each block one of every stack."""
    return list(zip(*(stack_signatures(model, stack, size) for stack in depth.stacks), strict=True))


def same_structure(teacher: Sequence[ModuleSignature], student: Sequence[ModuleSignature]) -> bool:
    """Whether blocks, one of every stack, have the same modules and parameters."""
    return all(had.structure == has.structure for had, has in zip(teacher, student, strict=True))


def same_signature(
    teacher: Sequence[ModuleSignature], student: Sequence[ModuleSignature], *, widths: bool = True
) -> bool:
    """Whether they have the same switches as well, and with `widths` the same sizes."""
    return not any(describe_difference(had, has, widths=widths) for had, has in zip(teacher, student, strict=True))


def _teacher_stacks(teacher: TeacherCheckpoint, layout: Layout) -> _TeacherStacks:
    depths = find_depths(teacher.config, teacher.model_class, layout)
    names = [strip_base_prefix(name, teacher.base_model_prefix) for name in teacher.weights.keys()]
    fields = find_block_fields(teacher.config, depths, layout.block_fields)
    return _TeacherStacks(teacher, layout, stack_sizes(layout, names), depths, fields)


def stack_depths(teacher: TeacherCheckpoint, layout: Layout) -> dict[ConfigPath, Depth]:
    """Return where a teacher's config states the depth of its stacks, by the path of the field."""
    return _teacher_stacks(teacher, layout).depths.depths


def resolve_blocks(
    teacher: TeacherCheckpoint,
    layout: Layout,
    config: PreTrainedConfig | None,
    overrides: Mapping[str, Any],
    options: PlanOptions,
    *,
    keywords: Collection[str] = (),
    influence: "Mapping[str, Sequence[float]] | None" = None,
) -> StudentBlocks:
    """Return the student's config and the blocks that feed it.

    Args:
        config: the student's own; what it says of its blocks stays, and blocks are chosen to fit. None takes the teacher's
            with `overrides`, and what goes by block follows the blocks.
        influence: by stack the influence of each of the teacher's blocks; until it is known the even choice stands in.

    Raises:
        ShapeError: no choice of blocks, or not the one that was named, fits what the student's config can state.
        OptionError: an unknown override, or blocks named wrongly.
    """
    asked = overridden_values(teacher.config, overrides) if config is None else {}
    if not _changes_blocks(teacher.config, config, asked, options):
        return StudentBlocks(config or derive_student_config(teacher.config, overrides, keywords=keywords))
    family = _teacher_stacks(teacher, layout)
    names = [strip_base_prefix(name, teacher.base_model_prefix) for name in teacher.weights.keys()]
    check_stack_names(options, [*family.sizes, *stage_names(layout, names)])
    student = config or derive_student_config(
        teacher.config, overrides, keywords=keywords, block_fields=family.fields, left=(FieldKind.AFTER,)
    )
    counts = {path: value_at(student, path) for path in family.depths.depths}
    wanted = {
        path: blocks
        for path, depth in family.depths.depths.items()
        if type(counts[path]) is int and (blocks := _requested_blocks(depth, counts, family, options)) is not None
    }
    if not wanted:
        return StudentBlocks(student)
    search = _BlockSearch(family, config, overrides, asked, keywords, options, influence or {}, wanted)
    return search.run()


def _changes_blocks(
    teacher: PreTrainedConfig,
    config: PreTrainedConfig | None,
    asked: Mapping[ConfigPath, Any],
    options: PlanOptions,
) -> bool:
    """Whether blocks are named, or a number that may be one of blocks changes."""
    if not isinstance(options.layer_selection, str):
        return True
    for prefix, part in iter_subconfigs(teacher):
        usual = part.attribute_map.get("num_hidden_layers", "num_hidden_layers")
        for name in {usual, *(name for name, value in vars(part).items() if type(value) is int)}:
            path = (*prefix, name)
            had = value_at(teacher, path)
            wanted = asked.get(path, had) if config is None else value_at(config, path)
            if wanted != had and (name == usual or name_words(name) & LAYER_WORDS):
                return True
    return False


def _requested_blocks(
    depth: Depth, counts: Mapping[ConfigPath, Any], family: _TeacherStacks, options: PlanOptions
) -> list[int] | None:
    """Return the blocks that are asked for, or that the choice by its rule gives; None where a stack stays as it is."""
    count, layers = counts[depth.path], options.layer_selection
    names = [stack.removesuffix(".{block}") for stack in depth.stacks]
    if count < 1:
        return None  # which is refused with the family's other sizes
    if isinstance(layers, str):
        return select_blocks(depth.size, count, layers, names[0]) if count != depth.size else None
    if isinstance(layers, Mapping):
        named = next((name for name in names if name in layers), None)
        if named is None:
            return (
                select_blocks(depth.size, count, LayerSelection.UNIFORM.value, names[0])
                if count != depth.size
                else None
            )
        return select_blocks(depth.size, count, layers, named)
    others = [path for path, other in family.depths.depths.items() if counts[path] != other.size]
    if others and depth.path not in others:
        return None  # a list is meant for the stacks whose number of blocks changes
    return select_blocks(depth.size, count, layers, names[0])


@dataclass
class _Candidate:
    """A student config for chosen blocks at the teacher's widths, and where its blocks do not fit what feeds them."""

    blocks: dict[ConfigPath, list[int]]
    left: tuple[FieldKind, ...] = ()
    values: dict[ConfigPath, Any] = field(default_factory=dict)
    kinds: dict[ConfigPath, list[tuple[ModuleSignature, ...]]] = field(default_factory=dict)
    refusal: str = ""
    misfits: dict[ConfigPath, list[tuple[int, str]]] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        return not self.refusal and not any(self.misfits.values())


@dataclass
class _BlockSearch:
    """The search for blocks and a config that go together."""

    family: _TeacherStacks
    config: PreTrainedConfig | None
    overrides: Mapping[str, Any]
    asked: Mapping[ConfigPath, Any]
    keywords: Collection[str]
    options: PlanOptions
    influence: Mapping[str, Sequence[float]]
    wanted: dict[ConfigPath, list[int]]
    notes: list[str] = field(default_factory=list)
    approximations: list[str] = field(default_factory=list)

    def run(self) -> StudentBlocks:
        """Return what was settled.

        Raises:
            ShapeError: nothing fits; with the reason, and of a named list with the nearest one that would.
        """
        blocks = {path: self._first_choice(path) for path in self.wanted}
        for path in blocks:
            self._refuse_broken_places(path, blocks[path])
        attempt = self._express(blocks)
        if not attempt.passed:
            attempt = self._move(attempt)
        student = self._student(attempt)
        if self.config is not None or self._fixed():
            attempt, student = self._fit_to_said(attempt, student)
        self._note_moves(attempt)
        self.approximations += [
            f"{'.'.join(path)}={value_at(self.family.teacher.config, path)!r} seems to name blocks and was left as it is: say "
            "how it goes by block with register_layout(block_fields=...)."
            for path in ambiguous_block_fields(self.family.teacher.config, self.family.fields)
        ]
        layers = {stack: attempt.blocks[path] for path in attempt.blocks for stack in self._depth(path).stacks}
        return StudentBlocks(student, layers, self.notes, self.approximations)

    def _depth(self, path: ConfigPath) -> Depth:
        return self.family.depths.depths[path]

    def _fixed(self) -> list[BlockField]:
        """The fields that go by block and that the user has said."""
        return [each for each in self.family.fields if each.path in self.asked and each.depth in self.wanted]

    def _is_named(self, path: ConfigPath) -> bool:
        """Whether the user has named the blocks of a depth."""
        layers = self.options.layer_selection
        if isinstance(layers, Mapping):
            return any(stack.removesuffix(".{block}") in layers for stack in self._depth(path).stacks)
        return not isinstance(layers, str)

    def _influence(self, path: ConfigPath) -> Sequence[float] | None:
        if self.options.layer_selection != LayerSelection.BLOCK_INFLUENCE:
            return None
        return next((self.influence[stack] for stack in self._depth(path).stacks if stack in self.influence), None)

    def _requirements(self, path: ConfigPath, *, every_kind: bool = True) -> BlockRequirements:
        """Return what a choice of blocks must satisfy, whatever its positions."""
        depth, part = self._depth(path), self.family.part(path)
        groups: list[frozenset[int]] = []
        by_structure: dict[Any, set[int]] = {}
        for block, kinds in enumerate(self.family.kinds[path]):
            by_structure.setdefault(tuple(kind.structure for kind in kinds), set()).add(block)
        if every_kind and 1 < len(by_structure) <= len(self.wanted[path]):
            groups += map(frozenset, by_structure.values())
        groups += [frozenset((block,)) for block in range(self._injections(path))]
        for each in self.family.fields:
            value = value_at(self.family.teacher.config, each.path)
            if each.depth == path and each.kind == FieldKind.AFTER and each.path not in self.asked:
                numbers = sorted({number % depth.size for number in ([value] if isinstance(value, int) else value)})
                groups += [
                    frozenset(range(start + 1, stop + 1)) for start, stop in zip([-1, *numbers], numbers, strict=False)
                ]
        needs = {block: frozenset((source,)) for block, source in kv_sharing_sources(part).items()}
        return BlockRequirements(tuple(groups), needs | shared_entry_sources(part, depth.size))

    def _injections(self, path: ConfigPath) -> int:
        """Return after how many of a text stack's first blocks features of images are added (Qwen3-VL's deepstack)."""
        if "text_config" not in path:
            return 0
        lists = [
            value_at(self.family.teacher.config, each.path)
            for each in self.family.fields
            if each.path[-1] == "deepstack_visual_indexes" and each.path[:-2] == path[: len(each.path) - 2]
        ]
        return max(map(len, lists), default=0)

    def _choose(
        self, path: ConfigPath, allowed: "Callable[[int, int], bool] | None" = None, *, every_kind: bool = True
    ) -> list[int] | None:
        """Return the best choice: of greatest influence where that is known, else nearest to what the rule gives."""
        requirements, wanted = self._requirements(path, every_kind=every_kind), self.wanted[path]
        influence = self._influence(path)
        if influence is not None:
            return most_influential_blocks(influence, len(wanted), requirements, allowed)
        return nearest_blocks(wanted, self._depth(path).size, requirements, allowed)

    def _refuse_broken_places(self, path: ConfigPath, blocks: Sequence[int]) -> None:
        """Refuse blocks without those that the forward pass itself counts from the start."""
        count = self._injections(path)
        if list(blocks[:count]) != list(range(count)):
            stack = self._depth(path).stacks[0].removesuffix(".{block}")
            nearest = self._choose(path) or list(range(len(blocks)))
            raise ShapeError(
                f"{stack}: features of images are added after each of the first {count} blocks, so the blocks kept must begin "
                f"with {list(range(count))}; found {list(blocks)}. The nearest such choice is {nearest}."
            )

    def _first_choice(self, path: ConfigPath) -> list[int]:
        wanted = self.wanted[path]
        if self._is_named(path):
            return wanted
        if self._influence(path) is None and not self._requirements(path).violation(wanted):
            return wanted
        return self._choose(path) or self._choose(path, every_kind=False) or wanted

    # -----------------------------------------------------------------------------------------------------------------

    def _derive(self, attempt: _Candidate, overrides: Mapping[str, Any]) -> PreTrainedConfig:
        merged = merge_nested(nest_paths(attempt.values), overrides)
        return derive_student_config(
            self.family.teacher.config,
            merged,
            keywords=self.keywords,
            blocks=attempt.blocks,
            block_fields=self.family.fields,
            left=attempt.left,
        )

    def _student(self, attempt: _Candidate) -> PreTrainedConfig:
        return self.config if self.config is not None else self._derive(attempt, self.overrides)

    def _try(self, attempt: _Candidate) -> _Candidate:
        """Build a student of the teacher's widths and compare its blocks with those that feed them."""
        try:
            config = self._derive(attempt, nest_paths({path: len(blocks) for path, blocks in attempt.blocks.items()}))
            model = meta_model(self.family.teacher.model_class, config)
        except (HfGuideError, *MODEL_ERRORS) as error:
            attempt.refusal = str(error).rstrip(".")
            return attempt
        for path, blocks in attempt.blocks.items():
            attempt.kinds[path] = signatures_at(model, self._depth(path), len(blocks))
            attempt.misfits[path] = self._misfits(path, blocks, attempt.kinds[path], widths=True)
        return attempt

    def _misfits(
        self, path: ConfigPath, blocks: Sequence[int], kinds: Sequence[tuple[ModuleSignature, ...]], *, widths: bool
    ) -> list[tuple[int, str]]:
        """Return the positions whose block cannot be made of what feeds it, and why."""
        sources = kv_sharing_sources(self.family.part(path))
        found = []
        for position, (block, student) in enumerate(zip(blocks, kinds, strict=True)):
            teacher = self.family.kinds[path][block]
            for stack, had, has in zip(self._depth(path).stacks, teacher, student, strict=True):
                reason = describe_difference(had, has, widths=widths)
                if reason and block in sources and sources[block] not in blocks[:position]:
                    source = self.family.kinds[path][sources[block]][0].tensor_names
                    if has.tensor_names <= had.tensor_names | source:
                        continue  # keys and values of its own, from the weights of the block that it took them from
                if reason and not self._is_read_elsewhere(stack, had, has):
                    found.append((position, f"the teacher's block {block} {reason}"))
        return found

    def _is_read_elsewhere(self, stack: str, had: ModuleSignature, has: ModuleSignature) -> bool:
        """Whether blocks differ only in what the layout takes from one block by its number, as T5's table of distances."""
        differing = had.tensor_names ^ has.tensor_names
        rows = [
            self.family.layout.find(f"{stack.replace('{block}', '0')}.{name}".replace("*", "0")) for name in differing
        ]
        return bool(rows) and all(row is not None and "block" not in row.numbers for row in rows)

    def _express(self, blocks: dict[ConfigPath, list[int]]) -> _Candidate:
        """Return the first way of setting the config that fits these blocks, or the last one tried."""
        attempt = self._try(_Candidate(blocks))
        if attempt.passed:
            return attempt
        ways = [_Candidate(blocks, COUNT_KINDS)]
        ways += [_Candidate(blocks, (), values) for values in self._fewer_shared(blocks)]
        ways += [_Candidate(blocks, (), values) for values in self._other_periods(blocks)]
        for other in ways:
            if self._try(other).passed:
                return other
        return attempt

    def _fewer_shared(self, blocks: Mapping[ConfigPath, list[int]]) -> Iterator[dict[ConfigPath, Any]]:
        """Yield smaller numbers of the last blocks that share, for where a block that they take from is not kept."""
        for each in self.family.fields:
            if each.kind == FieldKind.LAST and each.depth in blocks:
                value = value_at(self.family.teacher.config, each.path)
                most = remap_field(value, each.kind, blocks[each.depth], self._depth(each.depth).size)
                yield from ({each.path: fewer} for fewer in range(most - 1, -1, -1))

    def _other_periods(self, blocks: Mapping[ConfigPath, list[int]]) -> Iterator[dict[ConfigPath, Any]]:
        """Yield other periods and offsets that put the kept blocks' kinds where they are."""
        ways = [
            way
            for path in blocks
            for name, value in vars(self.family.part(path)).items()
            if type(value) is int and value > 0 and name_words(name) & PERIOD_WORDS
            for way in [list(self._periods(path, name, value, blocks[path]))]
            if way
        ]
        for combination in itertools.product(*ways):
            if combination:
                yield {path: value for values in combination for path, value in values.items()}

    def _periods(
        self, path: ConfigPath, name: str, period: int, blocks: Sequence[int]
    ) -> Iterator[dict[ConfigPath, Any]]:
        part, prefix = self.family.part(path), path[:-1]
        (word,) = tuple(name_words(name) & PERIOD_WORDS)[:1]
        offset_name = name.replace(word, "offset")
        offset = vars(part).get(offset_name)
        listed = [each for each in self.family.fields if each.depth == path and each.kind == FieldKind.NUMBERS]
        rules = [offset] if isinstance(offset, int) else [period - 1, 0]
        yield {}
        for start in rules:
            special = [position for position, block in enumerate(blocks) if block % period == start % period]
            first = special[0] if special else len(blocks)
            step = special[1] - first if len(special) > 1 else max(len(blocks), first + 1)
            if isinstance(offset, int):
                if step > first:
                    yield {(*prefix, name): step, (*prefix, offset_name): first}
            else:
                yield {(*prefix, name): first + 1 if start else step}
            for each in listed:  # with every block special but those that are listed
                named = set(value_at(self.family.teacher.config, each.path))
                kept = [position for position, block in enumerate(blocks) if position not in special or block in named]
                if not isinstance(offset, int):
                    yield {(*prefix, name): 1, each.path: kept}

    # -----------------------------------------------------------------------------------------------------------------

    def _move(self, attempt: _Candidate) -> _Candidate:
        """Return an attempt with other blocks that fits what the config builds at each position."""
        misfit = next((path for path, reasons in attempt.misfits.items() if reasons), next(iter(attempt.blocks)))
        nearest = None
        for left, alike in itertools.product((COUNT_KINDS, ()), (same_structure, same_signature)):
            start = self._try(_Candidate(attempt.blocks, left))
            for _ in range(3):  # for lists follow the blocks that were moved
                moved = self._moved(start, alike)
                start = self._try(_Candidate(moved, left)) if moved is not None else start
                if moved is None or start.passed:
                    break
            if start.passed:
                nearest = start
                break
        if nearest is not None and not any(
            self._is_named(path) and nearest.blocks[path] != attempt.blocks[path] for path in attempt.blocks
        ):
            return nearest
        raise ShapeError(self._refusal(attempt, misfit, nearest))

    def _moved(
        self, attempt: _Candidate, alike: Callable[[Sequence[ModuleSignature], Sequence[ModuleSignature]], bool]
    ) -> dict[ConfigPath, list[int]] | None:
        if attempt.refusal:
            return None
        moved = {}
        for path, kinds in attempt.kinds.items():

            def allowed(position: int, block: int, path: ConfigPath = path, kinds: Any = kinds) -> bool:
                return alike(self.family.kinds[path][block], kinds[position])

            blocks = self._choose(path, allowed) or self._choose(path, allowed, every_kind=False)
            if blocks is None:
                return None
            moved[path] = blocks
        return moved

    def _refusal(self, attempt: _Candidate, path: ConfigPath, nearest: _Candidate | None) -> str:
        stack = self._depth(path).stacks[0].removesuffix(".{block}")
        reasons = attempt.misfits.get(path) or []
        why = f"student block {reasons[0][0]}: {reasons[0][1]}" if reasons else attempt.refusal
        said = "named" if self._is_named(path) else "chosen"
        asked = f"The blocks {attempt.blocks[path]} {said} for {stack!r} cannot be a {type(self.family.part(path)).__name__}'s"
        advice = (
            f" The nearest blocks that can are {nearest.blocks[path]}: name those with layer_selection=."
            if nearest is not None and nearest.blocks[path] != attempt.blocks[path]
            else " No other choice of as many blocks was found that can; choose another number of blocks."
        )
        return f"{asked}: {why}.{advice}"

    def _fit_to_said(self, attempt: _Candidate, student: PreTrainedConfig) -> tuple[_Candidate, PreTrainedConfig]:
        """Choose blocks for the positions as the user's own config, or overridden fields, say they are."""
        try:
            model = meta_model(self.family.teacher.model_class, student)
        except MODEL_ERRORS:
            return attempt, student  # refused when the student is built, with the family's reason
        blocks = dict(attempt.blocks)
        for path in blocks:
            kinds = signatures_at(model, self._depth(path), len(blocks[path]))
            misfits = self._misfits(path, blocks[path], kinds, widths=False)
            if not misfits:
                continue

            def allowed(position: int, block: int, path: ConfigPath = path, kinds: Any = kinds) -> bool:
                return same_signature(self.family.kinds[path][block], kinds[position], widths=False)

            def loosely(position: int, block: int, path: ConfigPath = path, kinds: Any = kinds) -> bool:
                return same_structure(self.family.kinds[path][block], kinds[position])

            moved = self._choose(path, allowed, every_kind=False)
            if moved is not None and not self._is_named(path):
                blocks[path] = moved
                continue
            loose = self._choose(path, loosely, every_kind=False)
            stands = all(loosely(position, block) for position, block in enumerate(blocks[path]))
            if not stands and (loose is None or self._is_named(path)):
                nearest = _Candidate({**blocks, path: moved or loose or blocks[path]})
                raise ShapeError(self._refusal(dataclasses.replace(attempt, misfits={path: misfits}), path, nearest))
            if not stands and loose is not None:
                blocks[path] = loose
            left = self._misfits(path, blocks[path], kinds, widths=False)
            self.approximations += [
                f"{self._depth(path).stacks[0].removesuffix('.{block}')}.{position}: {reason}, as the student's config says."
                for position, reason in left
            ]
        return dataclasses.replace(attempt, blocks=blocks), student

    def _note_moves(self, attempt: _Candidate) -> None:
        for path, blocks in attempt.blocks.items():
            wanted = self.wanted[path]
            influence = self._influence(path)
            if influence is not None:
                free = most_influential_blocks(influence, len(wanted))
                wanted = free if free is not None else wanted
            elif self.options.layer_selection == LayerSelection.BLOCK_INFLUENCE:
                continue
            if blocks != wanted:
                stack = self._depth(path).stacks[0].removesuffix(".{block}")
                self.notes.append(
                    f"{stack}: the choice by {self.options.layer_selection!r} alone is {wanted}; the nearest that the config can "
                    f"state, with a block of each kind, is {blocks}."
                )


PERIOD_WORDS = frozenset(("period", "freq", "frequency", "interval", "step", "every", "pattern"))


def nest_paths(values: Mapping[ConfigPath, Any]) -> dict[str, Any]:
    """Return values by path as nested mappings."""
    nested: dict[str, Any] = {}
    for path, value in values.items():
        inner = nested
        for name in path[:-1]:
            inner = inner.setdefault(name, {})
        inner[path[-1]] = value
    return nested


def merge_nested(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Return two nested mappings as one; of values that both have, the second's."""
    merged = dict(first)
    for name, value in second.items():
        had = merged.get(name)
        both = isinstance(had, Mapping) and isinstance(value, Mapping)
        merged[name] = merge_nested(had, value) if both else value  # type: ignore[arg-type]
    return merged
