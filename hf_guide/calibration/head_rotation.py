"""Rotate values, queries and keys within each head before a smaller head size truncates them.

A head's values and its output projection can be changed together: W_o W_v = (W_o D)(E^T W_v) wherever D E^T = 1. With the
second moment C of what a group of heads passes to W_o, the D and E of rank l_S are taken that minimise the mean of
|M^T W_o (1 - D E^T) z|^2: from the leading eigenvectors V of C^1/2 (W_o^T M M^T W_o) C^1/2, D = C^1/2 V and E = C^-1/2 V.

Where nothing is between the weights and the product q k^T, queries and keys can be changed against each other too: q A k^T
with A = E_q E_k^T is the product of q E_q and k E_k. With C_q the second moment of a head's queries and C_k the covariance of
its keys (what all keys have in common shifts all logits of a query alike, and softmax ignores it), the A of rank l_S that
minimises E |q (1 - A) k^T|^2, over independent q and k, has the leading singular vectors of C_q^1/2 C_k^1/2:
E_q = C_q^-1/2 U S^1/2 and E_k = C_k^-1/2 V S^1/2. Rotary embeddings and norms of each head do not commute with A: there
indices are selected evenly.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_guide.calibration.importance import (
    is_output_projection,
    nearest_by_name,
    projected_output_weight,
    source_module_name,
)
from hf_guide.initialization.plan import ParameterPlan, Plan
from hf_guide.initialization.transfer import Transfer
from hf_guide.layouts.grammar import AxisName, AxisProduct, axis_names, group_indices
from hf_guide.layouts.registry import rotary_size

NEGLIGIBLE = 1e-10
"""Directions whose second moment is less than this share of the largest are taken to be zero."""


@dataclass(frozen=True)
class HeadRotation:
    """A change of a tensor along an axis, head by head: indices[g] become matrices[g]^T of themselves.

    Attributes:
        dim_name: The name of the head's size, such as "head_dim".
        dim: The axis.
        indices: (groups, l), int64.
        matrices: (groups, l, rank).
    """

    dim_name: str
    dim: int
    indices: Tensor
    matrices: Tensor

    def __call__(self, tensor: Tensor) -> Tensor:
        """Return a rotated copy, in float32 or better; a head's indices beyond the rank hold zeros."""
        rotated = tensor.to(torch.promote_types(tensor.dtype, torch.float32)).movedim(self.dim, 0).clone()
        for indices, matrix in zip(self.indices, self.matrices, strict=True):
            head = torch.tensordot(matrix.T.to(rotated), rotated[indices], 1)
            rotated[indices] = 0
            rotated[indices[: len(head)]] = head
        return rotated.movedim(0, self.dim)


@dataclass(frozen=True)
class Compose:
    """Changes of one tensor, one after another."""

    transforms: tuple[Callable[[Tensor], Tensor], ...]

    def __call__(self, tensor: Tensor) -> Tensor:
        """Return the tensor with all transforms applied in order."""
        for transform in self.transforms:
            tensor = transform(tensor)
        return tensor


def _rotate(plan: Plan, parameter: ParameterPlan, dim_name: str, groups: str, matrices: Sequence[Tensor]) -> None:
    """Have the plan rotate a parameter's source along the axis of its heads' dimensions, and keep the first of each.

    Args:
        plan: The plan, which is changed.
        parameter: The parameter that is rotated.
        dim_name: The name of the head's size, such as "head_dim".
        groups: The name of the axis of groups; each of a group's members is rotated alike.
        matrices: For each group a matrix, (l, rank).
    """
    dim = next(dim for dim, axis in enumerate(parameter.axes) if dim_name in axis_names(axis))
    sizes, _ = plan.sizes(parameter)
    count = len(matrices)
    indices = torch.stack([group_indices(parameter.axes[dim], groups, g, dim_name, sizes) for g in range(count)])
    indices = indices.view(count, -1, sizes[dim_name])  # of queries and output projections a row per member of a group
    members = indices.shape[1]
    repeated = torch.stack(list(matrices)).repeat_interleave(members, 0)
    rotation = HeadRotation(dim_name, dim, indices.flatten(0, 1), repeated)
    transforms: tuple[Callable[[Tensor], Tensor], ...] = (*_transforms(plan, parameter), rotation)
    plan.tensor_transforms[parameter.source or ""] = rotation if len(transforms) == 1 else Compose(transforms)
    _keep_first(plan, parameter, dim_name)


def _keep_first(plan: Plan, parameter: ParameterPlan, dim_name: str) -> None:
    plan.select({parameter.name: {dim_name: torch.arange(plan.sizes(parameter)[1][dim_name])}})


def _transforms(plan: Plan, parameter: ParameterPlan) -> tuple[Callable[[Tensor], Tensor], ...]:
    """Return what the plan does to the teacher's parameter so far."""
    transform = plan.tensor_transforms.get(parameter.source or "")
    if isinstance(transform, Compose):
        return transform.transforms
    return () if transform is None else (transform,)


def _is_rotated(plan: Plan, parameter: ParameterPlan, dim_name: str) -> bool:
    """Return whether the teacher's parameter is rotated already, for another block of the student that it feeds as well."""
    transforms = _transforms(plan, parameter)
    return any(isinstance(each, HeadRotation) and each.dim_name == dim_name for each in transforms)


def _note_once(transfer: Transfer, note: str) -> None:
    if note not in transfer.notes:
        transfer.notes.append(note)


# Values


def rotate_values(transfer: Transfer, input_second_moments: Mapping[str, Tensor]) -> None:
    """Have the plan rotate values and output projections where heads shrink; note which are selected evenly, and why.

    Args:
        transfer: The transfer, whose plan is changed.
        input_second_moments: Second moment within each head of an output projection's input, (heads, l, l), by module.
    """
    plan = transfer.plan
    projections = [
        parameter
        for parameter in plan.parameters.values()
        if is_output_projection(plan, parameter)
        and head_dim_name(parameter)
        and source_module_name(parameter) in input_second_moments
        and input_second_moments[source_module_name(parameter)].ndim == 3
    ]
    for projection in projections:
        dim_name = head_dim_name(projection)
        teacher, student = plan.sizes(projection)
        if teacher[dim_name] == student[dim_name]:
            continue
        rivals = [other for other in projections if head_dim_name(other) == dim_name]
        values = [
            parameter
            for parameter in plan.parameters.values()
            if parameter.source is not None
            and parameter not in projections
            and _has_axis(parameter, dim_name)
            and projection in nearest_by_name(parameter, rivals)
        ]
        reason = _why_values_unsupported(projection, values, rivals)
        if reason:
            _note_once(
                transfer, f"{projection.match.row.pattern}: its heads' values are selected evenly, because {reason}."
            )
            continue
        _rotate_value_heads(plan, projection, values, input_second_moments[source_module_name(projection)])
        for parameter in (projection, *values):
            transfer.record_step(
                parameter, f"values rotated within each head, the {student[dim_name]} principal directions kept"
            )


def _rotate_value_heads(
    plan: Plan, projection: ParameterPlan, values: Sequence[ParameterPlan], second_moment: Tensor
) -> None:
    dim_name = head_dim_name(projection)
    if _is_rotated(plan, projection, dim_name):
        for parameter in (projection, *values):
            _keep_first(plan, parameter, dim_name)
        return
    teacher, student = plan.sizes(projection)
    groups = axis_names(projection.axes[projection.match.row.input_axis])[0]
    members = len(second_moment) // teacher[groups]
    moments = second_moment * selected_head_mask(plan, projection, len(second_moment)).view(-1, 1, 1)
    weight = projected_output_weight(plan, projection).unflatten(1, (teacher[groups], members, teacher[dim_name]))
    encoders, decoders = [], []
    for group, of_group in enumerate(moments.unflatten(0, (teacher[groups], members))):
        output_weight = weight[:, group].reshape(-1, teacher[dim_name])  # of all its members
        encoder, decoder = low_rank_factors(of_group.sum(0), output_weight.T @ output_weight, student[dim_name])
        encoders.append(encoder)
        decoders.append(decoder)
    _rotate(plan, projection, dim_name, groups, decoders)
    for parameter in values:
        _rotate(plan, parameter, dim_name, groups, encoders)


def selected_head_mask(plan: Plan, parameter: ParameterPlan, heads: int) -> Tensor:
    """Return 1 for each of the teacher's heads that is selected so far, (heads,) float64."""
    selected = plan.selected_indices.get(parameter.name, {})
    indices = next((indices for name, indices in selected.items() if name.endswith("heads group")), None)
    if indices is None:
        return torch.ones(heads, dtype=torch.float64)
    return torch.zeros(heads, dtype=torch.float64).index_fill_(0, indices, 1.0)


def head_dim_name(projection: ParameterPlan) -> str:
    """Return the name of the size of an output projection's heads; "" if its input is something else."""
    axis = projection.axes[projection.match.row.input_axis]
    last = axis.factors[-1] if isinstance(axis, AxisProduct) else None
    return last.name if isinstance(last, AxisName) and not last.name.isdigit() else ""


def _has_axis(parameter: ParameterPlan, name: str) -> bool:
    return any(name in axis_names(axis) for axis in parameter.axes)


def _why_values_unsupported(
    projection: ParameterPlan, values: Sequence[ParameterPlan], rivals: Sequence[ParameterPlan]
) -> str:
    groups = axis_names(projection.axes[projection.match.row.input_axis])[0]
    weights = [each for each in values if each.match.row.kind == "weight" and not each.match.is_bias]
    if len(weights) != 1 or any(each.match.row.kind != "weight" for each in values):
        return "something else than one weight computes them"
    if not all(_has_axis(each, groups) and len(nearest_by_name(each, rivals)) == 1 for each in values):
        return "the heads that they belong to are not known"
    if any("{heads}" in each.match.row.pattern for each in (projection, *values)):
        return "they are a list of modules"
    return ""


# Queries and keys


def rotate_queries_keys(transfer: Transfer, qk_second_moments: Mapping[str, Tensor]) -> None:
    """Have the plan rotate queries and keys where heads shrink; note which are selected evenly, and why.

    Args:
        transfer: The transfer, whose plan is changed.
        qk_second_moments: By module and axis, "layers.0.attn.q_proj/q_dim", the second moment within each head with a one
            appended, (heads, l + 1, l + 1).
    """
    plan = transfer.plan
    for attention, parameters in _by_attention(plan).items():
        queries, keys = (
            [each for each in parameters if not each.match.is_bias and _dim_name(each, kind)]
            for kind in ("q_dim", "k_dim")
        )
        if not any(_head_dim_shrinks(plan, each) for each in parameters):
            continue
        reason = _why_queries_unsupported(plan, parameters, queries, keys, qk_second_moments)
        if reason:
            pattern = parameters[0].match.row.pattern.rpartition(".")[0]
            _note_once(transfer, f"{pattern}: queries and keys are selected evenly, because {reason}.")
            continue
        _rotate_query_key_heads(plan, parameters, queries[0], keys[0], qk_second_moments)
        for parameter in parameters:
            transfer.record_step(
                parameter, f"queries and keys of {attention} rotated together, the principal directions kept"
            )


def _rotate_query_key_heads(
    plan: Plan,
    parameters: Sequence[ParameterPlan],
    query: ParameterPlan,
    key: ParameterPlan,
    qk_second_moments: Mapping[str, Tensor],
) -> None:
    names = {"q_dim": _dim_name(query, "q_dim"), "k_dim": _dim_name(key, "k_dim")}
    if _is_rotated(plan, query, names["q_dim"]):
        for parameter in parameters:
            for name in filter(None, (_dim_name(parameter, kind) for kind in names)):
                _keep_first(plan, parameter, name)
        return
    teacher_size, student_size = (sizes[names["q_dim"]] for sizes in plan.sizes(query))
    groups = _heads_axis_name(key)
    count = plan.sizes(key)[0][groups]
    q = qk_second_moments[f"{source_module_name(query)}/{names['q_dim']}"]
    k = qk_second_moments[f"{source_module_name(key)}/{names['k_dim']}"]
    q = (q[:, :-1, :-1] * selected_head_mask(plan, query, len(q)).view(-1, 1, 1)).unflatten(0, (count, -1)).sum(1)
    tokens = k[:, -1, -1].clamp(min=1)[:, None, None]
    k = k[:, :-1, :-1] / tokens - k[:, :-1, -1:] @ k[:, -1:, :-1] / tokens**2
    teacher_scale = plan.attention_scale(plan.teacher.config, teacher_size)
    scale = teacher_scale / plan.attention_scale(plan.student_config, student_size)
    pairs = [low_rank_product_factors(q[group], k[group], student_size) for group in range(count)]
    matrices = {"q_dim": [pair[0] * scale for pair in pairs], "k_dim": [pair[1] for pair in pairs]}
    for parameter in parameters:
        for kind, name in names.items():
            if _dim_name(parameter, kind):
                _rotate(plan, parameter, name, groups, matrices[kind])


def _by_attention(plan: Plan) -> dict[str, list[ParameterPlan]]:
    """Return, by attention module, the parameters in it with an axis of queries or keys."""
    parameters = [
        each
        for each in plan.parameters.values()
        if each.source and (_dim_name(each, "q_dim") or _dim_name(each, "k_dim"))
    ]
    attentions = dict.fromkeys(
        each.module.rpartition(".")[0] for each in parameters if each.match.row.kind == "weight"
    )
    return {
        attention: [each for each in parameters if each.canonical.startswith(attention + ".")]
        for attention in attentions
    }


def _dim_name(parameter: ParameterPlan, kind: str) -> str:
    """Return the name of the size of its queries ("q_dim") or keys ("k_dim"); "" if it has none."""
    return next((name for axis in parameter.axes for name in axis_names(axis) if name.endswith(kind)), "")


def _heads_axis_name(key: ParameterPlan) -> str:
    return next(name for axis in key.axes for name in axis_names(axis) if name.endswith("heads"))


def _head_dim_shrinks(plan: Plan, parameter: ParameterPlan) -> bool:
    teacher, student = plan.sizes(parameter)
    names = (_dim_name(parameter, "q_dim"), _dim_name(parameter, "k_dim"))
    return any(teacher[name] != student[name] for name in names if name)


def _why_queries_unsupported(
    plan: Plan,
    parameters: Sequence[ParameterPlan],
    queries: Sequence[ParameterPlan],
    keys: Sequence[ParameterPlan],
    qk_second_moments: Mapping[str, Tensor],
) -> str:
    if any(each.match.row.kind != "weight" for each in parameters):
        return "there is a norm between them"
    if len(queries) != 1 or len(keys) != 1:
        return "more than one weight computes them"
    head_dim = plan.sizes(queries[0])[0][_dim_name(queries[0], "q_dim")]
    if rotary_size(plan.layout, plan.teacher.config, head_dim):
        return "there is a rotary embedding between them"
    if any("{heads}" in each.match.row.pattern for each in parameters):
        return "they are a list of modules"
    for parameter, kind in ((queries[0], "q_dim"), (keys[0], "k_dim")):
        if f"{source_module_name(parameter)}/{_dim_name(parameter, kind)}" not in qk_second_moments:
            return "their activations were not recorded"
    return ""


# Factors


def low_rank_factors(moment: Tensor, weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return E with orthonormal columns and D, (l, rank), of the best D E^T for inputs of second moment C, read by W.

    Args:
        moment: C, (l, l).
        weight: W^T W, (l, l).
        rank: The rank of D E^T.

    Example:
        >>> z = torch.randn(50, 2, dtype=torch.float64) @ torch.randn(2, 6, dtype=torch.float64)  # of rank 2
        >>> encoder, decoder = low_rank_factors(z.T @ z, torch.eye(6), rank=2)
        >>> bool(torch.allclose(z @ encoder @ decoder.T, z))
        True
    """
    root, inverse = sqrt_and_pinv_sqrt(moment)
    leading = torch.linalg.eigh(root @ weight.double() @ root).eigenvectors.flip(1)[:, :rank]
    encoder, triangle = torch.linalg.qr(inverse @ leading)
    return encoder, root @ leading @ triangle.T


def low_rank_product_factors(queries: Tensor, keys: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return E_q and E_k, (l, rank), of the A = E_q E_k^T of this rank that minimises E |q (1 - A) k^T|^2.

    Args:
        queries, keys: Second moments of independent q and k, (l, l).
        rank: The rank of A.
    """
    root_q, inverse_q = sqrt_and_pinv_sqrt(queries)
    root_k, inverse_k = sqrt_and_pinv_sqrt(keys)
    left, values, right = torch.linalg.svd(root_q @ root_k)
    shares = values[:rank].sqrt()
    return inverse_q @ left[:, :rank] * shares, inverse_k @ right.T[:, :rank] * shares


def sqrt_and_pinv_sqrt(moment: Tensor) -> tuple[Tensor, Tensor]:
    """Return C^1/2 and its pseudoinverse C^-1/2, (l, l) float64, of a second moment C."""
    eigenvalues, axes = torch.linalg.eigh(moment.double())
    is_large = eigenvalues > NEGLIGIBLE * eigenvalues[-1].clamp(min=torch.finfo(torch.float64).tiny)
    root = torch.where(is_large, eigenvalues, 0.0).sqrt()
    inverse = torch.where(is_large, eigenvalues, 1.0).rsqrt() * is_large
    return (axes * root) @ axes.T, (axes * inverse) @ axes.T
