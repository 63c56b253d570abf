"""Splitters by name: one from outside fits, saves, loads and trains; a taken name and a missing package raise."""

import math
from pathlib import Path

import pytest
import torch

from hf_guide import (
    DistillationArguments,
    DistillationTrainer,
    OptionError,
    SubclassLabelCollator,
    SubclassProjector,
    register_splitter,
)
from hf_guide.lelp.accumulator import StatisticsAccumulator
from hf_guide.lelp.splitters import registry
from hf_guide.lelp.splitters.scorers import LinearScorer
from tests.distillation.small import collate, examples_for
from tests.lelp.benchmark_modules import import_benchmark
from tests.lelp.synthetic_data import make_embeddings
from tests.lelp.test_collator import COUNT, SUBCLASSES, TEXT, projector_of, teacher_of
from tests.lelp.test_loss import student_of


@pytest.fixture
def splitters(monkeypatch):
    """The registry, of which the test may change a copy."""
    monkeypatch.setattr(registry, "_SPLITTERS", dict(registry._SPLITTERS))
    return registry._SPLITTERS


def split_by_first_coordinates(inputs):
    moments = inputs.moments
    directions = torch.eye(moments.width, inputs.num_subclasses, dtype=torch.float64)
    directions = directions.expand(moments.num_classes, -1, -1).contiguous()
    return LinearScorer(directions, -(moments.means[:, None] @ directions).squeeze(1))


def test_a_splitter_from_outside_fits_saves_loads_and_trains(splitters, tmp_path: Path) -> None:
    register_splitter("first-coordinates", split_by_first_coordinates)
    data = make_embeddings()
    arrays = SubclassProjector.fit(data.embeddings, data.labels, data.weight, 2, splitter="first-coordinates")
    own = data.labels == 1
    centered = data.embeddings[own] - data.embeddings[own].mean(0)
    assert (arrays.coordinates(data.embeddings)[own, 1] - centered[:, :2]).abs().max() < 1e-12
    teacher, examples = teacher_of(TEXT), examples_for(TEXT, COUNT)
    projector = projector_of(teacher, examples, splitter="first-coordinates")
    projector.save_pretrained(tmp_path / "projector")
    del splitters["first-coordinates"]
    loaded = SubclassProjector.from_pretrained(tmp_path / "projector")
    assert loaded.fingerprint() == projector.fingerprint() and loaded.splitter == "first-coordinates"
    student = student_of(TEXT, SUBCLASSES)
    args = DistillationArguments(
        tmp_path / "run",
        losses="lelp",
        temperature=loaded.temperature,
        max_steps=2,
        per_device_train_batch_size=8,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
    )
    collator = SubclassLabelCollator(loaded, collate)
    trainer = DistillationTrainer(student, args, collator, examples, teacher=teacher)
    trainer.train()
    losses = [entry["lelp"] for entry in trainer.state.log_history if "lelp" in entry]
    assert len(losses) == 2 and all(math.isfinite(loss) and loss > 0 for loss in losses)


def test_a_name_that_is_taken_raises_and_names_the_function(splitters) -> None:
    with pytest.raises(OptionError, match=r"'lelp' is registered already, as .*split_by_principal_components"):
        register_splitter("lelp", split_by_first_coordinates)
    register_splitter("mine", split_by_first_coordinates)
    with pytest.raises(OptionError, match=r"'mine' is registered already, as .*split_by_first_coordinates"):
        register_splitter("mine", split_by_first_coordinates)


def test_an_ablation_that_is_not_registered_is_an_error_that_names_its_file(splitters, tmp_path: Path) -> None:
    module = import_benchmark("lelp_splitters")
    data = make_embeddings()
    for name in registry.BENCHMARK_SPLITTERS:
        assert name in splitters, "the benchmark registers it"
        fitted = SubclassProjector.fit(data.embeddings, data.labels, data.weight, 3, splitter=name)
        fitted.save_pretrained(tmp_path / name)
        del splitters[name]
        with pytest.raises(OptionError, match=f"'{name}' is an ablation .* examples/benchmarks/lelp_splitters.py"):
            SubclassProjector.fit(data.embeddings, data.labels, data.weight, 3, splitter=name)
        loaded = SubclassProjector.from_pretrained(tmp_path / name)
        expected = fitted.transform(data.embeddings, data.logits)
        assert torch.equal(loaded.transform(data.embeddings, data.logits), expected), name
    assert Path(module.__file__).name == "lelp_splitters.py"


def test_the_ablations_without_an_omission_are_the_method_itself() -> None:
    module = import_benchmark("lelp_splitters")
    data = make_embeddings()
    projector = SubclassProjector.fit(data.embeddings, data.labels, data.weight, 3, seed=5)
    statistics = StatisticsAccumulator(3, data.embeddings.shape[1], seed=5)
    statistics.update(data.embeddings, data.labels)
    scorer = module.split_with_step_left_out(statistics.splitter_inputs(data.weight, 3))
    assert torch.equal(scorer.directions, projector.scores.directions)
    assert torch.equal(scorer.offsets, projector.scores.offsets)


def test_a_missing_package_raises_before_the_data_are_read(splitters) -> None:
    register_splitter("needs-more", split_by_first_coordinates, requires="a_package_that_is_not_installed")

    def unread():
        raise AssertionError("the data were read")
        yield

    data = make_embeddings()
    with pytest.raises(OptionError, match="'needs-more' needs the module a_package_that_is_not_installed"):
        SubclassProjector.fit(unread(), None, data.weight, 3, splitter="needs-more")
    splitters["kmeans"] = registry.SplitterEntry("kmeans", split_by_first_coordinates, requires="sklearn_missing")
    assert not registry.can_fit("kmeans") and not registry.can_fit("unknown") and registry.can_fit("lelp")
