"""End a run at the step at which a loss, a gradient or a weight is not finite, or at which the teacher was left out."""

import math
import os
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from hf_guide.distillation.layer_projections import check_optimizer_has_projections
from hf_guide.distillation.objective import Objective, is_sharded
from hf_guide.errors import HfGuideError, NotFiniteError
from hf_guide.utils.finite import all_finite, non_finite_names

# A gradient scaler halves its factor for every step that it skips: after so many in a row it is at 2**-24 of one.
_MAX_SKIPPED_STEPS = 40


class StepCheckedTrainer(Trainer):
    """A `Trainer` that keeps what `StepChecksCallback` checks at each step of the optimizer."""

    distillation_objective: Objective
    called_methods: set[str]
    """Which of the trainer's own methods were called since the last step, or in this evaluation."""

    is_watched: bool = False
    loss_gradients: list[Tensor]
    """Of the losses since the last step, scalars; whether there should be any is in `is_watched`."""

    pending_error: HfGuideError | None = None
    """An error of this process, raised before the step in all processes."""

    grad_norm: Tensor | float | None = None
    non_finite_gradients: list[str] | None = None
    """Names of weights, where gradients had to be checked before they were clipped."""

    _unwrapped: tuple[Any, Any] | None = None

    def _unwrap(self, model: Any) -> Any:
        """Return the student without its wrappers, found once: that walks over every module."""
        if self._unwrapped is None or self._unwrapped[0] is not model:
            self._unwrapped = (model, self.accelerator.unwrap_model(model, keep_torch_compile=False))
        return self._unwrapped[1]

    @property
    def unwrapped_student(self) -> Any:
        """The student itself, without what wraps it for training."""
        return self._unwrap(self.model)

    @property
    def shards_weights(self) -> bool:
        """Whether a process has only a shard of the student's weights."""
        return is_sharded(self.accelerator) or any(
            hasattr(each, "to_local") for each in self.unwrapped_student.parameters()
        )

    def check_called(self, *names: str) -> None:
        """Check that the trainer's own methods of these names were called; `DistillationMixin` does."""
        raise NotImplementedError

    def check_loss_used(self) -> None:
        """Check that the loss was trained on, where `compute_loss` returned one; `DistillationMixin` does."""
        raise NotImplementedError

    def watch_gradient(self, loss: Tensor) -> None:
        """Keep the gradient that a training step gives a loss, a scalar, until the optimizer's step."""
        if loss.requires_grad:
            self.is_watched = True
            loss.register_hook(self.loss_gradients.append)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """Clip as `Trainer` does, but not where gradients are not finite: clipped, they would all be NaN."""
        if self.shards_weights:
            self.non_finite_gradients = non_finite_gradients(self)
            return super()._clip_grad_norm(model)
        norm = self._gradient_norm(model)
        if bool(norm.isfinite()):
            clip_grads_with_norm_(model.parameters(), self.args.max_grad_norm, norm)
        return norm

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Return the norm of the gradients as `Trainer` does, and keep it for the check before the optimizer's step."""
        if grad_norm is None and not self.shards_weights:
            grad_norm = self._gradient_norm(model)
        elif grad_norm is None:
            self.non_finite_gradients = non_finite_gradients(self)
        self.grad_norm = super()._get_grad_norm(model, grad_norm)
        return self.grad_norm

    def _gradient_norm(self, model: nn.Module) -> Tensor:
        self.accelerator.unscale_gradients()
        return get_total_norm([each.grad for each in model.parameters() if each.grad is not None])


class StepChecksCallback(TrainerCallback):
    """Check a trainer's gradients before each step of the optimizer, and its weights after it.

    This costs one norm of the gradients, which `Trainer` computes anyway, and one pass over the trainable weights.
    """

    def __init__(self, trainer: "StepCheckedTrainer"):
        self.trainer = trainer
        self.skipped = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Check that the optimizer updates the projections, too."""
        self.skipped = 0
        self.trainer.pending_error = None
        self.trainer.called_methods.clear()
        self.trainer.loss_gradients = []
        self.trainer.is_watched = False
        projections = self.trainer.distillation_objective.projections
        if projections is not None and self.trainer.optimizer is not None:
            check_optimizer_has_projections(self.trainer.optimizer, list(projections.parameters()))

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Forget the calls of an evaluation since the last step."""
        self.trainer.called_methods.discard("compute_loss")

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Raise for a loss or a gradient that is not finite, before the optimizer uses it, in all processes together."""
        trainer = self.trainer
        trainer.check_called("compute_loss", "_get_num_items_in_batch")
        trainer.check_loss_used()
        trainer.called_methods.clear()
        trainer.loss_gradients.clear()
        trainer.is_watched = False
        error = trainer.pending_error
        if error is None and not _uses_gradient_scaler(trainer):
            error = _non_finite_gradient_error(trainer)
        trainer.grad_norm = trainer.non_finite_gradients = None
        _raise_on_all_ranks(trainer, error)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Raise for a weight that is not finite, before it can be saved."""
        trainer = self.trainer
        if trainer.accelerator.optimizer_step_was_skipped:
            self.skipped += 1
            if self.skipped >= _MAX_SKIPPED_STEPS:
                raise NotFiniteError(
                    f"The gradients of the last {self.skipped} steps, up to step {state.global_step}, were not finite in "
                    "float16, whatever the scale of the loss: nothing was learned. Train in bfloat16 or float32."
                )
            return
        self.skipped = 0
        named = [(name, each) for name, each in named_trained_parameters(trainer) if each.requires_grad]
        error = None
        if not all_finite(each for _, each in named):
            wrong = non_finite_names(named)
            error = NotFiniteError(
                f"After step {state.global_step} the weight {wrong[0]} has NaN or infinity, as {len(wrong)} of {len(named)} "
                f"trained weights do, although the gradients were finite. {_advice(trainer)}"
            )
        if trainer.shards_weights:
            _raise_on_all_ranks(trainer, error)
        elif error is not None:
            raise error


def named_trained_parameters(trainer: "StepCheckedTrainer") -> list[tuple[str, nn.Parameter]]:
    """Return the student's parameters by name, and those of the projections between widths."""
    projections = trainer.distillation_objective.projections
    named = (
        [] if projections is None else [(f"projections.{name}", each) for name, each in projections.named_parameters()]
    )
    return [*trainer.unwrapped_student.named_parameters(), *named]


def non_finite_loss_error(trainer: "StepCheckedTrainer", loss: Tensor, terms: dict[str, Tensor]) -> NotFiniteError:
    """Return the error for a loss that is not finite; it names the first weight that is not, or else the loss."""
    step = trainer.state.global_step + 1
    wrong = non_finite_names(named_trained_parameters(trainer))
    if wrong:
        cause = f"the student's weight {wrong[0]} has NaN or infinity, as {len(wrong)} weights do"
    else:
        named = [name for name, value in terms.items() if not math.isfinite(value.item())] or ["loss"]
        value = terms.get(named[0], loss).item()
        cause = f"the loss {named[0]!r} is {value}" if named[0] in terms else f"the loss is {value}"
    return NotFiniteError(f"At step {step}, after {step - 1} complete steps, {cause}. {_advice(trainer)}")


def non_finite_gradients(trainer: "StepCheckedTrainer") -> list[str]:
    """Return the names of the weights whose gradients, or this process's shards of them, are not finite."""
    named = [(name, each.grad) for name, each in named_trained_parameters(trainer) if each.grad is not None]
    return [] if all_finite(gradient for _, gradient in named) else non_finite_names(named)


def _non_finite_gradient_error(trainer: "StepCheckedTrainer") -> NotFiniteError | None:
    norm, wrong, projections = (
        trainer.grad_norm,
        trainer.non_finite_gradients,
        trainer.distillation_objective.projections,
    )
    norm_is_finite = norm is None or math.isfinite(norm.item() if isinstance(norm, Tensor) else norm)
    gradients = (
        [] if projections is None else [each.grad for each in projections.parameters() if each.grad is not None]
    )
    if wrong is None:  # not searched before clipping: the norm of whole gradients shows whether there is any
        wrong = (
            non_finite_gradients(trainer) if norm is None or not norm_is_finite or not all_finite(gradients) else []
        )
    if norm_is_finite and not wrong:
        return None
    step = trainer.state.global_step + 1
    cause = (
        f"the gradient of {wrong[0]} has NaN or infinity, as those of {len(wrong)} weights do"
        if wrong
        else "the norm of all gradients is not finite, although every gradient in this process is"
    )
    return NotFiniteError(f"At step {step}, after {step - 1} complete steps, {cause}. {_advice(trainer)}")


def _advice(trainer: "StepCheckedTrainer") -> str:
    folder = trainer.args.output_dir
    last = get_last_checkpoint(folder) if folder and trainer.args.should_save and os.path.isdir(folder) else None
    state = f"The last checkpoint is {last}." if last else "No checkpoint had been saved."
    return f"Lower learning_rate, set max_grad_norm (such as 1.0), or train in bfloat16 or float32. {state}"


def _uses_gradient_scaler(trainer: "StepCheckedTrainer") -> bool:
    """Return whether a gradient scaler, of PyTorch's or DeepSpeed's, skips steps whose gradients are not finite."""
    scaler = getattr(trainer.accelerator, "scaler", None)
    if scaler is not None and scaler.is_enabled():
        return True
    engine = getattr(trainer, "deepspeed", None)
    return engine is not None and bool(engine.fp16_enabled())


def _raise_on_all_ranks(trainer: "StepCheckedTrainer", error: HfGuideError | None) -> None:
    """Raise in every process if one of them has an error, so that none waits for it."""
    if _any_rank(trainer.accelerator, error is not None):
        raise error or NotFiniteError(
            "Another process found a loss, a gradient or a weight that is not finite at step "
            f"{trainer.state.global_step + 1}; its error names it."
        )


def _any_rank(accelerator: Accelerator, condition: bool) -> bool:
    if accelerator.num_processes == 1:
        return condition
    flag = torch.tensor(float(condition), device=accelerator.device)
    return bool(accelerator.reduce(flag, reduction="sum") > 0)
