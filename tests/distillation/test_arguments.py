"""Arguments of the previous release are accepted, and the warning states what replaces them."""

import json
from pathlib import Path
from typing import Any

import pytest

from hf_guide import DistillationTrainer, OptionError
from hf_guide.scripts.distill import distill, read_config
from tests.distillation.small import collate, examples_for, llama
from tests.distillation.test_trainer import arguments

RENAMED = [
    ("objective", "kd", "losses", {"kd": 1.0}),
    ("divergence", "jsd", "kd_loss_type", "jsd"),
    ("jsd_beta", 0.25, "beta", 0.25),
    ("hidden_layers", {1: 2}, "layer_mapping", {1: 2}),
    ("capture", "folder", "teacher_cache", "folder"),
    ("student", {"hidden_size": 16}, "student_init_kwargs", {"hidden_size": 16}),
    ("max_logits", 100, "loss_chunk_size", 100),
]


@pytest.mark.parametrize(("old", "value", "new", "parsed"), RENAMED)
def test_an_old_name_warns_of_the_new_one(old: str, value: Any, new: str, parsed: Any, tmp_path: Path) -> None:
    with pytest.warns(FutureWarning, match=f"DistillationArguments: '{old}' is deprecated; use '{new}'"):
        args = arguments(tmp_path, **{old: value})
    assert getattr(args, new) == parsed
    with pytest.warns(FutureWarning, match=f"use '{new}'"):
        assert getattr(args, old) == parsed


@pytest.mark.parametrize(
    ("options", "token", "message"),
    [
        (
            {"hub_model_id": "me/my student"},
            "hf_none",
            "must be the id of a repository on the Hub, such as me/student",
        ),
        ({"hub_model_id": "a/b/c"}, "hf_none", "must be the id of a repository"),
        ({}, "hf_none", "by default the name of output_dir.* must be the id"),
        ({"hub_model_id": "me/student"}, None, "push_to_hub needs a token of the Hub: log in with `hf auth login`"),
    ],
)
@pytest.mark.parametrize("way", ["trainer", "script"])
def test_a_push_that_must_fail_is_an_error_before_any_work(
    way: str, options: Any, token: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_guide.hub.push.is_offline_mode", lambda: False)
    monkeypatch.setattr("hf_guide.hub.push.get_token", lambda: token)
    values = {"losses": {"kd": 1.0}, "push_to_hub": True, "output_dir": str(tmp_path / "my run")} | options
    with pytest.raises(OptionError, match=message):
        if way == "script":
            entries = {"teacher": "none/there", "dataset_name": "none/there", "use_cpu": True, "report_to": "none"}
            (tmp_path / "config.json").write_text(
                json.dumps(values | entries | {"student_init_kwargs": {"num_hidden_layers": 1}})
            )
            distill(read_config(tmp_path / "config.json"))
        else:
            args = arguments(values.pop("output_dir"), **values)
            DistillationTrainer(
                {"num_hidden_layers": 1}, args, collate, examples_for("causal-lm"), teacher="none/there"
            )


def test_a_removed_argument_is_an_error_that_states_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"'teacher_compile' was removed: call `teacher.compile\(\)`"):
        arguments(tmp_path, teacher_compile=True)


@pytest.mark.parametrize(
    ("old", "value", "losses", "options"),
    [
        ("dkd_alpha", 2.0, "dkd", {"dkd": {"alpha": 2.0}}),
        ("dkd_beta", 2.0, "dkd", {"dkd": {"beta": 2.0}}),
        ("dkd_beta", 2.0, "kd", None),
        ("hidden_distance", "cosine", "features", {"features": {"distance": "cosine"}}),
    ],
)
def test_an_argument_that_became_an_option_of_a_loss_warns_of_it(
    old: str, value: Any, losses: str, options: Any, tmp_path: Path
) -> None:
    with pytest.warns(FutureWarning, match=f"'{old}' is deprecated; use loss_options="):
        assert arguments(tmp_path, losses=losses, **{old: value}).loss_options == options


def test_files_and_flags_of_the_previous_release_are_accepted(tmp_path: Path) -> None:
    path = tmp_path / "distill.yaml"
    path.write_text(
        "teacher: some/teacher\nstudent: {hidden_size: 16}\ndata_files: a.txt\nobjective: {ce: 0.5, dkd: 0.5}\n"
        f"dkd_beta: 4\noutput_dir: {tmp_path / 'out'}\n"
    )
    with pytest.warns(FutureWarning) as caught:
        args = read_config(path, ["--max_logits", "99", "--divergence=jsd", "--dkd_alpha", "3"]).training
    assert args.student_init_kwargs == {"hidden_size": 16} and args.losses == {"ce": 0.5, "dkd": 0.5}
    assert args.loss_chunk_size == 99 and args.kd_loss_type == "jsd"
    assert args.loss_options == {"dkd": {"alpha": 3, "beta": 4}}
    messages = " ".join(str(warning.message) for warning in caught)
    for new in ("'losses'", "'student_init_kwargs'", "'loss_chunk_size'", "'kd_loss_type'", "loss_options={'dkd'"):
        assert f"use {new}" in messages


def test_the_trainer_takes_the_name_that_trl_has_for_the_teacher(tmp_path: Path) -> None:
    data = examples_for("causal-lm")
    trainer = DistillationTrainer(llama(1), arguments(tmp_path, losses="kd"), collate, data, teacher_model=llama(2))
    assert len(trainer.teachers) == 1
    with pytest.raises(OptionError, match="teacher and teacher_model.*both given"):
        DistillationTrainer(
            llama(1), arguments(tmp_path, losses="kd"), collate, data, teacher=llama(2), teacher_model=llama(3)
        )
