"""A projector's two files: its settings, `subclass_projector.json`, and its tensors, `subclass_projector.safetensors`.

The settings, which are replaced last, state the checksum of the tensors: files of two different projectors, which an
interrupted save over an older projector leaves, raise an error.
"""

import dataclasses
import logging
import os
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError

from hf_guide.errors import SubclassError
from hf_guide.lelp.splitters.scorers import SCORER_TYPES
from hf_guide.utils.checksums import DamagedFileError, read_json, read_tensors, write_json, write_tensors
from hf_guide.utils.files import move_entries, remove_stale_partials, staging_folder
from hf_guide.utils.public_names import public_name

logger = logging.getLogger(__name__)

CONFIG_NAME = "subclass_projector.json"
WEIGHTS_NAME = "subclass_projector.safetensors"
FORMAT = 2
FORMAT_WITHOUT_CHECKSUMS = 1
WEIGHTS_CHECKSUM = "weights_checksum"

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
_OPTIONAL_ENTRIES = ("num_subclasses_rule",)


def write_projector(projector: Any, save_directory: str | os.PathLike[str]) -> list[str]:
    """Write both files into a folder, which is created if it is missing, and return their paths.

    Raises:
        NotADirectoryError: The folder is a file.
        OSError: They could not be written; the folder is unchanged.
    """
    folder = Path(save_directory)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; name a folder to save the projector in.")
    folder.mkdir(parents=True, exist_ok=True)
    remove_stale_partials(folder)
    tensors = {f"scores.{name}": tensor.contiguous() for name, tensor in projector.scores.tensors().items()}
    tensors |= {name: getattr(projector, name).contiguous() for name in _STATISTICS}
    entries: dict[str, Any] = {"format": FORMAT, "form": projector.scores.form}
    entries |= {name: getattr(projector, name) for name in (*_ENTRIES, *_OPTIONAL_ENTRIES)}
    entries["teacher"] = None if projector.teacher is None else public_name(projector.teacher)
    entries["id2label"] = {str(number): name for number, name in projector.id2label.items()}
    try:
        with staging_folder(folder, "subclass_projector") as new:
            entries[WEIGHTS_CHECKSUM] = write_tensors(new / WEIGHTS_NAME, tensors, {})
            write_json(new / CONFIG_NAME, entries)
            move_entries(new, folder, last=(CONFIG_NAME,))
    except SafetensorError as error:
        raise OSError(f"The projector could not be written to {folder}: {error}.") from error
    return [str(folder / CONFIG_NAME), str(folder / WEIGHTS_NAME)]


def read_projector(name: str | os.PathLike[str], **where: Any) -> dict[str, Any]:
    """Return the fields of a projector, from a folder or, with the keyword arguments of `hf_hub_download`, from the Hub.

    Raises:
        SubclassError: The files are not those of a projector, or damaged; the name is neither a folder nor a valid Hub id.
        OSError: There is no such folder, nor a repository of this name on the Hub.
    """
    config, weights = _locate_files(os.fspath(name), where)
    try:
        entries, has_checksum = read_json(config, required=False)
        version = entries["format"]
        if version not in (FORMAT, FORMAT_WITHOUT_CHECKSUMS):
            raise SubclassError(f"{config} is of format {version}; this version reads format {FORMAT}.")
        has_checksums = version == FORMAT
        if has_checksums and not has_checksum:
            raise SubclassError(
                f"{config} is damaged: it has no checksum of its own. Fetch or fit the projector again."
            )
        tensors, _, checksum = read_tensors(weights, required=has_checksums)
        if has_checksums and entries[WEIGHTS_CHECKSUM] != checksum:
            raise SubclassError(
                f"{config.parent} holds parts of two projectors: {config.name} belongs to weights with the checksum "
                f"{entries[WEIGHTS_CHECKSUM]}, and {weights.name} has {checksum}. A save over an older projector was "
                "interrupted, or one file was copied alone. Save, fetch or fit the projector again."
            )
        if not has_checksums:
            logger.warning(
                "%s was written by an earlier version and has no checksums, so that damage to it cannot be seen. Load it and "
                "call save_pretrained to add them.",
                config.parent,
            )
        scorer_type = SCORER_TYPES[entries["form"]]
        fields: dict[str, Any] = {key: entries[key] for key in _ENTRIES} | {key: tensors[key] for key in _STATISTICS}
        fields |= {key: entries.get(key) for key in _OPTIONAL_ENTRIES}  # an earlier version did not write them
        scorer_fields = dataclasses.fields(scorer_type)
        fields["scores"] = scorer_type(**{field.name: tensors[f"scores.{field.name}"] for field in scorer_fields})
        fields["id2label"] = {int(number): label for number, label in entries["id2label"].items()}
    except DamagedFileError as error:
        raise SubclassError(f"{error} Fetch or fit the projector again.") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise SubclassError(
            f"{config.parent} does not hold a complete projector: {type(error).__name__} {error}. Fetch or fit it again."
        ) from error
    classes, width, subclasses = (fields[name] for name in ("num_classes", "embedding_size", "num_subclasses"))
    shapes = (tuple(fields["eigenvalues"].shape), fields["scores"].shape)
    if shapes != ((classes, width), (classes, width, subclasses)) or len(fields["id2label"]) != classes:
        raise SubclassError(
            f"{weights} has tensors of other shapes than {config.name} states. Fetch or fit the projector again."
        )
    return fields


def _locate_files(name: str, where: dict[str, Any]) -> list[Path]:
    """Return the paths of both files in a folder, or downloaded from the Hub."""
    folder = Path(name)
    paths = []
    for file in (CONFIG_NAME, WEIGHTS_NAME):
        if not folder.is_dir():
            paths.append(_download(name, file, where))
        elif (folder / file).is_file():
            paths.append(folder / file)
        else:
            raise SubclassError(f"{folder} has no {file}; it must be the complete folder of a projector.")
    return paths


def _download(name: str, file: str, where: dict[str, Any]) -> Path:
    try:
        return Path(hf_hub_download(name, file, **where))
    except HFValidationError as error:
        raise SubclassError(
            f"There is no folder {name!r}, and it is no Hub id either. Name the folder that a projector was saved in, or a "
            "Hub id such as user/name."
        ) from error
    except LocalEntryNotFoundError as error:  # its message does not name what was looked for
        raise FileNotFoundError(
            f"There is no folder {name!r}, and the projector of that name cannot be fetched from the Hub: {error}"
        ) from error
