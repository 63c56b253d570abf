"""The content of padding changes nothing, whatever a family calls its blocks; a decoder reads what it reads in training."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    HubertConfig,
    HubertForCTC,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    UniSpeechConfig,
    UniSpeechForCTC,
    Wav2Vec2BertConfig,
    Wav2Vec2BertForCTC,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
    WavLMConfig,
    WavLMForCTC,
)

from hf_guide import OptionError, from_teacher
from hf_guide.calibration.collection import collect_calibration
from hf_guide.calibration.config import CalibratedConfig
from hf_guide.teachers.checkpoint import open_teacher
from tests.calibration.test_data import load
from tests.tiny import KINDS

SIZES = {"vocab_size": 96, "max_position_embeddings": 32}


def opt() -> tuple[PreTrainedModel, dict[str, Any]]:
    torch.manual_seed(1)
    config = OPTConfig(
        **SIZES, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32
    )
    return OPTForCausalLM(config).eval(), {"hidden_size": 16, "word_embed_proj_dim": 16}


def bart() -> tuple[PreTrainedModel, dict[str, Any]]:
    torch.manual_seed(1)
    sides = {f"{side}_{what}": size for side in ("encoder", "decoder") for what, size in BART.items()}
    return BartForConditionalGeneration(BartConfig(**SIZES, **sides, d_model=32)).eval(), {"d_model": 16}


BART = {"layers": 2, "attention_heads": 4, "ffn_dim": 64}


def t5() -> tuple[PreTrainedModel, dict[str, Any]]:
    teacher = KINDS["t5"].teacher(decoder_start_token_id=0, num_layers=2, tie_word_embeddings=False)
    return teacher, {"d_model": 24}


def padded(pad: int, **more: Tensor) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    found = []
    for length in (4, 7, 6, 5):
        tokens = torch.randint(3, 96, (4, 10), generator=generator)
        mask = torch.ones_like(tokens)
        mask[:2, length:] = 0
        found.append({"input_ids": tokens.masked_fill(mask == 0, pad), "attention_mask": mask, **more})
    return found


def with_decoder(batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Add the decoder's inputs: of the same length, so that shapes do not distinguish masks, and padded elsewhere."""
    return [
        {
            **batch,
            "decoder_input_ids": batch["input_ids"].flip(0),
            "decoder_attention_mask": batch["attention_mask"].flip(0),
        }
        for batch in batches
    ]


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("make", "pair"), [(opt, False), (bart, False), (bart, True), (t5, False), (t5, True)])
def test_the_content_of_padding_changes_nothing(make: Any, pair: bool) -> None:
    teacher, smaller = make()
    students = [
        from_teacher(
            teacher,
            method="calibrated",
            calibration_dataset=with_decoder(padded(pad)) if pair else padded(pad),
            show_progress=False,
            **smaller,
        )
        for pad in (1, 77)
    ]
    one, other = (student.state_dict() for student in students)
    differing = {name: (one[name] - other[name]).abs().max().item() for name in one}
    assert max(differing.values()) < 1e-4, {name: value for name, value in differing.items() if value >= 1e-4}


def test_a_decoder_reads_the_labels_as_in_training() -> None:
    teacher, _ = t5()
    labels = torch.tensor([[5, 6, 7], [8, 9, -100]])
    (batch,) = load(teacher, [{"input_ids": torch.randint(3, 96, (2, 9)), "labels": labels}])
    assert batch["decoder_input_ids"].tolist() == [[0, 5, 6], [0, 8, 9]]
    assert batch["decoder_attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    rows = [{"input_ids": [3, 4, 5], "labels": [5, 6, 7]}, {"input_ids": [3], "labels": [8, 9]}]
    assert torch.equal(load(teacher, rows)[0]["decoder_input_ids"], batch["decoder_input_ids"])
    given = {"decoder_input_ids": torch.tensor([[4, 4], [4, 4]]), "labels": labels}
    (batch,) = load(teacher, [{"input_ids": torch.randint(3, 96, (2, 9)), **given}])
    assert batch["decoder_input_ids"].tolist() == [[4, 4], [4, 4]] and "decoder_attention_mask" not in batch


def test_labels_that_cannot_be_shifted() -> None:
    teacher = KINDS["t5"].teacher()  # its config has no decoder_start_token_id
    with pytest.raises(OptionError, match="decoder_start_token_id"):
        load(teacher, [{"input_ids": torch.randint(3, 96, (2, 9)), "labels": torch.tensor([[5], [6]])}])


SOUND_SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
CONVOLUTIONS = {"conv_dim": (8, 8), "conv_kernel": (10, 3), "conv_stride": (5, 2), "num_feat_extract_layers": 2}
POSITIONS = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "feat_extract_norm": "layer"}
WAVEFORM = {**SOUND_SIZES, **CONVOLUTIONS, **POSITIONS}


@pytest.mark.parametrize(
    ("model_class", "config"),
    [
        (Wav2Vec2ForCTC, Wav2Vec2Config(**WAVEFORM)),
        (Wav2Vec2ForCTC, Wav2Vec2Config(**WAVEFORM, do_stable_layer_norm=True)),
        (HubertForCTC, HubertConfig(**WAVEFORM)),
        (WavLMForCTC, WavLMConfig(**WAVEFORM)),
        (UniSpeechForCTC, UniSpeechConfig(**WAVEFORM)),
        (Wav2Vec2BertForCTC, Wav2Vec2BertConfig(**SOUND_SIZES, feature_projection_input_dim=6)),
    ],
    ids=["wav2vec2", "wav2vec2 stable", "hubert", "wavlm", "unispeech", "wav2vec2-bert"],
)
def test_padded_sounds_give_the_statistics_of_the_sounds_one_by_one(
    model_class: type[PreTrainedModel], config: Any
) -> None:
    config.vocab_size = 20
    teacher = model_class(config).eval().double()
    generator = torch.Generator().manual_seed(0)
    for parameter in teacher.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    name, width = ("input_features", (6,)) if model_class is Wav2Vec2BertForCTC else ("input_values", ())
    sounds = [torch.randn(length, *width, generator=generator) for length in (400, 250, 310, 120)]
    masks = [torch.ones(len(sound), dtype=torch.long) for sound in sounds]
    pad = torch.nn.utils.rnn.pad_sequence
    one_by_one = [{name: sound[None], "attention_mask": mask[None]} for sound, mask in zip(sounds, masks, strict=True)]
    padded = [{name: pad(sounds, batch_first=True), "attention_mask": pad(masks, batch_first=True)}]
    first, second = (
        collect_calibration(
            teacher, open_teacher(teacher), data, CalibratedConfig(calibration_tokens=10_000)
        ).statistics
        for data in (one_by_one, padded)
    )
    assert first.num_tokens == second.num_tokens and first.block_influence.keys() == second.block_influence.keys()
    for stack, influence in first.block_influence.items():
        assert torch.allclose(influence, second.block_influence[stack], rtol=1e-9), stack
