"""Which norms of a student have their gain in other weights: decided from names alone, no weight is read here."""

import functools
from dataclasses import dataclass

from hf_guide.initialization.plan import ParameterPlan, Plan
from hf_guide.layouts.grammar import AxisName, name_and_repeats
from hf_guide.layouts.registry import LayoutRow


@dataclass
class NormFolding:
    """What reads, and what is read by, each norm of a plan's student. Norms go by their canonical names."""

    plan: Plan

    def name(self, norm: str, site: ParameterPlan, *, of_teacher: bool) -> str:
        """Return the norm that a row's `norm` means for `site`: its placeholders filled for the student or for the teacher."""
        for placeholder, number in site.match.numbers.items():
            stack = norm.partition("{" + placeholder + "}")[0] + "{" + placeholder + "}"
            fed = self.plan.stacks[stack][int(number)] if of_teacher and stack in self.plan.stacks else int(number)
            norm = norm.replace("{" + placeholder + "}", str(fed))
        return norm

    @functools.cached_property
    def readers(self) -> dict[str, list[ParameterPlan]]:
        """The student's parameters that read each norm along a projected axis."""
        found: dict[str, list[ParameterPlan]] = {}
        for site in self.plan.parameters.values():
            row = site.match.row
            if not row.input_norms or name_and_repeats(row.axes[row.input_axis])[0] not in self.plan.widths:
                continue
            for norm in {self.name(read, site, of_teacher=False) for read in row.input_norms if read}:
                found.setdefault(norm, []).append(site)
        return found

    @functools.cached_property
    def writers(self) -> dict[str, ParameterPlan]:
        """The weight whose output each norm norms, where the norm's gain is folded into that weight."""
        found: dict[str, ParameterPlan] = {}
        for site in self.plan.parameters.values():
            after = site.match.row.output_norm
            if after and not site.match.is_bias and self.output_gain_name(site) == after:
                found.setdefault(self.name(after, site, of_teacher=False), site)
        return found

    @functools.cached_property
    def learned_scales(self) -> set[str]:
        """The learned diagonals that are folded into the weights whose outputs they multiply."""
        rows = [(site.match.row.output_diagonal, site) for site in self.plan.parameters.values()]
        return {self.name(scale, site, of_teacher=False) for scale, site in rows if scale}

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
        """Whether the student's norm has its gain in the weights that read it.

        It has not where one of these is the embedding table itself (a tied head), nor where nothing is known to read it.
        """
        if not self.plan.options.fold_norms or not self.plan.options.projects:
            return False
        return norm in self.readers and not self.is_tied(norm) and not self._exists_only_in_other_blocks(norm)

    def is_tied(self, norm: str) -> bool:
        """Whether a weight that reads this norm is shared with a table in the student."""
        return any(norm in row.input_norms for row in self._tied_rows)

    def output_gain_name(self, site: ParameterPlan) -> str | None:
        """Return the learned diagonal, or the gain of the norm, that is folded into what `site` writes."""
        row = site.match.row
        if row.output_norm is not None and self.plan.options.fold_norms and self.plan.layout.norm == "rms":
            return row.output_norm
        return row.output_diagonal

    @functools.cached_property
    def _tied_rows(self) -> list[LayoutRow]:
        shared = [name for name, first in self.plan.tied_parameters.items() if first in self.plan.parameters]
        return [found.row for name in shared if (found := self.plan.layout.find(name))]

    @functools.cached_property
    def _norms(self) -> dict[str, LayoutRow]:
        norms = [site for site in self.plan.parameters.values() if site.match.row.kind == "norm"]
        return {site.module: site.match.row for site in norms}

    def _exists_only_in_other_blocks(self, norm: str) -> bool:
        """Whether other blocks have this norm and this one has not: the stream is read as it is (ModernBERT's first)."""
        match = self.plan.layout.find(norm)
        if match is None or match.row.kind != "norm" or norm in self._norms:
            return False
        return any(row is match.row for row in self._norms.values())
