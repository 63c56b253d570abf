"""Every input of the teacher's forward pass is used, from rows as from batches, and what a model cannot take is refused."""

from typing import Any

import datasets
import pytest
import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    DebertaV2Config,
    DebertaV2ForMaskedLM,
    DebertaV2ForSequenceClassification,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    ViTConfig,
    ViTForMaskedImageModeling,
)

from hf_guide import OptionError, from_teacher
from hf_guide.calibration.forward import held_out_examples
from tests.calibration.test_data import are_equal, load
from tests.tiny import KINDS, SMALLER, logits, same_bits

GENERATOR = torch.Generator().manual_seed(4)
IDS = torch.randint(3, 95, (16, 12), generator=GENERATOR)
TYPES = (torch.arange(12) >= 6).long().expand(16, 12)
IMAGES = torch.randn(16, 3, 16, 16, generator=GENERATOR)


def llava() -> PreTrainedModel:
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=16,
        patch_size=8,
        projection_dim=16,
    )
    text = LlamaConfig(vocab_size=96, hidden_size=48, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4)
    torch.manual_seed(0)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=95, vision_feature_layer=-1)
    return LlavaForConditionalGeneration(config).eval()


def masked_vit() -> PreTrainedModel:
    return ViTForMaskedImageModeling(ViTConfig(**KINDS["vit"].config)).eval()


def with_image_tokens(ids: Tensor) -> Tensor:
    return torch.cat([ids[:, :1], torch.full_like(ids[:, :4], 95), ids[:, 5:]], 1)


INPUTS: dict[str, tuple[Any, dict[str, Tensor]]] = {
    "types of tokens": (KINDS["bert classifier"].teacher, {"input_ids": IDS, "token_type_ids": TYPES}),
    "decoder": (KINDS["t5"].teacher, {"input_ids": IDS, "decoder_input_ids": IDS.flip(1)[:, :7]}),
    "images and text": (llava, {"input_ids": with_image_tokens(IDS), "pixel_values": IMAGES}),
    "masked patches": (masked_vit, {"pixel_values": IMAGES, "bool_masked_pos": torch.ones(16, 16).bool()}),
}


@pytest.mark.parametrize("name", INPUTS)
def test_rows_have_the_inputs_of_batches(name: str) -> None:
    make, columns = INPUTS[name]
    teacher = make()
    split = zip(*(value.split(4) for value in columns.values()), strict=True)
    batches = load(teacher, [dict(zip(columns, each, strict=True)) for each in split])
    assert all(batch.keys() == columns.keys() for batch in batches)
    lists = {column: value.tolist() for column, value in columns.items()}
    rows = [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]
    table = datasets.Dataset.from_dict({**lists, "labels": [0] * 16, "unrelated": ["text"] * 16})
    for dataset in (rows, table, table.with_format("torch"), table.iter(batch_size=4)):
        assert are_equal(load(teacher, dataset), batches)


def test_the_inputs_of_a_decoder_are_padded_with_a_mask() -> None:
    lengths = [7, 3, 5, 7]
    rows = [{"input_ids": IDS[0].tolist(), "decoder_input_ids": IDS[1, :length].tolist()} for length in lengths]
    (batch,) = load(KINDS["t5"].teacher(), rows)
    assert batch["decoder_attention_mask"].sum(1).tolist() == lengths
    assert (batch["decoder_input_ids"][1, 3:] == 0).all()


@pytest.mark.parametrize(
    "changed",
    [{"pixel_values": torch.zeros(3, 16, 32)}, {"pixel_values": None}],
    ids=["another shape", "missing"],
)
def test_inputs_that_differ_between_rows_are_an_error(changed: dict[str, Any]) -> None:
    rows: list[dict[str, Any]] = [
        {"input_ids": ids, "pixel_values": image} for ids, image in zip(IDS[:3], IMAGES, strict=False)
    ]
    with pytest.raises(OptionError, match="calibration_dataset has pixel_values of .*: .*the same in each row"):
        load(llava(), [*rows, rows[0] | changed])


@pytest.mark.parametrize("selection", ["local_search", "block_influence"])
def test_a_model_of_images_and_text_may_lose_blocks(selection: str) -> None:
    student = from_teacher(
        llava(),
        method={"method": "calibrated", "layer_selection": selection},
        calibration_dataset=[{"input_ids": with_image_tokens(IDS), "pixel_values": IMAGES}],
        show_progress=False,
        text_config={"num_hidden_layers": 2},
    )
    assert student.config.text_config.num_hidden_layers == 2
    assert bool(student.initialization_report.calibration.get("exchanged_blocks")) == (selection == "local_search")


@pytest.mark.parametrize("model_class", [DebertaV2ForMaskedLM, DebertaV2ForSequenceClassification])
def test_a_weight_that_runs_twice_in_a_block_is_not_refitted(model_class: Any) -> None:
    """DeBERTa-v3 has the same projections for tokens and for relative positions."""
    sizes = {"vocab_size": 96, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 4}
    relative = {"relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"]}
    torch.manual_seed(0)
    config = DebertaV2Config(
        **sizes, num_attention_heads=4, max_position_embeddings=64, share_att_key=True, **relative
    )
    teacher = model_class(config).eval()
    for changes in ({"num_hidden_layers": 2}, {}):
        student = from_teacher(
            teacher, method="calibrated", calibration_dataset=[{"input_ids": IDS}], show_progress=False, **changes
        )
        report = student.initialization_report
        assert len([note for note in report.approximations if "runs more than once in a block" in note]) == 2
        refitted = {each.name for each in report.parameters if any("refitted" in step for step in each.steps)}
        assert not any("query_proj" in name or "key_proj" in name for name in refitted)
        assert not changes or any("value_proj" in name for name in refitted)
    with torch.no_grad():
        torch.testing.assert_close(student(IDS).logits, teacher(IDS).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "field"), [("gpt2", "n_positions"), ("bert", "max_position_embeddings")])
def test_rows_fit_the_positions_of_the_student(name: str, field: str) -> None:
    kind, ids = KINDS[name], IDS.repeat(1, 2)
    options = {"method": "calibrated", "show_progress": False, **kind.smaller, field: 16}
    with pytest.raises(OptionError, match="rows of 24 tokens in input_ids, and the student has 16 positions"):
        from_teacher(kind.teacher(), calibration_dataset=[{"input_ids": ids}], **options)
    student = from_teacher(kind.teacher(), calibration_dataset=[{"input_ids": ids[:, :16]}], **options)
    assert getattr(student.config, field) == 16


def test_generated_text_fits_the_positions_of_the_student() -> None:
    kind = KINDS["gpt2"]
    student = from_teacher(
        kind.teacher(),
        method={"method": "calibrated", "calibration_tokens": 64},
        calibration_dataset="self_generated",
        show_progress=False,
        **{**kind.smaller, "n_positions": 16},
    )
    assert student.config.n_positions == 16


def test_rows_of_padding_are_not_examples() -> None:
    """With them the same examples are held out as without them, and the student is the same."""
    teacher, mask = KINDS["llama"].teacher(), torch.ones(21, 12, dtype=torch.long)
    mask[3::4] = 0
    padded = torch.zeros(21, 12, dtype=torch.long)
    padded[mask[:, 0].bool()] = IDS
    batch = {"input_ids": padded, "attention_mask": mask}
    (held_out,) = held_out_examples([batch])
    assert held_out is not None and held_out[mask[:, 0].bool()].nonzero().flatten().tolist() == [3, 7, 11, 15]
    assert not held_out[3::4].any()
    students = [
        from_teacher(
            teacher.double(),
            method="calibrated",
            calibration_dataset=[each],
            show_progress=False,
            **KINDS["llama"].smaller,
        )
        for each in (batch, {"input_ids": IDS})
    ]
    for one, other in zip(*(student.parameters() for student in students), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("method", ["calibrated", "guide", "uniform"])
def test_the_callers_modes_have_no_effect(method: str) -> None:
    """Neither autocast, which would round, nor inference mode, which would make a student that cannot be trained."""
    kind = KINDS["llama"]
    options = {"calibration_dataset": [{"input_ids": IDS}]} if method == "calibrated" else {}

    def make() -> PreTrainedModel:
        return from_teacher(
            kind.teacher(), method=method, show_progress=False, **options, **SMALLER, num_key_value_heads=1
        )

    plain = make()
    with torch.autocast("cpu", torch.bfloat16):
        assert same_bits(make(), plain)
        assert torch.is_autocast_enabled("cpu")
    with torch.inference_mode():
        inside = make()
    assert same_bits(inside, plain)
    inside(input_ids=IDS, labels=IDS).loss.backward()
    assert torch.equal(logits(inside, kind), logits(plain, kind))
