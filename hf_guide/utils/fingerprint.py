"""Fingerprints of models and tokenizers: hashes that are cheap for large models.

A fingerprint distinguishes models by their shapes and a sample of their values. It does not detect that some values were
changed, on purpose or by training a few rows; `exact_fingerprint`, which reads all values, does.
"""

import copy
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from hf_guide.utils.checksums import Checksum
from hf_guide.utils.public_names import without_private_keys

SAMPLES_PER_TENSOR = 64
BYTES_PER_SAMPLE = 64
SAMPLES_PER_FILE = 64
SAMPLED_FILES = 64

_ADDED_PREFIXES = ("cache-", "tmp", ".")
"""Of files that `datasets` writes into the folder of a dataset which was saved with save_to_disk."""

_RUNTIME_KEYS = (
    "_name_or_path",
    "_attn_implementation",
    "architectures",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "quantization_config",
)
"""Config entries about how a model is run, not what it computes."""


def weights_fingerprint(model: nn.Module) -> str:
    """Return a hash of every parameter's and buffer's name, shape, and a sample of its values.

    Values are hashed as bfloat16, so that a checkpoint has the same fingerprint in float32 and in bfloat16. Weights that are
    not in memory are hashed by name and shape only.
    """
    return tensors_fingerprint(named_tensors(model))


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield every parameter and buffer of a model's state dict with its name, in the order of the names."""
    for name, tensor in sorted(model.state_dict().items()):
        if isinstance(tensor, Tensor):
            yield name, tensor


def tensors_fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return a hash of named tensors, in this order: each one's name and shape, and a sample of its values as bfloat16."""
    digest = blake2b(digest_size=16)
    for name, tensor in tensors:
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        for part in _plain_tensors(tensor.detach()):
            digest.update(_sampled_bytes(part))
    return digest.hexdigest()


def exact_fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return a hash of named tensors, in this order: each one's name, shape, dtype and all of its values.

    Weights that are not in memory are hashed by name, shape and dtype only.

    Example:
        >>> table = torch.zeros(1000, 8)
        >>> edited = table.index_fill(0, torch.tensor([7]), 1.0)
        >>> exact_fingerprint([("table", table)]) == exact_fingerprint([("table", edited)])
        False
    """
    checksum = Checksum()
    for name, tensor in tensors:
        checksum.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        for part in _plain_tensors(tensor.detach()):
            checksum.update(part.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return checksum.hexdigest()


def files_fingerprint(folder: str | os.PathLike[str]) -> str | None:
    """Return a hash of the safetensors files of a folder: their headers and a sample of their bytes; None without any."""
    names = sorted(path for path in Path(folder).glob("*.safetensors") if path.is_file())
    if not names or not any((Path(folder) / name).exists() for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)):
        return None
    digest = blake2b(digest_size=16)
    for path in names:
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
            size = path.stat().st_size
            digest.update(f"{path.name} {size}".encode())
            digest.update(file.read(min(header, size)))
            for offset in range(8 + header, size, max(BYTES_PER_SAMPLE, (size - header) // SAMPLES_PER_FILE)):
                file.seek(offset)
                digest.update(file.read(BYTES_PER_SAMPLE))
    return digest.hexdigest()


def sampled_fingerprint(paths: Iterable[Path]) -> str:
    """Return a hash of files in this order, each one's name and size, and of the first of them a sample of their bytes.

    Of a folder it is that of the files in it, and the names of its folders; without those that `datasets` adds when it maps.
    """
    files: list[Path] = []
    for path in paths:
        inside = sorted(path.iterdir()) if path.is_dir() else [path]
        files += [each for each in inside if not (path.is_dir() and each.name.startswith(_ADDED_PREFIXES))]
    digest = blake2b(digest_size=16)
    for index, path in enumerate(files):
        size = path.stat().st_size if path.is_file() else -1
        digest.update(f"{path.name} {size}".encode())
        if size > 0 and index < SAMPLED_FILES:
            with path.open("rb") as file:
                for offset in range(0, size, max(BYTES_PER_SAMPLE, size // SAMPLES_PER_FILE)):
                    file.seek(offset)
                    digest.update(file.read(BYTES_PER_SAMPLE))
    return digest.hexdigest()


def tokenizer_fingerprint(processing_class: Any) -> str | None:
    """Return a hash of what a tokenizer or processor computes; None for None.

    Padding and truncation are ignored, because callers choose them per call.
    """
    if processing_class is None:
        return None
    parts = getattr(processing_class, "attributes", None)
    if isinstance(parts, (list, tuple)) and not isinstance(processing_class, PreTrainedTokenizerBase):
        facts: Any = {name: tokenizer_fingerprint(getattr(processing_class, name, None)) for name in parts}
    elif isinstance(processing_class, PreTrainedTokenizerBase):
        facts = {"vocabulary": processing_class.get_vocab(), "special": processing_class.all_special_tokens}
        backend = getattr(processing_class, "backend_tokenizer", None)
        if backend is not None:
            described = json.loads(backend.to_str())
            facts["backend"] = {key: value for key, value in described.items() if key not in ("padding", "truncation")}
    elif hasattr(processing_class, "to_dict"):
        facts = {key: value for key, value in processing_class.to_dict().items() if not key.startswith("_")}
    else:
        facts = type(processing_class).__qualname__
    return blake2b(json.dumps(facts, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


def comparable_config(config: "PreTrainedConfig | Mapping[str, Any]") -> dict[str, Any]:
    """Return a config's entries as JSON values, without those that only affect how the model is run."""
    entries = copy.deepcopy(config.to_dict() if isinstance(config, PreTrainedConfig) else dict(config))
    facts = without_private_keys({key: value for key, value in entries.items() if key not in _RUNTIME_KEYS})
    return json.loads(json.dumps(facts, default=str))


def _plain_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the tensor, or those of which a quantized weight consists; none that is empty or not in memory."""
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _plain_tensors(getattr(tensor, name))
    elif not tensor.is_meta and tensor.numel():
        yield tensor


def _sampled_bytes(tensor: Tensor) -> bytes:
    """Return the bytes of a sample of a tensor, floating numbers as bfloat16."""
    flat = tensor.reshape(-1) if tensor.is_contiguous() else tensor.flatten()
    indices = torch.linspace(
        0, len(flat) - 1, min(SAMPLES_PER_TENSOR, len(flat)), device=flat.device, dtype=torch.float64
    )
    values = flat[indices.long()]
    if values.is_floating_point():
        values = values.to(torch.bfloat16)
    return bytes(values.cpu().contiguous().view(torch.uint8).numpy().data)
