"""Check that images and sounds of a calibration dataset are what a processor made of them, and name the processor if not."""

from collections.abc import Collection, Mapping
from numbers import Number
from typing import Any

import numpy as np
from torch import Tensor

from hf_guide.errors import OptionError

PROCESSORS = {
    "pixel_values": ("image processor", "images"),
    "input_features": ("feature extractor", "sounds"),
    "input_values": ("feature extractor", "sounds"),
}
"""Of each input that is not made of text: what makes it, and of what."""

CHANNEL_COUNTS = (1, 3, 4)
"""Channels of an image of grey values, of colours, and of colours with transparency."""


def processing_hint(accepted: Collection[str]) -> str:
    """Return which inputs of images and sounds a teacher reads and what makes them, after a space; "" of a teacher of text.

    Args:
        accepted: The inputs that the teacher's forward pass takes.

    Example:
        >>> processing_hint(["pixel_values"])
        ' The teacher reads pixel_values: run its image processor on the images, and pass rows of what that returns.'
    """
    names = [name for name in PROCESSORS if name in accepted]
    if not names:
        return ""
    work = dict.fromkeys("its {} on the {}".format(*PROCESSORS[name]) for name in names)
    return f" The teacher reads {' and '.join(names)}: run {' and '.join(work)}, and pass rows of what that returns."


def check_reads_text(accepted: Collection[str], found: str) -> None:
    """Check that a teacher reads text, before a tokenizer is loaded for it.

    Args:
        accepted: The inputs that the teacher's forward pass takes.
        found: What the dataset is, for the error.

    Raises:
        OptionError: It reads images or sounds alone.
    """
    hint = processing_hint(accepted)
    if hint and "input_ids" not in accepted:
        raise OptionError(f"calibration_dataset {found}, and the teacher does not read text.{hint}")


def check_text_alone(row: Mapping[str, Any], accepted: Collection[str]) -> None:
    """Check that a row of text has no image or sound in addition, where the teacher reads such: it would be left out.

    Args:
        row: A row, as `datasets` yields it.
        accepted: The inputs that the teacher's forward pass takes.

    Raises:
        OptionError: It has one; names its column.
    """
    hint = processing_hint(accepted)
    columns = [str(name) for name, value in row.items() if _is_raw(value)] if hint else []
    if columns:
        raise OptionError(
            f"calibration_dataset has images or sounds in {' and '.join(columns)} in addition to text, and only the text "
            f"would be read.{hint} Its processor makes both inputs of an image and its text. To calibrate on the text alone, "
            f"remove the column{'s' if len(columns) > 1 else ''}."
        )


def _is_raw(value: Any) -> bool:
    """Return whether a value is an image or a sound, or a list of them, as `datasets` decodes them or not."""
    if isinstance(value, (list, tuple)):
        return bool(value) and _is_raw(value[0])
    if isinstance(value, Mapping):
        return value.keys() >= {"bytes", "path"} or value.keys() >= {"array", "sampling_rate"}
    return type(value).__module__.startswith(("PIL.", "torchcodec.", "datasets.features."))


def check_is_array(column: str, value: Any) -> None:
    """Check that a main input of a row is made of numbers, along at least one axis; None, which is missing, passes.

    Raises:
        OptionError: It is an image, a sound with its sampling rate, a text or one number.
    """
    inner = value
    while isinstance(inner, (list, tuple)) and inner:
        inner = inner[0]
    if inner is None or isinstance(inner, (Tensor, np.ndarray, list, tuple)):
        return
    if inner is value or not isinstance(inner, (Number, np.generic)):
        raise OptionError(
            f"calibration_dataset has a {type(inner).__name__} in {column}, which must be numbers in a list, an array or a "
            f"tensor.{processing_hint([column])}"
        )


def check_processed(batch: Mapping[str, Tensor]) -> None:
    """Check that the images and sounds of a batch are normalized, and images have their channels first.

    Raises:
        OptionError: They are whole numbers, as pixels from 0 to 255 and samples of 16 bits are, or channels are last.
    """
    for name in PROCESSORS.keys() & batch.keys():
        value, (processor, things) = batch[name], PROCESSORS[name]
        if not value.is_floating_point():
            raise OptionError(
                f"calibration_dataset has {name} of {value.dtype}: these are raw {things}, and the teacher reads what its "
                f"{processor} makes of them, in floating point. Run the {processor} on the {things}."
            )
        if name == "pixel_values" and value.ndim > 3:
            _check_channels_first(value)


def _check_channels_first(pixels: Tensor) -> None:
    if pixels.shape[-1] in CHANNEL_COUNTS and pixels.shape[-3] not in CHANNEL_COUNTS:
        raise OptionError(
            f"calibration_dataset has pixel_values of the shape {tuple(pixels.shape)}, with channels last: it must be "
            "(images, channels, height, width). Run the teacher's image processor on the images, which also normalizes them."
        )
