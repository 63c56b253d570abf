"""What a teacher and a tokenizer are known by again: hashes cheap enough for big models.

A fingerprint tells one model from another by its shapes and a sample of its numbers. It is no proof against someone who
changes a model on purpose.
"""

import copy
import json
import os
from collections.abc import Iterable, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from hf_guide.utils.public_names import without_private_keys

SAMPLES_PER_TENSOR = 64
BYTES_PER_SAMPLE = 64
SAMPLES_PER_FILE = 64

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
"""Entries of a config that say how a model is run, and not what it computes."""


def weights_fingerprint(model: nn.Module) -> str:
    """Return a hash of every parameter's and buffer's name and shape, and of a sample of its numbers.

    Numbers are taken as bfloat16, so that a bfloat16 checkpoint is the same loaded as float32, and a float32 one loaded as
    bfloat16. Weights that are not in memory count by name and shape alone.
    """
    state = sorted(model.state_dict().items())
    return tensors_fingerprint((name, tensor) for name, tensor in state if isinstance(tensor, Tensor))


def tensors_fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return a hash of named tensors, in this order: each one's name and shape, and a sample of its values as bfloat16."""
    digest = blake2b(digest_size=16)
    for name, tensor in tensors:
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(_sampled_bytes(tensor))
    return digest.hexdigest()


def files_fingerprint(folder: str | os.PathLike[str]) -> str | None:
    """Return a hash of the safetensors files of a folder: their headers and a sample of their bytes; None without any."""
    names = sorted(path for path in Path(folder).glob("*.safetensors") if path.is_file())
    if not names or not any((Path(folder) / name).exists() for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)):
        return None
    whole = blake2b(digest_size=16)
    for path in names:
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
            size = path.stat().st_size
            whole.update(f"{path.name} {size}".encode())
            whole.update(file.read(min(header, size)))
            for place in range(8 + header, size, max(BYTES_PER_SAMPLE, (size - header) // SAMPLES_PER_FILE)):
                file.seek(place)
                whole.update(file.read(BYTES_PER_SAMPLE))
    return whole.hexdigest()


def tokenizer_fingerprint(processing_class: Any) -> str | None:
    """Return a hash of what a tokenizer or processor does to its input; None for None.

    How it pads and truncates does not count, for that is the caller's choice from call to call.
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
    """Return a config's entries as JSON has them, without those that only say how the model is run."""
    entries = copy.deepcopy(config.to_dict() if isinstance(config, PreTrainedConfig) else dict(config))
    facts = without_private_keys({key: value for key, value in entries.items() if key not in _RUNTIME_KEYS})
    return json.loads(json.dumps(facts, default=str))


def _sampled_bytes(tensor: Tensor) -> bytes:
    """Return the bytes of a sample of a tensor, floating numbers as bfloat16."""
    tensor = tensor.detach()
    if hasattr(tensor, "__tensor_flatten__"):  # a quantised weight is several tensors in one
        return b"".join(_sampled_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    if tensor.is_meta or tensor.numel() == 0:
        return b""
    flat = tensor.reshape(-1) if tensor.is_contiguous() else tensor.flatten()
    places = torch.linspace(
        0, len(flat) - 1, min(SAMPLES_PER_TENSOR, len(flat)), device=flat.device, dtype=torch.float64
    )
    some = flat[places.long()]
    if some.is_floating_point():
        some = some.to(torch.bfloat16)
    return bytes(some.cpu().contiguous().view(torch.uint8).numpy().data)
