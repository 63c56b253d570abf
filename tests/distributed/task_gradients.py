"""One SGD step at rate 1 for several tasks in a world of processes; rank 0 writes the gradient and the losses of each."""

import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist
from accelerate import PartialState

from hf_guide import DistillationArguments, DistillationTrainer
from tests.distillation.task_cases import CASES


def main(options: dict[str, Any]) -> None:
    found = {}
    for name, losses in options["losses"].items():
        case = CASES[name]
        student = case.build(1, 16)
        before = {key: value.clone() for key, value in student.named_parameters()}
        args = DistillationArguments(
            output_dir=str(Path(options["output"]).parent / "run"),
            losses=losses,
            per_device_train_batch_size=options["batch_size"],
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
            seed=3,
            remove_unused_columns=False,
        )
        trainer = DistillationTrainer(student, args, case.collate, case.examples(8), teacher=case.build(2, 16))
        trainer.train()
        found[name] = {
            "gradient": [
                value
                for key, after in student.named_parameters()
                for value in (before[key] - after).detach().flatten().tolist()
            ],
            "log": {loss: trainer.state.log_history[0][loss] for loss in losses},
        }
    if PartialState().is_main_process:
        world_size = dist.get_world_size() if dist.is_initialized() else 1
        Path(options["output"]).write_text(json.dumps({"world_size": world_size, "cases": found}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
    gc.collect()  # a process that leaves its group while a wrapped model is still there can hang
    PartialState().destroy_process_group()
