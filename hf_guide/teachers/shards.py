"""Locate a checkpoint's tensors in its safetensors files, which `tensor_source.py` reads.

Does: find the files as `from_pretrained` does, check them, and match their tensors with those of a model by the headers:
one with one, or several that Transformers' conversions make into one (experts stored one by one, packed weights and scales).
Does not: read weights.
"""

import copy
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import get_checkpoint_shard_files

from hf_guide.errors import TeacherError
from hf_guide.models.model_files import read_shard_index
from hf_guide.models.pretrained import unreadable_as
from hf_guide.teachers.quantized import Quantization, dequantized
from hf_guide.teachers.tensor_source import FileState, LocatedTensor, StoredTensor, unreadable_file_error

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
            raise unreadable_file_error(file, error) from error
    return tensors


@dataclass(frozen=True)
class ConvertedTensor:
    """A tensor that one of Transformers' conversions makes of stored ones.

    Attributes:
        name: Its name in the model.
        target: The name by which the conversion was found; of several tensors that it makes, the first.
        sources: The stored tensors, each with the pattern of the conversion that its name matched.
        converter: The conversion.
        model: The model on the meta device, which some conversions read sizes and dtypes of.
        shape, dtype: In the model.
        has_rows: Whether entries of the first axis, experts, can be made by themselves.
        is_quantized: Whether the stored tensors are quantised.
    """

    name: str
    target: str
    sources: tuple[tuple[str, StoredTensor], ...]
    converter: WeightConverter
    model: PreTrainedModel
    shape: torch.Size
    dtype: torch.dtype
    has_rows: bool
    is_quantized: bool

    def parts(self, rows: "slice | None") -> "list[tuple[StoredTensor, slice | None]]":
        """Return the stored tensors of which it is made, and the entries of the first axis that are needed of each."""
        if rows is None or not self.has_rows:
            return [(stored, None) for _, stored in self.sources]
        if not _merges(self.converter):
            return [(stored, rows) for _, stored in self.sources]
        return [(stored, None) for _, stored in self._selected(rows)]

    def assemble(self, tensors: Sequence[torch.Tensor], rows: "slice | None") -> torch.Tensor:
        """Return the tensor, or some of its experts, made of its parts.

        Raises:
            TeacherError: The stored tensors do not make a tensor of the model's shape.
        """
        separate = rows is not None and self.has_rows
        sources = self._selected(rows) if separate and _merges(self.converter) else self.sources
        files = ", ".join(sorted({stored.file for _, stored in self.sources}))
        with unreadable_as(TeacherError, f"{self.name} cannot be made of {len(self.sources)} tensors in {files}"):
            converted = convert(self.converter, self.target, zip(sources, tensors, strict=True), self.model)
            value = converted[self.name]
            if self.is_quantized:
                value = dequantized(value, self.model.get_submodule(self.name.rpartition(".")[0]))
            shape = value.shape if not separate else torch.Size((self.shape[0], *value.shape[1:]))
            if shape != self.shape or value.element_size() < 2 or not value.is_floating_point():
                raise ValueError(f"found {value.dtype} of shape {tuple(shape)}, expected {tuple(self.shape)}")
        return (value[rows] if rows is not None and not separate else value).detach().to(self.dtype)

    def _selected(self, rows: "slice | None") -> "list[tuple[str, StoredTensor]]":
        patterns = dict.fromkeys(pattern for pattern, _ in self.sources)
        of_pattern = {name: [each for each in self.sources if each[0] == name] for name in patterns}
        return [each for found in of_pattern.values() for each in (found if rows is None else found[rows])]


def convert(
    converter: WeightConverter,
    target: str,
    tensors: "Iterable[tuple[tuple[str, StoredTensor], torch.Tensor]]",
    model: PreTrainedModel,
) -> dict[str, torch.Tensor]:
    """Return what a conversion makes of tensors that match its patterns, by the names in the model."""
    conversion = copy.copy(converter)
    conversion.collected_tensors = defaultdict(list)
    for (pattern, _), tensor in tensors:
        conversion.collected_tensors[pattern].append(tensor)  # type: ignore[arg-type]
    made = conversion.convert(target, model=model, config=model.config)
    return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def match_stored_tensors(
    model: PreTrainedModel, stored: Iterable[StoredTensor], quantization: Quantization | None = None
) -> dict[str, LocatedTensor] | None:
    """Return the location of each tensor of `model` (which may be on the meta device) by its name in the state dict.

    Names are matched by Transformers' own rules: renamed keys of old checkpoints, the base model's prefix added or
    stripped, keys the model does not have ignored, tensors that a conversion makes of several. None where a tensor is in a
    format that only `from_pretrained` reads.

    Raises:
        TeacherError: A tensor does not have the shape that the config gives.
    """
    expected = model.state_dict()
    prepared, quantizer = (model, None) if quantization is None else (quantization.model, quantization.quantizer)
    transforms = get_model_conversion_mapping(prepared, hf_quantizer=quantizer)
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    located: dict[str, LocatedTensor] = {}
    converted: dict[str, list[tuple[str, StoredTensor]]] = defaultdict(list)
    for tensor in sorted(stored, key=lambda each: dot_natural_key(each.key)):  # the order of experts
        name, pattern = rename_source_key(tensor.key, renamings, converters, model.base_model_prefix, expected)
        if name not in expected and tensor.key in expected:
            name, pattern = tensor.key, None
        if name not in expected:
            continue
        if pattern is not None:
            converted[name].append((pattern, tensor))
            continue
        if tensor.dtype is None:
            return None
        _check_shape(model, tensor.key, tensor.file, tensor.shape, expected[name].shape)
        located[name] = tensor
    for target, sources in converted.items():
        made = _match_converted(model, target, sources, by_pattern[sources[0][0]], quantization)
        if made is None:
            return None
        located |= made
    return located


def _match_converted(
    model: PreTrainedModel,
    target: str,
    sources: list[tuple[str, StoredTensor]],
    converter: WeightConverter,
    quantization: Quantization | None,
) -> dict[str, LocatedTensor] | None:
    """Return the tensors that a conversion makes of stored ones, by name; None where their format is not known.

    What is not quantised is converted on the meta device, which gives names, shapes and dtypes.
    """
    expected, (_, first) = model.state_dict(), sources[0]
    reads = () if quantization is None else (quantization.operation,)
    is_quantized = any(isinstance(operation, reads) for operation in converter.operations)
    if is_quantized and len(sources) == 1 and len(converter.operations) == 1 and _is_plain(first):
        _check_shape(model, first.key, first.file, first.shape, expected[target].shape)
        return {target: first}
    prepared = model if quantization is None else quantization.model
    if is_quantized:
        made = {target: expected[target]}
    elif any(not _is_plain(stored) for _, stored in sources):
        return None
    else:
        empty = [(each, torch.empty(each[1].shape, dtype=each[1].dtype, device="meta")) for each in sources]
        with unreadable_as(TeacherError, f"{target} cannot be made of {len(sources)} tensors such as {first.key}"):
            made = convert(converter, target, empty, prepared)
    tensors: dict[str, LocatedTensor] = {}
    for name, value in made.items():
        if name in expected:
            _check_shape(model, first.key, first.file, value.shape, expected[name].shape)
            separate = _has_separate_experts(converter, sources, value.shape, reads)
            tensors[name] = ConvertedTensor(
                name, target, tuple(sources), converter, prepared, value.shape, value.dtype, separate, is_quantized
            )
    return tensors


def _has_separate_experts(
    converter: WeightConverter,
    sources: Sequence[tuple[str, StoredTensor]],
    shape: torch.Size,
    reads: tuple[type[Any], ...],
) -> bool:
    """Return whether each expert of a tensor of experts is made of tensors, or entries of tensors, of its own."""
    others = [each for each in converter.operations if not isinstance(each, (MergeModulelist, *reads))]
    axes = ((each.dim0, each.dim1) if isinstance(each, Transpose) else (getattr(each, "dim", 0),) for each in others)
    if len(shape) != 3 or any(min(each) < 1 for each in axes):
        return False
    patterns = [pattern for pattern, _ in sources]
    counts = {patterns.count(pattern) for pattern in patterns}
    if _merges(converter):
        return all(each.dim == 0 for each in _merges(converter)) and counts == {shape[0]}
    return counts == {1} and all(stored.shape[:1] == shape[:1] for _, stored in sources)


def _merges(converter: WeightConverter) -> list[MergeModulelist]:
    return [each for each in converter.operations if isinstance(each, MergeModulelist)]


def _is_plain(stored: StoredTensor) -> bool:
    return stored.dtype is not None and stored.dtype.is_floating_point


def _check_shape(model: PreTrainedModel, key: str, file: str, found: torch.Size, expected: torch.Size) -> None:
    if found != expected:
        raise TeacherError(
            f"{key} in {file} has shape {tuple(found)}, but {type(model).__name__} of its "
            f"config needs {tuple(expected)}. Pass the config the checkpoint was saved with."
        )
