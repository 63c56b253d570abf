"""The number of parameters that the rule gives a shape is that of its model, for every family and every shape of the grid."""

import numpy as np
import pytest
import torch
import transformers

from hf_guide import find_shapes, from_teacher
from hf_guide.initialization.size_checks import experts_per_token
from hf_guide.shapes.cache import CacheMeter
from hf_guide.shapes.counting import ParameterCounter, exact_cost
from hf_guide.shapes.enumeration import ShapeEnumerator
from hf_guide.shapes.fields import ModelProbe, SizeRole, find_size_fields
from hf_guide.teachers.checkpoint import open_teacher
from tests.invariants.case import Case, build, config_of
from tests.invariants.cases import CASES
from tests.shapes.test_families import REFUSED

SAMPLE = 5
"""Shapes of a family that are built."""

SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "max_position_embeddings": 32,
}
GROUPED = ("Qwen2", "Phi", "Phi3", "Olmo", "Olmo2", "Cohere", "Starcoder2", "Llama", "Mistral")
"""Families with a number of key/value heads; the last two have a field for the size of a head as well."""


def counted_and_built(model, fixed=(), sample=SAMPLE):
    """Return, of a sample of the grid, the numbers of parameters by the rule and of the models, and the sizes."""
    teacher = open_teacher(model)
    probe = ModelProbe(teacher, teacher.model_class)
    fields = find_size_fields(probe)
    counter = ParameterCounter(probe, fields)
    fixed = dict(fixed)
    grid = ShapeEnumerator(fields, counter, fixed, fixed, 4, CacheMeter(torch.float32, 0, 0))._grid
    kept = np.ones(len(next(iter(grid.values()))), dtype=bool)
    for each in fields.of(SizeRole.DEPTH):  # blocks of several kinds count as their average
        kept &= grid[each.name] == each.size
    widths = fields.of(SizeRole.WIDTH)
    for first, second in ((a, b) for a in widths for b in widths if a.size != b.size):
        # A projection between two widths is left out where they are equal.
        kept &= grid[first.name] != grid[second.name]
    places = np.flatnonzero(kept)
    places = places[np.linspace(0, len(places) - 1, min(sample, len(places))).astype(int)]
    counts = counter.count(grid).parameters
    for place in places:
        sizes = {name: int(values[place]) for name, values in grid.items()}
        built = probe.build({**fields.kept, **sizes})
        if built is not None:
            yield counts[place], built[1].num_parameters(), sizes


def check(counts):
    counts = list(counts)
    assert counts
    for counted, built, sizes in counts:
        assert counted == pytest.approx(built, rel=1e-12), sizes


@pytest.mark.sampled(6)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_rule_counts_the_parameters_of_every_family(case: Case) -> None:
    if case.family in REFUSED or str(case) in REFUSED:
        pytest.skip("shapes of this family are not enumerated")
    check(counted_and_built(build(case, case.big)))


@pytest.mark.sampled(4)
@pytest.mark.parametrize("groups", [8, 4, 2, 1])
@pytest.mark.parametrize("name", GROUPED)
def test_the_rule_counts_key_value_heads_of_every_grouping(name, groups):
    model_class = getattr(transformers, f"{name}ForCausalLM")
    model = model_class(model_class.config_class(**SIZES, pad_token_id=0, num_key_value_heads=groups))
    check(counted_and_built(model))
    check(counted_and_built(model, {"num_attention_heads": 4, "num_key_value_heads": min(groups, 2)}, sample=3))


def test_the_best_shape_of_a_family_without_a_head_size_is_found():
    config = transformers.Qwen2Config(
        **{**SIZES, "vocab_size": 256, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 8},
        num_key_value_heads=8,
    )
    teacher = transformers.Qwen2ForCausalLM(config)
    best = find_shapes(teacher, num_parameters="15%", limit=1, show_progress=False)[0]
    assert (best.width, best.depth, best.sizes["intermediate_size"], best.parameters) == (192, 3, 256, 986_112)
    assert best.rule_score == pytest.approx(3.375, abs=1e-3)


def test_position_embeddings_between_blocks_are_counted_with_the_depth():
    """YOLOS has one for every block but the last, in one parameter outside of the blocks."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
    config = transformers.YolosConfig(**sizes, image_size=[32, 32], patch_size=8, num_detection_tokens=4)
    teacher = transformers.YolosForObjectDetection(config)
    for budget in (60_000, 75_000):
        shapes = find_shapes(teacher, num_parameters=budget, limit=3, show_progress=False)
        assert {each.depth for each in shapes} != {4}
        assert all(abs(each.parameters - budget) <= 0.02 * budget for each in shapes)
    opened = open_teacher(teacher)
    probe = ModelProbe(opened, opened.model_class)
    counter = ParameterCounter(probe, find_size_fields(probe))
    for depth in (1, 2, 3, 4):
        shape = {**sizes, "num_hidden_layers": depth, "hidden_size": 48, "num_attention_heads": 3}
        built = probe.build(shape)
        assert counter.count({name: np.array([float(size)]) for name, size in shape.items()}).parameters == [
            built[1].num_parameters()
        ]


MIXTURES = [case for case in CASES if experts_per_token(config_of(case, case.big)) is not None]


def by_hand(model, experts):
    """Return the parameters that a token passes, with half of the experts used."""
    parameters = dict(model.named_parameters())
    of_experts = sum(each.numel() for name, each in parameters.items() if ".experts." in name)
    per_token = experts_per_token(model.config)
    return model.num_parameters() - of_experts * (experts - per_token) // experts


@pytest.mark.parametrize("case", MIXTURES, ids=str)
def test_a_token_passes_the_experts_that_it_is_routed_to(case: Case) -> None:
    model = build(case, case.big)
    active = exact_cost(model, model.config)["active_parameters"]
    assert active == by_hand(model, 4) < model.num_parameters()


def test_experts_of_a_family_without_a_registered_layout_are_counted_as_experts():
    sizes = {
        "hidden_size": 96,
        "num_hidden_layers": 8,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 16,
    }
    experts = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 64,
    }
    linear = {"linear_num_key_heads": 4, "linear_num_value_heads": 8, "linear_key_head_dim": 16}
    config = transformers.Qwen3NextConfig(**SIZES | sizes | experts | linear, linear_value_head_dim=16)
    teacher = transformers.Qwen3NextForCausalLM(config)
    for shape in find_shapes(teacher, num_parameters="50%", limit=3, show_progress=False):
        student = from_teacher(teacher, show_progress=False, **shape.overrides)
        assert shape.active_parameters == by_hand(student, 4) < shape.parameters
    opened = open_teacher(teacher)
    probe = ModelProbe(opened, opened.model_class)
    fields = find_size_fields(probe)
    whole = {each.name: np.array([float(each.size)]) for each in fields.fields}
    assert ParameterCounter(probe, fields).count(whole).active[0] == pytest.approx(by_hand(teacher, 4))
