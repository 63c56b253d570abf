"""Linear maps from the student's widths to the teacher's, for terms that compare vectors. They are learned with the
student, live in the trainer and its checkpoints, and are never in the student's files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import TrainerCallback

from hf_guide.errors import OptionError
from hf_guide.utils.checksums import DamagedFileError, read_tensors, write_tensors

PROJECTIONS_FILE_NAME = "distillation_projections.safetensors"


class LayerProjections(nn.Module):
    """One linear map for each pair of vectors that are compared; none where their widths agree."""

    def __init__(self, widths: Mapping[str, tuple[int, int]], *, seed: int):
        """`widths` holds the student's and the teacher's by name."""
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.maps = nn.ModuleDict()
        for name, (student, teacher) in widths.items():
            if student != teacher:
                linear = nn.Linear(student, teacher, bias=False)
                # Lengths are kept on average, so that a fresh map neither drowns the other terms nor is drowned.
                nn.init.normal_(linear.weight, std=student**-0.5, generator=generator)
                self.maps[name] = linear

    def forward(self, name: str, student: Tensor) -> Tensor:
        """Return the student's vectors, (..., student width), as wide as the teacher's, (..., teacher width)."""
        if name not in self.maps:
            return student
        weight = self.maps[name].get_parameter("weight")
        return nn.functional.linear(student.to(weight.dtype), weight)

    def save(self, folder: Path) -> None:
        """Write the maps into a checkpoint's folder."""
        if len(self.maps):
            write_tensors(folder / PROJECTIONS_FILE_NAME, self.state_dict(), {})

    def load(self, folder: Path) -> None:
        """Read the maps from a checkpoint's folder.

        Raises:
            OptionError: their file is missing or damaged.
        """
        if not len(self.maps):
            return
        try:
            tensors, _, _ = read_tensors(folder / PROJECTIONS_FILE_NAME, required=False)
        except FileNotFoundError as error:
            raise OptionError(
                f"{folder} has no {PROJECTIONS_FILE_NAME}: it is no checkpoint of a run with this objective. Resume from one that is."
            ) from error
        except DamagedFileError as error:
            raise OptionError(f"{error} Resume from another checkpoint.") from error
        # Until version 0.1 the loss "features" was called "embedding".
        self.load_state_dict({name.replace("_embedding.", "_features."): value for name, value in tensors.items()})


def check_optimizer_has_projections(optimizer: torch.optim.Optimizer, maps: Sequence[nn.Parameter]) -> None:
    """Refuse an optimizer that does not have the maps: they would stay as they were drawn.

    Raises:
        OptionError: says how it gets them.
    """
    known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if not known.issuperset(map(id, maps)):
        raise OptionError(
            "The student's widths differ from the teacher's, and the optimizer that was passed does not have the maps between "
            "them: they would stay random. Add trainer.distillation_objective.projections.parameters() to it before train(), or pass "
            "optimizer_cls_and_kwargs in place of optimizers."
        )


class ProjectionGradSyncCallback(TrainerCallback):
    """Averages the maps' gradients over processes before each step, as DistributedDataParallel does the student's."""

    def __init__(self, projections: LayerProjections, accelerator: Accelerator):
        self.projections = projections
        self.accelerator = accelerator

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Average what is there."""
        for parameter in self.projections.parameters():
            if parameter.grad is not None:
                parameter.grad = self.accelerator.reduce(parameter.grad, reduction="mean")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Forget them: `Trainer` clears the student's gradients alone."""
        self.projections.zero_grad()
