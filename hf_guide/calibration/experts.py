"""Which experts of a mixture a student keeps: those that write the most onto its stream, over the tokens routed to them.

What an expert writes is asked of the teacher's own experts module, one expert at a time with the tokens and weights that its
router has given it: so the arithmetic is the family's, whatever its activation and however it is run. It takes one more pass
through the teacher, for which directions the student keeps is known only after the first.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hf_guide.calibration.anatomy import Anatomy, Part
from hf_guide.calibration.batches import Batch
from hf_guide.calibration.listening import hooks, listening_mode, real_tokens, run
from hf_guide.initialization.axes import axis_names
from hf_guide.initialization.choices import UnitChoice
from hf_guide.initialization.plan import Plan, Site
from hf_guide.worlds import add_up, own_share


def experts_to_choose(plan: Plan, anatomy: Anatomy) -> tuple[dict[str, Part], list[str]]:
    """Return the teacher's experts modules of which a student keeps a part, by name, and what is chosen evenly and why."""
    found: dict[str, Part] = {}
    notes: list[str] = []
    if plan.options.experts == UnitChoice.EVEN:
        return found, notes
    for site in plan.sites.values():
        part = anatomy.experts.get(_home(site))
        if part is None or part.match.row != site.match.row:
            continue
        teacher, student = plan.sizes(site)
        if teacher["experts"] == student["experts"]:
            continue
        reason = _reason_not_to(plan, part)
        note = f"{site.match.row.pattern}: its experts are chosen evenly, for {reason}."
        if not reason:
            found[part.name] = part
        elif note not in notes:
            notes.append(note)
    return found, notes


@torch.no_grad()
def hear_experts(
    model: PreTrainedModel,
    experts: Mapping[str, Part],
    plan: Plan,
    batches: Sequence[Batch],
    *,
    show_progress: bool = False,
) -> dict[str, Tensor]:
    """Return by experts module the energy that each expert writes into the span of M, (experts,) float64.

    It is the sum over the tokens routed to it of |M^T w c|^2, with w the router's weight and c what the expert makes of the
    token. With several processes each hears its share, and all get the same sums.
    """
    energies: dict[str, Tensor] = {}
    current: Batch = {}

    def hear(part: Part, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        stream, chosen, weights = (real_tokens(each, current) for each in (*args, *kwargs.values()))
        matrix = plan.bases.get(part.axis)
        heard = energies[part.name]
        for expert in range(len(heard)):
            tokens, places = (chosen == expert).nonzero(as_tuple=True)
            if not len(tokens):
                continue
            # its own forward, and not the module itself, which would call this hook again
            written = part.module.forward(stream[tokens], chosen[tokens, places, None], weights[tokens, places, None])
            written = written if matrix is None else written @ matrix.to(written)
            heard[expert] += written.square().sum(dtype=torch.float64).cpu()

    with hooks() as handles, listening_mode(model):
        for name, part in experts.items():
            energies[name] = torch.zeros(count_experts(part), dtype=torch.float64)

            def hook(module: nn.Module, args: Any, kwargs: Any, part: Part = part) -> None:
                hear(part, args, kwargs)

            handles.append(part.module.register_forward_pre_hook(hook, with_kwargs=True))
        for current in tqdm(own_share(batches), desc="hearing the experts", unit="batch", disable=not show_progress):
            run(model, current)
    add_up(energies.values())
    return energies


def choose_experts(plan: Plan, energies: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return for each of the student's parameters with an axis of experts which it keeps: the loudest, in their order."""
    chosen: dict[tuple[str, int | None], Tensor] = {}
    for site in plan.sites.values():
        if _home(site) in energies:
            count = plan.sizes(site)[1]["experts"]
            loudest = energies[_home(site)].argsort(descending=True, stable=True)[:count]
            chosen[_stack(site), site.block] = loudest.sort().values
    return {
        site.name: {"experts": chosen[_stack(site), site.block]}
        for site in plan.sites.values()
        if (_stack(site), site.block) in chosen and any("experts" in axis_names(axis) for axis in site.axes)
    }


def count_experts(part: Part) -> int:
    """Return how many experts a module holds."""
    return len(getattr(part.module, part.parameter))


def _reason_not_to(plan: Plan, part: Part) -> str:
    if (getattr(plan.teacher.config, "n_group", None) or 1) > 1:
        return "their router chooses groups of them first"
    if len(inspect.signature(part.module.forward).parameters) != 3:
        return "they are given something else than tokens, their experts and their weights"
    return ""


def _home(site: Site) -> str:
    """The teacher's module that holds what feeds a site."""
    return (site.source or "").rpartition(".")[0]


def _stack(site: Site) -> str:
    return site.match.row.pattern.partition("{block}")[0]
