"""What a projector's subclasses look like: sizes, shape, nearest examples, and what they know of finer labels; as one page.

Does: measure, draw with matplotlib, and write a self-contained HTML file.
Does not: run a teacher; that is `hf-guide subclasses`.
"""

import base64
import html
import io
import os
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_guide.errors import SubclassError
from hf_guide.lelp.analysis.probe import GainEstimate
from hf_guide.lelp.splitters.registry import takes_top_variance
from hf_guide.lelp.validation import resolve_classes
from hf_guide.utils.escaping import escape_mathtext
from hf_guide.utils.files import atomic_write_text
from hf_guide.visualization import save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from hf_guide.lelp.projector import SubclassProjector

MAX_POINTS = 2000
MAX_TEXT_LENGTH = 240
NUM_SHUFFLES = 10


@dataclass(frozen=True)
class ClassSummary:
    """One class and its subclasses.

    Attributes:
        number, name: of the class.
        rows: (n,), which examples are of it.
        points: (n, 2), their coordinates in the class's subspace, along its two directions of largest variance.
        subclasses: (n,), the likeliest subclass of each.
        sizes: (S,), the share of the class that each subclass has, as the mean of its probabilities.
        nearest: by subclass the rows of the examples that are surest of it, the surest first.
        sureness: by subclass the probabilities of those.
        explained: the share of variance, outside what the classifier sees, that the S directions hold; None where the
            splitter takes no such directions.
    """

    number: int
    name: str
    rows: Tensor
    points: Tensor
    subclasses: Tensor
    sizes: Tensor
    nearest: list[list[int]]
    sureness: list[list[float]]
    explained: float | None


@dataclass(frozen=True)
class MutualInformation:
    """What the likeliest subclasses know of finer labels, given the class.

    Attributes:
        told: mutual information, in bits an example.
        entropy: of the finer labels, in bits: all there is to know.
        by_chance: the mean information of subclasses that are shuffled within each class.
    """

    told: float
    entropy: float
    by_chance: float

    @property
    def share(self) -> float:
        """The share of all there is to know, beyond chance."""
        room = self.entropy - self.by_chance
        return (self.told - self.by_chance) / room if room > 1e-9 else 0.0


@dataclass(frozen=True)
class SubclassSummary:
    """All classes of a projector on some examples, and what was measured over them.

    Attributes:
        title, facts: of the page, and what is told of the projector.
        classes: those that have examples.
        knowledge: of finer labels, where there are any.
        forecast: what is to be expected, where it was asked for.
        no_forecast: why there is none, where it was asked for and cannot be made.
    """

    title: str
    facts: dict[str, str]
    classes: list[ClassSummary]
    knowledge: MutualInformation | None = None
    forecast: GainEstimate | None = None
    no_forecast: str | None = None


def summarize_subclasses(
    projector: "SubclassProjector",
    embeddings: Any,
    logits: Any,
    labels: Any = None,
    finer: Any = None,
    *,
    examples: int = 6,
    forecast: GainEstimate | None = None,
    no_forecast: str | None = None,
    subclass_labels: Any = None,
    title: str = "Subclasses",
) -> SubclassSummary:
    """Measure a projector's subclasses on some examples.

    Args:
        projector: of at least two subclasses a class.
        embeddings, logits: the teacher's, (N, D) and (N, C).
        labels: (N,), the classes; None, -1 and -100, or None for all, stand for the teacher's own.
        finer: (N,), finer labels to compare the subclasses with.
        examples: how many of the nearest examples of each subclass are listed.
        forecast: of `estimate_gain`, to be shown with the rest; or in its place `no_forecast`, why there is none.
        subclass_labels: finer labels that the projector itself goes by.

    Raises:
        SubclassError: a projector of one subclass a class, no examples, logits of another shape, or labels of other examples
            or that are none of the classes.
    """
    if projector.num_subclasses < 2:
        raise SubclassError("This projector has one subclass a class, which is plain distillation: nothing to see.")
    embeddings, logits = torch.as_tensor(embeddings).detach().cpu(), torch.as_tensor(logits).detach().cpu()
    if not len(embeddings):
        raise SubclassError("There are no examples to look at.")
    shape = (len(embeddings), projector.num_classes)
    if logits.shape != shape:
        raise SubclassError(f"Logits of the shape {shape} were expected; found {tuple(logits.shape)}.")
    classes = resolve_classes(labels, logits, *shape).cpu()
    if finer is not None and len(finer) != len(embeddings):
        raise SubclassError(f"{len(embeddings)} examples need as many finer labels; found {len(finer)}.")
    coordinates = torch.as_tensor(projector.coordinates(embeddings, subclass_labels)).cpu()
    shares = (coordinates / projector.subclass_temperature).softmax(-1)
    own = torch.arange(len(classes))
    told = shares[own, classes]
    chosen = told.argmax(1)
    found = []
    for number in classes.unique().tolist():
        rows = (classes == number).nonzero().flatten()
        mine = told[rows]
        order = mine.argsort(dim=0, descending=True, stable=True)[:examples]
        flat = projector.scores.form in ("affine", "kernel")
        found.append(
            ClassSummary(
                number=number,
                name=projector.id2label[number],
                rows=rows,
                points=principal_plane(coordinates[rows, number] if flat else embeddings[rows].double()),
                subclasses=chosen[rows],
                sizes=mine.mean(0),
                nearest=[rows[order[:, each]].tolist() for each in range(projector.num_subclasses)],
                sureness=[mine[order[:, each], each].tolist() for each in range(projector.num_subclasses)],
                explained=projector.explained[number].item() if takes_top_variance(projector.splitter) else None,
            )
        )
    facts = {
        "classes": str(projector.num_classes),
        "subclasses of each": str(projector.num_subclasses),
        "splitter": projector.splitter,
        "temperature": f"{projector.temperature:g}",
        "temperature of subclasses": f"{projector.subclass_temperature:g}",
        "examples": f"{len(embeddings):,}",
        "examples it was fitted on": f"{int(projector.counts.sum()):,}",
    }
    knowledge = None if finer is None else label_mutual_information(chosen, classes, torch.as_tensor(finer).long())
    return SubclassSummary(title, facts, found, knowledge, forecast, no_forecast)


def principal_plane(rows: Tensor) -> Tensor:
    """Return rows (n, any) along their two directions of largest variance, (n, 2); the larger side of each points up."""
    centred = rows - rows.mean(0)
    values, vectors = torch.linalg.eigh(centred.T @ centred)
    plane = centred @ vectors[:, -2:].flip(1)
    return torch.where(plane.pow(3).sum(0) < 0, -plane, plane)


def label_mutual_information(subclasses: Tensor, classes: Tensor, finer: Tensor) -> MutualInformation:
    """Return what subclasses, (N,), know of finer labels, (N,), beyond the class, (N,)."""
    generator = torch.Generator().manual_seed(0)
    told = entropy = by_chance = 0.0
    for number in classes.unique().tolist():
        mine = classes == number
        share = mine.double().mean().item()
        labels = finer[mine].unique(return_inverse=True)[1]
        own = subclasses[mine]
        told += share * mutual_information(own, labels)
        entropy += share * mutual_information(labels, labels)
        shuffled = [
            mutual_information(own[torch.randperm(len(own), generator=generator)], labels) for _ in range(NUM_SHUFFLES)
        ]
        by_chance += share * sum(shuffled) / NUM_SHUFFLES
    return MutualInformation(told, entropy, by_chance)


def mutual_information(first: Tensor, second: Tensor) -> float:
    """Return the mutual information of two labellings, (n,) whole numbers each, in bits."""
    columns = int(second.max()) + 1
    counts = torch.bincount(first * columns + second, minlength=(int(first.max()) + 1) * columns)
    joint = counts.view(-1, columns).double() / len(first)
    apart = joint.sum(1, keepdim=True) * joint.sum(0)
    there = joint > 0
    return max(0.0, (joint[there] * (joint[there] / apart[there]).log2()).sum().item())


def plot_class(view: ClassSummary, path: str | os.PathLike[str] | None = None) -> "Figure":
    """Draw a class's subspace, one colour a subclass, and beside it the sizes of the subclasses.

    Args:
        view: of `summarize_subclasses`.
        path: where to write the figure; the suffix chooses the format.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Plots need matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(8.0, 4.0), layout="constrained")
    plane, bars = figure.subplots(1, 2, width_ratios=[2, 1])
    count = len(view.sizes)
    colours = [colormaps["tab10" if count <= 10 else "tab20"](each % 20) for each in range(count)]
    step = max(1, -(-len(view.rows) // MAX_POINTS))
    for each in range(count):
        mine = view.points[::step][view.subclasses[::step] == each]
        plane.scatter(mine[:, 0].tolist(), mine[:, 1].tolist(), s=6, color=colours[each], linewidths=0, alpha=0.7)
    plane.set(title=escape_mathtext(view.name), xlabel="first direction", ylabel="second direction")
    plane.grid(alpha=0.3)
    bars.barh(range(count), (100 * view.sizes).tolist(), color=colours)
    bars.set(xlabel="% of the class", ylabel="subclass", yticks=range(count), ylim=(count - 0.5, -0.5))
    bars.axvline(100 / count, color="grey", linestyle=":", linewidth=1)
    if path is not None:
        save_figure(figure, path)
    return figure


def write_page(view: SubclassSummary, path: str | os.PathLike[str], show: Callable[[int], Any]) -> Path:
    """Write a page that needs nothing beside it: no other file, no network.

    Args:
        view: of `summarize_subclasses`.
        path: of the HTML file.
        show: gives the example of a row: a text, or a `PIL.Image.Image`.
    """
    parts = [f"<h1>{html.escape(view.title)}</h1>", _table_html(view.facts)]
    if view.forecast is not None:
        parts += ["<h2>Forecast</h2>", f"<pre>{html.escape(view.forecast.summary())}</pre>"]
    elif view.no_forecast is not None:
        parts += ["<h2>Forecast</h2>", f"<p>There is none: {html.escape(view.no_forecast)}</p>"]
    if view.knowledge is not None:
        parts += ["<h2>Finer labels</h2>", f"<p>{html.escape(describe_mutual_information(view.knowledge))}</p>"]
    for each in view.classes:
        parts.append(_class_section_html(each, show))
    body = "\n".join(parts)
    page = f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(view.title)}</title>'
    page += f"<style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    path = Path(path)
    atomic_write_text(path, page)
    return path


def describe_mutual_information(knowledge: MutualInformation) -> str:
    """Return what subclasses know of finer labels as one sentence."""
    return (
        f"Beyond the class, subclasses tell {knowledge.told:.2f} of the {knowledge.entropy:.2f} bits of the finer labels, "
        f"{knowledge.by_chance:.2f} of them by chance: {max(knowledge.share, 0.0):.0%} of all there is to know."
    )


STYLE = textwrap.dedent(
    """
    body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
    table { border-collapse: collapse; } td, th { padding: .2rem .8rem .2rem 0; text-align: left; vertical-align: top; }
    img.figure { max-width: 100%; } img.example { height: 56px; margin: 2px; image-rendering: pixelated; }
    .sure { color: #777; font-size: 85%; } pre { background: #f4f4f4; padding: .6rem; }
    """
)


def _class_section_html(view: ClassSummary, show: Callable[[int], Any]) -> str:
    buffer = io.BytesIO()
    plot_class(view).savefig(buffer, format="png", dpi=110)
    rows = []
    for each, (nearest, sureness) in enumerate(zip(view.nearest, view.sureness, strict=True)):
        cells = [_example_html(show(row), sure) for row, sure in zip(nearest, sureness, strict=True)]
        rows.append(f"<tr><th>{each}<br>{view.sizes[each]:.0%}</th><td>{''.join(cells)}</td></tr>")
    name = html.escape(view.name)
    held = ""
    if view.explained is not None:
        held = f"; {len(view.sizes)} directions hold {view.explained:.0%} of the variance that the classifier does not see"
    return (
        f"<h2>{name}</h2>\n<p>{len(view.rows):,} examples{held}.</p>\n"
        f'<img class="figure" alt="subclasses of {name}" src="{_png_data_uri(buffer.getvalue())}">\n'
        f"<table><tr><th>subclass</th><th>nearest examples</th></tr>\n{chr(10).join(rows)}\n</table>"
    )


def _example_html(example: Any, sure: float) -> str:
    if isinstance(example, str):
        text = textwrap.shorten(example, MAX_TEXT_LENGTH, placeholder=" …")
        return f'<div>{html.escape(text)} <span class="sure">{sure:.2f}</span></div>'
    buffer = io.BytesIO()
    example.convert("RGB").save(buffer, format="PNG")
    return f'<img class="example" title="{sure:.2f}" alt="example" src="{_png_data_uri(buffer.getvalue())}">'


def _png_data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def _table_html(facts: dict[str, str]) -> str:
    rows = [f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>" for name, value in facts.items()]
    return f"<table>{''.join(rows)}</table>"
