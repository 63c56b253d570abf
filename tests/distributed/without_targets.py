"""Three steps in a world of processes, of which some have no targets, or one has a loss that is not finite.

Rank 0 writes the weights after each step, the log and every rank's error.
"""

import gc
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from transformers import TrainerCallback

from hf_guide import DistillationArguments, DistillationTrainer
from hf_guide.errors import NotFiniteError
from tests.distillation.small import collate, model_for
from tests.distillation.test_loss_scaling import examples
from tests.distributed.gradients import ShardedOnCpu, gather_full


class RecordWeights(TrainerCallback):
    """Record the weights at the beginning and after each step."""

    def __init__(self) -> None:
        self.weights: list[list[float]] = []

    def on_train_begin(self, *_: Any, model: torch.nn.Module, **__: Any) -> None:
        self.record(model)

    def on_step_end(self, *_: Any, model: torch.nn.Module, **__: Any) -> None:
        self.record(model)

    def record(self, model: torch.nn.Module) -> None:
        self.weights.append(torch.cat([gather_full(each).flatten() for each in model.parameters()]).tolist())


def main(options: dict[str, Any]) -> None:
    task, spoil = options["task"], options.get("spoil")
    args = DistillationArguments(
        output_dir=str(Path(options["output"]).parent / f"run_{options['per_device']}"),
        max_steps=3,
        per_device_train_batch_size=options["per_device"],
        train_sampling_strategy="sequential",
        learning_rate=0.1,
        optim="sgd",
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        report_to="none",
        save_strategy="steps" if spoil and not options.get("sharded") else "no",
        save_steps=1,
        save_only_model=True,
        logging_steps=1,
        disable_tqdm=True,
        use_cpu=True,
        seed=3,
        **options["arguments"],
    )
    kind = ShardedOnCpu if options.get("sharded") else DistillationTrainer
    recorder = RecordWeights()
    trainer = kind(
        model_for(task, 1),
        args,
        collate,
        examples(task, set(options["empty"]), steps=6),
        teacher=model_for(task, 2),
        callbacks=[recorder],
    )
    rank = trainer.accelerator.process_index
    if spoil == "gradient" and rank == 1:

        def spoil_backward(_: Any, __: Any, output: torch.Tensor) -> None:
            if trainer.state.global_step == 1 and output.requires_grad:
                output.register_hook(lambda gradient: gradient * math.nan)

        trainer.model.get_input_embeddings().register_forward_hook(spoil_backward)
    if spoil == "loss" and rank == 1:
        compute = trainer.distillation_objective.compute

        def compute_infinite(*args: Any, **keywords: Any) -> Any:
            result = compute(*args, **keywords)
            if trainer.state.global_step == 1:
                # A value alone: its gradient stays finite, so that no other process would see it.
                result.total = result.total + math.inf
                result.sums["kd"] = result.sums["kd"] + math.inf
            return result

        trainer.distillation_objective.compute = compute_infinite
    error = ""
    try:
        trainer.train()
    except NotFiniteError as raised:
        error = str(raised)
    errors: list[Any] = [None] * dist.get_world_size() if dist.is_initialized() else [error]
    if dist.is_initialized():
        dist.all_gather_object(errors, error)
    if trainer.is_world_process_zero():
        result = {
            "world_size": dist.get_world_size() if dist.is_initialized() else 1,
            "weights": recorder.weights,
            "log": [entry for entry in trainer.state.log_history if "loss" in entry],
            "errors": errors,
            "saved": sorted(path.name for path in Path(args.output_dir).glob("checkpoint-*")),
        }
        Path(options["output"]).write_text(json.dumps(result))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
    gc.collect()  # a process that leaves its group while a wrapped model is still there can hang
    PartialState().destroy_process_group()
