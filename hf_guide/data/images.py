"""Decode the images of a dataset, and make the inputs of image classifiers when its rows are read."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import PIL.Image
from datasets import Dataset, Image

from hf_guide.data.arguments import DataArguments
from hf_guide.data.loading import find_column
from hf_guide.errors import OptionError
from hf_guide.tasks import Task

ROW_COLUMN = "__row__"
"""Of the index of a row, which errors name."""


def image_dataset(
    split: Dataset | None, processor: Any, options: DataArguments, encode_label: Callable[[Any], int] | None
) -> Dataset | None:
    """Return a split whose rows become pixels and a class when they are read; None for no split.

    Raises:
        OptionError: It has no column of images or of labels; (when read) an image cannot be decoded.
    """
    if split is None or encode_label is None:
        return None
    image = find_column(split, Task.IMAGE_CLASSIFICATION, "image", options)
    column = find_column(split, Task.IMAGE_CLASSIFICATION, "label", options)
    if isinstance(split.features[image], Image):
        split = split.cast_column(image, Image(decode=False))  # decoded below, where errors name the image
    split = split.add_column(ROW_COLUMN, range(len(split)))

    def to_inputs(examples: Mapping[str, Any]) -> dict[str, Any]:
        opened = [
            decode_image(value, row, image, options.name)
            for value, row in zip(examples[image], examples[ROW_COLUMN], strict=True)
        ]
        pixels = processor(opened, return_tensors="pt")["pixel_values"]
        return {"pixel_values": list(pixels), "labels": [encode_label(value) for value in examples[column]]}

    return split.with_transform(to_inputs)


def decode_image(value: Any, row: int, column: str, dataset: str, *, folder: Path | None = None) -> PIL.Image.Image:
    """Decode an image of a dataset and return it in RGB.

    Args:
        value: An image, a path, or a path or bytes as `datasets.Image(decode=False)` returns them.
        row, column, dataset: Index of the row and names, for the error.
        folder: Where relative paths begin, if not in the working directory.

    Raises:
        OptionError: The image cannot be read.
    """
    if isinstance(value, PIL.Image.Image):
        return value.convert("RGB")
    if isinstance(value, str):
        value = {"path": value, "bytes": None}
    path = value.get("path") if isinstance(value, Mapping) else None
    if path and folder is not None and not value.get("bytes") and not Path(path).is_file():
        value = {**value, "path": str(folder / path)}
    try:
        return Image().decode_example(value).convert("RGB")
    except (OSError, SyntaxError, ValueError, TypeError, KeyError, PIL.Image.DecompressionBombError) as error:
        name = f"the image {Path(path).name}" if path else "its image"
        raise OptionError(
            f"{dataset}: {name} in row {row}, column {column!r}, cannot be read: {error or type(error).__name__}. Replace or "
            "remove it."
        ) from error
