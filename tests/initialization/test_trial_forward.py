"""A student of every modality is tried with one tiny forward pass without side effects; one that cannot run is an error."""

import random
from collections.abc import Iterator
from typing import Any

import numpy
import pytest
import torch
import transformers
from transformers import PreTrainedModel

from hf_guide import ShapeError, from_teacher
from hf_guide.initialization.trial_forward import check_forward
from hf_guide.models.tiny_inputs import tiny_inputs
from tests.initialization.test_size_checks import deepseek, swin
from tests.tiny import KINDS, everything

TEXT = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
PAIR = {
    "vocab_size": 96,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
}
SEEN = {name: value for name, value in TEXT.items() if name != "vocab_size"}
SPEECH = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_source_positions": 50}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "speech to text": ("WhisperForConditionalGeneration", PAIR | SPEECH | SPECIAL),
    "raw speech": ("Wav2Vec2ForCTC", {**TEXT, "conv_dim": (16,) * 7, "num_conv_pos_embedding_groups": 4}),
    "spectrograms": ("ASTForAudioClassification", {**SEEN, "max_length": 64, "num_mel_bins": 32}),
    "video": ("VideoMAEForVideoClassification", {**SEEN, "image_size": 32, "num_frames": 4}),
    "images and text": (
        "CLIPModel",
        {"text_config": TEXT, "vision_config": {**SEEN, "image_size": 32}, "projection_dim": 16},
    ),
    "classifier of pairs": ("BartForSequenceClassification", PAIR),
    "translation": ("MarianMTModel", PAIR | {"pad_token_id": 95, "decoder_start_token_id": 95}),
    "state space": (
        "MambaForCausalLM",
        {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    ),
    "weights that a forward rescales": (
        "RwkvForCausalLM",
        {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 4, "rescale_every": 2},
    ),
    "random attention": ("BigBirdForMaskedLM", TEXT),
    "positions after padding": ("RobertaForMaskedLM", {**TEXT, "max_position_embeddings": 6}),
    "decoder that is a base model": ("LlamaModel", TEXT),
}


def model_of(name: str) -> PreTrainedModel:
    if name in KINDS:
        return KINDS[name].teacher()
    if name == "swin":
        return swin()
    model_class = getattr(transformers, OTHERS[name][0])
    torch.manual_seed(0)
    return model_class(model_class.config_class(**OTHERS[name][1]))


def state_of(model: PreTrainedModel) -> dict[str, Any]:
    """Return all that a forward might change and that is no tensor of the model's."""
    plain = (int, float, str, bool, tuple, type(None))
    settings = {
        name: {key: value for key, value in vars(module).items() if isinstance(value, plain)}
        for name, module in model.named_modules()
    }
    generation = getattr(model, "generation_config", None)
    return {
        "settings": settings,
        "config": model.config.to_dict(),
        "generation": None if generation is None else generation.to_dict(),
        "torch": torch.get_rng_state().tolist(),
        "python": random.getstate(),
        "numpy": numpy.random.get_state()[1].tolist(),
        "verbosity": transformers.logging.get_verbosity(),
    }


@pytest.mark.parametrize("name", [*KINDS, *OTHERS, "swin"])
def test_a_model_of_every_modality_runs_and_nothing_of_it_changes(name: str) -> None:
    model = model_of(name)
    model.train()
    next(iter(model.children())).eval()  # as where a part is frozen
    tensors = {key: value.clone() for key, value in everything(model).items()}
    before = state_of(model)
    assert tiny_inputs(model) and check_forward(model, model.config, filled=True) == []
    assert state_of(model) == before
    assert all(torch.equal(value, tensors[key]) for key, value in everything(model).items())
    assert check_forward(model, model.config, filled=False) == []  # with nothing but zeros


def test_a_large_model_that_changes_its_own_weights_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "hf_guide.initialization.trial_forward.MAX_COPIED_BYTES", 0
    )  # every model is large, and shares its weights
    for name in ("weights that a forward rescales", "llama", "t5", "vit"):
        model = model_of(name)
        tensors = {key: value.clone() for key, value in everything(model).items()}
        notes = check_forward(model, model.config, filled=True)
        assert all(torch.equal(value, tensors[key]) for key, value in everything(model).items())
        assert notes == [] or (name.startswith("weights") and "changes its own parameters" in notes[0])


class Untouchable:
    """A calibration dataset that must not be read."""

    def __iter__(self) -> Iterator[Any]:
        raise AssertionError("the dataset was read")


def test_a_shape_that_cannot_run_is_an_error_before_calibration_reads_its_data() -> None:
    with pytest.raises(ShapeError, match="cannot run: RuntimeError in DeepseekV3Attention"):
        from_teacher(
            deepseek(),
            num_key_value_heads=2,
            method="calibrated",
            calibration_dataset=Untouchable(),
            show_progress=False,
        )


@pytest.mark.parametrize("method", ["guide", "uniform", "random"])
def test_a_student_whose_decoder_cannot_use_its_cache_is_an_error(method: str) -> None:
    teacher = KINDS["t5"].teacher()  # whose cache has as many layers as the encoder
    with pytest.raises(ShapeError, match=r"cannot run: IndexError in T5Attention"):
        from_teacher(teacher, num_layers=2, num_decoder_layers=3, method=method, show_progress=False)


def test_outputs_that_are_not_finite_are_an_error() -> None:
    teacher = KINDS["llama"].teacher()
    with torch.no_grad():
        teacher.model.layers[0].mlp.down_proj.weight.mul_(3e4)
        teacher.model.layers[0].mlp.up_proj.weight.mul_(3e4)
    with pytest.raises(ShapeError, match=r"logits are not finite.*torch.float16.*dtype='bfloat16'"):
        from_teacher(teacher, dtype="float16", show_progress=False)
    assert from_teacher(teacher, dtype="bfloat16", show_progress=False).dtype == torch.bfloat16
    with torch.no_grad():
        teacher.model.layers[0].mlp.down_proj.weight.mul_(1e32)
        teacher.model.layers[0].mlp.up_proj.weight.mul_(1e32)
    with pytest.raises(
        ShapeError, match=r"not finite.*torch.float32. Check that the teacher's are.*extreme values\.$"
    ):
        from_teacher(teacher, show_progress=False)


def test_what_could_not_be_tried_is_in_the_report() -> None:
    config = transformers.Siglip2VisionConfig(**SEEN, num_patches=4, patch_size=8)
    model = transformers.Siglip2ForImageClassification(transformers.Siglip2Config(vision_config=config.to_dict()))
    student = from_teacher(model, show_progress=False)
    assert any("runs was not tried" in note for note in student.initialization_report.notes)
