"""Ways in which a model's folder can be broken, each a function that breaks one."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.trust.artefacts import change_json

Damage = Callable[[Path], None]

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def text(name: str, content: str | bytes) -> Damage:
    """Return what replaces a file's content."""

    def damage(folder: Path) -> None:
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return damage


def cut(name: str) -> Damage:
    """Return what leaves half of a file."""

    def damage(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])

    return damage


def entries(name: str = "config.json", **changes: Any) -> Damage:
    """Return what changes entries of a JSON file; None removes one."""

    def damage(folder: Path) -> None:
        change_json(folder / name, **changes)
        values = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({key: value for key, value in values.items() if value is not None}))

    return damage


def remove(*names: str) -> Damage:
    def damage(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return damage


def as_folder(name: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return damage


def tensors(change: Callable[[dict[str, torch.Tensor]], None]) -> Damage:
    def damage(folder: Path) -> None:
        found = load_file(folder / WEIGHTS)
        change(found)
        save_file(found, folder / WEIGHTS, {"format": "pt"})

    return damage


def pickled(content: Any) -> Damage:
    """Return what puts a `pytorch_model.bin` of an object, or of bytes, in the place of the safetensors."""

    def damage(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        path = folder / "pytorch_model.bin"
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)

    return damage


class RunsCode:
    """Unpickled, it makes a folder."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("unpickled",)


def with_index(index: Any) -> Damage:
    def damage(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        (folder / INDEX).write_text(index if isinstance(index, str) else json.dumps(index))

    return damage


def gone(folder: Path) -> None:
    shutil.rmtree(folder)


def emptied(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def a_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("not a folder")


def first_tensor(found: dict[str, torch.Tensor]) -> str:
    return next(name for name in sorted(found) if found[name].ndim == 2)


def without_first(found: dict[str, torch.Tensor]) -> None:
    del found[first_tensor(found)]


def transposed(found: dict[str, torch.Tensor]) -> None:
    name = first_tensor(found)
    found[name] = found[name][:-1].contiguous()


FOLDER: dict[str, Damage] = {"missing": gone, "empty": emptied, "a file": a_file}
CONFIG: dict[str, Damage] = {
    "config cut": cut("config.json"),
    "config missing": remove("config.json"),
    "config a folder": as_folder("config.json"),
    "config a list": text("config.json", "[]"),
    "config a number": text("config.json", "3"),
    "config null": text("config.json", "null"),
    "config a text": text("config.json", '"llama"'),
    "config empty": text("config.json", ""),
    "config not UTF-8": text("config.json", b"\xff\xfe{}"),
    "no model_type": entries(model_type=None),
    "unknown model_type": entries(model_type="no-such-family"),
    "model_type a list": entries(model_type=["llama"]),
    "unknown architecture": entries(architectures=["NoSuchModel"]),
    "architecture no model": entries(architectures=["AutoConfig"]),
    "architectures a text": entries(architectures="LlamaForCausalLM"),
    "architectures of numbers": entries(architectures=[3]),
    "auto_map a list": entries(auto_map=["x.Y"]),
    "auto_map of numbers": entries(auto_map={"AutoModelForCausalLM": 3}),
    "remote config": entries(model_type="elsewhere", auto_map={"AutoConfig": "code.ElsewhereConfig"}),
    "hidden_size a text": entries(hidden_size="x"),
    "hidden_size negative": entries(hidden_size=-32),
    "hidden_size zero": entries(hidden_size=0),
    "hidden_size a list": entries(hidden_size=[32]),
    "no heads": entries(num_attention_heads=0),
    "no blocks": entries(num_hidden_layers=0),
    "blocks a text": entries(num_hidden_layers="many"),
    "vocab_size negative": entries(vocab_size=-1),
    "unknown activation": entries(hidden_act="no-such-activation"),
    "dtype unknown": entries(dtype="float31"),
    "quantized by nobody": entries(quantization_config={"quant_method": "no-such-method"}),
    "quantization a list": entries(quantization_config=["x"]),
    "id2label a list": entries(id2label=["a", "b"]),
}
WEIGHT_FILES: dict[str, Damage] = {
    "weights missing": remove(WEIGHTS),
    "weights cut": cut(WEIGHTS),
    "weights empty": text(WEIGHTS, b""),
    "weights a folder": as_folder(WEIGHTS),
    "weights header of no JSON": text(WEIGHTS, (8).to_bytes(8, "little") + b"notjson!" + bytes(64)),
    "weights header too long": text(WEIGHTS, (2**62).to_bytes(8, "little") + bytes(64)),
    "a tensor missing": tensors(without_first),
    "a tensor of another shape": tensors(transposed),
    "no tensors": tensors(lambda found: found.clear()),
    "index of no JSON": with_index("{"),
    "index a list": with_index([]),
    "index without weight_map": with_index({"metadata": {}}),
    "index of numbers": with_index({"metadata": {}, "weight_map": {"a": 3}}),
    "index of missing shards": with_index({"metadata": {}, "weight_map": {"a": "model-1.safetensors"}}),
    "index leaves the folder": with_index({"metadata": {}, "weight_map": {"a": "../x.safetensors"}}),
    "pickle cut": pickled(b"PK\x03\x04"),
    "pickle of garbage": pickled(b"garbage"),
    "pickle of old garbage": pickled(pickle.dumps({"a": 1})),
    "pickle that runs code": pickled({"model.norm.weight": RunsCode()}),
    "pickle of a list": pickled([torch.zeros(1)]),
}
TOKENIZER: dict[str, Damage] = {
    "tokenizer cut": cut("tokenizer.json"),
    "tokenizer empty": text("tokenizer.json", ""),
    "tokenizer a list": text("tokenizer.json", "[]"),
    "tokenizer of nothing": text("tokenizer.json", "{}"),
    "tokenizer not UTF-8": text("tokenizer.json", b"\xff\xfe{}"),
    "tokenizer missing": remove("tokenizer.json", "tokenizer_config.json"),
    "tokenizer config cut": cut("tokenizer_config.json"),
    "tokenizer config a list": text("tokenizer_config.json", "[]"),
    "tokenizer class unknown": entries("tokenizer_config.json", tokenizer_class="NoSuchTokenizer"),
    "tokenizer in remote code": entries(
        "tokenizer_config.json", auto_map={"AutoTokenizer": ["code.T", None]}, tokenizer_class="T"
    ),
}
GENERATION: dict[str, Damage] = {
    "generation config cut": cut("generation_config.json"),
    "generation config a list": text("generation_config.json", "[]"),
    "generation config not UTF-8": text("generation_config.json", b"\xff\xfe"),
}
