"""Linear maps between the student's widths and the teacher's, for losses that compare vectors.

Maps of hidden states and of a head's inputs are trained with the student. That of an embedding is an isometry, fitted once
and then fixed: the cosines of the embeddings are those of their images, so that nothing is lost with the map. All are part of
the trainer and its checkpoints, and never in the student's files.
"""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import TrainerCallback

from hf_guide.errors import OptionError
from hf_guide.utils.checksums import DamagedFileError, read_tensors, write_tensors

PROJECTIONS_FILE_NAME = "distillation_projections.safetensors"
_ISOMETRY = "isometry_"


class LayerProjections(nn.Module):
    """One linear map for each pair of vectors that are compared; none where their widths agree.

    The modules of a student's embedding that have weights are trained along with the maps: they are outside of its model.

    Args:
        widths: For each name the width of the student and that of the teacher; where they differ there is a map.
        seed: Of the maps that are trained.
        student_modules: The modules of the student's embedding that have weights.
        isometric: The names whose map is not trained but fitted by `fit`.
    """

    def __init__(
        self,
        widths: Mapping[str, tuple[int, int]],
        *,
        seed: int,
        student_modules: "Mapping[str, nn.Module] | None" = None,
        isometric: Collection[str] = (),
    ):
        super().__init__()
        self.student_modules = nn.ModuleDict(student_modules or {})
        generator = torch.Generator().manual_seed(seed)
        self.maps = nn.ModuleDict()
        self.unfitted: set[str] = set()  # isometries that are still zero
        for name, (student, teacher) in widths.items():
            if student == teacher:
                continue
            if name in isometric:
                self.register_buffer(f"{_ISOMETRY}{name}", torch.zeros(teacher, student))
                self.unfitted.add(name)
            else:
                linear = nn.Linear(student, teacher, bias=False)
                # Lengths are preserved on average, so that the loss begins on the scale of the others.
                nn.init.normal_(linear.weight, std=student**-0.5, generator=generator)
                self.maps[name] = linear

    def __len__(self) -> int:
        """Return how many maps and modules there are."""
        return len(self.maps) + len(self._buffers) + len(self.student_modules)

    def isometry(self, name: str) -> Tensor | None:
        """Return the isometry between a pair of vectors, (teacher width, student width); None where they have none."""
        return self._buffers.get(f"{_ISOMETRY}{name}")

    def fit(self, name: str, cross_covariance: Tensor) -> None:
        """Set an isometry to the one that brings the student's vectors nearest to the teacher's (orthogonal Procrustes).

        Args:
            name: Of the pair.
            cross_covariance: The sum of t s^T over pairs of a teacher's vector t and a student's vector s, (teacher width,
                student width).
        """
        left, _, right = torch.linalg.svd(cross_covariance, full_matrices=False)
        self.get_buffer(f"{_ISOMETRY}{name}").copy_(left @ right)
        self.unfitted.discard(name)

    def align(self, name: str, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Return the vectors of both in one space: the wider one's with an isometry, else the teacher's."""
        isometry = self.isometry(name)
        if isometry is None:
            return self(name, student), teacher
        if isometry.shape[1] > isometry.shape[0]:
            return student, teacher.to(isometry.dtype) @ isometry
        return student.to(isometry.dtype) @ isometry.T, teacher

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
        self.unfitted.clear()


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
