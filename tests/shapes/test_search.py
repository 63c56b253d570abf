"""Every shape that is found builds, has the parameters that were counted, and is within the budget."""

import re

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    Qwen3NextConfig,
    SegformerConfig,
    SegformerForImageClassification,
)

from hf_guide import find_shapes, from_teacher
from hf_guide.errors import LayoutError, OptionError, ShapeError
from hf_guide.shapes.candidates import rule_scores
from hf_guide.shapes.counting import ParameterCounter
from hf_guide.shapes.fields import ModelProbe, SizeField, SizeFields, SizeRole, build_on_meta, find_size_fields
from hf_guide.shapes.search import ShapeSearch
from hf_guide.teachers.checkpoint import open_teacher
from tests.small_speech import whisper, whisper_processor
from tests.tiny import KINDS, same_bits


def shapes_of(teacher, **options):
    return find_shapes(teacher, **{"show_progress": False, "limit": 1, **options})


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", KINDS)
def test_a_shape_builds_with_the_counted_parameters_within_the_budget(name):
    teacher = KINDS[name].teacher()
    target = 0.4 * teacher.num_parameters()
    for shape in shapes_of(teacher, num_parameters="40%"):
        assert abs(shape.parameters - target) <= 0.02 * target
        student = from_teacher(teacher, show_progress=False, **shape.overrides)
        assert student.num_parameters() == shape.parameters


@pytest.mark.parametrize("name", ["llama tied", "gemma3", "mixtral", "t5", "vit"])
def test_parameters_counted_from_axes_are_those_of_the_model(name):
    teacher = open_teacher(KINDS[name].teacher())
    probe = ModelProbe(teacher, teacher.model_class)
    fields = find_size_fields(probe)
    config, model = probe.build({**fields.kept, **KINDS[name].smaller})
    sizes = {each.name: np.array([float(vars(config)[each.name])]) for each in fields.fields}
    assert ParameterCounter(probe, fields).count(sizes).parameters[0] == model.num_parameters()
    assert build_on_meta(teacher.model_class, config, teacher).num_parameters() == model.num_parameters()


def test_the_student_of_a_budget_is_that_of_the_sizes_which_its_report_names():
    teacher = KINDS["llama"].teacher()
    best = shapes_of(teacher, num_parameters=30_000)[0]
    student = from_teacher(teacher, num_parameters=30_000, show_progress=False)
    assert same_bits(student, from_teacher(teacher, show_progress=False, **best.overrides))
    assert best.describe() in student.initialization_report.shape_choice


@pytest.mark.parametrize("name", ["llama", "gemma3", "bert", "t5", "vit"])
def test_heads_are_whole_and_what_the_user_fixes_stays(name):
    kind = KINDS[name]
    teacher = kind.teacher()
    depth = "num_layers" if name == "t5" else "num_hidden_layers"
    shapes = shapes_of(teacher, num_parameters="45%", **{depth: 2})
    for shape in shapes:
        assert depth not in shape.overrides and shape.sizes[depth] == 2
        config = from_teacher(teacher, method="random", show_progress=False, **shape.overrides, **{depth: 2}).config
        assert getattr(config, "head_dim", None) in (None, 12)
        assert name != "bert" or config.hidden_size == 12 * config.num_attention_heads


@pytest.mark.sampled(5)
@pytest.mark.parametrize("name", KINDS)
def test_every_size_of_a_found_shape_may_be_fixed_alone(name):
    """Also a width that the teacher's heads do not divide, and a number of heads that does not divide its width."""
    teacher = KINDS[name].teacher()
    found = shapes_of(teacher, num_parameters="40%", limit=3)
    sizes = {(field, size) for each in found for field, size in each.overrides.items()}
    assert sizes
    for field, size in sorted(sizes):
        best = shapes_of(teacher, num_parameters="40%", **{field: size})[0]
        assert best.sizes[field] == size and field not in best.overrides
        student = from_teacher(teacher, method="random", show_progress=False, **{field: size}, **best.overrides)
        assert student.num_parameters() == best.parameters


HEADS = {"num_attention_heads": 6, "num_key_value_heads": 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
SMALL = {"vocab_size": 600, "hidden_size": 96, "intermediate_size": 256, "max_position_embeddings": 256, **HEADS}
LINEAR = {"linear_num_key_heads": 4, "linear_num_value_heads": 8, "linear_key_head_dim": 16}
LINEAR |= {"linear_value_head_dim": 16, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64}
SEVERAL_KINDS = {
    "qwen3_next": Qwen3NextConfig(**SMALL, **EXPERTS, **LINEAR, num_hidden_layers=8, head_dim=16),
    "gemma3": Gemma3TextConfig(**SMALL, num_hidden_layers=6, head_dim=16, sliding_window=8),
    "mixtral": MixtralConfig(**SMALL, num_hidden_layers=4, num_local_experts=4),
}


@pytest.mark.parametrize(("name", "share"), [("qwen3_next", "10%"), *((name, "15%") for name in SEVERAL_KINDS)])
def test_every_shape_that_is_found_can_be_made_and_runs(name, share):
    """Of a hybrid, one block alone may have no attention, which generation with a cache needs."""
    torch.manual_seed(0)
    teacher = AutoModelForCausalLM.from_config(SEVERAL_KINDS[name])
    shapes = shapes_of(teacher, num_parameters=share, limit=5)
    for shape in shapes:
        student = from_teacher(teacher, show_progress=False, **shape.overrides)
        assert student.num_parameters() == shape.parameters
        assert student.generate(torch.ones(1, 4, dtype=torch.long), max_new_tokens=2, min_new_tokens=2).shape == (1, 6)
    assert shapes_of(teacher, num_parameters=share) == shapes[:1]


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "mixtral", "t5", "vit", "heads"])
def test_the_smallest_and_the_largest_that_an_error_states_are_found_when_asked_for(name):
    if name == "heads":  # two narrow widths do not divide into their heads
        teacher = LlamaForCausalLM(LlamaConfig(**SMALL, num_hidden_layers=6))
    else:
        teacher = KINDS[name].teacher()
    with pytest.raises(ShapeError, match="No student is within 2% of num_parameters=1. The smallest has") as stated:
        shapes_of(teacher, num_parameters=1)
    bounds = re.search(r"The smallest has num_parameters ([\d,]+) .* the largest ([\d,]+)", str(stated.value))
    smallest, largest = (int(each.replace(",", "")) for each in bounds.groups())
    for size in (smallest, largest):
        (shape,) = shapes_of(teacher, num_parameters=size)
        assert abs(shape.parameters / size - 1) <= 0.02
    with pytest.raises(ShapeError, match=f"The smallest has num_parameters {smallest:,} "):
        shapes_of(teacher, num_parameters=smallest // 2)


GROUPED = {"hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 8}


@pytest.mark.parametrize(
    "fixed, expected",
    [
        ({"hidden_size": 32}, {"num_attention_heads": 4, "num_key_value_heads": 2}),
        ({"num_attention_heads": 4}, {"num_key_value_heads": 2}),
        ({"num_attention_heads": 5, "num_key_value_heads": 1}, "query heads per key/value head is 5, the teacher's 3"),
        ({"hidden_size": 32, "num_attention_heads": 9}, "rejects hidden_size=32, num_attention_heads=9"),
        ({"hidden_size": 80}, "The student's hidden_size is 80, its teacher's 72: it must be 1 to 72"),
        ({"num_key_value_heads": 4}, "The student's num_key_value_heads is 4, its teacher's 3"),
    ],
)
def test_a_size_that_needs_smaller_groups_of_heads_has_them_or_is_an_error(fixed, expected):
    teacher = LlamaForCausalLM(LlamaConfig(vocab_size=96, num_hidden_layers=4, intermediate_size=96, **GROUPED))
    if isinstance(expected, str):
        with pytest.raises(ShapeError, match=expected):
            shapes_of(teacher, num_parameters="30%", **fixed)
        return
    best = shapes_of(teacher, num_parameters="30%", **fixed)[0]
    assert {**best.sizes, **fixed, **expected} == best.sizes
    assert (
        from_teacher(teacher, show_progress=False, num_parameters="30%", **fixed).num_parameters() == best.parameters
    )


def test_heads_that_follow_the_width_are_no_larger_than_the_teachers():
    teacher = GPT2LMHeadModel(GPT2Config(vocab_size=500, n_embd=192, n_head=12, n_layer=6, n_positions=64))
    best = shapes_of(teacher, num_parameters="20%", n_head=5)[0]
    assert best.sizes["n_embd"] == 5 * 16
    student = from_teacher(teacher, num_parameters="20%", n_head=5, show_progress=False)
    assert student.num_parameters() == best.parameters


def test_memory_counts_the_weights_and_the_cache_that_the_model_fills():
    teacher = KINDS["llama"].teacher()
    shape = shapes_of(teacher, memory=200_000, cache_length=20)[0]
    student = from_teacher(teacher, show_progress=False, **shape.overrides)
    cache = student(torch.zeros(1, 20, dtype=torch.long), use_cache=True).past_key_values
    cached = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert shape.memory == cached + sum(each.nbytes for each in student.parameters())
    assert 0.98 * 200_000 <= shape.memory <= 200_000


@pytest.mark.parametrize("cache_length", [None, 10])
def test_the_cache_of_a_model_of_speech_has_the_positions_of_its_encoder_and_of_its_decoder(cache_length):
    """Sounds are padded to all positions of the encoder, and no more tokens follow than the decoder has positions."""
    teacher = whisper(whisper_processor())
    (shape,) = shapes_of(teacher, memory=150_000, cache_length=cache_length)
    student = from_teacher(teacher, show_progress=False, **shape.overrides)
    length = cache_length or student.config.max_target_positions
    sounds = torch.zeros(1, student.config.num_mel_bins, 2 * student.config.max_source_positions)
    caches = student(sounds, decoder_input_ids=torch.ones(1, length, dtype=torch.long), use_cache=True).past_key_values
    layers = [*caches.self_attention_cache.layers, *caches.cross_attention_cache.layers]
    cached = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
    assert shape.memory == cached + sum(each.nbytes for each in student.parameters())


def test_the_cache_is_part_of_the_error_and_no_longer_than_the_model_allows():
    teacher = whisper(whisper_processor())
    with pytest.raises(ShapeError, match=r"The smallest has memory .* the cache of [\d,]+ positions [\d,]+ bytes"):
        shapes_of(teacher, memory=1000)
    with pytest.raises(OptionError, match="cache_length=4096 is more than the .* positions that the model has"):
        shapes_of(teacher, memory=150_000, cache_length=4096)


def test_active_parameters_are_those_of_the_experts_that_a_token_is_routed_to():
    teacher = KINDS["mixtral"].teacher()
    shape = shapes_of(teacher, active_parameters=50_000)[0]
    student = from_teacher(teacher, show_progress=False, **shape.overrides)
    experts = sum(p.numel() for name, p in student.named_parameters() if ".experts." in name)
    share = 2 / student.config.num_local_experts
    assert shape.active_parameters == student.num_parameters() - round(experts * (1 - share))
    assert shape.flops_per_token == 2 * (shape.active_parameters - student.get_input_embeddings().weight.numel())


def test_experts_per_token_are_those_of_the_override():
    teacher = KINDS["mixtral"].teacher()
    one = shapes_of(teacher, active_parameters="20%", num_experts_per_tok=1)[0]
    assert abs(one.active_parameters / (0.2 * teacher.num_parameters()) - 1) <= 0.02
    shapes = shapes_of(teacher, num_parameters="20%", num_experts_per_tok=4, limit=5)
    assert {each.sizes["num_local_experts"] for each in shapes} == {4}


def test_a_budget_below_the_smallest_student_names_it_and_its_table():
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    teacher = LlamaForCausalLM(LlamaConfig(vocab_size=3000, **sizes))
    with pytest.raises(ShapeError, match=r"The smallest has num_parameters .* of which embedding tables are 12,000"):
        shapes_of(teacher, num_parameters=10_000)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, OptionError, "Set what the student may cost"),
        ({"num_parameters": "9M"}, ShapeError, "the largest"),
        ({"num_parameters": "40%", "hiden_size": 24}, OptionError, "Did you mean 'hidden_size'"),
        ({"num_parameters": "5%", "hidden_size": 48}, ShapeError, "with hidden_size=48 is within"),
        (
            {"num_parameters": "40%", "active_parameters": "20%"},
            ShapeError,
            "at once. Those of .* have num_parameters from .* Leave one out",
        ),
        (
            {"num_parameters": "40%", "memory": "10KB"},
            ShapeError,
            "at once. Those of .* have memory from .* bytes. Leave",
        ),
    ],
)
def test_a_search_without_a_result_is_an_error_with_the_reason(options, error, message):
    with pytest.raises(error, match=message):
        shapes_of(KINDS["llama"].teacher(), **options)


@pytest.mark.parametrize("budget", ["40%", "1%"])  # a budget that shapes are within, and one that none is
@pytest.mark.parametrize(
    ("name", "fixed", "reason"),
    [
        ("llama", {"head_dim": 24}, "head size of queries and keys is 24, the teacher's 12"),
        (
            "gemma3",
            {"head_dim": 24, "num_key_value_heads": 1},
            "head size of queries and keys is 24, the teacher's 12",
        ),
        ("t5", {"d_kv": 24}, "is 24, the teacher's 12"),
        ("gpt2", {"n_layer": 5}, "5 blocks in 'h', its teacher 4"),
        ("mixtral", {"num_hidden_layers": 7, "num_local_experts": 2}, "7 blocks in 'layers', its teacher 4"),
    ],
)
def test_what_no_shape_can_have_is_an_error_before_any_is_tried(name, fixed, reason, budget, monkeypatch):
    built, build = [], ShapeSearch._build
    monkeypatch.setattr(ShapeSearch, "_build", lambda self, *shape: built.append(shape) or build(self, *shape))
    stated = ", ".join(f"{field}={size}" for field, size in fixed.items())
    with pytest.raises(ShapeError, match=f"No shape with {stated} can be made of this teacher.*{reason}"):
        shapes_of(KINDS[name].teacher(), num_parameters=budget, **fixed)
    assert len(built) == 2, "the smallest shape and the largest"


@pytest.mark.parametrize("limit", ["3", -1, 0, 2.0, True, None])
def test_a_limit_that_is_no_positive_whole_number_is_an_error(limit):
    with pytest.raises(OptionError, match="limit must be a whole number of at least 1"):
        shapes_of(KINDS["llama"].teacher(), num_parameters="40%", limit=limit)


def test_a_depth_may_be_given_with_the_kinds_of_its_blocks():
    teacher = KINDS["gemma3"].teacher()
    kinds = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
    student = from_teacher(teacher, num_parameters="40%", show_progress=False, **kinds)
    assert student.config.layer_types == kinds["layer_types"]
    assert abs(student.num_parameters() / (0.4 * teacher.num_parameters()) - 1) <= 0.02


def test_the_report_states_the_parameters_without_the_outputs_of_subclasses():
    teacher = KINDS["bert classifier"].teacher()
    student = from_teacher(teacher, num_parameters="25%", num_subclasses=16, show_progress=False)
    counted = student.num_parameters() - 3 * 15 * (student.config.hidden_size + 1)
    assert abs(counted / (0.25 * teacher.num_parameters()) - 1) <= 0.02
    expected = (
        f"{student.num_parameters() / 1000:.1f} K parameters ({counted / 1000:.1f} K with one output per class, as the"
    )
    assert expected in student.initialization_report.shape_choice


def test_every_student_has_the_positions_that_the_data_need():
    """Rows longer than the students' positions are an error before the teacher runs; text is cut, as in `from_teacher`."""
    rows = [{"input_ids": torch.randint(3, 96, (40, 32), generator=torch.Generator().manual_seed(0))}]
    for kind, field in (("gpt2", "n_positions"), ("bert", "max_position_embeddings")):
        with pytest.raises(OptionError, match="rows of 32 tokens in input_ids, and the student has 16 positions"):
            shapes_of(KINDS[kind].teacher(), num_parameters="50%", calibration_dataset=rows, **{field: 16})
    shorter = [{"input_ids": rows[0]["input_ids"][:, :16]}]
    (shape,) = shapes_of(KINDS["gpt2"].teacher(), num_parameters="50%", calibration_dataset=shorter, n_positions=16)
    assert shape.loss is not None


def test_only_shapes_that_the_method_can_make_of_the_weights_are_found():
    """Of Mamba blocks alone: its state-space parameters have the teacher's size. Its cache are states, of one size."""
    sizes = {"vocab_size": 2048, "hidden_size": 256, "state_size": 8}
    teacher = MambaForCausalLM(MambaConfig(**sizes, num_hidden_layers=6))
    budget = MambaForCausalLM(MambaConfig(**sizes, num_hidden_layers=4)).num_parameters()
    (shape,) = shapes_of(teacher, num_parameters=budget)
    assert shape.overrides == {"num_hidden_layers": 4}
    student = from_teacher(teacher, show_progress=False, **shape.overrides)
    layers = student(torch.ones(1, 20, dtype=torch.long), use_cache=True).cache_params.layers
    states = sum(
        each.nbytes for layer in layers for each in (*layer.conv_states.values(), *layer.recurrent_states.values())
    )
    assert student.num_parameters() == budget and shape.memory == 4 * budget + states
    (of_memory,) = shapes_of(teacher, memory=shape.memory)
    assert of_memory.overrides == shape.overrides
    with pytest.raises(ShapeError, match="None of the .* can be made of this teacher.*must be the teacher's 512"):
        shapes_of(teacher, num_parameters="50%")
    (shape,) = shapes_of(teacher, num_parameters="50%", method="random")
    student = from_teacher(teacher, method="random", show_progress=False, **shape.overrides)
    assert student.num_parameters() == shape.parameters


def test_families_whose_shapes_cannot_be_enumerated_are_refused():
    stages = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "decoder_hidden_size": 16}
    teacher = SegformerForImageClassification(SegformerConfig(**stages))
    with pytest.raises(LayoutError, match="stages of several widths"):
        shapes_of(teacher, num_parameters="50%")


def test_a_budget_and_what_contradicts_it_are_errors():
    teacher = KINDS["llama"].teacher()
    with pytest.raises(OptionError, match="config states every size already"):
        from_teacher(teacher, teacher.config, num_parameters="50%")
    with pytest.raises(OptionError, match="can be read once"):
        from_teacher(teacher, num_parameters="50%", method="calibrated", calibration_dataset=iter([{}]))


def ranks(values):
    return np.argsort(np.argsort(values))


def test_the_rule_orders_measured_shapes_as_training_does():
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    roles = (SizeRole.WIDTH, SizeRole.DEPTH, SizeRole.HEADS, SizeRole.MLP)
    teacher = tuple(SizeField(*each) for each in zip(names, (576, 30, 9, 1536), roles, strict=True))
    scores, trained = [], []
    for *shape, head_size, perplexity in MEASURED:
        fields = SizeFields(teacher, head_size, 64, False, {}, {})
        scores.append(
            rule_scores({name: np.array([size]) for name, size in zip(names, shape, strict=True)}, fields)[0]
        )
        trained.append(perplexity)
    assert np.corrcoef(ranks(scores), ranks(trained))[0, 1] >= 0.9


MEASURED = [
    (288, 7, 6, 1122, 64, 119.7),
    (288, 10, 9, 768, 32, 118.5),
    (288, 10, 3, 853, 64, 113.9),
    (288, 10, 9, 512, 64, 103.5),
    (288, 15, 9, 427, 32, 110.3),
    (288, 10, 6, 682, 64, 101.5),
    (192, 20, 6, 837, 64, 100.5),
    (240, 14, 6, 769, 64, 94.5),
    (240, 11, 6, 1070, 64, 96.3),
    (288, 12, 6, 512, 64, 97.3),
]
"""Width, blocks, heads, MLP, size of a head; perplexity of a student of SmolLM2-135M after 51,200 tokens, one seed."""
