"""In which order a block's weights can be fitted, and where on the stream each is heard: found by running it."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_guide.calibration.anatomy import Anatomy, Part, weight_of
from hf_guide.calibration.listening import hooks, on_input
from hf_guide.calibration.regression import rounding_of
from hf_guide.calibration.replay import Replay

OUTPUT = ""
"""The name of the place where a block's own output is heard."""

SAME, UNSURE = 1e-2, 0.1
"""What is written may arrive so far from itself, in units of its length, and with the rounding errors of a dtype so far."""


@dataclass
class Stage:
    """Modules that are fitted together: readers of one tensor, or one writer, which is heard again at `point`.

    What a writer writes arrives there times `slope` (of a scaled residual connection).
    """

    parts: list[Part]
    point: str | None = None
    slope: float = 1.0


def find_stages(
    replay: Replay, anatomy: Anatomy, stack: str, number: int, fed: set[str], notes: list[str]
) -> list[Stage]:
    """Return what is to be fitted in a block, in the order in which it runs, heard on the first batch.

    Args:
        fed: names of the modules that may be fitted.
        notes: takes what cannot be fitted and why.
    """
    readers, writers, points = (
        [part for part in parts.values() if part.stack == stack and part.block == number]
        for parts in (anatomy.readers, anatomy.writers, anatomy.norms)
    )
    found: list[Stage] = []
    read: list[Tensor] = []

    def hear_reader(part: Part, heard: Tensor) -> None:
        if read and read[-1] is heard and found and found[-1].point is None:
            found[-1].parts.append(part)
        else:
            found.append(Stage([part]))
        read.append(heard)

    before: dict[str, Tensor] = {}
    with hooks() as handles:
        for part in readers:
            if part.name in fed:
                handles.append(on_input(part.module, lambda heard, p=part: hear_reader(p, heard)))  # type: ignore[misc]
        for part in writers:
            if part.name in fed:
                handles.append(on_input(part.module, lambda _, p=part: found.append(Stage([p], OUTPUT))))  # type: ignore[misc]
        for part in points:
            handles.append(on_input(part.module, lambda heard, n=part.name: before.setdefault(n, heard)))  # type: ignore[misc]
        before[OUTPUT] = replay.run(number, 0, replay.streams[0])
    kept = []
    for stage in found:
        reason = None if stage.point is None else _find_point(replay, anatomy, number, stage, before)
        note = f"{stage.parts[0].match.row.pattern} was not repaired: {reason}."
        if reason is None:
            kept.append(stage)
        elif note not in notes:
            notes.append(note)
    return kept


def _find_point(replay: Replay, anatomy: Anatomy, number: int, stage: Stage, before: dict[str, Tensor]) -> str | None:
    """Find where what a writer writes is next seen on the stream, by writing something else; return why it is nowhere."""
    (part,) = stage.parts
    if part.match.row.normed_by is not None:
        return "a norm stands between it and the stream"
    size = max(_length(stream) for stream in (replay.streams[0], *before.values()))  # so that none rounds it away
    generator = torch.Generator().manual_seed(0)
    noise = size * torch.randn(before[OUTPUT].shape[-1], generator=generator, dtype=torch.float64)
    after: dict[str, Tensor] = {}

    def disturb(module: nn.Module, args: object, output: Tensor) -> Tensor:
        return output + noise.to(output)

    with hooks() as handles:
        handles.append(part.module.register_forward_hook(disturb))
        for name in before:
            if name != OUTPUT:
                module = anatomy.norms[name].module
                handles.append(on_input(module, lambda heard, n=name: after.setdefault(n, heard)))  # type: ignore[misc]
        after[OUTPUT] = replay.run(number, 0, replay.streams[0])
    rounding = rounding_of(weight_of(part.module).dtype, before[OUTPUT].dtype)
    for name in [*(name for name in after if name != OUTPUT), OUTPUT]:  # in the order in which they run
        change = (after[name].double() - before[name].double()).cpu()
        if change.abs().max() <= 1e-6 * noise.abs().max():
            continue  # this place is before it, or beside it
        slope = (change @ noise / noise.square().sum()).mean().item()
        if not _length(change - slope * noise) <= _tolerance(slope, rounding) * _length(noise):
            break
        stage.point, stage.slope = name, slope
        return None
    return "what it writes is nowhere seen on the stream as it is"


def _tolerance(slope: float, rounding: float) -> float:
    """Return how far from `slope` times the noise, in lengths of the noise, it may arrive.

    What is written and the stream it is added to are as long as the noise at most, and each sum of them is rounded.
    """
    return min(SAME * max(abs(slope), 1e-3) + 2 * rounding, UNSURE * abs(slope))


def _length(rows: Tensor) -> float:
    """Return the root mean square of all that is in a tensor."""
    return rows.double().square().mean().sqrt().item()
