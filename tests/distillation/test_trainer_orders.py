"""Whatever a user derives from the distillation and another trainer, in whatever order, the teacher is used, or an error."""

import gc
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Seq2SeqTrainer, Trainer
from transformers.trainer_utils import EvalLoopOutput

from hf_guide import DistillationArguments, DistillationMixin, DistillationTrainer, OptionError
from tests.distillation.small import CLASSES, collate, examples_for, llama, model_for
from tests.distillation.task_cases import CASES
from tests.distillation.test_trainer import arguments, step_of

TASK = "sequence-classification"
LOSSES = {"ce": 1e-6, "kd": 1.0}  # the gradient is the teacher's, whatever the task loss is
CLASS_WEIGHTS = torch.arange(1.0, CLASSES + 1)


# What users write in their own trainers


def weighted_loss(
    self: Any, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
) -> Any:
    labels = inputs.pop("labels")
    outputs = model(**inputs)
    loss = torch.nn.functional.cross_entropy(outputs.logits, labels, CLASS_WEIGHTS)
    return (loss, outputs) if return_outputs else loss


def own_step(self: Any, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
    model.train()
    loss = model(**self._prepare_inputs(inputs)).loss
    self.accelerator.backward(loss)
    return loss.detach()


def own_count(self: Any, batch_samples: Any, device: Any) -> torch.Tensor:
    return torch.tensor(3)


@torch.no_grad()
def own_prediction(self: Any, model: Any, inputs: Any, loss_only: bool, ignore_keys: Any = None) -> Any:
    outputs = model(**self._prepare_inputs(inputs))
    return outputs.loss, outputs.logits, inputs["labels"]


@torch.no_grad()
def own_loop(self: Any, dataloader: Any, *_: Any, metric_key_prefix: str = "eval", **__: Any) -> EvalLoopOutput:
    losses = [self.model(**batch).loss.item() for batch in dataloader]
    return EvalLoopOutput(None, None, {f"{metric_key_prefix}_loss": sum(losses) / len(losses)}, 6)


OWN: dict[str, Callable[..., Any]] = {
    "compute_loss": weighted_loss,
    "training_step": own_step,
    "_get_num_items_in_batch": own_count,
    "prediction_step": own_prediction,
    "evaluation_loop": own_loop,
}
STYLES = ("calls super", "own", "skips super", "drops super's result")
ORDERS = ("derived", "in front", "behind")

# Which of them train with the teacher and evaluate it; all others are an error.
WORKS = {
    *((method, "calls super", order) for method in OWN for order in ORDERS),
    *(("compute_loss", style, "behind") for style in STYLES),
    ("compute_loss", "own", "in front"),  # comes after ours: its loss is the task loss
    *(("prediction_step", style, "behind") for style in STYLES),
    ("prediction_step", "own", "in front"),
    ("prediction_step", "drops super's result", "derived"),
    ("prediction_step", "drops super's result", "in front"),
    ("training_step", "drops super's result", "derived"),  # takes two steps
    ("training_step", "drops super's result", "in front"),
    ("training_step", "drops super's result", "behind"),
    ("evaluation_loop", "drops super's result", "behind"),
} - {("_get_num_items_in_batch", "calls super", "behind")}


def override(base: type, method: str, style: str) -> type:
    """Return a class of `base` that overrides a method."""

    class Mine(base):  # type: ignore[misc]
        pass

    def calls_super(self: Any, *args: Any, **keywords: Any) -> Any:
        return getattr(super(Mine, self), method)(*args, **keywords)

    def skips_super(self: Any, *args: Any, **keywords: Any) -> Any:
        if self is None:
            return getattr(super(Mine, self), method)(*args, **keywords)
        return OWN[method](self, *args, **keywords)

    def drops_result(self: Any, *args: Any, **keywords: Any) -> Any:
        getattr(super(Mine, self), method)(*args, **keywords)
        return OWN[method](self, *args, **keywords)

    bodies = dict(zip(STYLES, (calls_super, OWN[method], skips_super, drops_result), strict=True))
    setattr(Mine, method, bodies[style])
    return Mine


def trainer_class(method: str, style: str, order: str) -> type:
    if order == "derived":
        return override(DistillationTrainer, method, style)
    other = override(Trainer, method, style)
    return type("T", (other, DistillationTrainer) if order == "in front" else (DistillationMixin, other), {})


def section_code(heading: str) -> list[str]:
    """Return the Python code of a section of the guide."""
    guide = (Path(__file__).parents[2] / "examples" / "README.md").read_text(encoding="utf-8")
    section = guide.split(f"\n{heading}\n")[1].split("\n## ")[0].split("\n### ")[0]
    return re.findall(r"```python\n(.*?)```", section, re.DOTALL)


@pytest.fixture(scope="module", autouse=True)
def _fast_collection() -> Iterator[None]:
    """Leave what was imported out of the garbage collection that Accelerate does in every training: it takes the most time."""
    gc.freeze()
    yield
    gc.unfreeze()


@dataclass
class Run:
    log: dict[str, float]
    metrics: dict[str, float]
    gradient: torch.Tensor


def run(kind: type, folder: Path, teacher: int, *, evaluates: bool = True, **changes: Any) -> Run:
    student = model_for(TASK, 1, blocks=1)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    trainer: Any = kind(
        student,
        arguments(folder, **({"losses": LOSSES} | changes)),
        collate,
        examples_for(TASK),
        examples_for(TASK, 6, seed=7),
        teacher=model_for(TASK, teacher, blocks=1),
    )
    metrics = trainer.evaluate() if evaluates else {}
    trainer.train()
    log = next(entry for entry in trainer.state.log_history if "grad_norm" in entry)
    return Run(log, metrics, step_of(student, before))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    """Return runs of `DistillationTrainer` itself with two teachers."""
    folder = tmp_path_factory.mktemp("plain")
    return [run(DistillationTrainer, folder, teacher) for teacher in (2, 3)]


@pytest.mark.sampled(30)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("method", OWN)
def test_the_teacher_has_its_share_or_an_error_gives_the_reason(
    method: str, style: str, order: str, plain: list[Run], tmp_path: Path
) -> None:
    kind = trainer_class(method, style, order)
    if (method, style, order) not in WORKS:
        with pytest.raises(OptionError, match=rf"{method}|num_items_in_batch"):
            run(kind, tmp_path, 2)
        return
    mine = run(kind, tmp_path, 2)
    assert mine.log["kd"] == pytest.approx(plain[0].log["kd"], rel=1e-4)
    assert mine.metrics["eval_kd"] == pytest.approx(plain[0].metrics["eval_kd"], rel=1e-4)
    assert "eval_teacher_agreement" in mine.metrics and "eval_ce" in mine.metrics
    share, expected = mine.gradient, plain[0].gradient
    if method == "training_step":  # it may train on more than our loss: what differs with the teacher is the teacher's
        share = share - run(kind, tmp_path, 3, evaluates=False).gradient
        expected = expected - plain[1].gradient
    assert (share - expected).norm() < 1e-4 * expected.norm()


# The task loss of another trainer


class WeightedTrainer(Trainer):
    compute_loss = weighted_loss


class WeightedDistillation(DistillationMixin, WeightedTrainer):
    """Distils with class weights in the task loss."""


def test_the_next_trainers_loss_is_the_task_loss(tmp_path: Path) -> None:
    student, teacher = (model_for(TASK, seed, blocks=1).eval() for seed in (1, 2))
    batch = collate(examples_for(TASK, 8))
    labels = batch.pop("labels")
    logits = student(**batch).logits.double()
    targets = teacher(**batch).logits.detach().double()
    ce = torch.nn.functional.cross_entropy(logits, labels, CLASS_WEIGHTS.double())
    kd = (
        torch.nn.functional.kl_div(logits.log_softmax(-1), targets.log_softmax(-1), log_target=True, reduction="sum")
        / 8
    )
    (0.25 * ce + 0.75 * kd).backward()
    expected = torch.cat([each.grad.flatten() for each in student.parameters()])
    names = [name for name, _ in student.named_parameters()]
    trained = model_for(TASK, 1, blocks=1)
    before = {name: trained.state_dict()[name].clone() for name in names}
    args = arguments(tmp_path, losses={"ce": 0.25, "kd": 0.75})
    data = examples_for(TASK, 8)
    trainer = WeightedDistillation(trained, args, collate, data, data, teacher=model_for(TASK, 2, blocks=1))
    assert trainer.evaluate()["eval_ce"] == pytest.approx(ce.item(), rel=1e-5)
    trainer.train()
    log = trainer.state.log_history[0]
    assert (log["ce"], log["kd"]) == pytest.approx((ce.item(), kd.item()), rel=1e-5)
    found = torch.cat([(before[name] - trained.state_dict()[name]).flatten() for name in names])
    assert (found - expected).norm() < 1e-4 * expected.norm()


class DoubledTrainer(Trainer):
    def compute_loss(self, *args: Any, **keywords: Any) -> Any:
        loss, outputs = super().compute_loss(*args, **(keywords | {"return_outputs": True}))
        return (2 * loss, outputs) if keywords.get("return_outputs") else 2 * loss


class DoubledDistillation(DistillationMixin, DoubledTrainer):
    """Distils with twice the model's own loss."""


@pytest.mark.parametrize("bases", [(DistillationMixin, DoubledTrainer), (DoubledTrainer, DistillationMixin)])
def test_a_language_models_own_loss_is_not_bypassed_by_the_chunked_one(bases: Any, tmp_path: Path) -> None:
    logs = []
    for kind in (DistillationTrainer, type("T", bases, {})):
        args = arguments(tmp_path, losses={"ce": 0.5, "kd": 0.5})
        data = examples_for("causal-lm")
        trainer = kind(llama(1, blocks=1), args, collate, data, data[:4], teacher=llama(2, blocks=1))
        metrics = trainer.evaluate()
        trainer.train()
        logs.append((metrics, trainer.state.log_history[0]))
    (metrics, log), (mine, my_log) = logs
    behind = bases[0] is DistillationMixin
    assert my_log["kd"] == pytest.approx(log["kd"], rel=1e-5)
    assert my_log["ce"] == pytest.approx((2 if behind else 1) * log["ce"], rel=1e-5)
    expected = 0.5 * log["kd"] + log["ce"] if behind else 2 * log["loss"]
    assert my_log["loss"] == pytest.approx(expected, rel=1e-5)
    assert mine["eval_ce"] == pytest.approx((2 if behind else 1) * metrics["eval_ce"], rel=1e-5)
    # A loss that is no cross-entropy has no perplexity.
    assert ("eval_perplexity" in mine) != behind and mine["eval_teacher_perplexity"] == metrics[
        "eval_teacher_perplexity"
    ]


@pytest.mark.sampled(6)
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.has_own_loss])
def test_another_trainers_loss_is_the_task_loss_of_every_task(name: str, tmp_path: Path) -> None:
    case, logs, metrics = CASES[name], [], []
    for kind in (DistillationTrainer, type("T", (DoubledTrainer, DistillationTrainer), {}), DoubledDistillation):
        args = arguments(tmp_path, losses={"ce": 0.5, case.losses[0]: 0.5}, remove_unused_columns=False)
        data = case.examples(4)
        trainer = kind(case.build(1, 16), args, case.collate, data, data, teacher=case.build(2, 16))
        metrics.append(trainer.evaluate())
        trainer.train()
        logs.append(trainer.state.log_history[0])
    for loss, values in (("ce", (1, 1, 2)), (case.losses[0], (1, 1, 1))):
        for log, evaluated, factor in zip(logs, metrics, values, strict=True):
            assert log[loss] == pytest.approx(factor * logs[0][loss], rel=1e-4), loss
            assert evaluated[f"eval_{loss}"] == pytest.approx(factor * metrics[0][f"eval_{loss}"], rel=1e-4), loss
    assert logs[1]["loss"] == pytest.approx(2 * logs[0]["loss"], rel=1e-4)


def mean_loss(self: Any, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
    outputs = model(**inputs)
    loss = torch.nn.functional.cross_entropy(outputs.logits, inputs["labels"])
    return (loss, outputs) if return_outputs else loss


def scaled_loss(
    self: Any, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
) -> Any:
    outputs = model(**inputs)
    loss = torch.nn.functional.cross_entropy(outputs.logits, inputs["labels"], reduction="sum")
    loss = loss / (len(inputs["labels"]) if num_items_in_batch is None else num_items_in_batch)
    return (loss, outputs) if return_outputs else loss


@pytest.mark.parametrize("loss", [mean_loss, scaled_loss])
def test_accumulation_leaves_the_gradient_of_a_users_loss_as_it_is(loss: Any, tmp_path: Path) -> None:
    kind = type("T", (DistillationMixin, type("Other", (Trainer,), {"compute_loss": loss})), {})
    changes = {"losses": {"ce": 0.5, "kd": 0.5}, "evaluates": False}
    at_once = run(kind, tmp_path, 2, **changes)
    one_by_one = run(kind, tmp_path, 2, per_device_train_batch_size=1, gradient_accumulation_steps=8, **changes)
    plain = run(DistillationTrainer, tmp_path, 2, **changes)
    for each in (at_once, one_by_one):
        assert (each.gradient - plain.gradient).norm() < 1e-5 * plain.gradient.norm()


def returns_no_outputs(self: Any, model: Any, inputs: Any, **_: Any) -> Any:
    return model(**inputs).loss


def returns_logits(self: Any, model: Any, inputs: Any, **_: Any) -> Any:
    outputs = model(**inputs)
    return outputs.loss, outputs.logits


def runs_again_without_gradient(self: Any, model: Any, inputs: Any, **_: Any) -> Any:
    with torch.no_grad():
        return model(**inputs).loss.clone().requires_grad_(), model(**inputs)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (returns_no_outputs, r"must return \(loss, outputs\).*found Tensor"),
        (returns_logits, r"must return \(loss, outputs\).*found \['Tensor', 'Tensor'\]"),
        (runs_again_without_gradient, "without gradient"),
    ],
)
def test_a_users_loss_without_usable_outputs_is_an_error(loss: Any, message: str, tmp_path: Path) -> None:
    kind = type("T", (DistillationMixin, type("Other", (Trainer,), {"compute_loss": loss})), {})
    with pytest.raises(OptionError, match=message):
        run(kind, tmp_path, 2, evaluates=False)


def own_training(self: Any, *_: Any, **__: Any) -> None:
    for batch in self.get_train_dataloader():
        self.model(**batch).loss.backward()


@pytest.mark.parametrize("method", ["train", "_inner_training_loop"])
def test_a_training_of_ones_own_is_an_error(method: str, tmp_path: Path) -> None:
    other = type("Other", (Trainer,), {method: own_training})
    derived = type("T", (DistillationTrainer,), {method: own_training})
    for kind in (derived, type("T", (other, DistillationTrainer), {}), type("T", (DistillationMixin, other), {})):
        with pytest.raises(OptionError, match=f"T takes {method} from (Other|T), which .*trained without its teacher"):
            run(kind, tmp_path, 2)


def test_a_loss_that_is_ours_in_evaluation_alone_is_an_error(tmp_path: Path) -> None:
    class Mine(DistillationTrainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **keywords: Any) -> Any:
            if not model.training:
                return super().compute_loss(model, inputs, *args, **keywords)
            return model(**inputs).loss

    with pytest.raises(OptionError, match="Mine takes compute_loss from Mine, which did not call"):
        run(Mine, tmp_path, 2, eval_strategy="steps", eval_steps=1, eval_on_start=True)


# The order of bases


def test_trainers_that_follow_each_other_in_front_do_so_behind() -> None:
    base = type("Base", (Trainer,), {"compute_loss": DoubledTrainer.compute_loss})
    own = type("Own", (base,), {"compute_loss": weighted_loss})
    mine = type("Mine", (DistillationTrainer,), {})
    for bases in ((own, DistillationTrainer), (own, mine), (own, DistillationTrainer, Seq2SeqTrainer)):
        names = [each.__name__ for each in type("T", bases, {}).__mro__]
        assert names.index("DistillationMixin") < names.index("Own") < names.index("Base") < names.index("Trainer")
        derived = type("U", (type("T", bases, {}), Trainer), {})
        assert [each.__name__ for each in derived.__mro__[2:]] == names[1:]
    for base in (Trainer, DistillationMixin):
        with pytest.raises(
            OptionError, match=rf"T has {base.__name__} in front of .*Write class T\(DistillationTrainer\)"
        ):
            type("T", (base, DistillationTrainer), {})
    kept = type("T", (DoubledTrainer, DistillationTrainer), {})
    assert kept.__mro__[1] is DoubledTrainer


def test_a_keyword_that_no_class_takes_is_an_error(tmp_path: Path) -> None:
    student = model_for(TASK, 1, blocks=1)
    for kind in (DistillationTrainer, WeightedDistillation):
        with pytest.raises(TypeError, match="unexpected keyword argument 'techer'. Did you mean 'teacher'"):
            kind(student, DistillationArguments(str(tmp_path), use_cpu=True), techer=student)
        with pytest.raises(
            TypeError, match=r"'temperature', which is a field of its args: pass DistillationArguments\(temp"
        ):
            kind(student, DistillationArguments(str(tmp_path), use_cpu=True), temperature=2.0)
        with pytest.raises(TypeError, match="'tokenizer'. It is named processing_class"):
            kind(student, DistillationArguments(str(tmp_path), use_cpu=True), tokenizer=None)


def test_the_recipes_of_the_guide_construct(tmp_path: Path) -> None:
    weighted, generating = section_code("### Any trainer")
    data = [{"input_ids": [1, 2, 3], "labels": 1}]
    names: dict[str, Any] = {"tokenizer": None, "train": data, "held_out": data, "compute_metrics": None}
    for task, recipe in ((TASK, weighted), ("seq2seq-lm", generating)):
        names |= {"student": model_for(task, 1), "teacher": model_for(task, 2), "data_collator": collate}
        exec(recipe.replace('"out", ', f'"{tmp_path}", use_cpu=True, '), names)
        assert len(names["trainer"].teachers) == 1
