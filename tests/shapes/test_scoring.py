"""Shapes are scored by calibrated starts on data held out, each once, and an interrupted search goes on."""

import pytest
import torch

from hf_guide import find_shapes, from_teacher
from hf_guide.calibration.output_comparison import causal_loss, divergence
from hf_guide.errors import OptionError
from hf_guide.shapes.scoring import CalibratedScorer, split_examples
from tests.tiny import KINDS, inputs, same_bits

METHOD = {"method": "calibrated", "calibration_tokens": 256}


def search(kind, **options):
    options = {"num_parameters": "40%", "limit": 4, "method": METHOD, "show_progress": False} | options
    return find_shapes(kind.teacher(), calibration_dataset=data(kind), **options)


def data(kind):
    generator = torch.Generator().manual_seed(1)
    if kind.inputs == "images":
        return [{"pixel_values": torch.randn(8, 3, 16, 16, generator=generator)} for _ in range(4)]
    ids = [torch.randint(3, 96, (4, 16), generator=generator) for _ in range(4)]
    return [{**{name: each for name in inputs(kind)}} for each in ids]


@pytest.mark.parametrize(
    "name",
    [
        "llama",
        pytest.param("bert classifier", marks=pytest.mark.slow),
        pytest.param("t5", marks=pytest.mark.slow),
        "vit",
    ],
)
def test_the_shape_with_the_lowest_loss_is_first_and_others_have_a_quick_loss(name):
    shapes = search(KINDS[name])
    whole = [shape.loss for shape in shapes if shape.loss is not None]
    assert whole == sorted(whole) and len(whole) == min(3, len(shapes))
    assert all(shape.quick_loss is not None for shape in shapes)
    others = [shape.quick_loss for shape in shapes[3:]]
    assert all(quick >= max(shape.quick_loss for shape in shapes[:3]) for quick in others)


def test_an_interrupted_search_goes_on_where_it_stopped(tmp_path, monkeypatch):
    kind, started = KINDS["llama"], []
    start = CalibratedScorer._start

    def counted(scorer, candidate, *, quick):
        started.append(quick)
        if len(started) == 3:
            raise KeyboardInterrupt
        return start(scorer, candidate, quick=quick)

    monkeypatch.setattr(CalibratedScorer, "_start", counted)
    options = {"calibration_cache_dir": tmp_path, "limit": 2}
    with pytest.raises(KeyboardInterrupt):
        search(kind, **options)
    first = search(kind, **options)
    assert len(started) == 3 + 2  # two starts of four were saved, the third is made again
    assert search(kind, **options) == first and len(started) == 5


def test_from_teacher_takes_the_first_and_resumes(tmp_path, monkeypatch):
    kind = KINDS["llama"]
    monkeypatch.setattr("hf_guide.shapes.search.DEFAULT_LIMIT", 2)
    monkeypatch.setitem(find_shapes.__kwdefaults__, "limit", 2)
    call = {"calibration_dataset": data(kind), "method": METHOD, "show_progress": False}
    student = from_teacher(kind.teacher(), num_parameters="40%", calibration_cache_dir=tmp_path, **call)
    assert "with the lowest loss (" in student.initialization_report.shape_choice
    monkeypatch.setattr(
        CalibratedScorer, "_start", lambda *args, **kwargs: pytest.fail("a saved score was made again")
    )
    again = from_teacher(kind.teacher(), num_parameters="40%", calibration_cache_dir=tmp_path, **call)
    assert same_bits(again, student)


def test_losses_are_those_of_the_model_and_of_their_definition():
    model, row = KINDS["llama"].teacher(), {"input_ids": torch.randint(3, 96, (1, 9))}
    outputs = model(**row, labels=row["input_ids"])
    assert causal_loss(outputs.logits[0], row).mean().item() == pytest.approx(outputs.loss.item(), rel=1e-5)
    padded = {"input_ids": torch.cat([row["input_ids"], torch.zeros(1, 3, dtype=torch.long)], 1)}
    padded["attention_mask"] = (torch.arange(12) < 9).long()[None]
    assert torch.equal(causal_loss(outputs.logits[0], padded), causal_loss(outputs.logits[0], row))
    assert divergence(outputs.logits[0], outputs.logits[0]).abs().max().item() < 1e-5


def test_the_best_starts_are_distilled_for_some_steps_and_compared_by_their_loss_then(tmp_path, monkeypatch):
    kind, trained = KINDS["llama"], []
    teacher = kind.teacher()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    distil = CalibratedScorer._distil

    @torch.no_grad()
    def objective(scorer, student):
        parts = [part for batch in scorer.calibration.teacher.batches for part in scorer.comparison.parts(batch)]
        both = ([scorer.comparison.outputs(model, part) for part in parts] for model in (student, teacher))
        return sum(map(scorer.comparison.objective, *both, parts)).item()

    def measured(scorer, student):
        start = objective(scorer, student)
        distil(scorer, student)
        trained.append((start, objective(scorer, student)))

    monkeypatch.setattr(CalibratedScorer, "_distil", measured)
    options = {"num_parameters": "40%", "method": METHOD, "show_progress": False, "calibration_dataset": data(kind)}
    options |= {"search_steps": 8, "calibration_cache_dir": tmp_path}
    monkeypatch.setitem(find_shapes.__kwdefaults__, "limit", 2)
    student = from_teacher(teacher, **options)
    options["calibration_cache_dir"] = tmp_path / "shapes"
    monkeypatch.setattr("hf_guide.shapes.search.SEARCH_FOLDER", "")
    shapes = find_shapes(teacher, **options)
    assert [shape.distilled_loss for shape in shapes] == sorted(shape.distilled_loss for shape in shapes)
    assert all(shape.distilled_loss != shape.loss for shape in shapes) and len(trained) == len(shapes) == 2
    assert all(end < start for start, end in trained), trained
    choice = student.initialization_report.shape_choice
    assert f"({shapes[0].distilled_loss:.3f})" in choice and "search_steps=8" in choice
    assert f"8 steps of distillation (before them {shapes[0].loss:.3f})" in choice
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_steps_without_starts_and_too_little_data_are_errors():
    teacher = KINDS["llama"].teacher()
    with pytest.raises(OptionError, match="search_steps distils calibrated starts"):
        find_shapes(teacher, num_parameters="40%", search_steps=5, show_progress=False)
    with pytest.raises(OptionError, match="search_steps must be"):
        search(KINDS["llama"], search_steps=0)
    with pytest.raises(OptionError, match="without the 1 rows that are held out to compare with"):
        find_shapes(
            KINDS["llama"].teacher(),
            num_parameters="40%",
            calibration_dataset=[{"input_ids": torch.randint(3, 96, (1, 64))}],
            method=METHOD,
            show_progress=False,
        )


@pytest.mark.parametrize("sizes", [(16,), (1,) * 16, (8, 8), (9, 7), (3, 9, 4)])
def test_what_only_scores_does_not_depend_on_how_examples_are_batched(sizes):
    ids = torch.arange(3, 147).reshape(16, 9)
    fitted, rows = split_examples([{"input_ids": part} for part in ids.split(sizes)], 0.25)
    assert torch.equal(torch.cat([batch["input_ids"] for batch in fitted]), ids[:12])
    assert torch.equal(torch.cat([row["input_ids"] for row in rows]), ids[12:])
    images = [{"input_ids": ids, "pixel_values": torch.zeros(40, 12)}] * 2  # a row is not an example
    assert [len(each) for each in split_examples(images, 0.25)] == [1, 1]
