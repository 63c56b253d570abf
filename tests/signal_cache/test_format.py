"""The format stands in FORMAT.md: what is written by its text alone is read back, and what earlier versions wrote as well."""

import json
import struct
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from hf_guide import Capture, CaptureConfig
from hf_guide.errors import CaptureError, OptionError
from hf_guide.signal_cache import FORMAT_PATH
from hf_guide.signal_cache.manifest import FORMAT_VERSION, CaptureManifest
from hf_guide.signal_cache.reader import CaptureDataCollator
from hf_guide.signal_cache.writer import capture_teacher
from hf_guide.utils.checksums import read_json, write_json
from tests.signal_cache.tiny_teachers import TEACHERS, Pad, examples_for

CLASSES, TOP_K, WIDTH, SHARD_SIZE = 70_000, 2, 3, 2
EXAMPLES: list[dict[str, Any]] = [
    {"input_ids": [5, 6], "indices": [[69_999, 1], [65_536, 0]], "probs": [[0.5, 0.25], [0.4, 0.4]]},
    {"input_ids": [7], "indices": [[3, 66_000]], "probs": [[0.6, 0.3]]},
    {"input_ids": [8, 9, 10], "indices": [[2, 1], [1, 2], [9, 68_000]], "probs": [[0.7, 0.2]] * 3},
]


def log(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float64).log())


def key_of(example: dict[str, Any]) -> bytes:
    ids = example["input_ids"]
    key = blake2b(digest_size=16)
    key.update(f"input_ids({len(ids)},)".encode())
    key.update(struct.pack(f"<{len(ids)}q", *ids))
    return key.digest()


def high_bits(indices: list[int]) -> list[int]:
    bits = [(index >> (16 + bit)) & 1 for index in indices for bit in range((CLASSES - 1).bit_length() - 16)]
    bits += [0] * (-len(bits) % 8)
    return [
        sum(bit << (7 - place) for place, bit in enumerate(bits[start : start + 8]))
        for start in range(0, len(bits), 8)
    ]


def row_of(example: dict[str, Any]) -> dict[str, Any]:
    flat = [index for indices in example["indices"] for index in indices]
    return {
        "key": key_of(example),
        "indices_low": [index & 0xFFFF for index in flat],
        "indices_high": high_bits(flat),
        "log_probs": [log(p) for probs in example["probs"] for p in probs],
        "log_tail": [log(1 - sum(probs)) for probs in example["probs"]],
        "features": [float(number) for number in range(WIDTH * len(example["input_ids"]))],
    }


def write_by_the_text(folder: Path) -> None:
    """Write a cache by FORMAT.md, with pyarrow and json only."""
    types = {
        "indices_low": pa.uint16(),
        "indices_high": pa.uint8(),
        "log_probs": pa.float32(),
        "log_tail": pa.float32(),
    }
    types["features"] = pa.float32()
    lists = [pa.field(n, pa.large_list(pa.field("item", t, nullable=False)), nullable=False) for n, t in types.items()]
    schema = pa.schema([pa.field("key", pa.binary(16), nullable=False), *lists])
    sizes = []
    for start in range(0, len(EXAMPLES), SHARD_SIZE):
        rows = [row_of(example) for example in EXAMPLES[start : start + SHARD_SIZE]]
        path = folder / f"shard-{start // SHARD_SIZE:06d}.arrow"
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))
        sizes.append(path.stat().st_size)
    index = sorted((struct.unpack("<Q", key_of(example)[:8])[0], row) for row, example in enumerate(EXAMPLES))
    columns = {
        name: pa.array(list(values), pa.uint64())
        for name, values in zip(("prefix", "row"), zip(*index, strict=True), strict=True)
    }
    batch = pa.record_batch(columns)
    with pa.OSFile(str(folder / "index.arrow"), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    manifest = {
        "format": 3,
        "teacher": "someone/teacher",
        "teacher_revision": None,
        "teacher_class": "LlamaForCausalLM",
        "teacher_config": {"model_type": "llama", "vocab_size": CLASSES},
        "teacher_dtype": "bfloat16",
        "weights": None,
        "files": None,
        "tokenizer": None,
        "task": "causal-lm",
        "classes": CLASSES,
        "examples": len(EXAMPLES),
        "shapes": {"features": [-1, WIDTH]},
        "config": {
            "top_k": TOP_K,
            "temperatures": [1.0],
            "log_prob_dtype": "float32",
            "hidden_layers": [],
            "save_penultimate": True,
            "hidden_dtype": "float32",
            "vocabulary_size": None,
            "ignored_inputs": [],
            "remove_unused_columns": True,
            "batch_size": 1,
            "shard_size": SHARD_SIZE,
        },
        "hf_guide_version": "another program 1.0",
        "shards": sizes,
        "checksums": {},
        "complete": True,
    }
    (folder / "capture.json").write_text(json.dumps(manifest))


def test_a_cache_written_by_the_text_alone_is_read_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_by_the_text(tmp_path)
    capture = Capture.open(tmp_path)
    assert "has no checksums" in caplog.text
    assert len(capture) == 3 and capture.manifest.teacher_config_object().vocab_size == CLASSES
    shuffled = [EXAMPLES[number] for number in (2, 0, 1)]
    batch = CaptureDataCollator(Pad(), capture)([{"input_ids": example["input_ids"]} for example in shuffled])
    for row, example in enumerate(shuffled):
        tokens = len(example["input_ids"])
        assert batch["teacher_topk_indices"][row, :tokens].tolist() == example["indices"]
        probs = torch.tensor(example["probs"])
        torch.testing.assert_close(batch["teacher_topk_log_probs"][row, :tokens].exp(), probs)
        features = torch.arange(WIDTH * tokens, dtype=torch.float32).view(tokens, WIDTH)
        assert torch.equal(batch["teacher_features"][row, :tokens], features)
        assert not batch["teacher_topk_log_probs"][row, tokens:].any()


def test_the_text_names_every_entry_of_the_manifest_and_its_version() -> None:
    text = FORMAT_PATH.read_text(encoding="utf-8")
    assert f"version {FORMAT_VERSION}\n" in text
    for entry in (*CaptureManifest.__dataclass_fields__, *CaptureConfig.__dataclass_fields__):
        assert f"| `{entry}` |" in text, entry


@pytest.mark.parametrize("version", [1, 2])
def test_what_earlier_versions_wrote_is_read_and_continued(version: int, tmp_path: Path) -> None:
    """The shards differ in the name of a column, and the manifest in the names of options."""
    kind, dataset = TEACHERS["sequence-classification"], examples_for("sequence-classification", 9)
    options = {"data_collator": Pad(), "show_progress": False, "config": {"save_penultimate": True, "shard_size": 4}}
    capture_teacher(kind.teacher(), dataset, tmp_path, **options)
    expected = CaptureDataCollator(Pad(), Capture.open(tmp_path))(dataset)
    entries, _ = read_json(tmp_path / "capture.json")
    entries.pop("checksum", None)
    old = {"save_penultimate": "embedding", "hidden_layers": "hidden_states"}
    old |= {"ignored_inputs": "ignore_in_key", "shard_size": "examples_per_shard"}
    entries["config"] = {old.get(name, name): value for name, value in entries["config"].items()}
    entries["shapes"] = {"embedding": entries["shapes"]["features"]}
    entries |= {"format": version, "checksums": {}}
    for number, path in enumerate(sorted(tmp_path.glob("shard-*.arrow"))):
        table = pa.ipc.open_file(path).read_all()
        table = table.rename_columns(["embedding" if name == "features" else name for name in table.column_names])
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        entries["shards"][number] = path.stat().st_size
    if version == 1:
        del entries["checksums"]
        (tmp_path / "capture.json").write_text(json.dumps(entries))
    else:
        write_json(tmp_path / "capture.json", entries)
    found = CaptureDataCollator(Pad(), Capture.open(tmp_path))(dataset)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    (tmp_path / "shard-000001.arrow").unlink()
    capture_teacher(kind.teacher(), dataset, tmp_path, **options)  # the missing shard alone, under the new name
    assert Capture.open(tmp_path).manifest.checksums
    found = CaptureDataCollator(Pad(), Capture.open(tmp_path))(dataset)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_an_unchecked_manifest_that_lists_checksums_is_damaged(tmp_path: Path) -> None:
    write_by_the_text(tmp_path)
    entries = json.loads((tmp_path / "capture.json").read_text())
    for change in ({"checksums": {"index.arrow": "0" * 32}}, {"complete": False}):
        (tmp_path / "capture.json").write_text(json.dumps(entries | change))
        with pytest.raises(CaptureError, match="is damaged: it has no checksum of its own"):
            Capture.open(tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "value"),
    [
        ("embedding", "save_penultimate", True),
        ("hidden_states", "hidden_layers", [1]),
        ("ignore_in_key", "ignored_inputs", ["position_ids"]),
        ("examples_per_shard", "shard_size", 7),
    ],
)
def test_an_old_name_of_an_option_warns_with_the_new_one(old: str, new: str, value: Any) -> None:
    with pytest.warns(FutureWarning, match=f"{old!r} is deprecated; use {new!r}"):
        config = CaptureConfig(**{old: value})
    assert getattr(config, new) == value
    with pytest.warns(FutureWarning, match=f"use {new!r}"):
        assert getattr(config, old) == value
    with pytest.raises(OptionError, match=new):
        CaptureConfig(**{old: value, new: value})
