"""One SGD step at rate 1 in a world of processes; rank 0 writes the gradient of every parameter."""

import gc
import json
import sys
from pathlib import Path
from typing import Any

import accelerate
import torch
import torch.distributed as dist
from accelerate import FullyShardedDataParallelPlugin, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from transformers import Trainer

from hf_guide import DistillationArguments, DistillationMixin, DistillationTrainer
from tests.distillation.small import collate, examples_for, model_for


class ShardedOnCpu(DistillationTrainer):
    """Shards with FSDP2 on the CPU, which Accelerate does on accelerators alone: its own code runs from here on."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", reshard_after_forward=True
        )
        AcceleratorState._shared_state.update(distributed_type=DistributedType.FSDP, fsdp_plugin=plugin)
        self.is_fsdp_enabled = True


class OwnLossTrainer(Trainer):
    """Divides its loss by the number of items that it is passed, and does not multiply it by that of the processes."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(**inputs)
        loss = (
            torch.nn.functional.cross_entropy(outputs.logits, inputs["labels"], reduction="sum") / num_items_in_batch
        )
        return (loss, outputs) if return_outputs else loss


class OwnLossDistillation(DistillationMixin, OwnLossTrainer):
    """Distils with a user's task loss."""


KINDS = {"sharded": ShardedOnCpu, "own_loss": OwnLossDistillation}


def gather_full(tensor: torch.Tensor) -> torch.Tensor:
    """Return a sharded tensor whole, on every process."""
    if hasattr(tensor, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().clone()
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def main(options: dict[str, Any]) -> None:
    student = model_for(options["task"], 1)
    before = {name: value.clone() for name, value in student.named_parameters()}
    args = DistillationArguments(
        output_dir=str(Path(options["output"]).parent / "run"),
        max_steps=1,
        learning_rate=1.0,
        optim="sgd",
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        use_cpu="deepspeed"
        not in options["arguments"],  # DeepSpeed finds the CPU by itself, Accelerate would leave it out
        seed=3,
        temperature=2.0,
        **options["arguments"],
    )
    same_width = {"hidden_states", "features"} & args.losses.keys()
    teacher = model_for(options["task"], 2, width=48 if options.get("wide") or not same_width else 32)
    if options.get("offloaded"):
        folder = Path(options["output"]).parent / f"offloaded-{PartialState().process_index}"
        accelerate.disk_offload(teacher, str(folder), execution_device=torch.device("cpu"))
    kind = next((kind for name, kind in KINDS.items() if options.get(name)), DistillationTrainer)
    trainer = kind(
        student,
        args,
        collate,
        examples_for(options["task"]),
        eval_dataset=examples_for(options["task"], 7),
        teacher=teacher,
    )
    trainer.train()
    after = {name: gather_full(value) for name, value in trainer.model.named_parameters()}
    metrics = trainer.evaluate()
    projections = trainer.distillation_objective.projections
    if trainer.is_world_process_zero():
        result = {
            "world_size": dist.get_world_size() if dist.is_initialized() else 1,
            "gradients": {name: (before[name] - after[name]).flatten().tolist() for name in before},
            "log": trainer.state.log_history[0],
            "metrics": metrics,
            "maps": {}
            if projections is None
            else {name: value.flatten().tolist() for name, value in projections.state_dict().items()},
            "sharded": type(next(trainer.model.parameters())).__name__,
            "teacher_sharded": type(next(trainer.teachers[0].bare.parameters())).__name__,
            "teacher_offloaded": next(trainer.teachers[0].bare.parameters()).is_meta,
            "inside_head": trainer.distillation_objective.head is not None,
        }
        Path(options["output"]).write_text(json.dumps(result))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
    gc.collect()  # a process that leaves its group while a wrapped model is still there can hang
    PartialState().destroy_process_group()
