"""The laws of `calibrated`: identity, and lift with dead heads, neurons and blocks at random indices, which it prunes."""

import pytest
import torch

from hf_guide.modeling import from_teacher
from tests.calibration.equivalent_models import scramble
from tests.calibration.small_students import case_batches
from tests.invariants.case import Case, build, logits_of, settle
from tests.invariants.cases import CASES
from tests.invariants.embed_small_in_large import embed_small_in_large, randomize
from tests.invariants.test_laws import layout_of, relative_error

NAMES = [
    "llama",
    "llama-tied-biased",
    "mistral",
    "qwen2",
    "phi3",
    "gpt2",
    "gpt_neox",
    "olmo2",
    "opt",
    "bert",
    "vit",
    "dinov2",
]
CHOSEN = [case for case in CASES if str(case) in NAMES]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("case", CHOSEN, ids=str)
def test_identity(case: Case) -> None:
    teacher = build(case, case.big)
    randomize(teacher, layout_of(teacher), seed=1)
    settle(teacher, case)
    expected = logits_of(teacher, case)
    student = from_teacher(teacher, method="calibrated", calibration_dataset=case_batches(case), show_progress=False)
    assert relative_error(logits_of(student, case), expected) <= max(case.identity, 1e-9)
    assert relative_error(logits_of(teacher, case), expected) == 0, "the teacher was changed"


@pytest.mark.sampled(2)
@pytest.mark.parametrize("case", [case for case in CHOSEN if case.lift is not None], ids=str)
def test_dead_heads_neurons_and_blocks_are_pruned(case: Case) -> None:
    small, big = build(case, case.small), build(case, case.big)
    layout = layout_of(small)
    randomize(small, layout, seed=2, stream_gains="constant", length=case.length)
    settle(small, case)
    embed_small_in_large(small, big, layout, seed=3)
    blocks = len(
        {match.numbers["block"] for match in map(layout.find, _names(small)) if match and "block" in match.numbers}
    )
    live = scramble(big, layout, blocks, seed=7)
    expected = logits_of(small, case)
    assert relative_error(logits_of(big, case), expected) <= case.lift, "the scrambled teacher is not the small model"
    student = from_teacher(
        big, small.config, method="calibrated", calibration_dataset=case_batches(case), show_progress=False
    )
    assert list(student.initialization_report.blocks.values()) == [live]
    assert relative_error(logits_of(student, case), expected) <= case.lift


def _names(model: torch.nn.Module) -> list[str]:
    prefix = model.base_model_prefix + "."
    return [name.removeprefix(prefix) for name in model.state_dict()]
