"""`random`: the model's own initialization, in the shape that a teacher's config gives; the baseline of every comparison."""

from dataclasses import dataclass, field
from typing import ClassVar

from transformers import PreTrainedModel

from hf_guide.initialization.build import build_student, untie_like_teacher
from hf_guide.initialization.config import REMOVED_OPTIONS, InitializationConfig
from hf_guide.initialization.registry import InitializationMethod, StudentSetup
from hf_guide.initialization.report import InitializationReport, random_report
from hf_guide.utils.deprecation import RenamedOptions

_RENAMED = RenamedOptions(removed=REMOVED_OPTIONS)


@dataclass
class RandomConfig(InitializationConfig):
    """The model's own initialization; `seed` is its one option.

    Example:
        >>> RandomConfig(seed=3).seed
        3
    """

    method: str = field(default="random", metadata={"help": "random"})

    renamed_options: ClassVar[RenamedOptions] = _RENAMED


class RandomMethod(InitializationMethod):
    """Build the student as `from_config` does, with a head of its own where the teacher has one (see `untie_like_teacher`)."""

    requires_layout: ClassVar[bool] = False
    config: RandomConfig

    def build(self, setup: StudentSetup) -> PreTrainedModel:
        """Return the student with the model's own initialization."""
        student = build_student(setup.model_class, setup.config, setup.dtype, seed=self.config.seed, initialize=True)
        for name, source in untie_like_teacher(student, setup.teacher).items():
            student.get_parameter(name).data.copy_(student.get_parameter(source))
        return student

    def initialize(self, student: PreTrainedModel, setup: StudentSetup) -> InitializationReport:
        """Report that nothing came from the teacher: `build` has initialized every parameter."""
        return random_report(student, setup.teacher)
