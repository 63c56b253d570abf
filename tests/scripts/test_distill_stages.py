"""`stages:` of `hf-guide distill`: each student is made of the one before, the signals stay the first teacher's, and a killed
run goes on in the stage where it was killed."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, TrainerCallback

from hf_guide import DistillationMixin, InitializationReport, OptionError, from_teacher
from hf_guide.cli.distill import describe_checkpoints
from hf_guide.errors import HfGuideError
from hf_guide.models.layer_mapping import resolve_layer_mapping
from hf_guide.scripts.distill import distill, read_config
from hf_guide.scripts.stages import check_stages
from tests.examples.local import QUICK, make_model, write_text
from tests.tiny import KINDS, run_python

DEPTH: dict[str, Any] = {"student_init_kwargs": {"num_hidden_layers": 2}, "max_steps": 2}
WIDTH: dict[str, Any] = {"student_init_kwargs": {"hidden_size": 16, "intermediate_size": 32}, "max_steps": 3}

ALL_SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
ALL_SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 2}


def cut(**kwargs: Any) -> dict[str, Any]:
    """Return a stage of one step."""
    return {"student_init_kwargs": kwargs, "max_steps": 1}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher") / "teacher"
    return make_model(folder, "llama", "ForCausalLM", blocks=3)


def write(at: Path, teacher: Path, name: str = "student", **options: Any) -> Path:
    """Write the options of a quick run, and return the file."""
    entries = QUICK | {"output_dir": str(at / name), "max_length": 32}
    entries |= {"data_files": str(write_text(at / "text.txt")), "save_strategy": "steps", "save_steps": 1}
    entries |= {} if "teacher_cache" in options else {"teacher": str(teacher)}
    (at / "run.yaml").write_text(yaml.safe_dump(entries | options))
    return at / "run.yaml"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def same(first: Path, second: Path) -> bool:
    one, other = weights(first), weights(second)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_one_stage_is_a_run_without_stages_to_the_last_bit(teacher: Path, tmp_path: Path) -> None:
    distill(read_config(write(tmp_path, teacher, "plain", **DEPTH)))
    distill(read_config(write(tmp_path, teacher, "staged", stages=[DEPTH])))
    assert same(tmp_path / "plain", tmp_path / "staged")


@pytest.mark.extended
def test_two_stages_make_one_student_and_one_card(teacher: Path, tmp_path: Path) -> None:
    common = {"student_init_kwargs": {"method": {"method": "calibrated", "calibration_tokens": 512}}}
    distill(read_config(write(tmp_path, teacher, stages=[DEPTH, WIDTH], **common)))
    folder = tmp_path / "student"
    report = InitializationReport.load(folder)
    (first,) = report.lineage
    assert (first.teacher, first.method, first.steps, first.sizes["embed"]) == ("teacher", "calibrated", 2, [32, 32])
    assert first.tokens and len(first.blocks["layers"]) == 2 and first.losses == {"ce": 0.5, "kd": 0.5}
    assert first.student_parameters == report.teacher_parameters > report.student_parameters
    card = (folder / "README.md").read_text()
    assert "initialized in 2 stages from `teacher`" in card and str(tmp_path) not in card
    (one, two) = [line for line in card.splitlines() if line.startswith(("| 1 |", "| 2 |"))]
    assert "embed 32 -" in two and "3 steps, " in two and "2 steps, " in one and "stage-1" in two
    record = json.loads((folder / "distillation.json").read_text())
    assert [each["name"] for each in record["teachers"]] == ["teacher"]
    loaded = run_python(
        "import sys; from transformers import AutoModelForCausalLM as auto, AutoTokenizer\n"
        f"model = auto.from_pretrained({str(folder)!r}); AutoTokenizer.from_pretrained({str(folder)!r})\n"
        "print(model.config.hidden_size, model.config.num_hidden_layers, 'hf_guide' in sys.modules)"
    )
    assert loaded.split()[-3:] == ["16", "2", "False"]


class Kill(TrainerCallback):
    """Ends the process once a checkpoint of the last stage is complete."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if "_stages" not in args.output_dir and state.global_step == 2:
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.extended
def test_a_killed_run_goes_on_in_its_stage(teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    distill(read_config(write(tmp_path, teacher, "whole", stages=[DEPTH, WIDTH])))
    path = write(tmp_path, teacher, stages=[DEPTH, WIDTH])
    child = os.fork()
    if not child:
        begin = DistillationMixin.__init__
        monkeypatch.setattr(
            DistillationMixin, "__init__", lambda *args, **kwargs: begin(*args, **kwargs, callbacks=[Kill()])
        )
        distill(read_config(path))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    first = tmp_path / "student" / "_stages" / "stage-1" / "model.safetensors"
    written = first.stat().st_mtime_ns
    assert "--resume_from_checkpoint true" in describe_checkpoints(tmp_path / "student")
    with pytest.raises(OptionError, match="was finished by an earlier run. Set resume_from_checkpoint: true"):
        distill(read_config(path))
    with pytest.raises(OptionError, match="finished with other options: max_steps was 2 and is 1"):
        distill(
            read_config(
                write(tmp_path, teacher, stages=[DEPTH | {"max_steps": 1}, WIDTH]),
                ["--resume_from_checkpoint", "true"],
            )
        )
    path = write(tmp_path, teacher, stages=[DEPTH, WIDTH])
    distill(read_config(path, ["--resume_from_checkpoint", "true"]))
    assert first.stat().st_mtime_ns == written and same(tmp_path / "student", tmp_path / "whole")
    assert json.loads((tmp_path / "student" / "trainer_state.json").read_text())["global_step"] == 3


@pytest.mark.extended
def test_stages_read_the_first_teachers_signals_from_a_cache(teacher: Path, tmp_path: Path) -> None:
    from hf_guide.cli.main import main

    path = write(tmp_path, teacher, stages=[DEPTH, WIDTH])
    assert main(["capture", "--config", str(path), "-o", str(tmp_path / "capture")]) == 0
    options = {"teacher_cache": str(tmp_path / "capture"), "student_init_kwargs": {"teacher": str(teacher)}}
    distill(read_config(write(tmp_path, teacher, "cached", stages=[DEPTH, WIDTH], **options)))
    record = json.loads((tmp_path / "cached" / "distillation.json").read_text())
    assert record["teachers"][0]["captured"] and record["teachers"][0]["name"] == "teacher"


@pytest.mark.parametrize(
    ("stages", "options", "message"),
    [
        ([], {}, "at least one mapping"),
        (["depth"], {}, "at least one mapping"),
        ([{"learning_rat": 1e-3}], {}, "Stage 1 has an unknown key 'learning_rat'. Did you mean 'learning_rate'"),
        ([DEPTH, {"teacher": "other"}], {}, "Stage 2 sets teacher, which all stages have in common"),
        ([DEPTH, {"max_length": 8}], {}, "Stage 2 sets max_length, which all stages have in common"),
        (
            [WIDTH, {"student_init_kwargs": {"hidden_size": 24}}],
            {},
            "Stage 2: hidden_size is 24, and 16 in the student before",
        ),
        (
            [cut(num_parameters="50%"), cut(num_parameters="60K")],
            {},
            "Stage 2: num_parameters is '60K', 60,000, and the student before has at most .*must not make the student larger",
        ),
        (
            [cut(num_parameters=20_000), cut(num_parameters=20_500)],
            {},
            "Stage 2: num_parameters is 20500.*at most 20,000",
        ),
        ([cut(num_parameters="50%"), cut(), cut(num_parameters="60K")], {}, "Stage 3: num_parameters is '60K'"),
        ([DEPTH, cut(num_parameters="200%")], {}, "Stage 2: num_parameters must be above 0 % and at most 100 %"),
        ([DEPTH, cut(num_parameters="some")], {}, "Stage 2: num_parameters must be a whole number"),
        ([DEPTH, cut(cache_length=16)], {}, "Stage 2: cache_length is of use only with memory"),
        (
            [DEPTH, cut(num_parameters="90%", hidden_size=16, intermediate_size=16, num_hidden_layers=1)],
            {},
            "Stage 2: num_parameters is '90%'.*a student of these sizes has at most",
        ),
        (
            [cut(num_parameters="50%"), cut(num_parameters="10%", **ALL_SIZES)],
            {},
            "Stage 2: num_parameters is '10%'.*a student of these sizes has .*leave out the budget, or some sizes",
        ),
        ([DEPTH, {"student_init_kwargs": {"hidden_sise": 24}}], {}, "Stage 2: .*hidden_size"),
        ([DEPTH, {"student_init_kwargs": {"vocab_size": 24}}], {}, "Stage 2 sets .'vocab_size'.*first stage"),
        ([DEPTH, WIDTH], {"resume_from_checkpoint": "checkpoint-1"}, "must be true with stages"),
        ([DEPTH], {"peft_config": {"peft_type": "LORA"}}, "peft_config and student_init_kwargs are both given"),
        ([{"max_steps": 1}], {}, "There is no student"),
    ],
)
def test_wrong_stages_are_an_error_before_anything_runs(
    teacher: Path, tmp_path: Path, stages: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(HfGuideError, match=message):
        distill(read_config(write(tmp_path, teacher, stages=stages, **options)))
    assert not (tmp_path / "student").exists()


@pytest.mark.parametrize(
    "stages",
    [
        [cut(memory="60KB"), cut(num_parameters="90%", hidden_size=16)],  # 90 % of a student that is not counted yet
        [cut(num_parameters="50%"), cut(num_parameters="50%"), cut(num_parameters="50%")],
        [cut(num_parameters=20_000), cut(num_parameters=20_000)],
        [cut(num_parameters="100%", tokenizer="of more tokens"), cut(num_parameters="900K")],
        [cut(vocab_size="auto", num_parameters="50%"), cut(num_parameters="50%")],
    ],
)
def test_budgets_that_may_be_reached_are_no_error_before_the_first_stage(
    teacher: Path, tmp_path: Path, stages: Any
) -> None:
    config = read_config(write(tmp_path, teacher, stages=stages))
    check_stages(config.stages, AutoConfig.from_pretrained(teacher))


def test_hidden_states_are_compared_with_the_first_teachers_blocks() -> None:
    first = from_teacher(
        KINDS["llama"].teacher(), num_hidden_layers=3, method={"method": "guide", "layer_selection": [0, 2, 3]}
    )
    second = from_teacher(first, num_hidden_layers=2, method={"method": "guide", "layer_selection": [1, 2]})
    assert resolve_layer_mapping(second, [4], None) == {1: 3, 2: 4}
    assert resolve_layer_mapping(second, [3], None) == {1: 2, 2: 3}
