"""One SGD step and an evaluation with generation in a world of processes; rank 0 writes the gradient and the metrics."""

import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist
from accelerate import PartialState

from hf_guide import Seq2SeqDistillationArguments, Seq2SeqDistillationTrainer
from tests.distillation.small import collate, examples_for, model_for
from tests.distributed.gradients import gather_full


def measure(prediction: Any) -> dict[str, float]:
    longest = (prediction.predictions != 0).any(0).nonzero()[0].max()  # they are padded to the model's own length
    return {"length": float(longest) + 1, "texts": float(len(prediction.predictions))}


def main(options: dict[str, Any]) -> None:
    student = model_for("seq2seq-lm", 1)
    before = {name: value.clone() for name, value in student.named_parameters()}
    args = Seq2SeqDistillationArguments(
        output_dir=str(Path(options["output"]).parent / "run"),
        losses={"ce": 0.5, "kd": 0.5},
        predict_with_generate=True,
        generation_max_length=7,
        max_steps=1,
        learning_rate=1.0,
        optim="sgd",
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        use_cpu=True,
        **options["arguments"],
    )
    trainer = Seq2SeqDistillationTrainer(
        student,
        args,
        collate,
        examples_for("seq2seq-lm"),
        eval_dataset=examples_for("seq2seq-lm", 7),
        teacher=model_for("seq2seq-lm", 2),
        compute_metrics=measure,
    )
    trainer.train()
    after = {name: gather_full(value) for name, value in trainer.model.named_parameters()}
    metrics = trainer.evaluate()
    if trainer.is_world_process_zero():
        result = {
            "world_size": dist.get_world_size() if dist.is_initialized() else 1,
            "gradients": {name: (before[name] - after[name]).flatten().tolist() for name in before},
            "metrics": metrics,
        }
        Path(options["output"]).write_text(json.dumps(result))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
    gc.collect()  # a process that leaves its group while a wrapped model is still there can hang
    PartialState().destroy_process_group()
