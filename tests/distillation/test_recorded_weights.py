"""A record has the fingerprint of the weights that it is saved with, so that its metrics are of no others."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from hf_guide import DistillationTrainer, from_teacher, save_subclass_student
from hf_guide.hub.metadata import load_record, save_record
from hf_guide.hub.model_card import redraw_card
from hf_guide.hub.saved_model import is_saved_in, saved_weights_fingerprint
from tests.distillation.small import collate, examples_for, llama
from tests.distillation.test_trainer import arguments
from tests.initialization.test_subclass_head import TEXT
from tests.lelp.test_collator import SUBCLASSES, teacher_of
from tests.lelp.test_loss import some_targets, with_targets

CHANGED = "The weights were changed since"
OTHER_WEIGHTS = "measured on other weights"


def trainer_of(folder: Path, student: Any = None, **options: Any) -> DistillationTrainer:
    peft_config = options.pop("peft_config", None)
    losses = options.pop("losses", {"ce": 1.0})
    options = {"learning_rate": 0.1, "max_steps": 2, "eval_strategy": "steps", "eval_steps": 2} | options
    return DistillationTrainer(
        llama(0) if student is None else student,
        arguments(folder, losses=losses, **options),
        collate,
        examples_for("causal-lm"),
        examples_for("causal-lm", 6, seed=4),
        peft_config=peft_config,
    )


def initialized(folder: Path, **changes: Any) -> Any:
    return from_teacher(llama(1, blocks=3, **changes), num_hidden_layers=2, show_progress=False)


def trained(folder: Path, student: Any = None, **options: Any) -> DistillationTrainer:
    trainer = trainer_of(folder, student, **options)
    trainer.train()
    return trainer


def saved(folder: Path, student: Any = None, *, card: bool = True, **options: Any) -> DistillationTrainer:
    trainer = trained(folder, student, **options)
    trainer.save_model()
    if card:
        trainer.create_model_card()
    return trainer


def card_first(folder: Path) -> Path:
    """Write the record into a folder that has the weights of a former run."""
    llama(5).save_pretrained(folder)
    trainer = trained(folder)
    trainer.create_model_card()
    trainer.save_model()
    return folder


def saved_by_the_student(folder: Path) -> Path:
    trainer = trained(folder)
    trainer.unwrapped_student.save_pretrained(folder)
    trainer.create_model_card()
    return folder


def saved_again(folder: Path, change: Callable[[Any], Any], **options: Any) -> Path:
    student = saved(folder / "run", initialized(folder)).unwrapped_student
    change(student).save_pretrained(folder / "again", **options)
    return folder / "again"


def sharded(folder: Path) -> Path:
    written = saved_again(folder, lambda student: student, max_shard_size="8KB")
    assert (written / "model.safetensors.index.json").is_file()
    return written


def evaluated_between(folder: Path) -> Path:
    trainer = saved(folder, card=False)
    trainer.evaluate()
    trainer.create_model_card()
    return folder


def as_sharded_processes_save(folder: Path) -> Path:
    trainer = trained(folder)
    trainer._save(str(folder), state_dict=trainer.model.state_dict())
    return folder


def trained_twice(folder: Path) -> Path:
    trainer = saved(folder)
    trainer.train()
    trainer.save_model()
    assert [each.steps for each in load_record(folder).trainings] == [2, 2]
    return folder


def resumed(folder: Path) -> Path:
    saved(folder, save_strategy="steps", save_steps=2)
    trainer = trainer_of(folder, max_steps=4)
    trainer.train(resume_from_checkpoint=True)
    trainer.create_model_card()
    trainer.save_model()
    return folder


def second_stage(folder: Path) -> Path:
    saved(folder / "first", initialized(folder))
    student = from_teacher(folder / "first", num_hidden_layers=1, show_progress=False)
    saved(folder / "second", student)
    return folder / "second"


def trained_further(folder: Path) -> Path:
    saved(folder)
    saved(folder, AutoModelForCausalLM.from_pretrained(folder))
    return folder


def merged(folder: Path) -> Path:
    trainer = saved(folder / "run", initialized(folder), peft_config=LoraConfig(target_modules=["q_proj"]))
    trainer.save_merged_model(folder / "merged")
    return folder / "merged"


def merged_alone(folder: Path) -> Path:
    trainer = trained(folder / "run", initialized(folder), peft_config=LoraConfig(target_modules=["q_proj"]))
    trainer.save_merged_model(folder / "merged")
    return folder / "merged"


def exported(folder: Path, export_format: str, *, by: str) -> Path:
    examples = examples_for(TEXT, 40)
    data = with_targets(examples, some_targets(40))
    student = from_teacher(teacher_of(TEXT), num_subclasses=SUBCLASSES, show_progress=False)
    options: dict[str, Any] = {"losses": "lelp", "max_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    trainer = DistillationTrainer(student, arguments(folder / "run", **options), collate, data, data)
    trainer.train()
    trainer.save_model()
    source: Any = trainer if by == "trainer" else student
    if by == "folder":
        source = type(student).from_pretrained(folder / "run")
    more: dict[str, Any] = {"dataset": examples, "data_collator": collate} if export_format == "refit_head" else {}
    save_subclass_student(source, folder / "export", export_format, show_progress=False, **more)
    assert (folder / "export" / "initialization_report.json").is_file()
    return folder / "export"


def with_options(**options: Any) -> Callable[[Path], Path]:
    def save(folder: Path) -> Path:
        saved(folder, **options)
        return folder

    return save


BEST = {
    "load_best_model_at_end": True,
    "save_strategy": "steps",
    "save_steps": 2,
    "learning_rate": 10.0,
    "max_steps": 4,
}
LORA = {"peft_config": LoraConfig(target_modules=["q_proj"])}
PATHS: dict[str, Callable[[Path], Path]] = {
    "save_model, card": with_options(),
    "save_model": with_options(card=False),
    "an initialized student": lambda folder: with_options(student=initialized(folder))(folder),
    "tied embeddings": lambda folder: with_options(student=initialized(folder, tie_word_embeddings=True))(folder),
    "the best of a run": with_options(**BEST),
    "an adapter": with_options(**LORA),
    "an adapter without a card": with_options(card=False, **LORA),
    "a card before the weights": card_first,
    "save_pretrained, card": saved_by_the_student,
    "evaluated between": evaluated_between,
    "a gathered state dict": as_sharded_processes_save,
    "save_pretrained again": lambda folder: saved_again(folder, lambda student: student),
    "cast to bfloat16": lambda folder: saved_again(folder, lambda student: student.bfloat16()),
    "cast to float16": lambda folder: saved_again(folder, lambda student: student.half()),
    "several files": sharded,
    "trained twice": trained_twice,
    "resumed": resumed,
    "a second stage": second_stage,
    "trained further": trained_further,
    "merged": merged,
    "merged alone": merged_alone,
} | {
    f"exported as {each} by {by}": lambda folder, each=each, by=by: exported(folder, each, by=by)
    for each in ("remote_code", "subclass_head", "refit_head")
    for by in ("trainer", "student", "folder")
}


def change_weights(folder: Path) -> None:
    """Change the weights as training by something else does."""
    for path in folder.glob("*.safetensors"):
        tensors = {name: value * 1.5 + 0.5 for name, value in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT's own call
@pytest.mark.parametrize("path", PATHS)
def test_every_folder_with_a_record_has_the_fingerprint_of_its_weights(
    path: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = PATHS[path](tmp_path / "run")
    record = load_record(folder)
    assert record.weights is not None and record.weights == saved_weights_fingerprint(folder)
    assert record.metrics and record.losses and record.steps
    caplog.clear()
    redraw_card(folder, datasets="someone/text")
    card = ModelCard.load(folder / "README.md")
    assert CHANGED not in card.text and "## Training" in card.text and "| metric |" in card.text
    assert OTHER_WEIGHTS not in caplog.text

    change_weights(folder)
    redraw_card(folder)
    card = ModelCard.load(folder / "README.md")
    assert CHANGED in card.text and "## Training" in card.text, "how it was made stays"
    assert "| metric |" not in card.text and card.data.get("model-index") is None
    assert caplog.text.count(OTHER_WEIGHTS) == 1
    again = redraw_card(folder).read_text()
    assert CHANGED in again and "| metric |" not in again and caplog.text.count(OTHER_WEIGHTS) == 1


def stock_trainer(student: Any, folder: Path) -> Trainer:
    args = TrainingArguments(str(folder), max_steps=1, learning_rate=1.0, use_cpu=True, report_to="none")
    return Trainer(student, args, data_collator=collate, train_dataset=examples_for("causal-lm"))


@pytest.mark.parametrize("initialized_by_us", [True, False])
@pytest.mark.parametrize("way", ["loaded", "in memory"])
@pytest.mark.parametrize("card", [True, False])
def test_a_stock_training_over_a_student_is_no_training_of_its_record(
    card: bool, way: str, initialized_by_us: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "o1"
    trainer = saved(folder, initialized(folder) if initialized_by_us else llama(0), card=card)
    distilled = load_record(folder)
    student = trainer.unwrapped_student if way == "in memory" else AutoModelForCausalLM.from_pretrained(folder)
    stock = stock_trainer(student, folder)
    stock.train()
    stock.save_model(str(folder))
    assert load_record(folder).weights == distilled.weights != saved_weights_fingerprint(folder)
    text = redraw_card(folder).read_text()
    assert CHANGED in text and "Length: 2 steps" in text and f"{distilled.metrics['eval_loss']:.4g}" not in text
    assert "No evaluation of the present weights was recorded" in text and caplog.text.count(OTHER_WEIGHTS) == 1


def test_a_record_without_a_fingerprint_is_read_as_before(tmp_path: Path) -> None:
    trainer = saved(tmp_path)
    record = load_record(tmp_path)
    record.weights = None
    save_record(tmp_path, record)
    change_weights(tmp_path)
    text = redraw_card(tmp_path).read_text()
    assert CHANGED not in text and "| metric |" in text
    assert not is_saved_in(trainer.model, tmp_path)


def test_a_save_model_before_any_training_writes_no_record(tmp_path: Path) -> None:
    trainer_of(tmp_path).save_model()
    assert not (tmp_path / "distillation.json").exists()


def test_a_checkpoint_that_deepspeed_could_not_gather_has_no_fingerprint(tmp_path: Path) -> None:
    trainer = trained(tmp_path)
    trainer._save(str(tmp_path), state_dict={})
    assert load_record(tmp_path).weights is None


def test_weights_that_are_saved_during_a_training_are_not_those_at_its_end(tmp_path: Path) -> None:
    class SavingTrainer(DistillationTrainer):
        def evaluate(self, *args: Any, **options: Any) -> dict[str, float]:
            metrics = super().evaluate(*args, **options)
            if self.state.global_step == 2:
                self.save_model(str(tmp_path / "middle"))
            return metrics

    trainer = SavingTrainer(
        llama(0),
        arguments(tmp_path / "run", losses={"ce": 1.0}, max_steps=4, eval_strategy="steps", eval_steps=2),
        collate,
        examples_for("causal-lm"),
        examples_for("causal-lm", 6, seed=4),
    )
    trainer.train()
    trainer.create_model_card()
    assert load_record(tmp_path / "middle").weights == saved_weights_fingerprint(tmp_path / "middle")
    assert load_record(tmp_path / "run").weights is None
    trainer.save_model()
    assert load_record(tmp_path / "run").weights not in (None, load_record(tmp_path / "middle").weights)


def test_a_student_is_compared_with_a_folder_by_all_its_tensors(tmp_path: Path) -> None:
    student = llama(0)
    student.save_pretrained(tmp_path)
    assert is_saved_in(student, tmp_path) and is_saved_in(student.bfloat16(), tmp_path)
    assert not is_saved_in(llama(1), tmp_path) and not is_saved_in(student.model, tmp_path)
    with torch.no_grad():
        student.model.norm.weight[0] += 1
    assert not is_saved_in(student, tmp_path)
    assert not is_saved_in(student, tmp_path / "none")
