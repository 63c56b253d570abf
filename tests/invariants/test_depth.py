"""The law of depth: a full-width student of some blocks is the teacher whose other blocks are bypassed.

Where it cannot hold, the report notes it, or an error gives the reason.
"""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers
from transformers import (
    CONFIG_MAPPING,
    GPT2Config,
    GPT2LMHeadModel,
    MiniCPM3Config,
    MiniCPM3ForCausalLM,
    PreTrainedModel,
    RwkvConfig,
    RwkvForCausalLM,
    Zamba2Config,
    Zamba2ForCausalLM,
)
from transformers.models.auto import modeling_auto

from hf_guide import HfGuideError, LayoutError, ShapeError, from_teacher
from hf_guide.initialization.equivalence import check_equivalence
from hf_guide.initialization.infer_layout import layout_for
from hf_guide.models.tiny_models import MODEL_ERRORS, randomize_parameters
from tests.invariants.depth import (
    bypassed,
    cut,
    depths,
    generates_alike_with_and_without_cache,
    inputs_for,
    outputs_of,
    relative_error,
    stack_of,
    teacher_for,
)

TOLERANCE = 1e-5
CHOICES = ("uniform", "first_last", "explicit")


@dataclass(frozen=True)
class Family:
    """A model class, the entries of its config, and the blocks of five that the explicit selection keeps."""

    model_class: str
    config: dict[str, Any] = field(default_factory=dict, hash=False)
    selected: tuple[int, ...] = (0, 2, 3)
    name: str = ""

    def __str__(self) -> str:
        return self.name or self.model_class + "".join(f"-{name}" for name in self.config)

    @property
    def found_class(self) -> type[PreTrainedModel]:
        return getattr(transformers, self.model_class)

    def teacher(self) -> PreTrainedModel:
        return teacher_for(self.found_class, self.found_class.config_class(**self.config))


LAST = (1, 3, 4)
WAVLM = {"conv_dim": [8, 8], "conv_stride": [5, 4], "conv_kernel": [10, 8], "num_conv_pos_embeddings": 16}
EXACT = [
    Family("LlamaForCausalLM", selected=LAST),
    Family("Gemma2ForCausalLM", selected=LAST),
    Family("Gemma3ForCausalLM", selected=LAST),
    Family("SmolLM3ForCausalLM", selected=LAST),
    Family("DeepseekV3ForCausalLM", selected=LAST),
    Family("GPT2LMHeadModel", {"scale_attn_by_inverse_layer_idx": True}, selected=LAST),
    Family("DiffLlamaForCausalLM", selected=LAST),
    Family("MiniCPM3ForCausalLM", selected=LAST),
    Family("ImageGPTForCausalImageModeling", {"scale_attn_by_inverse_layer_idx": True}, selected=LAST),
    Family("MambaForCausalLM", selected=LAST),
    Family("BloomForCausalLM", {"n_layer": 8}, selected=LAST),
    Family("BertForMaskedLM", selected=LAST),
    Family("ModernBertForMaskedLM"),
    Family("EsmcForMaskedLM", selected=LAST),
    Family("DebertaV2ForMaskedLM", selected=LAST),
    Family("BartForConditionalGeneration", selected=LAST),
    Family("T5ForConditionalGeneration", selected=LAST),
    Family("ViTForImageClassification", selected=LAST),
    Family("LlavaForConditionalGeneration", selected=LAST),
    Family("CLIPModel", selected=LAST),
    Family("SqueezeBertForMaskedLM", selected=LAST),
    Family(
        "XLMWithLMHeadModel", {"n_layers": 5, "emb_dim": 64, "n_heads": 4, "n_words": 99}, name="XLM", selected=LAST
    ),
    Family("WavLMForSequenceClassification", WAVLM, name="WavLM", selected=LAST),
]
REPORTED = [Family("PegasusXForConditionalGeneration"), Family("BeamForCausalLM")]
BLOCKS_OF_ANOTHER_KIND = {  # by model class: its stack, and the reason
    "ModernBertForMaskedLM": (["layers"], r"attn_norm.*lacks"),
    "ModernBertDecoderForCausalLM": (["layers"], r"attn_norm.*lacks"),
    "RwkvForCausalLM": (["blocks"], r"has no .*pre_ln"),
}


def student_of(
    teacher: PreTrainedModel, choice: str, selected: tuple[int, ...] = (), stacks: Iterable[str] | None = None
) -> PreTrainedModel:
    """Return a student of three blocks in each stack that has five; `stacks` names them, where they are known."""
    layers: Any = choice
    if choice == "explicit":
        if stacks is None:
            stacks = from_teacher(teacher, show_progress=False).initialization_report.blocks
        sizes = {stack: len(stack_of(teacher, stack)) for stack in stacks}
        layers = {stack: list(selected) if size == 5 else list(range(size)) for stack, size in sizes.items()}
    return from_teacher(
        teacher, method={"layer_selection": layers}, show_progress=False, **cut(depths(teacher.config), 3)
    )


def difference(student: PreTrainedModel, teacher: PreTrainedModel) -> float:
    """Return how far a student is from its teacher with the other blocks bypassed."""
    batch, blocks = inputs_for(teacher), student.initialization_report.blocks
    assert any(len(selected) < len(stack_of(teacher, stack)) for stack, selected in blocks.items()), (
        "no block was dropped"
    )
    output = outputs_of(student, batch)
    with bypassed(teacher, blocks, branches=teacher.config.model_type in ("xlm", "flaubert")):
        expected = outputs_of(teacher, batch)
    return relative_error(output, expected)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("family", EXACT, ids=str)
def test_a_student_of_some_blocks_is_the_teacher_with_the_others_bypassed(family: Family) -> None:
    teacher, stacks = family.teacher(), None
    for choice in CHOICES:
        student = student_of(teacher, choice, family.selected, stacks)
        stacks = student.initialization_report.blocks
        assert difference(student, teacher) <= TOLERANCE, choice
        assert student.initialization_report.approximations == [], choice
    assert generates_alike_with_and_without_cache(student, teacher)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("family", REPORTED, ids=str)
def test_any_other_dependence_on_a_block_index_is_reported(family: Family) -> None:
    teacher = family.teacher()
    try:
        student = student_of(teacher, "uniform")
    except ShapeError as error:
        assert "depend on their index" in str(error)
    else:
        assert difference(student, teacher) > TOLERANCE, "nothing differs, so there is nothing to report"
        (note,) = student.initialization_report.approximations
        assert "depend on their index" in note
        assert "Not exact beyond the smaller sizes: 1 approximated" in student.initialization_report.summary()


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", BLOCKS_OF_ANOTHER_KIND)
def test_a_block_of_another_kind_than_its_position_is_an_error(name: str) -> None:
    with pytest.raises(ShapeError, match=BLOCKS_OF_ANOTHER_KIND[name][1]):
        student_of(Family(name).teacher(), "explicit", LAST, BLOCKS_OF_ANOTHER_KIND[name][0])


def test_a_model_that_rescales_its_weights_is_transferred_with_the_original_ones() -> None:
    sizes = {"vocab_size": 60, "hidden_size": 16, "attention_hidden_size": 16, "intermediate_size": 24}
    teacher = teacher_for(RwkvForCausalLM, RwkvConfig(**sizes, num_hidden_layers=5, rescale_every=2))
    fresh = from_teacher(teacher, show_progress=False, num_hidden_layers=4, method={"layer_selection": [0, 2, 3, 4]})
    outputs_of(teacher, inputs_for(teacher))
    assert teacher.rwkv.layers_are_rescaled
    student = from_teacher(teacher, show_progress=False, num_hidden_layers=4, method={"layer_selection": [0, 2, 3, 4]})
    for after, before in zip(student.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(after, before)
    assert difference(student, teacher) <= 1e-3  # halving the stream makes the norms' eps weigh more


def test_blocks_that_are_repeated_are_reported() -> None:
    teacher = Family("LlamaForCausalLM").teacher()
    student = from_teacher(teacher, num_hidden_layers=3, method={"layer_selection": [0, 0, 4]}, show_progress=False)
    (note,) = student.initialization_report.approximations
    assert "repeated or in another order" in note


@pytest.mark.parametrize("kept", [[0, 1, 2], [0, 3, 4], [1, 2, 3]], ids=str)
def test_adapters_of_a_shared_block_follow_the_blocks_that_use_it(kept: list[int]) -> None:
    sizes = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    mamba = {"n_mamba_heads": 4, "mamba_d_state": 8, "mamba_headdim": 16, "mamba_ngroups": 1, "chunk_size": 8}
    shared = {"attention_hidden_size": 64, "attention_head_dim": 16, "num_mem_blocks": 1, "adapter_rank": 4}
    config = Zamba2Config(
        **(sizes | mamba | shared),
        num_hidden_layers=5,
        layers_block_type=["mamba", "hybrid", "mamba", "hybrid", "mamba"],
        use_shared_attention_adapter=True,
    )
    teacher = Zamba2ForCausalLM(config).to(torch.float64).eval()
    randomize_parameters(teacher, seed=1)
    student = from_teacher(teacher, num_hidden_layers=3, method={"layer_selection": kept}, show_progress=False)
    batch = inputs_for(teacher)
    with bypassed(teacher, {"layers": kept}):
        expected = outputs_of(teacher, batch)
    assert relative_error(outputs_of(student, batch), expected) <= TOLERANCE
    assert all("were not compared" in note for note in student.initialization_report.approximations)


INFLUENCE = ["LlamaForCausalLM", "GPT2LMHeadModel", "BertForMaskedLM", "T5ForConditionalGeneration"]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", INFLUENCE)
def test_blocks_selected_by_influence_obey_the_law_too(name: str) -> None:
    family = next(family for family in EXACT if family.model_class == name)
    teacher = family.teacher()
    unchanged = {"refit": "none", "fit_logit_scale": False}
    student = from_teacher(
        teacher,
        method={"method": "calibrated", "layer_selection": "block_influence", **unchanged},
        calibration_dataset=[inputs_for(teacher)] * 3,
        show_progress=False,
        **cut(depths(teacher.config), 3),
    )
    assert difference(student, teacher) <= TOLERANCE
    notes = student.initialization_report.approximations
    whole = [note for note in notes if note.startswith("All blocks of the teacher in ") and "ran together" in note]
    assert notes == whole and bool(whole) == (name == "T5ForConditionalGeneration")


@pytest.mark.parametrize("method", ["uniform", "guide"])
def test_a_narrower_student_too_has_the_constants_of_its_blocks(method: str) -> None:
    """Where the cut heads and neurons write nothing, a narrower student is the bypassed teacher."""
    config = GPT2Config(
        vocab_size=90, n_embd=24, n_head=4, n_inner=40, n_layer=4, scale_attn_by_inverse_layer_idx=True
    )
    teacher = teacher_for(GPT2LMHeadModel, config, depth=4)
    with torch.no_grad():
        for block in teacher.transformer.h:
            block.mlp.c_proj.weight[1::2] = 0.0
    student = from_teacher(
        teacher, n_layer=2, n_inner=20, method={"method": method, "layer_selection": [1, 3]}, show_progress=False
    )
    assert difference(student, teacher) <= TOLERANCE


def test_check_equivalence_rejects_depth_but_not_width_where_blocks_depend_on_their_index() -> None:
    teacher = teacher_for(MiniCPM3ForCausalLM, MiniCPM3Config(tie_word_embeddings=False), depth=4)
    layout = layout_for(teacher.config, type(teacher))
    report = check_equivalence(layout, teacher)
    assert report.passed and report.depth == ""
    report = check_equivalence(dataclasses.replace(layout, block_scale={}), teacher)
    assert report.passed and "depend on their index" in report.depth


def test_a_layout_of_fixed_depth_rejects_fewer_blocks_with_its_reason() -> None:
    teacher = Family("BeamForCausalLM").teacher()
    with pytest.raises(
        ShapeError, match="fewer blocks in 'layers' than its teacher, but its blocks depend on their index"
    ):
        from_teacher(teacher, num_hidden_layers=3, show_progress=False)


TASKS = (
    *("CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "MASKED_LM", "IMAGE_CLASSIFICATION", "IMAGE_TEXT_TO_TEXT"),
    *("SPEECH_SEQ_2_SEQ", "AUDIO_CLASSIFICATION", "ZERO_SHOT_IMAGE_CLASSIFICATION"),
)


def every_class() -> list[tuple[str, str]]:
    """Return model type and class name of every model of these tasks; none is imported, as only slow tests need them."""
    names: dict[tuple[str, str], None] = {}
    for task in TASKS:
        for model_type, found in getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES").items():
            names |= dict.fromkeys(
                (model_type, name) for name in (found if isinstance(found, (tuple, list)) else (found,))
            )
    return list(names)


def deep(config_class: type) -> Any:
    """Return a family's default config, with no fewer blocks than are cut, where its depth has the usual name.

    A composite has the depth in its parts: there the keyword would be an entry that nothing reads.
    """
    declared = {field.name for field in dataclasses.fields(config_class)}
    name = getattr(config_class, "attribute_map", {}).get("num_hidden_layers", "num_hidden_layers")
    if name not in declared:
        return config_class()
    try:
        return config_class(num_hidden_layers=8)
    except MODEL_ERRORS:
        return config_class()


@pytest.mark.slow
@pytest.mark.parametrize("model_type, name", every_class())
def test_nothing_is_silent_about_depth(model_type: str, name: str) -> None:
    try:
        teacher = teacher_for(getattr(transformers, name), deep(CONFIG_MAPPING[model_type]))
        outputs_of(teacher, inputs_for(teacher))
        whole = from_teacher(teacher, show_progress=False)
    except (*MODEL_ERRORS, LayoutError) as error:
        pytest.skip(f"no tiny teacher of it runs: {type(error).__name__}: {error}")
    if not depths(teacher.config):
        pytest.skip("its config has no depth")
    for choice in CHOICES:
        try:
            student = student_of(teacher, choice, LAST, whole.initialization_report.blocks)
        except HfGuideError as error:
            assert isinstance(error, ShapeError), error
            continue
        report = student.initialization_report
        if not any("depth:" in note for note in report.approximations) and not report.randomly_initialized:
            assert difference(student, teacher) <= TOLERANCE, choice
            assert generates_alike_with_and_without_cache(student, teacher)
