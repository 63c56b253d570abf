"""Subclasses summarized: each example in its subclass, sizes that add up, information as defined, a self-contained page."""

import math
import re
from dataclasses import replace

import pytest
import torch
from PIL import Image
from sklearn.metrics import mutual_info_score

from hf_guide import SubclassError, SubclassProjector
from hf_guide.lelp.analysis.report import (
    label_mutual_information,
    mutual_information,
    plot_class,
    principal_plane,
    summarize_subclasses,
    write_page,
)
from hf_guide.lelp.splitters.registry import BENCHMARK_SPLITTERS
from tests.lelp.benchmark_modules import import_benchmark
from tests.lelp.synthetic_data import CLASSES, SUBCLASSES, make_embeddings

import_benchmark("lelp_splitters")


@pytest.fixture(scope="module")
def summarized():
    data = make_embeddings()
    projector = SubclassProjector.fit(
        data.embeddings, data.labels, data.weight, SUBCLASSES, id2label=["<a>", "b & c", "d"]
    )
    summary = summarize_subclasses(
        projector, data.embeddings, data.logits, data.labels, data.fine_labels, num_examples=3
    )
    return data, projector, summary


def test_every_example_is_in_its_class_and_sizes_add_up(summarized):
    data, projector, summary = summarized
    assert [each.name for each in summary.classes] == ["<a>", "b & c", "d"]
    rows = torch.cat([each.rows for each in summary.classes])
    assert torch.equal(rows.sort().values, torch.arange(len(data.labels)))
    for each in summary.classes:
        assert bool((data.labels[each.rows] == each.number).all())
        assert each.points.shape == (len(each.rows), 2)
        assert abs(each.sizes.sum().item() - 1) < 1e-9
        assert each.explained_variance_ratio == projector.explained_variance_ratio[each.number].item()


def test_the_top_examples_have_the_highest_probabilities(summarized):
    data, projector, summary = summarized
    targets = projector.transform(data.embeddings, data.logits)
    for each in summary.classes:
        shares = targets[:, each.number] / targets[:, each.number].sum(1, keepdim=True)
        mine = torch.where(data.labels == each.number, 1.0, -1.0)[:, None] * shares
        for number, (nearest, sure) in enumerate(zip(each.top_examples, each.top_probabilities, strict=True)):
            best = mine[:, number].sort(descending=True).values[:3]
            assert torch.allclose(mine[nearest, number], best) and torch.allclose(torch.tensor(sure).double(), best)


def test_without_labels_classes_are_those_that_the_teacher_predicts(summarized):
    data, projector, _ = summarized
    summary = summarize_subclasses(projector, data.embeddings, data.logits)
    for each in summary.classes:
        assert bool((data.logits[each.rows].argmax(1) == each.number).all())
    for labels in ([None] * 600, torch.full((600,), -1), torch.full((600,), -100)):
        again = summarize_subclasses(projector, data.embeddings, data.logits, labels)
        assert all(torch.equal(one.rows, two.rows) for one, two in zip(again.classes, summary.classes, strict=True))


def test_mutual_information_is_that_of_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    first, noise = (torch.randint(0, 5, (500,), generator=generator) for _ in range(2))
    second = torch.where(noise > 2, first, noise)
    expected = mutual_info_score(first, second) / math.log(2)
    assert mutual_information(first, second) == pytest.approx(expected, rel=1e-9)


def test_subclasses_equal_to_fine_labels_have_all_information_and_random_ones_none():
    generator = torch.Generator().manual_seed(0)
    classes = torch.randint(0, 2, (4000,), generator=generator)
    fine_labels = 3 * classes + torch.randint(0, 3, (4000,), generator=generator)
    whole = label_mutual_information(fine_labels % 3, classes, fine_labels)
    assert whole.adjusted == pytest.approx(1) and whole.bits == pytest.approx(whole.entropy)
    assert (
        abs(label_mutual_information(torch.randint(0, 3, (4000,), generator=generator), classes, fine_labels).adjusted)
        < 0.01
    )
    assert label_mutual_information(fine_labels % 3, fine_labels, fine_labels).adjusted == 0  # the class explains it


def test_the_plane_has_the_largest_variance_and_is_invariant_to_rotations():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(200, 4, generator=generator, dtype=torch.float64).exp() * torch.tensor([1.0, 5.0, 2.0, 0.1])
    turn = torch.linalg.qr(torch.randn(4, 4, generator=generator, dtype=torch.float64))[0]
    plane = principal_plane(rows)
    assert torch.allclose(plane, principal_plane(rows @ turn), atol=1e-9)
    values = torch.linalg.svdvals(rows - rows.mean(0))
    assert torch.allclose(plane.norm(dim=0), values[:2])


def test_a_figure_has_a_point_for_each_example_and_a_bar_for_each_subclass(summarized, tmp_path):
    each = summarized[2].classes[0]
    figure = plot_class(each, tmp_path / "class.png")
    plane, bars = figure.axes
    assert sum(len(dots.get_offsets()) for dots in plane.collections) == len(each.rows)
    assert [bar.get_width() for bar in bars.patches] == pytest.approx((100 * each.sizes).tolist())
    assert (tmp_path / "class.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_needs_no_other_file_and_escapes_texts(summarized, tmp_path):
    _, _, summary = summarized
    page = write_page(summary, tmp_path / "page.html", lambda row: f"text {row} <script>alert(1)</script>")
    text = page.read_text(encoding="utf-8")
    sources = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert len(sources) == CLASSES and all(source.startswith("data:image/png;base64,") for source in sources)
    assert "<script>" not in text and "&lt;script&gt;" in text and "b &amp; c" in text
    for each in summary.classes:
        assert all(f"text {row} " in text for rows in each.top_examples for row in rows)
    assert "bits of the fine labels" in text


def test_the_page_shows_images(summarized, tmp_path):
    _, _, summary = summarized
    page = write_page(summary, tmp_path / "page.html", lambda row: Image.new("L", (4, 4), row % 256))
    assert page.read_text(encoding="utf-8").count('class="example"') == CLASSES * SUBCLASSES * 3


@pytest.mark.parametrize("splitter", ["lelp", "kmeans", "labels", *BENCHMARK_SPLITTERS])
def test_explained_variance_is_only_of_directions_of_variance(splitter, summarized, tmp_path):
    data, _, _ = summarized
    fine_labels = data.fine_labels if splitter == "labels" else None
    projector = SubclassProjector.fit(
        data.embeddings, data.labels, data.weight, SUBCLASSES, splitter=splitter, fine_labels=fine_labels
    )
    summary = summarize_subclasses(
        projector, data.embeddings, data.logits, data.labels, fine_labels=fine_labels, num_examples=1
    )
    page = write_page(replace(summary, classes=summary.classes[:1]), tmp_path / "page.html", str).read_text(
        encoding="utf-8"
    )
    expected = splitter in ("lelp", "no-rotation", "no-scaling")
    assert ("directions explain" in page) == expected and (
        summary.classes[0].explained_variance_ratio is not None
    ) == expected


def test_the_page_states_why_nothing_was_probed(summarized, tmp_path):
    summary = replace(summarized[2], classes=[], no_probe="too <few>")
    page = write_page(summary, tmp_path / "page.html", str).read_text(encoding="utf-8")
    assert "Not measured: too &lt;few&gt;" in page


def test_invalid_arguments_raise(summarized):
    data, projector, _ = summarized
    one = SubclassProjector.fit(data.embeddings, data.labels, data.weight, 1)
    with pytest.raises(SubclassError, match="one subclass of each class"):
        summarize_subclasses(one, data.embeddings, data.logits)
    with pytest.raises(SubclassError, match="no examples"):
        summarize_subclasses(projector, data.embeddings[:0], data.logits[:0])
    for labels, expected in (
        (torch.where(torch.arange(600) == 9, 3, data.labels), "label of example 9 is 3"),
        (data.labels[:5], r"one an example, \(600,\); found \(5,\)"),
        (data.labels.double(), "whole numbers"),
    ):
        with pytest.raises(SubclassError, match=expected):
            summarize_subclasses(projector, data.embeddings, data.logits, labels)
    with pytest.raises(SubclassError, match=r"Logits must have the shape \(600, 3\); found \(600, 2\)"):
        summarize_subclasses(projector, data.embeddings, data.logits[:, :2])
    with pytest.raises(SubclassError, match="600 examples need as many fine labels; found 5"):
        summarize_subclasses(projector, data.embeddings, data.logits, compared_labels=data.fine_labels[:5])
