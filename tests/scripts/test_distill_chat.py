"""Chat data through the commands: the student's template decides, and a captured run equals a live one."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import yaml
from accelerate import PartialState
from transformers import AutoTokenizer, LlamaForCausalLM

from hf_guide import DistillationArguments, DistillationTrainer, OptionError
from hf_guide.data.arguments import DataArguments
from hf_guide.data.loading import load_splits
from hf_guide.data.preprocessing import preprocess
from hf_guide.scripts.capture import capture_dataset
from hf_guide.scripts.distill import distill, read_config
from hf_guide.signal_cache.config import CaptureConfig
from hf_guide.tasks import Task
from tests.chat.small import CONVERSATIONS, MARKED, PLAIN, TOOLS, VOCABULARY, tokenizer
from tests.examples.local import EXAMPLES, QUICK, SMALLER, flags, make_model

OTHER = PLAIN.replace("</s>", "<tools>")


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def chat(tmp_path: Path) -> Path:
    rows = [{"messages": messages, "tools": tools} for messages, tools in zip(CONVERSATIONS, TOOLS, strict=True)] * 4
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "chat.jsonl"


def save_model(folder: Path, template: str | None, **changes: Any) -> Path:
    make_model(folder, "llama", "ForCausalLM", vocab_size=VOCABULARY, **changes)
    tokenizer(template).save_pretrained(folder)
    return folder


def run(folder: Path, **options: Any) -> list[dict[str, float]]:
    entries = QUICK | {"output_dir": str(folder / "student"), "max_length": 24, "log_level": "error"} | options
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in entries.items()}
    (folder / "run.yaml").write_text(yaml.safe_dump(plain))
    distill(read_config(folder / "run.yaml"))
    history = json.loads((folder / "student" / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in history if "kd" in entry]


@pytest.mark.sampled(1)
@pytest.mark.parametrize("packing", [True, False])
def test_a_capture_of_chat_data_equals_the_teacher(packing: bool, chat: Path, tmp_path: Path) -> None:
    teacher = save_model(tmp_path / "teacher", PLAIN)
    student = save_model(tmp_path / "base", PLAIN, width=16, blocks=1, seed=1)
    data = {
        "data_files": str(chat),
        "assistant_only_loss": True,
        "packing": packing,
        "validation_split_percentage": 20,
    }
    capture_dataset(
        str(teacher),
        tmp_path / "signals",
        DataArguments(**data, max_length=24),
        CaptureConfig(top_k=VOCABULARY),
        PartialState(),
        hub_kwargs={},
        show_progress=False,
    )
    results = []
    for source in ({"teacher": teacher}, {"teacher_cache": tmp_path / "signals"}):
        logged = run(tmp_path, **data, **source, model_name_or_path=student, losses={"ce": 0.5, "kd": 0.5})
        results.append([[entry["ce"], entry["kd"]] for entry in logged])
    assert len(results[0]) == QUICK["max_steps"]
    torch.testing.assert_close(torch.tensor(results[1]), torch.tensor(results[0]), rtol=2e-3, atol=1e-4)  # float16


def test_a_calibrated_student_is_trained_on_conversations_and_loads(chat: Path, tmp_path: Path) -> None:
    teacher = save_model(tmp_path / "teacher", MARKED)
    init = SMALLER["llama"] | {"method": "calibrated", "dtype": "float32"}
    logged = run(
        tmp_path,
        teacher=teacher,
        student_init_kwargs=init,
        data_files=chat,
        assistant_only_loss=True,
        losses="kd",
        eval_strategy="steps",
        eval_steps=3,
    )
    assert all(entry["kd"] > 0 for entry in logged)
    student = LlamaForCausalLM.from_pretrained(tmp_path / "student")
    assert student.config.hidden_size == 16
    assert AutoTokenizer.from_pretrained(tmp_path / "student").chat_template == MARKED


# Templates of student and teacher


def test_both_models_read_the_tokens_of_the_students_template(chat: Path, tmp_path: Path) -> None:
    models = {
        "teacher": save_model(tmp_path / "teacher", OTHER),
        "student": save_model(tmp_path / "base", PLAIN, seed=1),
    }
    tok = AutoTokenizer.from_pretrained(models["student"])
    options = DataArguments(data_files=str(chat), max_length=24, packing=False)
    data = preprocess(Task.CAUSAL_LM, load_splits(options)[0], None, tok, options)
    seen: dict[str, list[list[int]]] = {}
    loaded = {name: LlamaForCausalLM.from_pretrained(folder) for name, folder in models.items()}
    args = DistillationArguments(
        str(tmp_path / "out"),
        losses={"ce": 0.5, "kd": 0.5},
        max_steps=2,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = DistillationTrainer(
        loaded["student"], args, data.collator, data.train, None, tok, teacher=loaded["teacher"]
    )
    for name, model in loaded.items():
        model.register_forward_pre_hook(
            lambda _, __, kwargs, name=name: seen.setdefault(name, []).append(kwargs["input_ids"].tolist()),
            with_kwargs=True,
        )
    trainer.train()
    assert seen["teacher"] == seen["student"] and len(seen["student"]) == 2
    texts = {
        tuple(tok(tok.apply_chat_template(messages, tools=tools, tokenize=False), add_special_tokens=False).input_ids)
        for messages, tools in zip(CONVERSATIONS, TOOLS, strict=True)
    }
    pad = tok.pad_token_id
    assert all(tuple(token for token in row if token != pad) in texts for batch in seen["student"] for row in batch)


def test_a_student_without_a_template_is_an_error_until_one_is_named(chat: Path, tmp_path: Path) -> None:
    teacher, student = save_model(tmp_path / "teacher", OTHER), save_model(tmp_path / "base", None, seed=1)
    options = {"teacher": teacher, "model_name_or_path": student, "data_files": chat, "losses": "kd"}
    with pytest.raises(OptionError, match="no chat_template to format them.*chat_template_path"):
        run(tmp_path, **options)
    run(tmp_path, **options, chat_template_path=teacher, max_steps=1)
    assert AutoTokenizer.from_pretrained(tmp_path / "student").chat_template == OTHER


def test_the_real_example_runs_with_a_local_teacher_and_conversations(chat: Path, tmp_path: Path) -> None:
    teacher = save_model(tmp_path / "teacher", PLAIN)
    local = QUICK | {
        "max_steps": 1,
        "eval_strategy": "no",
        "preprocessing_num_workers": 1,
        "dataloader_num_workers": 0,
    }
    entries = local | {
        "teacher": teacher,
        "student_init_kwargs": SMALLER["llama"] | {"method": "guide", "dtype": "float32"},
        "dataset_name": "json",
        "data_files": chat,
        "validation_split_percentage": 20,
        "max_length": 32,
        "warmup_steps": 0,
        "output_dir": tmp_path / "student",
    }
    config = read_config(EXAMPLES / "distill_smollm2_chat.yaml", flags(**entries))
    assert config.data.assistant_only_loss and config.data.packing and config.data.text_column == "messages"
    metrics = distill(config)
    assert metrics["eval_ce"] > 0 and metrics["eval_kd"] > 0
