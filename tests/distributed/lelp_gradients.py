"""One SGD step at rate 1 by pseudo-subclasses in a world of processes; rank 0 writes the gradient of every parameter."""

import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist
from accelerate import PartialState

from hf_guide import DistillationTrainer, SubclassLabelCollator
from tests.distillation.small import collate, examples_for
from tests.distillation.test_trainer import arguments
from tests.lelp.test_collator import COUNT, projector_of, teacher_of
from tests.lelp.test_loss import student_of

TASK = "sequence-classification"


def main(params: dict[str, Any]) -> None:
    student, teacher = student_of(TASK), teacher_of(TASK)
    before = {name: value.clone() for name, value in student.named_parameters()}
    rows = examples_for(TASK, 8)
    for row in rows[::3]:  # those are learned as all others are
        row["labels"] = -100
    trainer = DistillationTrainer(
        student,
        arguments(Path(params["output"]).parent / "run", temperature=2.0, **params["arguments"]),
        SubclassLabelCollator(projector_of(teacher, examples_for(TASK, COUNT, seed=1)), collate),
        rows,
        eval_dataset=examples_for(TASK, 7),
        teacher=teacher,
    )
    trainer.train()
    after = dict(trainer.accelerator.unwrap_model(trainer.model).named_parameters())
    metrics = trainer.evaluate()
    if trainer.is_world_process_zero():
        actual = {
            "world_size": dist.get_world_size() if dist.is_initialized() else 1,
            "gradients": {name: (before[name] - after[name].detach()).flatten().tolist() for name in before},
            "log": trainer.state.log_history[0],
            "metrics": metrics,
        }
        Path(params["output"]).write_text(json.dumps(actual))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
    gc.collect()  # a process that leaves its group while a wrapped model is still there can hang
    PartialState().destroy_process_group()
