"""`hf-guide distill`: one file holds all options, they are validated before any work, and the student saved is a stock one."""

import argparse
import copy
import json
import re
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers
import yaml
from huggingface_hub import ModelCard
from transformers import AutoTokenizer, EvalPrediction, LlamaConfig, LlamaForCausalLM

from hf_guide import InitializationConfig, OptionError, capture_teacher
from hf_guide.cli import distill as distill_command
from hf_guide.cli.main import main
from hf_guide.data.arguments import DataArguments
from hf_guide.data.loading import load_named_splits, load_splits
from hf_guide.data.preprocessing import preprocess
from hf_guide.distillation.losses import registry as losses
from hf_guide.initialization.student_config import derive_student_config
from hf_guide.scripts.distill import accuracy, distill, read_config
from hf_guide.tasks import Task
from tests.examples import local
from tests.examples.local import EXAMPLES, QUICK, SMALLER, make_model, run_process


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """No Hub, and nothing left in the user's cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("causal") / "teacher", "llama", "ForCausalLM")


def written(folder: Path, **options: Any) -> Path:
    """Write options as a YAML file over those of a quick run, and return its path."""
    entries = QUICK | {"output_dir": str(folder / "student"), "max_length": 32} | options
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in entries.items()}
    (folder / "run.yaml").write_text(yaml.safe_dump(plain), encoding="utf-8")
    return folder / "run.yaml"


def run(path: str | Path, *words: str) -> int:
    """Run the command as the command line would."""
    parser = argparse.ArgumentParser()
    distill_command.add_arguments(parser)
    return distill_command.run(parser.parse_args([str(path), *words]))


LABELS = {"id2label": {0: "good", 1: "bad"}, "label2id": {"good": 0, "bad": 1}}
WORDS = {"id2label": {0: "VERB", 1: "OTHER"}, "label2id": {"VERB": 0, "OTHER": 1}}
CASES: dict[str, tuple[str, str, dict[str, Any], str, Any]] = {
    "causal-lm": ("llama", "ForCausalLM", {}, "data_files", lambda at: local.write_text(at / "text.txt")),
    "masked-lm": ("bert", "ForMaskedLM", {}, "data_files", lambda at: local.write_text(at / "text.txt")),
    "seq2seq-lm": ("t5", "", {}, "data_files", lambda at: local.write_pairs(at / "pairs.jsonl")),
    "sequence-classification": (
        "bert",
        "ForSequenceClassification",
        LABELS,
        "data_files",
        lambda at: local.write_labelled(at / "labelled.csv"),
    ),
    "token-classification": (
        "bert",
        "ForTokenClassification",
        WORDS,
        "data_files",
        lambda at: local.write_words(at / "words.jsonl"),
    ),
    "image-classification": (
        "vit",
        "ForImageClassification",
        LABELS,
        "dataset_name",
        lambda at: local.write_images(at / "images"),
    ),
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("task", CASES)
def test_every_task_is_trained_evaluated_and_saved(task, tmp_path, capsys):
    family, kind, changes, where, write = CASES[task]
    teacher = make_model(tmp_path / "teacher", family, kind, **changes)
    entries = {
        "teacher": teacher,
        "student_init_kwargs": SMALLER[family],
        where: write(tmp_path),
        "validation_split_percentage": 25,
    }
    assert run(written(tmp_path, **entries), "--max_steps", "2") == 0
    shown = capsys.readouterr().out
    folder = tmp_path / "student"
    assert f"Saved in {folder}" in shown and "teacher_agreement" in shown
    record = json.loads((folder / "distillation.json").read_text())
    assert record["steps"] == 2 and record["metrics"]["eval_ce"] > 0
    assert ("eval_perplexity" if Task(task).is_language_model else "eval_accuracy") in record["metrics"]
    card = (folder / "README.md").read_text()
    assert "distillation" in card and str(tmp_path) not in card
    auto = getattr(transformers, Task(task).row.auto_class)
    student = auto.from_pretrained(folder)
    assert type(student) is type(auto.from_pretrained(teacher))
    assert student.num_parameters() < auto.from_pretrained(teacher).num_parameters()
    if "id2label" in changes:
        assert student.config.id2label == changes["id2label"]
    is_image = task == "image-classification"
    assert (folder / ("preprocessor_config.json" if is_image else "tokenizer.json")).is_file()


def test_a_student_that_is_there_already_gets_its_teachers_labels(tmp_path):
    teacher = make_model(tmp_path / "teacher", "bert", "ForSequenceClassification", **LABELS)
    base = make_model(tmp_path / "base", "bert", "ForMaskedLM", width=16, blocks=1, seed=1)
    data = local.write_labelled(tmp_path / "labelled.csv", 200)
    entries = {"teacher": teacher, "model_name_or_path": base, "data_files": data, "max_steps": 60}
    path = written(tmp_path, **entries, losses={"ce": 1.0, "kd": 1e-4}, per_device_train_batch_size=16)
    metrics = distill(read_config(path, ["--learning_rate", "1e-2"]))
    assert metrics["eval_accuracy"] > 0.9
    config = transformers.AutoConfig.from_pretrained(tmp_path / "student")
    assert config.architectures == ["BertForSequenceClassification"] and config.id2label == LABELS["id2label"]


@pytest.mark.sampled(1)
@pytest.mark.parametrize("task", ["causal-lm", "masked-lm"])
def test_from_a_capture_no_teacher_is_needed(task, tmp_path):
    family, kind, changes, where, write = CASES[task]
    teacher = make_model(tmp_path / "teacher", family, kind)
    student = make_model(tmp_path / "base", family, kind, width=16, blocks=1, seed=1)
    data = {where: str(write(tmp_path)), "max_length": 32, "static_masking": True}
    options = DataArguments(**data)
    train, held_out = load_splits(options)
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    processed = preprocess(Task(task), train, held_out, tokenizer, options)
    keep = {"top_k": len(tokenizer)}
    capture_teacher(
        teacher, processed.train, tmp_path / "capture", processing_class=tokenizer, config=keep, show_progress=False
    )
    entries = {"model_name_or_path": student, "data_files": data[where]}
    results = []
    for source in ({"teacher": teacher}, {"teacher_cache": tmp_path / "capture"}):
        (tmp_path / "run.yaml").unlink(missing_ok=True)
        path = written(tmp_path, **entries, **source, static_masking=True, losses="kd", log_level="error")
        distill(read_config(path))
        state = json.loads((tmp_path / "student" / "trainer_state.json").read_text())
        results.append([entry["kd"] for entry in state["log_history"] if "kd" in entry])
    assert len(results[0]) == QUICK["max_steps"]
    assert results[1] == pytest.approx(results[0], rel=2e-3)  # log-probabilities were captured in float16


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT's own call
def test_an_adapter_can_be_trained(teacher, tmp_path):
    student = make_model(tmp_path / "base", "llama", "ForCausalLM", width=16, blocks=1)
    entries = {
        "teacher": teacher,
        "model_name_or_path": student,
        "data_files": local.write_text(tmp_path / "text.txt"),
    }
    adapter = '{"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "target_modules": ["q_proj"]}'
    assert run(written(tmp_path, **entries), "--peft_config", adapter) == 0
    assert (tmp_path / "student" / "adapter_model.safetensors").is_file()


LOSS = """
from hf_guide import register_loss

@register_loss("absolute", requires="logits")
def absolute(student, teacher, labels, config):
    return (student - teacher.logits).abs().mean(-1)
"""


def test_a_loss_of_an_imported_module_is_trained_on(teacher, tmp_path, monkeypatch):
    (tmp_path / "my_loss.py").write_text(LOSS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(sys.path))
    monkeypatch.setattr(losses, "_LOSSES", dict(losses._LOSSES))
    data = {"data_files": local.write_text(tmp_path / "text.txt"), "student_init_kwargs": SMALLER["llama"]}
    path = str(written(tmp_path, teacher=teacher, **data, losses={"absolute": 1.0}, validation_split_percentage=25))
    assert main(["distill", path, "--max_steps", "1"]) == 2
    assert main(["--import", "my_loss", "distill", path, "--max_steps", "1"]) == 0
    assert json.loads((tmp_path / "student" / "distillation.json").read_text())["metrics"]["eval_absolute"] > 0


@pytest.mark.extended
def test_an_existing_student_in_a_subfolder_is_read_with_its_own_config(teacher, tmp_path):
    make_model(tmp_path / "base" / "small", "llama", "ForCausalLM", width=16, blocks=1)
    (tmp_path / "base" / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertModel"]}))
    models = {"model_name_or_path": tmp_path / "base", "model_init_kwargs": {"subfolder": "small"}}
    data = {"data_files": local.write_text(tmp_path / "text.txt"), "processing_class_name_or_path": str(teacher)}
    assert run(written(tmp_path, teacher=teacher, **models, **data), "--max_steps", "1") == 0
    del data["processing_class_name_or_path"]
    assert run(written(tmp_path, teacher=teacher, **models, **data), "--max_steps", "1") == 0
    assert LlamaConfig.from_pretrained(tmp_path / "student").hidden_size == 16


def test_a_run_that_was_cut_off_goes_on(teacher, tmp_path, capsys):
    entries = {
        "teacher": teacher,
        "student_init_kwargs": SMALLER["llama"],
        "data_files": local.write_text(tmp_path / "text.txt"),
    }
    path = written(tmp_path, **entries, resume_from_checkpoint=True, save_strategy="steps", save_steps=1)
    assert run(path, "--max_steps", "2") == 0  # there is nothing to resume yet
    assert run(path, "--max_steps", "3") == 0
    history = json.loads((tmp_path / "student" / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "loss" in entry] == [1, 2, 3]


# Help, messages and invalid options


def test_help_after_the_file_lists_every_option(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path / "any.yaml", "--help")
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert "--temperature" in shown and "--text_column" in shown and "--learning_rate" in shown
    assert "(default: train)" in shown and "SUPPRESS" not in shown


def test_the_command_line_counts_over_the_file_and_yaml_may_write_numbers_as_it_likes(teacher, tmp_path):
    path = written(tmp_path, teacher=teacher, student_init_kwargs={"hidden_size": 16}, data_files="a.txt")
    path.write_text(path.read_text() + "weight_decay: 1e-2\nbf16: 'no'\nsave_steps: 0.5\n")
    settings = read_config(path, ["--losses", '{"kd": 2}', "--no-packing", "--temperature=3", "--max-length", "9"])
    assert settings.training.weight_decay == 0.01 and settings.training.bf16 is False
    assert settings.training.losses == {"kd": 2.0} and settings.training.temperature == 3.0
    assert settings.data.packing is False and settings.data.max_length == 9 and settings.data.dataset_name == "text"
    assert settings.training.student_init_kwargs == {"hidden_size": 16}
    path.with_suffix(".json").write_text(json.dumps({"data_files": ["a.csv"], "output_dir": str(tmp_path)}))
    assert read_config(path.with_suffix(".json")).data.dataset_name == "csv"


@pytest.mark.parametrize(
    "entries,words,message",
    [
        ({"temprature": 2.0}, [], "Did you mean 'temperature'"),
        ({}, ["--temprature", "2"], "--temperature"),
        ({}, ["--max_steps", "many"], "--max_steps.*invalid int value"),
        ({}, ["--optim", "nothing"], "invalid choice"),
        ({"learning_rate": "fast"}, [], "learning_rate must be a number; found 'fast'"),
        ({"max_steps": 2.5}, [], "max_steps must be a whole number"),
        ({"max_steps": True}, [], "max_steps must be a number"),
        ({"bf16": "perhaps"}, [], "bf16 must be true or false"),
        ({"temperature": -1}, [], "temperature must be a number"),
        ({"eval_strategy": "sometimes"}, [], "sometimes"),
        ({"task": "causal"}, [], "causal-lm"),
        ({"data_files": None}, [], "No dataset is given"),
        ({"data_files": "text.unknown"}, [], "format of 'text.unknown' cannot be inferred"),
        ({"max_length": 0}, [], "max_length must be a whole number of at least 1"),
        (
            {"validation_split_percentage": 100},
            [],
            "validation_split_percentage must be a number from 0 and below 100",
        ),
        ({"data_files": "{train"}, [], "must be valid JSON"),
        ({"peft_config": [1]}, [], "peft_config must be a mapping"),
    ],
)
def test_an_invalid_option_of_the_file_is_named(entries, words, message, tmp_path):
    path = written(
        tmp_path, **{"data_files": "a.txt", "teacher": "no/such", "student_init_kwargs": {"hidden_size": 8}} | entries
    )
    with pytest.raises(OptionError, match=message):
        read_config(path, words)


def test_a_file_that_is_no_mapping_is_an_error(tmp_path):
    for name, text in (("a.yaml", "- 1\n"), ("b.yaml", "a: [\n"), ("c.json", "{")):
        (tmp_path / name).write_text(text)
        with pytest.raises(OptionError, match=name):
            read_config(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        read_config(tmp_path / "d.yaml")


@pytest.mark.parametrize(
    "entries,message",
    [
        ({"model_name_or_path": "also"}, "both given"),
        ({"peft_config": {"peft_type": "LORA"}}, "peft_config and student_init_kwargs are both given"),
        ({"student_init_kwargs": None}, "There is no student"),
        ({"text_column": "txt"}, "no column 'txt'"),
        ({"max_length": 65}, "supports at most 64"),
        ({"dataset_test_split": "test"}, "no split 'test'"),
        ({"dataset_train_split": "train[:x]"}, "slice .* is invalid"),
        ({"validation_split_percentage": 0.1}, "to evaluate on"),
        ({"losses": "dkd"}, "dkd"),
        ({"losses": "lelp"}, "needs a subclass projector"),
        ({"processing_class_name_or_path": "EMPTY"}, "processing_class_name_or_path"),
        ({"teacher": "/no/such/folder"}, "The teacher /no/such/folder has no readable config"),
        ({"teacher_init_kwargs": {"dtyp": "bfloat16"}}, "teacher_init_kwargs=.'dtyp'.*dtyp"),
        ({"teacher_init_kwargs": {"dtype": "bfloat61"}}, "teacher_init_kwargs=.'dtype'.*bfloat61"),
        ({"resume_from_checkpoint": "/no/such/checkpoint"}, "no folder '/no/such/checkpoint'"),
    ],
)
def test_what_cannot_be_done_is_an_error_before_the_first_step(entries, message, teacher, tmp_path):
    (tmp_path / "empty").mkdir()
    data = local.write_text(tmp_path / "text.txt")
    entries = {name: tmp_path / "empty" if value == "EMPTY" else value for name, value in entries.items()}
    path = written(
        tmp_path, **{"teacher": teacher, "student_init_kwargs": SMALLER["llama"], "data_files": data} | entries
    )
    with pytest.raises(ValueError, match=message):
        distill(read_config(path))
    assert not (tmp_path / "student" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"student_init_kwargs": {"num_hidden_layers": 1}}, "the losses {'ce': 0.5, 'kd': 0.5} compare"),
        (
            {"student_init_kwargs": {"num_hidden_layers": 1}, "losses": "ce"},
            "student_init_kwargs makes the student of one",
        ),
        (
            {"student_init_kwargs": {"num_hidden_layers": 1, "teacher": "other"}, "losses": "kd"},
            "the losses {'kd': 1.0}",
        ),
        ({"model_name_or_path": "student"}, "the losses {'ce': 0.5, 'kd': 0.5} compare"),
        ({"stages": [{"student_init_kwargs": {"num_hidden_layers": 1}}]}, "the losses {'ce': 0.5, 'kd': 0.5} compare"),
    ],
)
def test_a_missing_teacher_is_the_first_thing_that_is_missing(options, reason, tmp_path):
    path = written(tmp_path, **options, data_files=local.write_text(tmp_path / "text.txt"))
    with pytest.raises(
        OptionError, match=f"There is no teacher, and {re.escape(reason)}.*set teacher .*teacher_cache"
    ):
        distill(read_config(path))


def test_without_losses_that_compare_there_need_be_no_teacher(teacher, tmp_path):
    text = local.write_text(tmp_path / "text.txt")
    for options in (
        {"model_name_or_path": teacher},
        {"student_init_kwargs": {"num_hidden_layers": 1, "teacher": str(teacher)}, "task": "causal-lm"},
    ):
        options |= {"processing_class_name_or_path": str(teacher)}
        assert run(written(tmp_path, **options, losses="ce", data_files=text), "--max_steps", "1") == 0


@pytest.mark.parametrize(
    ("family", "kind", "own"),
    [
        ("bert", "ForSequenceClassification", Task.SEQUENCE_CLASSIFICATION),
        ("bert", "ForMaskedLM", Task.MASKED_LM),
        ("bert", "", Task.FEATURE_EXTRACTION),
        ("llama", "ForCausalLM", Task.CAUSAL_LM),
        ("vit", "ForImageClassification", Task.IMAGE_CLASSIFICATION),
    ],
)
def test_a_student_is_for_the_task_of_the_teacher_that_it_is_made_of(family, kind, own, tmp_path):
    teacher = make_model(tmp_path / "teacher", family, kind)
    options = {"student_init_kwargs": {"num_hidden_layers": 1}, "data_files": str(tmp_path / "none.csv")}
    for task in Task:
        path = written(tmp_path, teacher=teacher, task=str(task), **options)
        message = f"task is {task}, but .*teacher is a .*{kind}.*, for {own}, and so is a student made of it"
        with pytest.raises((OptionError, OSError), match="none.csv" if task is own else message):
            distill(read_config(path))


def test_labels_that_the_teacher_does_not_have_are_an_error(tmp_path):
    teacher = make_model(tmp_path / "teacher", "bert", "ForSequenceClassification", id2label={0: "up", 1: "down"})
    data = local.write_labelled(tmp_path / "labelled.csv")
    path = written(tmp_path, teacher=teacher, student_init_kwargs=SMALLER["bert"], data_files=data)
    with pytest.raises(OptionError, match="'bad', 'good'.*'up', 'down'"):
        distill(read_config(path))


# The data


def test_what_is_held_out_depends_on_its_seed_alone_and_none_of_it_is_trained_on(tmp_path):
    (tmp_path / "text.txt").write_text("\n".join(f"text {number}" for number in range(50)))
    held_out = []
    for most in (None, 3):
        options = DataArguments(
            data_files=str(tmp_path / "text.txt"), validation_split_percentage=20, max_train_samples=most
        )
        train, evaluated = load_splits(options)
        assert evaluated is not None and not set(train["text"]) & set(evaluated["text"])
        held_out.append(evaluated["text"][:])
    assert len(train) == 3 and len(held_out[0]) == 10 and held_out[0] == held_out[1]
    other = DataArguments(
        data_files=str(tmp_path / "text.txt"), validation_split_percentage=20, validation_split_seed=1
    )
    assert load_splits(other)[1]["text"][:] != held_out[0]


@pytest.mark.parametrize(
    ("files", "options", "expected"),
    [
        ({"train": "a", "validation": "b"}, {}, "b.txt"),
        ({"validation": "b", "train": "a"}, {}, "b.txt"),
        ({"train": "a", "validation": ["b", "c"]}, {}, "b.txt and 1 more"),
        ({"train": "a", "validation": "b", "test": "c"}, {"dataset_test_split": "test"}, "c.txt"),
        ({"train": "a", "test": "c"}, {"dataset_test_split": "test[:50%]"}, "c.txt (test[:50%])"),
        ({"train": "a"}, {"validation_split_percentage": 20}, "a.txt, 20% held out"),
        (["a", "b"], {"validation_split_percentage": 20}, "a.txt and 1 more (train), 20% held out"),
        ("a", {"dataset_test_split": "train[50%:]"}, "a.txt (train[50%:])"),
        (None, {}, "saved (validation)"),
        ("a", {"validation_split_percentage": 0}, None),
    ],
)
def test_the_name_of_the_evaluation_data_is_that_of_their_file_or_split(tmp_path, files, options, expected):
    paths = {name: str(tmp_path / f"{name}.txt") for name in "abc"}
    for name, path in paths.items():
        Path(path).write_text("\n".join(f"{name} {number}" for number in range(10)))

    def located(names):
        if isinstance(names, str):
            return paths[names]
        each = {split: located(part) for split, part in names.items()} if isinstance(names, dict) else None
        return each or [located(name) for name in names]

    if files is None:
        both = {"train": paths["a"], "validation": paths["b"]}
        datasets.load_dataset("text", data_files=both).save_to_disk(tmp_path / "saved")
    source = {"dataset_name": str(tmp_path / "saved")} if files is None else {"data_files": located(files)}
    _, held_out, name = load_named_splits(DataArguments(**source, **options))
    assert name == expected and (held_out is None) == (expected is None)


def test_the_card_names_the_file_that_was_evaluated(teacher, tmp_path):
    files = {name: str(local.write_text(tmp_path / f"{name}.txt")) for name in ("train", "validation")}
    entries = {"teacher": teacher, "student_init_kwargs": SMALLER["llama"], "data_files": files, "max_steps": 1}
    distill(read_config(written(tmp_path, **entries)))
    card = ModelCard.load(tmp_path / "student" / "README.md")
    assert {each.dataset_name for each in card.data.eval_results} == {"validation.txt"}
    assert "validation.txt" in card.text and "train.txt" not in card.text and str(tmp_path) not in card.content


def test_splits_and_slices_are_found_by_name_in_files_and_in_saved_datasets(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text("\n".join(f"{name} {number}" for number in range(10)))
    files = {"train": str(tmp_path / "a.txt"), "validation": str(tmp_path / "b.txt")}
    train, evaluated = load_splits(DataArguments(data_files=files, dataset_train_split="train[20%:50%]"))
    assert train["text"][:] == ["a 2", "a 3", "a 4"] and evaluated["text"][0] == "b 0" and len(evaluated) == 10
    datasets.load_dataset("text", data_files=files).save_to_disk(tmp_path / "saved")
    train, evaluated = load_splits(DataArguments(dataset_name=str(tmp_path / "saved"), max_eval_samples=2))
    assert len(train) == 10 and evaluated["text"][:] == ["b 0", "b 1"]


def test_packed_blocks_are_the_texts_end_to_end(tmp_path):
    tokenizer = local.tokenizer()
    texts = [text for text, _ in local.sentences(40)]
    data = datasets.Dataset.from_dict({"text": texts})
    options = DataArguments(dataset_name="text", data_files="a.txt", max_length=16)
    processed = preprocess(Task.CAUSAL_LM, data, None, tokenizer, options).train
    joined = [token for text in texts for token in tokenizer(text).input_ids]  # this tokenizer ends texts by itself
    assert [token for block in processed["input_ids"] for token in block] == joined[: len(joined) // 16 * 16]
    assert processed["labels"][:] == processed["input_ids"][:] and all(
        set(mask) == {1} for mask in processed["attention_mask"]
    )


def test_a_text_ends_with_the_end_token_where_the_tokenizer_adds_none(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(make_model(tmp_path, "llama", "ForCausalLM"))
    tokenizer.backend_tokenizer.post_processor = None
    data = datasets.Dataset.from_dict({"text": ["the sea", "quiet music"]})
    options = DataArguments(dataset_name="text", data_files="a.txt", max_length=2)
    processed = preprocess(Task.CAUSAL_LM, data, None, tokenizer, options).train
    expected = [token for text in data["text"] for token in [*tokenizer(text).input_ids, tokenizer.eos_token_id]]
    assert [token for block in processed["input_ids"] for token in block] == expected[: len(expected) // 2 * 2]


def test_lengths_are_those_that_tokenizer_and_model_take_and_512_at_most():
    data = datasets.Dataset.from_dict({"text": [text for text, _ in local.sentences(400)]})
    options = DataArguments(dataset_name="text", data_files="a.txt")
    for most, config, expected in (
        (64, None, 64),
        (10**6, None, 512),
        (10**6, LlamaConfig(max_position_embeddings=48), 48),
    ):
        tokenizer = copy.deepcopy(local.tokenizer())
        tokenizer.model_max_length = most
        processed = preprocess(Task.CAUSAL_LM, data, None, tokenizer, options, config=config)
        assert {len(block) for block in processed.train["input_ids"]} == {expected}


@pytest.mark.parametrize("pack", [True, False])
def test_evaluation_masks_once_and_training_anew(pack):
    tokenizer = local.tokenizer()
    data = datasets.Dataset.from_dict({"text": [text for text, _ in local.sentences(60)]})
    options = DataArguments(dataset_name="text", data_files="a.txt", max_length=32, packing=pack, mlm_probability=0.3)
    processed = preprocess(Task.MASKED_LM, data, data, tokenizer, options)
    trained, evaluated = (
        [processed.collator([split[0], split[1]]) for _ in range(2)] for split in (processed.train, processed.eval)
    )
    assert not torch.equal(trained[0]["labels"], trained[1]["labels"])
    assert torch.equal(evaluated[0]["labels"], evaluated[1]["labels"]) and (evaluated[0]["labels"] >= 0).any()
    again = preprocess(Task.MASKED_LM, data, data, tokenizer, options).eval
    assert again["input_ids"][:] == processed.eval["input_ids"][:]
    once = preprocess(Task.MASKED_LM, data, None, tokenizer, options, static_masking=True).train
    assert once["labels"][:] == processed.eval["labels"][:]


def test_a_file_that_is_no_text_is_an_error_with_the_reason(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one line\n\xa0\xff another")
    with pytest.raises(OptionError, match="a.txt cannot be read: .*can't decode byte 0xa0"):
        load_splits(DataArguments(dataset_name="text", data_files=str(tmp_path / "a.txt")))


def test_both_splits_number_their_classes_alike():
    train = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": ["x", "y", "z"]})
    held_out = datasets.Dataset.from_dict({"text": ["b", "c"], "label": ["z", "y"]})
    options = DataArguments(dataset_name="csv", data_files="a.csv")
    tokenizer = local.tokenizer()
    for labels, expected in ((None, [2, 1]), (["LABEL_0", "LABEL_1", "LABEL_2"], [2, 1]), (["Z", "Y", "X"], [0, 1])):
        processed = preprocess(Task.SEQUENCE_CLASSIFICATION, train, held_out, tokenizer, options, labels=labels)
        assert processed.eval["labels"][:] == expected
    strange = datasets.Dataset.from_dict({"text": ["b"], "label": ["w"]})
    with pytest.raises(OptionError, match="'w'.*not among"):
        preprocess(Task.SEQUENCE_CLASSIFICATION, train, strange, tokenizer, options)
    numbered = datasets.Dataset.from_dict({"text": ["b"], "label": [3]})
    with pytest.raises(OptionError, match="class 3; it must be from 0 to 1"):
        preprocess(Task.SEQUENCE_CLASSIFICATION, numbered, None, tokenizer, options, labels=["p", "q"])


def test_the_first_token_of_a_word_carries_its_label():
    tokenizer = local.tokenizer()
    data = datasets.Dataset.from_dict({"tokens": [["Nobody", "unheard"]], "ner_tags": [["A", "B"]]})
    options = DataArguments(dataset_name="json", data_files="a.json", max_length=32)
    processed = preprocess(Task.TOKEN_CLASSIFICATION, data, None, tokenizer, options, labels=["B", "A"]).train[0]
    words = tokenizer([["Nobody", "unheard"]], is_split_into_words=True).word_ids(0)
    labelled = [(word, label) for word, label in zip(words, processed["labels"], strict=True) if label != -100]
    assert labelled == [(0, 1), (1, 0)] and len(words) > 4


def test_accuracy_counts_only_what_has_a_label():
    predicted = EvalPrediction(
        predictions=torch.tensor([[0, 1, 2]]).numpy(), label_ids=torch.tensor([[0, 2, -100]]).numpy()
    )
    assert accuracy(predicted) == {"accuracy": 0.5}


# The whole


@pytest.mark.extended
def test_the_real_example_runs_with_a_local_teacher_and_text(teacher, tmp_path):
    folder = tmp_path / "student"
    words = local.flags(
        **QUICK | {"max_steps": 2},
        teacher=teacher,
        student_init_kwargs=SMALLER["llama"] | {"method": "calibrated"},  # as it stands in the file
        dataset_name="text",
        data_files=local.write_text(tmp_path / "text.txt"),
        dataset_train_split="train",
        max_length=32,
        gradient_accumulation_steps=1,
        eval_strategy="no",
        output_dir=folder,
        preprocessing_num_workers=1,
        dataloader_num_workers=0,
    )
    code = "import sys; from tests.scripts.test_distill import run; sys.exit(run(*sys.argv[1:]))"
    printed = run_process([sys.executable, "-c", code, str(EXAMPLES / "distill_smollm2.yaml"), *words])
    assert "perplexity" in printed and f"Saved in {folder}" in printed
    entries = json.loads((folder / "distillation.json").read_text())
    assert entries["training"]["bf16"] and entries["training"]["weight_decay"] == 0.1  # the file's own


def test_the_real_example_makes_the_student_it_promises():
    """On the meta device, from the teacher's published shape."""
    settings = read_config(EXAMPLES / "distill_smollm2.yaml", ["--use_cpu", "--output_dir", "unused"])
    student = dict(settings.training.student_init_kwargs)
    assert InitializationConfig.parse(student.pop("method")).method == "calibrated"
    shape = {name: value for name, value in student.items() if name != "dtype"}
    teacher = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        processed = LlamaForCausalLM(derive_student_config(teacher, shape))
    assert 22.5e6 < processed.num_parameters() < 23.5e6


def test_the_command_line_is_light(tmp_path):
    code = (
        "import sys, argparse\nfrom hf_guide.cli import distill as distill_command\n"
        "distill_command.add_arguments(argparse.ArgumentParser())\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    run_process([sys.executable, "-c", code])
