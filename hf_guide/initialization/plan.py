"""The plan of a transfer: where each of a student's parameters comes from, and how each of its axes gets smaller."""

from collections.abc import Callable, Iterator, Mapping
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

READ_BYTES = 64 << 20
"""Bytes of a teacher's tensor that are read at once where its rows do not depend on each other."""

BLOCK_AXES = ("blocks", "gaps")
"""Axes with an entry for each block of a stack, and between each two of them."""

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
    """One parameter of the student and the teacher's parameter that it comes from.

    Attributes:
        name: The student's own name of it.
        canonical: Its name relative to the base model.
        shape, dtype: The student's.
        match: The row of the layout that describes it.
        source: The teacher's parameter, relative to the base model; None where the teacher has none.
        source_shape: The teacher's shape.
        block: The student's block that holds it; None outside of blocks.
    """

    name: str
    canonical: str
    shape: torch.Size
    dtype: torch.dtype
    match: LayoutMatch
    source: str | None
    source_shape: torch.Size | None
    block: int | None

    @property
    def axes(self) -> tuple[Axis, ...]:
        """The named axes of the parameter."""
        return self.match.axes

    @property
    def module(self) -> str:
        """The canonical name of the module that holds the parameter."""
        return self.canonical.removesuffix(".bias").removesuffix(".weight")


def is_constant(gain: Tensor) -> bool:
    """Return whether a gain is the same everywhere: it then commutes with a rotation of the residual stream."""
    return bool(torch.isclose(gain, gain[:1].expand_as(gain)).all())


@dataclass
class Plan:
    """Where each parameter of a student comes from, and one AxisMap for each of its axes.

    Names are relative to the base model unless stated otherwise.

    Attributes:
        parameters: The student's parameters that the teacher has a source for.
        tied_parameters: The tensor that each tied parameter of the student shares.
        teacher_names: The teacher's own names.
        block_mapping: By stack, the teacher's block that feeds each of the student's.
        widths: By axis on the residual stream, (teacher's size, student's size).
        vocab_indices, label_indices: Teacher row of each of the student's rows; see `make_plan`.
        random_parameters: Own names of parameters that are initialized as the model does it.
        dropped_parameters: The teacher's parameters that the student has no parameter for.
        bases: By projected axis, (d_T, d_S), float64, orthonormal columns.
        selected_indices: By a parameter's own name, the indices selected along its named axes. The two axes of grouped heads
            share the name "kv_heads group" where groups keep different members. Other axes are selected evenly.
        tensor_transforms: By name, what is applied to a teacher's tensor when it is read: rotations inside its heads.
        notes: What the plan itself cannot transfer exactly.
        depths: By stack, the number of the teacher's blocks.
        may_be_infinite: The teacher's buffers; some hold infinity as a bound.
    """

    layout: Layout
    options: PlanOptions
    teacher: TeacherCheckpoint
    student_config: PreTrainedConfig
    parameters: dict[str, ParameterPlan]
    tied_parameters: dict[str, str]
    teacher_names: dict[str, str]
    block_mapping: dict[str, list[int]]
    widths: dict[str, tuple[int, int]]
    vocab_indices: Tensor | None
    label_indices: Tensor | None
    random_parameters: list[str]
    dropped_parameters: list[str]
    bases: dict[str, Tensor] = field(default_factory=dict)
    selected_indices: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    tensor_transforms: dict[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    depths: dict[str, int] = field(default_factory=dict)
    may_be_infinite: set[str] = field(default_factory=set)
    _seen_finite: set[str] = field(default_factory=set)
    _maps: dict[tuple[str, int], list[AxisMap]] = field(default_factory=dict)  # by parameter and number of bases
    _projections: dict[tuple[str, int, int], Projection] = field(
        default_factory=dict
    )  # by axis, repeats, number of bases

    def read(self, canonical: str, rows: "tuple[int, int] | None" = None) -> Tensor:
        """Return the teacher's tensor on the CPU: as stored, or transformed in float32 or better.

        Args:
            rows: The first entry of its first axis to read, and the one after the last; None for all of them.

        Raises:
            TeacherError: NaN or infinite values; names the tensor, their number and the first position.
        """
        name, weights = self.teacher_names[canonical], self.teacher.weights
        if rows is not None and canonical in self.tensor_transforms:
            return self.read(canonical)[slice(*rows)]
        tensor = (weights.get(name) if rows is None else weights.rows(name, *rows)).cpu()
        if name not in self._seen_finite and tensor.is_floating_point():
            bounded = canonical in self.may_be_infinite
            checked = tensor.nan_to_num(nan=torch.nan, posinf=0.0, neginf=0.0) if bounded else tensor
            if rows is not None and not is_finite(checked):
                return self.read(canonical)  # raises, with the number and the position in the whole tensor
            check_finite_weights(checked, f"{name!r} of the teacher {self.teacher.name}")
            if rows is None:
                self._seen_finite.add(name)
        return self.tensor_transforms[canonical](tensor) if canonical in self.tensor_transforms else tensor

    def reads_rows(self, canonical: str) -> bool:
        """Return whether `read` of some rows reads no others."""
        return canonical not in self.tensor_transforms and self.teacher.weights.reads_rows(
            self.teacher_names[canonical]
        )

    def read_blocks(self, canonical: str) -> Iterator[Tensor]:
        """Yield the teacher's tensor in blocks of its first axis, each of at most `READ_BYTES` (or one entry)."""
        shape = self.teacher.weights.shape(self.teacher_names[canonical])
        size = shape.numel() * self.teacher.weights.dtype(self.teacher_names[canonical]).itemsize
        step = max(1, shape[0] * READ_BYTES // max(1, size))
        if canonical in self.tensor_transforms or step >= shape[0]:
            yield self.read(canonical)
            return
        for start in range(0, shape[0], step):
            yield self.read(canonical, (start, min(start + step, shape[0])))

    def report_blocks(self) -> dict[str, list[int]]:
        """Return, by stack, the teacher's block that feeds each of the student's; of nested stacks only the blocks."""
        return {
            stack.rpartition(".")[0]: blocks
            for stack, blocks in self.block_mapping.items()
            if stack.endswith("{block}") or stack.count("{") == 1  # the second: blocks within one stage
        }

    def select(self, indices: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Select indices of named axes, by a parameter's own name, in addition to those selected before."""
        self.selected_indices |= {
            name: self.selected_indices.get(name, {}) | dict(by_axis) for name, by_axis in indices.items()
        }
        self._maps.clear()

    def has_unfoldable_norms(self) -> bool:
        """Return whether blocks normalize the residual stream itself (post-norm, as in BERT) with gains that differ.

        Such gains do not commute with a projection, and no weight can absorb them.
        """
        used = {
            name
            for row in (parameter.match.row for parameter in self.parameters.values())
            for name in (*row.input_norms, row.output_norm, row.output_diagonal)
        }
        streams = {AxisName(name) for name in self.widths}
        for parameter in self.parameters.values():
            row = parameter.match.row
            if row.kind != "norm" or "{" not in row.pattern or row.axes[-1] not in streams or row.pattern in used:
                continue
            if parameter.source is not None and not parameter.canonical.endswith(".bias"):
                if not is_constant(self.read(parameter.source)):
                    return True
        return False

    def is_projected(self, parameter: ParameterPlan, axis: Axis) -> bool:
        """Return whether `axis` of `parameter` is contracted with a basis, rather than kept or selected."""
        name, _ = name_and_repeats(axis)
        if name not in self.widths or not self.options.projects:
            return False
        teacher, student = self.widths[name]
        selected = (
            parameter.block is not None
            and parameter.block > 0
            and self.options.subsequent_layers == SubsequentLayers.UNIFORM
        )
        return (teacher != student or name in self.bases) and not selected

    def maps(self, parameter: ParameterPlan) -> list[AxisMap]:
        """Return the map of each axis of `parameter`. A projection has an empty matrix until its basis is known.

        Raises:
            ShapeError, LayoutError: The student's shape cannot be made from the teacher's.
        """
        key = (parameter.name, len(self.bases))
        if key not in self._maps:
            self._maps[key] = self._find_maps(parameter)
        return self._maps[key]

    def sizes(self, parameter: ParameterPlan) -> tuple[dict[str, int], dict[str, int]]:
        """Return the teacher's and the student's size of every named axis of `parameter`.

        Raises:
            LayoutError: The axes do not multiply out to the shapes.
        """
        assert parameter.source_shape is not None
        source = self.teacher_names.get(parameter.source or "", parameter.source or "")
        teacher_sizes, student_sizes = (
            config_sizes(self.layout, each) for each in (self.teacher.config, self.student_config)
        )
        stack = self.block_table_stack(parameter)
        if stack is not None:
            teacher_sizes["blocks"], student_sizes["blocks"] = self.depths[stack], len(self.block_mapping[stack])
            teacher_sizes["gaps"], student_sizes["gaps"] = self.depths[stack] - 1, len(self.block_mapping[stack]) - 1
        teacher = solve_sizes(parameter.axes, parameter.source_shape, teacher_sizes, source)
        return teacher, solve_sizes(parameter.axes, parameter.shape, student_sizes, parameter.name)

    def block_table_stack(self, parameter: ParameterPlan) -> str | None:
        """Return the stack of a parameter that has one entry per block; None for others."""
        if not any(set(BLOCK_AXES) & set(axis_names(axis)) for axis in parameter.axes):
            return None
        first = next(stack for stack in self.block_mapping if stack.endswith("{block}"))
        return self.layout.block_tables.get(parameter.match.row.pattern, first)

    def _find_maps(self, parameter: ParameterPlan) -> list[AxisMap]:
        teacher, student = self.sizes(parameter)
        axis_maps: list[AxisMap] = []
        for axis in parameter.axes:
            if self.is_projected(parameter, axis):
                name, times = name_and_repeats(axis)
                axis_maps.append(self._projection(name, times))
            elif axis in (AxisName("vocab"), AxisName("labels")):
                indices = self.vocab_indices if axis == AxisName("vocab") else self.label_indices
                if indices is None and teacher[str(axis)] != student[str(axis)]:
                    raise ShapeError(
                        f"{parameter.name}: the student has {student[str(axis)]} rows for its {axis}, the teacher "
                        f"{teacher[str(axis)]}: they must agree."
                    )
                axis_maps.append(self._selection_or_identity(indices, teacher[str(axis)]))
            elif all(teacher[name] == student[name] for name in axis_names(axis)) and not (
                self._blocks_change(parameter, axis)
                or ("labels" in axis_names(axis) and self.label_indices is not None)
                or (self._holds_queries(parameter, axis) and self.block_attention_ratio(parameter) != 1.0)
            ):
                axis_maps.append(Identity())
            else:
                for pair in (name for name in self.selected_indices.get(parameter.name, ()) if " " in name):
                    first, second = pair.split()
                    axis = merge_adjacent(axis, first, second)
                    teacher[pair] = teacher[first] * teacher[second]
                indices, factors = select_indices(
                    axis, lambda name: self._axis_selection(parameter, name, teacher, student), teacher
                )
                axis_maps.append(Selection(indices, factors, axis_size(axis, teacher) or 0))
        return axis_maps

    def _projection(self, axis: str, times: int) -> Projection:
        """Return the one projection of an axis, which computes once what is asked about its matrix."""
        key = (axis, times, len(self.bases))
        if key not in self._projections:
            matrix = self.bases.get(axis, torch.empty(self.widths[axis]))
            self._projections[key] = Projection(matrix if times == 1 else torch.block_diag(*[matrix] * times))
        return self._projections[key]

    def _blocks_change(self, parameter: ParameterPlan, axis: Axis) -> bool:
        stack = self.block_table_stack(parameter) if set(BLOCK_AXES) & set(axis_names(axis)) else None
        return stack is not None and self.block_mapping[stack] != list(range(self.depths[stack]))

    @staticmethod
    def _selection_or_identity(indices: Tensor | None, size: int) -> AxisMap:
        return (
            Identity() if indices is None else Selection(indices, torch.ones(len(indices), dtype=torch.float64), size)
        )

    def _axis_selection(
        self, parameter: ParameterPlan, name: str, teacher: Mapping[str, int], student: Mapping[str, int]
    ) -> tuple[Tensor, Tensor]:
        units = self.selected_indices.get(parameter.name, {}).get(name)
        of_block = self.block_attention_ratio(parameter) if self._holds_queries(parameter, AxisName(name)) else 1.0
        if units is not None:
            return units, torch.full((len(units),), of_block, dtype=torch.float64)
        if name == "labels" and self.label_indices is not None:
            return self.label_indices, torch.ones(len(self.label_indices), dtype=torch.float64)
        stack = self.block_table_stack(parameter) if name in BLOCK_AXES else None
        if stack is not None:
            blocks = self.block_mapping[stack] if name == "blocks" else self.block_mapping[stack][:-1]
            return torch.tensor(blocks, dtype=torch.long), torch.ones(len(blocks), dtype=torch.float64)
        teacher_size, student_size = teacher[name], student[name]
        label = AXIS_LABELS.get(name, name)
        if (name in FIXED_AXES or name.startswith("fixed")) and teacher_size != student_size:
            if name in FIXED_AXES:
                raise ShapeError(
                    f"{parameter.name}: {label} must be the teacher's {teacher_size}, found {student_size}."
                )
            raise ShapeError(
                f"{parameter.name}: this size must be the teacher's {teacher_size}, found {student_size}. What is known of "
                f"{self.layout.family!r}: {self.layout.exactness.rstrip('.')}. Keep the size and choose fewer blocks, choose "
                "method='random', or state what the axes mean with hf_guide.register_layout."
            )
        if not 1 <= student_size <= teacher_size:
            raise ShapeError(
                f"{parameter.name}: the student's {label} is {student_size}, the teacher's {teacher_size}: "
                f"choose 1 to {teacher_size}."
            )
        factor = of_block
        if name in PREFIX_AXES:
            indices = list(range(student_size))
        elif name.endswith(("q_dim", "k_dim")):
            rotary = (
                rotary_size(self.layout, self.teacher.config, teacher_size),
                rotary_size(self.layout, self.student_config, student_size),
            )
            indices = rope_pair_indices(teacher_size, student_size, *rotary, self.layout.rope)
            scaled_here = parameter.match.row.kind == "norm" or not self._has_query_norm(parameter)
            if name.endswith("q_dim") and teacher_size != student_size and scaled_here and self.options.projects:
                factor *= (
                    teacher_size
                    / student_size
                    * self.attention_scale(self.teacher.config, teacher_size)
                    / self.attention_scale(self.student_config, student_size)
                )
        elif name in HEADS and self.layout.alibi is not None and self.layout.alibi(self.teacher.config):
            indices = alibi_head_indices(teacher_size, student_size)
        else:
            indices = evenly_spaced_indices(teacher_size, student_size)
        return torch.tensor(indices, dtype=torch.long), torch.full((student_size,), factor, dtype=torch.float64)

    def selected_heads(self, parameter: ParameterPlan) -> list[int] | None:
        """Return the teacher's heads that feed a parameter's, of all groups together; None where that is each of them.

        A parameter whose axes name no heads, or those of keys and values alone, has none.
        """
        names = {name for axis in parameter.axes for name in axis_names(axis)}
        named = [name for name in names if name.endswith("heads") and name != "kv_heads"]
        if {"kv_heads", "group"} <= names:
            axis: Axis = AxisProduct((AxisName("kv_heads"), AxisName("group")))
        elif len(named) == 1:
            axis = AxisName(named[0])
        else:
            return None
        teacher, student = self.sizes(parameter)
        for pair in (name for name in self.selected_indices.get(parameter.name, ()) if " " in name):
            first, second = pair.split()
            axis = merge_adjacent(axis, first, second)
            teacher[pair] = teacher[first] * teacher[second]
        heads = select_indices(axis, lambda name: self._axis_selection(parameter, name, teacher, student), teacher)[
            0
        ].tolist()
        return heads if len(heads) != axis_size(axis, teacher) else None

    def selected_heads_by_block(self) -> dict[str, list[list[int]]]:
        """Return the teacher's heads that each block's attention keeps, by module, where it has fewer than the teacher."""
        by_module: dict[str, dict[int, list[int]]] = {}
        for parameter in self.parameters.values():
            if parameter.source is None or parameter.block is None or len(parameter.axes) < 2:
                continue
            heads = self.selected_heads(parameter)
            if heads is not None:
                module = parameter.match.row.pattern.replace(".{block}", "").rpartition(".")[0]
                by_module.setdefault(module, {})[parameter.block] = heads
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

    def teacher_block(self, parameter: ParameterPlan) -> int:
        """Return the index of the teacher's block that feeds the block of `parameter`."""
        assert parameter.block is not None
        stack = parameter.match.row.pattern.partition("{block}")[0] + "{block}"
        return self.block_mapping[stack][parameter.block] if stack in self.block_mapping else parameter.block

    def block_attention_ratio(self, parameter: ParameterPlan) -> float:
        """Return what queries are multiplied with because their block has another index, or their model another depth."""
        return self.block_ratio(parameter, self.layout.block_attention_scale)

    def block_ratio(self, parameter: ParameterPlan, scale: BlockScale | None) -> float:
        """Return what the teacher's block multiplies with, by `scale`, over what the student's does at its index."""
        if scale is None or parameter.block is None or parameter.source is None:
            return 1.0
        return scale(self.teacher.config, self.teacher_block(parameter)) / scale(self.student_config, parameter.block)

    def _holds_queries(self, parameter: ParameterPlan, axis: Axis) -> bool:
        """Return whether an axis holds the queries that the attention's scale is folded into: a norm's, or else a weight's."""
        if not any(name.endswith("q_dim") for name in axis_names(axis)):
            return False
        return parameter.match.row.kind == "norm" or not self._has_query_norm(parameter)

    def _has_query_norm(self, parameter: ParameterPlan) -> bool:
        """Return whether a learned norm between this query weight and the logits holds the logits' scale."""
        home = parameter.canonical.rpartition(".")[0].rpartition(".")[0]
        return any(
            other.match.row.kind == "norm"
            and other.canonical.startswith(home)
            and "q_dim" in (name for axis in other.axes for name in axis_names(axis))
            for other in self.parameters.values()
        )


def check_finite_weights(tensor: Tensor, what: str) -> None:
    """Check that a tensor has no NaN or infinite values.

    Raises:
        TeacherError: There are some; the message states how many and where the first is.
    """
    if not is_finite(tensor):
        wrong = ~torch.isfinite(tensor)
        raise TeacherError(
            f"{what} holds {int(wrong.sum())} NaN or infinite values, the first at {wrong.nonzero()[0].tolist()}. A teacher's "
            "weights must be finite: fetch it again, or take a checkpoint from before its training diverged."
        )
