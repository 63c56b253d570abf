"""Experts of a mixture that no token needs are pruned; an expert's importance is what it adds to the residual stream."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_guide import from_teacher
from hf_guide.calibration import importance
from hf_guide.calibration.forward import calibration_mode
from hf_guide.calibration.importance import collect_expert_importance
from hf_guide.calibration.modules import find_modules
from hf_guide.calibration.sequential import SequentialModel
from hf_guide.methods import calibrated
from tests.calibration.small_students import case_batches, kind_batches
from tests.invariants.case import Case, build, logits_of, settle
from tests.invariants.cases import CASES
from tests.invariants.embed_small_in_large import embed_small_in_large, randomize, relative_name
from tests.invariants.test_laws import layout_of, relative_error
from tests.tiny import KINDS, same_bits

MIXTURES = ["mixtral", "qwen2_moe", "qwen3_moe", "granitemoe", "gpt_oss", "deepseek_v3"]
ALL = {str(case): case for case in CASES if str(case) in MIXTURES}
COUNTS = {"qwen2_moe": "num_experts", "qwen3_moe": "num_experts", "deepseek_v3": "n_routed_experts"}


def count(name: str) -> str:
    return COUNTS.get(name, "num_local_experts")


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", MIXTURES)
def test_identity(name: str) -> None:
    case = ALL[name]
    teacher = build(case, case.big)
    randomize(teacher, layout_of(teacher), seed=1)
    settle(teacher, case)
    before = teacher.get_experts_implementation()
    student = from_teacher(teacher, method="calibrated", calibration_dataset=case_batches(case), show_progress=False)
    assert teacher.get_experts_implementation() == before
    expected = logits_of(teacher, case)
    assert relative_error(logits_of(student, case), expected) <= max(case.identity, 1e-9)


def lifted(case: Case, *, per_token: int) -> tuple[Any, Any, dict[int, list[int]]]:
    """Return a small model, a bigger one that computes the same with four more experts, and where its live ones are by block.

    A dead expert's weights are noise. Its router's row is the mean of the live ones', which is never greater than their
    greatest; or its bias keeps it from being chosen, where there is one.
    """
    experts = count(str(case))
    case = dataclasses.replace(case, both={name: value for name, value in case.both.items() if name != experts})
    case.both["num_experts_per_tok"] = per_token
    small, big = build(case, case.small | {experts: 4}), build(case, case.big | {experts: 8})
    layout = layout_of(small)
    randomize(small, layout, seed=2, stream_gains="constant", length=case.length)
    settle(small, case)
    embed_small_in_large(small, big, layout, seed=3)
    generator = torch.Generator().manual_seed(4)
    live: dict[int, list[int]] = {}
    biased = any(name.endswith(("router.bias", "e_score_correction_bias")) for name in big.state_dict())
    with torch.no_grad():
        for name, tensor in big.state_dict(keep_vars=True).items():
            match = layout.find(relative_name(name, big))
            if match is None or not match.axes or str(match.axes[0]) != "experts":
                continue
            dead = torch.ones(8, dtype=torch.bool)
            dead[::2] = False  # a lift puts them evenly
            if tensor.ndim == 3:
                tensor[dead] = torch.randn(tensor[dead].shape, generator=generator, dtype=torch.float64)
            elif tensor.ndim == 1:
                tensor[dead] = -1e4
            else:
                tensor[dead] = tensor[~dead].mean(0)
            block = int(match.numbers["block"])
            order = torch.randperm(8, generator=torch.Generator().manual_seed(block))
            tensor.copy_(tensor[order])
            live[block] = [place for place, came in enumerate(order.tolist()) if came % 2 == 0]
    assert biased or per_token == 1
    return small, big, live


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", MIXTURES)
def test_dead_experts_are_pruned(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = ALL[name]
    small, big, live = lifted(case, per_token=2 if name in ("gpt_oss", "deepseek_v3") else 1)
    expected = logits_of(small, case)
    assert relative_error(logits_of(big, case), expected) <= (case.lift or 0), "the teacher is not the small model"
    errors = {}
    for selects in (True, False):
        if not selects:
            monkeypatch.setattr(calibrated, "prunable_experts", lambda *_: ({}, []))
        student = from_teacher(
            big,
            small.config,
            method="calibrated",
            calibration_dataset=case_batches(case),
            show_progress=False,
        )
        errors[selects] = relative_error(logits_of(student, case), expected)
        if selects:
            report = student.initialization_report
            (blocks,) = report.blocks.values()
            selected = {
                int(name.split(".")[1]): units["experts"]
                for name, units in report.calibration["selected"].items()
                if "experts" in units
            }
            assert selected and all(selected[number] == live[blocks[number]] for number in selected)
    assert errors[True] <= (case.lift or 0) < 1e-3 < errors[False]


def test_the_importance_of_an_expert_is_its_squared_output_over_the_tokens_routed_to_it() -> None:
    case = ALL["mixtral"]
    model = build(case, case.big)
    randomize(model, layout_of(model), seed=1)
    ref = find_modules(model, layout_of(model)).experts["layers.0.mlp.experts"]
    batches = case_batches(case, 2)
    mask = torch.ones_like(batches[1]["input_ids"])
    mask[:, 7:] = 0
    batches[1]["attention_mask"] = mask

    class Whole:
        bases: dict[str, Tensor] = {}

    found = collect_expert_importance(
        SequentialModel(model, find_modules(model, layout_of(model)), batches, is_teacher=True),
        {ref.name: ref},
        Whole(),
    )[ref.name]  # type: ignore[arg-type]
    expected = torch.zeros(4, dtype=torch.float64)
    routed: list[tuple[Tensor, ...]] = []
    handle = ref.module.register_forward_pre_hook(lambda _, args: routed.append(args))
    with torch.no_grad(), calibration_mode(model):
        for batch in batches:
            model(**batch)
    handle.remove()
    for batch, (stream, chosen, weights) in zip(batches, routed, strict=True):
        real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).flatten().bool()
        for token in real.nonzero().flatten().tolist():
            for expert, weight in zip(chosen[token].tolist(), weights[token], strict=True):
                gate, up = (ref.module.gate_up_proj[expert] @ stream[token]).chunk(2)
                written = ref.module.down_proj[expert] @ (torch.nn.functional.silu(gate) * up) * weight
                expected[expert] += written.square().sum().item()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def test_the_router_is_refitted_and_expert_importance_is_collected_once(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With fewer experts and a narrower stream; a second call of the same goes on from what the first has selected."""
    kind = KINDS["mixtral"]
    shape = {**kind.smaller, "num_local_experts": 2}

    def make() -> Any:
        return from_teacher(
            kind.teacher(),
            method="calibrated",
            calibration_dataset=kind_batches(kind),
            calibration_cache_dir=tmp_path,
            show_progress=False,
            **shape,
        )

    first = make()
    steps = {record.name: record.steps for record in first.initialization_report.parameters}
    assert any("refitted" in step for step in steps["model.layers.0.mlp.gate.weight"])
    assert (tmp_path / "step-expert_importance.safetensors").exists()
    monkeypatch.setattr(importance, "collect_expert_importance", None)
    assert same_bits(make(), first)


def test_experts_that_are_routed_by_groups_are_selected_evenly() -> None:
    case = ALL["deepseek_v3"]
    case = dataclasses.replace(case, both=case.both | {"n_routed_experts": 8, "n_group": 2})
    teacher = build(case, case.big)
    student = from_teacher(
        teacher,
        method={"method": "calibrated", "refit": "none"},
        calibration_dataset=case_batches(case, 1),
        show_progress=False,
        n_routed_experts=4,
    )
    notes = [note for note in student.initialization_report.approximations if "selects groups" in note]
    assert len(notes) == 1 and notes[0].startswith(
        "layers.{block}.mlp.experts.down_proj: its experts are selected evenly"
    )
