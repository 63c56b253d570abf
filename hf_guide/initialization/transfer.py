"""Apply a plan: compute each of the student's parameters from its teacher's, one tensor at a time.

A large tensor is read, contracted and stored a few thousand rows at a time.

The rule (methods of GUIDE, arXiv 2510.06502, and SliceGPT's invariance, arXiv 2401.15024): every projected axis is contracted
with its basis M, every other axis is selected; the gain c of a norm is folded into the weights W that read it,
W diag(c) M sqrt(d_T / d_S), so that for a residual stream inside span(M) the student computes what the teacher does.
"""

import functools
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hf_guide.errors import ShapeError, TeacherError
from hf_guide.initialization.basis import (
    ResidualBasis,
    embedding_second_moments,
    explained_variance,
    fit_basis,
    fit_channel_selection,
    fit_embedding_basis,
    norm_retained,
)
from hf_guide.initialization.build import init_missing_weights, untie_like_teacher
from hf_guide.initialization.config import PlanOptions
from hf_guide.initialization.norm_folding import NormFolding
from hf_guide.initialization.plan import READ_BYTES, ParameterPlan, Plan, is_constant
from hf_guide.initialization.planning import make_plan
from hf_guide.initialization.report import InitializationReport, ParameterRecord
from hf_guide.initialization.selection import evenly_spaced_indices
from hf_guide.initialization.tensor_names import is_parameter, unique_tensors
from hf_guide.layouts.grammar import (
    AxisConcat,
    AxisMap,
    AxisName,
    Identity,
    Projection,
    Selection,
    apply_selection,
    axis_size,
    name_and_repeats,
    project_axis,
    solve_sizes,
)
from hf_guide.layouts.registry import PREFIX_AXES, BlockTransfer, Layout, config_sizes
from hf_guide.teachers.checkpoint import TeacherCheckpoint
from hf_guide.utils.finite import is_finite, overflow_advice
from hf_guide.utils.half_precision import multiplies_in

MIN_BFLOAT16_PRODUCTS = 1e9
"""Multiplications of a product from which bfloat16 is used: below, float32 takes no more than a few hundredths of a second."""


@torch.no_grad()
def transfer_weights(
    student: PreTrainedModel,
    teacher: TeacherCheckpoint,
    layout: Layout,
    options: PlanOptions,
    *,
    vocab_indices: Tensor | None = None,
    label_indices: Tensor | None = None,
    bases: dict[str, Tensor] | None = None,
    show_progress: bool = False,
) -> InitializationReport:
    """Fill `student`, whose parameters may be uninitialized, from `teacher`; return where each came from.

    Args:
        vocab_indices: Teacher row of each of the student's vocabulary rows, -1 for a row of zeros; None for all in order.
        label_indices: The same for a classification head; empty where the labels disagree and the head is new.
        bases: A basis by projected axis, (d_T, d_S) with orthonormal columns, instead of a fitted one.

    Raises:
        ShapeError, LayoutError: What the plan finds wrong, before any weight is read.
        TeacherError: Weights that are truncated or not finite.
    """
    started = time.perf_counter()
    untie_like_teacher(student, teacher)
    plan = make_plan(student, teacher, layout, options, vocab_indices=vocab_indices, label_indices=label_indices)
    plan.bases = dict(bases or {})
    transfer, fitted = fit_bases(plan)
    basis_seconds = time.perf_counter() - started
    transfer.fill_parameters(student, show_progress=show_progress)
    seconds = {"basis": basis_seconds, "transfer": time.perf_counter() - started - basis_seconds}
    return transfer.report(student, fitted, seconds)


def projected_axes(plan: Plan) -> list[str]:
    """Return the axes that are contracted with a basis."""
    if not plan.options.projects:
        return []
    return [axis for axis, (teacher, student) in plan.widths.items() if teacher != student or axis in plan.bases]


def fit_bases(
    plan: Plan, activations: Mapping[str, Tensor] | None = None, *, channels: bool = False
) -> "tuple[Transfer, dict[str, ResidualBasis]]":
    """Fit a basis for each projected axis that has none; return the transfer and the bases that were fitted.

    Args:
        activations: Second moment by axis, (d_T, d_T), to fit to instead of that of the embedding tables.
        channels: Keep the channels with the largest second moment of the activations instead of principal directions.
    """
    axes, moments = projected_axes(plan), EmbeddingMoments(plan)
    centered = plan.layout.norm == "layer"
    fitted: dict[str, ResidualBasis] = {}
    for axis in axes:
        if axis in plan.bases:
            continue
        if activations is not None and axis in activations:
            moment, size = activations[axis], plan.widths[axis][1]
            fitted[axis] = (
                fit_channel_selection(moment, size) if channels else fit_basis(moment, size, keep_mean=centered)
            )
        else:
            fitted[axis] = fit_embedding_basis(plan, axis, moments)
    plan.bases.update({axis: basis.matrix for axis, basis in fitted.items()})
    measured = activations or {}
    retained = {
        axis: norm_retained(measured[axis] if axis in measured else moments[axis], plan.bases[axis], centered=centered)
        for axis in axes
    }
    return Transfer(plan, moments, retained, torch.promote_types(plan.teacher.dtype, torch.float32)), fitted


class EmbeddingMoments(dict[str, Tensor]):
    """By axis the second moment of the embedding tables, (d_T, d_T), float64; each is computed when it is first needed."""

    def __init__(self, plan: Plan):
        super().__init__()
        self._plan = plan

    def __missing__(self, axis: str) -> Tensor:
        self[axis] = embedding_second_moments(self._plan, [axis])[axis]
        return self[axis]


@dataclass
class Transfer:
    """A plan with its bases: computes every parameter of the student.

    Attributes:
        plan: Where each parameter comes from; its bases are fitted.
        moments: By axis, the second moment E^T E of the embedding tables, (d_T, d_T), float64.
        norm_retained: By axis, the fraction |x_S| / |x_T| of the vectors' norm that the projection retains.
        dtype: Of the arithmetic, float32 or better.
        notes: What could not be transferred exactly.
        steps: By the student's parameter, what was folded, scaled or fitted.
        norm_biases: Biases of the student's folded norms that were computed already.
    """

    plan: Plan
    moments: dict[str, Tensor]
    norm_retained: dict[str, float]
    dtype: torch.dtype
    notes: list[str] = field(default_factory=list)
    steps: dict[str, list[str]] = field(default_factory=dict)
    norm_biases: dict[str, Tensor] = field(default_factory=dict)

    @functools.cached_property
    def folding(self) -> NormFolding:
        """Which norms have their gain folded into other weights."""
        return NormFolding(self.plan)

    def fill_parameters(self, student: PreTrainedModel, *, show_progress: bool = False) -> None:
        """Fill every parameter of `student`: from its teacher where the plan has a source, else by the model's own init."""
        tensors, _ = unique_tensors(student)
        planned = [
            parameter
            for parameter in self.plan.parameters.values()
            if parameter.name not in self.plan.random_parameters
        ]
        following = [*(parameter.source for parameter in planned[1:]), None]
        progress = tqdm(planned, desc="initializing", unit="tensor", disable=not show_progress)
        for parameter, next_source in zip(progress, following, strict=True):
            if next_source is not None:
                self.plan.teacher.weights.prefetch(self.plan.teacher_names[next_source])
            target = tensors[parameter.name]
            for rows in self.row_blocks(parameter):
                value = self.parameter_value(parameter, rows)
                part = target.data if rows is None else target.data[slice(*rows)]
                part.copy_(value)
                if is_parameter(target):
                    check_no_overflow(part, value, parameter.name)
            target._is_hf_initialized = True  # type: ignore[attr-defined]  # Transformers' mark: initialize_weights skips it
        init_missing_weights(student, self.plan.options.seed)

    def row_blocks(self, parameter: ParameterPlan) -> "list[tuple[int, int] | None]":
        """Return the rows of the student's parameter that are computed together; None for the whole parameter.

        They are those that about `READ_BYTES` of the teacher's tensor are read for. Rows depend on each other where the first
        axis is projected, where it has terms that read different norms, and where a layout or a rotation changes the tensor.
        """
        plan, row = self.plan, parameter.match.row
        depends = (
            row.kind not in ("weight", "table")
            or parameter.match.is_bias
            or parameter.source is None
            or parameter.source in plan.tensor_transforms
            or row.pattern in plan.layout.block_value
            or len(row.input_norms) > 1
        )
        if depends or len(parameter.shape) < 2 or isinstance(plan.maps(parameter)[0], Projection):
            return [None]
        assert parameter.source_shape is not None
        stored = plan.teacher.weights.dtype(plan.teacher_names[parameter.source or ""]).itemsize
        count = parameter.shape[0]
        step = max(1, count * READ_BYTES // max(1, parameter.source_shape.numel() * stored))
        return [(start, min(start + step, count)) for start in range(0, count, step)] if step < count else [None]

    def teacher_norm(self, norm: str, parameter: ParameterPlan, part: str) -> Tensor | None:
        """Return the gain or bias, float64, of the teacher's norm in front of `parameter`'s source; None where it has none."""
        name = self.folding.name(norm, parameter, of_teacher=True) + (".bias" if part == "bias" else ".weight")
        if name not in self.plan.teacher_names:
            bare = name.rpartition(".")[0]
            if part == "bias" or bare not in self.plan.teacher_names:
                return None
            name = bare
        return self.plan.read(name).double() + (self.plan.layout.norm_offset if part == "weight" else 0.0)

    def scale(self, axis: str) -> float:
        """Return sqrt(d_T / d_S), times the fraction of the norm that is retained where that is corrected."""
        teacher, student = self.plan.widths[axis]
        return math.sqrt(teacher / student) * (self.norm_retained[axis] if self.plan.options.norm_correction else 1.0)

    def residual_gain_rms(self, norm: str, gain: Tensor | None) -> float | None:
        """Return the root mean square of a folded gain, which stays in the student's norm; None where that has no gain.

        W diag(c) is divided by it. That changes only how fast the weights learn: Adam moves each weight by about the
        learning rate, so weights scaled by a gain of 0.01 would be lost in one step. The norm keeps sqrt(d_T / d_S) too.
        """
        if gain is None or not {norm, f"{norm}.weight"} & self.plan.parameters.keys():
            return None
        return root_mean_square(gain) or None

    def output_gain(self, parameter: ParameterPlan) -> Tensor | None:
        """Return the gain folded into the output of `parameter`, None for none; a learned diagonal is divided by its rms."""
        scale = self.folding.output_gain_name(parameter)
        gain = self.teacher_norm(scale, parameter, "weight") if scale else None
        if gain is None or scale != parameter.match.row.output_diagonal:
            return gain
        return gain / (root_mean_square(gain) or 1.0)

    def residual_stream_scale(self, parameter: ParameterPlan) -> float:
        """Return the factor on what `parameter` adds to the student's residual stream.

        It is 1 except where the norm before a tied head has no gain that could hold sqrt(d_T / d_S) (OLMo). The norms of a
        pre-norm model ignore the scale of the residual stream, so everything that is added to it is multiplied by the factor.
        """
        if not self.folding.axes_without_final_gain or parameter.source is None:
            return 1.0
        row = parameter.match.row
        is_lookup = row.kind == "table" or any(AxisName(name) in parameter.axes for name in PREFIX_AXES)
        for dim, (axis, chosen) in enumerate(zip(parameter.axes, self.plan.maps(parameter), strict=True)):
            writes = is_lookup or parameter.match.is_bias or dim != row.input_axis
            if (
                isinstance(axis, AxisName)
                and axis.name in self.folding.axes_without_final_gain
                and isinstance(chosen, Projection)
                and writes
            ):
                factor = (
                    self.scale(axis.name)
                    * self.ratio(self.plan.layout.tied_head_scale)
                    / self.ratio(self.plan.layout.embedding_scale)
                    * self.plan.options.logit_scale
                )
                self.record_step(
                    parameter, f"times {factor:.6g}: the norm before the tied head has no gain to hold it"
                )
                if self.plan.options.logit_scale != 1.0:
                    self.record_step(parameter, f"logits times {self.plan.options.logit_scale:.6g}")
                return factor
        return 1.0

    def ratio(self, scale: object) -> float:
        """Return the teacher's value of a factor that depends on the config over the student's; 1 for no factor."""
        if not callable(scale):
            return 1.0
        return float(scale(self.plan.teacher.config)) / float(scale(self.plan.student_config))

    def record_step(self, parameter: ParameterPlan, step: str) -> None:
        """Record what was done to a parameter, once."""
        steps = self.steps.setdefault(parameter.name, [])
        if step not in steps:
            steps.append(step)

    def weight_value(
        self,
        parameter: ParameterPlan,
        vectors: Sequence[Tensor | None] | None = None,
        rows: "tuple[int, int] | None" = None,
    ) -> Tensor:
        """Return a weight's value; with `vectors`, the product of the weight with them instead.

        Args:
            vectors: One vector (d_T,) on the teacher's input axis for each term of the output axis, None for zeros. The
                result has the student's output axis alone.
            rows: Those of the student's parameter to compute, of `row_blocks`; None for all.
        """
        row = parameter.match.row
        tensor, maps = self._read(parameter, rows)
        if not maps:
            return tensor
        for dim, chosen in enumerate(maps):
            if isinstance(chosen, Selection):
                tensor = apply_selection(tensor, dim, chosen)
        output = len(maps) - 1 if row.transposed else 0
        terms = self._terms(parameter, tensor.shape[output]) if len(row.input_norms) > 1 else [tensor.shape[output]]
        pieces = []
        for number, piece in enumerate(tensor.split(terms, dim=output)):
            read = row.input_norms[number] if row.input_norms else None
            pieces.append(self._contract(parameter, piece, read, None if vectors is None else (vectors[number],)))
        result = torch.cat(pieces, dim=0 if vectors is not None else output) if len(pieces) > 1 else pieces[0]
        for dim, chosen in enumerate(maps):
            if isinstance(chosen, Selection) and _is_scaled(chosen):
                if vectors is not None and dim != output:
                    continue
                shape = [1] * result.ndim
                shape[0 if vectors is not None else dim] = -1
                result = result.to(self.dtype) * chosen.factors.view(shape).to(self.dtype)
        return result

    def _read(self, parameter: ParameterPlan, rows: "tuple[int, int] | None") -> "tuple[Tensor, list[AxisMap]]":
        """Return the teacher's tensor, or what of it some of the student's rows come from, and the maps of its axes."""
        assert parameter.source is not None
        maps = self.plan.maps(parameter)
        if rows is None:
            return self.plan.read(parameter.source), maps
        first = maps[0]
        if not isinstance(first, Selection):
            return self.plan.read(parameter.source, rows), maps
        indices = first.indices[slice(*rows)]
        present = indices[indices >= 0]
        low, high = (int(present.min()), int(present.max()) + 1) if len(present) else (0, 1)
        shifted = Selection((indices - low).where(indices >= 0, -1), first.factors[slice(*rows)], first.size)
        return self.plan.read(parameter.source, (low, high)), [shifted, *maps[1:]]

    def product_dtype(self, parameter: ParameterPlan, stored: torch.dtype, numbers: int) -> torch.dtype:
        """Return what a product with one basis is computed in: bfloat16 where both models and the processor have it.

        Its products are summed in float32 and rounded once, to what the student stores; what is added to that is the rounding
        of the basis, of the same size.

        Args:
            stored: What the teacher's tensor is stored in.
            numbers: How many of its numbers are multiplied.
        """
        maps = self.plan.maps(parameter)
        sizes = [chosen.matrix.shape[1] for chosen in maps if isinstance(chosen, Projection)]
        in_bfloat16 = (
            stored == parameter.dtype == torch.bfloat16 and len(sizes) == 1 and not any(map(_is_scaled, maps))
        )
        large = in_bfloat16 and numbers * sizes[0] >= MIN_BFLOAT16_PRODUCTS
        return torch.bfloat16 if large and multiplies_in(torch.bfloat16) else self.dtype

    def _terms(self, parameter: ParameterPlan, total: int) -> list[int]:
        output = parameter.match.row.output_axis
        assert isinstance(output, AxisConcat)
        sizes = solve_sizes(
            parameter.axes, parameter.shape, config_sizes(self.plan.layout, self.plan.student_config), parameter.name
        )
        return [axis_size(term, sizes) or total for term in output.terms]

    def _contract(
        self, parameter: ParameterPlan, tensor: Tensor, norm: str | None, vector: "tuple[Tensor | None] | None"
    ) -> Tensor:
        """Contract one piece of a weight along its projected axes, with the norm it reads and the scale that follows it."""
        row, maps = parameter.match.row, self.plan.maps(parameter)
        for dim, chosen in enumerate(maps):
            if not isinstance(chosen, Projection):
                if vector is not None and dim == row.input_axis:
                    raise TeacherError(f"{parameter.name}: a norm's bias can only be folded along a projected axis.")
                continue
            axis, times = name_and_repeats(parameter.axes[dim])
            diagonal, factor, matrix = None, 1.0, chosen.matrix
            if dim == row.input_axis and vector is not None:
                matrix = (
                    torch.zeros(chosen.matrix.shape[0], dtype=torch.float64)
                    if vector[0] is None
                    else vector[0].repeat(times)
                )[:, None]
            elif (
                dim == row.input_axis
                and norm is not None
                and self.folding.is_folded(self.folding.name(norm, parameter, of_teacher=False))
            ):
                diagonal = self.teacher_norm(norm, parameter, "weight")
                rms = self.residual_gain_rms(self.folding.name(norm, parameter, of_teacher=False), diagonal)
                factor = self.scale(axis) if rms is None else 1.0 / rms
                self.record_step(
                    parameter,
                    f"gain of {self.folding.name(norm, parameter, of_teacher=True)} folded, times {factor:.6g}",
                )
            elif dim != row.input_axis:
                diagonal = self.output_gain(parameter)
            diagonal = diagonal if diagonal is None else diagonal.repeat(times)
            if factor != 1.0:
                diagonal = (
                    torch.full((len(matrix),), factor, dtype=matrix.dtype) if diagonal is None else diagonal * factor
                )
            dtype = self.dtype if vector is not None else self.product_dtype(parameter, tensor.dtype, tensor.numel())
            tensor = project_axis(tensor, dim, matrix, dtype, diagonal=diagonal)
        return tensor.squeeze(row.input_axis) if vector is not None else tensor

    def note(self, note: str) -> None:
        """Record what could not be transferred exactly, once."""
        if note not in self.notes:
            self.notes.append(note)

    def parameter_value(self, parameter: ParameterPlan, rows: "tuple[int, int] | None" = None) -> Tensor:
        """Return the student's parameter, or some rows of it (see `row_blocks`), in the transfer's dtype or the teacher's."""
        result = self._adjust_for_block_index(parameter, self._base_value(parameter, rows))
        logit_scale = self.plan.options.logit_scale
        row = parameter.match.row
        if logit_scale == 1.0:
            return result
        if row.kind == "norm" and self.folding.is_tied(parameter.module):
            offset = 0.0 if parameter.canonical.endswith(".bias") else self.plan.layout.norm_offset
            self.record_step(parameter, f"logits times {logit_scale:.6g}")
            return (result.to(self.dtype) + offset) * logit_scale - offset
        is_logit_bias = parameter.axes == (AxisName("vocab"),)  # also one next to a tied head
        if is_logit_bias or (row.kind == "weight" and row.input_norms and AxisName("vocab") in row.axes):
            self.record_step(parameter, f"logits times {logit_scale:.6g}")
            return self._scaled(result, logit_scale)
        return result

    def _adjust_for_block_index(self, parameter: ParameterPlan, value: Tensor) -> Tensor:
        """Adjust a parameter of a block to the student's block index and depth."""
        plan, row = self.plan, parameter.match.row
        factor = plan.block_ratio(parameter, plan.layout.block_scale.get(row.pattern))
        if factor != 1.0:
            self.record_step(
                parameter, f"times {factor:.6g}: the model scales it by the block's index or by the depth"
            )
            value = self._scaled(value, factor)
        change = plan.layout.block_value.get(row.pattern)
        if change is not None and parameter.block is not None and parameter.source is not None:
            block = plan.teacher_block(parameter)
            home = row.pattern.partition("{block}")[0] + str(block)

            def read(name: str) -> Tensor:
                return plan.read(f"{home}.{name}")

            changed = change(
                value, BlockTransfer(plan.teacher.config, block, plan.student_config, parameter.block, read)
            )
            if changed is not value:
                self.record_step(parameter, "changed for the block's index: see block_value of the layout")
            return changed
        return value

    def _base_value(self, parameter: ParameterPlan, rows: "tuple[int, int] | None") -> Tensor:
        if parameter.match.row.kind == "norm":
            return self._norm_value(parameter)
        if parameter.match.is_bias:
            return self._scaled(self._bias_value(parameter), self.residual_stream_scale(parameter))
        row = parameter.match.row
        result = self._scaled(self.weight_value(parameter, rows=rows), self.residual_stream_scale(parameter))
        if row.kind == "table" and AxisName("vocab") in row.axes and self.plan.options.projects:
            ratio = self.ratio(self.plan.layout.embedding_scale)
            if ratio != 1.0:
                self.record_step(parameter, f"times {ratio:.6g}: the model multiplies its embeddings by its width")
                result = self._scaled(result, ratio)
        if row.pattern in self.plan.layout.scales and self.plan.options.projects:
            ratio = self.ratio(self.plan.layout.scales[row.pattern])
            if ratio != 1.0:
                self.record_step(
                    parameter, f"times {ratio:.6g}: what it is added to is multiplied by the model's width"
                )
                result = self._scaled(result, ratio)
        if row.kind != "table" and AxisName("vocab") in row.axes and row.input_norms:
            ratio = self.ratio(self.plan.layout.tied_head_scale)
            result = self._scaled(result, ratio)
        return result

    def _bias_value(self, parameter: ParameterPlan) -> Tensor:
        """Return a bias: the teacher's, selected or projected, plus W b for the bias b of a folded norm."""
        row = parameter.match.row
        weight = self.plan.parameters.get(parameter.canonical.removesuffix("bias") + "weight")
        if parameter.source is not None:
            (chosen,) = self.plan.maps(parameter)
            result = self.plan.read(parameter.source)
            if isinstance(chosen, Selection):
                result = apply_selection(result, 0, chosen).to(self.dtype) * chosen.factors.to(self.dtype)
            elif isinstance(chosen, Projection):
                result = project_axis(result, 0, chosen.matrix, self.dtype, diagonal=self.output_gain(parameter))
        else:
            result = torch.zeros(parameter.shape, dtype=self.dtype)
        if (
            weight is not None
            and weight.source is not None
            and any(self._folds_bias(norm, weight) for norm in row.input_norms)
        ):
            result = result.to(self.dtype) + self._folded_norm_bias(weight)
            self.record_step(parameter, "includes the bias of the norm before it")
        elif parameter.source is None:
            self.record_step(parameter, "zero: the teacher has none")
        return result

    def _folds_bias(self, norm: str | None, parameter: ParameterPlan) -> bool:
        if norm is None or not isinstance(self.plan.maps(parameter)[parameter.match.row.input_axis], Projection):
            return False
        return (
            self.folding.is_folded(self.folding.name(norm, parameter, of_teacher=False))
            and self.teacher_norm(norm, parameter, "bias") is not None
        )

    def _folded_norm_bias(self, weight: ParameterPlan) -> Tensor:
        """Return W b for the bias b of the norm before `weight`, minus the product with the student's own norm bias."""
        reads = weight.match.row.input_norms
        vectors = [self.teacher_norm(norm, weight, "bias") if norm else None for norm in reads]
        result = self.weight_value(weight, vectors)
        result = result.flatten(1).sum(1) if result.ndim > 1 else result  # of a convolution, over its kernel
        norm = self.folding.name(reads[0] or "", weight, of_teacher=False)
        own = self._norm_bias(norm)
        if own is not None and bool(own.any()):
            student = self.weight_value(weight).movedim(weight.match.row.input_axis, -1)
            student = student.flatten(1, -2).sum(1) if student.ndim > 2 else student
            result = result - student @ own.repeat(student.shape[-1] // len(own)).to(student)
        return result

    def _norm_value(self, parameter: ParameterPlan) -> Tensor:
        """Return a norm's gain or bias, or another learned diagonal."""
        assert parameter.source is not None
        layout, maps = self.plan.layout, self.plan.maps(parameter)
        chosen = maps[-1]
        is_bias = parameter.canonical.endswith(".bias")
        stored = self.plan.read(parameter.source)
        offset = 0.0 if is_bias else layout.norm_offset
        if all(isinstance(each, Identity) for each in maps):
            return stored
        if not isinstance(chosen, Projection):
            selected = stored.to(self.dtype) + offset
            for dim, each in enumerate(maps):
                if isinstance(each, Selection):
                    selected = apply_selection(selected, dim, each) * each.factors.to(self.dtype).view(
                        -1, *[1] * (selected.ndim - 1 - dim)
                    )
            return selected - offset
        axis = parameter.axes[-1]
        assert isinstance(axis, AxisName)
        norm = parameter.module
        matrix, gain = chosen.matrix, stored.double() + offset
        if norm in self.folding.learned_scales:
            self.record_step(parameter, "folded into the weights it multiplies, its root mean square left")
            return torch.full(parameter.shape, (root_mean_square(gain) or 1.0) - offset, dtype=self.dtype)
        if (writer := self.folding.writers.get(norm)) is not None and not is_bias:
            self.record_step(parameter, f"folded into {writer.name}, whose output it normalizes; one number is left")
            self.note(
                f"{parameter.name}: its gain is folded into {writer.name}, before the norm, which then normalizes by "
                "another length."
            )
            return torch.full(parameter.shape, self._output_norm_ratio(writer) - offset, dtype=self.dtype)
        if self.folding.is_folded(norm):
            self.record_step(parameter, "folded into the weights that read it, its root mean square left")
            if is_bias and (bias := self._norm_bias(norm)) is not None:
                return bias.to(self.dtype)
            rms = None if is_bias else self.residual_gain_rms(norm, gain)
            value = (0.0 if is_bias else 1.0) if rms is None else rms * self.scale(axis.name)
            return torch.full(parameter.shape, value - offset, dtype=self.dtype)
        head_scale = (
            self.ratio(layout.tied_head_scale) / self.ratio(layout.embedding_scale)
            if self.folding.is_tied(norm)
            else 1.0
        )
        if is_bias:
            return (gain @ matrix * head_scale).to(self.dtype)
        if self.folding.is_tied(norm):
            diagonal = fit_tied_gain(self.moments[axis.name], matrix, gain) * head_scale
            self.record_step(parameter, "fitted in the logits of the tied head")
            self.note(
                f"{parameter.name}: the head is tied to the embedding table, so the gain before it is fitted, "
                "not folded; tie_word_embeddings=False folds it exactly."
            )
        else:
            diagonal = (matrix * (gain[:, None] * matrix)).sum(0)
            self.record_step(parameter, "diagonal of the projected gain")
            if not chosen.is_selection and not is_constant(gain):
                self.note(
                    f"{parameter.name}: {self._why_not_folded(norm)}; the diagonal of the projected gain approximates it."
                )
        return (diagonal * self.scale(axis.name) - offset).to(self.dtype)

    def _norm_bias(self, norm: str) -> Tensor | None:
        """Return the bias of a folded norm of the student, (d_S,) float64; None where it has none.

        It is zero where every weight that reads the norm has a bias to absorb it; otherwise the least-squares solution of
        W_S b_S = W b over the weights without a bias.
        """
        if norm + ".bias" not in self.plan.parameters:
            return None
        if norm not in self.norm_biases:
            parameter = self.plan.parameters[norm + ".bias"]
            width, length = parameter.shape[0], 0.0
            normal, right = torch.zeros(width, width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)
            for reader in self.folding.readers[norm]:
                if reader.match.is_bias or reader.canonical.removesuffix("weight") + "bias" in self.plan.parameters:
                    continue
                if not isinstance(self.plan.maps(reader)[reader.match.row.input_axis], Projection):
                    continue  # the channels of a later block are selected, not projected
                vectors = [
                    self.teacher_norm(read, reader, "bias") if read else None for read in reader.match.row.input_norms
                ]
                target = self.weight_value(reader, vectors).double().flatten()
                weight = self.weight_value(reader).movedim(reader.match.row.input_axis, -1).reshape(-1, width).double()
                normal += weight.T @ weight
                right += weight.T @ target
                length += target.square().sum().item()
            bias = torch.linalg.pinv(normal, hermitian=True) @ right
            lost = math.sqrt(max(0.0, 1 - (bias @ right).item() / length)) if length else 0.0
            if lost > 1e-6:
                self.note(f"{parameter.name}: fitted for weights without a bias; {lost:.1%} of the teacher's is lost.")
            self.norm_biases[norm] = bias
        return self.norm_biases[norm]

    def _output_norm_ratio(self, writer: ParameterPlan) -> float:
        """Return sqrt(d_T / d_S) |M^T diag(c) W| / |W|, the gain that replaces c of a norm after the weight W.

        The norm divides by |M^T diag(c) W h| instead of |W h|. Their ratio is that of the weights' norms for a white h, and
        exactly so where c is constant and nothing is cut.
        """
        assert writer.source is not None
        tensor, width = self.plan.read(writer.source), (1, 1)
        for dim, chosen in enumerate(self.plan.maps(writer)):
            if isinstance(chosen, Selection):
                tensor = apply_selection(tensor, dim, chosen)
            elif isinstance(chosen, Projection):
                width = self.plan.widths[str(writer.axes[dim])]
        teacher, student = width
        length = self.weight_value(writer).double().norm() / tensor.double().norm()
        return math.sqrt(teacher / student) * length.item()

    def _why_not_folded(self, norm: str) -> str:
        if not self.plan.options.fold_norms:
            return "norms are not folded in this plan"
        match = self.plan.layout.find(norm + ".weight")
        if match is not None and any(match.row.pattern in row.input_norms for row in self.plan.layout.rows):
            return "no weight that reads it came from the teacher, so its gain is not folded"
        return "its output goes onto the residual stream, so its gain cannot be folded"

    def _scaled(self, value: Tensor, factor: float) -> Tensor:
        return value if factor == 1.0 else value.to(self.dtype) * factor

    def report(
        self, student: PreTrainedModel, fitted: Mapping[str, ResidualBasis], seconds: dict[str, float]
    ) -> InitializationReport:
        """Return where each parameter of `student` came from.

        Args:
            fitted: The bases that were fitted, by axis.
            seconds: Time by step.
        """
        plan = self.plan
        notes = [*plan.notes, *self.notes] + [
            f"{name}: the student has no parameter for it" for name in plan.dropped_parameters
        ]
        notes += plan.rope_mismatch_notes()
        scaled = any("logits times" in step for steps in self.steps.values() for step in steps)
        if plan.options.logit_scale != 1.0 and not scaled:
            notes.append(
                "logit_scale found no norm or weight of the teacher's that makes logits, and changed nothing."
            )
        return InitializationReport.begin(
            student,
            plan.teacher,
            blocks=plan.report_blocks(),
            explained_variance={
                axis: explained_variance(basis.eigenvalues).tolist() for axis, basis in fitted.items()
            },
            variance_explained={axis: basis.explained for axis, basis in fitted.items()},
            heads=plan.selected_heads_by_block(),
            sizes={axis: list(sizes) for axis, sizes in plan.widths.items()},
            parameters=self.records(student),
            approximations=notes,
            randomly_initialized=list(plan.random_parameters),
            seconds=seconds,
            bases={
                axis: plan.bases[axis] if axis in plan.bases else torch.tensor(evenly_spaced_indices(teacher, student))
                for axis, (teacher, student) in plan.widths.items()
                if teacher != student
            },
        )

    def records(self, student: PreTrainedModel) -> list[ParameterRecord]:
        """Return where each parameter of `student` comes from."""
        plan, records = self.plan, []
        by_name = {parameter.name: parameter for parameter in plan.parameters.values()}
        for name, tensor in unique_tensors(student)[0].items():
            record = ParameterRecord(name, list(tensor.shape), steps=self.steps.get(name, []))
            parameter = by_name.get(name)
            if parameter is not None and parameter.source is not None and name not in plan.random_parameters:
                record.source = plan.teacher_names[parameter.source]
                record.source_shape = list(parameter.source_shape or ())
                record.maps = [
                    f"{axis}: {map_description}"
                    for axis, map_description in zip(parameter.axes, plan.maps(parameter), strict=True)
                ]
            records.append(record)
        return records


def _is_scaled(chosen: AxisMap) -> bool:
    return isinstance(chosen, Selection) and not bool((chosen.factors == 1).all())


def root_mean_square(gain: Tensor) -> float:
    """Return sqrt(mean(c^2)) of a gain c."""
    return gain.square().mean().sqrt().item()


def fit_tied_gain(moment: Tensor, matrix: Tensor, gain: Tensor) -> Tensor:
    """Return the diagonal that approximates the gain c before a tied head, fitted in the logits.

    g_j = <E m_j, E diag(c) m_j> / |E m_j|^2 for column m_j of M, with `moment` E^T E, (d_T, d_T) float64.
    """
    image = moment @ matrix
    norms = (matrix * image).sum(0)
    fitted = (image * (gain[:, None] * matrix)).sum(0) / norms
    plain = (matrix * (gain[:, None] * matrix)).sum(0)
    return torch.where(norms > norms.max() * 1e-12, fitted, plain)


def check_no_overflow(stored: Tensor, value: Tensor, name: str) -> None:
    """Check that a student's parameter did not overflow when `value` was stored in its dtype.

    Raises:
        ShapeError: It did; states the largest value and the dtype's maximum.
    """
    if not is_finite(stored):
        raise ShapeError(
            f"{name} has values up to {value.abs().max().item():.3g}, more than {stored.dtype} holds "
            f"({torch.finfo(stored.dtype).max:.3g}). "
            + overflow_advice(stored.dtype, "Check the teacher's weights for extreme values")
        )
