"""Gradients, logs and evaluation do not depend on how many processes share a batch."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hf_guide.distillation.teacher_setup import check_shardable
from hf_guide.errors import OptionError
from tests.distillation.small import model_for
from tests.distributed.launch import run_processes

DEEPSPEED = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}


def vector(found: dict[str, Any]) -> torch.Tensor:
    return torch.cat([torch.tensor(values) for _, values in sorted(found["gradients"].items())])


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("task", "objective", "more"),
    [
        pytest.param("causal-lm", {"ce": 0.3, "kd": 0.7}, {}, marks=pytest.mark.slow),
        ("causal-lm", {"hidden_states": 1.0, "kd": 1.0}, {"wide": True}),
        ("sequence-classification", {"ce": 0.5, "kd": 0.5}, {}),
        ("seq2seq-lm", {"ce": 0.5, "kd": 0.5}, {}),
        pytest.param("sequence-classification", {"ce": 0.5, "kd": 0.5}, {"own_loss": True}, marks=pytest.mark.slow),
    ],
)
def test_two_processes_of_four_are_one_of_eight(
    task: str, objective: dict[str, float], more: dict[str, Any], tmp_path: Path
) -> None:
    found = []
    for processes in (1, 2):
        arguments = {
            "losses": objective,
            "per_device_train_batch_size": 8 // processes,
            "per_device_eval_batch_size": 2,
        }
        found.append(run_processes("gradients.py", processes, {"task": task, "arguments": arguments} | more, tmp_path))
    one, two = map(vector, found)
    assert one.norm() > 1e-3 and (one - two).norm() < 1e-5 * one.norm()
    for name in [*objective, "loss"]:
        assert found[1]["log"][name] == pytest.approx(found[0]["log"][name], rel=1e-4)
    # Seven examples: what the dataloader fills the last batches up with counts for nothing.
    for name in [*objective, "ce", "teacher_agreement", *(["loss"] if task == "sequence-classification" else [])]:
        assert found[1]["metrics"][f"eval_{name}"] == pytest.approx(found[0]["metrics"][f"eval_{name}"], rel=1e-4)
    for name, values in found[0]["maps"].items():
        assert torch.allclose(torch.tensor(values), torch.tensor(found[1]["maps"][name]), atol=1e-6)


@pytest.mark.extended
@pytest.mark.parametrize("offloaded", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_sharded_students_and_teachers_have_the_same_gradients(offloaded: bool, tmp_path: Path) -> None:
    """Of a student sharded by FSDP2 the teacher is sharded too, or stays on the disk where it was offloaded to."""
    found = []
    for processes in (1, 2):
        arguments = {"losses": {"ce": 0.3, "kd": 0.7}, "per_device_train_batch_size": 8 // processes}
        given = {"task": "causal-lm", "arguments": arguments, "sharded": processes == 2}
        given["offloaded"] = offloaded and processes == 2
        found.append(run_processes("gradients.py", processes, given, tmp_path))
    one, two = map(vector, found)
    assert found[1]["sharded"] == "DTensor" and found[1]["inside_head"]
    assert found[1]["teacher_offloaded"] == offloaded and (found[1]["teacher_sharded"] == "DTensor") == (not offloaded)
    for name in ("ce", "kd", "loss"):
        assert found[1]["log"][name] == pytest.approx(found[0]["log"][name], rel=1e-4)
    assert one.norm() > 1e-3 and (one - two).norm() < 1e-5 * one.norm()


@pytest.mark.parametrize(("stage", "offloaded"), [(2, False), (3, False), (3, True)])
def test_deepspeed_leaves_gradients_as_they_are(stage: int, offloaded: bool, tmp_path: Path) -> None:
    """One process: Accelerate counts but one with DeepSpeed on the CPU."""
    pytest.importorskip("deepspeed")
    found = []
    for more in ({}, {"deepspeed": {"zero_optimization": {"stage": stage}, **DEEPSPEED}}):
        arguments = {"losses": {"ce": 0.3, "kd": 0.7}, "per_device_train_batch_size": 8} | more
        given = {"task": "causal-lm", "arguments": arguments, "offloaded": offloaded and bool(more)}
        found.append(run_processes("gradients.py", 1, given, tmp_path))
    one, two = map(vector, found)
    assert found[1]["inside_head"] == (stage == 2) and found[1]["teacher_offloaded"] == offloaded
    assert one.norm() > 1e-3 and (one - two).norm() < 1e-5 * one.norm()


def test_fsdp2_is_refused_where_more_modules_share_the_embedding() -> None:
    sharding = SimpleNamespace(is_fsdp2=True)
    with pytest.raises(
        OptionError, match="FSDP2 cannot shard the student .*encoder.embed_tokens, decoder.embed_tokens"
    ):
        check_shardable(model_for("seq2seq-lm", 1), "student", sharding)
    check_shardable(model_for("causal-lm", 1), "student", sharding)
    check_shardable(model_for("seq2seq-lm", 1), "student", SimpleNamespace(is_fsdp2=False))
