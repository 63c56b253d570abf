"""Where each of a student's parameters comes from, and how each of its axes gets smaller."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from hf_guide.errors import ShapeError, TeacherError
from hf_guide.initialization.config import PlanOptions, SubsequentLayers
from hf_guide.initialization.selection import alibi_head_indices, evenly_spaced_indices, rope_pair_indices
from hf_guide.layouts.grammar import (
    Axis,
    AxisMap,
    AxisName,
    AxisProduct,
    Identity,
    Projection,
    Selection,
    axis_names,
    axis_size,
    merge_adjacent,
    name_and_repeats,
    select_indices,
    solve_sizes,
)
from hf_guide.layouts.registry import (
    FIXED_AXES,
    PREFIX_AXES,
    BlockScale,
    Layout,
    LayoutMatch,
    config_sizes,
    rotary_size,
)
from hf_guide.teachers.checkpoint import TeacherCheckpoint
from hf_guide.utils.finite import is_finite

HEADS = ("heads", "kv_heads", "group")

AXIS_LABELS = {
    "group": "query heads per key/value head",
    "kv_heads": "key/value heads",
    "heads": "heads",
    "head_dim": "head size",
    "q_dim": "head size of queries and keys",
    "k_dim": "head size of queries and keys",
    "mlp": "intermediate size",
    "embed": "hidden size",
    "vocab": "vocabulary",
}


@dataclass(frozen=True)
class ParameterPlan:
    """One parameter of the student, its place in the layout, and the teacher's parameter that feeds it (or None)."""

    name: str
    canonical: str
    shape: torch.Size
    match: LayoutMatch
    source: str | None
    source_shape: torch.Size | None
    block: int | None

    @property
    def axes(self) -> tuple[Axis, ...]:
        return self.match.axes

    @property
    def module(self) -> str:
        """The canonical name of the module that holds the parameter."""
        return self.canonical.removesuffix(".bias").removesuffix(".weight")


def is_constant(gain: Tensor) -> bool:
    """Whether a gain is the same everywhere: then it turns with the stream."""
    return bool(torch.isclose(gain, gain[:1].expand_as(gain)).all())


@dataclass
class Plan:
    """All that a transfer needs to know besides the weights and the bases.

    `units` are the places that were chosen for a site's named axes, by the site's name; the two axes of grouped heads go by
    one name, "kv_heads group", where each group keeps others. What is not there is chosen evenly. `turns` are what is done
    to a teacher's tensor, by its canonical name, whenever it is read: a change of coordinates inside its heads. `notes` are
    what the plan itself does not carry exactly, `depths` how many blocks each of the teacher's stacks has.
    """

    layout: Layout
    options: PlanOptions
    teacher: TeacherCheckpoint
    student_config: PreTrainedConfig
    parameters: dict[str, ParameterPlan]
    tied_parameters: dict[str, str]
    teacher_names: dict[str, str]
    stacks: dict[str, list[int]]
    widths: dict[str, tuple[int, int]]
    vocab_indices: Tensor | None
    label_indices: Tensor | None
    random: list[str]
    lost: list[str]
    bases: dict[str, Tensor] = field(default_factory=dict)
    selected_indices: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    turns: dict[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    depths: dict[str, int] = field(default_factory=dict)
    bounds: set[str] = field(
        default_factory=set
    )  # of the teacher's buffers, which may be infinite: what nothing exceeds
    _seen_finite: set[str] = field(default_factory=set)
    _maps: dict[tuple[str, int], list[AxisMap]] = field(default_factory=dict)  # by site and number of bases

    def read(self, canonical: str) -> Tensor:
        """Return the teacher's tensor of this canonical name, on the CPU: as it is stored, or turned, in float32 or better.

        Raises:
            TeacherError: it holds NaN or infinite values; says which tensor, how many, and where the first is.
        """
        name = self.teacher_names[canonical]
        tensor = self.teacher.weights.get(name).cpu()
        if name not in self._seen_finite and tensor.is_floating_point():
            found = tensor.nan_to_num(nan=torch.nan, posinf=0.0, neginf=0.0) if canonical in self.bounds else tensor
            check_finite_weights(found, f"{name!r} of the teacher {self.teacher.name}")
            self._seen_finite.add(name)
        return self.turns[canonical](tensor) if canonical in self.turns else tensor

    def keep(self, units: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Choose places of named axes, by the site's name, beside those that were chosen before."""
        self.selected_indices |= {
            name: self.selected_indices.get(name, {}) | dict(chosen) for name, chosen in units.items()
        }
        self._maps.clear()

    def has_unfoldable_norms(self) -> bool:
        """Whether blocks hand on what a norm made of the stream (post-norm, as in BERT) with gains that differ.

        Such gains do not turn with the stream, and there is nothing that they could be folded into.
        """
        used = {
            name
            for row in (site.match.row for site in self.parameters.values())
            for name in (*row.input_norms, row.output_norm, row.output_diagonal)
        }
        streams = {AxisName(name) for name in self.widths}
        for site in self.parameters.values():
            row = site.match.row
            if row.kind != "norm" or "{" not in row.pattern or row.axes[-1] not in streams or row.pattern in used:
                continue
            if site.source is not None and not site.canonical.endswith(".bias"):
                if not is_constant(self.read(site.source)):
                    return True
        return False

    def is_projected(self, site: ParameterPlan, axis: Axis) -> bool:
        """Whether `axis` of `site` is contracted with a basis, rather than kept or selected."""
        name, _ = name_and_repeats(axis)
        if name not in self.widths or not self.options.projects:
            return False
        teacher, student = self.widths[name]
        selected = (
            site.block is not None and site.block > 0 and self.options.subsequent_layers == SubsequentLayers.UNIFORM
        )
        return (teacher != student or name in self.bases) and not selected

    def maps(self, site: ParameterPlan) -> list[AxisMap]:
        """Return the map of each of the site's axes. A projection has an empty matrix until its basis is known.

        Raises:
            ShapeError, LayoutError: the student's shape cannot be made from the teacher's.
        """
        key = (site.name, len(self.bases))
        if key not in self._maps:
            self._maps[key] = self._find_maps(site)
        return self._maps[key]

    def sizes(self, site: ParameterPlan) -> tuple[dict[str, int], dict[str, int]]:
        """Return the teacher's and the student's size of every name in the site's axes.

        Raises:
            LayoutError: the axes do not multiply out to the shapes.
        """
        assert site.source_shape is not None
        source_name = self.teacher_names.get(site.source or "", site.source or "")
        known, wanted = (config_sizes(self.layout, each) for each in (self.teacher.config, self.student_config))
        stack = self.block_table_stack(site)
        if stack is not None:
            known["blocks"], wanted["blocks"] = self.depths[stack], len(self.stacks[stack])
        teacher = solve_sizes(site.axes, site.source_shape, known, source_name)
        return teacher, solve_sizes(site.axes, site.shape, wanted, site.name)

    def block_table_stack(self, site: ParameterPlan) -> str | None:
        """Return the stack for whose blocks a parameter has an entry each; None where it has none."""
        if not any("blocks" in axis_names(axis) for axis in site.axes):
            return None
        first = next(stack for stack in self.stacks if stack.endswith("{block}"))
        return self.layout.block_tables.get(site.match.row.pattern, first)

    def _find_maps(self, site: ParameterPlan) -> list[AxisMap]:
        teacher, student = self.sizes(site)
        found: list[AxisMap] = []
        for axis in site.axes:
            if self.is_projected(site, axis):
                name, times = name_and_repeats(axis)
                matrix = self.bases.get(name, torch.empty(self.widths[name]))
                found.append(Projection(matrix if times == 1 else torch.block_diag(*[matrix] * times)))
            elif axis in (AxisName("vocab"), AxisName("labels")):
                places = self.vocab_indices if axis == AxisName("vocab") else self.label_indices
                if places is None and teacher[str(axis)] != student[str(axis)]:
                    raise ShapeError(
                        f"{site.name}: the student has {student[str(axis)]} rows for its {axis}, the teacher "
                        f"{teacher[str(axis)]}: they must agree."
                    )
                found.append(self._selection_or_identity(places, teacher[str(axis)]))
            elif all(teacher[name] == student[name] for name in axis_names(axis)) and not (
                self._blocks_change(site, axis)
                or (self._holds_queries(site, axis) and self.block_attention_ratio(site) != 1.0)
            ):
                found.append(Identity())
            else:
                for pair in (name for name in self.selected_indices.get(site.name, ()) if " " in name):
                    first, second = pair.split()
                    axis = merge_adjacent(axis, first, second)
                    teacher[pair] = teacher[first] * teacher[second]
                places, factors = select_indices(
                    axis, lambda name: self._axis_selection(site, name, teacher, student), teacher
                )
                found.append(Selection(places, factors, axis_size(axis, teacher) or 0))
        return found

    def _blocks_change(self, site: ParameterPlan, axis: Axis) -> bool:
        stack = self.block_table_stack(site) if "blocks" in axis_names(axis) else None
        return stack is not None and self.stacks[stack] != list(range(self.depths[stack]))

    @staticmethod
    def _selection_or_identity(places: Tensor | None, size: int) -> AxisMap:
        return Identity() if places is None else Selection(places, torch.ones(len(places), dtype=torch.float64), size)

    def _axis_selection(
        self, site: ParameterPlan, name: str, teacher: Mapping[str, int], student: Mapping[str, int]
    ) -> tuple[Tensor, Tensor]:
        units = self.selected_indices.get(site.name, {}).get(name)
        of_block = self.block_attention_ratio(site) if self._holds_queries(site, AxisName(name)) else 1.0
        if units is not None:
            return units, torch.full((len(units),), of_block, dtype=torch.float64)
        stack = self.block_table_stack(site) if name == "blocks" else None
        if stack is not None:
            return torch.tensor(self.stacks[stack]), torch.ones(len(self.stacks[stack]), dtype=torch.float64)
        had, wanted = teacher[name], student[name]
        what = AXIS_LABELS.get(name, name)
        if (name in FIXED_AXES or name.startswith("fixed")) and had != wanted:
            if name in FIXED_AXES:
                raise ShapeError(f"{site.name}: {what} must be the teacher's {had}, found {wanted}.")
            raise ShapeError(
                f"{site.name}: this size must be the teacher's {had}, found {wanted}. What is known of "
                f"{self.layout.family!r}: {self.layout.exactness.rstrip('.')}. Keep the size, choose method='random', or "
                "say what the axes mean with hf_guide.register_layout."
            )
        if not 1 <= wanted <= had:
            raise ShapeError(
                f"{site.name}: the student's {what} is {wanted}, the teacher's {had}: a student starts inside its teacher, so "
                f"choose 1 to {had}."
            )
        factor = of_block
        if name in PREFIX_AXES:
            places = list(range(wanted))
        elif name.endswith(("q_dim", "k_dim")):
            rotary = (
                rotary_size(self.layout, self.teacher.config, had),
                rotary_size(self.layout, self.student_config, wanted),
            )
            places = rope_pair_indices(had, wanted, *rotary, self.layout.rope)
            scaled_here = site.match.row.kind == "norm" or not self._has_query_norm(site)
            if name.endswith("q_dim") and had != wanted and scaled_here and self.options.projects:
                factor *= (
                    had
                    / wanted
                    * self.attention_scale(self.teacher.config, had)
                    / self.attention_scale(self.student_config, wanted)
                )
        elif name in HEADS and self.layout.alibi is not None and self.layout.alibi(self.teacher.config):
            places = alibi_head_indices(had, wanted)
        else:
            places = evenly_spaced_indices(had, wanted)
        return torch.tensor(places, dtype=torch.long), torch.full((wanted,), factor, dtype=torch.float64)

    def selected_heads(self, site: ParameterPlan) -> list[int] | None:
        """Return the teacher's heads that feed a parameter's, of all groups together; None where that is each of them.

        A parameter whose axes name no heads, or those of keys and values alone, has none.
        """
        names = {name for axis in site.axes for name in axis_names(axis)}
        named = [name for name in names if name.endswith("heads") and name != "kv_heads"]
        if {"kv_heads", "group"} <= names:
            axis: Axis = AxisProduct((AxisName("kv_heads"), AxisName("group")))
        elif len(named) == 1:
            axis = AxisName(named[0])
        else:
            return None
        teacher, student = self.sizes(site)
        for pair in (name for name in self.selected_indices.get(site.name, ()) if " " in name):
            first, second = pair.split()
            axis = merge_adjacent(axis, first, second)
            teacher[pair] = teacher[first] * teacher[second]
        heads = select_indices(axis, lambda name: self._axis_selection(site, name, teacher, student), teacher)[
            0
        ].tolist()
        return heads if len(heads) != axis_size(axis, teacher) else None

    def selected_heads_by_block(self) -> dict[str, list[list[int]]]:
        """Return the teacher's heads that each block's attention keeps, by module, where it has fewer than the teacher."""
        by_module: dict[str, dict[int, list[int]]] = {}
        for site in self.parameters.values():
            if site.source is None or site.block is None or len(site.axes) < 2:
                continue
            heads = self.selected_heads(site)
            if heads is not None:
                module = site.match.row.pattern.replace(".{block}", "").rpartition(".")[0]
                by_module.setdefault(module, {})[site.block] = heads
        return {module: [heads[block] for block in sorted(heads)] for module, heads in by_module.items()}

    def rope_mismatch_notes(self) -> list[str]:
        """Return what the report notes where the student's rotary frequencies are not those of the pairs it keeps."""
        layout, configs = self.layout, (self.teacher.config, self.student_config)
        teacher_head, student_head = (config_sizes(layout, config).get("q_dim") for config in configs)
        if layout.rope is None or teacher_head is None or student_head is None:
            return []
        teacher = rotary_size(layout, self.teacher.config, teacher_head)
        student = rotary_size(layout, self.student_config, student_head)
        if not student or teacher % student == 0:
            return []
        return [
            f"heads rotate {student} dimensions, which does not divide the teacher's {teacher}: the student's rotary "
            "frequencies differ from those of the pairs it keeps."
        ]

    def attention_scale(self, config: PreTrainedConfig, head_dim: int) -> float:
        """Return what a model multiplies the products of queries and keys with."""
        scale = self.layout.attention_scale
        return float(scale(config)) if scale is not None else head_dim**-0.5

    def teacher_block(self, site: ParameterPlan) -> int:
        """Return the index of the teacher's block that feeds the block in which `site` stands."""
        assert site.block is not None
        stack = site.match.row.pattern.partition("{block}")[0] + "{block}"
        return self.stacks[stack][site.block] if stack in self.stacks else site.block

    def block_attention_ratio(self, site: ParameterPlan) -> float:
        """Return what queries are multiplied with because their block has another index, or their model another depth."""
        return self.block_ratio(site, self.layout.block_attention_scale)

    def block_ratio(self, site: ParameterPlan, scale: BlockScale | None) -> float:
        """Return what the teacher's block multiplies with, by `scale`, over what the student's does at its index."""
        if scale is None or site.block is None or site.source is None:
            return 1.0
        return scale(self.teacher.config, self.teacher_block(site)) / scale(self.student_config, site.block)

    def _holds_queries(self, site: ParameterPlan, axis: Axis) -> bool:
        """Whether an axis holds the queries that carry the attention's scale: a norm's, or else a weight's."""
        if not any(name.endswith("q_dim") for name in axis_names(axis)):
            return False
        return site.match.row.kind == "norm" or not self._has_query_norm(site)

    def _has_query_norm(self, site: ParameterPlan) -> bool:
        """Whether a learned norm stands between this query weight and the logits, which then carries their scale."""
        home = site.canonical.rpartition(".")[0].rpartition(".")[0]
        return any(
            other.match.row.kind == "norm"
            and other.canonical.startswith(home)
            and "q_dim" in (name for axis in other.axes for name in axis_names(axis))
            for other in self.parameters.values()
        )


def check_finite_weights(tensor: Tensor, what: str) -> None:
    """Refuse a tensor with NaN or infinite values.

    Raises:
        TeacherError: says how many there are and where the first is.
    """
    if not is_finite(tensor):
        wrong = ~torch.isfinite(tensor)
        raise TeacherError(
            f"{what} holds {int(wrong.sum())} NaN or infinite values, the first at {wrong.nonzero()[0].tolist()}. A teacher's "
            "weights must be finite: fetch it again, or take a checkpoint from before its training diverged."
        )
