"""A batch that a live teacher cannot run on is an error with the shapes of its inputs; other errors come out as they are."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
)

from hf_guide.errors import HfGuideError, OptionError, TeacherError
from hf_guide.tasks import task_of
from hf_guide.teachers.forward import forward_outputs
from tests.small_speech import spectrogram_classifier, whisper, whisper_processor
from tests.tiny import KINDS

SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION, TEXT = {**SIZES, "image_size": 16, "patch_size": 8}, {**SIZES, "vocab_size": 96}
IDS = torch.tensor([[3, 4, 5]])


def clip() -> PreTrainedModel:
    return CLIPModel(CLIPConfig(vision_config=VISION, text_config=TEXT))


def llava() -> PreTrainedModel:
    vision, text = {**VISION, "model_type": "clip_vision_model"}, {**TEXT, "model_type": "llama"}
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_id=90))


def wav2vec2() -> PreTrainedModel:
    layers = {"conv_dim": (8, 8), "conv_kernel": (10, 3), "conv_stride": (5, 2), "num_feat_extract_layers": 2}
    positions = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    return Wav2Vec2ForCTC(Wav2Vec2Config(**SIZES, **layers, **positions, vocab_size=20))


UNREADABLE: dict[str, tuple[Callable[[], PreTrainedModel], dict[str, Tensor], type[Exception]]] = {
    "ids beyond the table": (KINDS["llama"].teacher, {"input_ids": IDS * 100}, IndexError),
    "positions of another length": (
        KINDS["llama"].teacher,
        {"input_ids": IDS, "position_ids": torch.tensor([[0, 1]])},
        RuntimeError,
    ),
    "more tokens than positions": (
        KINDS["bert"].teacher,
        {"input_ids": torch.ones(1, 2000, dtype=torch.long)},
        RuntimeError,
    ),
    "token types beyond the table": (KINDS["bert"].teacher, {"input_ids": IDS, "token_type_ids": IDS}, IndexError),
    "no input of the decoder": (KINDS["t5"].teacher, {"input_ids": IDS}, ValueError),
    "images of another size": (KINDS["vit"].teacher, {"pixel_values": torch.zeros(1, 3, 32, 32)}, ValueError),
    "a text without its image": (clip, {"input_ids": IDS}, AttributeError),
    "fewer tokens than an image has": (
        llava,
        {"input_ids": torch.tensor([[1, 90, 2]]), "pixel_values": torch.zeros(1, 3, 16, 16)},
        ValueError,
    ),
    "a sound below one frame": (wav2vec2, {"input_values": torch.zeros(1, 5)}, RuntimeError),
    "a spectrogram where a waveform must be": (wav2vec2, {"input_features": torch.zeros(1, 9, 9)}, TypeError),
    "another number of bands": (
        lambda: whisper(whisper_processor()),
        {"input_features": torch.zeros(1, 9, 100), "decoder_input_ids": IDS},
        RuntimeError,
    ),
    "a waveform where a spectrogram must be": (
        lambda: spectrogram_classifier()[0],
        {"input_values": torch.zeros(4, 400)},
        IndexError,
    ),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_the_error_has_the_shapes_and_the_reason(name: str) -> None:
    make, batch, cause = UNREADABLE[name]
    model = make().eval()
    with pytest.raises(TeacherError, match="cannot read a batch of the student's") as error:
        forward_outputs(model, task_of(type(model)), batch)
    assert type(error.value.__cause__) is cause and str(error.value.__cause__).rstrip(".") in str(error.value)
    shapes = {key: tuple(value.shape) for key, value in batch.items()}
    assert str(shapes) in str(error.value)


@pytest.mark.parametrize(
    "raised",
    [
        KeyboardInterrupt(),
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        torch.distributed.DistBackendError("NCCL error: remote process exited or there was a network error"),
        RecursionError("maximum recursion depth exceeded"),
        OptionError("of this library"),
    ],
    ids=lambda raised: type(raised).__name__,
)
def test_errors_that_are_not_of_the_batch_come_out_as_they_are(raised: BaseException) -> None:
    model = KINDS["llama"].teacher().eval()

    def fail(*_: Any) -> None:
        raise raised

    model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(type(raised)) as error:
        forward_outputs(model, task_of(type(model)), {"input_ids": IDS})
    assert error.value is raised and (isinstance(raised, OptionError) or not isinstance(error.value, HfGuideError))
