"""`hf-guide analyze-subclasses`, as a process: texts and images, with and without labels, and its errors."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from hf_guide import SubclassProjector, TeacherError
from hf_guide.cli import main as cli
from hf_guide.data.arguments import DataArguments
from hf_guide.lelp import targets
from hf_guide.lelp.analysis import analyze as analyze_module
from hf_guide.lelp.analysis.features import collect_features
from hf_guide.signal_cache.writer import distributed_state

NAMES = ["no", "yes"]
COUNT = 120


def hf_guide(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hf_guide.cli", *map(str, words)]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)


def sentences() -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for number in range(COUNT):
        words = torch.randint(0, 40, (8,), generator=generator).tolist()
        rows.append({"text": " ".join(f"w{word}" for word in words), "label": NAMES[number % 2]})
        rows[-1]["kind"] = f"{NAMES[number % 2]}-{words[0] % 3}"
    return rows


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A teacher of texts and its projector, each in a folder, and a file of sentences."""
    home = tmp_path_factory.mktemp("text")
    vocabulary = {"[PAD]": 0, "[UNK]": 1} | {f"w{number}": number + 2 for number in range(40)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        initializer_range=0.3,
        id2label=dict(enumerate(NAMES)),
    )
    teacher = BertForSequenceClassification(config).eval()
    teacher.save_pretrained(home / "teacher")
    tokenizer.save_pretrained(home / "teacher")
    (home / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sentences()))
    (home / "bare.jsonl").write_text("".join(json.dumps({"text": row["text"]}) + "\n" for row in sentences()))
    examples = [
        dict(tokenizer(row["text"], return_token_type_ids=False)) | {"labels": NAMES.index(row["label"])}
        for row in sentences()
    ]
    features = collect_features(
        teacher, examples, lambda some: tokenizer.pad(some, return_tensors="pt"), show_progress=False
    )
    projector = SubclassProjector.fit(
        features.embeddings, features.labels, features.classifier_weight, 3, id2label=NAMES
    )
    projector.save_pretrained(home / "projector")
    return home, projector, features


@pytest.mark.extended
def test_texts_are_shown_by_subclass_with_fine_labels_and_a_verdict(text, tmp_path):
    home, projector, features = text
    done = hf_guide(
        "analyze-subclasses", home / "projector", home / "data.jsonl", "--teacher", home / "teacher", "--no-progress",
        "--fine-label-column", "kind", "-o", tmp_path / "page.html", "--figures", tmp_path / "figures",
        "--steps", 2, "--seeds", 2, "--student", home / "teacher",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Probe: 8 students, BertForSequenceClassification of" in done.stdout, "the cost comes before the work"
    assert "points from KD after 2 steps (2 seeds)" in done.stdout and "the headroom" in done.stdout
    assert "bits of the fine labels" in done.stdout
    facts = json.loads((tmp_path / "figures" / "subclasses.json").read_text())
    targets = projector.transform(features.embeddings, features.logits)
    for number, name in enumerate(NAMES):
        mine = features.labels == number
        shares = targets[mine, number] / targets[mine, number].sum(1, keepdim=True)
        assert facts["classes"][name]["sizes"] == pytest.approx(shares.mean(0).tolist(), abs=1e-4)
        assert (tmp_path / "figures" / f"class_{number}.png").is_file()
        first = facts["classes"][name]["top_examples"][0][0]
        assert sentences()[first]["text"] in (tmp_path / "page.html").read_text()
    assert 0 <= facts["fine_labels"]["bits"] <= facts["fine_labels"]["entropy"]
    assert facts["probe"]["num_train"] == COUNT * 2 / 3 and facts["probe"]["verdict"] in done.stdout


def facts_without_probes(home, data, folder):
    """Return the facts that the command writes next to its figures, for a file of texts."""
    words = [
        "analyze-subclasses", home / "projector", data, "--teacher", home / "teacher", "--no-progress",
        "--no-probe", "-o", folder / "page.html", "--figures", folder / "figures",
    ]  # fmt: skip
    assert cli.main([str(word) for word in words]) == 0
    return json.loads((folder / "figures" / "subclasses.json").read_text())


def test_texts_without_labels_count_for_the_predicted_class(text, tmp_path):
    home, _, features = text
    facts = facts_without_probes(home, home / "bare.jsonl", tmp_path)
    actual = features.logits.argmax(1).bincount(minlength=2).tolist()
    assert [facts["classes"].get(name, {"examples": 0})["examples"] for name in NAMES] == actual
    assert "probe" not in facts


@pytest.mark.sampled(2)
@pytest.mark.parametrize("missing,named", [(None, False), (-1, False), (-100, False), (None, True)])
def test_an_example_without_label_counts_for_the_predicted_class(text, tmp_path, missing, named):
    home, _, features = text
    rows = sentences()
    labels = [row["label"] if named else NAMES.index(row["label"]) for row in rows]
    labels = [label if number % 3 else missing for number, label in enumerate(labels)]
    lines = "".join(
        json.dumps({"text": row["text"], "label": label}) + "\n" for row, label in zip(rows, labels, strict=True)
    )
    (tmp_path / "some.jsonl").write_text(lines)
    facts = facts_without_probes(home, tmp_path / "some.jsonl", tmp_path)
    expected = torch.where(torch.arange(COUNT) % 3 > 0, features.labels, features.logits.argmax(1)).bincount(
        minlength=2
    )
    assert [facts["classes"].get(name, {"examples": 0})["examples"] for name in NAMES] == expected.tolist()


def test_the_page_is_written_without_a_probe_and_states_the_reason(text, tmp_path, capsys):
    home, _, _ = text
    words = [
        "analyze-subclasses", home / "projector", home / "data.jsonl", "--teacher", home / "teacher", "--no-progress",
        "--max-samples", 45, "-o", tmp_path / "page.html",
    ]  # fmt: skip
    assert cli.main([str(word) for word in words]) == 0
    printed = capsys.readouterr().out
    reason = "A probe needs at least 32 training examples; found 30."
    assert f"Whether subclasses help was not measured: {reason}" in printed and "(Pass --no-probe" in printed
    assert f"Not measured: {reason}" in (tmp_path / "page.html").read_text()


def test_a_projector_that_splits_by_fine_labels_needs_their_column(text, tmp_path, capsys):
    home, _, features = text
    fine_labels = torch.arange(COUNT) % 3
    SubclassProjector.fit(
        features.embeddings, features.labels, features.classifier_weight, 3, splitter="labels", fine_labels=fine_labels
    ).save_pretrained(tmp_path / "projector")
    words = ["analyze-subclasses", tmp_path / "projector", home / "data.jsonl", "--teacher", home / "teacher"]
    assert cli.main([*map(str, words), "-o", str(tmp_path / "page.html")]) == 2
    assert "name their column with --fine-label-column" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["projekt/", "/no/such/projekt", "./projekt"])
def test_a_missing_projector_is_one_clear_message(text, name, tmp_path, capsys):
    words = ["analyze-subclasses", name, str(text[0] / "data.jsonl"), "-o", str(tmp_path / "page.html")]
    assert cli.main(words) == 1
    assert f"There is no folder {name!r}" in capsys.readouterr().err


def test_the_teacher_is_loaded_onto_the_accelerator(text, tmp_path, monkeypatch):
    """As in `fit_subclasses`: onto accelerate's device."""
    home, projector, _ = text
    asked = []

    def load(name, *, device=None, **options):
        asked.append(device)
        raise TeacherError("seen")

    device = distributed_state().device
    for module in (analyze_module, targets):
        monkeypatch.setattr(module, "load_teacher", load)
    with pytest.raises(TeacherError, match="seen"):
        analyze_module.analyze(projector, DataArguments("d"), tmp_path / "page.html", teacher=str(home / "teacher"))
    with pytest.raises(TeacherError, match="seen"):
        targets.capture_targets(projector, home / "teacher", [{"text": "w1"}], tmp_path / "targets")
    assert asked == [device, device]


@pytest.mark.extended
def test_images_are_shown(tmp_path):
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        initializer_range=0.3,
        id2label=dict(enumerate(NAMES)),
    )
    teacher = ViTForImageClassification(config).eval()
    teacher.save_pretrained(tmp_path / "teacher")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "teacher")
    pixels = numpy.random.default_rng(0).integers(0, 256, (COUNT, 16, 16, 3), dtype=numpy.uint8)
    features = Features({"image": Image(), "label": ClassLabel(names=NAMES), "kind": Value("int64")})
    rows = {"image": list(pixels), "label": [number % 2 for number in range(COUNT)], "kind": list(range(COUNT))}
    Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "data")
    examples = [{"pixel_values": torch.from_numpy(each / 127.5 - 1).permute(2, 0, 1).float()} for each in pixels]
    features = collect_features(
        teacher,
        examples,
        lambda some: {"pixel_values": torch.stack([each["pixel_values"] for each in some])},
        show_progress=False,
    )
    labels = torch.arange(COUNT) % 2
    projector = SubclassProjector.fit(features.embeddings, labels, features.classifier_weight, 2, id2label=NAMES)
    projector.save_pretrained(tmp_path / "projector")
    done = hf_guide(
        "analyze-subclasses", tmp_path / "projector", tmp_path / "data", "--teacher", tmp_path / "teacher", "--no-progress",
        "--no-probe", "--num-examples", 4, "-o", tmp_path / "page.html",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "page.html").read_text().count('class="example"') == 2 * 2 * 4


@pytest.mark.parametrize(
    "words, facts",
    [
        (["--fine-label-column", "kinds"], "has no column 'kinds'"),
        (["--teacher", "{home}/other"], "cannot be loaded"),
        (["--num-examples", "0"], "--num-examples must be a whole number of at least 1"),
        (["--max-samples", "0"], "--max-samples must be a whole number of at least 1"),
        (["--steps", "0"], "--steps must be a whole number of at least 1"),
        (["-o", "{home}/nowhere/page.html"], "There is no folder"),
        (["-o", "{home}"], "must be a file; it is a folder"),
        (["--figures", "{home}/data.jsonl"], "--figures must be a folder"),
        (["--dataset-split", "tests"], "has no split 'tests'"),
    ],
)
def test_invalid_input_raises_and_names_it(text, words, facts, tmp_path, capsys):
    home, _, _ = text
    words = [word.format(home=home) for word in words]
    usual = [
        "analyze-subclasses",
        str(home / "projector"),
        str(home / "data.jsonl"),
        "--teacher",
        str(home / "teacher"),
    ]
    output = [] if "-o" in words else ["-o", str(tmp_path / "page.html")]
    assert cli.main([*usual, "--no-progress", "--no-probe", *output, *words]) in (1, 2)
    assert facts in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()


def test_a_projector_of_arrays_asks_for_its_teacher(text, tmp_path, capsys):
    home, _, _ = text
    output = str(tmp_path / "page.html")
    assert cli.main(["analyze-subclasses", str(home / "projector"), str(home / "data.jsonl"), "-o", output]) == 1
    assert "name it with --teacher" in capsys.readouterr().err


def test_a_missing_file_is_no_dataset_of_the_hub(text, tmp_path, capsys):
    home, _, _ = text
    output = str(tmp_path / "page.html")
    assert cli.main(["analyze-subclasses", str(home / "projector"), str(home / "dat.jsonl"), "-o", output]) in (1, 2)
    assert "There is no file" in capsys.readouterr().err


def test_a_teacher_that_went_away_is_asked_for(text, tmp_path, capsys):
    """As where it was fitted to a model that has no name but its class's."""
    home, projector, _ = text
    replace(projector, teacher="BertForSequenceClassification").save_pretrained(tmp_path / "projector")
    words = [
        "analyze-subclasses",
        str(tmp_path / "projector"),
        str(home / "data.jsonl"),
        "-o",
        str(tmp_path / "page.html"),
    ]
    assert cli.main(words) == 1
    assert "name it with --teacher" in capsys.readouterr().err
