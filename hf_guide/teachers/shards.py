"""Locate a checkpoint's tensors in its safetensors files, which `tensor_source.py` reads.

Does: find the files as `from_pretrained` does, check them, and match their tensors with those of a model by the headers.
Does not: read weights.
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import get_checkpoint_shard_files

from hf_guide.errors import TeacherError
from hf_guide.models.model_files import read_shard_index
from hf_guide.teachers.tensor_source import FileState, StoredTensor, corrupted_file_error

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def find_safetensors(name: str, hub: Mapping[str, Any]) -> list[str] | None:
    """Return the safetensors files of a folder or Hub id, downloaded where needed; None where it has none.

    `hub` holds what `cached_file` takes: revision, token, cache_dir, local_files_only, subfolder.

    Raises:
        TeacherError: The index cannot be read, or one of its shards is missing; the file is named.
    """
    optional: dict[str, Any] = dict(_raise_exceptions_for_missing_entries=False, **hub)
    single = cached_file(name, SAFE_WEIGHTS_NAME, **optional)
    if single is not None:
        return [single]
    index = cached_file(name, SAFE_WEIGHTS_INDEX_NAME, **optional)
    if index is None:
        return None
    read_shard_index(Path(index))
    try:
        shards, _ = get_checkpoint_shard_files(name, index, **hub)
    except (ValueError, KeyError, TypeError) as error:  # no metadata, which Transformers requires
        raise TeacherError(f"{index} is not a readable index of shards ({error}). Fetch it again.") from error
    except OSError as error:
        raise TeacherError(f"A shard that {index} names cannot be fetched: {error}") from error
    missing = [shard for shard in shards if not os.path.isfile(shard)]
    if missing:
        raise TeacherError(f"{index} names shards that are missing: {', '.join(missing)}. Fetch them again.")
    return shards


def read_headers(files: Iterable[str]) -> list[StoredTensor]:
    """Return every tensor of the files; only their headers are read, and checked against the files' lengths.

    Raises:
        TeacherError: A file is truncated or corrupted; it is named.
    """
    tensors = []
    for file in files:
        try:
            state = FileState.of(file)
            with safe_open(file, framework="pt"):  # checks the header, and the file's length against it
                pass
            with open(file, "rb") as opened:
                length = int.from_bytes(opened.read(8), "little")
                header = json.loads(opened.read(length))
            for key, entry in header.items():
                if key != "__metadata__":
                    start, stop = (8 + length + offset for offset in entry["data_offsets"])
                    dtype, shape = _DTYPES.get(entry["dtype"]), torch.Size(entry["shape"])
                    tensors.append(StoredTensor(state, key, shape, dtype, start, stop))
        except (SafetensorError, OSError) as error:
            raise corrupted_file_error(file, error) from error
    return tensors


def match_stored_tensors(model: PreTrainedModel, stored: Iterable[StoredTensor]) -> dict[str, StoredTensor] | None:
    """Return the location of each tensor of `model` (which may be on the meta device) by its name in the state dict.

    Names are matched by Transformers' own rules: renamed keys of old checkpoints, the base model's prefix added or
    stripped, keys the model does not have ignored. None where some tensor must be converted to fit and not only
    renamed (experts stored one by one, for instance): only `from_pretrained` reads such a checkpoint.

    Raises:
        TeacherError: A tensor does not have the shape that the config gives.
    """
    expected = model.state_dict()
    transforms = get_model_conversion_mapping(model)
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
    located = {}
    for tensor in stored:
        name, converter = rename_source_key(tensor.key, renamings, converters, model.base_model_prefix, expected)
        if name not in expected and tensor.key in expected:
            name, converter = tensor.key, None
        if name not in expected:
            continue
        if converter is not None or tensor.dtype is None:
            return None
        if tensor.shape != expected[name].shape:
            raise TeacherError(
                f"{tensor.key} in {tensor.file} has shape {tuple(tensor.shape)}, but {type(model).__name__} of its "
                f"config needs {tuple(expected[name].shape)}. Pass the config the checkpoint was saved with."
            )
        located[name] = tensor
    return located
