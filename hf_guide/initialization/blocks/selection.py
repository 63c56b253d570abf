"""Choose the teacher's blocks that feed a student's, among those whose kinds its config can state.

Blocks are of one kind when they are built alike: the same modules, parameters and switches. A choice is admissible when the
student's config, its fields by block set for these blocks, builds at every position a block of the kind that feeds it. All
of that is found from models on the meta device, so before any weight is read and any calibration data is run.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from transformers import PreTrainedModel

from hf_guide.models.module_signature import ModuleSignature, module_signature, stack_modules


def stack_signatures(model: PreTrainedModel, stack: str, size: int) -> list[ModuleSignature]:
    """Return the signature of each block of a stack, such as "layers.{block}"; empty where the model has no such stack.

    A number that no two blocks share follows from the index of the block, and is no size.
    """
    signatures = [module_signature(block).of_block() for block in stack_modules(model, stack)[:size]]
    values: dict[tuple[str, str], list[Any]] = {}
    for signature in signatures:
        for name, key, value in signature.sizes:
            values.setdefault((name, key), []).append(value)
    unshared = {entry for entry, found in values.items() if len(found) > 2 and len(set(found)) == len(found)}
    return [
        dataclasses.replace(
            signature, sizes=frozenset(each for each in signature.sizes if (each[0], each[1]) not in unshared)
        )
        for signature in signatures
    ]


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
