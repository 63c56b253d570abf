"""Heads that get smaller: queries and keys are turned together, so that what is cut says least about their products.

Where nothing stands between the weights and the product q k^T, a head's queries and keys can be turned against each other:
q A k^T with A = E_q E_k^T is what q E_q and k E_k make. With C_q the second moment of a head's queries and C_k the covariance
of its keys (what all keys share moves every logit of a query alike, and softmax does not see it), the A of rank l_S for which
E |q (1 - A) k^T|^2 is least, query and key taken from any two tokens, has the leading singular vectors of C_q^1/2 C_k^1/2:
E_q = C_q^-1/2 U S^1/2 and E_k = C_k^-1/2 V S^1/2. A rotary embedding, or a norm of each head, does not turn along: there
places are selected as ever.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_guide.calibration.choosing import module_name
from hf_guide.calibration.values import Turn, kept_heads, roots
from hf_guide.initialization.axes import axis_names, places_of
from hf_guide.initialization.layouts import rotary_size
from hf_guide.initialization.plan import Plan, Site
from hf_guide.initialization.transfer import Transfer


@dataclass(frozen=True)
class InOrder:
    """Changes of one tensor, one after another."""

    changes: tuple[Callable[[Tensor], Tensor], ...]

    def __call__(self, tensor: Tensor) -> Tensor:
        """Return the tensor with all changes made."""
        for change in self.changes:
            tensor = change(tensor)
        return tensor


def turn_queries(transfer: Transfer, projected: Mapping[str, Tensor]) -> None:
    """Have the plan read queries and keys turned, where heads get smaller; note what could not be turned and why.

    Args:
        projected: by module and size, "layers.0.attn.q_proj/q_dim", the second moment of what each head's places are given,
            with a one beside them, (heads, l + 1, l + 1).
    """
    plan = transfer.plan
    for home, sites in _by_attention(plan).items():
        queries, keys = (
            [site for site in sites if not site.match.is_bias and _size(site, kind)] for kind in ("q_dim", "k_dim")
        )
        if not any(_shrinks(plan, site) for site in sites):
            continue
        reason = _reason_not_to(plan, sites, queries, keys, projected)
        if reason:
            note = (
                f"{sites[0].match.row.pattern.rpartition('.')[0]}: queries and keys are chosen evenly, for {reason}."
            )
            transfer.notes += [] if note in transfer.notes else [note]
            continue
        _turn(plan, sites, queries[0], keys[0], projected)
        for site in sites:
            transfer.note_step(site, f"queries and keys of {home} turned together, the directions kept that say most")


def _turn(plan: Plan, sites: list[Site], query: Site, key: Site, projected: Mapping[str, Tensor]) -> None:
    names = {"q_dim": _size(query, "q_dim"), "k_dim": _size(key, "k_dim")}
    had, wanted = (sizes[names["q_dim"]] for sizes in plan.sizes(query))
    groups = _groups(key)
    count = plan.sizes(key)[0][groups]
    asked, said = (
        projected[f"{module_name(query)}/{names['q_dim']}"],
        projected[f"{module_name(key)}/{names['k_dim']}"],
    )
    asked = (asked[:, :-1, :-1] * kept_heads(plan, query, len(asked)).view(-1, 1, 1)).unflatten(0, (count, -1)).sum(1)
    tokens = said[:, -1, -1].clamp(min=1)[:, None, None]
    said = said[:, :-1, :-1] / tokens - said[:, :-1, -1:] @ said[:, -1:, :-1] / tokens**2
    scale = 1.0
    if plan.options.restore_logit_scale:
        scale = plan.attention_scale(plan.teacher.config, had) / plan.attention_scale(plan.student_config, wanted)
    pairs = [product_factors(asked[group], said[group], wanted) for group in range(count)]
    matrices = {"q_dim": [pair[0] * scale for pair in pairs], "k_dim": [pair[1] for pair in pairs]}
    for site in sites:
        for kind, name in names.items():
            if not _size(site, kind):
                continue
            along = next(dim for dim, axis in enumerate(site.axes) if name in axis_names(axis))
            sizes, _ = plan.sizes(site)
            places = torch.stack([places_of(site.axes[along], groups, group, name, sizes) for group in range(count)])
            rows = places.view(count, -1, had)  # of queries a row for each member of a group
            turn = Turn(along, rows.flatten(0, 1), torch.stack(matrices[kind]).repeat_interleave(rows.shape[1], 0))
            source = site.source or ""
            plan.turns[source] = InOrder((plan.turns[source], turn)) if source in plan.turns else turn
            plan.keep({site.name: {name: torch.arange(wanted)}})


def product_factors(queries: Tensor, keys: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return E_q and E_k, (l, rank), of the A = E_q E_k^T of this rank for which E |q (1 - A) k^T|^2 is least.

    Args:
        queries, keys: the second moments of independent q and k, (l, l).
    """
    root_q, inverse_q = roots(queries)
    root_k, inverse_k = roots(keys)
    left, values, right = torch.linalg.svd(root_q @ root_k)
    shares = values[:rank].sqrt()
    return inverse_q @ left[:, :rank] * shares, inverse_k @ right.T[:, :rank] * shares


def _by_attention(plan: Plan) -> dict[str, list[Site]]:
    """Return by attention module the parameters in it that have an axis of queries' or keys' places."""
    having = [site for site in plan.sites.values() if site.source and (_size(site, "q_dim") or _size(site, "k_dim"))]
    homes = dict.fromkeys(site.module.rpartition(".")[0] for site in having if site.match.row.kind == "weight")
    return {home: [site for site in having if site.canonical.startswith(home + ".")] for home in homes}


def _size(site: Site, kind: str) -> str:
    """The name of the size of a site's queries ("q_dim") or keys ("k_dim") on its output axis; "" where it has none."""
    names = [name for axis in site.axes for name in axis_names(axis) if name.endswith(kind)]
    return names[0] if names else ""


def _groups(key: Site) -> str:
    """The name of the axis of heads that a key weight has."""
    return next(name for axis in key.axes for name in axis_names(axis) if name.endswith("heads"))


def _shrinks(plan: Plan, site: Site) -> bool:
    teacher, student = plan.sizes(site)
    return any(teacher[name] != student[name] for name in (_size(site, "q_dim"), _size(site, "k_dim")) if name)


def _reason_not_to(
    plan: Plan, sites: list[Site], queries: list[Site], keys: list[Site], projected: Mapping[str, Tensor]
) -> str:
    if any(site.match.row.kind != "weight" for site in sites):
        return "a norm stands between them"
    if len(queries) != 1 or len(keys) != 1:
        return "not one weight makes each"
    had = plan.sizes(queries[0])[0][_size(queries[0], "q_dim")]
    if rotary_size(plan.layout, plan.teacher.config, had):
        return "a rotary embedding stands between them"
    if any("{heads}" in site.match.row.pattern for site in sites):
        return "they stand in a list of modules"
    for site, kind in ((queries[0], "q_dim"), (keys[0], "k_dim")):
        if f"{module_name(site)}/{_size(site, kind)}" not in projected:
            return "they were not heard"
    return ""
