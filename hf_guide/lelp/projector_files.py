"""A projector's two files: what it is in `subclass_projector.json`, its numbers in `subclass_projector.safetensors`."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hf_guide.errors import SubclassError
from hf_guide.lelp.scores import FORMS
from hf_guide.public_names import public_name

CONFIG_NAME = "subclass_projector.json"
WEIGHTS_NAME = "subclass_projector.safetensors"
FORMAT = 1

_STATISTICS = ("counts", "eigenvalues", "variances")
_ENTRIES = (
    "num_classes",
    "num_subclasses",
    "embedding_size",
    "temperature",
    "subclass_temperature",
    "splitter",
    "seed",
    "teacher",
    "teacher_fingerprint",
)


def write_projector(projector: Any, save_directory: str | os.PathLike[str]) -> list[str]:
    """Write both files into a folder, made where it is not there, and return their paths.

    Raises:
        NotADirectoryError: a file stands where the folder should be.
    """
    folder = Path(save_directory)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; name a folder to save the projector in.")
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"scores.{name}": tensor.contiguous() for name, tensor in projector.scores.tensors().items()}
    tensors |= {name: getattr(projector, name).contiguous() for name in _STATISTICS}
    save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    entries: dict[str, Any] = {"format": FORMAT, "form": projector.scores.form}
    entries |= {name: getattr(projector, name) for name in _ENTRIES}
    entries["teacher"] = None if projector.teacher is None else public_name(projector.teacher)
    entries["id2label"] = {str(number): name for number, name in projector.id2label.items()}
    (folder / CONFIG_NAME).write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")
    return [str(folder / CONFIG_NAME), str(folder / WEIGHTS_NAME)]


def read_projector(name: str | os.PathLike[str], **where: Any) -> dict[str, Any]:
    """Return the fields of a projector, from a folder or, with the keywords of `hf_hub_download`, from the Hub.

    Raises:
        SubclassError: the files are not those of a projector, or damaged; there is no such folder, and no such Hub id can be.
        OSError: there is no such folder, and the Hub does not have it.
    """
    folder = Path(name)
    paths = []
    for file in (CONFIG_NAME, WEIGHTS_NAME):
        if not folder.is_dir():
            paths.append(_download(os.fspath(name), file, where))
        elif (folder / file).is_file():
            paths.append(folder / file)
        else:
            raise SubclassError(f"{folder} has no {file}; it is no projector's folder, or not all of one.")
    config, weights = paths
    try:
        entries = json.loads(config.read_text(encoding="utf-8"))
        tensors: dict[str, Tensor] = {}
        with safe_open(weights, framework="pt") as opened:
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        if entries["format"] != FORMAT:
            raise SubclassError(f"{config} is of format {entries['format']}; this version reads format {FORMAT}.")
        form = FORMS[entries["form"]]
        found: dict[str, Any] = {key: entries[key] for key in _ENTRIES} | {key: tensors[key] for key in _STATISTICS}
        found["scores"] = form(**{each.name: tensors[f"scores.{each.name}"] for each in dataclasses.fields(form)})
        found["id2label"] = {int(number): label for number, label in entries["id2label"].items()}
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError, SafetensorError) as error:
        raise SubclassError(
            f"{config.parent} does not hold a whole projector: {type(error).__name__} {error}. Fetch or fit it again."
        ) from error
    classes, width, subclasses = (found[name] for name in ("num_classes", "embedding_size", "num_subclasses"))
    shapes = (tuple(found["eigenvalues"].shape), found["scores"].shape)
    if shapes != ((classes, width), (classes, width, subclasses)) or len(found["id2label"]) != classes:
        raise SubclassError(f"{weights} has tensors of other shapes than {config.name} says; fetch or fit it again.")
    return found


def _download(name: str, file: str, where: dict[str, Any]) -> Path:
    try:
        return Path(hf_hub_download(name, file, **where))
    except HFValidationError as error:
        raise SubclassError(
            f"There is no folder {name!r}, and it is no Hub id either. Name the folder that a projector was saved in, or a "
            "Hub id such as user/name."
        ) from error
