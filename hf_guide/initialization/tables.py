"""The directions that a teacher's own tables span: embeddings, patches, whatever the residual stream is made from."""

import torch
from torch import Tensor

from hf_guide.errors import OptionError
from hf_guide.initialization.axes import Name, axis_names
from hf_guide.initialization.basis import ResidualBasis, fit_basis, second_moment
from hf_guide.initialization.plan import Plan, Site


def table_moments(plan: Plan, axes: list[str]) -> dict[str, Tensor]:
    """Return E^T E, (d_T, d_T) float64, of the tables that lie on each of `axes`.

    A table whose rows are themselves coordinates of another projected axis (ALBERT's embedding_hidden_mapping_in) is
    weighed with that axis's moment.
    """
    tables: dict[str, list[Site]] = {axis: [] for axis in axes}
    chained = set(plan.layout.projected())
    for site in plan.sites.values():
        for axis in axes:
            read = len(chained & set(_names(site))) > 1 and site.axes[site.match.row.input_axis] == Name(axis)
            if site.match.row.kind == "table" and Name(axis) in site.axes and not read and not site.match.is_bias:
                tables[axis].append(site)
    moments: dict[str, Tensor] = {}
    for axis in sorted(axes, key=lambda axis: any(len(chained & set(_names(site))) > 1 for site in tables[axis])):
        if not tables[axis]:
            raise OptionError(
                f"The layout of {plan.layout.family!r} has no table on its projected axis {axis!r} to fit directions on."
            )
        width = plan.widths[axis][0]
        moment = torch.zeros(width, width, dtype=torch.float64)
        for site in tables[axis]:
            tensor = plan.read(site.source or "")
            rows = tensor.movedim(site.axes.index(Name(axis)), -1).reshape(-1, width)
            other = [name for name in _names(site) if name in chained and name != axis]
            if other:
                inner = moments.get(other[0])
                inner = table_moments(plan, other)[other[0]] if inner is None else inner
                moment += rows.double().T @ inner @ rows.double()
                continue
            weights = _weights_of_rows(plan, site, len(rows))
            moment += second_moment(
                [rows], width, weights=weights, centered=plan.options.centered, name=site.source or ""
            )
        moments[axis] = moment
    return moments


def _weights_of_rows(plan: Plan, site: Site, rows: int) -> Tensor | None:
    """Return one weight a row, (rows,), for a table of tokens where weights are given; None for others."""
    if plan.options.token_weights is None or "vocab" not in _names(site):
        return None
    if len(plan.options.token_weights) != rows:
        raise OptionError(
            f"token_weights has {len(plan.options.token_weights)} numbers, but the teacher's table {site.source!r} has "
            f"{rows} rows: give one weight a row."
        )
    return torch.tensor(plan.options.token_weights, dtype=torch.float64)


def fit_axis(plan: Plan, axis: str, moments: dict[str, Tensor]) -> ResidualBasis:
    """Return the directions of `axis`, (d_T, d_S), that its tables span best.

    Where the tables span fewer (a factorised embedding, few patches), what the blocks write onto the stream says which
    others to keep: its second moment, (d_T, d_T), is then added to that in `moments`, small enough to leave the first
    as they are.
    """
    width, size = plan.widths[axis]
    keep_mean = plan.layout.norm == "layer"
    basis = fit_basis(moments[axis], size, keep_mean=keep_mean)
    if size == width or basis.eigenvalues[size - 1] > 1e-10 * basis.eigenvalues[0]:
        return basis
    written = torch.zeros(width, width, dtype=torch.float64)
    for site in plan.sites.values():
        if site.source is None or site.match.row.kind != "weight":
            continue
        for dim, name in enumerate(site.axes):
            if name == Name(axis) and (site.match.is_bias or dim != site.match.row.input_axis):
                rows = plan.read(site.source).movedim(dim, -1).reshape(-1, width)
                written += second_moment([rows], width, name=site.source)
    moments[axis] = moments[axis] + 1e-6 * moments[axis].trace() / written.trace().clamp(min=1e-300) * written
    return fit_basis(moments[axis], size, keep_mean=keep_mean)


def _names(site: Site) -> list[str]:
    return [name for axis in site.axes for name in axis_names(axis)]


def length_kept(moment: Tensor, matrix: Tensor, *, centered: bool) -> float:
    """Return the share |x M| / |x| of the rows' root mean square length that a basis keeps, means removed for LayerNorm."""
    if centered:
        moment = moment - moment.mean(0, keepdim=True)
        moment = moment - moment.mean(1, keepdim=True)
    total = moment.trace().item()
    return (((matrix * (moment @ matrix)).sum().item()) / total) ** 0.5 if total > 0 else 1.0
