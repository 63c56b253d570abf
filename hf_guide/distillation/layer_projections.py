"""Linear maps from the student's widths to the teacher's, for losses that compare vectors.

They are trained with the student, are part of the trainer and its checkpoints, and are never in the student's files.
"""

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
    """One linear map for each pair of vectors that are compared; none where their widths agree.

    The modules of a student's embedding that have weights are trained along with the maps: they are outside of its model.
    """

    def __init__(
        self,
        widths: Mapping[str, tuple[int, int]],
        *,
        seed: int,
        student_modules: "Mapping[str, nn.Module] | None" = None,
    ):
        """Create a map for each name in `widths`, {name: (student width, teacher width)}, whose widths differ."""
        super().__init__()
        self.student_modules = nn.ModuleDict(student_modules or {})
        generator = torch.Generator().manual_seed(seed)
        self.maps = nn.ModuleDict()
        for name, (student, teacher) in widths.items():
            if student != teacher:
                linear = nn.Linear(student, teacher, bias=False)
                # Lengths are preserved on average, so that the loss begins on the scale of the others.
                nn.init.normal_(linear.weight, std=student**-0.5, generator=generator)
                self.maps[name] = linear

    def __len__(self) -> int:
        """Return how many maps and modules there are."""
        return len(self.maps) + len(self.student_modules)

    def forward(self, name: str, student: Tensor) -> Tensor:
        """Project the student's vectors (..., student width) to (..., teacher width)."""
        if name not in self.maps:
            return student
        weight = self.maps[name].get_parameter("weight")
        return nn.functional.linear(student.to(weight.dtype), weight)

    def save(self, folder: Path) -> None:
        """Write the maps into a checkpoint's folder."""
        if len(self):
            write_tensors(folder / PROJECTIONS_FILE_NAME, self.state_dict(), {})

    def load(self, folder: Path) -> None:
        """Read the maps from a checkpoint's folder.

        Raises:
            OptionError: Their file is missing or damaged.
        """
        if not len(self):
            return
        try:
            tensors, _, _ = read_tensors(folder / PROJECTIONS_FILE_NAME, required=False)
        except FileNotFoundError as error:
            raise OptionError(
                f"{folder} has no {PROJECTIONS_FILE_NAME}: it is not a checkpoint of a run with these losses. Resume from one "
                "that is."
            ) from error
        except DamagedFileError as error:
            raise OptionError(f"{error} Resume from another checkpoint.") from error
        # Until version 0.1 the loss "features" was called "embedding".
        self.load_state_dict({name.replace("_embedding.", "_features."): value for name, value in tensors.items()})


def check_optimizer_has_projections(optimizer: torch.optim.Optimizer, projections: Sequence[nn.Parameter]) -> None:
    """Check that an optimizer has the projections: otherwise they would stay random.

    Raises:
        OptionError: It does not; the message states how to add them.
    """
    known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if not known.issuperset(map(id, projections)):
        raise OptionError(
            "The student's widths differ from the teacher's, and the optimizer that was passed does not have the "
            "projections between them: they would stay random. Add "
            "trainer.distillation_objective.projections.parameters() to it before train(), or pass "
            "optimizer_cls_and_kwargs instead of optimizers."
        )


class ProjectionGradSyncCallback(TrainerCallback):
    """Average the projections' gradients over processes before each step, as DistributedDataParallel does the student's."""

    def __init__(self, projections: LayerProjections, accelerator: Accelerator):
        self.projections = projections
        self.accelerator = accelerator

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Average the gradients that there are."""
        for parameter in self.projections.parameters():
            if parameter.grad is not None:
                parameter.grad = self.accelerator.reduce(parameter.grad, reduction="mean")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Clear the gradients: `Trainer` clears the student's alone."""
        self.projections.zero_grad()
