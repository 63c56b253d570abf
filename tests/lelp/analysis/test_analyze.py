"""`hf-guide subclasses`, as a process: texts and images, with and without labels, and what it refuses."""

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
from hf_guide.lelp.analysis import analyze as looking
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
    heard = collect_features(
        teacher, examples, lambda some: tokenizer.pad(some, return_tensors="pt"), show_progress=False
    )
    made = SubclassProjector.fit(heard.embeddings, heard.labels, heard.classifier_weight, 3, id2label=NAMES)
    made.save_pretrained(home / "projector")
    return home, made, heard


def test_texts_are_shown_by_subclass_with_finer_labels_and_a_forecast(text, tmp_path):
    home, projector, heard = text
    done = hf_guide(
        "subclasses", home / "projector", home / "data.jsonl", "--teacher", home / "teacher", "--no-progress",
        "--finer-column", "kind", "-o", tmp_path / "page.html", "--figures", tmp_path / "figures",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "tiny students" in done.stdout and "bits of the finer labels" in done.stdout
    told = json.loads((tmp_path / "figures" / "subclasses.json").read_text())
    targets = projector.transform(heard.embeddings, heard.logits)
    for number, name in enumerate(NAMES):
        mine = heard.labels == number
        shares = targets[mine, number] / targets[mine, number].sum(1, keepdim=True)
        assert told["classes"][name]["sizes"] == pytest.approx(shares.mean(0).tolist(), abs=1e-4)
        assert (tmp_path / "figures" / f"class_{number}.png").is_file()
        first = told["classes"][name]["nearest"][0][0]
        assert sentences()[first]["text"] in (tmp_path / "page.html").read_text()
    assert 0 <= told["finer_labels"]["told"] <= told["finer_labels"]["entropy"]
    assert told["forecast"]["examples"] == COUNT


def told_without_forecast(home, data, folder):
    """Return what the command writes of a file of texts beside its figures."""
    words = [
        "subclasses", home / "projector", data, "--teacher", home / "teacher", "--no-progress",
        "--no-forecast", "-o", folder / "page.html", "--figures", folder / "figures",
    ]  # fmt: skip
    assert cli.main([str(word) for word in words]) == 0
    return json.loads((folder / "figures" / "subclasses.json").read_text())


def test_texts_without_labels_go_by_the_teachers_class(text, tmp_path):
    home, _, heard = text
    told = told_without_forecast(home, home / "bare.jsonl", tmp_path)
    found = heard.logits.argmax(1).bincount(minlength=2).tolist()
    assert [told["classes"].get(name, {"examples": 0})["examples"] for name in NAMES] == found
    assert "forecast" not in told


@pytest.mark.parametrize("missing,named", [(None, False), (-1, False), (-100, False), (None, True)])
def test_an_example_without_label_goes_by_the_teachers_class(text, tmp_path, missing, named):
    home, _, heard = text
    rows = sentences()
    labels = [row["label"] if named else NAMES.index(row["label"]) for row in rows]
    labels = [label if number % 3 else missing for number, label in enumerate(labels)]
    given = "".join(
        json.dumps({"text": row["text"], "label": label}) + "\n" for row, label in zip(rows, labels, strict=True)
    )
    (tmp_path / "some.jsonl").write_text(given)
    told = told_without_forecast(home, tmp_path / "some.jsonl", tmp_path)
    expected = torch.where(torch.arange(COUNT) % 3 > 0, heard.labels, heard.logits.argmax(1)).bincount(minlength=2)
    assert [told["classes"].get(name, {"examples": 0})["examples"] for name in NAMES] == expected.tolist()


def test_the_page_is_there_without_its_forecast_and_says_why(text, tmp_path, capsys):
    home, _, _ = text
    words = [
        "subclasses", home / "projector", home / "data.jsonl", "--teacher", home / "teacher", "--no-progress",
        "--max-examples", 39, "-o", tmp_path / "page.html",
    ]  # fmt: skip
    assert cli.main([str(word) for word in words]) == 0
    printed = capsys.readouterr().out
    assert "There is no forecast: A forecast needs 40 examples or more; found 39. (--no-forecast" in printed
    assert "There is none: A forecast needs 40 examples" in (tmp_path / "page.html").read_text()


def test_a_projector_of_finer_labels_asks_for_their_column(text, tmp_path, capsys):
    home, _, heard = text
    finer = torch.arange(COUNT) % 3
    SubclassProjector.fit(
        heard.embeddings, heard.labels, heard.classifier_weight, 3, splitter="labels", fine_labels=finer
    ).save_pretrained(tmp_path / "projector")
    words = ["subclasses", tmp_path / "projector", home / "data.jsonl", "--teacher", home / "teacher"]
    assert cli.main([*map(str, words), "-o", str(tmp_path / "page.html")]) == 2
    assert "name their column with --finer-column" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["projekt/", "/no/such/projekt", "./projekt"])
def test_a_projector_that_is_not_there_is_one_clear_message(text, name, tmp_path, capsys):
    words = ["subclasses", name, str(text[0] / "data.jsonl"), "-o", str(tmp_path / "page.html")]
    assert cli.main(words) == 1
    assert f"There is no folder {name!r}" in capsys.readouterr().err


def test_the_teacher_is_loaded_onto_the_accelerator(text, tmp_path, monkeypatch):
    """As `fit_subclasses` does: where accelerate says."""
    home, projector, _ = text
    asked = []

    def load(name, *, device=None, **options):
        asked.append(device)
        raise TeacherError("seen")

    device = distributed_state().device
    for module in (looking, targets):
        monkeypatch.setattr(module, "load_teacher", load)
    with pytest.raises(TeacherError, match="seen"):
        looking.analyze(projector, DataArguments("d"), tmp_path / "page.html", teacher=str(home / "teacher"))
    with pytest.raises(TeacherError, match="seen"):
        targets.capture_targets(projector, home / "teacher", [{"text": "w1"}], tmp_path / "targets")
    assert asked == [device, device]


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
    heard = collect_features(
        teacher,
        examples,
        lambda some: {"pixel_values": torch.stack([each["pixel_values"] for each in some])},
        show_progress=False,
    )
    labels = torch.arange(COUNT) % 2
    made = SubclassProjector.fit(heard.embeddings, labels, heard.classifier_weight, 2, id2label=NAMES)
    made.save_pretrained(tmp_path / "projector")
    done = hf_guide(
        "subclasses", tmp_path / "projector", tmp_path / "data", "--teacher", tmp_path / "teacher", "--no-progress",
        "--nearest", 4, "-o", tmp_path / "page.html",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "page.html").read_text().count('class="example"') == 2 * 2 * 4


@pytest.mark.parametrize(
    "words, told",
    [
        (["--finer-column", "kinds"], "has no column 'kinds'"),
        (["--teacher", "{home}/other"], "cannot be loaded"),
        (["--nearest", "0"], "--nearest is a whole number of at least 1"),
        (["-o", "{home}/nowhere/page.html"], "There is no folder"),
        (["--split", "tests"], "has no split 'tests'"),
    ],
)
def test_what_cannot_be_looked_at_is_refused_by_name(text, words, told, tmp_path, capsys):
    home, _, _ = text
    words = [word.format(home=home) for word in words]
    usual = ["subclasses", str(home / "projector"), str(home / "data.jsonl"), "--teacher", str(home / "teacher")]
    output = [] if "-o" in words else ["-o", str(tmp_path / "page.html")]
    assert cli.main([*usual, "--no-progress", "--no-forecast", *output, *words]) in (1, 2)
    assert told in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()


def test_a_projector_of_arrays_asks_for_its_teacher(text, tmp_path, capsys):
    home, _, _ = text
    output = str(tmp_path / "page.html")
    assert cli.main(["subclasses", str(home / "projector"), str(home / "data.jsonl"), "-o", output]) == 1
    assert "name it with --teacher" in capsys.readouterr().err


def test_a_missing_file_is_no_dataset_of_the_hub(text, tmp_path, capsys):
    home, _, _ = text
    output = str(tmp_path / "page.html")
    assert cli.main(["subclasses", str(home / "projector"), str(home / "dat.jsonl"), "-o", output]) in (1, 2)
    assert "There is no file" in capsys.readouterr().err


def test_a_teacher_that_went_away_is_asked_for(text, tmp_path, capsys):
    """As where it was fitted to a model that has no name but its class's."""
    home, made, _ = text
    replace(made, teacher="BertForSequenceClassification").save_pretrained(tmp_path / "projector")
    words = ["subclasses", str(tmp_path / "projector"), str(home / "data.jsonl"), "-o", str(tmp_path / "page.html")]
    assert cli.main(words) == 1
    assert "name it with --teacher" in capsys.readouterr().err
