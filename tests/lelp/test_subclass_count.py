"""The number of subclasses where none is given: the smallest of all limits, which the projector states."""

import json

import pytest
import torch

from hf_guide import SubclassError, SubclassProjector, fit_subclasses
from hf_guide.lelp.projector_files import CONFIG_NAME
from hf_guide.lelp.subclass_count import DEFAULT_SUBCLASS_TEMPERATURE
from tests.lelp.test_fitting import Pad, examples, teacher_of


def fit(counts, width, *, rank=None, **options):
    """Fit to random embeddings of as many examples of each class as `counts` states."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    embeddings = torch.randn(len(labels), width, generator=generator, dtype=torch.float64)
    if rank is not None:
        embeddings[:, rank:] = 1.0
    weight = torch.randn(len(counts), width, generator=generator, dtype=torch.float64)
    if rank is not None:
        weight[:, :rank] = 0.0
    return SubclassProjector.fit(embeddings, labels, weight, **options)


@pytest.mark.parametrize(
    "counts, width, expected, rule",
    [
        ([400, 400], 64, 16, "the most that is chosen"),
        ([400, 160], 18, 16, "the most that is chosen"),
        ([400, 75], 64, 7, "10 examples each of the 75 in class 1 ('LABEL_1')"),
        ([400, 300, 200], 14, 11, "embeddings 14 wide less 3 classes"),
        ([400, 12], 64, 2, "the fewest; 10 examples each of the 12 in class 1 ('LABEL_1')"),
        ([3, 3], 4, 2, "the fewest; 10 examples each of the 3 in class 0 ('LABEL_0')"),
    ],
)
@pytest.mark.parametrize("splitter", ["lelp", "kmeans"])
def test_the_number_is_the_smallest_limit(counts, width, expected, rule, splitter):
    projector = fit(counts, width, splitter=splitter)
    assert (projector.num_subclasses, projector.num_subclasses_rule) == (expected, rule)
    assert projector.scores.shape == (len(counts), width, expected)
    assert projector.subclass_temperature == DEFAULT_SUBCLASS_TEMPERATURE == 0.5 and projector.temperature == 1.0


def test_directions_without_variance_do_not_count():
    projector = fit([200, 200], 12, rank=5)
    assert projector.num_subclasses == 5 and "varies" in str(projector.num_subclasses_rule)


@pytest.mark.parametrize(
    "counts, width, rank, error",
    [
        ([50, 50], 3, None, "Embeddings 3 wide cannot hold 2 directions"),
        ([50, 2], 8, None, "has 2 examples; 2 subclasses need at least 3. Give more examples."),
        ([50, 0], 8, None, "No example is of class 1"),
        ([50, 50], 8, 1, "differ in 1 directions"),
    ],
)
def test_not_even_two_is_an_error_that_states_the_reason(counts, width, rank, error):
    with pytest.raises(SubclassError, match=error):
        fit(counts, width, rank=rank)


def test_fine_labels_state_their_number():
    projector = fit(
        [40, 40], 6, splitter="labels", fine_labels=torch.cat([torch.arange(40) % 5, torch.arange(40) % 2])
    )
    assert projector.num_subclasses == 5 and "fine labels" in str(projector.num_subclasses_rule)


def test_the_rule_is_saved_and_a_file_without_it_loads(tmp_path):
    teacher, rows = teacher_of(), examples()
    chosen = fit_subclasses(teacher, rows, data_collator=Pad(), show_progress=False)
    assert chosen.num_subclasses == 3  # 30 examples of each class
    chosen.save_pretrained(tmp_path)
    assert json.loads((tmp_path / CONFIG_NAME).read_text())["num_subclasses_rule"] == chosen.num_subclasses_rule
    assert SubclassProjector.from_pretrained(tmp_path).num_subclasses_rule == chosen.num_subclasses_rule
    given = fit_subclasses(teacher, rows, 3, data_collator=Pad(), show_progress=False)
    assert given.num_subclasses_rule is None and given.fingerprint() == chosen.fingerprint()
