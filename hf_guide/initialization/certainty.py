"""How sure a student can be that has heard no data: by how much of what its teacher writes onto the stream it still writes.

A student of which much was cut makes logits as large as its teacher's, and they are mostly wrong: it starts far worse than one
that knows nothing, and spends its first steps on unlearning that. So `guide` multiplies its logits by the share of length that
its blocks write, as `energy_correction` does with what its embeddings keep. Where nothing is cut, or only what writes nothing,
the share is 1.
"""

import math
import statistics

import torch
from torch import Tensor

from hf_guide.initialization.axes import Name, Projection, Selection, apply_selection, contract
from hf_guide.initialization.layouts import Match
from hf_guide.initialization.plan import Plan, Site

ROUNDING = 1e-6


def certainty_of(plan: Plan) -> float:
    """Return the share of length of what the teacher's blocks write onto the stream that the student's write, 0 to 1.

    The root of the mean of |W_S|^2 / |W_T|^2 over the teacher's weights W_T that write onto the stream and are not zero, with
    W_S what the student has of W_T: contracted with its basis, its heads and neurons selected, nothing where it has no such
    block. 1 for a teacher without blocks, and where the difference is a rounding error.
    """
    fed = {
        site.source: site for site in plan.sites.values() if site.source is not None and site.name not in plan.random
    }
    shares = []
    for name in plan.teacher_names:
        match = plan.layout.find(name)
        if match is None or not writes_from_a_block(plan, match):
            continue
        whole = energy(plan.read(name))
        if whole > 0:
            shares.append(energy(kept_of(plan, fed[name])) / whole if name in fed else 0.0)
    share = math.sqrt(statistics.mean(shares)) if shares else 1.0
    return 1.0 if abs(share - 1) < ROUNDING else share


def makes_logits(plan: Plan) -> bool:
    """Whether the student has a head over a vocabulary, of its own or shared with a table."""
    heads = [plan.layout.find(name) for name in (*(site.canonical for site in plan.sites.values()), *plan.shared)]
    return any(
        match is not None and match.row.kind == "weight" and bool(match.row.reads) and Name("vocab") in match.axes
        for match in heads
    )


def writes_from_a_block(plan: Plan, match: Match) -> bool:
    """Whether a parameter is a weight in a block that writes onto the stream, and reads something else."""
    row, streams = match.row, {Name(name) for name in plan.layout.projected()}
    if row.kind != "weight" or match.is_bias or "block" not in match.numbers or len(row.axes) < 2:
        return False
    return row.axes[row.input_axis] not in streams and bool(streams & set(row.axes))


def kept_of(plan: Plan, site: Site) -> Tensor:
    """Return what a site keeps of the teacher's weight, with nothing folded into it."""
    assert site.source is not None
    tensor = plan.read(site.source)
    maps = list(enumerate(plan.maps(site)))
    for dim, chosen in maps:
        if isinstance(chosen, Selection):
            tensor = apply_selection(tensor, dim, chosen)
    for dim, chosen in maps:
        if isinstance(chosen, Projection):
            tensor = contract(tensor, dim, chosen.matrix, torch.promote_types(tensor.dtype, torch.float32))
    return tensor


def energy(weight: Tensor) -> float:
    """Return the sum of squares of a weight."""
    return weight.square().sum(dtype=torch.promote_types(weight.dtype, torch.float32)).item()
