"""A student's config is its teacher's with the overrides, and nothing else changed."""

import dataclasses
import re

import pytest
import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    BartConfig,
    BertConfig,
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoConfig,
    LlamaConfig,
    LlavaConfig,
    MixtralConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
    T5Config,
    ViTConfig,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hf_guide.errors import HfGuideError, OptionError, ShapeError
from hf_guide.initialization.infer_layout import layout_for
from hf_guide.initialization.student_config import derive_student_config, is_head_size, split_heads_note
from hf_guide.layouts.hierarchy import is_blocks_only
from hf_guide.modeling import from_teacher
from hf_guide.models.model_classes import meta_model
from hf_guide.models.tiny_models import MODEL_ERRORS, build_tiny_model, tiny_config
from hf_guide.shapes.fields import axes_agree

SIZES = {"hidden_size": 64, "num_attention_heads": 8, "num_hidden_layers": 8, "vocab_size": 96}
LLAMA_LIKE = {**SIZES, "intermediate_size": 128}
GROUPED = {**LLAMA_LIKE, "num_key_value_heads": 4}
TEACHERS = {
    "llama": LlamaConfig(**GROUPED),
    "gpt2": GPT2Config(n_embd=64, n_head=8, n_layer=8, vocab_size=96),
    "qwen2": Qwen2Config(**GROUPED, use_sliding_window=True, max_window_layers=3, sliding_window=16),
    "qwen3": Qwen3Config(**GROUPED, head_dim=16),
    "gemma2": Gemma2Config(**GROUPED, head_dim=16, query_pre_attn_scalar=16),
    "gemma3_text": Gemma3TextConfig(**GROUPED, head_dim=16),
    "smollm3": SmolLM3Config(**GROUPED, pad_token_id=0),
    "t5": T5Config(d_model=64, d_kv=8, d_ff=128, num_layers=8, num_heads=8, vocab_size=96),
    "bert": BertConfig(**LLAMA_LIKE),
    "mixtral": MixtralConfig(**GROUPED),
    "gpt_neo": GPTNeoConfig(
        hidden_size=64, num_heads=8, num_layers=8, attention_types=[[["global", "local"], 4]], vocab_size=96
    ),
    "gptj": GPTJConfig(n_embd=64, n_head=4, n_layer=8, rotary_dim=8, vocab_size=96),
    "falcon": FalconConfig(**SIZES),
    "bloom": BloomConfig(hidden_size=64, n_head=8, n_layer=8, vocab_size=96),
    "vit": ViTConfig(hidden_size=64, intermediate_size=128, num_attention_heads=8, num_hidden_layers=8),
    "bart": BartConfig(d_model=64, encoder_layers=8, decoder_layers=8, vocab_size=96),
}
IDENTITY = ("transformers_version", "_name_or_path")


def plain_dict(config: PreTrainedConfig) -> dict:
    """Return a config's fields without the version and the path it was loaded from."""
    return {name: value for name, value in config.to_dict().items() if name not in IDENTITY}


@pytest.fixture(params=TEACHERS, ids=str)
def teacher(request: pytest.FixtureRequest) -> PreTrainedConfig:
    return TEACHERS[request.param]


def test_no_override_changes_nothing(teacher: PreTrainedConfig) -> None:
    assert plain_dict(derive_student_config(teacher, {})) == plain_dict(teacher)


def test_a_smaller_student_can_be_built_and_the_teacher_stays(teacher: PreTrainedConfig) -> None:
    before = teacher.to_dict()
    student = derive_student_config(teacher, {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4})
    assert teacher.to_dict() == before
    assert type(student) is type(teacher)
    assert (student.hidden_size, student.num_hidden_layers, student.num_attention_heads) == (32, 4, 4)
    sizes = {"hidden_size": 32, "num_attention_heads": 4}
    student = with_blocks(teacher, [0, 2, 4, 6], **sizes)
    with torch.device("meta"):
        AutoModel.from_config(student)
    assert plain_dict(type(student)(**student.to_dict())) == plain_dict(student)


def test_computed_fields_are_computed_again() -> None:
    teacher = TEACHERS["llama"]
    assert derive_student_config(teacher, {"hidden_size": 32}).num_key_value_heads == 4
    assert derive_student_config(TEACHERS["falcon"], {"hidden_size": 32}).ffn_hidden_size == 128
    assert derive_student_config(T5Config(num_layers=4), {"num_layers": 2}).num_decoder_layers == 2


def test_explicit_fields_stay() -> None:
    teacher = LlamaConfig(**LLAMA_LIKE, head_dim=16)
    assert derive_student_config(teacher, {"hidden_size": 32}).head_dim == 16
    assert derive_student_config(TEACHERS["t5"], {"d_model": 32}).d_kv == 8
    assert derive_student_config(TEACHERS["gemma2"], {"hidden_size": 32}).query_pre_attn_scalar == 16
    assert derive_student_config(GPT2Config(n_inner=100), {"n_embd": 384}).n_inner == 100
    assert derive_student_config(GPT2Config(), {"n_embd": 384}).n_inner is None


def test_heads_stay_whole_where_the_family_has_a_field_for_their_size(teacher: PreTrainedConfig) -> None:
    """A narrower student, or one of fewer heads, has heads as large as its teacher's; the others' follow the width."""
    stated = {field.name for field in dataclasses.fields(teacher)} & {"head_dim", "d_kv"}
    size = teacher.hidden_size // teacher.num_attention_heads
    whole = {getattr(teacher, name) or size for name in stated}
    for name in ("hidden_size", "num_attention_heads"):
        half = {name: getattr(teacher, name) // 2}
        student = derive_student_config(teacher, half)
        heads, follows = student.num_attention_heads, student.hidden_size // student.num_attention_heads
        assert {getattr(student, field) for field in stated} == whole
        for field in stated:
            assert getattr(derive_student_config(teacher, {**half, field: 4}), field) == 4
        with torch.device("meta"):
            weights = dict(AutoModel.from_config(student).named_parameters())
        rows = {len(each) for key, each in weights.items() if re.search(r"\.(q_proj|q|query)\.weight$", key)}
        assert rows <= {heads * each for each in whole or {follows}}
        assert bool(split_heads_note(teacher, student, half)) == (not stated and follows < size)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
def test_heads_of_half_the_width_are_as_the_config_states_them(model_type: str) -> None:
    """In every causal language model: a size of heads that the class may compute is the teacher's, and its modules have it."""
    config_class = CONFIG_MAPPING[model_type]
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[config_class]
    try:
        teacher = tiny_config(config_class())
        meta_model(model_class, teacher)
        student = derive_student_config(teacher, {"hidden_size": teacher.hidden_size // 2})
        model = meta_model(model_class, student)
    except (*MODEL_ERRORS, OptionError, ShapeError) as error:
        pytest.skip(f"no tiny teacher, or none of half the width: {error}")
    layout = layout_for(teacher, model_class)
    if teacher.model_type == "helium":  # its output projection is as wide as the stream, whatever its heads are
        with pytest.raises(HfGuideError, match="o_proj"):
            from_teacher(build_tiny_model(model_class, teacher), hidden_size=student.hidden_size, show_progress=False)
        return
    assert is_blocks_only(layout) or axes_agree(layout, student, model)
    names = [each.name for each in dataclasses.fields(teacher) if is_head_size(each.name) and each.default is None]
    follows = teacher.model_type in ("xlnet",)  # where another size is an error of its config
    assert follows or all(vars(student).get(name) == vars(teacher).get(name) for name in names)


@pytest.mark.parametrize("teacher", [TEACHERS["gpt2"], TEACHERS["qwen2"], TEACHERS["bert"]], ids=type)
def test_a_note_on_split_heads_names_what_keeps_them_whole(teacher: PreTrainedConfig) -> None:
    (note,) = split_heads_note(teacher, derive_student_config(teacher, {"hidden_size": 32}), ["hidden_size"])
    advised = {name: int(size) for name, size in re.findall(r"(\w+)=(\d+)", note.partition(": ")[2])}
    whole = derive_student_config(teacher, {"hidden_size": 32, **advised})
    assert whole.hidden_size // whole.num_attention_heads == teacher.hidden_size // teacher.num_attention_heads


def test_a_width_of_no_whole_groups_of_heads_is_noted() -> None:
    odd = derive_student_config(TEACHERS["qwen2"], {"hidden_size": 40})
    assert "multiples of 16 as hidden_size" in split_heads_note(TEACHERS["qwen2"], odd, ["hidden_size"])[0]


def test_as_many_key_value_heads_as_heads_stay_as_many() -> None:
    assert derive_student_config(LlamaConfig(**LLAMA_LIKE), {"num_attention_heads": 4}).num_key_value_heads == 4
    explicit = Qwen2Config(**LLAMA_LIKE, num_key_value_heads=8)  # whose class has a constant default
    assert derive_student_config(explicit, {"num_attention_heads": 4}).num_key_value_heads == 4
    fewer = derive_student_config(explicit, {"num_attention_heads": 4, "num_key_value_heads": 2})
    assert fewer.num_key_value_heads == 2


def test_names_of_the_family_and_their_aliases_mean_the_same() -> None:
    teacher = TEACHERS["gpt2"]
    assert plain_dict(derive_student_config(teacher, {"hidden_size": 32})) == plain_dict(
        derive_student_config(teacher, {"n_embd": 32})
    )
    with pytest.raises(OptionError, match="32 and 16"):
        derive_student_config(teacher, {"n_embd": 32, "hidden_size": 16})


def test_an_unknown_override_names_the_nearest() -> None:
    with pytest.raises(OptionError, match="LlamaConfig has no 'hiden_size'.*'hidden_size'"):
        derive_student_config(TEACHERS["llama"], {"hiden_size": 32})
    for name in ("model_type", "quantization_config", "_name_or_path"):
        with pytest.raises(OptionError, match=name):
            derive_student_config(TEACHERS["llama"], {name: "gpt2"})


def test_the_familys_reason_is_in_the_error() -> None:
    with pytest.raises(ShapeError, match=r"(?s)hidden_size=30.*hidden size \(30\) is not a multiple"):
        derive_student_config(TEACHERS["llama"], {"hidden_size": 30})
    with pytest.raises(ShapeError, match="hidden_size=30 does not divide into num_attention_heads=8"):
        derive_student_config(TEACHERS["bert"], {"hidden_size": 30})
    with pytest.raises(ShapeError, match="num_attention_heads=2 do not divide.* 8 heads in 4"):
        derive_student_config(TEACHERS["llama"], {"num_attention_heads": 2})
    with pytest.raises(ShapeError, match="num_hidden_layers"):
        derive_student_config(TEACHERS["gemma3_text"], {"layer_types": ["full_attention"]})
    with pytest.raises(ShapeError, match="at least 1, not 0"):
        derive_student_config(TEACHERS["bert"], {"hidden_size": 0})
    with pytest.raises(ShapeError):
        derive_student_config(TEACHERS["llama"], {"num_attention_heads": 0})
    with pytest.raises(OptionError, match="hidden_size='wide'"):
        derive_student_config(TEACHERS["llama"], {"hidden_size": "wide"})


def test_a_rotary_part_never_exceeds_the_head() -> None:
    teacher = TEACHERS["gptj"]
    assert derive_student_config(teacher, {"hidden_size": 32}).rotary_dim == 8
    assert derive_student_config(teacher, {"hidden_size": 16}).rotary_dim == 4
    with pytest.raises(ShapeError, match="rotary_dim=8 exceeds the head size 4"):
        derive_student_config(teacher, {"hidden_size": 16, "rotary_dim": 8})


def test_factors_of_long_rope_follow_the_pairs() -> None:
    short, long = [1.0 + i for i in range(8)], [10.0 + i for i in range(8)]
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": short, "long_factor": long}
    sizes = {**GROUPED, "num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0}
    teacher = Phi3Config(**sizes, original_max_position_embeddings=32, rope_parameters=rope)
    student = derive_student_config(teacher, {"hidden_size": 32})
    assert student.rope_parameters["short_factor"] == short[::2]
    assert student.rope_parameters["long_factor"] == long[::2]
    assert teacher.rope_parameters["short_factor"] == short
    assert derive_student_config(teacher, {"num_hidden_layers": 4}).rope_parameters == teacher.rope_parameters


def test_labels_are_kept_unless_their_number_changes() -> None:
    teacher = BertConfig(**LLAMA_LIKE, id2label={0: "no", 1: "yes", 2: "perhaps"}, pad_token_id=3)
    same = derive_student_config(teacher, {"hidden_size": 32, "num_labels": 3})
    assert same.id2label == {0: "no", 1: "yes", 2: "perhaps"} and same.pad_token_id == 3
    fewer = derive_student_config(teacher, {"num_labels": 2})
    assert fewer.num_labels == 2 and set(fewer.label2id.values()) == {0, 1}
    named = derive_student_config(teacher, {"id2label": {0: "never", 1: "ever"}})
    assert named.label2id == {"never": 0, "ever": 1}


def test_the_teachers_storage_is_not_the_students() -> None:
    teacher = LlamaConfig(**LLAMA_LIKE)
    teacher.quantization_config = {"quant_method": "gptq", "bits": 4}
    teacher._name_or_path = "someone/teacher"
    student = derive_student_config(teacher, {})
    assert not hasattr(student, "quantization_config") and student._name_or_path == ""
    assert teacher.quantization_config == {"quant_method": "gptq", "bits": 4}


def depth_name(teacher: PreTrainedConfig) -> str:
    return teacher.attribute_map.get("num_hidden_layers", "num_hidden_layers")


def with_blocks(teacher: PreTrainedConfig, blocks: list[int], **overrides: object) -> PreTrainedConfig:
    name = depth_name(teacher)
    return derive_student_config(teacher, {name: len(blocks), **overrides}, blocks={(name,): blocks})


def test_blocks_keep_their_kind() -> None:
    pattern = ["full_attention", *["sliding_attention"] * 4, "full_attention", *["sliding_attention"] * 2]
    teacher = Gemma3TextConfig(**GROUPED, layer_types=pattern)
    assert with_blocks(teacher, [0, 5, 7]).layer_types == [pattern[0], pattern[5], pattern[7]]
    assert with_blocks(TEACHERS["qwen2"], [2, 3]).layer_types == ["full_attention", "sliding_attention"]
    assert with_blocks(TEACHERS["smollm3"], [2, 3]).no_rope_layers == [1, 0]
    neo = with_blocks(TEACHERS["gpt_neo"], [1, 3, 4])
    assert neo.attention_layers == ["local", "local", "global"]
    assert GPTNeoConfig(**neo.to_dict()).attention_layers == neo.attention_layers
    moe = Qwen3MoeConfig(**GROUPED, mlp_only_layers=[0, 6])
    assert with_blocks(moe, [0, 5, 6]).mlp_only_layers == [0, 2]


def test_overridden_block_fields_stay() -> None:
    teacher = TEACHERS["gemma3_text"]
    mine = ["full_attention", "sliding_attention"]
    assert with_blocks(teacher, [0, 1], layer_types=mine).layer_types == mine
    same_as_derived = ["sliding_attention", "sliding_attention"]
    assert with_blocks(teacher, [0, 5], layer_types=same_as_derived).layer_types == same_as_derived
    types = [[["local"], 2]]
    neo = with_blocks(TEACHERS["gpt_neo"], [0, 1], attention_types=types)
    assert neo.attention_layers == ["local", "local"]


def test_a_block_the_teacher_lacks_is_an_error() -> None:
    with pytest.raises(ShapeError, match="blocks 0 to 7"):
        with_blocks(TEACHERS["llama"], [0, 8])


def test_a_nested_config_takes_a_mapping() -> None:
    teacher = LlavaConfig(text_config=TEACHERS["llama"])
    student = derive_student_config(teacher, {"text_config": {"hidden_size": 32}})
    assert student.text_config.hidden_size == 32 and student.text_config.head_dim == 8
    assert teacher.text_config.hidden_size == 64
    with pytest.raises(OptionError, match="hiden"):
        derive_student_config(teacher, {"text_config": {"hiden_size": 32}})
    with pytest.raises(
        OptionError,
        match=r"no 'head_dim' to override. It is a field of a nested config: text_config=\{'head_dim': 8\}\.",
    ):
        derive_student_config(teacher, {"head_dim": 8})
