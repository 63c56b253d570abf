"""Check that images and sounds of a calibration dataset are what a processor made of them, and name the processor if not."""

from collections.abc import Mapping

from torch import Tensor

from hf_guide.errors import OptionError

PROCESSORS = {
    "pixel_values": ("image processor", "images"),
    "input_features": ("feature extractor", "sounds"),
    "input_values": ("feature extractor", "sounds"),
}
"""Of each input that is not made of text: what makes it, and of what."""


def check_processed(batch: Mapping[str, Tensor]) -> None:
    """Check that the images and sounds of a batch are normalized.

    Raises:
        OptionError: They are whole numbers, as pixels from 0 to 255 and samples of 16 bits are.
    """
    for name in PROCESSORS.keys() & batch.keys():
        value, (processor, things) = batch[name], PROCESSORS[name]
        if not value.is_floating_point():
            raise OptionError(
                f"calibration_dataset has {name} of {value.dtype}: these are raw {things}, and the teacher reads what its "
                f"{processor} makes of them, in floating point. Run the {processor} on the {things}."
            )
