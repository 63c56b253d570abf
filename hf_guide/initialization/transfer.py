"""A plan applied: the value of each of a student's parameters, one teacher tensor at a time.

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

from hf_guide.errors import ShapeError, TeacherError
from hf_guide.initialization.axes import (
    Identity,
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
from hf_guide.initialization.plan import Plan, Site, is_even


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
    _norm_biases: dict[str, Tensor] = field(default_factory=dict)

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
        return _root_mean_square(gain) or None

    def output_gain(self, site: Site) -> Tensor | None:
        """Return the gain that is folded into what `site` writes, None for none: of a learned scale less what stays in it."""
        scale = self.folding.scale_of_output(site)
        gain = self.teacher_norm(scale, site, "weight") if scale else None
        if gain is None or scale != site.match.row.scaled_by:
            return gain
        return gain / (_root_mean_square(gain) or 1.0)

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
                    * self._ratio(self.plan.layout.tied_head_scale)
                    / self._ratio(self.plan.layout.embedding_scale)
                    * self.plan.options.logit_gain
                )
                self.note_step(site, f"times {factor:.6g}: the norm before the tied head has no gain to carry it")
                if self.plan.options.logit_gain != 1.0:
                    self.note_step(site, f"logits times {self.plan.options.logit_gain:.6g}")
                return factor
        return 1.0

    # Values

    def value(self, site: Site) -> Tensor:
        """Return the student's parameter, in the transfer's dtype or the teacher's own."""
        result, gain = self._value(site), self.plan.options.logit_gain
        row = site.match.row
        if gain == 1.0:
            return result
        if row.kind == "norm" and self.folding.is_tied(site.module):
            offset = 0.0 if site.canonical.endswith(".bias") else self.plan.layout.norm_offset
            self.note_step(site, f"logits times {gain:.6g}")
            return (result.to(self.dtype) + offset) * gain - offset
        is_logit_bias = site.axes == (Name("vocab"),)  # also one that stands beside a tied head
        if is_logit_bias or (row.kind == "weight" and row.reads and Name("vocab") in row.axes):
            self.note_step(site, f"logits times {gain:.6g}")
            return self._scaled(result, gain)
        return result

    def _value(self, site: Site) -> Tensor:
        if site.match.row.kind == "norm":
            return self.norm_value(site)
        if site.match.is_bias:
            return self._scaled(self.bias_value(site), self.stream_scale(site))
        row = site.match.row
        result = self._scaled(self.weight_value(site), self.stream_scale(site))
        if row.kind == "table" and Name("vocab") in row.axes and self.plan.options.projects:
            ratio = self._ratio(self.plan.layout.embedding_scale)
            if ratio != 1.0:
                self.note_step(site, f"times {ratio:.6g}: the model multiplies its embeddings by its width")
                result = self._scaled(result, ratio)
        if row.pattern in self.plan.layout.scales and self.plan.options.projects:
            ratio = self._ratio(self.plan.layout.scales[row.pattern])
            if ratio != 1.0:
                self.note_step(site, f"times {ratio:.6g}: what it is added to is multiplied by the model's width")
                result = self._scaled(result, ratio)
        if row.kind != "table" and Name("vocab") in row.axes and row.reads:
            ratio = self._ratio(self.plan.layout.tied_head_scale)
            result = self._scaled(result, ratio)
        return result

    def _scaled(self, value: Tensor, factor: float) -> Tensor:
        return value if factor == 1.0 else value.to(self.dtype) * factor

    def _ratio(self, scale: "object") -> float:
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

    def bias_value(self, site: Site) -> Tensor:
        """Return a bias: the teacher's own, selected or projected, and what the norm's bias made of it through the weight."""
        row = site.match.row
        weight = self.plan.sites.get(site.canonical.removesuffix("bias") + "weight")
        if site.source is not None:
            (chosen,) = self.plan.maps(site)
            result = self.plan.read(site.source)
            if isinstance(chosen, Selection):
                result = apply_selection(result, 0, chosen).to(self.dtype) * chosen.factors.to(self.dtype)
            elif isinstance(chosen, Projection):
                result = contract(result, 0, chosen.matrix, self.dtype, diagonal=self.output_gain(site))
        else:
            result = torch.zeros(site.shape, dtype=self.dtype)
        if (
            weight is not None
            and weight.source is not None
            and any(self._folds_bias(norm, weight) for norm in row.reads)
        ):
            result = result.to(self.dtype) + self._read_norm_bias(weight)
            self.note_step(site, "takes in the bias of the norm before it")
        elif site.source is None:
            self.note_step(site, "zero: the teacher has none")
        return result

    def _folds_bias(self, norm: str | None, site: Site) -> bool:
        if norm is None or not isinstance(self.plan.maps(site)[site.match.row.input_axis], Projection):
            return False
        return (
            self.folding.is_folded(self.folding.name(norm, site, of_teacher=False))
            and self.teacher_norm(norm, site, "bias") is not None
        )

    def _read_norm_bias(self, weight: Site) -> Tensor:
        """Return W b for the bias b of the norm that `weight` reads, less what the student's own norm bias gives."""
        reads = weight.match.row.reads
        vectors = [self.teacher_norm(norm, weight, "bias") if norm else None for norm in reads]
        result = self.weight_value(weight, vectors)
        norm = self.folding.name(reads[0] or "", weight, of_teacher=False)
        own = self.norm_bias(norm)
        if own is not None and bool(own.any()):
            student = self.weight_value(weight).movedim(weight.match.row.input_axis, -1)
            result = result - student @ own.repeat(student.shape[-1] // len(own)).to(student)
        return result

    def scale_left(self, writer: Site) -> float:
        """Return sqrt(d_T / d_S) |M^T diag(c) W| / |W|: what is left of the gain c of a norm that norms W's output.

        The norm divides by the length of M^T diag(c) W h instead of that of W h; their ratio is that of the weights'
        lengths for a white h, and exactly so where c is constant and nothing is cut.
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

    def norm_bias(self, norm: str) -> Tensor | None:
        """Return the bias of a folded norm of the student, (d_S,) float64; None where it has none.

        It is zero where every weight that reads it has a bias to take it in; otherwise the least-squares solution of
        W_S b_S = W b over those that have not.
        """
        if norm + ".bias" not in self.plan.sites:
            return None
        if norm not in self._norm_biases:
            site = self.plan.sites[norm + ".bias"]
            width, length = site.shape[0], 0.0
            normal, right = torch.zeros(width, width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)
            for reader in self.folding.readers[norm]:
                if reader.match.is_bias or reader.canonical.removesuffix("weight") + "bias" in self.plan.sites:
                    continue
                if not isinstance(self.plan.maps(reader)[reader.match.row.input_axis], Projection):
                    continue  # a later block that is selected reads what it can
                vectors = [
                    self.teacher_norm(read, reader, "bias") if read else None for read in reader.match.row.reads
                ]
                wanted = self.weight_value(reader, vectors).double().flatten()
                weight = self.weight_value(reader).movedim(reader.match.row.input_axis, -1).reshape(-1, width).double()
                normal += weight.T @ weight
                right += weight.T @ wanted
                length += wanted.square().sum().item()
            found = torch.linalg.pinv(normal, hermitian=True) @ right
            lost = math.sqrt(max(0.0, 1 - (found @ right).item() / length)) if length else 0.0
            if lost > 1e-6:
                self._note(
                    f"{site.name}: fitted to what weights without a bias made of the teacher's; {lost:.1%} of that is lost."
                )
            self._norm_biases[norm] = found
        return self._norm_biases[norm]

    def norm_value(self, site: Site) -> Tensor:
        """Return a norm's gain or bias, or another learned diagonal."""
        assert site.source is not None
        layout, maps = self.plan.layout, self.plan.maps(site)
        chosen = maps[-1]
        is_bias = site.canonical.endswith(".bias")
        stored = self.plan.read(site.source)
        offset = 0.0 if is_bias else layout.norm_offset
        if all(isinstance(each, Identity) for each in maps):
            return stored
        if not isinstance(chosen, Projection):
            kept = stored.to(self.dtype) + offset
            for dim, each in enumerate(maps):
                if isinstance(each, Selection):
                    kept = apply_selection(kept, dim, each) * each.factors.to(self.dtype).view(
                        -1, *[1] * (kept.ndim - 1 - dim)
                    )
            return kept - offset
        axis = site.axes[-1]
        assert isinstance(axis, Name)
        norm = site.module
        matrix, gain = chosen.matrix, stored.double() + offset
        if norm in self.folding.learned_scales:
            self.note_step(site, "folded into the weights it multiplies, its root mean square left")
            return torch.full(site.shape, (_root_mean_square(gain) or 1.0) - offset, dtype=self.dtype)
        if (writer := self.folding.writers.get(norm)) is not None and not is_bias:
            self.note_step(site, f"folded into {writer.name}, whose output it norms; one number is left")
            self._note(
                f"{site.name}: its gain is folded into {writer.name}, before the norm, which then sees another length."
            )
            return torch.full(site.shape, self.scale_left(writer) - offset, dtype=self.dtype)
        if self.folding.is_folded(norm):
            self.note_step(site, "folded into the weights that read it, its root mean square left")
            if is_bias and (bias := self.norm_bias(norm)) is not None:
                return bias.to(self.dtype)
            left = None if is_bias else self.gain_left(norm, gain)
            one = (0.0 if is_bias else 1.0) if left is None else left * self.scale(axis.name)
            return torch.full(site.shape, one - offset, dtype=self.dtype)
        head_scale = (
            self._ratio(layout.tied_head_scale) / self._ratio(layout.embedding_scale)
            if self.folding.is_tied(norm)
            else 1.0
        )
        if is_bias:
            return (gain @ matrix * head_scale).to(self.dtype)
        if self.folding.is_tied(norm):
            diagonal = fit_tied_gain(self.moments[axis.name], matrix, gain) * head_scale
            self.note_step(site, "fitted in the logits of the tied head")
            self._note(
                f"{site.name}: the head is tied to the embedding table, so the gain before it is fitted, "
                "not folded; tie_word_embeddings=False folds it exactly."
            )
        else:
            diagonal = (matrix * (gain[:, None] * matrix)).sum(0)
            self.note_step(site, "diagonal of the projected gain")
            if not chosen.selects and not is_even(gain):
                self._note(f"{site.name}: {self._why_kept(norm)}; the diagonal of the projected gain stands for it.")
        return (diagonal * self.scale(axis.name) - offset).to(self.dtype)

    def _why_kept(self, norm: str) -> str:
        if not self.plan.options.fold_norms:
            return "its gain is not folded, for fold_norms is off"
        match = self.plan.layout.find(norm + ".weight")
        if match is not None and any(match.row.pattern in row.reads for row in self.plan.layout.rows):
            return "no weight that reads it came from the teacher, so its gain is not folded"
        return "its output goes onto the residual stream, so its gain cannot be folded"

    def _note(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)


def _root_mean_square(gain: Tensor) -> float:
    return gain.square().mean().sqrt().item()


def fit_tied_gain(moment: Tensor, matrix: Tensor, gain: Tensor) -> Tensor:
    """Return the diagonal that stands for the gain c before a tied head, fitted in the logits.

    g_j = <E m_j, E diag(c) m_j> / |E m_j|^2 for column m_j of M, with `moment` E^T E, (d_T, d_T) float64.
    """
    image = moment @ matrix
    norms = (matrix * image).sum(0)
    fitted = (image * (gain[:, None] * matrix)).sum(0) / norms
    plain = (matrix * (gain[:, None] * matrix)).sum(0)
    return torch.where(norms > norms.max() * 1e-12, fitted, plain)


def check_stored(stored: Tensor, value: Tensor, name: str) -> None:
    """Refuse a student's parameter that overflowed when `value` was `stored` in its dtype.

    Raises:
        ShapeError: says how large the value is, and how large a number the dtype holds.
    """
    if not stored.is_floating_point() or torch.isfinite(
        stored.sum(dtype=torch.promote_types(stored.dtype, torch.float32))
    ):
        return  # one pass without a copy; a sum that overflows is looked at again
    if not bool(torch.isfinite(stored).all()):
        raise ShapeError(
            f"{name} has values up to {value.abs().max().item():.3g}, more than {stored.dtype} holds "
            f"({torch.finfo(stored.dtype).max:.3g}). Make the student with dtype='bfloat16' or 'float32'."
        )
