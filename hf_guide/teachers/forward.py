"""A teacher that runs beside the student, and what it is heard to say of a batch."""

import contextlib
import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor
from transformers import PreTrainedModel

from hf_guide.errors import TeacherError
from hf_guide.models.adapters import forward_parameters
from hf_guide.models.layer_mapping import depth_of_config, hidden_states_of, width_of_config
from hf_guide.models.lm_head import LMHead, skip_lm_head
from hf_guide.models.penultimate import capture_head_inputs, find_classifier, pooled_features
from hf_guide.tasks import Task
from hf_guide.teachers.inputs import TeacherInputs
from hf_guide.teachers.signals import DenseTarget, TeacherSignal, TeacherSignals


def align_logits(logits: Tensor, classes: int | None, order: list[int] | None) -> Tensor:
    """Return a teacher's logits, (items, classes), of what the student has too: its first `classes`, or those of `order`."""
    if order is not None:
        return logits[:, order]
    return logits if classes is None else logits[:, :classes]


@dataclass
class LiveTeacher:
    """A model that is run on every batch, in evaluation mode and without gradients.

    Attributes:
        classes: how many of its first classes student and teacher share; None for all.
        order: which of its classes each of the student's is; None where they stand in the same order.
        head: its language head, where that is known and its weights are whole in this process.
        inputs: how batches, made for the student, become what it expects; None where they are that already.
    """

    model: PreTrainedModel
    task: Task
    classes: int | None = None
    order: list[int] | None = None
    weight: float = 1.0
    head: LMHead | None = None
    inputs: TeacherInputs | None = None

    @property
    def config(self) -> Any:
        """Its config."""
        return self.bare.config

    @property
    def depth(self) -> int:
        """Its number of blocks."""
        return depth_of_config(self.bare.config)

    def width(self, name: str) -> int | None:
        """Return how wide `hidden_N` or `features` is."""
        if name == "features":
            return int(find_classifier(self.bare, self.task).in_features)
        return width_of_config(self.bare.config)

    @functools.cached_property
    def bare(self) -> Any:
        """The model without what wraps it."""
        return extract_model_from_parallel(self.model, keep_torch_compile=False)

    def set_student(self, student: Any) -> None:
        """Expect batches that are made for this student from now on."""
        if self.inputs is not None:
            self.inputs = self.inputs.for_pair(student, self.bare)

    @torch.no_grad()
    def listen(
        self,
        inputs: Mapping[str, Any],
        mask: Tensor,
        needs: Collection[TeacherSignal],
        layers: Collection[int] = (),
        *,
        max_logits: int = 2**23,
    ) -> TeacherSignals:
        """Return what the teacher says of a batch.

        Args:
            inputs: the student's; what the teacher's forward does not name is left out.
            mask: which places have a target, as `tasks.target_mask` gives.
            needs: what to listen for.
            layers: the numbers of blocks after which hidden states are wanted.
            max_logits: so many logits are held at once where the head is known.
        """
        known = forward_parameters(self.bare)
        if self.inputs is not None:
            inputs = self.inputs.convert(inputs)
        given = {
            name: value for name, value in inputs.items() if name in known and name not in ("labels", "return_loss")
        }
        if "use_cache" in known:
            given["use_cache"] = False
        if TeacherSignal.HIDDEN_STATES in needs:
            given["output_hidden_states"] = True
        fed: list[Tensor] = []
        heard: list[Tensor] = []
        with contextlib.ExitStack() as stack:
            if self.inputs is not None:
                stack.enter_context(self.inputs.special_tokens())
            if TeacherSignal.FEATURES in needs:
                heard = stack.enter_context(capture_head_inputs(find_classifier(self.bare, self.task)))
            if self.head is not None:
                stack.enter_context(skip_lm_head(self.bare, self.head, fed.append))
            outputs = self.model(**given)
            features = pooled_features(self.task, heard[-1], mask, inputs, self.bare.config) if heard else None
        target = None
        if TeacherSignal.LOGITS in needs:
            target = (
                self._from_head(fed[0][mask.to(fed[0].device)], max_logits, mask.device)
                if self.head is not None
                else self._from_logits(outputs.logits[mask])
            )
        return TeacherSignals(
            target=target,
            hidden_states={layer: hidden_states_of(outputs)[layer] for layer in layers},
            features=features,
            weight=self.weight,
        )

    def _from_head(self, hidden: Tensor, max_logits: int, device: torch.device) -> Callable[[slice], DenseTarget]:
        """Return what makes logits where the head is, which may be another device, and hands them over to `device`."""
        head = self.head
        assert head is not None
        ahead = max(1, max_logits // head.module.weight.shape[0])
        held: Tensor | None = None
        first = 0

        def rows(chosen: slice) -> DenseTarget:
            """Few rows are asked for at a time, one after the other; a product with the whole head is worth it for many."""
            nonlocal held, first
            start, stop, _ = chosen.indices(len(hidden))
            if held is None or not first <= start <= stop <= first + len(held):
                held, first = None, start
                # In the teacher's own precision, whatever the student's is.
                with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
                    held = head.logits(hidden[start : max(stop, start + ahead)]).to(device)
            return DenseTarget(align_logits(held[start - first : stop - first], self.classes, self.order))

        return rows

    def _from_logits(self, logits: Tensor) -> Callable[[slice], DenseTarget]:
        return lambda chosen: DenseTarget(align_logits(logits[chosen], self.classes, self.order))


def non_finite_signals_error(
    inputs: Mapping[str, Any], mask: Tensor, said: Sequence[TeacherSignals], step: int
) -> TeacherError | None:
    """Return the error for a teacher whose signals have NaN or infinity: it names the examples of the batch, and the step."""
    rows = torch.arange(len(mask), device=mask.device)
    of_items = rows[:, None].expand(mask.shape)[mask] if mask.ndim == 2 else rows[mask]
    for number, signals in enumerate(said):
        wrong: set[int] = set()
        if signals.target is not None:
            target = signals.target(slice(None))
            # Classes that it rules out may be at -inf, but not the largest.
            largest = (target.logits if isinstance(target, DenseTarget) else target.log_probs).amax(-1)
            wrong |= set(of_items[~torch.isfinite(largest)].tolist())
        if signals.features is not None:
            wrong |= set(of_items[~torch.isfinite(signals.features).all(-1)].tolist())
        for hidden in signals.hidden_states.values():
            wrong |= set(rows[~torch.isfinite(hidden.flatten(1)).all(-1)].tolist())
        if wrong:
            ids = inputs.get("input_ids")
            shown = f", which begins with the tokens {ids[min(wrong)][:8].tolist()}" if isinstance(ids, Tensor) else ""
            return TeacherError(
                f"Teacher {number} says NaN or infinity of {len(wrong)} of {len(mask)} examples at step {step}: the first is "
                f"number {min(wrong)} of the batch{shown}. Run the teacher in a wider dtype (bfloat16 or float32), or "
                "leave the example out."
            )
    return None
