"""Layouts of unregistered families: right where they are inferred, an error where they cannot be certain."""

import dataclasses

import pytest
import torch
from transformers import CONFIG_MAPPING, Gemma3Config, Gemma3ForConditionalGeneration, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from hf_guide import LayoutError, ShapeError, from_teacher
from hf_guide.initialization.equivalence import check_equivalence, random_stream_rotation, relative_logit_error
from hf_guide.initialization.infer_layout import infer_layout, layout_for, trace_norms
from hf_guide.layouts.grammar import axis_names, parse_axes
from hf_guide.layouts.registry import Layout, registered_layouts
from hf_guide.models.tiny_models import build_tiny_model, randomize_parameters, tiny_config
from tests.invariants.embed_small_in_large import embed_small_in_large, randomize


def tiny_model(family: str, seed: int = 0, **sizes: int) -> PreTrainedModel:
    config = CONFIG_MAPPING[family]()
    tied = {"tie_word_embeddings": False} if hasattr(config, "tie_word_embeddings") else {}
    model = build_tiny_model(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], tiny_config(config, **tied, **sizes), seed)
    randomize_parameters(model, seed)
    return model


def exactly_normed(model: PreTrainedModel) -> PreTrainedModel:
    """Norms divide by a length, not by a length and an epsilon that weighs more in a narrow model."""
    for module in model.modules():
        for name in ("variance_epsilon", "eps"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 1e-12)
    return model


@pytest.mark.sampled(2)
@pytest.mark.parametrize("family", ["arcee", "seed_oss", "mamba", "qwen3_next", "minimax_m2"])
def test_inferred_layout_passes_the_law_of_lift(family: str) -> None:
    assert family not in registered_layouts()
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "head_dim": 16}
    small = exactly_normed(tiny_model(family, **(sizes if family != "qwen3_next" else {"hidden_size": 48})))
    big = exactly_normed(tiny_model(family, seed=1))
    layout = layout_for(big.config, type(big))
    assert layout.exactness.startswith("inferred: exact")
    randomize(small, layout, seed=2, stream_gains="constant")
    embed_small_in_large(small, big, layout, seed=3)
    assert relative_logit_error(big, small) <= 1e-5, (
        "the lifted teacher is not the small model: the inferred layout is wrong"
    )
    student = from_teacher(big, small.config, show_progress=False)
    student.set_attn_implementation("eager")
    student.set_experts_implementation("eager")
    assert relative_logit_error(exactly_normed(student), small) <= 1e-5


def test_heads_are_kept_where_the_family_cannot_run_with_fewer() -> None:
    model = tiny_model("bitnet")
    layout = layout_for(model.config, type(model))
    assert layout.exactness.startswith("inferred")
    assert "kv_heads" not in {name for row in layout.rows for axis in row.axes for name in axis_names(axis)}


def test_a_hidden_factor_of_the_width_is_an_error() -> None:
    config = CONFIG_MAPPING["recurrent_gemma"]()
    with pytest.raises(LayoutError, match="factor of its embeddings is not known to be independent of its width"):
        infer_layout(config, MODEL_FOR_CAUSAL_LM_MAPPING[type(config)])


def test_a_family_whose_layout_cannot_be_inferred_is_probed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    probes: list[PreTrainedModel] = []

    def trace(model: PreTrainedModel) -> tuple:
        probes.append(model)
        return trace_norms(model)

    monkeypatch.setattr("hf_guide.initialization.infer_layout.trace_norms", trace)
    teacher = tiny_model("recurrent_gemma", vocab_size=97)  # of no other test
    for _ in range(2):
        from_teacher(teacher, show_progress=False)
        assert "blocks only" in layout_for(teacher.config, type(teacher)).exactness
        with pytest.raises(LayoutError, match="factor of its embeddings is not known"):
            infer_layout(teacher.config, type(teacher))
    assert len(probes) == 1


def test_unknown_family_keeps_its_width_and_may_lose_blocks() -> None:
    teacher = tiny_model("recurrent_gemma")
    same = from_teacher(teacher, show_progress=False)
    same.set_attn_implementation("eager")
    assert relative_logit_error(same, teacher) <= 1e-9
    attention = next(
        number for number, layer in enumerate(teacher.model.layers) if hasattr(layer.temporal_block, "q_proj")
    )
    fewer = tiny_config(teacher.config)
    fewer.num_hidden_layers = 3
    student = from_teacher(teacher, fewer, method={"layer_selection": [0, 1, attention]}, show_progress=False)
    for ours, theirs in ((0, 0), (1, 1), (2, attention)):
        for mine, its in zip(
            student.model.layers[ours].parameters(), teacher.model.layers[theirs].parameters(), strict=True
        ):
            assert torch.equal(mine, its)
    with pytest.raises(ShapeError, match="must be the teacher's 64, found 48.*independent of its width"):
        from_teacher(teacher, tiny_config(teacher.config, hidden_size=48), show_progress=False)


def wrong_layouts() -> dict[str, Layout]:
    right = registered_layouts()["llama"]

    def changed(pattern: str, **values: object) -> Layout:
        rows = tuple(
            dataclasses.replace(row, **values) if row.pattern.endswith(pattern) else row for row in right.rows
        )
        return dataclasses.replace(right, rows=rows)

    return {
        "an output projection whose output axis is not the residual stream": changed(
            "o_proj", axes=parse_axes("place (kv_heads group head_dim)")
        ),
        "a weight with the norm of another branch": changed(
            "gate_proj", input_norms=("layers.{block}.input_layernorm",)
        ),
        "heads inside of the head size": changed("q_proj", axes=parse_axes("(q_dim kv_heads group) embed")),
        "gains that are stored less one": dataclasses.replace(right, norm_offset=1.0),
    }


@pytest.mark.parametrize("fault", list(wrong_layouts()))
def test_check_equivalence_rejects_a_wrong_layout(fault: str) -> None:
    model = tiny_model("llama")
    assert check_equivalence(registered_layouts()["llama"], model).passed
    assert not check_equivalence(wrong_layouts()[fault], model).passed


def test_rotation_keeps_the_mean_where_asked() -> None:
    rotation = random_stream_rotation(12, keep_mean=True)
    ones = torch.ones(12, dtype=torch.float64)
    assert torch.allclose(rotation.T @ rotation, torch.eye(12, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(ones @ rotation, ones, atol=1e-12)
    assert not torch.allclose(rotation, torch.eye(12, dtype=torch.float64), atol=0.1)


def test_a_model_that_also_reads_images_allows_only_fewer_blocks_and_states_the_reason():
    text = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 16}
    seen = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config=text | {"num_attention_heads": 2, "num_key_value_heads": 1},
        vision_config=seen | {"image_size": 32, "patch_size": 16},
    )
    layout = layout_for(config, Gemma3ForConditionalGeneration)
    assert (
        "blocks only" in layout.exactness
        and "factor of its embeddings is not known to be independent" in layout.exactness
    )
