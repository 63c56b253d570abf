"""Config fields that depend on the blocks are remapped to the selected blocks, wherever they are."""

import itertools
import random

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BambaConfig,
    Gemma3nTextConfig,
    GenerationConfig,
    Glm4MoeConfig,
    JambaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
    Qwen3MoeConfig,
    Qwen3NextConfig,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    RecurrentGemmaConfig,
)

from hf_guide import InitializationConfig, LayoutError, ShapeError, from_teacher, register_layout
from hf_guide.initialization.blocks.config_fields import (
    FieldKind,
    find_block_fields,
    remap_field,
    standard_depths,
    value_at,
)
from hf_guide.initialization.blocks.selection import (
    BlockRequirements,
    most_influential_blocks,
    nearest_blocks,
    select_cheapest_blocks,
)
from hf_guide.initialization.blocks.tables import merge_state_weights
from hf_guide.initialization.generation_config import remap_generation_config

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**SIZES, "num_key_value_heads": 2, "head_dim": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
SHARING = {
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 96,
    "laurel_rank": 4,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "altup_num_inputs": 2,
}


@pytest.mark.parametrize(
    "kind,value,expected",
    [
        (FieldKind.ENTRIES, ["a", "b", "c", "d", "e", "f"], ["b", "c", "f"]),
        (FieldKind.ENTRIES, "abcdef", "bcf"),
        (FieldKind.STATES, [0, 1, 2, 3, 4, 5, 6], [0, 2, 3, 6]),
        (FieldKind.CYCLE, ("r", "r", "a"), ("r", "a", "a")),
        (FieldKind.KEYED, {2: "x", 4: "y"}, {1: "x"}),
        (FieldKind.KEYED, {"5": "x"}, {"2": "x"}),
        (FieldKind.SOURCES, [0, 1, 1, 3, 4, 2], [0, 0, 1]),
        (FieldKind.NUMBERS, [0, 2, 5], [1, 2]),
        (FieldKind.NUMBERS_FROM_ONE, [1, 3, 6], [2, 3]),
        (FieldKind.AFTER, [1, 3, 5], [0, 1, 2]),
        (FieldKind.OUTPUTS, [1, 3, 4], [0, 1, 1]),
        (FieldKind.STATE_NUMBERS, -1, -1),
        (FieldKind.STATE_NUMBERS, -2, -2),
        (FieldKind.STATE_NUMBERS, [-4, 0, 2, 6], [-2, 0, 1, 3]),
        (FieldKind.FIRST, 2, 1),
        (FieldKind.LAST, 2, 1),
        (FieldKind.END, 4, 1),
        (FieldKind.END, -1, -1),
    ],
)
def test_a_field_is_remapped_to_its_blocks(kind: FieldKind, value: object, expected: object) -> None:
    assert remap_field(value, kind, [1, 2, 5], 6) == expected


def test_an_output_that_no_selected_block_has_is_an_error() -> None:
    with pytest.raises(ShapeError, match="output of block 0 is used"):
        remap_field([0], FieldKind.AFTER, [1, 2, 5], 6)
    with pytest.raises(ShapeError, match="two of them would be the same"):
        remap_field([3, 4], FieldKind.AFTER, [1, 2, 5], 6)


@pytest.mark.parametrize("seed", range(20))
def test_the_best_admissible_selection_is_found(seed: int) -> None:
    draw = random.Random(seed)
    depth, count = 8, 4
    influence = [draw.random() for _ in range(depth)]
    groups = tuple(frozenset(draw.sample(range(depth), 3)) for _ in range(2))
    needs = {draw.randrange(4, depth): frozenset(draw.sample(range(4), 2))}
    requirements = BlockRequirements(groups, needs)
    kinds = [draw.randrange(2) for _ in range(depth)]
    positions = [draw.randrange(2) for _ in range(count)]

    def allowed(position: int, block: int) -> bool:
        return seed % 2 == 0 or kinds[block] == positions[position]

    choices = [
        list(choice)
        for choice in itertools.combinations(range(depth), count)
        if not requirements.violation(choice) and all(allowed(i, block) for i, block in enumerate(choice))
    ]
    found = most_influential_blocks(influence, count, requirements, allowed)
    near = nearest_blocks([0, 2, 4, 6], depth, requirements, allowed)
    if not choices:
        assert found is None and near is None
        return
    assert found == max(choices, key=lambda choice: sum(influence[block] for block in choice))
    distances = [sum((a - b) ** 2 for a, b in zip(choice, [0, 2, 4, 6], strict=True)) for choice in choices]
    assert near == choices[distances.index(min(distances))]


def test_of_equal_selections_the_first_is_returned() -> None:
    assert most_influential_blocks([0.5] * 6, 3) == [0, 1, 2]
    assert select_cheapest_blocks(4, 5, lambda position, block: 0, BlockRequirements()) is None


def teacher_of(config: PreTrainedConfig) -> torch.nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


CHOICES = ("uniform", "first_last", [1, 2, 5])
FAMILIES = {
    name: {**GROUPED, **more}
    for name, more in {
        "gemma2": {},
        "gemma3_text": {"layer_types": ["full_attention", *["sliding_attention"] * 4, "full_attention"]},
        "qwen2": {"use_sliding_window": True, "max_window_layers": 3},
        "cohere2": {},
        "smollm3": {},
        "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2},
        "qwen3_moe": {**EXPERTS, "mlp_only_layers": [0, 2, 5]},
        "lfm2": {"layer_types": ["conv", "full_attention"] * 3},
        "mistral": {},
    }.items()
}


@pytest.mark.sampled(8)
@pytest.mark.parametrize("choice", CHOICES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_field_has_the_teachers_values_at_the_selected_blocks(family: str, choice: object) -> None:
    config = AutoConfig.for_model(family, **FAMILIES[family])
    student = from_teacher(
        teacher_of(config),
        num_hidden_layers=3,
        method=InitializationConfig(layer_selection=choice),
        show_progress=False,
    )
    (blocks,) = [blocks for stack, blocks in student.initialization_report.blocks.items() if stack == "layers"]
    fields = find_block_fields(config, standard_depths(config))
    for each in fields:
        expected = remap_field(value_at(config, each.path), each.kind, blocks, 6)
        assert value_at(student.config, each.path) == expected, each
    assert type(config)(**student.config.to_dict()).to_dict() == student.config.to_dict()


def test_nested_lists_follow_the_blocks_of_their_own_stack() -> None:
    text = {**GROUPED, "model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 2}
    text.pop("head_dim")
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": 16,
        "patch_size": 8,
    }
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=95, vision_feature_layer=-2)
    teacher = LlavaForConditionalGeneration(config)
    layers = {"language_model.layers": [0, 2, 5], "vision_tower.encoder.layers": [0, 1]}
    student = from_teacher(
        teacher,
        text_config={"num_hidden_layers": 3},
        vision_config={"num_hidden_layers": 2},
        method={"layer_selection": layers},
        show_progress=False,
    )
    assert student.initialization_report.blocks == layers
    assert student.config.text_config.layer_types == [config.text_config.layer_types[block] for block in (0, 2, 5)]
    assert student.config.vision_feature_layer == -1  # the state before block 3, now after the last
    assert config.vision_feature_layer == -2
    listed = from_teacher(
        teacher, text_config={"num_hidden_layers": 3}, method={"layer_selection": [1, 2, 3]}, show_progress=False
    )
    assert listed.initialization_report.blocks["language_model.layers"] == [1, 2, 3]
    assert listed.initialization_report.blocks["vision_tower.encoder.layers"] == [0, 1, 2, 3]


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "config,blocks,expected",
    [
        (
            BambaConfig(
                **{**SIZES, "num_key_value_heads": 2},
                attn_layer_indices=[2, 5],
                mamba_n_heads=8,
                mamba_d_head=8,
                mamba_d_state=8,
                mamba_n_groups=1,
            ),
            [0, 2, 4],
            {"attn_layer_indices": [1]},
        ),
        (Qwen3MoeConfig(**GROUPED, **EXPERTS, decoder_sparse_step=2, mlp_only_layers=[3]), [1, 2, 5], {}),
        (
            RecurrentGemmaConfig(**SIZES, lru_width=32),
            [0, 2, 4],
            {"block_types": ["recurrent", "attention", "recurrent"]},
        ),
        (
            Glm4MoeConfig(**GROUPED, first_k_dense_replace=2, n_routed_experts=4, num_experts_per_tok=2, n_group=1),
            [1, 2, 4],
            {"first_k_dense_replace": 1},
        ),
        (
            Gemma3nTextConfig(**{**GROUPED, **SHARING, "intermediate_size": [48, 40, 48, 40, 56, 48]}),
            [1, 2, 3, 5],
            {"num_kv_shared_layers": 1, "intermediate_size": [40, 48, 40, 48]},
        ),
    ],
    ids=lambda value: value.model_type if isinstance(value, PreTrainedConfig) else "",
)
def test_counts_periods_and_index_lists_express_the_kinds_of_the_selected_blocks(
    config: PreTrainedConfig, blocks: list[int], expected: dict
) -> None:
    teacher = teacher_of(config)
    student = from_teacher(
        teacher, num_hidden_layers=len(blocks), method={"layer_selection": blocks}, show_progress=False
    )
    assert student.initialization_report.blocks["layers"] == blocks
    assert {name: getattr(student.config, name) for name in expected} == expected
    for number, block in enumerate(blocks):
        parts = [
            set(dict(model.model.layers[i].named_parameters())) for model, i in ((student, number), (teacher, block))
        ]
        assert parts[0] == parts[1]


def test_blocks_that_the_config_cannot_express_are_an_error_that_names_the_nearest() -> None:
    config = JambaConfig(
        **{**SIZES, "num_hidden_layers": 8, "num_key_value_heads": 2},
        attn_layer_period=4,
        attn_layer_offset=2,
        num_experts=4,
        mamba_d_state=4,
        mamba_dt_rank=4,
        use_mamba_kernels=False,
    )
    teacher = teacher_of(config)
    with pytest.raises(
        ShapeError, match=r"\[0, 2, 5, 7\] listed for 'layers'.*nearest blocks that can be are \[0, 1, 6, 7\]"
    ):
        from_teacher(teacher, num_hidden_layers=4, method={"layer_selection": [0, 2, 5, 7]}, show_progress=False)
    student = from_teacher(teacher, num_hidden_layers=4, method={"layer_selection": [0, 1, 6, 7]}, show_progress=False)
    assert student.initialization_report.blocks["layers"] == [0, 1, 6, 7]


def test_a_block_of_every_kind_is_selected_and_the_report_notes_changes() -> None:
    config = Qwen3NextConfig(
        **{**GROUPED, "num_hidden_layers": 8}, **EXPERTS, **LINEAR, shared_expert_intermediate_size=16
    )
    student = from_teacher(teacher_of(config), num_hidden_layers=4, method="uniform", show_progress=False)
    report = student.initialization_report
    assert "full_attention" in student.config.layer_types
    assert report.blocks["layers"] == [0, 2, 3, 6]
    assert "[0, 2, 4, 6]" in report.notes[0] and "Note: layers" in str(report)
    ids = torch.arange(5, 15)[None]
    with_cache, without = (
        student.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False, use_cache=cache)
        for cache in (True, False)
    )
    assert torch.equal(with_cache, without)


def test_calibrated_chooses_the_most_influential_blocks_that_fit() -> None:
    teacher = teacher_of(
        Glm4MoeConfig(**GROUPED, first_k_dense_replace=1, n_routed_experts=4, num_experts_per_tok=2, n_group=1)
    )
    with torch.no_grad():
        for weight in (teacher.model.layers[0].self_attn.o_proj, teacher.model.layers[0].mlp.down_proj):
            weight.weight.zero_()  # block 0 has no influence, and is the only dense one
    text = [{"input_ids": torch.randint(3, 64, (2, 16), generator=torch.Generator().manual_seed(0))} for _ in range(4)]
    options = {"method": "calibrated", "refit": "none", "layer_selection": "block_influence"}
    report = from_teacher(
        teacher, num_hidden_layers=3, method=options, calibration_dataset=text, show_progress=False
    ).initialization_report
    influence = report.calibration["block_influence"]["layers"]
    others = sorted(range(1, 6), key=lambda block: -influence[block])[:2]
    assert report.blocks["layers"] == [0, *sorted(others)]


def test_kinds_are_checked_before_any_data_is_run() -> None:
    def never() -> None:
        raise AssertionError("the calibration data was read")

    class Unread:
        def __iter__(self):
            never()

    config = Glm4MoeConfig(**GROUPED, first_k_dense_replace=1, n_routed_experts=4, num_experts_per_tok=2, n_group=1)
    named = {"method": "calibrated", "layer_selection": [3, 0, 4]}  # the dense block cannot be second
    with pytest.raises(ShapeError, match="cannot be those of a Glm4MoeConfig"):
        from_teacher(
            teacher_of(config), num_hidden_layers=3, method=named, calibration_dataset=Unread(), show_progress=False
        )


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"),
    reason="older versions cannot build a Gemma 3n that shares keys in blocks of one kind alone",
)
def test_keys_that_a_block_shares_with_a_dropped_one_are_copied_and_reported() -> None:
    config = Gemma3nTextConfig(**GROUPED, **SHARING)
    teacher = teacher_of(config)
    student = from_teacher(teacher, num_hidden_layers=3, method={"layer_selection": [0, 2, 5]}, show_progress=False)
    assert student.config.num_kv_shared_layers == 0
    keys = student.model.layers[2].self_attn.k_proj.weight
    assert torch.equal(keys, teacher.model.layers[3].self_attn.k_proj.weight)
    assert any("k_proj" in text and "from another" in text for text in student.initialization_report.approximations)


def test_a_users_config_determines_the_kind_at_each_position() -> None:
    config = AutoConfig.for_model("gemma3_text", **FAMILIES["gemma3_text"])
    user_config = AutoConfig.for_model(
        "gemma3_text", **{**GROUPED, "num_hidden_layers": 2}, layer_types=["full_attention"] * 2
    )
    report = from_teacher(teacher_of(config), user_config, show_progress=False).initialization_report
    assert report.blocks["layers"] == [0, 5]
    user_config.layer_types = ["sliding_attention", "full_attention"]
    report = from_teacher(teacher_of(config), user_config, show_progress=False).initialization_report
    assert report.blocks["layers"] == [1, 5] and report.notes


def test_images_are_added_after_the_first_blocks_of_text() -> None:
    vision = {
        "depth": 4,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 4,
        "patch_size": 4,
        "out_hidden_size": 32,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [1, 3],
    }
    config = Qwen3VLConfig(vision_config=vision, text_config=GROUPED)
    teacher = Qwen3VLForConditionalGeneration(config)
    with pytest.raises(ShapeError, match=r"must begin with \[0, 1\]; found \[1, 3, 4\]. The nearest .* \[0, 1, 4\]"):
        from_teacher(
            teacher, text_config={"num_hidden_layers": 3}, method={"layer_selection": [1, 3, 4]}, show_progress=False
        )
    layers = {"visual.blocks": [0, 2, 3]}
    student = from_teacher(
        teacher, vision_config={"depth": 3}, method={"layer_selection": layers}, show_progress=False
    )
    assert student.config.vision_config.deepstack_visual_indexes == [0, 2]
    with pytest.raises(ShapeError, match="output of block"):
        from_teacher(
            teacher,
            vision_config={"depth": 2},
            method={"layer_selection": {"visual.blocks": [2, 3]}},
            show_progress=False,
        )


def test_a_layout_declares_what_cannot_be_found() -> None:
    config = AutoConfig.for_model("llama", **GROUPED)
    config.clipped = [1, 4]
    found = find_block_fields(config, standard_depths(config), {"clipped": "numbers"})
    assert [(each.path, each.kind) for each in found] == [(("clipped",), FieldKind.NUMBERS)]
    with pytest.raises(LayoutError, match="must be one of"):
        find_block_fields(config, standard_depths(config), {"clipped": "indices"})
    with pytest.raises(LayoutError, match="name one of them"):
        find_block_fields(config, standard_depths(config), {"clipped": "numbers text_config.num_hidden_layers"})
    layout = register_layout("blocks_declared", like="llama", block_fields={"clipped": "numbers"})
    assert layout.block_fields == {"clipped": "numbers"}


def test_alignment_heads_follow_blocks_and_heads() -> None:
    blocks = {"encoder.layers": [0, 1], "decoder.layers": [1, 3]}
    generation = GenerationConfig(alignment_heads=[[1, 0], [2, 1], [3, 3], [3, 2]])
    notes = remap_generation_config(generation, blocks, {})
    assert generation.alignment_heads == [[0, 0], [1, 3], [1, 2]] and "names 1 heads" in notes[0]
    generation = GenerationConfig(alignment_heads=[[1, 0], [2, 1], [3, 3], [3, 2]])
    remap_generation_config(generation, blocks, {"decoder.layers.encoder_attn": [[0, 1], [2, 3]]})
    assert generation.alignment_heads == [[0, 0], [1, 1], [1, 0]]
    generation = GenerationConfig(alignment_heads=[[2, 1]])
    assert "none is left" in remap_generation_config(generation, blocks, {})[0]
    assert not hasattr(generation, "alignment_heads")


def test_weights_of_states_that_become_one_add_up() -> None:
    weights = torch.randn(5, dtype=torch.float64)
    states = torch.randn(3, dtype=torch.float64)
    teacher_states = torch.stack([states[i] for i in (0, 0, 1, 1, 2)])  # blocks 1 and 3 are kept of four
    merged = merge_state_weights(weights, [1, 3])[[0, 2, 4]]
    expected = (weights.softmax(0) * teacher_states).sum()
    torch.testing.assert_close((merged.softmax(0) * states).sum(), expected)
