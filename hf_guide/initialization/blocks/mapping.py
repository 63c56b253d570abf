"""Determine a student's config and the teacher's blocks that feed it together, because each depends on the other.

The overrides and options give the number of blocks of each stack, and how they are selected. The selection is compared with
what the config can express; where it cannot, the nearest selection that it can is used, and the report notes it. An explicit
list is never changed: it is an error, which names the nearest admissible list.
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
from hf_guide.initialization.blocks.stacks import check_stack_names, stack_sizes, stage_names
from hf_guide.initialization.config import MEASURED_SELECTIONS, LayerSelection, PlanOptions
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
    """A student's config and the teacher's blocks that feed it.

    Attributes:
        layers: by stack, the teacher's block that feeds each of the student's.
        notes: for the report, how they were selected.
        approximations: what the config cannot express of the blocks that feed it.
    """

    config: PreTrainedConfig
    layers: dict[str, list[int]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    approximations: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _TeacherStacks:
    """A teacher's stacks, their depths and the config fields that depend on them."""

    teacher: TeacherCheckpoint
    layout: Layout
    sizes: dict[str, int]
    depths: StackDepths
    fields: list[BlockField]

    @functools.cached_property
    def kinds(self) -> dict[ConfigPath, list[tuple[ModuleSignature, ...]]]:
        """The signatures of the teacher's blocks, by depth: for each block one of every stack of that depth."""
        assert self.depths.model is not None
        return {
            path: signatures_at(self.depths.model, depth, depth.size) for path, depth in self.depths.depths.items()
        }

    def part(self, path: ConfigPath) -> PreTrainedConfig:
        """Return the (nested) config that a depth is a field of."""
        return value_at(self.teacher.config, path[:-1]) if len(path) > 1 else self.teacher.config


def signatures_at(model: PreTrainedModel, depth: Depth, size: int) -> list[tuple[ModuleSignature, ...]]:
    """Return the signatures of the blocks of one depth: for each block one of every stack."""
    return list(zip(*(stack_signatures(model, stack, size) for stack in depth.stacks), strict=True))


def same_structure(teacher: Sequence[ModuleSignature], student: Sequence[ModuleSignature]) -> bool:
    """Return whether blocks, one of every stack, have the same modules and parameters."""
    return all(
        teacher_kind.structure == student_kind.structure
        for teacher_kind, student_kind in zip(teacher, student, strict=True)
    )


def same_signature(
    teacher: Sequence[ModuleSignature], student: Sequence[ModuleSignature], *, widths: bool = True
) -> bool:
    """Return whether they have the same switches as well and, with `widths`, the same sizes."""
    return not any(
        describe_difference(teacher_kind, student_kind, widths=widths)
        for teacher_kind, student_kind in zip(teacher, student, strict=True)
    )


def _teacher_stacks(teacher: TeacherCheckpoint, layout: Layout) -> _TeacherStacks:
    depths = find_depths(teacher.config, teacher.model_class, layout)
    names = [strip_base_prefix(name, teacher.base_model_prefix) for name in teacher.weights.keys()]
    fields = find_block_fields(teacher.config, depths, layout.block_fields)
    return _TeacherStacks(teacher, layout, stack_sizes(layout, names), depths, fields)


def stack_depths(teacher: TeacherCheckpoint, layout: Layout) -> dict[ConfigPath, Depth]:
    """Return the depths of a teacher's stacks, by the path of the config's field."""
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
        config: the user's own student config; blocks are selected to fit it. None is the teacher's with `overrides`, whose
            fields that depend on the blocks are remapped.
        influence: by stack the influence of each of the teacher's blocks; until it is known, blocks are evenly spaced.

    Raises:
        ShapeError: the student's config can express no selection of blocks, or not the explicit one.
        OptionError: an unknown override, or an invalid list of blocks.
    """
    overridden = overridden_values(teacher.config, overrides) if config is None else {}
    if not _changes_blocks(teacher.config, config, overridden, options):
        return StudentBlocks(config or derive_student_config(teacher.config, overrides, keywords=keywords))
    teacher_stacks = _teacher_stacks(teacher, layout)
    names = [strip_base_prefix(name, teacher.base_model_prefix) for name in teacher.weights.keys()]
    check_stack_names(options, [*teacher_stacks.sizes, *stage_names(layout, names)])
    student = config or derive_student_config(
        teacher.config, overrides, keywords=keywords, block_fields=teacher_stacks.fields, left=(FieldKind.AFTER,)
    )
    counts = {path: value_at(student, path) for path in teacher_stacks.depths.depths}
    requested = {
        path: blocks
        for path, depth in teacher_stacks.depths.depths.items()
        if type(counts[path]) is int
        and (blocks := _requested_blocks(depth, counts, teacher_stacks, options)) is not None
    }
    if not requested:
        return StudentBlocks(student)
    search = _BlockSearch(teacher_stacks, config, overrides, overridden, keywords, options, influence or {}, requested)
    return search.run()


def _changes_blocks(
    teacher: PreTrainedConfig,
    config: PreTrainedConfig | None,
    overridden: Mapping[ConfigPath, Any],
    options: PlanOptions,
) -> bool:
    """Return whether blocks are listed, or a number changes that may be a number of blocks."""
    if not isinstance(options.layer_selection, str):
        return True
    for prefix, part in iter_subconfigs(teacher):
        standard = part.attribute_map.get("num_hidden_layers", "num_hidden_layers")
        for name in {standard, *(name for name, value in vars(part).items() if type(value) is int)}:
            path = (*prefix, name)
            teacher_value = value_at(teacher, path)
            student_value = overridden.get(path, teacher_value) if config is None else value_at(config, path)
            if student_value != teacher_value and (name == standard or name_words(name) & LAYER_WORDS):
                return True
    return False


def _requested_blocks(
    depth: Depth, counts: Mapping[ConfigPath, Any], teacher_stacks: _TeacherStacks, options: PlanOptions
) -> list[int] | None:
    """Return the blocks that are listed, or that the rule of selection gives; None where a stack does not change."""
    count, layers = counts[depth.path], options.layer_selection
    names = [stack.removesuffix(".{block}") for stack in depth.stacks]
    if count < 1:
        return None  # an error that `validate_student_config` raises
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
    others = [path for path, other in teacher_stacks.depths.depths.items() if counts[path] != other.size]
    if others and depth.path not in others:
        return None  # a list is for the stacks whose number of blocks changes
    return select_blocks(depth.size, count, layers, names[0])


@dataclass
class _Candidate:
    """A student config for selected blocks at the teacher's widths, and how its blocks differ from those that feed them.

    Attributes:
        blocks: the selected blocks, by depth.
        unchanged: kinds of fields that keep the teacher's value.
        values: other overrides that were tried, by path.
        kinds: the signatures of the student's blocks.
        error: why the config or the model cannot be built; "" where it can.
        mismatches: positions whose block cannot be initialized from the one that feeds it, and why.
    """

    blocks: dict[ConfigPath, list[int]]
    unchanged: tuple[FieldKind, ...] = ()
    values: dict[ConfigPath, Any] = field(default_factory=dict)
    kinds: dict[ConfigPath, list[tuple[ModuleSignature, ...]]] = field(default_factory=dict)
    error: str = ""
    mismatches: dict[ConfigPath, list[tuple[int, str]]] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether the config can be built and every block fits."""
        return not self.error and not any(self.mismatches.values())


@dataclass
class _BlockSearch:
    """The search for blocks and a config that fit each other."""

    stacks: _TeacherStacks
    config: PreTrainedConfig | None
    overrides: Mapping[str, Any]
    overridden: Mapping[ConfigPath, Any]
    keywords: Collection[str]
    options: PlanOptions
    influence: Mapping[str, Sequence[float]]
    requested: dict[ConfigPath, list[int]]
    notes: list[str] = field(default_factory=list)
    approximations: list[str] = field(default_factory=list)

    def run(self) -> StudentBlocks:
        """Return the config and the blocks.

        Raises:
            ShapeError: nothing fits; with the reason and, for an explicit list, the nearest admissible one.
        """
        blocks = {path: self._first_choice(path) for path in self.requested}
        for path in blocks:
            self._check_injections(path, blocks[path])
        candidate = self._find_config(blocks)
        if not candidate.passed:
            candidate = self._find_admissible(candidate)
        student = self._student(candidate)
        if self.config is not None or self._overridden_fields():
            candidate, student = self._fit_to_user_config(candidate, student)
        self._note_changes(candidate)
        self.approximations += [
            f"{'.'.join(path)}={value_at(self.stacks.teacher.config, path)!r} seems to list blocks and was not changed: "
            "declare how it depends on them with register_layout(block_fields=...)."
            for path in ambiguous_block_fields(self.stacks.teacher.config, self.stacks.fields)
        ]
        layers = {stack: candidate.blocks[path] for path in candidate.blocks for stack in self._depth(path).stacks}
        return StudentBlocks(student, layers, self.notes, self.approximations)

    def _depth(self, path: ConfigPath) -> Depth:
        return self.stacks.depths.depths[path]

    def _overridden_fields(self) -> list[BlockField]:
        """The fields that depend on the blocks and that the user overrides."""
        return [each for each in self.stacks.fields if each.path in self.overridden and each.depth in self.requested]

    def _is_explicit(self, path: ConfigPath) -> bool:
        """Return whether the user lists the blocks of a depth."""
        layers = self.options.layer_selection
        if isinstance(layers, Mapping):
            return any(stack.removesuffix(".{block}") in layers for stack in self._depth(path).stacks)
        return not isinstance(layers, str)

    def _influence(self, path: ConfigPath) -> Sequence[float] | None:
        if self.options.layer_selection not in MEASURED_SELECTIONS:
            return None
        return next((self.influence[stack] for stack in self._depth(path).stacks if stack in self.influence), None)

    def _requirements(self, path: ConfigPath, *, every_kind: bool = True) -> BlockRequirements:
        """Return what a selection of blocks must satisfy, whatever the positions."""
        depth, part = self._depth(path), self.stacks.part(path)
        groups: list[frozenset[int]] = []
        by_structure: dict[Any, set[int]] = {}
        for block, kinds in enumerate(self.stacks.kinds[path]):
            by_structure.setdefault(tuple(kind.structure for kind in kinds), set()).add(block)
        if every_kind and 1 < len(by_structure) <= len(self.requested[path]):
            groups += map(frozenset, by_structure.values())
        groups += [frozenset((block,)) for block in range(self._num_injections(path))]
        for each in self.stacks.fields:
            value = value_at(self.stacks.teacher.config, each.path)
            if each.depth == path and each.kind == FieldKind.AFTER and each.path not in self.overridden:
                numbers = sorted({number % depth.size for number in ([value] if isinstance(value, int) else value)})
                groups += [
                    frozenset(range(start + 1, stop + 1)) for start, stop in zip([-1, *numbers], numbers, strict=False)
                ]
        needs = {block: frozenset((source,)) for block, source in kv_sharing_sources(part).items()}
        return BlockRequirements(tuple(groups), needs | shared_entry_sources(part, depth.size))

    def _num_injections(self, path: ConfigPath) -> int:
        """Return after how many of a text stack's first blocks image features are added (Qwen3-VL's deepstack)."""
        if "text_config" not in path:
            return 0
        lists = [
            value_at(self.stacks.teacher.config, each.path)
            for each in self.stacks.fields
            if each.path[-1] == "deepstack_visual_indexes" and each.path[:-2] == path[: len(each.path) - 2]
        ]
        return max(map(len, lists), default=0)

    def _choose(
        self, path: ConfigPath, allowed: "Callable[[int, int], bool] | None" = None, *, every_kind: bool = True
    ) -> list[int] | None:
        """Return the best selection: of greatest influence where that is known, else nearest to the requested blocks."""
        requirements, requested = self._requirements(path, every_kind=every_kind), self.requested[path]
        influence = self._influence(path)
        if influence is not None:
            return most_influential_blocks(influence, len(requested), requirements, allowed)
        return nearest_blocks(requested, self._depth(path).size, requirements, allowed)

    def _check_injections(self, path: ConfigPath, blocks: Sequence[int]) -> None:
        """Check that the first blocks, to whose output the forward pass adds image features, are selected."""
        count = self._num_injections(path)
        if list(blocks[:count]) != list(range(count)):
            stack = self._depth(path).stacks[0].removesuffix(".{block}")
            nearest = self._choose(path) or list(range(len(blocks)))
            raise ShapeError(
                f"{stack}: image features are added after each of the first {count} blocks, so the selected blocks must begin "
                f"with {list(range(count))}; found {list(blocks)}. The nearest such selection is {nearest}."
            )

    def _first_choice(self, path: ConfigPath) -> list[int]:
        requested = self.requested[path]
        if self._is_explicit(path):
            return requested
        if self._influence(path) is None and not self._requirements(path).violation(requested):
            return requested
        return self._choose(path) or self._choose(path, every_kind=False) or requested

    # -----------------------------------------------------------------------------------------------------------------

    def _derive(self, candidate: _Candidate, overrides: Mapping[str, Any]) -> PreTrainedConfig:
        merged = merge_nested(nest_paths(candidate.values), overrides)
        return derive_student_config(
            self.stacks.teacher.config,
            merged,
            keywords=self.keywords,
            blocks=candidate.blocks,
            block_fields=self.stacks.fields,
            left=candidate.unchanged,
        )

    def _student(self, candidate: _Candidate) -> PreTrainedConfig:
        return self.config if self.config is not None else self._derive(candidate, self.overrides)

    def _try(self, candidate: _Candidate) -> _Candidate:
        """Build a student of the teacher's widths and compare its blocks with those that feed them."""
        try:
            config = self._derive(
                candidate, nest_paths({path: len(blocks) for path, blocks in candidate.blocks.items()})
            )
            model = meta_model(self.stacks.teacher.model_class, config)
        except (HfGuideError, *MODEL_ERRORS) as error:
            candidate.error = str(error).rstrip(".")
            return candidate
        for path, blocks in candidate.blocks.items():
            candidate.kinds[path] = signatures_at(model, self._depth(path), len(blocks))
            candidate.mismatches[path] = self._find_mismatches(path, blocks, candidate.kinds[path], widths=True)
        return candidate

    def _find_mismatches(
        self, path: ConfigPath, blocks: Sequence[int], kinds: Sequence[tuple[ModuleSignature, ...]], *, widths: bool
    ) -> list[tuple[int, str]]:
        """Return the positions whose block cannot be initialized from the one that feeds it, and why."""
        sources = kv_sharing_sources(self.stacks.part(path))
        mismatches = []
        for position, (block, student) in enumerate(zip(blocks, kinds, strict=True)):
            teacher = self.stacks.kinds[path][block]
            for stack, teacher_kind, student_kind in zip(self._depth(path).stacks, teacher, student, strict=True):
                reason = describe_difference(teacher_kind, student_kind, widths=widths)
                if reason and block in sources and sources[block] not in blocks[:position]:
                    source = self.stacks.kinds[path][sources[block]][0].tensor_names
                    if student_kind.tensor_names <= teacher_kind.tensor_names | source:
                        continue  # its own keys and values, from the weights of the block that shared them
                if reason and not self._is_shared_tensor(stack, teacher_kind, student_kind):
                    mismatches.append((position, f"the teacher's block {block} {reason}"))
        return mismatches

    def _is_shared_tensor(self, stack: str, teacher_kind: ModuleSignature, student_kind: ModuleSignature) -> bool:
        """Return whether blocks differ only in tensors that one block holds for all (T5's relative positions)."""
        differing = teacher_kind.tensor_names ^ student_kind.tensor_names
        rows = [
            self.stacks.layout.find(f"{stack.replace('{block}', '0')}.{name}".replace("*", "0")) for name in differing
        ]
        return bool(rows) and all(row is not None and "block" not in row.numbers for row in rows)

    def _find_config(self, blocks: dict[ConfigPath, list[int]]) -> _Candidate:
        """Return the first config that fits these blocks, or the plainest one with its mismatches."""
        candidate = self._try(_Candidate(blocks))
        if candidate.passed:
            return candidate
        ways = [_Candidate(blocks, COUNT_KINDS)]
        ways += [_Candidate(blocks, (), values) for values in self._smaller_shared_counts(blocks)]
        ways += [_Candidate(blocks, (), values) for values in self._other_periods(blocks)]
        for other in ways:
            if self._try(other).passed:
                return other
        return candidate

    def _smaller_shared_counts(self, blocks: Mapping[ConfigPath, list[int]]) -> Iterator[dict[ConfigPath, Any]]:
        """Yield smaller counts of the last blocks that share, for where the block that they share with is not selected."""
        for each in self.stacks.fields:
            if each.kind == FieldKind.LAST and each.depth in blocks:
                value = value_at(self.stacks.teacher.config, each.path)
                most = remap_field(value, each.kind, blocks[each.depth], self._depth(each.depth).size)
                yield from ({each.path: fewer} for fewer in range(most - 1, -1, -1))

    def _other_periods(self, blocks: Mapping[ConfigPath, list[int]]) -> Iterator[dict[ConfigPath, Any]]:
        """Yield other periods and offsets that give every position the kind of its selected block."""
        ways = [
            way
            for path in blocks
            for name, value in vars(self.stacks.part(path)).items()
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
        part, prefix = self.stacks.part(path), path[:-1]
        (word,) = tuple(name_words(name) & PERIOD_WORDS)[:1]
        offset_name = name.replace(word, "offset")
        offset = vars(part).get(offset_name)
        listed = [each for each in self.stacks.fields if each.depth == path and each.kind == FieldKind.NUMBERS]
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
            for each in listed:  # every block is special except the listed ones
                listed_blocks = set(value_at(self.stacks.teacher.config, each.path))
                special_positions = [
                    position
                    for position, block in enumerate(blocks)
                    if position not in special or block in listed_blocks
                ]
                if not isinstance(offset, int):
                    yield {(*prefix, name): 1, each.path: special_positions}

    # -----------------------------------------------------------------------------------------------------------------

    def _find_admissible(self, candidate: _Candidate) -> _Candidate:
        """Return a candidate with other blocks, of the kinds that the config builds at each position.

        Raises:
            ShapeError: there is none, or the blocks are the user's own list.
        """
        mismatched = next(
            (path for path, reasons in candidate.mismatches.items() if reasons), next(iter(candidate.blocks))
        )
        nearest = None
        for unchanged, same_kind in itertools.product((COUNT_KINDS, ()), (same_structure, same_signature)):
            trial = self._try(_Candidate(candidate.blocks, unchanged))
            for _ in range(3):  # lists follow the blocks that were replaced
                reselected = self._reselect(trial, same_kind)
                trial = self._try(_Candidate(reselected, unchanged)) if reselected is not None else trial
                if reselected is None or trial.passed:
                    break
            if trial.passed:
                nearest = trial
                break
        if nearest is not None and not any(
            self._is_explicit(path) and nearest.blocks[path] != candidate.blocks[path] for path in candidate.blocks
        ):
            return nearest
        raise ShapeError(self._error_text(candidate, mismatched, nearest))

    def _reselect(
        self, candidate: _Candidate, same_kind: Callable[[Sequence[ModuleSignature], Sequence[ModuleSignature]], bool]
    ) -> dict[ConfigPath, list[int]] | None:
        if candidate.error:
            return None
        reselected = {}
        for path, kinds in candidate.kinds.items():

            def allowed(position: int, block: int, path: ConfigPath = path, kinds: Any = kinds) -> bool:
                return same_kind(self.stacks.kinds[path][block], kinds[position])

            blocks = self._choose(path, allowed) or self._choose(path, allowed, every_kind=False)
            if blocks is None:
                return None
            reselected[path] = blocks
        return reselected

    def _error_text(self, candidate: _Candidate, path: ConfigPath, nearest: _Candidate | None) -> str:
        stack = self._depth(path).stacks[0].removesuffix(".{block}")
        reasons = candidate.mismatches.get(path) or []
        why = f"student block {reasons[0][0]}: {reasons[0][1]}" if reasons else candidate.error
        origin = "listed" if self._is_explicit(path) else "selected"
        kind = type(self.stacks.part(path)).__name__
        problem = f"The blocks {candidate.blocks[path]} {origin} for {stack!r} cannot be those of a {kind}"
        advice = (
            f" The nearest blocks that can be are {nearest.blocks[path]}: pass them as layer_selection."
            if nearest is not None and nearest.blocks[path] != candidate.blocks[path]
            else " No other selection of as many blocks was found; choose another number of blocks."
        )
        return f"{problem}: {why}.{advice}"

    def _fit_to_user_config(
        self, candidate: _Candidate, student: PreTrainedConfig
    ) -> tuple[_Candidate, PreTrainedConfig]:
        """Select blocks of the kinds that the user's own config, or overridden fields, give each position."""
        try:
            model = meta_model(self.stacks.teacher.model_class, student)
        except MODEL_ERRORS:
            return candidate, student  # the family's own error is raised when the student is built
        blocks = dict(candidate.blocks)
        for path in blocks:
            kinds = signatures_at(model, self._depth(path), len(blocks[path]))
            mismatches = self._find_mismatches(path, blocks[path], kinds, widths=False)
            if not mismatches:
                continue

            def allowed(position: int, block: int, path: ConfigPath = path, kinds: Any = kinds) -> bool:
                return same_signature(self.stacks.kinds[path][block], kinds[position], widths=False)

            def allowed_structure(position: int, block: int, path: ConfigPath = path, kinds: Any = kinds) -> bool:
                return same_structure(self.stacks.kinds[path][block], kinds[position])

            reselected = self._choose(path, allowed, every_kind=False)
            if reselected is not None and not self._is_explicit(path):
                blocks[path] = reselected
                continue
            same_structured = self._choose(path, allowed_structure, every_kind=False)
            fits = all(allowed_structure(position, block) for position, block in enumerate(blocks[path]))
            if not fits and (same_structured is None or self._is_explicit(path)):
                nearest = _Candidate({**blocks, path: reselected or same_structured or blocks[path]})
                raise ShapeError(
                    self._error_text(dataclasses.replace(candidate, mismatches={path: mismatches}), path, nearest)
                )
            if not fits and same_structured is not None:
                blocks[path] = same_structured
            remaining = self._find_mismatches(path, blocks[path], kinds, widths=False)
            self.approximations += [
                f"{self._depth(path).stacks[0].removesuffix('.{block}')}.{position}: {reason}, by the student's config."
                for position, reason in remaining
            ]
        return dataclasses.replace(candidate, blocks=blocks), student

    def _note_changes(self, candidate: _Candidate) -> None:
        for path, blocks in candidate.blocks.items():
            requested = self.requested[path]
            influence = self._influence(path)
            if influence is not None:
                free = most_influential_blocks(influence, len(requested))
                requested = free if free is not None else requested
            elif self.options.layer_selection in MEASURED_SELECTIONS:
                continue
            if blocks != requested:
                stack = self._depth(path).stacks[0].removesuffix(".{block}")
                self.notes.append(
                    f"{stack}: the selection by {self.options.layer_selection!r} alone is {requested}; the nearest that "
                    f"the config can express, with a block of each kind, is {blocks}."
                )


PERIOD_WORDS = frozenset(("period", "freq", "frequency", "interval", "step", "every", "pattern"))


def nest_paths(values: Mapping[ConfigPath, Any]) -> dict[str, Any]:
    """Return values by path as nested mappings.

    Example:
        >>> nest_paths({("text_config", "num_hidden_layers"): 2})
        {'text_config': {'num_hidden_layers': 2}}
    """
    nested: dict[str, Any] = {}
    for path, value in values.items():
        inner = nested
        for name in path[:-1]:
            inner = inner.setdefault(name, {})
        inner[path[-1]] = value
    return nested


def merge_nested(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Return two nested mappings merged into one; the second takes precedence."""
    merged = dict(first)
    for name, value in second.items():
        present = merged.get(name)
        both = isinstance(present, Mapping) and isinstance(value, Mapping)
        merged[name] = merge_nested(present, value) if both else value  # type: ignore[arg-type]
    return merged
