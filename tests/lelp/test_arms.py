"""The benchmark of arms: it goes on where it was killed, parts share no example, and each arm tells what it says it does."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "examples" / "benchmarks"
SMALL = [
    "--seen",
    "300",
    "--unseen",
    "200",
    "--held-out",
    "60",
    "--teacher-steps",
    "4",
    "--steps",
    "2",
    "--seeds",
    "2",
]


@pytest.fixture(scope="module")
def rooms():
    """The benchmark's modules, which stand beside each other as scripts do."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import lelp_data
        import lelp_models
        import lelp_training
    finally:
        sys.path.remove(str(BENCHMARKS))
    return lelp_data, lelp_models, lelp_training


def arms(output: Path, *words: str) -> str:
    command = [
        sys.executable,
        str(BENCHMARKS / "lelp_arms.py"),
        "--sets",
        "digits",
        "--grid",
        "one",
        "-o",
        str(output),
    ]
    done = subprocess.run([*command, *SMALL, *words], check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_run_that_was_cut_off_goes_on_and_none_is_done_twice(tmp_path):
    first = arms(tmp_path, "--arms", "kd", "lelp")
    whole = (tmp_path / "runs.jsonl").read_text()
    lines = whole.splitlines(keepends=True)
    assert len(lines) == 4 and "lelp " in first and "against KD" in first
    (tmp_path / "runs.jsonl").write_text("".join(lines[:-1]) + lines[-1][:20])
    again = arms(tmp_path, "--arms", "kd", "lelp")
    assert again.count("digits lelp") == 1 and "digits kd" not in again
    repeated = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    for one, other in zip(map(json.loads, lines), repeated, strict=True):
        for each in (one, other):
            each["result"].pop("seconds")
        assert one == other


def lesson_of(rooms, classes=2):
    data, models, training = rooms
    generator = torch.Generator().manual_seed(0)
    finer = torch.arange(240) % 6
    labelled = data.Labelled(torch.zeros(240, 1, 8, 8), finer % classes, classes, finer)
    embeddings = torch.nn.functional.one_hot(finer, 12).float() * 8 + torch.randn(240, 12, generator=generator)
    logits = torch.randn(240, classes, generator=generator)
    signals = models.Signals(logits, embeddings, embeddings + 0.1, embeddings[:, :8])
    return training.Lesson(labelled, signals, (signals, labelled), torch.randn(classes, 12, generator=generator))


@pytest.mark.parametrize("tau", [1.0, 4.0])
def test_all_targets_keep_the_teachers_classes(rooms, tau):
    training = rooms[2]
    lesson = lesson_of(rooms)
    wanted = (lesson.signals.logits / tau).softmax(-1)
    for arm in training.ARMS:
        if training.is_split(arm):
            targets = training.targets_of(arm, lesson, {"tau": tau, "S": 3, "beta": 0.5})
            assert torch.allclose(targets.sum(2), wanted, atol=1e-5), arm
            assert targets[0].numel() == training.outputs_of(arm, lesson, {"tau": tau, "S": 3, "beta": 0.5})


def test_an_oracle_gives_a_class_whole_to_the_finer_label(rooms):
    lesson = lesson_of(rooms)
    shares = rooms[2].oracle_targets(lesson, 1.0)
    own = shares[torch.arange(240), lesson.data.labels]
    assert torch.equal(own.argmax(1), lesson.data.finer // 2)
    assert torch.allclose(own.max(1).values, own.sum(1))


def test_what_is_read_of_finer_labels_is_right_where_embeddings_show_them(rooms):
    lesson = lesson_of(rooms)
    own = rooms[2].read_targets(lesson, 1.0)[torch.arange(240), lesson.data.labels]
    assert (own.argmax(1) == lesson.data.finer // 2).float().mean() > 0.95


def test_a_metric_changes_what_is_large_and_nothing_that_the_classifier_says(rooms):
    training = rooms[2]
    lesson = lesson_of(rooms)
    plain = lesson.signals.embeddings.double() @ lesson.weight.double().T
    for arm in ("lelp-stable", "lelp-predictable"):
        (embeddings, weight), _ = training.embeddings_for(arm, lesson)
        assert torch.allclose(embeddings @ weight.T, plain, atol=1e-6)


def test_whitened_noise_is_white(rooms):
    noise = torch.randn(500, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * torch.arange(1, 6)
    white = noise @ rooms[2].whitener(noise, ridge=1e-12)
    assert torch.allclose(torch.cov(white.T, correction=0), torch.eye(5, dtype=torch.float64), atol=1e-6)


def test_parts_share_no_example_and_are_the_same_every_time(rooms):
    data = rooms[0]
    whole = data.digits()
    parts = data.split(whole, [900, 300, 200, 200])
    again = data.split(whole, [900, 300, 200, 200])
    assert all(torch.equal(one.inputs, other.inputs) for one, other in zip(parts, again, strict=True))
    numbered = data.Labelled(torch.arange(1600), torch.zeros(1600), 2)
    rows = torch.cat([part.inputs for part in data.split(numbered, [900, 300, 200, 200])])
    assert len(rows.unique()) == 1600
    with pytest.raises(ValueError, match="1797 examples"):
        data.split(whole, [1700, 100])


def test_settings_given_stand_in_place_of_the_grid(tmp_path):
    """And such as the data are too few for are left out, which the table says."""
    given = '{"tau": 2.0, "S": 3, "beta": 0.3}'
    arms(tmp_path, "--arms", "kd", "kmeans-early", "--seeds", "1", "--settings", given)
    told = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert [each["run"]["settings"] for each in told] == [{"tau": 1.0}, json.loads(given)]
    again = arms(tmp_path, "--arms", "lelp", "--share", "0.02", "--settings", '{"tau": 1.0, "S": 8, "beta": 0.3}')
    last = json.loads((tmp_path / "runs.jsonl").read_text().splitlines()[-1])
    assert "examples" in last["result"]["skipped"] and "left out: lelp" in again
