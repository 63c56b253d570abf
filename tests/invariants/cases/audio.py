"""Speech and sound. Whisper's encoder and decoder are two residual streams, `enc_embed` and `embed`."""

from transformers import PreTrainedModel

from tests.invariants.case import STREAM_RESIDUAL, TIED_RESIDUAL, TOKENS, Case
from tests.invariants.shapes import IMAGE_BIG, IMAGE_SMALL, PAIR_DEEP, PAIR_SMALL

WHISPER = {
    "vocab_size": TOKENS,
    "num_mel_bins": 7,
    "max_source_positions": 10,
    "max_target_positions": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
}
WHISPER |= {"eos_token_id": 2, "decoder_start_token_id": 1, "num_labels": 5, "classifier_proj_size": 9}


def straighten(model: PreTrainedModel) -> None:
    """Move the second convolution to where GELU is the identity, and the positions back by as much."""
    encoder = model.get_submodule("model.encoder" if hasattr(model, "model") else "encoder")
    encoder.conv2.bias += 1000
    encoder.embed_positions.weight -= 1000


CASES: list[Case] = [
    Case(
        "whisper",
        "WhisperForConditionalGeneration",
        PAIR_SMALL,
        PAIR_DEEP,
        WHISPER,
        inputs="speech",
        settle=straighten,
        residual=TIED_RESIDUAL,
    ),
    Case(
        "whisper",
        "WhisperForConditionalGeneration",
        PAIR_SMALL,
        PAIR_DEEP,
        WHISPER | {"tie_word_embeddings": False},
        "whisper-untied",
        inputs="speech",
        settle=straighten,
    ),
    # GELU on the encoder's stream: no wider model computes the same there.
    Case(
        "whisper",
        "WhisperForConditionalGeneration",
        PAIR_SMALL,
        PAIR_DEEP,
        WHISPER | {"tie_word_embeddings": False},
        "whisper-bent",
        inputs="speech",
        lift=None,
        residual=STREAM_RESIDUAL,
    ),
    Case(
        "whisper",
        "WhisperForAudioClassification",
        PAIR_SMALL,
        PAIR_DEEP,
        WHISPER,
        "whisper-classifier",
        inputs="sounds",
        settle=straighten,
    ),
    Case(
        "audio-spectrogram-transformer",
        "ASTForAudioClassification",
        IMAGE_SMALL,
        IMAGE_BIG,
        {"max_length": 20, "num_mel_bins": 7, "patch_size": 4, "frequency_stride": 3, "time_stride": 4}
        | {"layer_norm_eps": 1e-12, "num_labels": 5},
        inputs="spectrograms",
        residual=STREAM_RESIDUAL,
    ),
]
