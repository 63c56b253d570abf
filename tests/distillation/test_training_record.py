"""A trainer pushes a stock student with the record of its origin, here to a fake Hub over real HTTP."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.errors import EntryNotFoundError
from peft import LoraConfig
from transformers import AutoConfig, AutoModelForCausalLM

from hf_guide import DistillationTrainer, InitializationReport, from_teacher
from hf_guide.distillation.training_record import build_training_record
from hf_guide.hub.metadata import load_record
from hf_guide.hub.model_card import write_model_card
from hf_guide.hub.saved_model import saved_weights_fingerprint
from tests.distillation.small import collate, examples_for, llama
from tests.distillation.test_trainer import arguments
from tests.fake_hub import fake_hub
from tests.hub.test_push import pull, run_with_hub
from tests.tiny import run_python

EDIT_THE_CARD = """
    import sys
    from pathlib import Path
    from huggingface_hub import HfApi
    from hf_guide import DistillationTrainer
    from tests.distillation.small import collate, examples_for, llama
    from tests.distillation.test_trainer import arguments

    card = Path(sys.argv[1]) / "run" / "README.md"
    args = arguments(card.parent, losses={"ce": 1.0}, max_steps=1, hub_model_id="me/student", hub_token="hf_none")

    def write(text):
        card.write_text(f"{card.read_text()}\\n{text}\\n")

    def write_on_the_hub(text):
        published = Path(HfApi().hf_hub_download("me/student", "README.md", local_dir=sys.argv[1])).read_text()
        HfApi().upload_file(
            path_or_fileobj=f"{published}\\n{text}\\n".encode(), path_in_repo="README.md", repo_id="me/student"
        )

    def make_trainer():
        return DistillationTrainer(llama(0), args, collate, examples_for("causal-lm"))

    trainer = make_trainer()
    trainer.push_to_hub()
    write_on_the_hub("First on the Hub.")
    trainer.push_to_hub()
    write("First here.")
    trainer.create_model_card(license="mit")
    trainer.push_to_hub()
    write_on_the_hub("Second on the Hub.")
    trainer = make_trainer()  # as a run that goes on in another process
    trainer.push_to_hub()
    write("Second here.")
    write_on_the_hub("Third on the Hub.")
    trainer.push_to_hub()
"""


@pytest.mark.extended
def test_a_push_keeps_what_people_wrote_in_the_card_since_the_last_one(tmp_path: Path) -> None:
    with fake_hub() as hub:
        run_with_hub(EDIT_THE_CARD, hub, tmp_path)
    files, local = hub.repositories["me/student"], tmp_path / "run" / "_README.local.md"
    card = files["README.md"].decode()
    for text in ("First on the Hub.", "First here.", "Second on the Hub.", "Third on the Hub."):
        assert card.count(text) == 1, text
    assert "license: mit" in card and "Second here." not in card and card.count("hf_guide:begin") == 1
    assert "Second here." in local.read_text() and local.name not in files, "text of both sides: neither is lost"


TRAIN = """
    import json, sys
    from pathlib import Path
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from hf_guide import AutoStudentForCausalLM, DistillationTrainer
    from tests.distillation.small import VOCABULARY, collate, examples_for, llama
    from tests.distillation.test_trainer import arguments

    folder = Path(sys.argv[1])
    words = models.WordLevel({f"w{n}": n for n in range(VOCABULARY)}, "w0")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words))
    llama(2, width=32, blocks=4).save_pretrained(folder / "teacher")
    tokenizer.save_pretrained(folder / "teacher")
    (folder / "teacher" / "README.md").write_text("---\\nlicense: mit\\nlanguage: en\\n---\\n# The teacher\\n")
    student = AutoStudentForCausalLM.from_teacher(
        str(folder / "teacher"), hidden_size=16, num_hidden_layers=2, intermediate_size=32, head_dim=4, show_progress=False
    )
    args = arguments(
        folder / "run", losses={"ce": 0.5, "kd": 0.5}, max_steps=4, learning_rate=0.1, push_to_hub=True,
        hub_model_id="me/student", hub_private_repo=True, hub_token="hf_none",
        hub_strategy="checkpoint",
        save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2,
    )
    trainer = DistillationTrainer(
        student, args, collate, examples_for("causal-lm"), examples_for("causal-lm", 6, seed=4),
        processing_class=tokenizer, teacher=str(folder / "teacher"),
    )
    trainer.train()
    metrics = trainer.evaluate()
    trainer.push_to_hub(dataset_tags="someone/text", language="en", commit_message="the end")
    (folder / "metrics.json").write_text(json.dumps(metrics))
"""

LEFTOVER = """
    import sys
    from pathlib import Path
    from hf_guide import DistillationTrainer
    from hf_guide.hub.metadata import DistillationRecord, save_record
    from hf_guide.hub.model_card import write_model_card
    from tests.distillation.small import collate, examples_for, llama
    from tests.distillation.test_trainer import arguments
    from tests.hub.test_push import llama_student

    folder = Path(sys.argv[1]) / "run"
    llama_student().save_pretrained(folder)
    metrics = {"eval_accuracy": 0.75}
    former = DistillationRecord(task="text-generation", datasets=["someone/text"], steps=77, metrics=metrics)
    save_record(folder, former)
    card = write_model_card(folder)
    card.write_text(card.read_text() + "\\nMy own words.\\n")
    args = arguments(
        folder, losses={"ce": 1.0}, max_steps=2, push_to_hub=True, hub_model_id="me/student", hub_strategy="every_save",
        save_strategy="steps", save_steps=2, hub_always_push=True,
    )
    DistillationTrainer(llama(0), args, collate, examples_for("causal-lm")).train()
"""


@pytest.mark.extended
def test_a_pushed_checkpoint_has_a_card_of_its_own(tmp_path: Path) -> None:
    with fake_hub() as hub:
        run_with_hub(LEFTOVER, hub, tmp_path)
    files = hub.repositories["me/student"]
    card = files["README.md"].decode()
    assert "My own words." in card and "Length: 2 steps" in card
    assert "0.75" not in card and "77" not in card and "initialized" not in card
    assert json.loads(files["distillation.json"])["steps"] == 2 and "initialization_report.json" not in files
    pushed = pull(hub, "me/student", tmp_path / "pulled")
    assert load_record(pushed).weights == saved_weights_fingerprint(pushed)
    assert load_record(pushed).weights is not None


LOAD = """
    import json, math, sys
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
    AutoTokenizer.from_pretrained(sys.argv[1])
    nats, count = 0.0, 0
    for example in json.loads(sys.argv[2]):
        ids, labels = torch.tensor([example["input_ids"]]), torch.tensor([example["labels"]])
        here = int((labels[:, 1:] != -100).sum())
        nats, count = nats + model(input_ids=ids, labels=labels).loss.item() * here, count + here
    assert "hf_guide" not in sys.modules
    print(math.exp(nats / count))
"""


@pytest.mark.extended
def test_a_pushed_student_is_stock_and_gives_the_trainers_own_figure(tmp_path: Path) -> None:
    with fake_hub() as hub:
        hub.repositories["me/student"] = {"README.md": b"---\ntags:\n- mine\n---\n# My student\n\nMy own words.\n"}
        run_with_hub(TRAIN, hub, tmp_path)
    assert set(hub.repositories) == {"me/student"} and ("me/student", "the end") in hub.commits
    pushed = pull(hub, "me/student", tmp_path / "pulled")
    files = {str(path.relative_to(pushed)) for path in pushed.rglob("*") if path.is_file()}
    assert {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "initialization_report.json",
        "distillation.json",
    } <= files
    assert "last-checkpoint/optimizer.pt" in files
    pickles = {name for name in files if name.endswith((".bin", ".pt", ".pkl")) and "last-checkpoint" not in name}
    assert pickles <= {"training_args.bin"}, "that one is Transformers' own"
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    found = run_python(LOAD, pushed, json.dumps(examples_for("causal-lm", 6, seed=4)))
    assert float(found) == pytest.approx(metrics["eval_perplexity"], rel=1e-5)
    card = ModelCard.load(pushed / "README.md")
    assert "My own words." in card.text and {"mine", "hf_guide", "distillation"} <= set(card.data.tags)
    assert card.data.license == "mit" and card.data.datasets == ["someone/text"]
    assert (
        f"{metrics['eval_perplexity']:.4g}"[:4] in card.text
        and f"{metrics['eval_teacher_perplexity']:.4g}"[:4] in card.text
    )
    assert str(tmp_path) not in card.text + (pushed / "distillation.json").read_text()
    reports = [pushed / folder / "initialization_report.json" for folder in (".", "last-checkpoint")]
    assert not any(str(tmp_path) in report.read_text() for report in reports)
    record = json.loads((pushed / "distillation.json").read_text())
    assert record["losses"] == {"ce": 0.5, "kd": 0.5} and record["steps"] == 4
    assert record["weights"] is not None and record["weights"] == saved_weights_fingerprint(pushed)
    assert [entry["step"] for entry in record["history"]] == [2, 4], "the last evaluation is of the same step again"


@pytest.fixture
def saved_student(tmp_path: Path) -> Path:
    teacher = llama(2, width=32, blocks=4)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 32, "head_dim": 4}
    from_teacher(teacher, show_progress=False, **sizes).save_pretrained(tmp_path / "student")
    return tmp_path / "student"


@pytest.mark.parametrize("way", ["model", "model_init", "hub"])
def test_a_loaded_student_is_saved_with_the_report_of_its_initialization(
    way: str, saved_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def load() -> Any:
        student = AutoModelForCausalLM.from_pretrained(saved_student)
        if way == "hub":
            student.name_or_path, student.config._commit_hash = "me/student", "0" * 40
        return student

    def download(repo_id: str, name: str, **where: Any) -> str:
        asked.append((repo_id, name, where))
        if not (saved_student / name).is_file():
            raise EntryNotFoundError(name)
        return str(saved_student / name)

    monkeypatch.setattr("hf_guide.distillation.student_init.hf_hub_download", download)
    student = {"model_init": load} if way == "model_init" else {"model": load()}
    args = arguments(tmp_path / "run", losses={"ce": 1.0}, hub_token="hf_none")
    trainer = DistillationTrainer(args=args, data_collator=collate, train_dataset=examples_for("causal-lm"), **student)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    assert InitializationReport.load(tmp_path / "run") == InitializationReport.load(saved_student)
    assert load_record(tmp_path / "run").steps == 1
    assert "guide" in ModelCard.load(tmp_path / "run" / "README.md").data.tags
    where = {"revision": "0" * 40, "token": "hf_none"}
    files = ("initialization_report.json", "distillation.json")
    assert asked == ([("me/student", name, where) for name in files] if way == "hub" else [])


def test_a_student_of_random_weights_has_no_report_of_the_folder_of_its_config(
    saved_student: Path, tmp_path: Path
) -> None:
    student = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(saved_student))
    args = arguments(tmp_path / "run", losses={"ce": 1.0})
    DistillationTrainer(student, args, collate, examples_for("causal-lm")).save_model()
    assert "model.safetensors" in os.listdir(tmp_path / "run")
    assert "initialization_report.json" not in os.listdir(tmp_path / "run")


def trainer_of(student: Any, folder: Path, teacher: Any = None, **options: Any) -> DistillationTrainer:
    losses = {"ce": 1.0} if teacher is None else {"kd": 1.0}
    args = arguments(folder, losses=losses, **{"max_steps": 2} | options)
    examples = examples_for("causal-lm", 6, seed=4)
    return DistillationTrainer(student, args, collate, examples_for("causal-lm"), examples, teacher=teacher)


@pytest.mark.parametrize("end", ["not evaluated", "evaluated", "best", "best, evaluated again"])
def test_the_results_of_a_record_are_those_of_the_weights_that_are_saved(end: str, tmp_path: Path) -> None:
    best = {"load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 2, "learning_rate": 10.0}
    options: Any = {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 4}
    trainer = trainer_of(llama(0), tmp_path, **options | (best if end.startswith("best") else {}))
    trainer.train()
    if end == "not evaluated":  # as a run that was interrupted after its last evaluation
        trainer.state.global_step = 5
    if end.endswith("again"):
        trainer.evaluate()
    metrics = build_training_record(trainer).metrics
    if end == "not evaluated":
        assert not metrics
        return
    if end.startswith("best"):
        assert trainer.state.best_global_step == 2, "with so large a rate the student only gets worse"
    assert metrics["eval_loss"] == pytest.approx(trainer.evaluate()["eval_loss"])


@pytest.mark.parametrize("way", ["in memory", "loaded"])
@pytest.mark.parametrize("initialized", [True, False])
def test_a_record_names_the_teachers_of_earlier_trainings(way: str, initialized: bool, tmp_path: Path) -> None:
    teachers = [llama(2), llama(3), llama(4)]
    for name, teacher in zip(("org/first", "org/second", "org/third"), teachers, strict=True):
        teacher.config._name_or_path = name
    student = from_teacher(teachers[0], num_hidden_layers=1, show_progress=False) if initialized else llama(0)
    for number, teacher in enumerate(teachers[1:], 1):
        folder = tmp_path / f"run{number}"
        trainer = trainer_of(student, folder, teacher, save_strategy="steps", save_steps=2)
        trainer.train()
        assert not (folder / "checkpoint-2" / "distillation.json").exists(), "that would be of the training before"
        trainer.save_model()
        trainer.create_model_card()
        student = trainer.unwrapped_student if way == "in memory" else AutoModelForCausalLM.from_pretrained(folder)
    record = load_record(tmp_path / "run2")
    assert [(each.steps, each.teachers[0].name, each.losses) for each in record.earlier] == [
        (2, "org/second", {"kd": 1.0})
    ]
    card = ModelCard.load(tmp_path / "run2" / "README.md")
    names = ["org/first"] * initialized + ["org/second", "org/third"]
    assert card.data.base_model == names
    assert "- Training 1, before this one: 2 steps: 1 x kd, teacher org/second\n" in card.text
    if initialized:
        last = from_teacher(tmp_path / "run2", num_hidden_layers=1, show_progress=False)
        (stage,) = last.initialization_report.lineage
        assert (stage.steps, [each.name for each in stage.training_teachers]) == (4, ["org/second", "org/third"])
        last.save_pretrained(tmp_path / "last")
        card = ModelCard.load(write_model_card(tmp_path / "last"))
        assert card.data.base_model == names and "4 steps: 1 x kd, teachers org/second and org/third" in card.text


def test_a_training_that_is_resumed_is_one(tmp_path: Path) -> None:
    trainer = trainer_of(llama(0), tmp_path, save_strategy="steps", save_steps=2)
    trainer.train()
    trainer.create_model_card()
    trainer.args.max_steps = 4
    trainer.train(resume_from_checkpoint=True)
    trainer.create_model_card()
    record = load_record(tmp_path)
    assert record.steps == 4 and not record.earlier
    trainer.train()
    assert [each.steps for each in build_training_record(trainer).earlier] == [4]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT's own call
def test_the_card_of_an_adapter_names_its_base(tmp_path: Path) -> None:
    llama(0).save_pretrained(tmp_path / "base")
    args = arguments(tmp_path / "run", losses={"ce": 1.0}, max_steps=1)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    trainer = DistillationTrainer(base, args, collate, examples_for("causal-lm"), peft_config=lora)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    card = ModelCard.load(tmp_path / "run" / "README.md")
    assert card.data.get("library_name") == "peft" and "# base: base, a LlamaForCausalLM" in card.text
    assert "PeftModelFor" not in card.text and str(tmp_path) not in str(card)
