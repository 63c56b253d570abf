"""What an initialization takes: memory and time, from shapes alone, before a weight is read.

A cost is a list of parts. Those that are kept add up; of the others, which follow one another, the largest counts. A method
adds its own parts in `InitializationMethod.estimate_cost`.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from hf_guide.errors import ResourceError
from hf_guide.initialization.basis import FLOAT32_ROWS, MAX_FLOAT64_PRODUCTS
from hf_guide.initialization.plan import READ_BYTES, ParameterPlan, Plan
from hf_guide.initialization.tensor_names import unique_tensors
from hf_guide.initialization.transfer import Transfer, projected_axes
from hf_guide.initialization.trial_forward import MAX_COPIED_BYTES
from hf_guide.layouts.grammar import AxisName, Projection, Selection
from hf_guide.teachers.checkpoint import TeacherCheckpoint
from hf_guide.utils.memory import available_memory

MIN_CHECKED_BYTES = 100_000_000
"""Bytes of a teacher from which the cost is estimated and checked: a smaller one takes seconds and fits anywhere."""

READ_RATE = 1e9
"""Bytes per second that files are read with, assumed: a solid-state disk, or the page cache under load."""

LIBRARY_BYTES = 64_000_000
"""What the first call takes beyond the imports of the package: modules and library code that are loaded when they are used,
buffers of matrix products, freed memory that is not given back. Measured in new processes: 19 to 32 MB with models of 0.2 M
parameters by every method, up to 55 MB with one of 501 M."""

EIGEN_PRODUCTS = 7
"""Multiplications of a symmetric eigendecomposition in float64, in units of width cubed (LAPACK's syevd, measured)."""


@dataclass(frozen=True)
class CostPart:
    """What one part of an initialization takes.

    Attributes:
        name: What it is.
        bytes: Its memory.
        is_kept: It stays in memory until the end; others are freed before the next part.
        products: Multiplications of its matrix products, by dtype.
        read: Bytes that are read from files.
        advice: What would make it smaller; empty where nothing does.
    """

    name: str
    bytes: int
    is_kept: bool = False
    products: Mapping[torch.dtype, float] = field(default_factory=dict)
    read: int = 0
    advice: str = ""


@dataclass(frozen=True)
class CostEstimate:
    """The estimated memory and time of an initialization.

    Attributes:
        parts: What it consists of.

    Example:
        >>> parts = [CostPart("the student", 4_000_000, is_kept=True), CostPart("a product", 1_000_000)]
        >>> CostEstimate([*parts, CostPart("a larger product", 2_000_000)]).memory_bytes
        6000000
    """

    parts: Sequence[CostPart]

    @property
    def memory_bytes(self) -> int:
        """The most memory at any time, beyond what the process has already."""
        kept = sum(part.bytes for part in self.parts if part.is_kept)
        return kept + max((part.bytes for part in self.parts if not part.is_kept), default=0)

    def seconds(self) -> float:
        """Return about how long it takes on this machine, whose matrix products are timed for that (a tenth of a second)."""
        products: dict[torch.dtype, float] = {}
        for part in self.parts:
            for dtype, count in part.products.items():
                products[dtype] = products.get(dtype, 0.0) + count
        reading = sum(part.read for part in self.parts) / READ_RATE
        return reading + sum(count / _product_rate(dtype) for dtype, count in products.items())

    def check_fits(self, available: int | None = None) -> None:
        """Check that the memory is there.

        Args:
            available: Bytes that can be taken; None for what the system and the process's control group leave.

        Raises:
            ResourceError: There is less; lists the largest parts and what makes them smaller.
        """
        available = available_memory() if available is None else available
        if self.memory_bytes <= available:
            return
        parts = sorted(self.parts, key=lambda part: -part.bytes)[:3]
        advice = list(
            dict.fromkeys(part.advice for part in sorted(self.parts, key=lambda part: -part.bytes) if part.advice)
        )
        raise ResourceError(
            f"This takes about {format_bytes(self.memory_bytes)} of memory, and {format_bytes(available)} are available. The "
            f"largest parts: {', '.join(f'{part.name} {format_bytes(part.bytes)}' for part in parts)}. What would help: "
            f"{', '.join([*advice, 'a machine or a control group with more memory'])}."
        )

    def summary(self) -> str:
        """Return one line: memory, time, and what is available."""
        return (
            f"about {format_bytes(self.memory_bytes)} of memory (available: {format_bytes(available_memory())}) and "
            f"{format_seconds(self.seconds())} with {torch.get_num_threads()} threads"
        )

    def __str__(self) -> str:
        width = max((len(part.name) for part in self.parts), default=0)
        lines = [
            f"  {part.name:{width}}  {format_bytes(part.bytes):>10}  {'kept' if part.is_kept else 'one at a time'}"
            for part in self.parts
        ]
        return "\n".join([f"Estimated: {self.summary()}", *lines])


def stored_bytes(teacher: TeacherCheckpoint) -> int:
    """Return the bytes of a teacher's tensors as they are stored."""
    weights = teacher.weights
    return sum(weights.shape(name).numel() * weights.dtype(name).itemsize for name in weights.keys())


def model_parts(student: PreTrainedModel) -> list[CostPart]:
    """Return the parts of every method: the student, which may be on the meta device, the run that tries it, the libraries."""
    size = sum(tensor.numel() * tensor.element_size() for tensor in unique_tensors(student)[0].values())
    wide = student.dtype.itemsize > 2
    advice = "a smaller student" + (", dtype='bfloat16'" if wide else "")
    parts = [
        CostPart("the student", size, is_kept=True, advice=advice),
        CostPart("the libraries", LIBRARY_BYTES, is_kept=True),
    ]
    if size <= MAX_COPIED_BYTES:
        parts.append(CostPart("the copy of the student that is run once", size))
    return parts


def transfer_parts(plan: Plan) -> list[CostPart]:
    """Return the parts of a transfer of weights: the bases of a plan that projects, and the largest of the tensors."""
    parts = [part for axis in projected_axes(plan) for part in _basis_parts(plan, axis)]
    transfer = Transfer(plan, {}, {}, torch.promote_types(plan.teacher.dtype, torch.float32))
    largest, products, read = CostPart("no tensor", 0), dict[torch.dtype, float](), 0
    for parameter in plan.parameters.values():
        if parameter.source is None:
            continue
        part = _tensor_part(transfer, parameter)
        read += part.read
        for dtype, count in part.products.items():
            products[dtype] = products.get(dtype, 0.0) + count
        largest = part if part.bytes > largest.bytes else largest
    return [*parts, CostPart(largest.name, largest.bytes, products=products, read=read)]


def _basis_parts(plan: Plan, axis: str) -> Iterator[CostPart]:
    """Yield what the basis of an axis takes: its second moment and matrix are kept."""
    width, size = plan.widths[axis]
    square = 8 * width**2
    yield CostPart(f"the basis of {axis!r}", square + 8 * width * size, is_kept=True)
    products = {torch.float64: float(EIGEN_PRODUCTS * width**3)}
    read, rows = 0, 0
    for parameter in plan.parameters.values():
        if parameter.match.row.kind == "table" and AxisName(axis) in parameter.axes and parameter.source is not None:
            numbers = (parameter.source_shape or parameter.shape).numel()
            read += numbers * plan.teacher.weights.dtype(plan.teacher_names[parameter.source]).itemsize
            exact = numbers * width <= MAX_FLOAT64_PRODUCTS or plan.teacher.dtype == torch.float64
            dtype = torch.float64 if exact else torch.float32
            products[dtype] = products.get(dtype, 0.0) + numbers * width / 2
            rows = max(rows, min(numbers // width, READ_BYTES // (2 * width), FLOAT32_ROWS))
    # LAPACK's eigendecomposition has the eigenvectors and two more squares of workspace; summing has one and the rows.
    yield CostPart(
        f"the eigendecomposition of {axis!r}",
        max(3 * square, square + 4 * width * rows + min(read, READ_BYTES)),
        products=products,
        read=read,
    )


def _tensor_part(transfer: Transfer, parameter: ParameterPlan) -> CostPart:
    """Return what one parameter takes: what is read of its source at once, what is selected of that, and the result."""
    plan, maps = transfer.plan, transfer.plan.maps(parameter)
    assert parameter.source is not None and parameter.source_shape is not None
    stored = plan.teacher.weights.dtype(plan.teacher_names[parameter.source])
    source, read = parameter.source_shape.numel(), parameter.source_shape.numel() * stored.itemsize
    blocks = len(transfer.row_blocks(parameter))
    selects = any(isinstance(chosen, Selection) for chosen in maps)
    selected = source
    for chosen, size in zip(maps, parameter.source_shape, strict=bool(maps)):
        selected = selected * len(chosen.indices) // max(1, size) if isinstance(chosen, Selection) else selected
    held = read // blocks + (selected * stored.itemsize // blocks if selects else 0)
    products: dict[torch.dtype, float] = {}
    numbers = selected
    for chosen in maps:
        if not isinstance(chosen, Projection):
            continue
        width, size = chosen.matrix.shape
        dtype = transfer.product_dtype(parameter, stored, numbers // blocks)
        products[dtype] = products.get(dtype, 0.0) + float(numbers) * size
        converted = min(READ_BYTES, numbers * dtype.itemsize // blocks) if dtype != stored else 0
        numbers = numbers * size // width
        held += converted + (width * size + numbers // blocks) * dtype.itemsize
    return CostPart(f"the largest tensor, {parameter.name}", held, products=products, read=read)


def _product_rate(dtype: torch.dtype) -> float:
    """Return this machine's multiplications per second in products of matrices of a dtype, with torch's threads."""
    one = torch.ones(768, 768, dtype=dtype)
    one @ one
    start = time.perf_counter()
    one @ one
    return 768**3 / max(time.perf_counter() - start, 1e-6)


def format_bytes(number: int) -> str:
    """Return a number of bytes as people write it.

    Example:
        >>> format_bytes(1_500_000_000), format_bytes(2_000_000)
        ('1.5 GB', '2.0 MB')
    """
    for unit, size in (("TB", 10**12), ("GB", 10**9)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number / 1e6:.1f} MB"


def format_seconds(seconds: float) -> str:
    """Return a duration as people write it.

    Example:
        >>> format_seconds(8), format_seconds(130), format_seconds(7300)
        ('8 s', '2 min', '2.0 h')
    """
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
