"""Every bit of every file of ours that is flipped is noticed when the file is read, and the error names the file."""

import logging
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_guide import HfGuideError, OptionError, SubclassProjector, from_teacher
from hf_guide.distillation.layer_projections import LayerProjections
from hf_guide.signal_cache.manifest import CaptureManifest
from hf_guide.signal_cache.reader import Capture, CaptureDataCollator
from hf_guide.signal_cache.writer import capture_teacher
from hf_guide.utils import checksums as integrity
from hf_guide.utils.checksums import DamagedFileError, read_json, read_tensors, write_json, write_tensors
from tests.signal_cache.tiny_teachers import TEACHERS, Pad, examples_for
from tests.tiny import KINDS, SMALLER

FLIPS = 100
EXAMPLES = examples_for("causal-lm")


def capture(folder: Path, options: dict[str, Any] | None = None) -> Capture:
    config = {"top_k": 8, "shard_size": 5, "batch_size": 4}
    return capture_teacher(
        TEACHERS["causal-lm"].teacher(), EXAMPLES, folder, data_collator=Pad(), config=config, show_progress=False
    )


def read_capture(folder: Path) -> None:
    CaptureDataCollator(Pad(), Capture.open(folder))(EXAMPLES)


def save_projector(folder: Path, seed: int = 0, temperature: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    SubclassProjector.fit(
        embeddings=torch.randn(120, 6, generator=generator),
        labels=torch.arange(120) % 3,
        classifier_weight=torch.randn(3, 6, generator=generator),
        num_subclasses=2,
        temperature=temperature,
    ).save_pretrained(folder)


def calibrate(folder: Path) -> Any:
    torch.manual_seed(0)
    data = [{"input_ids": torch.randint(3, 96, (2, 12))} for _ in range(4)]
    return from_teacher(
        KINDS["llama"].teacher(),
        method="calibrated",
        calibration_dataset=data,
        calibration_cache_dir=folder,
        show_progress=False,
        **SMALLER,
        num_key_value_heads=1,
    )


def save_projections(folder: Path) -> None:
    folder.mkdir()
    LayerProjections({"hidden_1": (4, 6), "0_features": (4, 8)}, seed=0).save(folder)


def load_projections(folder: Path) -> None:
    LayerProjections({"hidden_1": (4, 6), "0_features": (4, 8)}, seed=1).load(folder)


@pytest.fixture(scope="module")
def processed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    capture(folder / "capture")
    save_projector(folder / "projector")
    calibrate(folder / "calibration")
    save_projections(folder / "projections")
    return folder


def flips(path: Path) -> list[int]:
    """Return bits of a file: all kinds of places, drawn at random."""
    return random.Random(path.name).sample(range(8 * path.stat().st_size), FLIPS)


def flipped(whole: bytes, bit: int) -> bytes:
    changed = bytearray(whole)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


FILES: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "capture/shard-000001.arrow": ("shard-000001.arrow", read_capture),
    "capture/index.arrow": ("index.arrow", read_capture),
    "capture/capture.json": ("capture.json", Capture.open),
    "projector/subclass_projector.json": ("projector", SubclassProjector.from_pretrained),
    "projector/subclass_projector.safetensors": ("projector", SubclassProjector.from_pretrained),
    "projections/distillation_projections.safetensors": ("distillation_projections.safetensors", load_projections),
}


@pytest.mark.parametrize("name", FILES)
def test_every_flipped_bit_is_noticed_and_the_file_named(processed: Path, tmp_path: Path, name: str) -> None:
    message, read = FILES[name]
    folder = shutil.copytree((processed / name).parent, tmp_path / "copy")
    read(folder)
    path = folder / Path(name).name
    whole, unnoticed = path.read_bytes(), []
    for bit in flips(path):
        path.write_bytes(flipped(whole, bit))
        try:
            read(folder)
        except HfGuideError as error:
            assert message in str(error)
        else:
            unnoticed.append(bit)
    assert unnoticed == []


@pytest.mark.parametrize("kind", ["statistics", "step-layers.0", "calibration"])
def test_every_flipped_bit_in_a_calibration_folder_is_noticed(processed: Path, tmp_path: Path, kind: str) -> None:
    """By what reads each file: a whole calibration for one bit of each, for the others the reader that it calls."""
    folder = shutil.copytree(processed / "calibration", tmp_path / "calibration")
    path = next(folder.glob(f"{kind}*"))
    whole, bits = path.read_bytes(), flips(path)
    for bit in bits:
        path.write_bytes(flipped(whole, bit))
        with pytest.raises(DamagedFileError, match=path.name):
            (read_json if path.suffix == ".json" else read_tensors)(path)
    path.write_bytes(flipped(whole, bits[0]))
    with pytest.raises(OptionError, match=f"{path.name} is damaged"):
        calibrate(folder)


def test_a_damaged_shard_is_written_again_alone(
    processed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = shutil.copytree(processed / "capture", tmp_path / "capture")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for name in ("shard-000001.arrow", "index.arrow"):
        (folder / name).write_bytes(flipped(before[name], 8 * (len(before[name]) // 2)))
    kept = (folder / "shard-000000.arrow").stat().st_ino
    with caplog.at_level(logging.WARNING):
        capture(folder)
    assert "shard-000001.arrow is damaged" in caplog.text and "index.arrow is damaged" in caplog.text
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert (folder / "shard-000000.arrow").stat().st_ino == kept


def test_a_shard_that_was_damaged_before_the_capture_was_complete_is_written_again(
    processed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hf_guide.signal_cache import writer as run

    whole = {path.name: path.read_bytes() for path in (processed / "capture").iterdir()}

    def interrupted(*received: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "write_index", interrupted)
    with pytest.raises(KeyboardInterrupt):
        capture(tmp_path)
    monkeypatch.undo()
    shard = tmp_path / "shard-000002.arrow"
    shard.write_bytes(flipped(shard.read_bytes(), 8 * (shard.stat().st_size // 2)))
    capture(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == whole


def test_each_shard_is_checked_once(processed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[str] = []
    original = integrity.verify_checksum

    def counting(path: Path, expected: str) -> None:
        checked.append(path.name)
        original(path, expected)

    monkeypatch.setattr("hf_guide.signal_cache.reader.verify_checksum", counting)
    collate = CaptureDataCollator(Pad(), Capture.open(processed / "capture"))
    for _ in range(2):
        collate(EXAMPLES[:7])
    assert checked == ["index.arrow", "shard-000000.arrow", "shard-000001.arrow"]


def test_a_projector_saved_over_another_is_whole_or_raises(tmp_path: Path) -> None:
    save_projector(tmp_path / "old", seed=0, temperature=1.0)
    save_projector(tmp_path / "new", seed=1, temperature=2.0)
    for name in ("subclass_projector.safetensors", "subclass_projector.json"):
        folder = shutil.copytree(tmp_path / "old", tmp_path / f"half {name}")
        shutil.copy(tmp_path / "new" / name, folder)
        with pytest.raises(HfGuideError, match="holds parts of two projectors"):
            SubclassProjector.from_pretrained(folder)
    save_projector(tmp_path / "old", seed=1, temperature=2.0)
    assert SubclassProjector.from_pretrained(tmp_path / "old").temperature == 2.0


def test_what_earlier_versions_wrote_without_checksums_loads_with_a_warning(
    processed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import json

    folder = shutil.copytree(processed / "capture", tmp_path / "capture")
    manifest = {name: value for name, value in read_json(folder / "capture.json")[0].items() if name != "checksums"}
    (folder / "capture.json").write_text(json.dumps(manifest | {"format": 1}))
    projector = shutil.copytree(processed / "projector", tmp_path / "projector")
    entries, _ = read_json(projector / "subclass_projector.json")
    entries.pop("weights_checksum")
    (projector / "subclass_projector.json").write_text(json.dumps(entries | {"format": 1}))
    weights = projector / "subclass_projector.safetensors"
    save_file(load_file(weights), weights, metadata={"format": "pt"})
    projections = shutil.copytree(processed / "projections", tmp_path / "projections")
    maps = projections / "distillation_projections.safetensors"
    save_file(load_file(maps), maps)
    with caplog.at_level(logging.WARNING):
        read_capture(folder)
        SubclassProjector.from_pretrained(projector)
    load_projections(projections)
    assert caplog.text.count("has no checksums, so that damage to it cannot be seen") == 2
    capture(folder)
    assert CaptureManifest.load(folder).checksums.keys() == {path.name for path in folder.glob("*.arrow")}


def test_checksums_cover_what_is_written(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"text": "0" * 32, "number": 1.5, "checksum": "mine"})
    assert read_json(tmp_path / "a.json") == ({"text": "0" * 32, "number": 1.5}, True)
    tensors = {"weight": torch.randn(3, 4), "half": torch.randn(5).bfloat16(), "empty": torch.zeros(0)}
    checksum = write_tensors(tmp_path / "a.safetensors", tensors, {"facts": f'"checksum":"{"0" * 32}"'})
    results, metadata, again = read_tensors(tmp_path / "a.safetensors")
    assert checksum == again and metadata == {"facts": f'"checksum":"{"0" * 32}"'}
    assert all(torch.equal(tensor, results[name]) for name, tensor in tensors.items())
    assert load_file(tmp_path / "a.safetensors").keys() == tensors.keys()


@pytest.mark.slow
def test_checking_a_capture_costs_less_than_a_hundredth_of_reading_it(tmp_path: Path) -> None:
    kind, dataset = TEACHERS["causal-lm"], examples_for("causal-lm", 4000, longest=30)
    config = {"top_k": 32, "shard_size": 1000, "batch_size": 50, "hidden_layers": [1, 2, 3]}
    capture_teacher(kind.teacher(), dataset, tmp_path, data_collator=Pad(), config=config, show_progress=False)
    opened = Capture.open(tmp_path)
    started = time.perf_counter()
    for name, checksum in opened.manifest.checksums.items():
        integrity.verify_checksum(tmp_path / name, checksum)
    checking = time.perf_counter() - started
    collate = CaptureDataCollator(Pad(), opened)
    started = time.perf_counter()
    for number in range(0, len(dataset), 20):
        collate(dataset[number : number + 20])
    reading = time.perf_counter() - started
    print(f"checking {checking:.4f} s, reading {reading:.2f} s: {checking / reading:.2%}")
    assert checking < 0.01 * reading
