"""A requested size is the student's, by the shapes of its parameters, or an error."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    AutoConfig,
    BertConfig,
    BertForMaskedLM,
    CLIPVisionConfig,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    FunnelConfig,
    FunnelForMaskedLM,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MarianConfig,
    MarianForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SwinConfig,
    SwinForImageClassification,
    T5Config,
    T5EncoderModel,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from hf_guide import HfGuideError, OptionError, ShapeError, find_shapes, from_teacher
from hf_guide.cli.main import main
from tests.tiny import KINDS, SIZES

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
WHISPER_SIDE = {"layers": 2, "attention_heads": 4, "ffn_dim": 96}
MIXTURE = {**SMALL, "intermediate_size": 64, "num_hidden_layers": 2}


def swin() -> PreTrainedModel:
    config = SwinConfig(
        embed_dim=16, depths=[2, 2, 2], num_heads=[2, 4, 8], image_size=64, patch_size=4, window_size=4
    )
    return SwinForImageClassification(config)


def mixtral() -> PreTrainedModel:
    return MixtralForCausalLM(MixtralConfig(**MIXTURE, num_local_experts=4, num_experts_per_tok=2))


def qwen3_moe() -> PreTrainedModel:
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**MIXTURE, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2, head_dim=8)
    )


def whisper() -> PreTrainedModel:
    sides = {f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in WHISPER_SIDE.items()}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "vocab_size": 64}
    return WhisperForConditionalGeneration(
        WhisperConfig(d_model=64, num_mel_bins=16, max_source_positions=50, **sides, **tokens)
    )


def llava() -> PreTrainedModel:
    seen = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    return LlavaForConditionalGeneration(
        LlavaConfig(
            text_config=LlamaConfig(**SMALL, intermediate_size=64, num_hidden_layers=4),
            vision_config=CLIPVisionConfig(**seen, image_size=32, patch_size=16),
        )
    )


def deepseek() -> PreTrainedModel:
    low_rank = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    experts = {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1}
    sizes = {**SMALL, "num_key_value_heads": 4, "intermediate_size": 64, "num_hidden_layers": 3}
    return DeepseekV3ForCausalLM(
        DeepseekV3Config(**sizes, **low_rank, **experts, moe_intermediate_size=16, first_k_dense_replace=1)
    )


TEACHERS: dict[str, Any] = {
    **{name: kind.teacher for name, kind in KINDS.items() if name != "llama tied"},
    "swin": swin,
    "mixture": mixtral,
    "qwen3_moe": qwen3_moe,
    "llava": llava,
    "deepseek_v3": deepseek,
}
ASKED = [
    *(
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "intermediate_size",
        "head_dim",
    ),
    *("d_model", "d_ff", "d_kv", "num_layers", "num_decoder_layers", "num_heads", "embed_dim", "depths"),
    *("n_embd", "n_layer", "n_head", "n_inner", "num_local_experts", "n_routed_experts", "moe_intermediate_size"),
    *("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "v_head_dim"),
]


def size_of(model: PreTrainedModel) -> dict[str, int]:
    """Return the number of elements of each parameter by its name, which also shows the blocks."""
    return {name: parameter.numel() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=() if name in ("llama", "gpt2", "vit", "swin", "qwen3_moe") else pytest.mark.slow)
        for name in TEACHERS
    ],
)
def test_every_requested_size_is_the_models_or_an_error(family: str) -> None:
    teacher = TEACHERS[family]()
    tried = made = 0
    for part, name, value in sizes_of_config(teacher.config):
        half = [max(1, each // 2) for each in value] if isinstance(value, list) else value // 2
        if not half or half == value:
            continue
        tried += 1
        overrides = {part: {name: half}} if part else {name: half}
        try:
            student = from_teacher(teacher, method="uniform", show_progress=False, **overrides)
        except (ShapeError, OptionError):
            continue
        made += 1
        config = getattr(student.config, part) if part else student.config
        held = getattr(config, name)
        assert (list(held) if isinstance(half, list) else held) == half
        grown, had = size_of(student), size_of(teacher)
        same_heads = (
            name in ("num_attention_heads", "n_head", "num_heads") and "head_dim" not in teacher.config.to_dict()
        )
        assert grown != had or same_heads, f"{name}={half} was made, and every parameter is as large as the teacher's"
    assert tried and (made or family in ("swin", "llava"))


def sizes_of_config(config: Any) -> list[tuple[str, str, Any]]:
    """Return the sizes among ASKED that a config or one of its parts holds: the part's name, the size's, and its value."""
    found = []
    parts = {"": config, **{name: part for name, part in vars(config).items() if hasattr(part, "attribute_map")}}
    for part, holder in parts.items():
        for name in ASKED:
            value = getattr(holder, name, None) if name in {*vars(holder), *holder.attribute_map} else None
            if isinstance(value, (list, tuple)):
                found.append((part, name, list(value)))
            elif isinstance(value, int) and not isinstance(value, bool):
                found.append((part, name, value))
    return found


@pytest.mark.sampled(12)
@pytest.mark.parametrize("family", ["llama", "bert", "t5", "swin", "llava", "mixture"])
@pytest.mark.parametrize("value", ["x", -32, 0, True, 1.5, 10**9], ids=str)
def test_an_invalid_size_is_an_error_before_anything_is_built(
    family: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = TEACHERS[family]()
    monkeypatch.setattr("hf_guide.initialization.registry.build_student", None)  # nothing may be built
    for part, name, had in sizes_of_config(teacher.config):
        wrong = [*had[:-1], value] if isinstance(had, list) else value
        with pytest.raises((ShapeError, OptionError), match=name):
            from_teacher(teacher, show_progress=False, **({part: {name: wrong}} if part else {name: wrong}))


def test_an_invalid_size_is_an_error_of_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    KINDS["llama"].teacher().save_pretrained(tmp_path / "teacher")
    for option, reason in (
        (["--num-hidden-layers", "1000000000"], "num_hidden_layers is 1000000000, its teacher's 4"),
        (["--hidden-size", "-32"], "hidden_size must be at least 1, not -32"),
        (["--num-attention-heads", "0"], "num_attention_heads must be at least 1, not 0"),
        (["--config", "num_hidden_layers=1e9"], "num_hidden_layers=1000000000.0 must be a whole number"),
        (["--config", "hidden_size=wide"], "hidden_size='wide' must be a whole number"),
    ):
        assert main(["init", str(tmp_path / "teacher"), "-o", str(tmp_path / "student"), *option]) != 0
        assert reason in capsys.readouterr().err
        assert not (tmp_path / "student").exists()


def test_a_size_that_the_family_computes_names_what_it_is_computed_from() -> None:
    teacher = swin()
    with pytest.raises(ShapeError, match="computes hidden_size=64.*set embed_dim and depths instead"):
        from_teacher(teacher, hidden_size=32, show_progress=False)
    with pytest.raises(ShapeError, match="computes num_layers=3.*set depths instead"):
        from_teacher(teacher, num_hidden_layers=2, show_progress=False)
    with pytest.raises(ShapeError, match="set .*depths instead"):
        from_teacher(teacher, num_hidden_layers=2, hidden_size=32, show_progress=False)
    config = swin().config
    config.hidden_size = 32
    with pytest.raises(ShapeError, match="hidden_size=32 was requested"):
        from_teacher(teacher, config, show_progress=False)
    assert from_teacher(teacher, hidden_size=64, show_progress=False).config.hidden_size == 64
    funnel = FunnelForMaskedLM(
        FunnelConfig(vocab_size=64, block_sizes=[2, 2], d_model=16, n_head=2, d_head=8, d_inner=32)
    )
    with pytest.raises(HfGuideError):
        from_teacher(funnel, num_hidden_layers=2, show_progress=False)


def test_a_size_that_the_model_does_not_have_is_an_error() -> None:
    with pytest.raises(OptionError, match="intermediate_size=32 changes nothing in a Qwen3MoeForCausalLM"):
        from_teacher(qwen3_moe(), intermediate_size=32, show_progress=False)
    encoder = T5EncoderModel(T5Config(vocab_size=96, d_model=48, d_kv=12, d_ff=64, num_layers=4, num_heads=4))
    with pytest.raises(OptionError, match="num_decoder_layers=2 changes nothing in a T5EncoderModel"):
        from_teacher(encoder, num_decoder_layers=2, show_progress=False)
    assert from_teacher(encoder, num_layers=2, show_progress=False).config.num_layers == 2


def test_fields_that_are_not_sizes_are_not_checked() -> None:
    student = from_teacher(
        KINDS["llama"].teacher(),
        attention_dropout=0.1,
        hidden_act="relu",
        pad_token_id=3,
        use_cache=False,
        max_position_embeddings=64,
        show_progress=False,
    )
    assert student.config.attention_dropout == 0.1 and student.config.max_position_embeddings == 64
    assert student.config.hidden_act == "relu" and not student.config.use_cache
    bert = from_teacher(BertForMaskedLM(BertConfig(**SIZES)), num_labels=5, show_progress=False)
    assert bert.config.num_labels == 5


@pytest.mark.parametrize(
    ("family", "overrides"),
    [("llama", {"hidden_size": 24, "num_hidden_layers": 2}), ("swin", {"depths": [1, 2, 2]}), ("t5", {"d_ff": 32})],
)
def test_a_saved_student_loads_unchanged(family: str, overrides: dict[str, Any], tmp_path: Path) -> None:
    student = from_teacher(TEACHERS[family](), show_progress=False, **overrides)
    student.save_pretrained(tmp_path)
    loaded = type(student).from_pretrained(tmp_path)
    assert size_of(loaded) == size_of(student)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in student.state_dict().items())
    again = AutoConfig.from_pretrained(tmp_path)
    assert {name: getattr(again, name) for name in overrides} == overrides


@pytest.mark.parametrize(
    ("teacher", "overrides", "reason"),
    [
        (mixtral, {"num_local_experts": 1}, "num_local_experts=1 is fewer than num_experts_per_tok=2"),
        (qwen3_moe, {"num_experts": 1}, "is fewer than num_experts_per_tok=2"),
        (deepseek, {"n_routed_experts": 1}, "n_routed_experts=1 is fewer than num_experts_per_tok=2"),
        (deepseek, {"n_routed_experts": 2}, "topk_group=1 groups of 1 experts are fewer than num_experts_per_tok=2"),
        (deepseek, {"n_routed_experts": 7}, "do not divide into n_group=2"),
        (deepseek, {"num_key_value_heads": 2}, "cannot run: RuntimeError in DeepseekV3Attention.forward"),
    ],
)
def test_a_mixture_that_cannot_run_is_an_error_that_names_both_sizes(
    teacher: Any, overrides: dict[str, int], reason: str
) -> None:
    with pytest.raises(ShapeError, match=reason):
        from_teacher(teacher(), show_progress=False, **overrides)
    config = teacher().config
    for name, value in overrides.items():
        setattr(config, name, value)
    with pytest.raises(ShapeError, match=reason):
        from_teacher(teacher(), config, show_progress=False)


def test_blocks_may_be_repeated_where_each_is_named() -> None:
    teacher = KINDS["llama"].teacher()
    student = from_teacher(
        teacher, num_hidden_layers=6, method={"layer_selection": [0, 1, 1, 2, 2, 3]}, show_progress=False
    )
    assert len(student.model.layers) == 6
    for depth in (7, 10**9):
        with pytest.raises(HfGuideError):
            from_teacher(
                teacher, num_hidden_layers=depth, method={"layer_selection": [0, 1, 1, 2, 2, 3]}, show_progress=False
            )


def test_known_sizes_are_spelled_as_configs_spell_them() -> None:
    known = set()
    for config_class in (LlamaConfig, T5Config, SwinConfig, DeepseekV3Config, transformers.GPT2Config):
        known |= vars(config_class()).keys() | config_class().attribute_map.keys()
    assert set(ASKED) <= known | {"num_local_experts"}


def test_a_size_that_only_the_forward_reads_is_a_size() -> None:
    sizes = {"vocab_size": 64, "hidden_size": 32, "embedding_size": 16, "intermediate_size": 64}
    teacher = AlbertForMaskedLM(AlbertConfig(**sizes, num_hidden_layers=4, num_attention_heads=4)).eval()
    student = from_teacher(teacher, num_hidden_layers=2, show_progress=False)
    assert student.config.num_hidden_layers == 2
    with pytest.raises(OptionError, match="encoder_layers=1 changes nothing in a MarianForCausalLM"):
        sizes = {"vocab_size": 64, "d_model": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "pad_token_id": 0}
        heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
        decoder = MarianForCausalLM(MarianConfig(**sizes, **heads, encoder_layers=2, decoder_layers=2))
        from_teacher(decoder, encoder_layers=1, show_progress=False)


HEADS_OF_FULL_WIDTH: dict[str, tuple[type, dict[str, Any], dict[str, Any]]] = {
    "Deberta": (transformers.DebertaForMaskedLM, {**SMALL, "intermediate_size": 64}, {"num_attention_heads": 2}),
    "M2M100": (
        transformers.M2M100ForConditionalGeneration,
        {
            **{"vocab_size": 64, "d_model": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64},
            **{"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4},
        },
        {"decoder_attention_heads": 2},
    ),
    "Jamba": (
        transformers.JambaForCausalLM,
        {**MIXTURE, "num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4}
        | {"use_mamba_kernels": False, "num_experts": 2, "mamba_d_state": 4},
        {"num_attention_heads": 2, "num_key_value_heads": 1},
    ),
}


@pytest.mark.parametrize("name", HEADS_OF_FULL_WIDTH)
def test_the_same_weights_are_not_cut_into_other_heads(name: str) -> None:
    model_class, sizes, heads = HEADS_OF_FULL_WIDTH[name]
    teacher = model_class(model_class.config_class(**sizes)).eval()
    with pytest.raises(
        ShapeError, match=r"must be the teacher's \d+, found \d+: its weights have the teacher's shapes"
    ):
        from_teacher(teacher, show_progress=False, **heads)
    from_teacher(teacher, show_progress=False, method="random", **heads)


def test_heads_of_one_part_of_a_composite_model_are_not_regrouped() -> None:
    teacher = llava()
    with pytest.raises(ShapeError, match="must be the teacher's|head size"):
        from_teacher(teacher, vision_config={"num_attention_heads": 1}, show_progress=False)


@pytest.mark.parametrize("labels", [0, -1, "3", 2.0])
def test_labels_are_counted_by_a_whole_number(labels: Any) -> None:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    teacher = transformers.BertForSequenceClassification(BertConfig(**sizes, num_hidden_layers=1)).eval()
    with pytest.raises(HfGuideError, match="num_labels.* must be"):
        from_teacher(teacher, num_labels=labels, show_progress=False)


def test_each_token_goes_to_an_expert() -> None:
    with pytest.raises(ShapeError, match="num_experts_per_tok must be at least 1, not 0"):
        from_teacher(qwen3_moe(), num_experts_per_tok=0, show_progress=False)


@pytest.mark.parametrize("method", ["random", "uniform", "guide", "calibrated"])
def test_a_size_for_which_the_family_has_no_initial_weights_is_an_error_before_any_work(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whisper's sinusoidal positions need an even width, and only its initialization checks that."""
    heads = {"encoder_attention_heads": 3, "decoder_attention_heads": 3}
    sounds = [{"input_features": torch.randn(4, 16, 100), "decoder_input_ids": torch.ones(4, 8, dtype=torch.long)}]
    data = {"calibration_dataset": sounds} if method == "calibrated" else {}
    teacher = whisper()
    monkeypatch.setattr(type(teacher), "forward", None)
    with pytest.raises(ShapeError, match="rejects this config: Number of channels has to be divisible by 2"):
        from_teacher(teacher, d_model=45, method=method, show_progress=False, **heads, **data)
    monkeypatch.undo()  # a search runs its shapes, with weights of their own
    shapes = find_shapes(teacher, num_parameters="40%", show_progress=False, **heads)
    assert all(each.sizes["d_model"] % 2 == 0 for each in shapes)
