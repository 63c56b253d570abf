"""The heads of other tasks are transferred: with an embedded small model, a student's head outputs what the small one does."""

import dataclasses

import pytest
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
)

from hf_guide.initialization.planning import merge_tied_axes
from hf_guide.layouts.registry import registered_layouts, variant_for
from hf_guide.modeling import from_teacher
from tests.invariants import cases
from tests.invariants.case import Case, build, config_of, logits_of
from tests.invariants.embed_small_in_large import embed_small_in_large, randomize, relative_name

HEADS = {
    "sequence": (AutoModelForSequenceClassification, "logits"),
    "token": (AutoModelForTokenClassification, "logits"),
    "question": (AutoModelForQuestionAnswering, "start_logits"),
}
DECODERS = [case for case in cases.CASES if case.model_class.endswith(("ForCausalLM", "LMHeadModel"))]
CASES = [
    *{case.family: case for case in reversed(DECODERS)}.values(),
    *(case for case in DECODERS if case.name == "opt-projected"),
]


def with_head(case: Case, task: str) -> Case | None:
    """Return the case of a task's model of the same family, or None where Transformers has none."""
    auto, output = HEADS[task]
    config_class: type[PreTrainedConfig] = type(config_of(case, case.small))
    if config_class not in auto._model_mapping:
        return None
    model_class = auto._model_mapping[config_class]
    labelled = case.both | {"num_labels": 2, "pad_token_id": 0}
    return dataclasses.replace(
        case, model_class=model_class.__name__, both=labelled, name=f"{case}-{task}", output=output
    )


WITH_HEADS = [found for case in CASES for task in HEADS if (found := with_head(case, task)) is not None]


@pytest.mark.sampled(8)
@pytest.mark.parametrize("case", WITH_HEADS, ids=str)
def test_a_head_outputs_what_the_small_model_does(case: Case) -> None:
    small, big = build(case, case.small), build(case, case.big)
    layout = variant_for(registered_layouts()[small.config.model_type], small.config)
    layout = merge_tied_axes(layout, [relative_name(name, small) for name in small.state_dict()])
    randomize(small, layout, seed=2, stream_gains="constant", length=case.length)
    embed_small_in_large(small, big, layout, seed=3)
    assert case.lift is not None
    student = from_teacher(big, small.config, show_progress=False)
    assert student.initialization_report.randomly_initialized == []
    expected = logits_of(small, case)
    assert (logits_of(student, case) - expected).abs().max() <= case.lift * expected.abs().max()
