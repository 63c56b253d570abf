"""Trainers whose `evaluate` and `predict` post-process predictions with the examples, as those for question answering do."""

from pathlib import Path
from typing import Any

import pytest
from transformers import Seq2SeqTrainer, Trainer
from transformers.trainer_utils import EvalPrediction, PredictionOutput

from hf_guide import DistillationMixin, DistillationTrainer, Seq2SeqDistillationArguments, Seq2SeqDistillationTrainer
from tests.distillation.small import collate, examples_for, model_for
from tests.distillation.task_cases import CASES
from tests.distillation.test_trainer import arguments
from tests.distillation.test_trainer_compatibility import seq2seq


class PostProcessing:
    """What the trainers of Transformers' question-answering examples add to `Trainer` and to `Seq2SeqTrainer`."""

    def __init__(self, *args: Any, eval_examples: Any = None, post_process_function: Any = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.eval_examples, self.post_process_function = eval_examples, post_process_function

    def evaluate(
        self: Any,
        eval_dataset: Any = None,
        eval_examples: Any = None,
        ignore_keys: Any = None,
        metric_key_prefix: str = "eval",
        **gen_kwargs: Any,
    ) -> dict[str, float]:
        self._gen_kwargs = {"max_length": 9} | gen_kwargs
        eval_dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        eval_examples = self.eval_examples if eval_examples is None else eval_examples
        output = self.run_loop(self.get_eval_dataloader(eval_dataset), "Evaluation", ignore_keys, metric_key_prefix)
        metrics = self.compute_metrics(self.post_process_function(eval_examples, eval_dataset, output))
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()} | output.metrics
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def predict(
        self: Any,
        predict_dataset: Any,
        predict_examples: Any,
        ignore_keys: Any = None,
        metric_key_prefix: str = "test",
    ) -> PredictionOutput:
        self._gen_kwargs = {"max_length": 9}
        output = self.run_loop(self.get_test_dataloader(predict_dataset), "Prediction", ignore_keys, metric_key_prefix)
        predictions = self.post_process_function(predict_examples, predict_dataset, output)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in self.compute_metrics(predictions).items()}
        return PredictionOutput(predictions.predictions, predictions.label_ids, metrics | output.metrics)

    def run_loop(self: Any, dataloader: Any, description: str, ignore_keys: Any, prefix: str) -> Any:
        compute_metrics, self.compute_metrics = self.compute_metrics, None
        try:
            return self.evaluation_loop(
                dataloader, description=description, ignore_keys=ignore_keys, metric_key_prefix=prefix
            )
        finally:
            self.compute_metrics = compute_metrics


class PostProcessingTrainer(PostProcessing, Trainer):
    """As `QuestionAnsweringTrainer`."""


class PostProcessingSeq2SeqTrainer(PostProcessing, Seq2SeqTrainer):
    """As `QuestionAnsweringSeq2SeqTrainer`."""


def post_process(examples: list[str], features: Any, output: Any) -> EvalPrediction:
    assert len(examples) == len(features) == len(output.predictions)
    return EvalPrediction(predictions=list(examples), label_ids=output.predictions)


def measure(prediction: EvalPrediction) -> dict[str, float]:
    return {"answers": float(len(prediction.predictions)), "dims": float(prediction.label_ids.ndim)}


KINDS = {
    "mixin first": (DistillationMixin, PostProcessingTrainer),
    "trainer first": (PostProcessingTrainer, DistillationTrainer),
    "seq2seq, mixin first": (DistillationMixin, PostProcessingSeq2SeqTrainer),
    "seq2seq, trainer first": (PostProcessingSeq2SeqTrainer, DistillationTrainer),
    "seq2seq, public": (PostProcessing, Seq2SeqDistillationTrainer),
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", KINDS)
def test_evaluation_has_their_metrics_and_the_losses(name: str, tmp_path: Path) -> None:
    is_seq2seq = name.startswith("seq2seq")
    task = "seq2seq-lm" if is_seq2seq else "sequence-classification"
    changes = {"eval_strategy": "steps", "eval_steps": 1}
    if is_seq2seq:
        args = seq2seq(tmp_path, Seq2SeqDistillationArguments, predict_with_generate=True, **changes)["args"]
    else:
        args = arguments(tmp_path, losses={"ce": 0.5, "kd": 0.5}, learning_rate=0.1, **changes)
    trainer: Any = type("T", KINDS[name], {})(
        model_for(task, 1, blocks=1),
        args,
        collate,
        examples_for(task),
        examples_for(task, 6, seed=7),
        teacher=model_for(task, 2, blocks=1),
        compute_metrics=measure,
        eval_examples=[str(number) for number in range(6)],
        post_process_function=post_process,
    )
    trainer.train()
    history = trainer.state.log_history
    assert history[0]["kd"] > 0 and history[1]["eval_answers"] == 6 and history[1]["eval_dims"] == 2
    plain = DistillationTrainer(
        trainer.model,
        arguments(tmp_path, losses={"ce": 0.5, "kd": 0.5}),
        collate,
        teacher=model_for(task, 2, blocks=1),
    )
    expected = plain.evaluate(trainer.eval_dataset)
    for metric in ("ce", "kd", "teacher_agreement"):
        assert history[1][f"eval_{metric}"] == pytest.approx(expected[f"eval_{metric}"], rel=1e-4), metric
    predicted = trainer.predict(examples_for(task, 3), ["a", "b", "c"])
    assert predicted.predictions == ["a", "b", "c"] and predicted.metrics["test_kd"] > 0
    if is_seq2seq:
        shorter = trainer.evaluate(max_length=5)
        assert shorter["eval_kd"] == pytest.approx(expected["eval_kd"], rel=1e-4)


def test_validation_features_of_questions_have_losses_where_they_have_answers(tmp_path: Path) -> None:
    case = CASES["question-answering"]
    labeled = case.examples(4)
    unlabeled = [{name: each[name] for name in ("input_ids", "attention_mask")} for each in labeled]
    trainer: Any = type("T", (DistillationMixin, PostProcessingTrainer), {})(
        case.build(1, 16),
        arguments(tmp_path, losses={"ce": 0.5, "kd": 0.5}),
        collate_answered,
        labeled,
        unlabeled,
        teacher=case.build(2, 16),
        compute_metrics=lambda prediction: {"answers": float(len(prediction.predictions))},
        eval_examples=["a", "b", "c", "d"],
        post_process_function=lambda examples, features, output: EvalPrediction(examples, output.predictions[0]),
    )
    trainer.train()
    assert trainer.state.log_history[0]["kd"] > 0
    assert trainer.evaluate().keys() == {"eval_answers", "epoch"}
    metrics = trainer.evaluate(labeled)
    assert metrics["eval_answers"] == 4 and metrics["eval_kd"] > 0 and metrics["eval_ce"] > 0


def collate_answered(examples: list[dict[str, Any]]) -> dict[str, Any]:
    """Collate features of questions, with their answers if they have any."""
    answers = {"start_positions": 0, "end_positions": 0}
    batch = CASES["question-answering"].collate([answers | each for each in examples])
    return {name: value for name, value in batch.items() if name in examples[0]}
