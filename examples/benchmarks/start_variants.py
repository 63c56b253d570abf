"""Variants of `calibrated` that small_shapes.py compares: each changes one ingredient. None of them is in the package."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_guide import AutoStudentForCausalLM, register_method
from hf_guide.calibration.data import Batch
from hf_guide.methods import CalibratedConfig, CalibratedMethod

Gradients = Callable[[], "list[tuple[Tensor, Tensor]]"]
Moment = Callable[[Gradients, Tensor], Tensor]
"""From a function that returns inputs and gradients, (tokens, d), of each reader of the residual stream, and the second
moment of that stream, (d, d): another moment to take a basis of."""

STARTS: dict[str, str] = {"calibrated": "calibrated"}
"""The method by the name of each start."""


def with_moment(name: str, change: Moment) -> None:
    """Register a variant whose basis is that of another second moment."""

    class Variant(CalibratedMethod):
        def collect(self, setup: Any) -> dict[str, list[float]]:
            """Collect as `calibrated`, then change the moment of every residual stream."""
            influence = super().collect(setup)
            moments = self.calibration.statistics.residual_second_moments
            for axis, moment in moments.items():
                moments[axis] = change(
                    lambda: _gradients(setup.teacher.name, self.calibration.teacher.batches), moment
                )
            return influence

    _register(name, Variant)


def _register(name: str, method: type[CalibratedMethod]) -> None:
    identifier = name.replace(" ", "_")
    fields = {"__annotations__": {"method": str}, "method": identifier}
    register_method(identifier, dataclasses.dataclass(type("VariantConfig", (CalibratedConfig,), fields)), method)
    STARTS[name] = identifier


def _gradients(folder: str, batches: "Sequence[Batch]") -> "list[tuple[Tensor, Tensor]]":
    """Return, for each reader of the residual stream, inputs and gradients of the loss of labels, (tokens, d)."""
    teacher = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    pairs: list[tuple[Tensor, Tensor]] = []
    for batch in batches:
        held: list[Tensor] = []

        def keep(module: Any, args: Any, kwargs: Any, held: "list[Tensor]" = held) -> None:
            stream = args[0] if args else kwargs["hidden_states"]
            stream.retain_grad()
            held.append(stream)

        norms = [each for name, each in teacher.named_modules() if name.endswith("norm")]
        handles = [each.register_forward_pre_hook(keep, with_kwargs=True) for each in norms]
        with torch.enable_grad():
            ids = batch["input_ids"]
            table = teacher.get_input_embeddings()(ids).detach().requires_grad_()
            teacher(inputs_embeds=table, labels=ids).loss.backward()
        for handle in handles:
            handle.remove()
        teacher.zero_grad()
        pairs += [(each.detach().flatten(0, 1), each.grad.flatten(0, 1)) for each in held]  # type: ignore[union-attr]
    return pairs


def _gradient_moment(pairs: "list[tuple[Tensor, Tensor]]", width: int) -> Tensor:
    """Return the second moment, (d, d), of gradients relative to the length of their inputs."""
    total = torch.zeros(width, width, dtype=torch.float64)
    for stream, gradient in pairs:
        rows = (gradient * stream.norm(dim=-1, keepdim=True)).double()
        total += rows.mT @ rows
    return total


def weighted_tokens(gradients: Gradients, moment: Tensor) -> Tensor:
    """Return the moment with each token weighted by the squared norm of its gradient, relative to its scale."""
    total = torch.zeros_like(moment)
    for stream, gradient in gradients():
        norm = stream.norm(dim=-1, keepdim=True)
        rows = (stream / norm * (gradient * norm).norm(dim=-1, keepdim=True)).double()
        total += rows.mT @ rows
    return total


def with_gradients(gradients: Gradients, moment: Tensor) -> Tensor:
    """Return the sum of the second moments of activations and gradients, each of trace 1."""
    total = _gradient_moment(gradients(), len(moment))
    return moment / moment.trace() + total / total.trace()


def by_sensitivity(gradients: Gradients, moment: Tensor) -> Tensor:
    """Return the moment of the symmetric product of both: directions in which a change both occurs and matters."""
    total = _gradient_moment(gradients(), len(moment))
    values, vectors = torch.linalg.eigh(moment / moment.trace())
    root = vectors * values.clamp(min=0).sqrt() @ vectors.mT
    return root @ (total / total.trace()) @ root + 1e-3 * moment / moment.trace() / len(moment)


def outlier_channels(gradients: Gradients, moment: Tensor, count: int = 4) -> Tensor:
    """Return the moment with the channels of the largest second moments uncorrelated to the rest, and first."""
    largest = moment.diagonal().argsort(descending=True)[:count]
    moment = moment.clone()
    moment[largest] = 0
    moment[:, largest] = 0
    moment[largest, largest] = moment.trace()
    return moment


with_moment("tokens by their gradient", weighted_tokens)
with_moment("moments of gradients added", with_gradients)
with_moment("activations times gradients", by_sensitivity)
with_moment("four outlier channels kept", outlier_channels)

GROUP_RATES = {
    "table at a third of the rate": {"embed_tokens": 1 / 3},
    "table at three times the rate": {"embed_tokens": 3.0},
}
"""Starts of `calibrated` that differ in the learning rates of some parameters, by part of the name."""

STARTS |= dict.fromkeys(GROUP_RATES, "calibrated")


def group_rates(start: str, student: PreTrainedModel) -> "dict[str, float] | None":
    """Return by parameter the factor of its learning rate; None where all are trained at one rate."""
    factors = GROUP_RATES.get(start)
    if factors is None:
        return None
    return {
        name: next((factor for part, factor in factors.items() if part in name), 1.0)
        for name, _ in student.named_parameters()
    }


class MergedNeurons(CalibratedMethod):
    """Each neuron that is not selected is averaged into the selected one that reads most alike, by its output's size.

    All neurons are those of a student in the same basis that has as many as the teacher.
    """

    def collect(self, setup: Any) -> dict[str, list[float]]:
        """Collect as `calibrated`."""
        self.setup = setup
        return super().collect(setup)

    def _refit(self, student: Any, transfer: Any, *, show_progress: bool) -> Any:
        teacher = self.setup.teacher.config
        shape = {name: getattr(student.config, name) for name in ("hidden_size", "num_hidden_layers")}
        shape |= {name: getattr(teacher, name) for name in ("intermediate_size", "num_attention_heads")}
        wide = AutoStudentForCausalLM.from_teacher(
            self.setup.teacher.name,
            method={"method": "calibrated", "refit": "none", "fit_logit_scale": False, "seed": self.config.seed}
            | {"calibration_tokens": self.config.calibration_tokens},
            calibration_dataset=self.setup.calibration_dataset,
            dtype=torch.float32,
            show_progress=False,
            **shape,
        )
        chosen = transfer.plan.selected_indices
        for index, pair in enumerate(zip(student.model.layers, wide.model.layers, strict=True)):
            self._merge(
                *pair, {k: v for name, v in chosen.items() if f"layers.{index}." in name for k, v in v.items()}
            )
        return super()._refit(student, transfer, show_progress=show_progress)

    def _merge(self, student: Any, wide: Any, chosen: "dict[str, Tensor]") -> None:
        kept = chosen["mlp"]
        gate, up, down = (getattr(wide.mlp, name).weight for name in ("gate_proj", "up_proj", "down_proj"))
        weights = down.norm(dim=0).square() * up.norm(dim=1).square() * gate.norm(dim=1).square()
        unit = torch.nn.functional.normalize(torch.cat([gate, up], 1), dim=1)
        alike, target = (unit @ unit[kept].mT).clamp(min=0).max(1)
        share = (weights * alike.square())[:, None] * torch.nn.functional.one_hot(target, len(kept))
        share /= share.sum(0)
        for name, rows in (("gate_proj", gate), ("up_proj", up)):
            getattr(student.mlp, name).weight.copy_(share.mT.to(rows.dtype) @ rows)


_register("neurons merged", MergedNeurons)
