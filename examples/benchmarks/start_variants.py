"""Variants of `calibrated` that small_shapes.py compares: each changes one ingredient. None of them is in the package."""

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_guide import AutoStudentForCausalLM, register_method
from hf_guide.calibration.batches import Batch
from hf_guide.initialization.basis import ResidualBasis
from hf_guide.initialization.transfer import Transfer, fit_bases, fit_tied_gain, root_mean_square
from hf_guide.layouts.grammar import Projection, Selection, apply_selection
from hf_guide.methods import CalibratedConfig, CalibratedMethod

Gradients = Callable[[], "list[tuple[Tensor, Tensor]]"]
Moment = Callable[[Gradients, Tensor], Tensor]
"""From a function that returns inputs and gradients, (tokens, d), of each reader of the residual stream, and the second
moment of that stream, (d, d): another moment to take a basis of."""
Weights = Callable[[Tensor], "dict[str, Tensor]"]
"""From a basis, (d_T, d_S), every parameter of the student by name."""

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


def _register(name: str, method: type[CalibratedMethod], **defaults: str) -> None:
    """Register a method whose config is that of `calibrated`, with other defaults."""
    identifier = name.replace(",", "").replace(" ", "_")
    defaults = {"method": identifier, **defaults}
    inherited = {each.name: each for each in dataclasses.fields(CalibratedConfig)}
    fields: dict[str, Any] = {
        key: dataclasses.field(default=value, metadata=inherited[key].metadata) for key, value in defaults.items()
    }
    fields["__annotations__"] = dict.fromkeys(defaults, str)
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


class Merged(CalibratedMethod):
    """What is not selected is merged into what is, before the refit.

    All neurons and heads are those of a student in the same basis that has as many as the teacher.
    """

    def collect(self, setup: Any) -> dict[str, list[float]]:
        """Collect as `calibrated`."""
        self.setup = setup
        return super().collect(setup)

    def _refit(self, student: Any, transfer: Any, *, show_progress: bool) -> Any:
        teacher = self.setup.teacher.config
        shape = {name: getattr(student.config, name) for name in ("hidden_size", "num_hidden_layers")}
        whole = ("intermediate_size", "num_attention_heads", "num_key_value_heads")
        shape |= {name: getattr(teacher, name) for name in whole}
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
        raise NotImplementedError


class MergedNeurons(Merged):
    """Each neuron that is not selected is averaged into the selected one that reads most alike, by its output's size."""

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


class MergedHeads(Merged):
    """The values of each head that is not selected are averaged into those of the selected one that writes most alike.

    Dimensions within a head have no order, so those of the one are turned onto those of the other first (Procrustes, on
    what computes them and on what the output projection makes of them). Each counts by the size of what it writes. Queries
    and keys are those of the selected heads.
    """

    def _merge(self, student: Any, wide: Any, chosen: "dict[str, Tensor]") -> None:
        kept, size = chosen["kv_heads"].tolist(), student.self_attn.head_dim
        values = wide.self_attn.v_proj.weight.unflatten(0, (-1, size))  # (kv_heads, l, d)
        outputs = wide.self_attn.o_proj.weight.unflatten(1, (len(values), -1, size))
        outputs = outputs.permute(1, 0, 2, 3).flatten(1, 2)  # (kv_heads, d group, l)
        sizes = (outputs @ values).square().sum((1, 2))
        sides = torch.cat([_of_norm_one(values), _of_norm_one(outputs).mT], 2)  # (kv_heads, l, d + d group)
        sums, totals = sizes[kept, None, None] * values[kept], sizes[kept].clone()
        for head in set(range(len(values))) - set(kept):
            left, likeness, right = torch.linalg.svd(sides[kept] @ sides[head].mT)
            target = likeness.sum(1).argmax()
            sums[target] += sizes[head] * (left[target] @ right[target] @ values[head])
            totals[target] += sizes[head]
        student.self_attn.v_proj.weight.copy_((sums / totals[:, None, None]).flatten(0, 1))


def _of_norm_one(weights: Tensor) -> Tensor:
    """Return matrices divided by their Frobenius norms."""
    return weights / weights.norm(dim=(1, 2), keepdim=True)


class OutputProjections(CalibratedMethod):
    """`calibrated` that refits the output projections alone."""


_register("neurons merged", MergedNeurons)
_register("heads merged", MergedHeads)
_register("output projections only", OutputProjections, refit="output_projections")
_register("heads merged, output projections only", MergedHeads, refit="output_projections")


class DistilledBasis(CalibratedMethod):
    """The basis of activations is trained: the divergence of the student that it makes, of which nothing is refitted."""

    steps: ClassVar[int]
    rate: ClassVar[float] = 0.03

    def _plan(self, student: Any, setup: Any) -> "tuple[Transfer, dict[str, ResidualBasis]]":
        transfer, fitted = super()._plan(student, setup)
        (axis,) = fitted
        moments = self.calibration.statistics.residual_second_moments
        matrix = self._train(student, as_function(transfer, axis, moments[axis]), fitted[axis].matrix, setup)
        plan = dataclasses.replace(transfer.plan, bases={axis: matrix}, _maps={}, _projections={})
        explained = ((matrix * (moments[axis] @ matrix)).sum() / moments[axis].trace()).item()
        trained = dataclasses.replace(fitted[axis], matrix=matrix, explained=explained)
        return dataclasses.replace(fit_bases(plan, moments)[0], notes=transfer.notes), {axis: trained}

    def _train(self, student: Any, weights: Weights, matrix: Tensor, setup: Any) -> Tensor:
        """Return the basis after Adam on whole batches of the calibration text, at a rate that falls linearly to zero."""
        teacher = AutoModelForCausalLM.from_pretrained(setup.teacher.name, dtype=torch.float32)
        batches = [batch["input_ids"] for batch in setup.calibration_dataset]
        targets = [teacher(input_ids=ids).logits.log_softmax(-1) for ids in batches]
        matrix = matrix.clone().requires_grad_()
        optimizer = torch.optim.Adam([matrix], lr=self.rate)
        model = copy.deepcopy(student)
        self.divergences: list[float] = []
        for step in range(self.steps):
            optimizer.param_groups[0]["lr"] = self.rate * (1 - step / self.steps)
            with torch.enable_grad():
                target = targets[step % len(batches)]
                output = torch.func.functional_call(
                    model, weights(matrix), kwargs={"input_ids": batches[step % len(batches)]}
                )
                divergence = torch.nn.functional.kl_div(
                    output.logits.log_softmax(-1).flatten(0, 1),
                    target.flatten(0, 1),
                    log_target=True,
                    reduction="batchmean",
                )
                (matrix.grad,) = torch.autograd.grad(divergence, matrix)
            optimizer.step()
            self.divergences.append(divergence.item())
            turned, upper = torch.linalg.qr(matrix)
            matrix.copy_(turned * upper.diagonal().sign())
        return matrix.detach()


def as_function(transfer: Transfer, axis: str, moment: Tensor) -> Weights:
    """Return what computes every parameter of a Llama from its basis, as `transfer` does but with gradients.

    Args:
        transfer: Blocks, heads and neurons are selected, norms are folded.
        axis: Of the residual stream.
        moment: That of the activations, (d_T, d_T), of which the basis keeps a part.
    """
    plan, parts = transfer.plan, []
    for parameter in plan.parameters.values():
        tensor, row = plan.read(parameter.source).double(), parameter.match.row
        is_projected = [isinstance(chosen, Projection) for chosen in plan.maps(parameter)]
        if row.kind == "norm":
            rms = transfer.residual_gain_rms(parameter.module, tensor)
            parts.append((parameter.name, tensor, rms if transfer.folding.is_folded(parameter.module) else None, -1))
            continue
        for dim, chosen in enumerate(plan.maps(parameter)):
            if isinstance(chosen, Selection):
                tensor = apply_selection(tensor, dim, chosen)
        dim = is_projected.index(True)
        if row.input_norms and dim == row.input_axis:
            gain = transfer.teacher_norm(row.input_norms[0], parameter, "weight")
            tensor = tensor * (gain / root_mean_square(gain))
        parts.append((parameter.name, tensor.movedim(dim, -1), None, dim))
    table = transfer.moments[axis]

    def weights(matrix: Tensor) -> dict[str, Tensor]:
        scale = ((matrix * (moment @ matrix)).sum() / moment.trace() * len(matrix) / matrix.shape[1]).sqrt()
        result = {}
        for name, tensor, rms, dim in parts:
            if dim >= 0:
                value = (tensor @ matrix).movedim(-1, dim)
            elif rms is not None:
                value = (rms * scale).expand(matrix.shape[1])
            else:
                value = scale * fit_tied_gain(table, matrix, tensor)
            result[name] = value.float()
        return result

    return weights


for count in (100, 300):
    _register(f"basis distilled, {count} steps", type("Distilled", (DistilledBasis,), {"steps": count}))
