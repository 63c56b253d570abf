"""The state of a refit: both models, the plan that connects them, and the steps that are saved and continued from."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_guide.calibration.config import CalibratedConfig
from hf_guide.calibration.forward import held_out_examples, held_out_rows
from hf_guide.calibration.least_squares import Fit, max_eps
from hf_guide.calibration.modules import ModuleRef, find_modules, linear_weight, module_bias
from hf_guide.calibration.normal_equations import at_least_float32
from hf_guide.calibration.resume import CalibrationCheckpoint
from hf_guide.calibration.sequential import SequentialModel
from hf_guide.errors import ShapeError
from hf_guide.initialization.plan import ParameterPlan
from hf_guide.initialization.transfer import Transfer, check_no_overflow
from hf_guide.utils.finite import is_finite, overflow_advice


@dataclass
class RefitState:
    """What refitting a student needs to know, and what it has done so far.

    Attributes:
        teacher_run: The running teacher on this process's batches.
        student: The student, filled, on the teacher's device.
        transfer: What filled it; its plan and bases.
        config: The options.
        checkpoint: Where steps are saved and continued from.
        show_progress: Whether to show a progress bar.
        residual_error: For each stack and block |x_T M - x_S|^2 / |x_T M|^2 of the hidden states after it, each token
            scaled to length 1.
        notes: Weights that were not refitted, and why.
        assigned: Modules whose weights were assigned since the last saved step.
    """

    teacher_run: SequentialModel
    student: PreTrainedModel
    transfer: Transfer
    config: CalibratedConfig
    checkpoint: CalibrationCheckpoint | None = None
    show_progress: bool = False
    residual_error: dict[str, list[float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    assigned: list[ModuleRef] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.plan = self.transfer.plan
        self.teacher, self.batches, self.store = (
            self.teacher_run.model,
            self.teacher_run.batches,
            self.teacher_run.store,
        )
        self._held_out = held_out_examples(self.batches)
        self.eps = max_eps(self.teacher.dtype, self.student.dtype)
        self.teacher_modules, self.student_modules = (
            find_modules(model, self.plan.layout) for model in (self.teacher, self.student)
        )
        modules = self.student_modules
        self.student_run = SequentialModel(
            self.student, modules, self.batches, is_teacher=False, probes=self.teacher_run.probes, store=self.store
        )

    # Steps

    def resume_step(self, step: str) -> bool:
        """Assign the weights that an earlier run saved for a step; return whether there are any.

        Ask for steps in the order in which they are computed. After one that is missing, none is resumed.
        """
        if self.checkpoint is None:
            return False
        saved = self.checkpoint.load_step(step)
        if saved is None:
            self.checkpoint.steps.clear()  # later ones were fitted to the student after this step
            return False
        weights, facts = saved
        modules = self.student_modules.linear
        for name, value in weights.items():
            module_name, _, parameter = name.rpartition(".")
            getattr(modules[module_name].module, parameter).data.copy_(value)
        self.residual_error, self.notes = facts["residual_error"], facts["notes"]
        self.transfer.steps = facts["steps"]
        return True

    def save_step(self, step: str) -> None:
        """Save the weights that were assigned since the last step."""
        if self.checkpoint is not None:
            weights = {
                f"{ref.name}.{name}": value
                for ref in self.assigned
                for name, value in ref.module.named_parameters(recurse=False)
            }
            facts = {"residual_error": self.residual_error, "notes": self.notes, "steps": self.transfer.steps}
            self.checkpoint.save_step(step, weights, facts)
        self.assigned.clear()

    def assign(self, ref: ModuleRef, fit: Fit) -> None:
        """Assign fitted rows of [weight bias], (out, in + 1) or (out, in), to a linear module of the student.

        Raises:
            ShapeError: As `assign_checked`.
        """
        weight, bias = linear_weight(ref.module), module_bias(ref.module)
        for rows, fitted in fit.parts:
            assign_checked(weight[rows], fitted[:, : weight.shape[1]], ref.name + ".weight")
            if bias is not None:
                assign_checked(bias[rows], fitted[:, -1], ref.name + ".bias")
        self.assigned.append(ref)

    # Both models

    def parameter_plan(self, ref: ModuleRef, parameter: str = "weight") -> ParameterPlan:
        """Return the plan of a module's parameter."""
        return self.plan.parameters[f"{ref.name}.{parameter}"]

    def comes_from_teacher(self, ref: ModuleRef) -> bool:
        """Return whether a module's weight came from the teacher, and is not tied to another."""
        parameter = self.plan.parameters.get(ref.name + ".weight")
        return (
            parameter is not None
            and parameter.source is not None
            and parameter.name not in self.plan.random_parameters
        )

    def teacher_module(self, ref: ModuleRef, block: int) -> ModuleRef:
        """Return the module of the teacher's block that corresponds to a module of the student."""
        name = ref.match.row.pattern.replace("{block}", str(block))
        for placeholder, value in ref.match.numbers.items():
            name = name.replace("{" + placeholder + "}", value)
        return {**self.teacher_modules.norms, **self.teacher_modules.linear}[name]

    def project(self, hidden_states: Tensor, axis: str) -> Tensor:
        """Return the teacher's hidden states projected to the student's width, x_T M, in float32 or better."""
        matrix = self.plan.bases.get(axis)
        hidden_states = at_least_float32(hidden_states)
        return hidden_states if matrix is None else hidden_states @ matrix.to(hidden_states)

    def held_out_rows(self, activations: Tensor, batch: int, *, of_decoder: bool) -> Tensor:
        """Return which rows of activations on this process's batch of that index choose ridges; padding is left out."""
        return held_out_rows(
            activations, self.batches[batch], self.teacher, self._held_out[batch], of_decoder=of_decoder
        )

    def stack_axis(self, stack: str) -> str:
        """Return the projected axis of a stack's hidden states."""
        return next(ref.axis for ref in self.student_modules.norms.values() if ref.stack == stack)


def assign_checked(parameter: Tensor, value: Tensor, name: str) -> None:
    """Assign a fitted value to a parameter of the student.

    Raises:
        ShapeError: The value is not finite, or larger than the parameter's dtype holds.
    """
    if not is_finite(value):
        raise ShapeError(
            f"The value fitted for {name} is not finite, and must be: activations overflow in {parameter.dtype}. "
            + overflow_advice(
                parameter.dtype,
                "Check the teacher's weights and the calibration dataset for extreme values, or pass refit='none'",
            )
        )
    parameter.data.copy_(value)
    check_no_overflow(parameter, value, name)


def weight_and_bias(module: nn.Module, rows: slice = slice(None)) -> Tensor:
    """Return some rows of [weight bias] of a linear module, (rows, in + 1), or of its weight if it has no bias.

    They are float64 and on the CPU.
    """
    weight, bias = linear_weight(module)[rows], module_bias(module)
    joined = weight if bias is None else torch.cat([weight, bias[rows, None]], 1)
    return joined.detach().double().cpu()
