"""The memory that is estimated from shapes is what a real run takes, and what does not fit is refused before it begins."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from hf_guide.errors import ResourceError
from hf_guide.initialization import cost
from hf_guide.initialization.cost import LIBRARY_BYTES, CostEstimate, CostPart
from hf_guide.modeling import from_teacher, plan_student
from hf_guide.utils.memory import _group_limits
from tests.small_speech import sound_classifier
from tests.tiny import KINDS

MEASURE = """
import gc, json, sys
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from hf_guide.modeling import from_teacher, plan_student

torch.set_num_threads(1)

def resident(field):
    with open("/proc/self/status") as file:
        return 1024 * int(next(line for line in file if line.startswith(field)).split()[1])

folder = sys.argv[1]
rows = []
for width, vocabulary, blocks in ((256, 16000, 2), (512, 32000, 4), (1024, 32000, 6))[: int(sys.argv[2])]:
    config = LlamaConfig(hidden_size=width, intermediate_size=3 * width, num_hidden_layers=blocks, vocab_size=vocabulary,
                         num_attention_heads=8, tie_word_embeddings=False)
    LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    sizes = dict(hidden_size=width // 2, intermediate_size=width, num_hidden_layers=blocks // 2)
    for method in ("guide", "uniform", "random") if width == 1024 else ("guide",):
        for round in range(2 if not rows else 1):  # the first call imports and registers much
            estimate = plan_student(folder, method=method, **sizes).estimate.memory_bytes
            gc.collect()
            before = resident("VmRSS")
            open("/proc/self/clear_refs", "w").write("5")
            student = from_teacher(folder, method=method, show_progress=False, **sizes)
            measured = resident("VmHWM") - before
            del student
        rows.append((method, width, measured, estimate))
print(json.dumps(rows))
"""


@pytest.mark.extended
@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="the peak of memory is reset there")
@pytest.mark.parametrize("teachers", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_the_peak_of_a_run_is_close_to_its_estimate(teachers: int, tmp_path: Path) -> None:
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "262144"}
    command = [sys.executable, "-c", textwrap.dedent(MEASURE), str(tmp_path), str(teachers)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    for method, width, measured, estimate in json.loads(done.stdout.splitlines()[-1]):
        loaded = estimate - LIBRARY_BYTES  # the first call loaded the libraries
        assert 0.6 < measured / loaded < 1.1, (method, width, measured, loaded)


MEASURE_FIRST = """
import json, sys
import torch
from hf_guide.modeling import from_teacher, plan_student

def status(field):
    with open("/proc/self/status") as file:
        return 1024 * int(next(line for line in file if line.startswith(field)).split()[1])

folder, method, sizes = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
data = {"calibration_dataset": [{"input_ids": torch.randint(3, 90, (4, 64))}] * 2} if method == "calibrated" else {}
options = {"method": method, "calibration_tokens": 512} if data else method
before = status("VmRSS")
from_teacher(folder, method=options, show_progress=False, **data, **sizes)
peak = status("VmHWM") - before
print(peak, plan_student(folder, method=options, **sizes).estimate.memory_bytes)
"""


@pytest.mark.extended
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="the peak of memory is read there")
@pytest.mark.parametrize("method", ["guide", "uniform", "random", "calibrated"])
@pytest.mark.parametrize("width", [64, pytest.param(512, marks=pytest.mark.slow)])
def test_the_first_call_of_a_process_takes_no_more_than_its_estimate(method: str, width: int, tmp_path: Path) -> None:
    """The libraries are part of it, and not much more than they take."""
    sizes = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=40 * width, tie_word_embeddings=False, **sizes)
    LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    smaller = {"hidden_size": width // 2, "num_hidden_layers": 2}
    command = [sys.executable, "-c", MEASURE_FIRST, str(tmp_path), method, json.dumps(smaller)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    measured, estimate = map(int, done.stdout.split())
    assert measured <= estimate < measured + LIBRARY_BYTES


def small(width: int = 64) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": width, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=200, **sizes))


def test_what_does_not_fit_is_refused_before_a_weight_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    small().save_pretrained(tmp_path)
    monkeypatch.setattr(cost, "available_memory", lambda: 1000)
    from_teacher(tmp_path, hidden_size=32, show_progress=False)  # too small to be checked
    monkeypatch.setattr("hf_guide.modeling.MIN_CHECKED_BYTES", 0)
    monkeypatch.setattr("hf_guide.teachers.tensor_source.SafetensorsTensors.get", None)
    for method in ("guide", "uniform", "random"):
        with pytest.raises(
            ResourceError, match=r"0\.0 MB are available.*the student.*would help: a smaller student, dtype"
        ):
            from_teacher(tmp_path, hidden_size=32, method=method, show_progress=False)


def test_a_calibration_that_does_not_fit_is_refused_before_the_teacher_is_loaded(monkeypatch, tmp_path: Path) -> None:
    small().save_pretrained(tmp_path)
    monkeypatch.setattr("hf_guide.modeling.MIN_CHECKED_BYTES", 0)
    monkeypatch.setattr("hf_guide.teachers.tensor_source.SafetensorsTensors.get", None)
    monkeypatch.setattr(cost, "available_memory", lambda: 10**6)
    few, many = ({"method": "calibrated", "calibration_tokens": tokens} for tokens in (64, 10**6))
    estimate = plan_student(tmp_path, method=few, hidden_size=32).estimate
    estimate.check_fits(estimate.memory_bytes)
    with pytest.raises(ResourceError, match="about .*the activations of 1000000 tokens.*fewer calibration_tokens"):
        from_teacher(tmp_path, method=many, calibration_dataset=["a text"], hidden_size=32, show_progress=False)


def test_one_expert_of_a_block_counts(tmp_path: Path) -> None:
    """Twice as many experts add the rows of the router, of the two blocks that are in memory."""
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    held = []
    for experts in (4, 8):
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
        MixtralForCausalLM(MixtralConfig(**sizes, **heads, num_local_experts=experts)).save_pretrained(tmp_path)
        estimate = plan_student(tmp_path, method="calibrated", num_hidden_layers=1).estimate
        held.append(next(part.bytes for part in estimate.parts if "two blocks" in part.name))
    assert held[1] - held[0] == 2 * 4 * sizes["hidden_size"] * 4


def test_a_family_known_by_its_blocks_alone_has_an_estimate_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_guide.modeling.MIN_CHECKED_BYTES", 0)
    teacher = sound_classifier()
    estimate = plan_student(teacher, method="calibrated", num_hidden_layers=2).estimate
    assert next(part.bytes for part in estimate.parts if part.name.startswith("the activations")) > 0
    sounds = [{"input_values": torch.randn(2, 2000)}]
    from_teacher(teacher, method="calibrated", calibration_dataset=sounds, num_hidden_layers=2, show_progress=False)


def test_the_estimate_is_shown_with_the_progress_bar(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr("hf_guide.modeling.MIN_CHECKED_BYTES", 0)
    from_teacher(small(), hidden_size=32)
    assert "LlamaForCausalLM by guide: about" in capsys.readouterr().err


def test_kept_parts_add_up_and_of_the_others_the_largest_counts() -> None:
    parts = [CostPart("a", 10, is_kept=True), CostPart("b", 5), CostPart("c", 7), CostPart("d", 1, is_kept=True)]
    estimate = CostEstimate(parts)
    assert estimate.memory_bytes == 18
    estimate.check_fits(18)
    with pytest.raises(ResourceError, match="a 0.0 MB, c 0.0 MB, b 0.0 MB"):
        estimate.check_fits(17)
    assert CostEstimate([CostPart("e", 0, products={torch.float32: 1e9}, read=10**9)]).seconds() > 1


@pytest.mark.parametrize("family", ["llama", "bert"])
@pytest.mark.parametrize("method", ["guide", "uniform", "random"])
def test_a_plan_is_that_of_the_student_made(family: str, method: str, tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4}
    model = small() if family == "llama" else BertForMaskedLM(BertConfig(vocab_size=200, **sizes))
    model.save_pretrained(tmp_path)
    smaller = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    plan = plan_student(tmp_path, method=method, **smaller)
    student = from_teacher(tmp_path, method=method, show_progress=False, **smaller)
    report = student.initialization_report
    assert plan.student.num_parameters() == student.num_parameters() and plan.blocks == report.blocks
    assert plan.student_bytes == sum(parameter.nbytes for parameter in student.parameters())
    assert [(each.name, each.shape, each.source) for each in plan.records] == [
        (each.name, each.shape, each.source) for each in report.parameters
    ]
    assert f"by {method}" in str(plan) and "Estimated: about" in str(plan)


@pytest.mark.parametrize("selection", ["local_search", "block_influence", "uniform", "first_last", [0, 3], None])
def test_a_plan_states_the_blocks_only_where_no_data_decide_them(selection: Any) -> None:
    """None is a student of all blocks."""
    rule = {} if selection is None else {"layer_selection": selection}
    depth = 4 if selection is None else 2
    plan = plan_student(small(), method={"method": "calibrated", **rule}, num_hidden_layers=depth)
    sources = {record.source for record in plan.records if ".layers." in record.name}
    if selection in ("local_search", "block_influence"):
        assert plan.blocks == {} and plan.measured == {"layers": (4, 2)} and plan.layer_selection == selection
        assert f"2 of the teacher's 4 layers, which the data decide (layer_selection={selection!r})" in str(plan)
        assert sources and all(source and source.startswith("model.layers.*.") for source in sources)
    else:
        assert plan.measured == {} and plan.layer_selection == "" and len(plan.blocks["layers"]) == depth
        assert "Blocks: layers from the teacher's 0" in str(plan) and "decide" not in str(plan)
        assert sources and not any("*" in str(source) for source in sources)


def test_a_plan_states_the_blocks_of_the_stack_that_keeps_all() -> None:
    plan = plan_student(KINDS["t5"].teacher(), method="calibrated", num_decoder_layers=1)
    assert plan.blocks == {"encoder.block": [0, 1, 2, 3]} and plan.measured == {"decoder.block": (4, 1)}


def test_the_smallest_limit_of_a_control_group_counts(tmp_path: Path) -> None:
    membership, root = tmp_path / "cgroup", tmp_path / "groups"
    membership.write_text("4:memory:/outer/inner\n0::/unified\n2:cpu:/other\n")
    files = {
        "memory/outer/memory.limit_in_bytes": "1000",
        "memory/outer/memory.usage_in_bytes": "900",
        "memory/outer/memory.stat": "inactive_file 50\nactive_file 10\nrss 3\n",
        "memory/outer/inner/memory.limit_in_bytes": "9223372036854771712",
        "memory/outer/inner/memory.usage_in_bytes": "5",
        "unified/memory.max": "max",
        "unified/memory.current": "7",
        "memory.max": "300",
        "memory.current": "400",
    }
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    assert sorted(_group_limits(membership, root)) == [0, 160, 9223372036854771707]
