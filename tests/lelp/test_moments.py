"""Streamed moments equal those of all the data, however the data are divided."""

import itertools
import sys

import pytest
import torch

from hf_guide import SubclassError
from hf_guide.lelp.moments import FLUSH_ROWS, ClassMoments, ClassSample
from tests.lelp.synthetic_data import CLASSES, WIDTH, make_embeddings
from tests.tiny import run_python


def of(embeddings: torch.Tensor, labels: torch.Tensor, size: int) -> ClassMoments:
    moments = ClassMoments(CLASSES, WIDTH)
    for rows, classes in zip(embeddings.split(size), labels.split(size), strict=True):
        moments.update(rows, classes)
    return moments


def same(one: ClassMoments, other: ClassMoments) -> bool:
    pairs = [
        (one.counts, other.counts),
        (one.means, other.means),
        (one.scatters, other.scatters),
        (one.skews, other.skews),
    ]
    return all((a - b).abs().max() <= 1e-9 * b.abs().max() for a, b in pairs)


def test_moments_match_their_definitions():
    data = make_embeddings()
    moments = of(data.embeddings, data.labels, 50)
    for number in range(CLASSES):
        rows = data.embeddings[data.labels == number]
        centred = rows - rows.mean(0)
        assert moments.counts[number] == len(rows)
        torch.testing.assert_close(moments.means[number], rows.mean(0), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(moments.scatters[number], centred.T @ centred, rtol=1e-10, atol=1e-9)
        skew = (centred.square().sum(1, keepdim=True) * centred).sum(0)
        torch.testing.assert_close(moments.skews[number], skew, rtol=1e-9, atol=1e-9 * skew.abs().max().item())
    centred = data.embeddings - data.embeddings.mean(0)
    torch.testing.assert_close(moments.total_scatter(), centred.T @ centred, rtol=1e-10, atol=1e-8)


@pytest.mark.parametrize("size", [1, 7, 600])
def test_any_size_of_chunk_gives_the_same(size):
    data = make_embeddings()
    assert same(of(data.embeddings, data.labels, size), of(data.embeddings, data.labels, 100))


def test_merging_any_partition_gives_the_moments_of_all():
    data = make_embeddings(count=3 * FLUSH_ROWS)
    whole = of(data.embeddings, data.labels, 999)
    for seed, parts in itertools.product(range(3), (2, 5)):
        owner = torch.randint(0, parts, (len(data.labels),), generator=torch.Generator().manual_seed(seed))
        merged = ClassMoments(CLASSES, WIDTH)
        for part in range(parts):
            merged.merge(of(data.embeddings[owner == part], data.labels[owner == part], 64))
        assert same(merged, whole) and merged.num_examples == whole.num_examples


def test_a_part_may_lack_a_class_or_all_examples():
    data = make_embeddings()
    merged = ClassMoments(CLASSES, WIDTH)
    for number in range(CLASSES):
        chosen = data.labels == number
        merged.merge(of(data.embeddings[chosen], data.labels[chosen], 64))
    merged.merge(ClassMoments(CLASSES, WIDTH))
    assert same(merged, of(data.embeddings, data.labels, 64))


def test_a_common_offset_a_million_times_the_spread_keeps_precision():
    data = make_embeddings()
    moved = of(data.embeddings + 1e6, data.labels, 64)
    expected = of(data.embeddings, data.labels, 64)
    assert (moved.scatters - expected.scatters).abs().max() <= 1e-7 * expected.scatters.abs().max()


def test_half_precision_is_summed_in_double():
    data = make_embeddings(count=6000)
    narrow = data.embeddings.half()
    assert same(of(narrow, data.labels, 64), of(narrow.double(), data.labels, 64))


def test_the_caller_may_fill_the_same_memory_again():
    data = make_embeddings(count=60)
    moments, buffer = ClassMoments(CLASSES, WIDTH), torch.empty(10, WIDTH, dtype=torch.float64)
    for rows, classes in zip(data.embeddings.split(10), data.labels.split(10), strict=True):
        moments.update(buffer.copy_(rows), classes)
    assert same(moments, of(data.embeddings, data.labels, 60))


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_examples():
    script = """
        import resource, sys, torch
        from hf_guide.lelp.moments import ClassMoments
        from hf_guide.lelp.moments import ClassSample
        moments, sample = ClassMoments(2, 64), ClassSample(2, 64, size=128)
        def feed(chunks):
            for _ in range(chunks):
                rows, classes = torch.randn(2048, 64), torch.randint(0, 2, (2048,))
                moments.update(rows, classes)
                sample.update(rows, classes)
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        few = feed(20)
        print(feed(400) - few)
    """
    grown = int(run_python(script)) * (1 if sys.platform == "darwin" else 1024)
    assert grown < 400 * 2048 * 64 * 4 / 8, f"{grown / 2**20:.1f} MiB"


def test_invalid_chunks_raise_and_name_the_example():
    data = make_embeddings()
    moments = of(data.embeddings, data.labels, 100)
    broken = data.embeddings[:4].clone()
    broken[2, 5] = torch.nan
    with pytest.raises(SubclassError, match=r"example 602 holds NaN"):
        moments.update(broken, data.labels[:4])
    with pytest.raises(SubclassError, match=r"example 77 holds NaN"):
        moments.update(broken, data.labels[:4], [5, 6, 77, 8])
    with pytest.raises(SubclassError, match=r"label of example 601 is 3; the teacher has the classes 0 to 2"):
        moments.update(data.embeddings[:2], torch.tensor([0, 3]))
    with pytest.raises(SubclassError, match="must have the shape"):
        moments.update(data.embeddings[:, :5], data.labels)
    with pytest.raises(SubclassError, match="cannot be merged"):
        moments.merge(ClassMoments(CLASSES, WIDTH + 1))
    assert same(moments, of(data.embeddings, data.labels, 100)), "an invalid chunk changed the moments"


def test_a_sample_depends_on_the_data_and_not_on_their_order_or_division():
    data = make_embeddings(count=3000)
    whole = ClassSample(CLASSES, WIDTH, size=64, seed=1)
    whole.update(data.embeddings, data.labels)
    order = torch.randperm(3000, generator=torch.Generator().manual_seed(0))
    parts = [ClassSample(CLASSES, WIDTH, size=64, seed=1) for _ in range(3)]
    for number, rows in enumerate(order.split(100)):
        parts[number % 3].update(data.embeddings[rows], data.labels[rows])
    for part in parts[1:]:
        parts[0].merge(part)
    assert all(torch.equal(a, b) and len(a) == 64 for a, b in zip(parts[0].rows, whole.rows, strict=True))
    other = ClassSample(CLASSES, WIDTH, size=64, seed=2)
    other.update(data.embeddings, data.labels)
    assert not torch.equal(other.rows[0], whole.rows[0])
