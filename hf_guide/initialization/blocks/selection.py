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

from hf_guide.initialization.blocks.config_fields import LAYER_WORDS, name_words

_BLOCK_NUMBER_WORDS = frozenset(("idx", "index", "id", "number", "num"))
_INERT_ATTRIBUTES = frozenset(("training", "store_full_length_kv", "gradient_checkpointing"))


@dataclass(frozen=True)
class BlockSignature:
    """What a block is built like.

    Attributes:
        structure: its modules, their classes and the names of their tensors, whatever the widths.
        switches: booleans, strings and None by module and name: such as a kind of attention.
        sizes: the shapes of its tensors, and whole numbers by module and name: such as a window.
    """

    structure: frozenset[tuple[str, str, tuple[str, ...]]]
    switches: frozenset[tuple[str, str, Any]]
    sizes: frozenset[tuple[str, str, Any]]


def block_signature(block: nn.Module) -> BlockSignature:
    """Return what a block is built like; its number and constants computed from it are no part of that."""
    structure: list[tuple[str, str, tuple[str, ...]]] = []
    switches: list[tuple[str, str, Any]] = []
    sizes: list[tuple[str, str, Any]] = []
    for full, module in block.named_modules():
        name = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", full)  # of how many a list is made is a size
        if "drop" in f"{name} {type(module).__name__}".lower():
            continue  # at a rate of zero often another class
        structure.append((name, type(module).__name__, tuple(sorted(key for key, _ in _named_tensors(module)))))
        sizes += [(name, key, tuple(tensor.shape)) for key, tensor in _named_tensors(module)]
        for key, value in vars(module).items():
            if key.startswith("_") or key in _INERT_ATTRIBUTES:
                continue
            if value is None or isinstance(value, (bool, str)):
                switches.append((name, key, value))
            elif isinstance(value, int) and not _is_block_number(key):
                sizes.append((name, key, value))
    return BlockSignature(frozenset(structure), frozenset(switches), frozenset(sizes))


def _named_tensors(module: nn.Module) -> list[tuple[str, Any]]:
    return [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]


def _is_block_number(name: str) -> bool:
    meaning = name_words(name)
    return bool(meaning & _BLOCK_NUMBER_WORDS) and bool(meaning & LAYER_WORDS or len(meaning) == 1)


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


def stack_signatures(model: PreTrainedModel, stack: str, size: int) -> list[BlockSignature]:
    """Return the kind of each block of a stack; a number that no two blocks share is a place and no size."""
    kinds = [block_signature(block) for block in block_modules(model, stack, size)]
    seen: dict[tuple[str, str], list[Any]] = {}
    for kind in kinds:
        for name, key, value in kind.sizes:
            seen.setdefault((name, key), []).append(value)
    places = {at for at, values in seen.items() if len(values) > 2 and len(set(values)) == len(values)}
    return [
        BlockSignature(
            kind.structure,
            kind.switches,
            frozenset(entry for entry in kind.sizes if (entry[0], entry[1]) not in places),
        )
        for kind in kinds
    ]


def describe_difference(teacher: BlockSignature, student: BlockSignature, *, widths: bool) -> str:
    """Return in what two blocks differ, in words; "" where one can be made of the other."""
    had, has = tensor_names(teacher), tensor_names(student)
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


def tensor_names(kind: BlockSignature) -> set[str]:
    """Return the names of a block's tensors."""
    return {f"{name}.{key}".removeprefix(".") for name, _, keys in kind.structure for key in keys}


@dataclass(frozen=True)
class BlockRequirements:
    """What a set of kept blocks must satisfy.

    Attributes:
        groups: of each group of blocks at least one is kept.
        needs: a block that is kept only where one of these is kept before it.
    """

    groups: tuple[frozenset[int], ...] = ()
    needs: Mapping[int, frozenset[int]] = None  # type: ignore[assignment]

    def violation(self, blocks: Sequence[int]) -> str:
        """Return what a choice does not satisfy, "" where it is all."""
        for group in self.groups:
            if not group & set(blocks):
                return f"at least one of the blocks {_sorted_list(group)} must be kept"
        for place, block in enumerate(blocks):
            sources = (self.needs or {}).get(block)
            if sources and not sources & set(blocks[:place]):
                return f"block {block} needs one of {_sorted_list(sources)}, from which it takes keys and values or an index"
        return ""


def _sorted_list(blocks: Iterable[int]) -> list[int]:
    return sorted(blocks)


def select_cheapest_blocks(
    depth: int,
    count: int,
    cost: Callable[[int, int], Fraction | int],
    requirements: BlockRequirements,
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
    requirements: BlockRequirements,
    allowed: "Callable[[int, int], bool] | None" = None,
) -> list[int] | None:
    """Return the admissible choice whose blocks lie nearest to `wanted`, by the sum of squared distances."""
    return select_cheapest_blocks(
        depth, len(wanted), lambda position, block: (wanted[position] - block) ** 2, requirements, allowed
    )


def most_influential_blocks(
    influence: Sequence[float],
    count: int,
    requirements: BlockRequirements = BlockRequirements(),  # noqa: B008
    allowed: "Callable[[int, int], bool] | None" = None,
) -> list[int] | None:
    """Return the admissible choice of greatest total influence; of equals the first."""
    exact = [Fraction(value) for value in influence]
    return select_cheapest_blocks(len(exact), count, lambda position, block: -exact[block], requirements, allowed)
