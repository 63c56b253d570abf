"""Choose the teacher's blocks that feed a student's, among those whose kinds its config can state.

Blocks are of one kind when they are built alike: the same modules, parameters and switches. A choice is admissible when the
student's config, its fields by block set for these blocks, builds at every position a block of the kind that feeds it. All
of that is found from models on the meta device, so before any weight is read and any calibration data is run.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from hf_guide.initialization.block_indices import LAYER_WORDS, words

_OF_THE_PLACE = frozenset(("idx", "index", "id", "number", "num"))
_WITHOUT_EFFECT = frozenset(("training", "store_full_length_kv", "gradient_checkpointing"))


@dataclass(frozen=True)
class BlockKind:
    """What a block is built like.

    Attributes:
        structure: its modules, their classes and the names of their tensors, whatever the widths.
        switches: booleans, strings and None by module and name: such as a kind of attention.
        sizes: the shapes of its tensors, and whole numbers by module and name: such as a window.
    """

    structure: frozenset[tuple[str, str, tuple[str, ...]]]
    switches: frozenset[tuple[str, str, Any]]
    sizes: frozenset[tuple[str, str, Any]]


def block_kind(block: nn.Module) -> BlockKind:
    """Return what a block is built like; its number and constants computed from it are no part of that."""
    structure: list[tuple[str, str, tuple[str, ...]]] = []
    switches: list[tuple[str, str, Any]] = []
    sizes: list[tuple[str, str, Any]] = []
    for full, module in block.named_modules():
        name = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", full)  # of how many a list is made is a size
        if "drop" in f"{name} {type(module).__name__}".lower():
            continue  # at a rate of zero often another class
        structure.append((name, type(module).__name__, tuple(sorted(key for key, _ in _tensors(module)))))
        sizes += [(name, key, tuple(tensor.shape)) for key, tensor in _tensors(module)]
        for key, value in vars(module).items():
            if key.startswith("_") or key in _WITHOUT_EFFECT:
                continue
            if value is None or isinstance(value, (bool, str)):
                switches.append((name, key, value))
            elif isinstance(value, int) and not _is_place(key):
                sizes.append((name, key, value))
    return BlockKind(frozenset(structure), frozenset(switches), frozenset(sizes))


def _tensors(module: nn.Module) -> list[tuple[str, Any]]:
    return [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]


def _is_place(name: str) -> bool:
    meaning = words(name)
    return bool(meaning & _OF_THE_PLACE) and bool(meaning & LAYER_WORDS or len(meaning) == 1)


def block_modules(model: PreTrainedModel, stack: str, size: int) -> list[nn.Module]:
    """Return the modules of a stack, given by a layout's pattern such as "layers.{block}"."""
    prefix = model.base_model_prefix
    base = getattr(model, prefix, None) if prefix else None
    for root in (base, model):
        if not isinstance(root, nn.Module):
            continue
        try:
            return [root.get_submodule(stack.replace("{block}", str(number))) for number in range(size)]
        except AttributeError:
            continue
    return []


def kinds_of_stack(model: PreTrainedModel, stack: str, size: int) -> list[BlockKind]:
    """Return the kind of each block of a stack; a number that no two blocks share is a place and no size."""
    kinds = [block_kind(block) for block in block_modules(model, stack, size)]
    seen: dict[tuple[str, str], list[Any]] = {}
    for kind in kinds:
        for name, key, value in kind.sizes:
            seen.setdefault((name, key), []).append(value)
    places = {at for at, values in seen.items() if len(values) > 2 and len(set(values)) == len(values)}
    return [
        BlockKind(
            kind.structure,
            kind.switches,
            frozenset(entry for entry in kind.sizes if (entry[0], entry[1]) not in places),
        )
        for kind in kinds
    ]


def difference(teacher: BlockKind, student: BlockKind, *, widths: bool) -> str:
    """Return in what two blocks differ, in words; "" where one can be made of the other."""
    had, has = parameters_of(teacher), parameters_of(student)
    if had != has:
        lacking = [f"has no {name}" for name in sorted(has - had)[:1]]
        more = [f"has {name}, for which the student's has no place" for name in sorted(had - has)[:1]]
        return " and ".join(lacking + more)
    if teacher.structure != student.structure:
        modules = dict((name, kind) for name, kind, _ in student.structure)
        name, kind, _ = min(teacher.structure - student.structure)
        return f"has a {kind} at {name or 'its root'}, the student's a {modules.get(name, 'nothing')}"
    pairs = [(teacher.switches, student.switches)] + [(teacher.sizes, student.sizes)] * widths
    for theirs, ours in pairs:
        other = {(name, key): value for name, key, value in ours}
        for name, key, value in sorted(theirs - ours, key=str):
            return f"has {'.'.join(filter(None, (name, key)))}={value!r}, the student's {other.get((name, key))!r}"
    return ""


def parameters_of(kind: BlockKind) -> set[str]:
    """Return the names of a block's tensors."""
    return {f"{name}.{key}".removeprefix(".") for name, _, keys in kind.structure for key in keys}


@dataclass(frozen=True)
class Requirements:
    """What a set of kept blocks must satisfy.

    Attributes:
        groups: of each group of blocks at least one is kept.
        needs: a block that is kept only where one of these is kept before it.
    """

    groups: tuple[frozenset[int], ...] = ()
    needs: Mapping[int, frozenset[int]] = None  # type: ignore[assignment]

    def broken_by(self, blocks: Sequence[int]) -> str:
        """Return what a choice does not satisfy, "" where it is all."""
        for group in self.groups:
            if not group & set(blocks):
                return f"at least one of the blocks {_listed(group)} must be kept"
        for place, block in enumerate(blocks):
            sources = (self.needs or {}).get(block)
            if sources and not sources & set(blocks[:place]):
                return (
                    f"block {block} needs one of {_listed(sources)}, from which it takes keys and values or an index"
                )
        return ""


def _listed(blocks: Iterable[int]) -> list[int]:
    return sorted(blocks)


def best_blocks(
    depth: int,
    count: int,
    cost: Callable[[int, int], Fraction | int],
    requirements: Requirements,
    allowed: "Callable[[int, int], bool] | None" = None,
) -> list[int] | None:
    """Return the increasing choice of `count` of `depth` blocks of least total cost, None where there is none.

    Args:
        cost: of a block at a position, exact numbers; `cost(position, block)`.
        allowed: whether a block may be at a position. Of equal choices the first in lexicographic order is returned.
    """
    needed = [*requirements.groups]
    sources = list(dict.fromkeys((requirements.needs or {}).values()))
    bits = [*needed, *sources]
    mask_of = [sum(1 << bit for bit, group in enumerate(bits) if block in group) for block in range(depth)]
    final = (1 << len(needed)) - 1
    best: dict[tuple[int, int], tuple[Any, tuple[int, ...]]] = {(0, 0): (0, ())}
    for block in range(depth):
        source = (requirements.needs or {}).get(block)
        required = 0 if source is None else 1 << (len(needed) + sources.index(source))
        extended = dict(best)
        for (position, mask), (total, chosen) in best.items():
            if position == count or mask & required != required:
                continue
            if allowed is not None and not allowed(position, block):
                continue
            state = (position + 1, mask | mask_of[block])
            found = (total + cost(position, block), (*chosen, block))
            if state not in extended or found < extended[state]:
                extended[state] = found
        best = {state: found for state, found in extended.items() if count - state[0] <= depth - block - 1}
    done = [found for (position, mask), found in best.items() if position == count and mask & final == final]
    return list(min(done)[1]) if done else None


def nearest_blocks(
    wanted: Sequence[int],
    depth: int,
    requirements: Requirements,
    allowed: "Callable[[int, int], bool] | None" = None,
) -> list[int] | None:
    """Return the admissible choice whose blocks lie nearest to `wanted`, by the sum of squared distances."""
    return best_blocks(
        depth, len(wanted), lambda position, block: (wanted[position] - block) ** 2, requirements, allowed
    )


def most_influential(
    influence: Sequence[float],
    count: int,
    requirements: Requirements = Requirements(),  # noqa: B008
    allowed: "Callable[[int, int], bool] | None" = None,
) -> list[int] | None:
    """Return the admissible choice of greatest total influence; of equals the first."""
    exact = [Fraction(value) for value in influence]
    return best_blocks(len(exact), count, lambda position, block: -exact[block], requirements, allowed)
