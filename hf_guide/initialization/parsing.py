"""Options of an initialisation that are lists: which blocks, and weights of tokens."""

import math
import operator
from collections.abc import Iterable, Mapping
from typing import Any

from hf_guide.errors import OptionError
from hf_guide.initialization.choices import BlockChoice


def parse_layers(layers: Any) -> "str | list[int] | dict[str, list[int]]":
    """Return the choice, the numbers, or the numbers by stack that an option of blocks stands for.

    Raises:
        OptionError: what it is instead.
    """
    if isinstance(layers, str):
        return str(BlockChoice.parse(layers, "layers"))
    if isinstance(layers, Mapping):
        return {str(stack): _block_numbers(blocks, f"layers[{stack!r}]") for stack, blocks in layers.items()}
    return _block_numbers(layers, "layers")


def _block_numbers(blocks: Any, option: str) -> list[int]:
    expected = f"{option} is a list of teacher block numbers such as [0, 4, 9]"
    if isinstance(blocks, str) or not isinstance(blocks, Iterable):
        raise OptionError(f"{expected}{', or even, first or ends' if option == 'layers' else ''}; found {blocks!r}.")
    numbers = list(blocks)
    try:
        return [operator.index(number) for number in numbers]
    except TypeError as error:
        raise OptionError(f"{expected}; found {numbers!r}.") from error


def parse_weights(weights: Any) -> "list[float] | None":
    """Return one weight for each token as numbers, None for none.

    Raises:
        OptionError: weights that are not finite numbers of at least 0, or all 0.
    """
    if weights is None:
        return None
    try:
        numbers = [float(weight) for weight in weights]
    except (TypeError, ValueError) as error:
        raise OptionError(
            f"token_weights is a list of numbers, one per row of the embedding table: {error}."
        ) from error
    wrong = next((row for row, number in enumerate(numbers) if not 0 <= number < math.inf), None)
    if wrong is not None:
        raise OptionError(f"token_weights must be finite and not negative; that of row {wrong} is {numbers[wrong]}.")
    if not any(numbers):
        raise OptionError(
            "token_weights are all zero, so no row would be looked at; leave them out to weigh all alike."
        )
    return numbers
