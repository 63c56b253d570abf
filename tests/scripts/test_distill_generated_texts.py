"""`predict_with_generate` in `hf-guide distill` for every task that generates, and conversations about images."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml
from transformers import AutoModelForImageTextToText, AutoProcessor

from hf_guide import OptionError
from hf_guide.cli.main import main
from hf_guide.scripts.distill import distill, read_config
from tests.examples.local import QUICK, SMALLER, make_model, write_pairs
from tests.small_image_text import FAMILIES, conversation, write_conversations

SCORES = {"eval_rouge1", "eval_rouge2", "eval_chrf", "eval_gen_len"}
LOSSES = {"eval_ce", "eval_kd", "eval_teacher_agreement", "eval_perplexity"}
SMALLER_LLAVA = {"text_config": {"num_hidden_layers": 2}}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def run(folder: Path, name: str = "student", **options: Any) -> dict[str, float]:
    options = QUICK | {"output_dir": str(folder / name), "validation_split_percentage": 34} | options
    (folder / "run.yaml").write_text(yaml.safe_dump(options))
    return distill(read_config(folder / "run.yaml"))


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("llava") / "teacher"
    FAMILIES["llava"].save(folder)
    return str(folder)


@pytest.mark.extended
def test_answers_about_images_are_generated_and_a_capture_equals_the_teacher(llava: str, tmp_path: Path) -> None:
    file = str(write_conversations(tmp_path / "data", 12))
    data = {"data_files": file, "assistant_only_loss": True, "validation_split_percentage": 34}
    (tmp_path / "data.json").write_text(json.dumps(data))
    words = ["--config", str(tmp_path / "data.json"), "--top-k", "147", "--log-prob-dtype", "float32"]
    assert main(["capture", llava, "-o", str(tmp_path / "cached"), *words, "--no-progress"]) == 0
    live = run(
        tmp_path,
        teacher=llava,
        student_init_kwargs=SMALLER_LLAVA,
        predict_with_generate=True,
        generation_max_length=4,
        **data,
    )
    assert live.keys() >= SCORES | LOSSES and 0 < live["eval_gen_len"] <= 4
    cached = run(
        tmp_path,
        "other",
        teacher_cache=str(tmp_path / "cached"),
        student_init_kwargs=SMALLER_LLAVA | {"teacher": llava},
        **data,
    )
    for name in LOSSES:
        assert cached[name] == pytest.approx(live[name], rel=1e-4), name
    _, loading = AutoModelForImageTextToText.from_pretrained(tmp_path / "student", output_loading_info=True)
    assert not any(loading.values())
    assert AutoProcessor.from_pretrained(tmp_path / "student").chat_template
    assert "pipeline_tag: image-text-to-text" in (tmp_path / "student" / "README.md").read_text()


@pytest.mark.parametrize("task", ["summary", "chat"])
def test_generated_texts_are_scored_and_the_losses_measured(task: str, tmp_path: Path) -> None:
    family, kind = {"summary": ("t5", ""), "chat": ("llama", "ForCausalLM")}[task]
    teacher = make_model(tmp_path / "teacher", family, kind)
    rows = [json.loads(line) for line in write_pairs(tmp_path / "rows.jsonl", 24).read_text().splitlines()]
    if task == "chat":
        rows = [{"prompt": row["source"] + " It is", "completion": " about " + row["target"]} for row in rows]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"data_files": str(tmp_path / "rows.jsonl"), "max_length": 40, "max_target_length": 6, "packing": False}
    measured = run(
        tmp_path,
        teacher=str(teacher),
        student_init_kwargs=SMALLER[family],
        predict_with_generate=True,
        **options,
    )
    assert measured.keys() >= SCORES | LOSSES and 0 < measured["eval_gen_len"] <= 6


def bad_rows(folder: Path, change: str) -> str:
    file = write_conversations(folder, 6)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    if change == "count":
        rows[3]["images"] = []
    elif change == "answer":
        rows[3]["messages"] = rows[3]["messages"][:1]
    elif change == "role":
        rows = [{"messages": [{"content": turn["content"]} for turn in conversation()], "images": ["0.png"]}]
    else:
        (folder / "0.png").write_text("no image")
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ("count", {}, "row 3 of the training split: A row has 0 images and 1 parts of the type 'image'"),
        ("answer", {}, "row 3 of the training split: Its messages have no turn of the assistant"),
        ("role", {}, "row 0 of the training split: A message must have a role"),
        ("file", {"max_steps": 6}, "the image 0.png in row 0, column 'images', cannot be read"),
        ("file", {"max_length": 32}, "max_length is not for conversations about images"),
        ("file", {"image_column": "picture"}, "no column 'picture'.*Set image_column"),
        ("file", {"completion_only_loss": True}, "completion_only_loss needs prompts and completions"),
    ],
)
def test_wrong_conversations_about_images_are_errors(
    change: str, options: dict[str, Any], message: str, llava: str, tmp_path: Path
) -> None:
    data = {"data_files": bad_rows(tmp_path / "data", change), "assistant_only_loss": True}
    data |= {"validation_split_percentage": 0, "student_init_kwargs": SMALLER_LLAVA}
    with pytest.raises(OptionError, match=message):
        run(tmp_path, teacher=llava, **data | options)


def test_packed_conversations_cannot_be_generated_from(tmp_path: Path) -> None:
    teacher = make_model(tmp_path / "teacher", "llama", "ForCausalLM")
    options = {"teacher": str(teacher), "student_init_kwargs": SMALLER["llama"]}
    with pytest.raises(OptionError, match="set packing to false"):
        run(tmp_path, data_files=str(write_pairs(tmp_path / "r.jsonl")), predict_with_generate=True, **options)
