"""Summarize a projector's subclasses: sizes, subspaces, examples, mutual information with fine labels; and write a page.

Does: measure, draw with matplotlib, and write a self-contained HTML file.
Does not: run a teacher; `hf-guide analyze-subclasses` does.
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
from hf_guide.lelp.analysis.probe import SubclassProbe
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
        number, name: Of the class.
        rows: (n,), the rows of its examples.
        points: (n, 2), their coordinates in the class's subspace, along its two directions of largest variance.
        subclasses: (n,), the most probable subclass of each.
        sizes: (S,), the share of the class that each subclass has: the mean of its probabilities.
        top_examples: For each subclass the rows of the examples with its highest probabilities, the highest first.
        top_probabilities: For each subclass the probabilities of those.
        explained_variance_ratio: The share of variance in the null space of the classifier that the S directions explain; None
            where the splitter does not take the directions of largest variance.
    """

    number: int
    name: str
    rows: Tensor
    points: Tensor
    subclasses: Tensor
    sizes: Tensor
    top_examples: list[list[int]]
    top_probabilities: list[list[float]]
    explained_variance_ratio: float | None


@dataclass(frozen=True)
class MutualInformation:
    """The mutual information of subclasses and fine labels, given the class.

    Attributes:
        bits: Of an example's most probable subclass and its fine label.
        entropy: Of the fine labels, in bits: the maximum.
        chance: The mean of `bits` when subclasses are shuffled within each class.
    """

    bits: float
    entropy: float
    chance: float

    @property
    def adjusted(self) -> float:
        """The share of the entropy that the subclasses explain, adjusted for chance."""
        maximum = self.entropy - self.chance
        return (self.bits - self.chance) / maximum if maximum > 1e-9 else 0.0


@dataclass(frozen=True)
class SubclassSummary:
    """All classes of a projector on some examples, and what was measured.

    Attributes:
        title, facts: Of the page, and the settings of the projector.
        classes: Those that have examples.
        fine_label_information: If there are fine labels.
        probe: If it was asked for.
        no_probe: Why there is none, if it was asked for and could not be made.
    """

    title: str
    facts: dict[str, str]
    classes: list[ClassSummary]
    fine_label_information: MutualInformation | None = None
    probe: SubclassProbe | None = None
    no_probe: str | None = None


def summarize_subclasses(
    projector: "SubclassProjector",
    embeddings: Any,
    logits: Any,
    labels: Any = None,
    compared_labels: Any = None,
    *,
    num_examples: int = 6,
    probe: SubclassProbe | None = None,
    no_probe: str | None = None,
    fine_labels: Any = None,
    title: str = "Subclasses",
) -> SubclassSummary:
    """Measure a projector's subclasses on some examples.

    Args:
        projector: With at least two subclasses of each class.
        embeddings, logits: The teacher's, (N, D) and (N, C).
        labels: (N,), the classes; None, -1 and -100, or None for all, mean the class that the teacher predicts.
        compared_labels: (N,), fine labels to compare the subclasses with.
        num_examples: How many examples of each subclass are listed.
        probe: Of `probe_subclasses`, to include; or instead `no_probe`, why there is none.
        fine_labels: (N,), if the projector splits by them.

    Raises:
        SubclassError: A projector with one subclass of each class, no examples, logits of another shape, or labels that are
            of other examples or outside the classes.
    """
    if projector.num_subclasses < 2:
        raise SubclassError(
            "This projector has one subclass of each class, which is plain distillation: nothing to analyze."
        )
    embeddings, logits = torch.as_tensor(embeddings).detach().cpu(), torch.as_tensor(logits).detach().cpu()
    if not len(embeddings):
        raise SubclassError("There are no examples to analyze. Pass at least one.")
    shape = (len(embeddings), projector.num_classes)
    if logits.shape != shape:
        raise SubclassError(f"Logits must have the shape {shape}; found {tuple(logits.shape)}.")
    classes = resolve_classes(labels, logits, *shape).cpu()
    if compared_labels is not None and len(compared_labels) != len(embeddings):
        raise SubclassError(f"{len(embeddings)} examples need as many fine labels; found {len(compared_labels)}.")
    coordinates = torch.as_tensor(projector.coordinates(embeddings, fine_labels)).cpu()
    shares = (coordinates / projector.subclass_temperature).softmax(-1)
    probabilities = shares[torch.arange(len(classes)), classes]
    subclasses = probabilities.argmax(1)
    has_subspace = projector.scores.form in ("affine", "kernel")
    explained = projector.explained_variance_ratio if takes_top_variance(projector.splitter) else None
    summaries = []
    for number in classes.unique().tolist():
        rows = (classes == number).nonzero().flatten()
        order = probabilities[rows].argsort(dim=0, descending=True, stable=True)[:num_examples]
        summaries.append(
            ClassSummary(
                number=number,
                name=projector.id2label[number],
                rows=rows,
                points=principal_plane(coordinates[rows, number] if has_subspace else embeddings[rows].double()),
                subclasses=subclasses[rows],
                sizes=probabilities[rows].mean(0),
                top_examples=[rows[order[:, each]].tolist() for each in range(projector.num_subclasses)],
                top_probabilities=[
                    probabilities[rows][order[:, each], each].tolist() for each in range(projector.num_subclasses)
                ],
                explained_variance_ratio=None if explained is None else explained[number].item(),
            )
        )
    rule = projector.num_subclasses_rule
    facts = {
        "classes": str(projector.num_classes),
        "subclasses of each": f"{projector.num_subclasses}{'' if rule is None else f' ({rule})'}",
        "splitter": projector.splitter,
        "temperature": f"{projector.temperature:g}",
        "temperature of subclasses": f"{projector.subclass_temperature:g}",
        "examples": f"{len(embeddings):,}",
        "examples it was fitted to": f"{int(projector.counts.sum()):,}",
    }
    information = None
    if compared_labels is not None:
        information = label_mutual_information(subclasses, classes, torch.as_tensor(compared_labels).long())
    return SubclassSummary(title, facts, summaries, information, probe, no_probe)


def principal_plane(rows: Tensor) -> Tensor:
    """Return rows (n, any) along their two directions of largest variance, (n, 2), each with a positive third moment."""
    centered = rows - rows.mean(0)
    _, vectors = torch.linalg.eigh(centered.T @ centered)
    plane = centered @ vectors[:, -2:].flip(1)
    return torch.where(plane.pow(3).sum(0) < 0, -plane, plane)


def label_mutual_information(subclasses: Tensor, classes: Tensor, fine_labels: Tensor) -> MutualInformation:
    """Return the mutual information of subclasses, (N,), and fine labels, (N,), given the class, (N,)."""
    generator = torch.Generator().manual_seed(0)
    bits = entropy = chance = 0.0
    for number in classes.unique().tolist():
        members = classes == number
        share = members.double().mean().item()
        labels = fine_labels[members].unique(return_inverse=True)[1]
        members_subclasses = subclasses[members]
        bits += share * mutual_information(members_subclasses, labels)
        entropy += share * mutual_information(labels, labels)
        count = len(members_subclasses)
        shuffled = [
            mutual_information(members_subclasses[torch.randperm(count, generator=generator)], labels)
            for _ in range(NUM_SHUFFLES)
        ]
        chance += share * sum(shuffled) / NUM_SHUFFLES
    return MutualInformation(bits, entropy, chance)


def mutual_information(first: Tensor, second: Tensor) -> float:
    """Return the mutual information of two labelings, (n,) whole numbers each, in bits.

    Example:
        >>> mutual_information(torch.tensor([0, 0, 1, 1]), torch.tensor([1, 1, 0, 0]))
        1.0
    """
    columns = int(second.max()) + 1
    counts = torch.bincount(first * columns + second, minlength=(int(first.max()) + 1) * columns)
    joint = counts.view(-1, columns).double() / len(first)
    independent = joint.sum(1, keepdim=True) * joint.sum(0)
    positive = joint > 0
    return max(0.0, (joint[positive] * (joint[positive] / independent[positive]).log2()).sum().item())


def plot_class(summary: ClassSummary, path: str | os.PathLike[str] | None = None) -> "Figure":
    """Draw a class's subspace, one color for each subclass, and the sizes of the subclasses.

    Args:
        summary: Of `summarize_subclasses`.
        path: Where to write the figure; the suffix selects the format.

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
    count = len(summary.sizes)
    colors = [colormaps["tab10" if count <= 10 else "tab20"](each % 20) for each in range(count)]
    step = max(1, -(-len(summary.rows) // MAX_POINTS))
    for each in range(count):
        points = summary.points[::step][summary.subclasses[::step] == each]
        plane.scatter(points[:, 0].tolist(), points[:, 1].tolist(), s=6, color=colors[each], linewidths=0, alpha=0.7)
    plane.set(title=escape_mathtext(summary.name), xlabel="first direction", ylabel="second direction")
    plane.grid(alpha=0.3)
    bars.barh(range(count), (100 * summary.sizes).tolist(), color=colors)
    bars.set(xlabel="% of the class", ylabel="subclass", yticks=range(count), ylim=(count - 0.5, -0.5))
    bars.axvline(100 / count, color="grey", linestyle=":", linewidth=1)
    if path is not None:
        save_figure(figure, path)
    return figure


def write_page(summary: SubclassSummary, path: str | os.PathLike[str], get_example: Callable[[int], Any]) -> Path:
    """Write a self-contained page: it needs no other file and no network.

    Args:
        summary: Of `summarize_subclasses`.
        path: Of the HTML file.
        get_example: Returns the example of a row: a text, or a `PIL.Image.Image`.
    """
    parts = [f"<h1>{html.escape(summary.title)}</h1>", _table_html(summary.facts)]
    if summary.probe is not None:
        parts += ["<h2>Do they help?</h2>", f"<pre>{html.escape(summary.probe.summary())}</pre>"]
    elif summary.no_probe is not None:
        parts += ["<h2>Do they help?</h2>", f"<p>Not measured: {html.escape(summary.no_probe)}</p>"]
    if summary.fine_label_information is not None:
        sentence = describe_mutual_information(summary.fine_label_information)
        parts += ["<h2>Fine labels</h2>", f"<p>{html.escape(sentence)}</p>"]
    parts += [_class_section_html(class_summary, get_example) for class_summary in summary.classes]
    body = "\n".join(parts)
    page = f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(summary.title)}</title>'
    page += f"<style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    path = Path(path)
    atomic_write_text(path, page)
    return path


def describe_mutual_information(information: MutualInformation) -> str:
    """Return the mutual information of subclasses and fine labels as a sentence."""
    return (
        f"Given the class, subclasses share {information.bits:.2f} of the {information.entropy:.2f} bits of the fine labels, "
        f"{information.chance:.2f} of them by chance: {max(information.adjusted, 0.0):.0%}, adjusted for chance."
    )


STYLE = textwrap.dedent(
    """
    body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
    table { border-collapse: collapse; } td, th { padding: .2rem .8rem .2rem 0; text-align: left; vertical-align: top; }
    img.figure { max-width: 100%; } img.example { height: 56px; margin: 2px; image-rendering: pixelated; }
    .probability { color: #777; font-size: 85%; } pre { background: #f4f4f4; padding: .6rem; }
    """
)


def _class_section_html(summary: ClassSummary, get_example: Callable[[int], Any]) -> str:
    buffer = io.BytesIO()
    plot_class(summary).savefig(buffer, format="png", dpi=110)
    table_rows = []
    for subclass, size in enumerate(summary.sizes.tolist()):
        examples = zip(summary.top_examples[subclass], summary.top_probabilities[subclass], strict=True)
        cells = [_example_html(get_example(row), probability) for row, probability in examples]
        table_rows.append(f"<tr><th>{subclass}<br>{size:.0%}</th><td>{''.join(cells)}</td></tr>")
    name = html.escape(summary.name)
    variance = ""
    if summary.explained_variance_ratio is not None:
        variance = (
            f"; {len(summary.sizes)} directions explain {summary.explained_variance_ratio:.0%} of the variance that the "
            "classifier does not read"
        )
    return (
        f"<h2>{name}</h2>\n<p>{len(summary.rows):,} examples{variance}.</p>\n"
        f'<img class="figure" alt="subclasses of {name}" src="{_png_data_uri(buffer.getvalue())}">\n'
        f"<table><tr><th>subclass</th><th>most probable examples</th></tr>\n{chr(10).join(table_rows)}\n</table>"
    )


def _example_html(example: Any, probability: float) -> str:
    if isinstance(example, str):
        text = textwrap.shorten(example, MAX_TEXT_LENGTH, placeholder=" …")
        return f'<div>{html.escape(text)} <span class="probability">{probability:.2f}</span></div>'
    buffer = io.BytesIO()
    example.convert("RGB").save(buffer, format="PNG")
    return f'<img class="example" title="{probability:.2f}" alt="example" src="{_png_data_uri(buffer.getvalue())}">'


def _png_data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def _table_html(facts: dict[str, str]) -> str:
    rows = [f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>" for name, value in facts.items()]
    return f"<table>{''.join(rows)}</table>"
