"""TRL's `SFTTrainer` with `DistillationMixin`: its data, its options and its metrics, and the teacher."""

import gc
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import HfArgumentParser, PreTrainedTokenizerBase

from hf_guide import DistillationArguments, DistillationMixin, DistillationTrainer, OptionError
from tests.distillation.small import llama
from tests.distillation.test_trainer_orders import section_code
from tests.trust.artefacts import make_tokenizer

trl = pytest.importorskip(
    "trl", reason="trl is optional: it pins other packages, so that it is no test dependency; install it to run these."
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),  # peft's own call
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing.*` is deprecated:FutureWarning"),  # TRL's own defaults
]

TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}w1 {% generation %}{{ message['content'] }} "
    "<eos>{% endgeneration %}{% else %}w2 {{ message['content'] }} {% endif %}{% endfor %}"
)
WORDS = ["w3 w4 w5 w6", "w7 w8", "w9 w10 w11 w12 w13", "w14 w15 w16"]
TEXTS = [{"text": text} for text in WORDS * 2]
PROMPTS = [
    {"prompt": text, "completion": f" {other}"} for text, other in zip(WORDS, WORDS[1:] + WORDS[:1], strict=True)
]
CHATS = [
    {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": other}]}
    for text, other in zip(WORDS, WORDS[1:] + WORDS[:1], strict=True)
]


@dataclass
class Arguments(DistillationArguments, trl.SFTConfig):  # type: ignore[misc,name-defined]
    """The natural order."""


@dataclass
class OtherArguments(trl.SFTConfig, DistillationArguments):  # type: ignore[misc,name-defined]
    """The other."""


class Mixed(DistillationMixin, trl.SFTTrainer):  # type: ignore[misc,name-defined]
    """The mixin in front."""


class Theirs(trl.SFTTrainer, DistillationTrainer):  # type: ignore[misc,name-defined]
    """TRL's trainer in front."""


@pytest.fixture(scope="module", autouse=True)
def _fast_collection() -> Iterator[None]:
    datasets.disable_progress_bars()
    gc.freeze()
    yield
    gc.unfreeze()
    datasets.enable_progress_bars()


def tokenizer() -> PreTrainedTokenizerBase:
    made = make_tokenizer()
    made.chat_template = TEMPLATE
    return made


def options(folder: Path, kind: Any = Arguments, **changes: Any) -> Any:
    plain = {
        "output_dir": str(folder),
        "max_steps": 1,
        "per_device_train_batch_size": 8,
        "learning_rate": 1.0,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
    }
    if issubclass(kind, DistillationArguments):
        plain["losses"] = {"ce": 0.5, "kd": 0.5}
    return kind(**(plain | changes))


def student(seed: int = 1) -> Any:
    return llama(seed, blocks=1, vocab_size=96)


def trainer_of(kind: Any, args: Any, rows: list[dict[str, Any]], model: Any = None, **more: Any) -> Any:
    data = datasets.Dataset.from_list(rows)
    model = student() if model is None else model
    return kind(model, args, train_dataset=data, eval_dataset=data, processing_class=tokenizer(), **more)


def gradient(trainer: Any) -> torch.Tensor:
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    return torch.cat([(before[name] - value).flatten() for name, value in trainer.model.state_dict().items()])


def reference(trainer: Any, weights: dict[str, float]) -> tuple[float, torch.Tensor]:
    """Return the objective of a trainer's data and its gradient, from all logits."""
    model, teacher = student(), student(2)
    batch = next(iter(trainer.get_train_dataloader()))
    batch["use_cache"] = False  # with a cache, a packed batch would be one text
    labels = batch.pop("labels")[:, 1:]
    logits, targets = (each(**batch).logits[:, :-1][labels != -100] for each in (model, teacher))
    ce = torch.nn.functional.cross_entropy(logits, labels[labels != -100])
    kd = torch.nn.functional.kl_div(
        logits.log_softmax(-1), targets.detach().log_softmax(-1), log_target=True, reduction="none"
    )
    loss = weights.get("ce", 0.0) * ce + weights.get("kd", 0.0) * kd.sum(-1).mean()
    loss.backward()
    return loss.item(), torch.cat([model.get_parameter(name).grad.flatten() for name, _ in model.named_parameters()])


CASES = {
    "plain": (TEXTS, {}),
    "packing": (TEXTS, {"packing": True, "max_length": 12}),
    "packing, wrapped": (TEXTS, {"packing": True, "packing_strategy": "wrapped", "max_length": 12}),
    "padding_free": (TEXTS, {"padding_free": True, "max_length": None}),
    "completion_only_loss": (PROMPTS, {"completion_only_loss": True}),
    "assistant_only_loss": (CHATS, {"assistant_only_loss": True}),
}


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_the_whole_logits(name: str, tmp_path: Path) -> None:
    rows, changes = CASES[name]
    trainer = trainer_of(Mixed, options(tmp_path, **changes), rows, teacher=student(2))
    assert trainer.distillation_objective.head is not None
    loss, expected = reference(trainer, trainer.args.loss_weights)
    found = gradient(trainer)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss, rel=1e-4)
    assert (found - expected).norm() < 1e-4 * expected.norm()


def test_packing_keeps_the_boundaries_of_texts(tmp_path: Path) -> None:
    logs = []
    for changes in ({}, {"packing": True, "max_length": 12, "per_device_train_batch_size": 1}):
        args = options(tmp_path, eval_packing=bool(changes), **changes)
        logs.append(trainer_of(Mixed, args, TEXTS, teacher=student(2)).evaluate())
    for name in ("ce", "kd", "teacher_agreement", "mean_token_accuracy"):
        assert logs[1][f"eval_{name}"] == pytest.approx(logs[0][f"eval_{name}"], rel=1e-4), name


@pytest.mark.parametrize("name", ["plain", "packing", "assistant_only_loss"])
def test_the_task_loss_and_metrics_are_those_of_sft_trainer(name: str, tmp_path: Path) -> None:
    rows, changes = CASES[name]
    trainer = trainer_of(Mixed, options(tmp_path, losses="ce", **changes), rows, teacher=student(2))
    sft = trainer_of(trl.SFTTrainer, options(tmp_path, trl.SFTConfig, **changes), rows)
    metrics, expected_metrics = trainer.evaluate(), sft.evaluate()
    for key in ("eval_loss", "eval_mean_token_accuracy", "eval_entropy"):
        assert metrics[key] == pytest.approx(expected_metrics[key], rel=1e-4), key
    found, expected = gradient(trainer), gradient(sft)
    assert (found - expected).norm() < 1e-4 * expected.norm()
    logs = [each.state.log_history[0] for each in (trainer, sft)]
    for key in ("loss", "mean_token_accuracy", "entropy"):
        assert logs[0][key] == pytest.approx(logs[1][key], rel=1e-4), key


def test_sft_trainer_in_front_trains_with_the_teacher(tmp_path: Path) -> None:
    trainer = trainer_of(Theirs, options(tmp_path, OtherArguments), TEXTS, teacher=student(2))
    _, expected = reference(trainer, trainer.args.loss_weights)
    found = gradient(trainer)
    assert (found - expected).norm() < 1e-4 * expected.norm() and trainer.evaluate()["eval_kd"] > 0


def test_all_logits_reach_compute_metrics(tmp_path: Path) -> None:
    def accuracy(prediction: Any) -> dict[str, float]:
        labels = prediction.label_ids[:, 1:]
        hits = prediction.predictions[:, :-1].argmax(-1) == labels
        return {"accuracy": float(hits[labels != -100].mean())}

    trainer = trainer_of(Mixed, options(tmp_path), TEXTS, teacher=student(2), compute_metrics=accuracy)
    metrics = trainer.evaluate()
    assert metrics["eval_accuracy"] == pytest.approx(metrics["eval_mean_token_accuracy"]) and metrics["eval_kd"] > 0


def test_an_adapter_is_trained_saved_and_merged(tmp_path: Path) -> None:
    from peft import LoraConfig

    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="gaussian")
    args = options(tmp_path / "run", max_steps=2, save_strategy="steps", save_steps=1)
    trainer = trainer_of(Mixed, args, TEXTS, teacher=student(2), peft_config=config, formatting_func=None)
    trainer.train()
    trainer.save_model()
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file() and trainer.state.log_history[1]["kd"] > 0
    trainer.create_model_card(dataset_name="some/data")
    assert (tmp_path / "run" / "README.md").read_text().count("teacher") > 0
    trainer.save_merged_model(tmp_path / "merged")
    assert (tmp_path / "merged" / "model.safetensors").is_file()


class Doubled(trl.SFTTrainer):  # type: ignore[misc,name-defined]
    """A user's own, which builds on TRL's loss."""

    def compute_loss(self, *args: Any, **keywords: Any) -> Any:
        return 2 * super().compute_loss(*args, **keywords)


def test_a_users_sft_trainer_builds_on_all_losses_in_front(tmp_path: Path) -> None:
    behind = type("T", (DistillationMixin, Doubled), {})
    with pytest.raises(OptionError, match=r"Doubled.compute_loss builds on .*class T\(Doubled, DistillationMixin\)"):
        trainer_of(behind, options(tmp_path), TEXTS, teacher=student(2))
    front = trainer_of(type("T", (Doubled, DistillationMixin), {}), options(tmp_path), TEXTS, teacher=student(2))
    plain = trainer_of(Mixed, options(tmp_path), TEXTS, teacher=student(2))
    assert (gradient(front) - 2 * gradient(plain)).norm() < 1e-3


def test_what_cannot_be_distilled_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="loss_type='dft' without logits.*Use loss_type='nll'"):
        trainer_of(Mixed, options(tmp_path, loss_type="dft"), TEXTS, teacher=student(2))
    plain = DistillationArguments(str(tmp_path), use_cpu=True)
    with pytest.raises(OptionError, match="must be SFTConfig too; found DistillationArguments.*class Arguments"):
        trainer_of(Mixed, plain, TEXTS, teacher=student(2))

    class Preferences(DistillationMixin, trl.DPOTrainer):  # type: ignore[misc,name-defined]
        pass

    with pytest.raises(OptionError, match="DPOTrainer of TRL.*only SFTTrainer"):
        Preferences(student(), plain, teacher=student(2))
    with pytest.raises(
        TypeError, match="unexpected keyword argument 'formating_func'. Did you mean 'formatting_func'"
    ):
        trainer_of(Mixed, options(tmp_path), TEXTS, teacher=student(2), formating_func=None)


@pytest.mark.parametrize("kind", [Arguments, OtherArguments])
def test_arguments_have_the_defaults_of_sft_config(kind: Any, tmp_path: Path) -> None:
    mine, theirs = kind(str(tmp_path), use_cpu=True), trl.SFTConfig(str(tmp_path), use_cpu=True)
    named = {name: value for name, value in vars(theirs).items() if name != "distributed_state"}
    assert {name: getattr(mine, name) for name in named} == named
    assert mine.learning_rate == 2e-5 and mine.gradient_checkpointing and mine.bf16
    flags = ["--output_dir", str(tmp_path), "--losses", '{"kd": 1}', "--packing", "--use_cpu", "--logging_steps", "3"]
    (parsed,) = HfArgumentParser(kind).parse_args_into_dataclasses(flags)
    assert parsed.packing and parsed.loss_weights == {"kd": 1.0} and parsed.logging_steps == 3
    assert parsed.learning_rate == 2e-5


@pytest.mark.parametrize("number", [0, 1])
def test_the_recipes_of_the_guide_train_with_the_teacher(number: int, tmp_path: Path) -> None:
    """TRL's trainer with the mixin, and TRL for the data alone."""
    recipe = section_code("### TRL's SFTTrainer")[number]
    recipe = recipe.replace('"out", ', f'"{tmp_path}", max_steps=1, logging_steps=1, use_cpu=True, report_to="none", ')
    recipe = recipe.replace("assistant_only_loss=True", "assistant_only_loss=True, bf16=False")
    names = {
        "student": student(),
        "teacher": student(2),
        "tokenizer": tokenizer(),
        "chats": datasets.Dataset.from_list(CHATS),
    }
    # As a module of its own: dataclasses look up their module.
    names["__name__"] = __name__
    exec(recipe, names)
    mixed = trainer_of(Mixed, options(tmp_path, assistant_only_loss=True), CHATS, teacher=student(2))
    mixed.train()
    kd = names["trainer"].state.log_history[0]["kd"]
    assert kd == pytest.approx(mixed.state.log_history[0]["kd"], rel=1e-4)
