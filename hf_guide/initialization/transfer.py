"""A plan applied: what of a teacher's weights and norms stands in a student's, one teacher tensor at a time.

The rule (methods of GUIDE, arXiv 2510.06502, and SliceGPT's invariance, arXiv 2401.15024): every projected axis is contracted
with its basis M, every other axis is selected; the gain c of a norm is folded into the weights W that read it,
W diag(c) M sqrt(d_T / d_S), so that for a residual stream inside span(M) the student computes what the teacher does.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hf_guide.errors import TeacherError
from hf_guide.initialization.axes import (
    Name,
    Projection,
    Selection,
    Sum,
    apply_selection,
    axis_size,
    contract,
    repeated,
    solve_sizes,
)
from hf_guide.initialization.folding import Folding
from hf_guide.initialization.layouts import PREFIX_AXES, config_sizes
from hf_guide.initialization.plan import Plan, Site


@dataclass
class Transfer:
    """A plan with its bases, and what is worked out once for several parameters.

    `moments` are the second moments E^T E of the tables by axis, (d_T, d_T) float64; `shares` the share of their length that
    the projection keeps, |x_S| / |x_T|.
    """

    plan: Plan
    moments: dict[str, Tensor]
    shares: dict[str, float]
    dtype: torch.dtype
    notes: list[str] = field(default_factory=list)
    steps: dict[str, list[str]] = field(default_factory=dict)
    norm_biases: dict[str, Tensor] = field(default_factory=dict)

    @functools.cached_property
    def folding(self) -> Folding:
        """Which norms have their gain in other weights."""
        return Folding(self.plan)

    # What the teacher has

    def teacher_norm(self, norm: str, site: Site, part: str) -> Tensor | None:
        """Return the gain or bias, float64, of the teacher's norm that `site`'s source reads; None where it has none."""
        name = self.folding.name(norm, site, of_teacher=True) + (".bias" if part == "bias" else ".weight")
        if name not in self.plan.teacher_names:
            bare = name.rpartition(".")[0]
            if part == "bias" or bare not in self.plan.teacher_names:
                return None
            name = bare
        return self.plan.read(name).double() + (self.plan.layout.norm_offset if part == "weight" else 0.0)

    def scale(self, axis: str) -> float:
        """Return sqrt(d_T / d_S), times the share of length kept where the energy is corrected."""
        teacher, student = self.plan.widths[axis]
        return math.sqrt(teacher / student) * (self.shares[axis] if self.plan.options.energy_correction else 1.0)

    def gain_left(self, norm: str, gain: Tensor | None) -> float | None:
        """Return the root mean square of a folded gain, which stays in the student's norm; None where that has no gain.

        W diag(c) is divided by it, which changes nothing but how fast the weights learn: an optimizer like Adam moves each
        by its learning rate, so those that took in a gain of a hundredth would be lost in a step. So they stay as large as
        the teacher's own, and the norm keeps sqrt(d_T / d_S) too.
        """
        if gain is None or not {norm, f"{norm}.weight"} & self.plan.sites.keys():
            return None
        return root_mean_square(gain) or None

    def output_gain(self, site: Site) -> Tensor | None:
        """Return the gain that is folded into what `site` writes, None for none: of a learned scale less what stays in it."""
        scale = self.folding.scale_of_output(site)
        gain = self.teacher_norm(scale, site, "weight") if scale else None
        if gain is None or scale != site.match.row.scaled_by:
            return gain
        return gain / (root_mean_square(gain) or 1.0)

    def stream_scale(self, site: Site) -> float:
        """Return what the student's residual stream is multiplied with, where `site` writes onto it.

        It is 1 but where the norm before a tied head has no gain that could carry sqrt(d_T / d_S) (OLMo): the norms of a
        pre-norm model do not see the stream's length, so all that is written onto it carries the factor instead.
        """
        if not self.folding.bare_axes or site.source is None:
            return 1.0
        row = site.match.row
        looked_up = row.kind == "table" or any(Name(name) in site.axes for name in PREFIX_AXES)
        for dim, (axis, chosen) in enumerate(zip(site.axes, self.plan.maps(site), strict=True)):
            writes = looked_up or site.match.is_bias or dim != row.input_axis
            if (
                isinstance(axis, Name)
                and axis.name in self.folding.bare_axes
                and isinstance(chosen, Projection)
                and writes
            ):
                factor = (
                    self.scale(axis.name)
                    * self.ratio(self.plan.layout.tied_head_scale)
                    / self.ratio(self.plan.layout.embedding_scale)
                    * self.plan.options.logit_gain
                )
                self.note_step(site, f"times {factor:.6g}: the norm before the tied head has no gain to carry it")
                if self.plan.options.logit_gain != 1.0:
                    self.note_step(site, f"logits times {self.plan.options.logit_gain:.6g}")
                return factor
        return 1.0

    def ratio(self, scale: "object") -> float:
        if not callable(scale):
            return 1.0
        return float(scale(self.plan.teacher.config)) / float(scale(self.plan.student_config))

    def note_step(self, site: Site, step: str) -> None:
        steps = self.steps.setdefault(site.name, [])
        if step not in steps:
            steps.append(step)

    def weight_value(self, site: Site, vectors: Sequence[Tensor | None] | None = None) -> Tensor:
        """Return a weight's value; with `vectors`, one a term of its output axis, what it makes of these instead.

        A vector lies on the teacher's input axis, (d_T,); the result then has the student's output axis alone.
        """
        assert site.source is not None
        row, maps = site.match.row, self.plan.maps(site)
        tensor = self.plan.read(site.source)
        if not maps:
            return tensor
        for dim, chosen in enumerate(maps):
            if isinstance(chosen, Selection):
                tensor = apply_selection(tensor, dim, chosen)
        output = len(maps) - 1 if row.transposed else 0
        terms = self._terms(site, tensor.shape[output]) if len(row.reads) > 1 else [tensor.shape[output]]
        pieces = []
        for number, piece in enumerate(tensor.split(terms, dim=output)):
            read = row.reads[number] if row.reads else None
            pieces.append(self._contract(site, piece, read, None if vectors is None else (vectors[number],)))
        result = torch.cat(pieces, dim=0 if vectors is not None else output) if len(pieces) > 1 else pieces[0]
        for dim, chosen in enumerate(maps):
            if isinstance(chosen, Selection) and not bool((chosen.factors == 1).all()):
                if vectors is not None and dim != output:
                    continue
                shape = [1] * result.ndim
                shape[0 if vectors is not None else dim] = -1
                result = result.to(self.dtype) * chosen.factors.view(shape).to(self.dtype)
        return result

    def _terms(self, site: Site, total: int) -> list[int]:
        output = site.match.row.output_axis
        assert isinstance(output, Sum)
        sizes = solve_sizes(site.axes, site.shape, config_sizes(self.plan.layout, self.plan.student_config), site.name)
        return [axis_size(term, sizes) or total for term in output.terms]

    def _contract(self, site: Site, tensor: Tensor, norm: str | None, vector: "tuple[Tensor | None] | None") -> Tensor:
        """Contract one piece of a weight along its projected axes, with the norm it reads and the scale that follows it."""
        row, maps = site.match.row, self.plan.maps(site)
        for dim, chosen in enumerate(maps):
            if not isinstance(chosen, Projection):
                if vector is not None and dim == row.input_axis:
                    raise TeacherError(f"{site.name}: a norm's bias can only be folded along a projected axis.")
                continue
            axis, times = repeated(site.axes[dim])
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
                and self.folding.is_folded(self.folding.name(norm, site, of_teacher=False))
            ):
                diagonal = self.teacher_norm(norm, site, "weight")
                left = self.gain_left(self.folding.name(norm, site, of_teacher=False), diagonal)
                factor = self.scale(axis) if left is None else 1.0 / left
                self.note_step(
                    site, f"gain of {self.folding.name(norm, site, of_teacher=True)} folded, times {factor:.6g}"
                )
            elif dim != row.input_axis:
                diagonal = self.output_gain(site)
            diagonal = diagonal if diagonal is None else diagonal.repeat(times)
            tensor = contract(tensor, dim, matrix * factor, self.dtype, diagonal=diagonal)
        return tensor.squeeze(row.input_axis) if vector is not None else tensor

    def note(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)


def root_mean_square(gain: Tensor) -> float:
    return gain.square().mean().sqrt().item()
