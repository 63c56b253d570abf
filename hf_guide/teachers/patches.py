"""Convert the patches that a teacher of masked images reconstructs to those that its student does.

Does: undo the teacher's normalisation of pixels, and normalise each patch, or undo that (`norm_pix_loss`).
Does not: select the masked patches (`hf_guide.models.targets`).
"""

from typing import Any

from torch import Tensor

from hf_guide.tasks import Task
from hf_guide.teachers.processors import PixelConversion

_EPSILON = 1e-6
"""Added to the variance of a patch by masked autoencoders."""


def normalizes_patches(config: Any) -> bool:
    """Return whether a model reconstructs patches of mean 0 and variance 1."""
    return bool(getattr(config, "norm_pix_loss", False))


def convert_patches(
    task: Task, patches: Tensor, pixels: Tensor, config: Any, conversion: PixelConversion | None, normalized: bool
) -> Tensor:
    """Return a teacher's reconstruction as that of a model of the batch's own pixels.

    Args:
        task: Masked image modelling (channels first in a patch) or image pretraining (channels last).
        patches: What the teacher reconstructs, (batch, patches, values).
        pixels: Those of the batch, (batch, channels, height, width).
        config: The teacher's.
        conversion: What the pixels went through before the teacher read them; None for nothing.
        normalized: Whether the student's patches have mean 0 and variance 1.
    """
    own = normalizes_patches(config)
    if conversion is None and own is normalized:
        return patches
    if own:
        mean, deviation = _statistics(pixels if conversion is None else conversion.apply(pixels), config.patch_size)
        patches = patches * deviation + mean
    if conversion is not None:
        axis = 2 if task is Task.MASKED_IMAGE_MODELING else 3
        sizes = (pixels.shape[1], -1) if axis == 2 else (-1, pixels.shape[1])
        shape = (-1, 1) if axis == 2 else (1, -1)
        scale, shift = (patches.new_tensor(each).view(shape) for each in (conversion.scale, conversion.shift))
        patches = ((patches.unflatten(2, sizes) - shift) / scale).flatten(2)
    if normalized:
        mean, deviation = _statistics(pixels, config.patch_size)
        patches = (patches - mean) / deviation
    return patches


def _statistics(pixels: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each patch, (batch, patches, 1), as masked autoencoders compute them."""
    patches = pixels.unflatten(3, (-1, size)).unflatten(2, (-1, size))  # batch, channels, rows, y, columns, x
    values = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    return values.mean(-1, keepdim=True), (values.var(-1, keepdim=True) + _EPSILON).sqrt()
