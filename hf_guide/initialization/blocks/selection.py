"""Select the teacher's blocks that feed a student's, from those whose kinds its config can express.

Blocks are of one kind when their signatures are equal: the same modules, parameters and switches. A selection is admissible
when the student's config, with its fields remapped to these blocks, builds at every position a block of the kind that feeds
it. All of this is read from models on the meta device, before any weight is read or any calibration data is run.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
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
    unshared = {entry for entry, numbers in values.items() if len(numbers) > 2 and len(set(numbers)) == len(numbers)}
    return [
        dataclasses.replace(
            signature, sizes=frozenset(each for each in signature.sizes if (each[0], each[1]) not in unshared)
        )
        for signature in signatures
    ]


@dataclass(frozen=True)
class BlockRequirements:
    """What a selection of blocks must satisfy.

    Attributes:
        groups: of each group of blocks at least one is selected.
        needs: block -> blocks of which one must be selected before it.
    """

    groups: tuple[frozenset[int], ...] = ()
    needs: Mapping[int, frozenset[int]] = None  # type: ignore[assignment]

    def violation(self, blocks: Sequence[int]) -> str:
        """Return which requirement a selection violates; "" for none."""
        for group in self.groups:
            if not group & set(blocks):
                return f"at least one of the blocks {sorted(group)} must be selected"
        for position, block in enumerate(blocks):
            sources = (self.needs or {}).get(block)
            if sources and not sources & set(blocks[:position]):
                return f"block {block} needs one of {sorted(sources)}, from which it takes keys and values or an index"
        return ""


def select_cheapest_blocks(
    depth: int,
    count: int,
    cost: Callable[[int, int], Fraction | int],
    requirements: BlockRequirements,
    allowed: "Callable[[int, int], bool] | None" = None,
) -> list[int] | None:
    """Return the increasing selection of `count` of `depth` blocks of least total cost; None where none is admissible.

    Of selections of equal cost the first in lexicographic order is returned.

    Args:
        cost: the cost of a block at a position, an exact number: `cost(position, block)`.
        allowed: whether a block may be at a position: `allowed(position, block)`.
    """
    groups = [*requirements.groups]
    sources = list(dict.fromkeys((requirements.needs or {}).values()))
    bits = [*groups, *sources]
    mask_of = [sum(1 << bit for bit, group in enumerate(bits) if block in group) for block in range(depth)]
    final = (1 << len(groups)) - 1
    best: dict[tuple[int, int], tuple[Any, tuple[int, ...]]] = {(0, 0): (0, ())}
    for block in range(depth):
        source = (requirements.needs or {}).get(block)
        required = 0 if source is None else 1 << (len(groups) + sources.index(source))
        extended = dict(best)
        for (position, mask), (total, selected) in best.items():
            if position == count or mask & required != required:
                continue
            if allowed is not None and not allowed(position, block):
                continue
            state = (position + 1, mask | mask_of[block])
            entry = (total + cost(position, block), (*selected, block))
            if state not in extended or entry < extended[state]:
                extended[state] = entry
        best = {state: entry for state, entry in extended.items() if count - state[0] <= depth - block - 1}
    complete = [entry for (position, mask), entry in best.items() if position == count and mask & final == final]
    return list(min(complete)[1]) if complete else None


def nearest_blocks(
    ideal: Sequence[int],
    depth: int,
    requirements: BlockRequirements,
    allowed: "Callable[[int, int], bool] | None" = None,
) -> list[int] | None:
    """Return the admissible selection nearest to `ideal`, by the sum of squared distances.

    Example:
        >>> nearest_blocks([0, 3], 6, BlockRequirements(groups=(frozenset({2}),)))
        [0, 2]
    """
    return select_cheapest_blocks(
        depth, len(ideal), lambda position, block: (ideal[position] - block) ** 2, requirements, allowed
    )


def most_influential_blocks(
    influence: Sequence[float],
    count: int,
    requirements: BlockRequirements = BlockRequirements(),  # noqa: B008
    allowed: "Callable[[int, int], bool] | None" = None,
) -> list[int] | None:
    """Return the admissible selection of greatest total influence; of equals the first.

    Example:
        >>> most_influential_blocks([0.5, 0.1, 0.4], 2)
        [0, 2]
    """
    exact = [Fraction(value) for value in influence]
    return select_cheapest_blocks(len(exact), count, lambda position, block: -exact[block], requirements, allowed)
