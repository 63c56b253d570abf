"""Decide which norms of a student have their gain folded into other weights, from names alone."""

import functools
from dataclasses import dataclass

from hf_guide.initialization.plan import ParameterPlan, Plan
from hf_guide.layouts.grammar import AxisName, name_and_repeats
from hf_guide.layouts.registry import LayoutRow


@dataclass
class NormFolding:
    """The weights before and after each norm of a plan's student. Norms are named relative to the base model."""

    plan: Plan

    def name(self, norm: str, parameter: ParameterPlan, *, of_teacher: bool) -> str:
        """Return the name of the norm that a row of the layout gives as `norm`, for the student's or the teacher's block."""
        for placeholder, number in parameter.match.numbers.items():
            stack = norm.partition("{" + placeholder + "}")[0] + "{" + placeholder + "}"
            block = (
                self.plan.block_mapping[stack][int(number)]
                if of_teacher and stack in self.plan.block_mapping
                else int(number)
            )
            norm = norm.replace("{" + placeholder + "}", str(block))
        return norm

    @functools.cached_property
    def readers(self) -> dict[str, list[ParameterPlan]]:
        """The student's parameters that read each norm along a projected axis."""
        by_norm: dict[str, list[ParameterPlan]] = {}
        for parameter in self.plan.parameters.values():
            row = parameter.match.row
            if not row.input_norms or name_and_repeats(row.axes[row.input_axis])[0] not in self.plan.widths:
                continue
            for norm in {self.name(read, parameter, of_teacher=False) for read in row.input_norms if read}:
                by_norm.setdefault(norm, []).append(parameter)
        return by_norm

    @functools.cached_property
    def writers(self) -> dict[str, ParameterPlan]:
        """The weight whose output each norm normalizes, where the norm's gain is folded into that weight."""
        by_norm: dict[str, ParameterPlan] = {}
        for parameter in self.plan.parameters.values():
            after = parameter.match.row.output_norm
            if after and not parameter.match.is_bias and self.output_gain_name(parameter) == after:
                by_norm.setdefault(self.name(after, parameter, of_teacher=False), parameter)
        return by_norm

    @functools.cached_property
    def learned_scales(self) -> set[str]:
        """The learned diagonals that are folded into the weights whose outputs they multiply."""
        rows = [(parameter.match.row.output_diagonal, parameter) for parameter in self.plan.parameters.values()]
        return {self.name(scale, parameter, of_teacher=False) for scale, parameter in rows if scale}

    @functools.cached_property
    def axes_without_final_gain(self) -> set[str]:
        """The projected axes that a tied head reads through a norm without parameters."""
        heads = [row for row in self._tied_rows if row.input_norms]
        return {
            axis
            for axis in self.plan.widths
            for head in heads
            if AxisName(axis) in head.axes
            if any(
                norm and norm not in self.plan.parameters and norm + ".weight" not in self.plan.parameters
                for norm in head.input_norms
            )
        }

    def is_folded(self, norm: str) -> bool:
        """Return whether the gain of the student's norm is folded into the weights that read it.

        It is not where one of these is the embedding table (a tied head), nor where no weight is known to read it.
        """
        if not self.plan.options.fold_norms or not self.plan.options.projects:
            return False
        return norm in self.readers and not self.is_tied(norm) and not self._exists_only_in_other_blocks(norm)

    def is_tied(self, norm: str) -> bool:
        """Return whether a weight that reads this norm is tied to an embedding table in the student."""
        return any(norm in row.input_norms for row in self._tied_rows)

    def output_gain_name(self, parameter: ParameterPlan) -> str | None:
        """Return the name of the learned diagonal or norm whose gain is folded into the output of `parameter`."""
        row = parameter.match.row
        if row.output_norm is not None and self.plan.options.fold_norms and self.plan.layout.norm == "rms":
            return row.output_norm
        return row.output_diagonal

    @functools.cached_property
    def _tied_rows(self) -> list[LayoutRow]:
        shared = [name for name, first in self.plan.tied_parameters.items() if first in self.plan.parameters]
        return [match.row for name in shared if (match := self.plan.layout.find(name))]

    @functools.cached_property
    def _norms(self) -> dict[str, LayoutRow]:
        norms = [parameter for parameter in self.plan.parameters.values() if parameter.match.row.kind == "norm"]
        return {parameter.module: parameter.match.row for parameter in norms}

    def _exists_only_in_other_blocks(self, norm: str) -> bool:
        """Return whether other blocks have this norm and this one has not (ModernBERT's first block)."""
        match = self.plan.layout.find(norm)
        if match is None or match.row.kind != "norm" or norm in self._norms:
            return False
        return any(row is match.row for row in self._norms.values())
