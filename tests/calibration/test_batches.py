"""Batches that no model can take are refused before one runs; padding and repeated text are not counted as tokens."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    ASTConfig,
    BertConfig,
    BertForMultipleChoice,
    ClapAudioConfig,
    LlamaConfig,
    PreTrainedModel,
    ViTConfig,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
    WhisperConfig,
)

from hf_guide import OptionError, from_teacher
from hf_guide.calibration.batches import count_contexts, count_rows, count_tokens, padding_mask
from hf_guide.calibration.row_collator import num_axes, row_axes
from tests.calibration.test_data import are_equal, load, table
from tests.small_speech import ctc_model, ctc_processor, whisper, whisper_processor
from tests.tiny import KINDS

IDS = torch.randint(3, 96, (16, 16), generator=torch.Generator().manual_seed(7))
IDS[:, 0] = torch.arange(3, 19)  # so that no two rows begin alike
ROW = {"input_ids": IDS[0].tolist()}
CAUSAL = torch.ones(16, 16).tril().bool().expand(16, 1, 16, 16)

WRONG: dict[str, tuple[list[Any], str]] = {
    "embeddings": ([{"inputs_embeds": torch.zeros(4, 8, 48)}], "inputs_embeds, which are of the teacher's width"),
    "embeddings in rows": ([{"inputs_embeds": torch.zeros(8, 48)}], "inputs_embeds, which are of the teacher's width"),
    "float ids": ([{"input_ids": IDS.float()}], "input_ids of torch.float32: token ids are whole numbers"),
    "float ids in rows": ([{"input_ids": [3.0, 4.7]}], "input_ids of torch.float32: token ids are whole numbers"),
    "bool ids": ([{"input_ids": IDS > 9}], "input_ids of torch.bool"),
    "ids of three axes": ([{"input_ids": IDS[None]}], r"input_ids of the shape \(1, 16, 16\), which must be"),
    "mask of one row": ([{"input_ids": IDS, "attention_mask": IDS[0]}], r"attention_mask of the shape \(16,\)"),
    "short mask": ([{"input_ids": IDS, "attention_mask": IDS[:, :9]}], r"attention_mask of the shape \(16, 9\)"),
    "a batch of other columns": ([{"input_ids": IDS}, {"attention_mask": IDS}], r"Item 1 .*\['attention_mask'\]"),
    "rows of other columns": ([ROW, ROW, {"text": "a"}], r"Item 2 .*\['text'\], and the first one has input_ids"),
    "text after rows": ([ROW, "text"], "Item 1 of calibration_dataset is a str"),
    "nothing after rows": ([ROW, None], "Item 1 of calibration_dataset is a NoneType"),
    "nothing at all": ([None, None], "calibration_dataset is empty"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_no_teacher_can_take_is_refused(name: str) -> None:
    dataset, message = WRONG[name]
    with pytest.raises(OptionError, match=message):
        load(KINDS["llama"].teacher(), dataset)


def test_the_inputs_of_a_decoder_are_checked_too() -> None:
    wrong = [{"input_ids": IDS, "decoder_input_ids": IDS, "decoder_attention_mask": IDS[:, :3]}]
    with pytest.raises(OptionError, match=r"decoder_attention_mask of the shape \(16, 3\), and decoder_input_ids of"):
        load(KINDS["t5"].teacher(), wrong)


def test_what_is_missing_before_the_first_row_is_skipped() -> None:
    teacher = KINDS["llama"].teacher()
    assert are_equal(load(teacher, [None, ROW, ROW]), load(teacher, [ROW, ROW]))


@pytest.mark.parametrize("selection", ["local_search", "block_influence"])
def test_masks_of_four_axes_select_blocks_as_none_does(selection: str) -> None:
    """A mask that states which tokens each attends to, here that of every causal model."""
    students = [
        from_teacher(
            KINDS["llama"].teacher(),
            method={"method": "calibrated", "layer_selection": selection, "calibration_batch_size": 16},
            calibration_dataset=[{"input_ids": IDS} | mask],
            show_progress=False,
            hidden_size=32,
            num_hidden_layers=2,
        )
        for mask in ({"attention_mask": CAUSAL}, {})
    ]
    one, other = (student.initialization_report for student in students)
    assert one.blocks == other.blocks
    for first, second in zip(*(student.parameters() for student in students), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-4)


def test_padding_of_choices_is_not_counted() -> None:
    mask = torch.ones(4, 3, 16).long()
    mask[:2, :, 8:] = 0
    batch, bert = {"input_ids": IDS[:12].view(4, 3, 16), "attention_mask": mask}, KINDS["bert classifier"].teacher()
    assert count_tokens(batch, bert) == 2 * 3 * 8 + 2 * 3 * 16
    assert [count_rows(batch, tokens, bert) for tokens in (1, 24, 25, 48, 49, 999)] == [1, 1, 2, 2, 3, 4]
    flat = padding_mask(batch)
    assert flat is not None and flat.shape == (12, 16)
    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    teacher = BertForMultipleChoice(BertConfig(vocab_size=96, **sizes)).eval()
    short = {name: value[:2] for name, value in batch.items()}
    students = [
        from_teacher(
            teacher,
            method={"method": "calibrated", "calibration_batch_size": 16},
            calibration_dataset=[{name: value[..., :length] for name, value in short.items()}],
            show_progress=False,
            hidden_size=24,
        )
        for length in (16, 8)
    ]
    for first, second in zip(*(student.parameters() for student in students), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)


SOUNDS = np.random.default_rng(0).standard_normal((8, 400)).astype(np.float32)


@pytest.mark.parametrize("form", ["rows", "torch rows", "batches of lists", "batches of tensors"])
def test_waveforms_in_any_form(form: str) -> None:
    teacher = Wav2Vec2ForCTC(Wav2Vec2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=2))
    dataset = {
        "rows": table("input_values", SOUNDS.tolist()),
        "torch rows": table("input_values", SOUNDS.tolist(), "torch"),
        "batches of lists": table("input_values", SOUNDS.tolist()).iter(batch_size=4),
        "batches of tensors": [{"input_values": half} for half in torch.from_numpy(SOUNDS).split(4)],
    }[form]
    found = load(teacher, dataset)
    assert are_equal(found, [{"input_values": half} for half in torch.from_numpy(SOUNDS).split(4)])


def test_a_mask_of_waveforms_is_used() -> None:
    teacher = Wav2Vec2ForCTC(Wav2Vec2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=2))
    masks = (torch.arange(400) < torch.tensor([[400], [300]] * 4)).long()
    rows = [
        {"input_values": sound, "attention_mask": mask} for sound, mask in zip(SOUNDS, masks.tolist(), strict=True)
    ]
    found = load(teacher, rows)
    assert torch.equal(torch.cat([batch["attention_mask"] for batch in found]), masks)


@pytest.mark.parametrize(
    ("config", "column", "shape"),
    [
        (ASTConfig(), "input_values", (8, 4)),
        (WhisperConfig(), "input_features", (4, 8)),
        (ClapAudioConfig(), "input_features", (1, 8, 4)),
        (ViTConfig(), "pixel_values", (3, 8, 8)),
        (Wav2Vec2Config(), "input_values", (8,)),
        (LlamaConfig(), "input_ids", (8,)),
    ],
    ids=lambda each: getattr(each, "model_type", str(each)),
)
def test_a_row_has_the_axes_of_its_family(config: Any, column: str, shape: tuple[int, ...]) -> None:
    assert num_axes(np.zeros(shape).tolist()) == num_axes(torch.zeros(shape)) == row_axes(column, config)


def test_a_context_is_a_token_and_seven_before_it() -> None:
    period = torch.arange(4).repeat(16)
    assert count_contexts([{"input_ids": period.expand(3, 64)}]) == 4 + 7
    assert count_contexts([{"input_ids": IDS}, {"input_ids": IDS}]) == IDS.numel()
    shorter = {"input_ids": IDS, "attention_mask": (torch.arange(16) < 9).long().expand(16, 16)}
    assert count_contexts([shorter]) == 16 * 9
    assert count_contexts([{"input_ids": IDS[:1], "decoder_input_ids": IDS[1:2]}]) == 32
    images = {"pixel_values": torch.zeros(16, 3, 16, 16)}
    for of_images in ([images], [{"input_ids": IDS, **images}], [{"input_ids": IDS}, {"input_ids": IDS, **images}]):
        assert count_contexts(of_images) is None


def test_repeated_text_is_no_more_text() -> None:
    """A start from one row, however often repeated, would be worse than without data."""
    teacher = KINDS["llama"].teacher()

    def calibrated(rows: torch.Tensor, **method: Any) -> list[str]:
        options = {"method": "calibrated", "calibration_batch_size": 16, **method}
        data = [{"input_ids": rows}]
        student = from_teacher(teacher, method=options, calibration_dataset=data, hidden_size=32, show_progress=False)
        return student.initialization_report.notes

    with pytest.raises(OptionError, match="256 tokens, of which 16 are not repeated .* is 32 wide"):
        calibrated(IDS[:1].expand(16, 16))
    assert not calibrated(IDS[:1].expand(16, 16), basis="embeddings")
    assert not calibrated(IDS)
    (note,) = calibrated(IDS[:4].repeat(4, 1))
    assert "64 are not repeated" in note and "may start worse" in note
    (note,) = calibrated(IDS.repeat(3, 1), calibration_tokens=768)
    assert "768 tokens, of which 256 are not repeated" in note and "adds nothing" in note


def speech_models(folder: Path) -> "dict[str, tuple[PreTrainedModel, dict[str, Tensor]]]":
    """Return models of sounds, and four sounds of two lengths for each."""
    processor = ctc_processor(folder)
    sounds, mask = torch.randn(4, 6400), torch.ones(4, 6400).long()
    mask[:2, 3200:] = 0
    ids = torch.randint(3, 90, (4, 9))
    whisper_inputs = {"input_features": torch.randn(4, 16, 100), "decoder_input_ids": ids}
    return {
        "wav2vec 2.0": (ctc_model(processor), {"input_values": sounds}),
        "HuBERT": (ctc_model(processor, hubert=True), {"input_values": sounds, "attention_mask": mask}),
        "Whisper": (whisper(whisper_processor()), whisper_inputs),
    }


def test_frames_of_sounds_are_tokens(tmp_path: Path) -> None:
    for name, (model, batch) in speech_models(tmp_path).items():
        with torch.no_grad():
            outputs = model(**batch, output_hidden_states=True)
        hidden_states = getattr(outputs, "encoder_hidden_states", None) or outputs.hidden_states
        frames = hidden_states[0].shape[1]
        lengths = [frames] * 4
        if "attention_mask" in batch:
            lengths[:2] = [model._get_feat_extract_output_lengths(torch.tensor(3200)).item()] * 2
            assert lengths[0] == pytest.approx(frames / 2, abs=1)
        assert count_tokens(batch, model) == sum(lengths), name
        assert [count_rows(batch, sum(lengths[:n]), model) for n in (1, 2, 3, 4)] == [1, 2, 3, 4], name


def test_tokens_of_a_decoder_are_counted_where_asked_for(tmp_path: Path) -> None:
    model, batch = speech_models(tmp_path)["Whisper"]
    assert [count_rows(batch, tokens, model, of_decoder=True) for tokens in (9, 10, 36, 99)] == [1, 2, 4, 4]
    masked = {**batch, "decoder_attention_mask": (torch.arange(9) < 3).long().expand(4, 9)}
    assert [count_rows(masked, tokens, model, of_decoder=True) for tokens in (3, 4, 9)] == [1, 2, 3]


def test_as_many_frames_of_waveforms_are_read_as_tokens_are_asked_for(tmp_path: Path) -> None:
    model = ctc_model(ctc_processor(tmp_path))
    clips = [{"input_values": torch.randn(6400)} for _ in range(40)]
    batches = load(model, clips, num_tokens=200)
    each = count_tokens({"input_values": torch.randn(1, 6400)}, model)
    assert each < 64 and sum(len(batch["input_values"]) for batch in batches) == -(-200 // each)
    report = from_teacher(
        model,
        method={"method": "calibrated", "calibration_tokens": 200},
        calibration_dataset=clips,
        num_hidden_layers=2,
    ).initialization_report
    assert report.calibration["tokens"] == each * -(-200 // each)
