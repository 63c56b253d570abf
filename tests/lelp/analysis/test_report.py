"""Subclasses seen: each example in its place, sizes that add up, information as it is defined, a page that needs nothing."""

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
def seen():
    given = make_embeddings()
    projector = SubclassProjector.fit(
        given.embeddings, given.labels, given.weight, SUBCLASSES, id2label=["<a>", "b & c", "d"]
    )
    view = summarize_subclasses(projector, given.embeddings, given.logits, given.labels, given.fine_labels, examples=3)
    return given, projector, view


def test_every_example_is_in_its_class_and_sizes_add_up(seen):
    given, projector, view = seen
    assert [each.name for each in view.classes] == ["<a>", "b & c", "d"]
    rows = torch.cat([each.rows for each in view.classes])
    assert torch.equal(rows.sort().values, torch.arange(len(given.labels)))
    for each in view.classes:
        assert bool((given.labels[each.rows] == each.number).all())
        assert each.points.shape == (len(each.rows), 2)
        assert abs(each.sizes.sum().item() - 1) < 1e-9
        assert each.explained_variance_ratio == projector.explained_variance_ratio[each.number].item()


def test_the_nearest_examples_are_those_the_projector_is_surest_of(seen):
    given, projector, view = seen
    targets = projector.transform(given.embeddings, given.logits)
    for each in view.classes:
        shares = targets[:, each.number] / targets[:, each.number].sum(1, keepdim=True)
        mine = torch.where(given.labels == each.number, 1.0, -1.0)[:, None] * shares
        for number, (nearest, sure) in enumerate(zip(each.nearest, each.sureness, strict=True)):
            best = mine[:, number].sort(descending=True).values[:3]
            assert torch.allclose(mine[nearest, number], best) and torch.allclose(torch.tensor(sure).double(), best)


def test_without_labels_classes_are_the_teachers(seen):
    given, projector, _ = seen
    view = summarize_subclasses(projector, given.embeddings, given.logits)
    for each in view.classes:
        assert bool((given.logits[each.rows].argmax(1) == each.number).all())
    for labels in ([None] * 600, torch.full((600,), -1), torch.full((600,), -100)):
        again = summarize_subclasses(projector, given.embeddings, given.logits, labels)
        assert all(torch.equal(one.rows, two.rows) for one, two in zip(again.classes, view.classes, strict=True))


def test_mutual_information_is_that_of_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    first, noise = (torch.randint(0, 5, (500,), generator=generator) for _ in range(2))
    second = torch.where(noise > 2, first, noise)
    expected = mutual_info_score(first, second) / math.log(2)
    assert mutual_information(first, second) == pytest.approx(expected, rel=1e-9)


def test_subclasses_that_are_the_finer_labels_know_all_and_shuffled_ones_nothing():
    generator = torch.Generator().manual_seed(0)
    classes = torch.randint(0, 2, (4000,), generator=generator)
    finer = 3 * classes + torch.randint(0, 3, (4000,), generator=generator)
    whole = label_mutual_information(finer % 3, classes, finer)
    assert whole.share == pytest.approx(1) and whole.told == pytest.approx(whole.entropy)
    assert (
        abs(label_mutual_information(torch.randint(0, 3, (4000,), generator=generator), classes, finer).share) < 0.01
    )
    assert label_mutual_information(finer % 3, finer, finer).share == 0  # the class tells all


def test_the_plane_is_that_of_largest_variance_and_turns_with_nothing():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(200, 4, generator=generator, dtype=torch.float64).exp() * torch.tensor([1.0, 5.0, 2.0, 0.1])
    turn = torch.linalg.qr(torch.randn(4, 4, generator=generator, dtype=torch.float64))[0]
    plane = principal_plane(rows)
    assert torch.allclose(plane, principal_plane(rows @ turn), atol=1e-9)
    values = torch.linalg.svdvals(rows - rows.mean(0))
    assert torch.allclose(plane.norm(dim=0), values[:2])


def test_a_figure_has_a_point_an_example_and_a_bar_a_subclass(seen, tmp_path):
    each = seen[2].classes[0]
    figure = plot_class(each, tmp_path / "class.png")
    plane, bars = figure.axes
    assert sum(len(dots.get_offsets()) for dots in plane.collections) == len(each.rows)
    assert [bar.get_width() for bar in bars.patches] == pytest.approx((100 * each.sizes).tolist())
    assert (tmp_path / "class.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_needs_no_other_file_and_takes_texts_as_they_are(seen, tmp_path):
    _, _, view = seen
    page = write_page(view, tmp_path / "page.html", lambda row: f"text {row} <script>alert(1)</script>")
    text = page.read_text(encoding="utf-8")
    sources = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert len(sources) == CLASSES and all(source.startswith("data:image/png;base64,") for source in sources)
    assert "<script>" not in text and "&lt;script&gt;" in text and "b &amp; c" in text
    for each in view.classes:
        assert all(f"text {row} " in text for rows in each.nearest for row in rows)
    assert "bits of the finer labels" in text


def test_the_page_shows_images(seen, tmp_path):
    _, _, view = seen
    page = write_page(view, tmp_path / "page.html", lambda row: Image.new("L", (4, 4), row % 256))
    assert page.read_text(encoding="utf-8").count('class="example"') == CLASSES * SUBCLASSES * 3


@pytest.mark.parametrize("splitter", ["lelp", "kmeans", "labels", *BENCHMARK_SPLITTERS])
def test_variance_is_told_of_directions_of_variance_alone(splitter, seen, tmp_path):
    given, _, _ = seen
    finer = given.fine_labels if splitter == "labels" else None
    projector = SubclassProjector.fit(
        given.embeddings, given.labels, given.weight, SUBCLASSES, splitter=splitter, fine_labels=finer
    )
    view = summarize_subclasses(projector, given.embeddings, given.logits, given.labels, fine_labels=finer, examples=1)
    page = write_page(replace(view, classes=view.classes[:1]), tmp_path / "page.html", str).read_text(encoding="utf-8")
    told = splitter in ("lelp", "no-rotation", "no-scaling")
    assert ("directions hold" in page) == told and (view.classes[0].explained_variance_ratio is not None) == told


def test_the_page_says_why_there_is_no_forecast(seen, tmp_path):
    view = replace(seen[2], classes=[], no_forecast="too <few>")
    page = write_page(view, tmp_path / "page.html", str).read_text(encoding="utf-8")
    assert "There is none: too &lt;few&gt;" in page


def test_what_cannot_be_seen_is_refused(seen):
    given, projector, _ = seen
    one = SubclassProjector.fit(given.embeddings, given.labels, given.weight, 1)
    with pytest.raises(SubclassError, match="one subclass a class"):
        summarize_subclasses(one, given.embeddings, given.logits)
    with pytest.raises(SubclassError, match="no examples"):
        summarize_subclasses(projector, given.embeddings[:0], given.logits[:0])
    for labels, told in (
        (torch.where(torch.arange(600) == 9, 3, given.labels), "label of example 9 is 3"),
        (given.labels[:5], r"one an example, \(600,\); found \(5,\)"),
        (given.labels.double(), "whole numbers"),
    ):
        with pytest.raises(SubclassError, match=told):
            summarize_subclasses(projector, given.embeddings, given.logits, labels)
    with pytest.raises(SubclassError, match=r"Logits of the shape \(600, 3\) were expected; found \(600, 2\)"):
        summarize_subclasses(projector, given.embeddings, given.logits[:, :2])
    with pytest.raises(SubclassError, match="600 examples need as many finer labels; found 5"):
        summarize_subclasses(projector, given.embeddings, given.logits, finer=given.fine_labels[:5])
