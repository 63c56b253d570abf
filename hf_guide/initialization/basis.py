"""Fit the basis onto which a residual stream is projected: eigenvectors of a second moment of embeddings or activations.

Arithmetic is in float64, with at most a few thousand rows in float64 at once; of a large table the products of a few thousand
rows are summed in float32, and these sums in float64.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_guide.errors import OptionError, ShapeError, TeacherError
from hf_guide.initialization.plan import ParameterPlan, Plan
from hf_guide.layouts.grammar import AxisName, axis_names
from hf_guide.utils.finite import non_finite_rows

CHUNK_ROWS = 512  # so many rows in float64 stay in the processor's cache while the panels walk over them
PANEL_COLUMNS = 256
FLOAT32_ROWS = 4096  # of which the products are summed in float32

MAX_FLOAT64_PRODUCTS = 1e11
"""Rows times width squared up to which a second moment is computed in float64 products: about two seconds of one core."""

ROUNDING_FLOOR = 1e-6
"""Of the largest eigenvalue; smaller ones may be the rounding of float32 products, about 1e-8 of the moment's entries."""


@dataclass(frozen=True)
class ResidualBasis:
    """`size` orthonormal directions of a `width`-dimensional residual stream.

    Attributes:
        matrix: M, shape (width, size), float64, orthonormal columns: a teacher's row x becomes the student's x M.
        eigenvalues: shape (width,), float64, descending: the spectrum of the whole second moment.
        explained: Fraction (0 to 1) of the second moment's trace that M keeps.
    """

    matrix: Tensor
    eigenvalues: Tensor
    explained: float


def second_moment(
    rows: Iterable[Tensor],
    width: int,
    *,
    centered: bool = False,
    name: str = "the rows",
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Sum x_i^T x_i over all rows x_i, streamed.

    Args:
        rows: Chunks of shape (any, width), of any floating dtype; one chunk may be the whole table.
        width: Number of columns of every chunk.
        centered: Subtract the mean row first.
        name: Name of the rows in errors.
        dtype: Of the products, float64 or float32; those of at most 4,096 rows are summed in it, their sums in float64.

    Returns:
        The second moment, (width, width), float64, on the device of the first chunk if that is the CPU or a CUDA device.

    Raises:
        ShapeError: A chunk of another width.
        TeacherError: A row that is not finite.

    Example:
        >>> second_moment([torch.tensor([[1.0, 2.0], [3.0, 0.0]])], 2)
        tensor([[10.,  2.],
                [ 2.,  4.]], dtype=torch.float64)
    """
    moment, total = torch.zeros(width, width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)
    seen = 0
    for chunk in rows:
        if chunk.ndim != 2 or chunk.shape[1] != width:
            raise ShapeError(f"{name}: expected chunks of shape (any, {width}), found {tuple(chunk.shape)}.")
        if seen == 0 and chunk.device.type == "cuda":
            moment, total = moment.to(chunk.device), total.to(chunk.device)
        first_row = seen
        for part in chunk.detach().split(CHUNK_ROWS if dtype == torch.float64 else FLOAT32_ROWS):
            part = part.to(moment.device, dtype)
            if centered:
                total += part.sum(0, dtype=torch.float64)
            # The moment is symmetric: only its lower panels are multiplied out, which saves nearly half the work.
            for start in range(0, width, PANEL_COLUMNS):
                panel, lower = part[:, start : start + PANEL_COLUMNS], moment[start:, start : start + PANEL_COLUMNS]
                if dtype == torch.float64:
                    lower.addmm_(part[:, start:].T, panel)
                else:
                    lower += part[:, start:].T @ panel
            seen += len(part)
        if not torch.isfinite(moment.trace()):  # checked once per chunk: a pass over every row would cost a tenth more
            _check_finite_rows(chunk, first_row, name)
    moment = moment.tril() + moment.tril(-1).T
    if centered and seen > 0:
        moment -= torch.outer(total, total) / seen
    return moment


def fit_basis(moment: Tensor, size: int, *, keep_mean: bool = False) -> ResidualBasis:
    """Return the `size` directions that keep most of a second moment: its top eigenvectors (GUIDE, arXiv 2510.06502).

    Signs are fixed (the entry of largest magnitude is positive), so the same moment gives the same basis. With
    `size == width` nothing is lost and the matrix is exactly the identity.

    Args:
        moment: a symmetric second moment, shape (width, width).
        size: how many directions to keep, 1 to width.
        keep_mean: for models with LayerNorm. One direction is spent on the all-ones vector, M^T 1_T being a multiple
            of 1_S, so that subtracting the mean commutes with M: M^T (I - 11^T/d_T) x = (I - 11^T/d_S) M^T x. The
            other size - 1 directions are the best ones orthogonal to all-ones.

    Raises:
        ShapeError: a size that is not within 1 and width.
    """
    width = moment.shape[0]
    if not 1 <= size <= width:
        raise ShapeError(
            f"A basis of {size} directions does not fit a residual stream of width {width}; choose 1 to {width}."
        )
    moment = moment.to(torch.float64)
    if size == width:
        spectrum = torch.linalg.eigvalsh(moment).flip(0).clamp(min=0)
        return ResidualBasis(torch.eye(width, dtype=torch.float64, device=moment.device), spectrum, 1.0)
    if keep_mean:
        spectrum = torch.linalg.eigvalsh(moment).flip(0).clamp(min=0)
        outside = _mean_free_basis(width).to(moment.device)
        directions = outside.T @ _top_eigenvectors(outside @ moment @ outside.T, size - 1)[1]
        matrix = _fix_signs(directions) @ _mean_free_basis(size).to(moment.device) + (width * size) ** -0.5
    else:
        spectrum, directions = _top_eigenvectors(moment, size)
        matrix = _fix_signs(directions)
    trace = spectrum.sum().item()
    retained_trace = (matrix * (moment @ matrix)).sum().item() if keep_mean else spectrum[:size].sum().item()
    return ResidualBasis(matrix, spectrum, min(1.0, retained_trace / trace) if trace > 0 else 1.0)


def fit_channel_selection(moment: Tensor, size: int) -> ResidualBasis:
    """Return the `size` channels that hold most of a second moment's trace, in their order, as columns of the identity.

    Raises:
        ShapeError: a size that is not within 1 and width.
    """
    whole = fit_basis(moment, len(moment))
    if not 1 <= size <= len(moment):
        raise ShapeError(
            f"{size} channels do not fit a residual stream of width {len(moment)}; choose 1 to {len(moment)}."
        )
    squared_norms = moment.diagonal().double()
    channels = squared_norms.argsort(descending=True, stable=True)[:size].sort().values
    variance_explained = (
        (squared_norms[channels].sum() / squared_norms.sum()).item() if squared_norms.sum() > 0 else 1.0
    )
    return ResidualBasis(whole.matrix[:, channels].contiguous(), whole.eigenvalues, variance_explained)


def explained_variance(eigenvalues: Tensor) -> Tensor:
    """Return the fraction of the trace in the first 1, 2, ... eigenvalues, shape (width,), float64, ending at 1."""
    cumulative = eigenvalues.to(torch.float64).clamp(min=0).cumsum(0)
    return cumulative / cumulative[-1] if cumulative[-1] > 0 else torch.ones_like(cumulative)


def _top_eigenvectors(moment: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return all eigenvalues, descending, (width,), and the first `size` eigenvectors, (width, size)."""
    eigenvalues, eigenvectors = torch.linalg.eigh(moment)
    return eigenvalues.flip(0).clamp(min=0), eigenvectors.flip(1)[:, :size]


def _fix_signs(directions: Tensor) -> Tensor:
    """Return columns (width, any) with signs such that the entry of largest magnitude in each is positive."""
    if directions.shape[1] == 0:
        return directions
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
    return torch.where(largest < 0, -directions, directions)


def _mean_free_basis(width: int) -> Tensor:
    """Return orthonormal rows orthogonal to all-ones, (width - 1, width): a Householder reflection of all-ones.

    A reflection and not Helmert's matrix, because it leaves every direction near its own axis.
    """
    normal = torch.full((width,), width**-0.5, dtype=torch.float64)
    normal[0] += 1
    reflection = torch.eye(width, dtype=torch.float64) - torch.outer(normal, normal) * (2 / normal.dot(normal))
    return reflection[1:]


def _check_finite_rows(chunk: Tensor, first_row: int, name: str) -> None:
    bad = non_finite_rows(chunk) + first_row
    if len(bad) == 0:
        raise TeacherError(
            f"{name}: values up to {chunk.abs().max().item():.3g}, whose squares are more than float64 holds."
        )
    raise TeacherError(
        f"{name}: {len(bad)} of the rows {first_row} to {first_row + len(chunk) - 1} hold NaN or infinite values, "
        f"the first is row {bad[0].item()}. A basis needs finite weights; check how the teacher was saved."
    )


def embedding_second_moments(plan: Plan, axes: list[str], *, exact: bool = False) -> dict[str, Tensor]:
    """Return E^T E, (d_T, d_T) float64, of the embedding tables on each of `axes`.

    A table whose rows are themselves coordinates of another projected axis (ALBERT's embedding_hidden_mapping_in) is
    weighed with that axis's moment.

    Args:
        exact: Compute large tables in float64 products too, which takes twice the time.
    """
    tables: dict[str, list[ParameterPlan]] = {axis: [] for axis in axes}
    chained = set(plan.layout.projected_axes())
    for parameter in plan.parameters.values():
        for axis in axes:
            read = len(chained & set(_site_axis_names(parameter))) > 1 and parameter.axes[
                parameter.match.row.input_axis
            ] == AxisName(axis)
            if (
                parameter.match.row.kind == "table"
                and AxisName(axis) in parameter.axes
                and not read
                and not parameter.match.is_bias
            ):
                tables[axis].append(parameter)
    moments: dict[str, Tensor] = {}
    for axis in sorted(
        axes, key=lambda axis: any(len(chained & set(_site_axis_names(parameter))) > 1 for parameter in tables[axis])
    ):
        if not tables[axis]:
            raise OptionError(
                f"The layout of {plan.layout.family!r} has no table on its projected axis {axis!r} to fit directions on."
            )
        width = plan.widths[axis][0]
        moment = torch.zeros(width, width, dtype=torch.float64)
        for parameter in tables[axis]:
            source, dim = parameter.source or "", parameter.axes.index(AxisName(axis))
            other = [name for name in _site_axis_names(parameter) if name in chained and name != axis]
            if other:
                tensor = plan.read(source)
                inner = moments.get(other[0])
                inner = embedding_second_moments(plan, other)[other[0]] if inner is None else inner
                dims = dim, parameter.axes.index(AxisName(other[0]))
                maps = (
                    tensor.double().movedim(dims, (-1, -2)).reshape(-1, len(inner), width)
                )  # one for each kernel entry
                moment += torch.einsum("koa,op,kpb->ab", maps, inner, maps)
                continue
            size = (parameter.source_shape or parameter.shape).numel()
            by_rows = dim == len(parameter.axes) - 1
            blocks = plan.read_blocks(source) if by_rows else [plan.read(source).movedim(dim, -1)]
            rows = (block.reshape(-1, width) for block in blocks)
            in_float32 = size * width > MAX_FLOAT64_PRODUCTS and not exact and plan.teacher.dtype != torch.float64
            dtype = torch.float32 if in_float32 else torch.float64
            moment += second_moment(rows, width, name=source, dtype=dtype)
        moments[axis] = moment
    return moments


def fit_embedding_basis(plan: Plan, axis: str, moments: dict[str, Tensor]) -> ResidualBasis:
    """Fit the basis of `axis`, (d_T, d_S), to its embedding tables.

    Where a direction may be one of the rounding of float32 products, the moment in `moments` is computed again in float64.
    Where the tables span fewer directions (a factorized embedding, few patches), the second moment of the output projections,
    (d_T, d_T), is added to that in `moments`, small enough to leave the first directions as they are.
    """
    width, size = plan.widths[axis]
    keep_mean = plan.layout.norm == "layer"
    basis = fit_basis(moments[axis], size, keep_mean=keep_mean)
    if size < width and basis.eigenvalues[size - 1] < ROUNDING_FLOOR * basis.eigenvalues[0]:
        moments[axis] = embedding_second_moments(plan, [axis], exact=True)[axis]
        basis = fit_basis(moments[axis], size, keep_mean=keep_mean)
    if size == width or basis.eigenvalues[size - 1] > 1e-10 * basis.eigenvalues[0]:
        return basis
    output_moment = torch.zeros(width, width, dtype=torch.float64)
    for parameter in plan.parameters.values():
        if parameter.source is None or parameter.match.row.kind != "weight":
            continue
        for dim, name in enumerate(parameter.axes):
            if name == AxisName(axis) and (parameter.match.is_bias or dim != parameter.match.row.input_axis):
                rows = plan.read(parameter.source).movedim(dim, -1).reshape(-1, width)
                output_moment += second_moment([rows], width, name=parameter.source)
    moments[axis] = (
        moments[axis] + 1e-6 * moments[axis].trace() / output_moment.trace().clamp(min=1e-300) * output_moment
    )
    return fit_basis(moments[axis], size, keep_mean=keep_mean)


def _site_axis_names(parameter: ParameterPlan) -> list[str]:
    return [name for axis in parameter.axes for name in axis_names(axis)]


def norm_retained(moment: Tensor, matrix: Tensor, *, centered: bool) -> float:
    """Return the fraction |x M| / |x| of the rows' root mean square norm that a basis retains, centered for LayerNorm."""
    if centered:
        moment = moment - moment.mean(0, keepdim=True)
        moment = moment - moment.mean(1, keepdim=True)
    total = moment.trace().item()
    return (((matrix * (moment @ matrix)).sum().item()) / total) ** 0.5 if total > 0 else 1.0
