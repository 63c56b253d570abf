"""The probe: likely to help where a student that knew the hidden classes is better, and not where targets are of no use."""

import dataclasses
import math

import datasets
import pytest
import torch
from torch import nn

from hf_guide import OptionError, SubclassError, TaskError, fit_subclasses, probe_subclasses
from hf_guide.lelp.analysis import probe as probe_module
from hf_guide.lelp.analysis.probe import (
    ProbeData,
    ProbeStudents,
    SubclassProbe,
    difference,
    draw_batches,
    run_probe,
    split_folds,
)
from hf_guide.lelp.analysis.probe_subclasses import smaller_config
from tests.lelp.test_fitting import CLASSIFIERS, Pad, collator, examples, teacher_of
from tests.tiny import KINDS, Kind

COUNT = 900
WIDER = Kind("BertForSequenceClassification", "", KINDS["bert classifier"].config | {"num_labels": 5}, {})


@pytest.fixture(scope="module")
def cells():
    """Points of the plane in 4 x 4 cells, of which each is of one class and its neighbors of the other."""
    generator = torch.Generator().manual_seed(1)
    places = torch.randint(0, 4, (COUNT, 2), generator=generator)
    classes, cells = places.sum(1) % 2, places[:, 0] * 4 + places[:, 1]
    points = places.float() - 1.5 + 0.15 * torch.randn(COUNT, 2, generator=generator)
    logits = 8.0 * (2 * torch.nn.functional.one_hot(classes, 2) - 1).float()
    ranks = torch.zeros(COUNT, dtype=torch.long)
    for number in (0, 1):
        ranks[classes == number] = cells[classes == number].unique(return_inverse=True)[1]
    return points, logits, classes, cells, ranks


def probe_of(cells, ranks, *, fine=False, **options) -> SubclassProbe:
    points, logits, classes, own_cells, _ = cells
    shares = torch.nn.functional.one_hot(ranks, 8).float()
    targets = (logits.softmax(-1)[:, :, None] * shares[:, None]).flatten(1)
    data = ProbeData(
        logits, targets, classes, own_cells if fine else None, split_folds(COUNT, 2), lambda rows: points[rows]
    )

    class Student(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Sequential(nn.Linear(2, 24), nn.Tanh()), nn.Linear(24, 2)

    def forward(model, inputs):
        features = model.body(inputs)
        return features, model.head(features)

    students = ProbeStudents(Student, forward, 24, 1e-2, "points")
    return run_probe(data, students, **({"steps": 150, "show_progress": False} | options))


def test_hidden_classes_that_a_student_can_learn_are_likely_to_help(cells):
    probe = probe_of(cells, cells[-1], fine=True)
    assert probe.verdict == "likely to help" and probe.gain > 5
    assert probe.headroom is not None and probe.headroom > 2 * probe.headroom_error
    assert probe.num_subclasses == 8 and (probe.num_train, probe.num_held_out) == (600, 300)
    assert "Subclasses are likely to help: LELP is +" in probe.summary() and "the headroom" in probe.summary()


def test_a_random_partition_is_unlikely_to_help(cells):
    ranks = torch.randint(0, 8, (COUNT,), generator=torch.Generator().manual_seed(0))
    probe = probe_of(cells, ranks)
    assert probe.verdict == "unlikely to help" and probe.headroom is None
    assert "Subclasses are unlikely to help" in probe.summary()


def test_the_seed_decides_and_the_callers_random_state_is_left_alone(cells):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, again, other = (probe_of(cells, cells[-1], steps=20, seed=seed) for seed in (1, 1, 2))
    assert first == again and first != other
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "gain, error, verdict",
    [
        (3.0, 1.0, "likely to help"),
        (1.0, 0.5, "likely to help"),
        (0.9, 0.1, "unlikely to help"),
        (-3.0, 1.0, "unlikely to help"),
        (2.0, 2.1, "unlikely to help"),
        (3.0, 2.0, "undecided"),
    ],
)
def test_the_verdict_weighs_the_gain_by_its_error(cells, gain, error, verdict):
    probe = dataclasses.replace(probe_of(cells, cells[-1], steps=1), gain=gain, gain_error=error)
    assert probe.verdict == verdict == probe.to_dict()["verdict"]
    assert ("pass more examples" in probe.summary()) == (verdict == "undecided")


def test_what_is_undecided_takes_as_many_seeds_again(cells, monkeypatch):
    """On the same splits, in the same order: the first are those of a probe that was decided by them."""
    decided = probe_of(cells, cells[-1], steps=20)
    monkeypatch.setattr(probe_module, "decide", lambda gain, error: "undecided")
    longer = probe_of(cells, cells[-1], steps=20, fine=True)
    assert (len(decided.kd), len(longer.kd)) == (2, 4)
    assert (longer.kd[:2], longer.subclasses[:2]) == (decided.kd, decided.subclasses)
    assert longer.kd[2:] != longer.kd[:2] and longer.headroom is not None
    mean = sum(longer.subclasses) / 4 - sum(longer.kd) / 4
    assert longer.gain == pytest.approx(mean) and "4 seeds" in longer.summary()


def test_the_error_is_that_of_examples_and_of_seeds():
    labels = torch.arange(40) % 2
    train = torch.arange(40)
    data = ProbeData(
        torch.zeros(40, 2), torch.zeros(40, 4), labels, None, [(train, train), (train, train)], lambda rows: rows
    )
    first = torch.arange(40) < 20
    right = [{"kd": first, "subclasses": first | (train >= 30)}, {"kd": first, "subclasses": first | (train >= 20)}]
    gain, error = difference(data, right, "subclasses")
    mean = torch.tensor([0.0] * 20 + [50.0] * 10 + [100.0] * 10).double()
    assert gain == pytest.approx(37.5)
    assert error == pytest.approx(math.sqrt(mean.var() / 40 + torch.tensor([25.0, 50.0]).var() / 2))


def test_folds_hold_each_example_out_once_and_batches_take_all_alike():
    splits = split_folds(100, 3)
    assert torch.cat([held_out for _, held_out in splits]).sort().values.tolist() == list(range(100))
    assert all(not set(train.tolist()) & set(held_out.tolist()) for train, held_out in splits)
    batches = draw_batches(torch.arange(10, 22), 5, 0)
    drawn = torch.cat([next(batches) for _ in range(12)])
    assert torch.equal(drawn.sort().values, torch.arange(10, 22).repeat_interleave(5))


@pytest.mark.parametrize(
    "labels, train, error",
    [
        (torch.arange(90) % 2, torch.arange(30), "at least 32 training examples; found 30"),
        (torch.arange(90) % 2, torch.arange(75), "at least 20 held-out examples; found 15"),
        (torch.zeros(90, dtype=torch.long), torch.arange(60), "All 60 training examples are of class 0"),
    ],
)
def test_too_few_examples_or_classes_raise(labels, train, error):
    held_out = torch.arange(len(train), 90)
    with pytest.raises(SubclassError, match=error):
        ProbeData(torch.zeros(90, 2), torch.zeros(90, 4), labels, None, [(train, held_out)], lambda rows: rows)


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_a_teacher_and_a_dataset_are_probed_and_left_as_they_were(kind):
    teacher, rows = teacher_of(kind), examples(kind)
    teacher.train()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    options = {"data_collator": collator(kind), "steps": 2, "num_seeds": 2, "show_progress": False}
    probe = probe_subclasses(teacher, rows, **options)
    assert len(probe.kd) == 2 and (probe.num_train, probe.num_held_out, probe.num_subclasses) == (60, 30, 3)
    assert type(teacher).__name__ in probe.student and "with random weights" in probe.student
    assert teacher.training and all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert probe_subclasses(teacher, rows, **options) == probe


def test_a_given_student_is_copied_and_measured_on_given_examples():
    teacher, rows, student = teacher_of(), examples(), teacher_of()
    before = student.classifier.weight.clone()
    fine = [row | {"kind": row["label"] * 2 + number % 2} for number, row in enumerate(rows)]
    options = {"data_collator": Pad(), "steps": 2, "num_seeds": 2, "show_progress": False}
    probe = probe_subclasses(teacher, fine, fine[:40], student=student, fine_label_column="kind", **options)
    assert (probe.num_train, probe.num_held_out) == (90, 40) and "as given" in probe.student
    assert probe.headroom is not None and torch.equal(student.classifier.weight, before)
    config = smaller_config(teacher.config)
    assert "with random weights" in probe_subclasses(teacher, rows, student=config, **options).student


def test_the_examples_to_measure_on_have_a_column_and_names_of_their_own():
    teacher, rows = teacher_of(), examples()
    names, measured = list(teacher.config.id2label.values()), rows[:40]
    options = {"data_collator": Pad(), "steps": 2, "num_seeds": 2, "show_progress": False}
    expected = probe_subclasses(teacher, rows, measured, **options)
    labels = datasets.ClassLabel(names=names[::-1])
    own = [{name: row[name] for name in row if name != "label"} for row in measured]
    own = [row | {"label_ids": labels.str2int(names[each["label"]])} for row, each in zip(own, measured, strict=True)]
    named = datasets.Dataset.from_list(own).cast_column("label_ids", labels)
    assert probe_subclasses(teacher, rows, named, **options) == expected


def test_a_student_may_read_other_inputs_than_the_teacher():
    """Texts for a teacher of images, of which the students' loss is that of texts alone."""
    teacher, images, texts = teacher_of("vit"), examples("vit"), examples()
    pairs = [text | {"pixel_values": image["pixel_values"]} for text, image in zip(texts, images, strict=True)]
    options = {"data_collator": collator("vit"), "steps": 2, "num_seeds": 2, "show_progress": False}
    student = teacher_of()

    def read_texts(features):
        return Pad()([{name: each[name] for name in texts[0]} for each in features])

    probe = probe_subclasses(teacher, pairs, student=student, student_collator=read_texts, **options)
    assert len(probe.kd) == 2 and type(student).__name__ in probe.student
    with pytest.raises(OptionError, match="columns \\['pixel_values'\\].*student takes.*input_ids.*student_collator"):
        probe_subclasses(teacher, pairs, student=student, **options)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"steps": 0}, OptionError, "steps must be"),
        ({"learning_rate": 0.0}, OptionError, "learning_rate"),
        ({"student": "name"}, OptionError, "student must be a model or a config"),
        ({"student": KINDS["vit"].teacher().config}, OptionError, "Pass a config of the teacher's class"),
        ({"student": WIDER.teacher()}, OptionError, "5 outputs and the teacher 3 classes"),
        ({"student": KINDS["bert"].teacher()}, TaskError, "the student, a BertForMaskedLM,"),
        ({"projector": 3}, OptionError, "projector must be a SubclassProjector"),
        ({"seed": 1.5}, OptionError, "seed must be a whole number"),
        ({"eval_dataset": []}, OptionError, "dataset is empty"),
        ({"fine_label_column": "kind"}, OptionError, "fine_label_column='kind'"),
        ({"max_samples": 30}, SubclassError, "at least 32 training examples|subclasses need"),
    ],
)  # fmt: skip
def test_invalid_options_raise_before_any_step(options, error, message):
    given = {"data_collator": Pad(), "show_progress": False} | options
    with pytest.raises(error, match=message):
        probe_subclasses(teacher_of(), examples(), **given)


def test_a_projector_of_another_teacher_raises():
    other, options = teacher_of(), {"data_collator": Pad(), "show_progress": False}
    with torch.no_grad():
        other.classifier.weight.mul_(2)
    with pytest.raises(SubclassError, match="is of another teacher"):
        probe_subclasses(
            teacher_of(), examples(), projector=fit_subclasses(other, examples(), **options), steps=2, **options
        )


def test_a_teacher_that_is_no_classifier_raises():
    with pytest.raises(TaskError, match="classifier"):
        probe_subclasses(KINDS["bert"].teacher(), examples(), show_progress=False)


@pytest.mark.parametrize(
    "name, sizes, expected",
    [
        ("ResNetConfig", {"hidden_sizes": [32, 64], "depths": [2, 3], "embedding_size": 32},
         {"hidden_sizes": [8, 16], "depths": [1, 1], "embedding_size": 8}),
        ("DistilBertConfig", {"dim": 384, "n_heads": 12, "n_layers": 6, "hidden_dim": 1536},
         {"dim": 96, "n_heads": 3, "n_layers": 2, "hidden_dim": 384}),
        ("LlamaConfig", {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 2},
         {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 1}),
    ],
)  # fmt: skip
def test_a_smaller_config_has_a_quarter_of_the_width(name, sizes, expected):
    import transformers

    small = smaller_config(getattr(transformers, name)(**sizes))
    assert {field: getattr(small, field) for field in expected} == expected
    with pytest.raises(OptionError, match="Pass the student"):
        smaller_config(transformers.SwinConfig())
