"""The registry of initialization methods, and the protocol by which `from_teacher` asks them.

`from_teacher` asks a method in this order:

1. `method_class(config)`; then `check_data(calibration_dataset, calibration_cache_dir)` before the teacher is opened.
2. `plan_options(layer_selection)`: what the plan needs, with the config's own choice of blocks. A method with
   `requires_layout = False` is not asked: it does not need to know the family's axes.
3. `estimate_cost(setup)`: the memory and time, from shapes alone, where the teacher is large; what does not fit is refused.
4. `collect(setup)`: with `requires_data = True`, run the teacher on the data. It may return each block's influence, by which
   `layer_selection="block_influence"` selects blocks.
5. `build(setup)`: the student, by default with uninitialized parameters.
6. `initialize(student, setup)`: fill every parameter and report where each came from.

A fifth method needs no edit elsewhere: `from_teacher(method="name")`, `InitializationConfig(method="name", ...)`, the command
line and `hf-guide methods` read the registry.
"""

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from hf_guide.errors import OptionError
from hf_guide.initialization.blocks.stacks import stack_pattern
from hf_guide.initialization.build import build_student
from hf_guide.initialization.config import (
    CONFIG_CLASSES,
    MEASURED_SELECTIONS,
    InitializationConfig,
    PlanOptions,
    registered_configs,
)
from hf_guide.initialization.cost import CostEstimate, model_parts, transfer_parts
from hf_guide.initialization.infer_layout import layout_for
from hf_guide.initialization.plan import Plan
from hf_guide.initialization.planning import make_plan
from hf_guide.initialization.report import (
    InitializationReport,
    ParameterRecord,
    format_count,
    format_ranges,
    parameter_table,
    without_numbers,
)
from hf_guide.initialization.student_shape import label_row_indices
from hf_guide.initialization.transfer import Transfer
from hf_guide.initialization.trial_forward import check_forward
from hf_guide.layouts.hierarchy import check_single_stage_width
from hf_guide.layouts.registry import Layout
from hf_guide.models.model_classes import strip_base_prefix
from hf_guide.models.modes import on_meta_device
from hf_guide.teachers.checkpoint import TeacherCheckpoint
from hf_guide.utils.deprecation import with_renamed_options
from hf_guide.utils.escaping import to_single_line
from hf_guide.utils.public_names import public_name


@dataclass(frozen=True)
class StudentSetup:
    """The input of a method: the opened teacher, and the student to make.

    Attributes:
        teacher: The opened checkpoint: config, class, and tensors that are read one by one.
        source: The `teacher` argument of `from_teacher`: a Hub id, a folder, or a loaded model.
        model_class, config, dtype: The student's.
        options: What `plan_options` returned, with the blocks resolved.
        vocab_indices: Teacher row of each of the student's vocabulary rows, -1 for a row of zeros; None for all in order.
        label_indices: The same of a classification head; empty where the labels disagree and the head is new.
        calibration_dataset, calibration_cache_dir: The arguments of `from_teacher`.
        hub: Keywords of `from_pretrained` (token, cache_dir, ...) with which the teacher's other files are loaded.
        identity: What else the student depends on, as JSON: with all other fields it identifies the call.
        show_progress: Whether to show progress bars.
    """

    teacher: TeacherCheckpoint
    source: Any
    model_class: type[PreTrainedModel]
    config: PreTrainedConfig
    dtype: torch.dtype
    options: PlanOptions
    vocab_indices: Tensor | None = None
    label_indices: Tensor | None = None
    calibration_dataset: Any = None
    calibration_cache_dir: Any = None
    hub: Mapping[str, Any] = field(default_factory=dict)
    identity: Mapping[str, Any] = field(default_factory=dict)
    show_progress: bool = True

    @property
    def layout(self) -> Layout:
        """The layout of the teacher's family: registered, or inferred once per class and config.

        Raises:
            LayoutError: The axes of the family are not known.
        """
        return layout_for(self.teacher.config, self.teacher.model_class)

    def validate_plan(self) -> Plan:
        """Return the plan of this student, before the teacher is run; the student built for it is discarded.

        Raises:
            ShapeError, LayoutError: The student cannot be made, or cannot run.
        """
        self.check_single_stream()
        student = build_student(self.model_class, self.config, self.teacher.dtype, seed=self.options.seed)
        plan = self.plan(student)
        check_forward(student, self.teacher.config, filled=False)
        return plan

    def meta_student(self) -> PreTrainedModel:
        """Return the student without memory for its weights.

        Raises:
            ShapeError: The family rejects the shape.
        """
        with on_meta_device():
            return build_student(self.model_class, self.config, self.dtype, seed=self.options.seed)

    def plan(self, student: PreTrainedModel) -> Plan:
        """Return the plan of a student, which may be on the meta device.

        Raises:
            ShapeError, LayoutError: The student cannot be made.
        """
        labels = label_row_indices(self.teacher.config, self.config)
        return make_plan(
            student, self.teacher, self.layout, self.options, vocab_indices=self.vocab_indices, label_indices=labels
        )

    def check_single_stream(self) -> None:
        """Check that the teacher's blocks share one residual stream, as a calibrated initialization needs.

        Raises:
            LayoutError: Its stages have several widths.
        """
        prefix, weights = self.teacher.base_model_prefix, self.teacher.weights
        shapes = {strip_base_prefix(name, prefix): weights.shape(name) for name in weights.keys()}
        check_single_stage_width(self.layout, shapes)


@dataclass(frozen=True)
class StudentPlan:
    """What an initialization would make, and what it would take, without a weight read.

    Attributes:
        student: The student on the meta device: its class, config, names and shapes.
        method: The name of the method.
        teacher: The teacher's id, folder or class, and how many parameters it has.
        blocks: By stack, the teacher's block that feeds each of the student's; without the stacks in `measured`, and empty for
            a method that reads only the config.
        sizes: By axis, the teacher's size and the student's.
        records: One for each parameter of the student; sources in blocks of the stacks in `measured` have "*" as their number.
        estimate: Memory and time.
        measured: By stack whose blocks the data decide, the teacher's number of blocks and the student's.
        layer_selection: The rule by which the data decide them; empty where `measured` is.
    """

    student: PreTrainedModel
    method: str
    teacher: tuple[str, int]
    blocks: dict[str, list[int]]
    sizes: dict[str, tuple[int, int]]
    records: list[ParameterRecord]
    estimate: CostEstimate
    measured: dict[str, tuple[int, int]] = field(default_factory=dict)
    layer_selection: str = ""

    @classmethod
    def of(cls, initializer: "InitializationMethod", setup: StudentSetup) -> "StudentPlan":
        """Return the plan of a call.

        Raises:
            ShapeError, LayoutError: The student cannot be made.
        """
        student, weights = setup.meta_student(), setup.teacher.weights
        teacher = (setup.teacher.name, sum(weights.shape(name).numel() for name in weights.keys()))
        estimate, method = initializer.estimate_cost(setup), initializer.config.method
        if not initializer.requires_layout:
            records = [ParameterRecord(name, list(each.shape)) for name, each in student.named_parameters()]
            return cls(student, method, teacher, {}, {}, records, estimate)
        plan = setup.plan(student)
        transfer = Transfer(plan, {}, {}, torch.promote_types(setup.teacher.dtype, torch.float32))
        sizes = {axis: sizes for axis, sizes in plan.widths.items()}
        blocks, records = plan.report_blocks(), transfer.records(student)
        selection = initializer.plan_options().layer_selection
        if selection not in MEASURED_SELECTIONS:
            return cls(student, method, teacher, blocks, sizes, records, estimate)
        chosen = {stack for stack, kept in plan.block_mapping.items() if len(kept) < plan.depths[stack]}
        measured = {
            stack.rpartition(".")[0]: (plan.depths[stack], len(plan.block_mapping[stack])) for stack in sorted(chosen)
        }
        blocks = {stack: kept for stack, kept in blocks.items() if stack not in measured}
        within = {
            parameter.name
            for parameter in plan.parameters.values()
            if chosen & {stack_pattern(parameter.match, placeholder) for placeholder in parameter.match.numbers}
        }
        for record in records:
            if record.source is not None and record.name in within:
                record.source = without_numbers(record.source)
        rule = str(selection) if measured else ""
        return cls(student, method, teacher, blocks, sizes, records, estimate, measured, rule)

    @property
    def student_bytes(self) -> int:
        """The bytes of the student's weights."""
        return int(self.student.get_memory_footprint(return_buffers=False))

    def __str__(self) -> str:
        count = format_count(self.student.num_parameters())
        name, parameters = self.teacher
        sizes = [f"{axis} {old} -> {new}" for axis, (old, new) in self.sizes.items()]
        blocks = [f"{stack} from the teacher's {format_ranges(numbers)}" for stack, numbers in self.blocks.items()]
        blocks += [
            f"{kept} of the teacher's {depth} {stack}, which the data decide (layer_selection={self.layer_selection!r})"
            for stack, (depth, kept) in self.measured.items()
        ]
        lines = [
            f"{type(self.student).__name__} with {count} parameters, of {to_single_line(public_name(name))} "
            f"({format_count(parameters)}), by {self.method}",
            f"Widths: {', '.join(sizes) or 'none named'}",
            f"Blocks: {'; '.join(blocks) or 'none'}",
            str(self.estimate),
            "",
            *parameter_table(self.records),
        ]
        return "\n".join(lines)


class InitializationMethod(abc.ABC):
    """How a student is initialized from its teacher. Subclass it and call `register_method`; see the module's docstring.

    Attributes:
        requires_data: The method needs a `calibration_dataset`; without it, one is an error.
        requires_layout: The method needs the names of the family's axes; without it, the teacher only lends its config.

    Example:
        >>> from hf_guide import InitializationConfig, InitializationMethod, from_teacher, register_method
        >>> from hf_guide.initialization.report import random_report
        >>> @dataclass
        ... class ZerosConfig(InitializationConfig):
        ...     method: str = "zeros"
        >>> class ZerosMethod(InitializationMethod):
        ...     requires_layout = False
        ...     def initialize(self, student, setup):
        ...         for parameter in student.parameters():
        ...             torch.nn.init.zeros_(parameter)
        ...         return random_report(student, setup.teacher)
        >>> register_method("zeros", ZerosConfig, ZerosMethod)
        >>> student = from_teacher("HuggingFaceTB/SmolLM2-135M", method="zeros", num_hidden_layers=2, show_progress=False)
        >>> student.lm_head.weight.count_nonzero().item()
        0
    """

    requires_data: ClassVar[bool] = False
    requires_layout: ClassVar[bool] = True

    def __init__(self, config: Any) -> None:
        self.config = config

    def check_data(self, calibration_dataset: Any, calibration_cache_dir: Any) -> None:
        """Check the data of a call before the teacher is opened.

        Raises:
            OptionError: Data for a method that uses none.
        """
        for name, value, other_use in (
            ("calibration_dataset", calibration_dataset, ": it would only choose a vocab_size below the teacher's"),
            ("calibration_cache_dir", calibration_cache_dir, ""),
        ):
            if value is not None:
                raise OptionError(
                    f"{name} is set, but method={self.config.method!r} uses no data{other_use}; leave it out."
                )

    def plan_options(self) -> PlanOptions:
        """Return what a plan needs to know of the method; by default every axis and the blocks are selected evenly."""
        layers = getattr(self.config, "layer_selection", PlanOptions.layer_selection)
        return PlanOptions(layer_selection=layers, seed=self.config.seed)

    def estimate_cost(self, setup: StudentSetup) -> CostEstimate:
        """Return the memory and time of a call, from shapes alone; by default those of a transfer of weights.

        Raises:
            ShapeError, LayoutError: The student cannot be made.
        """
        student = setup.meta_student()
        parts = model_parts(student)
        return CostEstimate([*parts, *transfer_parts(setup.plan(student))] if self.requires_layout else parts)

    def collect(self, setup: StudentSetup) -> "dict[str, list[float]] | None":
        """Run the teacher on the data; return the influence of each block by stack, or None if blocks do not depend on it."""
        return None

    def reselect(self, layers: Mapping[str, Sequence[int]]) -> "dict[str, list[float]] | None":
        """Return other scores of the blocks than before, or None to leave them; called again until it returns None.

        Args:
            layers: By stack, the blocks that a student has by the scores before: those that its config can have.
        """
        return None

    def build(self, setup: StudentSetup) -> PreTrainedModel:
        """Return the student before it is initialized.

        Raises:
            ShapeError: The family rejects the shape.
        """
        return build_student(setup.model_class, setup.config, setup.dtype, seed=self.config.seed)

    @abc.abstractmethod
    def initialize(self, student: PreTrainedModel, setup: StudentSetup) -> InitializationReport:
        """Fill every parameter of `student`, in place; return where each came from."""


_METHOD_CLASSES: dict[str, type[InitializationMethod]] = {}


def register_method(
    name: str, config_class: type[InitializationConfig], method_class: type[InitializationMethod]
) -> None:
    """Register an initialization method under a name.

    Args:
        name: What `from_teacher(method=...)` and the command line call it.
        config_class: A dataclass that extends `InitializationConfig`; `method` defaults to `name`, and each field of its
            own has a default and metadata with a "help" text (and "choices", a StringEnum, where values are named).
        method_class: Implements `InitializationMethod` and is constructed with an instance of `config_class`.

    Raises:
        OptionError: The name is taken by other classes, or a class does not fit; the message names it.

    Example:
        >>> import dataclasses
        >>> from dataclasses import dataclass
        >>> from hf_guide import InitializationConfig, register_method
        >>> from hf_guide.methods.uniform import UniformMethod
        >>> @dataclass
        ... class FirstBlocksConfig(InitializationConfig):
        ...     method: str = "first_blocks"
        >>> class FirstBlocks(UniformMethod):
        ...     def plan_options(self):
        ...         return dataclasses.replace(super().plan_options(), layer_selection="first")
        >>> register_method("first_blocks", FirstBlocksConfig, FirstBlocks)
    """
    if not isinstance(name, str) or not name.replace("-", "_").isidentifier():
        raise OptionError(f"A method's name must be an identifier such as 'my_method'; found {name!r}.")
    if not (isinstance(config_class, type) and issubclass(config_class, InitializationConfig)):
        raise OptionError(f"config_class of {name!r} must extend InitializationConfig; found {config_class!r}.")
    if config_class is InitializationConfig or "__dataclass_fields__" not in vars(config_class):
        raise OptionError(f"config_class of {name!r} must be a dataclass of its own; found {config_class.__name__}.")
    if not (isinstance(method_class, type) and issubclass(method_class, InitializationMethod)):
        raise OptionError(f"method_class of {name!r} must extend InitializationMethod; found {method_class!r}.")
    default = config_class.__dataclass_fields__["method"].default
    if default != name:
        raise OptionError(f"{config_class.__name__}.method must default to {name!r}; found {default!r}.")
    for option in dataclasses.fields(config_class):
        if option.default is dataclasses.MISSING and option.default_factory is dataclasses.MISSING:
            raise OptionError(f"{config_class.__name__}.{option.name} must have a default.")
        if option.name != "method" and not option.metadata.get("help"):
            raise OptionError(
                f"{config_class.__name__}.{option.name} must have a help text: field(default=..., metadata={{'help': ...}})."
            )
    registered = (registered_configs().get(name), _METHOD_CLASSES.get(name))
    if registered != (None, None) and registered != (config_class, method_class):
        raise OptionError(
            f"method {name!r} is registered already, with {registered[0].__name__} and {registered[1].__name__}; "  # type: ignore[union-attr]
            "choose another name."
        )
    if registered == (None, None):
        with_renamed_options(config_class.renamed_options)(config_class)
    CONFIG_CLASSES[name], _METHOD_CLASSES[name] = config_class, method_class


def make_method(config: InitializationConfig) -> InitializationMethod:
    """Return the method that `config` belongs to."""
    return _METHOD_CLASSES[config.method](config)


@dataclass(frozen=True)
class MethodOption:
    """One option of a method, as a listing shows it.

    Attributes:
        name: The field's name.
        type: The field's type, as text.
        default: The field's default.
        help: One or two sentences.
        choices: The values that are named, empty for others.
    """

    name: str
    type: str
    default: Any
    help: str
    choices: tuple[str, ...] = ()


def list_methods() -> dict[str, list[MethodOption]]:
    """Return every registered method's options by the method's name, in the order of registration.

    Example:
        >>> from hf_guide.methods import list_methods
        >>> [option.name for option in list_methods()["random"]]
        ['seed']
    """
    return {
        name: [
            MethodOption(
                option.name,
                option.type if isinstance(option.type, str) else getattr(option.type, "__name__", str(option.type)),
                option.default,
                option.metadata["help"],
                tuple(member.value for member in option.metadata.get("choices", ())),
            )
            for option in dataclasses.fields(config_class)
            if option.name != "method"
        ]
        for name, config_class in registered_configs().items()
    }
