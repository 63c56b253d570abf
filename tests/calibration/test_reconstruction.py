"""The order in which a block is fitted, where output projections are observed, and what stays in memory."""

import gc
import weakref
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from hf_guide import from_teacher
from hf_guide.calibration.modules import find_modules
from hf_guide.calibration.reconstruction import BLOCK_OUTPUT, BlockReconstructor, fit_order
from hf_guide.calibration.refit import RefitState
from hf_guide.calibration.sequential import SequentialBlocks, SequentialModel
from hf_guide.calibration.streams import Streams
from hf_guide.layouts.registry import registered_layouts, variant_for
from tests.calibration.small_students import BART, kind_batches
from tests.tiny import KINDS, Kind


def fit_steps_of(model: transformers.PreTrainedModel, inputs: dict[str, Tensor]) -> list[tuple[list[str], str | None]]:
    layout = variant_for(registered_layouts()[model.config.model_type], model.config)
    modules = find_modules(model, layout)
    (stack,) = modules.blocks
    blocks = SequentialBlocks(model, modules.blocks[stack], [inputs], is_teacher=True)
    steps = fit_order(blocks, modules, stack, 0, set(modules.linear), [])
    return [([ref.name.rpartition(".")[2] for ref in step.refs], step.observed_at) for step in steps]


def test_the_order_of_a_block_and_where_its_output_projections_are_observed() -> None:
    tokens = {"input_ids": torch.arange(3, 12)[None]}
    assert fit_steps_of(KINDS["llama"].teacher(), tokens) == [
        (["q_proj", "k_proj", "v_proj"], None),
        (["o_proj"], "layers.0.post_attention_layernorm"),
        (["gate_proj", "up_proj"], None),
        (["down_proj"], BLOCK_OUTPUT),
    ]
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
    for parallel in (True, False):  # in parallel, neither branch's norm sees the other's output
        config = transformers.GPTNeoXConfig(vocab_size=96, use_parallel_residual=parallel, **sizes)
        torch.manual_seed(0)
        points = [
            point
            for _, point in fit_steps_of(transformers.GPTNeoXForCausalLM(config).eval(), tokens)
            if point is not None
        ]
        assert points == [BLOCK_OUTPUT if parallel else "layers.0.post_attention_layernorm", BLOCK_OUTPUT]


@pytest.mark.extended
def test_the_targets_of_a_block_are_freed_before_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    references: list[weakref.ref[Tensor]] = []
    alive: list[int] = []
    record = BlockReconstructor._record_teacher

    def counting(self: BlockReconstructor, *args: Any) -> dict[str, list[Tensor]]:
        gc.collect()
        alive.append(sum(reference() is not None for reference in references))
        targets = record(self, *args)
        references[:] = [weakref.ref(tensor) for tensors in targets.values() for tensor in tensors]
        return targets

    monkeypatch.setattr(BlockReconstructor, "_record_teacher", counting)
    tokens = [{"input_ids": torch.arange(3 + start, 35 + start)[None]} for start in (0, 32)]
    for refit, targets in (
        ("all", 3),
        ("output_projections", 1),
    ):  # the inputs of attention and MLP, and the stream between them
        references.clear()
        from_teacher(
            KINDS["llama"].teacher(),
            method={"method": "calibrated", "refit": refit},
            calibration_dataset=tokens,
            hidden_size=24,
            show_progress=False,
        )
        assert len(references) == targets * len(tokens)
    assert alive == [0] * 8


@pytest.mark.parametrize("kind", [KINDS["llama"], BART], ids=["llama", "bart"])
def test_the_errors_in_the_report_are_those_of_the_finished_student(
    kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So of an encoder-decoder the encoder is refitted first: the decoder reads what it computes."""
    states: list[RefitState] = []
    refit = BlockReconstructor.refit

    def recording(self: BlockReconstructor) -> None:
        states.append(self.state)
        refit(self)

    monkeypatch.setattr(BlockReconstructor, "refit", recording)
    student = from_teacher(
        kind.teacher(),
        method={"method": "calibrated", "basis": "channels"},
        calibration_dataset=kind_batches(kind),
        show_progress=False,
        **kind.smaller,
    )
    (state,) = states
    reported = student.initialization_report.calibration["residual_error"]
    runs = [
        SequentialModel(run.model, find_modules(run.model, state.plan.layout), run.batches, is_teacher=run.is_teacher)
        for run in (state.teacher_run, state.student_run)
    ]
    stacks = runs[1].stacks_in_order()
    assert {stack.removesuffix(".{block}") for stack in stacks} == reported.keys()
    for stack in stacks:
        streams = []
        for run in runs:
            blocks = run.start(stack)
            while blocks.next < len(blocks.blocks):
                blocks.advance()
            run.finish(stack)
            streams.append(blocks.hidden_states)
        targets = Streams()
        for stream in streams[0]:
            targets.append(state.project(stream, state.stack_axis(stack)))
        error = BlockReconstructor(state)._residual_error(streams[1], targets, stack)
        assert error == pytest.approx(reported[stack.removesuffix(".{block}")][-1], rel=1e-5)
