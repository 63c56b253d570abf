"""A teacher's perfect reconstruction of masked images stays perfect in the student's own pixels and patches."""

import itertools

import pytest
import torch
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from hf_guide.models.outputs import task_logits
from hf_guide.tasks import Task
from hf_guide.teachers.forward import forward_outputs
from hf_guide.teachers.patches import convert_patches
from hf_guide.teachers.processors import PixelConversion

OTHER = PixelConversion((2.0, 0.5, 3.0), (0.1, -0.2, 0.3))


def autoencoder(normalized: bool) -> ViTMAEForPreTraining:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    decoder = {f"decoder_{name}": value for name, value in sizes.items()}
    config = ViTMAEConfig(image_size=16, patch_size=8, norm_pix_loss=normalized, mask_ratio=0.5, **sizes, **decoder)
    return ViTMAEForPreTraining(config).double().eval()


def target(model: ViTMAEForPreTraining, pixels: torch.Tensor) -> torch.Tensor:
    """Return what the model's own loss compares its patches with."""
    patches = model.patchify(pixels)
    if not model.config.norm_pix_loss:
        return patches
    return (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6) ** 0.5


@pytest.mark.parametrize(("teacher", "student", "other"), list(itertools.product([False, True], repeat=3)))
def test_masked_autoencoders(teacher: bool, student: bool, other: bool) -> None:
    pixels = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    conversion = OTHER if other else None
    seen = OTHER.apply(pixels) if other else pixels
    models = autoencoder(teacher), autoencoder(student)
    patches = target(models[0], seen)
    converted = convert_patches(Task.IMAGE_PRETRAINING, patches, pixels, models[0].config, conversion, student)
    torch.testing.assert_close(converted, target(models[1], pixels), rtol=1e-5, atol=1e-5)
    assert converted is patches or (teacher, other) != (student, False)


def test_masked_images_of_another_normalisation() -> None:
    """Their patches have the channels first."""
    pixels = torch.randn(2, 3, 16, 16)
    masked = torch.ones(2, 4)
    seen, own = (
        task_logits(Task.MASKED_IMAGE_MODELING, {"reconstruction": each}, {"bool_masked_pos": masked})
        for each in (OTHER.apply(pixels), pixels)
    )
    config = autoencoder(False).config
    torch.testing.assert_close(convert_patches(Task.MASKED_IMAGE_MODELING, seen, pixels, config, OTHER, False), own)


def test_the_forward_pass_converts_to_the_students_patches() -> None:
    """By the statistics of the batch, though the teacher reconstructs badly."""
    model = autoencoder(False)
    batch = {"pixel_values": torch.randn(2, 3, 16, 16, dtype=torch.float64), "noise": torch.rand(2, 4)}
    with torch.no_grad():
        raw = forward_outputs(model, Task.IMAGE_PRETRAINING, batch).logits
        converted = forward_outputs(model, Task.IMAGE_PRETRAINING, batch, normalized_patches=True).logits
    patches = model.patchify(batch["pixel_values"])
    expected = (raw - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6) ** 0.5
    torch.testing.assert_close(converted, expected)
    assert not torch.allclose(converted, raw)
