"""Open a teacher for reading its tensors: a folder, a Hub id, a GGUF file or a loaded model.

Does: read one tensor at a time where the files allow it, and load the whole model where they do not.
Does not: change a loaded model, run a checkpoint's code without permission, or unpickle.
"""

import copy
import dataclasses
import functools
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GgufConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME, cached_file
from transformers.utils.hub import extract_commit_hash
from transformers.utils.peft_utils import find_adapter_config_file

from hf_guide.errors import TeacherError
from hf_guide.models.adapters import has_adapter, parametrized_layers
from hf_guide.models.model_classes import (
    candidate_model_classes,
    meta_model,
    stored_quantization,
    without_quantization_config,
)
from hf_guide.models.model_files import check_model_folder, no_such_folder
from hf_guide.models.pretrained import find_tokenizer, load_config, unreadable_as
from hf_guide.models.token_rows import attached_tokenizer
from hf_guide.teachers.loading import check_is_teacher, load_complete_model, missing_parameters_error
from hf_guide.teachers.quantized import (
    QuantizedTensors,
    can_dequantize,
    dequantize_on_load,
    is_quantized,
    open_quantization,
    quantized_shapes,
)
from hf_guide.teachers.shards import find_safetensors, match_stored_tensors, read_headers
from hf_guide.teachers.tensor_source import InMemoryTensors, OffloadedTensors, SafetensorsTensors, TensorSource
from hf_guide.utils.fingerprint import files_fingerprint, tensors_fingerprint


@dataclass(frozen=True)
class TeacherCheckpoint:
    """An opened teacher: its config, its tensors and the class whose state dict names them."""

    config: PreTrainedConfig
    weights: TensorSource
    model_class: type[PreTrainedModel]
    base_model_prefix: str
    tied: dict[str, str]  # a tied name -> the name under which `weights` has its tensor
    name: str  # Hub id, folder, or where a loaded model came from
    revision: str | None  # the commit, where it is known
    dtype: torch.dtype  # the floating dtype that most of its numbers are stored in
    tokenizer: Any = None  # of its vocabulary, where that is not the one among its files
    whole: "TeacherCheckpoint | None" = (
        None  # the checkpoint with its whole vocabulary, where this one has a part of it
    )


def open_teacher(
    teacher: str | os.PathLike[str] | PreTrainedModel,
    *,
    config: PreTrainedConfig | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    trust_remote_code: bool = False,
    gguf_file: str | None = None,
    subfolder: str = "",
) -> TeacherCheckpoint:
    """Open a teacher for reading.

    A folder or Hub id is found as `from_pretrained` finds it. Of safetensors nothing but the headers is read now, and one
    tensor at a time later: renamed, made of experts that are stored one by one, or dequantised (compressed-tensors, FP8,
    MXFP4, torchao, bitsandbytes), as `from_pretrained` does. Other checkpoints (`.bin`, GGUF) are loaded whole, on the CPU, in
    the dtype they are stored in. A loaded model is used as it is, without a copy, and left untouched; of a quantised one
    (torchao, bitsandbytes) one tensor at a time is dequantised.

    Raises:
        TeacherError: Something cannot be read; it is named: missing, truncated or corrupted files, parameters that are not in
            the checkpoint, remote code without `trust_remote_code=True`, quantised weights that cannot be
            dequantised, adapters, a loaded model whose weights are not in memory.
        OptionError: `teacher` is none of these.
    """
    if isinstance(teacher, torch.nn.Module):
        return _open_model(teacher, config)
    check_is_teacher(teacher)
    name = os.fspath(teacher)
    hub: dict[str, Any] = {
        "revision": revision,
        "token": token,
        "cache_dir": cache_dir,
        "local_files_only": local_files_only,
        "subfolder": subfolder,
    }
    check_model_folder(name)
    if os.path.isdir(name) and not os.path.isdir(os.path.join(name, subfolder)):
        raise TeacherError(f"{name} has no folder {subfolder!r}: subfolder must name one in it.")
    with unreadable_as(TeacherError, f"{name} cannot be read{no_such_folder(name)}"):
        adapter = None if gguf_file else find_adapter_config_file(name, **hub)
        known = cached_file(name, gguf_file or CONFIG_NAME, _raise_exceptions_for_missing_entries=False, **hub)
    if adapter is not None:
        raise TeacherError(f"{name} holds an adapter. Load it, `merge_and_unload()` it and pass the merged model.")
    commit = extract_commit_hash(known, None)
    hub["revision"] = commit or revision  # all files from one state of the repository

    config = copy.deepcopy(config) or load_config(name, hub, trust_remote_code, gguf_file)
    classes = candidate_model_classes(config, name, hub, trust_remote_code)
    explicit_file = getattr(config, "transformers_weights", None) is not None
    files = None if gguf_file is not None or explicit_file else find_safetensors(name, hub)
    if files is not None:
        opened = _open_files(classes, config, name, files, commit)
        if opened is not None:
            return opened
    model_class = classes[0 if gguf_file else -1]  # of several, GGUF files hold the one with the language head
    model = _load_whole_model(model_class, config, name, hub, trust_remote_code, gguf_file)
    return _checkpoint_from_model(model, model.config, name, commit)


def teacher_fingerprint(teacher: TeacherCheckpoint) -> str | None:
    """Return a hash that identifies a teacher without a commit: of its folder's files, else of its tensors.

    None if the commit is known, which identifies the teacher by itself.
    """
    if teacher.revision is not None:
        return None
    files = files_fingerprint(teacher.name) if os.path.isdir(teacher.name) else None
    if files is not None:
        return files
    return tensors_fingerprint((name, teacher.weights.get(name)) for name in sorted(teacher.weights.keys()))


def tokenizer_length(
    teacher: TeacherCheckpoint,
    *,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    gguf_file: str | None = None,
    subfolder: str = "",
) -> int | None:
    """Return how many rows the teacher's vocabulary needs (highest token id + 1), without padding.

    Read from the tokenizer files of the checkpoint, without remote code; None where there are none, or where they cannot be
    read without it.
    """
    hub: dict[str, Any] = {
        "revision": teacher.revision,
        "token": token,
        "cache_dir": cache_dir,
        "local_files_only": local_files_only,
        "subfolder": subfolder,
    }
    if gguf_file is not None:
        hub["gguf_file"] = gguf_file
    tokenizer = teacher.tokenizer or find_tokenizer(teacher.name, **hub)
    if tokenizer is None:
        return None
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def _open_files(
    classes: Iterable[type[PreTrainedModel]], config: PreTrainedConfig, name: str, files: list[str], commit: str | None
) -> TeacherCheckpoint | None:
    """Open safetensors lazily, or return None where only `from_pretrained` can read them."""
    stored = read_headers(files)
    missing: set[str] = set()
    is_quantized = stored_quantization(config) is not None
    for model_class in classes:
        with unreadable_as(TeacherError, f"{name} has a config that {model_class.__name__} cannot be built of"):
            model = meta_model(model_class, without_quantization_config(config))
        quantization = None
        if is_quantized:
            with unreadable_as(TeacherError, _not_loadable(config, name, model_class)):
                quantization = open_quantization(model_class, dequantize_on_load(config), files)
            if quantization is None:
                return None
        tensors = match_stored_tensors(model, stored, quantization)
        if tensors is None:
            return None
        weights = SafetensorsTensors(tensors)
        tied = _tied_parameters(model, tensors, lambda a, b: torch.equal(weights.get(a), weights.get(b)))  # noqa: B023
        missing = {key for key, _ in model.named_parameters()} - tensors.keys() - tied.keys()
        if not missing:
            untied = {key: tensor for key, tensor in tensors.items() if key not in tied}
            return _build_checkpoint(model, config, SafetensorsTensors(untied), tied, name, commit)
        if model._keys_to_ignore_on_load_missing or is_quantized:
            return None  # the model may compute the missing ones, or has others
    raise missing_parameters_error(name, missing)


def _load_whole_model(
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    name: str,
    hub: Mapping[str, Any],
    trust: bool,
    gguf_file: str | None,
) -> PreTrainedModel:
    options: dict[str, Any] = {"trust_remote_code": trust, **hub}
    if gguf_file is not None:
        options |= {"gguf_file": gguf_file, "quantization_config": GgufConfig(dequantize=True)}
    what = _not_loadable(config, name, model_class)
    with unreadable_as(TeacherError, what):
        options |= {"config": dequantize_on_load(config), "dtype": "auto"}
    model = load_complete_model(model_class, name, what, **options)
    if is_quantized(model) and not can_dequantize(model):
        advice = "pass the checkpoint that it was quantised from"
        with unreadable_as(TeacherError, f"{name} is quantised and cannot be dequantised; {advice}"):
            model = model.dequantize()
    return model


def _not_loadable(config: PreTrainedConfig, name: str, model_class: type[PreTrainedModel]) -> str:
    """Return how the error for a checkpoint that cannot be loaded begins."""
    stored = stored_quantization(config)
    if stored is None:
        return f"{name} is not loadable as {model_class.__name__} here"
    kind = f"{name} is quantised ({stored.get('quant_method')}) and not loadable as {model_class.__name__} here"
    return f"{kind}; where nothing else helps pass the checkpoint that it was quantised from"


def _open_model(model: torch.nn.Module, config: PreTrainedConfig | None) -> TeacherCheckpoint:
    if has_adapter(model):
        raise TeacherError(
            "The teacher has an adapter, or is the base model of one. Pass the result of the PeftModel's "
            "`merge_and_unload()`, or the base model's folder or Hub id."
        )
    if not isinstance(model, PreTrainedModel):
        is_sentence_model = type(model).__name__ in ("SentenceTransformer", "CrossEncoder")
        advice = "pass its folder or Hub id" if is_sentence_model else "unwrap it first"
        raise TeacherError(f"A loaded teacher must be a PreTrainedModel, not {type(model).__name__}: {advice}.")
    _check_stock_names(model)
    name = model.config._name_or_path or type(model).__name__
    opened = _checkpoint_from_model(model, config or model.config, name, None)
    return dataclasses.replace(opened, tokenizer=attached_tokenizer(model))


def _check_stock_names(model: PreTrainedModel) -> None:
    """Check that a loaded model has the weights of its class: wrapped or changed layers would be taken for missing ones.

    An optional part, such as a pooler (`add_pooling_layer=False`), may be missing as a whole.

    Raises:
        TeacherError: Weights are missing; the first is named.
    """
    added = parametrized_layers(model)
    if added:
        raise TeacherError(
            f"{len(added)} layers of the teacher are parametrized (weight_norm, spectral_norm, ...), such as {added[0]}, and "
            "have no weights by their stock names. Call torch.nn.utils.parametrize.remove_parametrizations on them first."
        )
    stock = meta_model(type(model), model.config)
    tied = {*stock.all_tied_weights_keys, *stock.all_tied_weights_keys.values()}
    missing = {name for name, _ in stock.named_parameters()} - model.state_dict().keys() - tied
    missing = {name for name in missing if not _is_optional_and_absent(model, name)}
    if missing:
        raise TeacherError(
            f"{len(missing)} weights of {type(model).__name__} are not in the loaded teacher, such as {min(missing)}: its "
            "layers were wrapped (torch.compile), replaced or removed. Pass the model as from_pretrained loads it, or its "
            "folder."
        )


def _is_optional_and_absent(model: torch.nn.Module, name: str) -> bool:
    """Return whether an attribute on the path of a parameter is None: so classes leave out an optional part."""
    part: Any = model
    for attribute in name.split("."):
        if not hasattr(part, attribute):
            return False
        part = getattr(part, attribute)
        if part is None:
            return True
    return False


def _checkpoint_from_model(
    model: PreTrainedModel, config: PreTrainedConfig, name: str, commit: str | None
) -> TeacherCheckpoint:
    packed = is_quantized(model)
    tensors = model.state_dict()
    is_spread = any(tensor.is_meta for tensor in tensors.values())
    if packed and (is_spread or not can_dequantize(model)):
        raise TeacherError(
            f"The weights of {name} are quantised or sharded. Pass its folder or Hub id instead of the "
            "loaded model, or what its `dequantize()` returns."
        )
    every: InMemoryTensors
    if packed:
        tensors = quantized_shapes(model)
        every = QuantizedTensors(model, tensors)
    else:
        every = OffloadedTensors(model, tensors) if is_spread else InMemoryTensors(tensors)

    def same(first: str, second: str) -> bool:
        a, b = every.get(first), every.get(second)
        return a.data_ptr() == b.data_ptr() or torch.equal(a, b)

    tied = _tied_parameters(model, tensors, same)
    untied = {key: tensor for key, tensor in tensors.items() if key not in tied}
    if packed:
        weights: InMemoryTensors = QuantizedTensors(model, untied)
    elif is_spread:
        weights = OffloadedTensors(model, untied)
    else:
        weights = InMemoryTensors(untied, functools.partial(_rwkv_rescaling, model))
    return _build_checkpoint(model, config, weights, tied, name, commit)


def _rwkv_rescaling(model: PreTrainedModel, name: str) -> float:
    """Return the factor that undoes the rescaling of RWKV, which divides output weights of later blocks at its first run."""
    if not getattr(model.base_model, "layers_are_rescaled", False) or not model.config.rescale_every:
        return 1.0
    match = re.search(r"blocks\.(\d+)\.(attention\.output|feed_forward\.value)\.weight$", name)
    return 2.0 ** (int(match.group(1)) // model.config.rescale_every) if match else 1.0


def _tied_parameters(
    model: PreTrainedModel, present: Collection[str], same: Callable[[str, str], bool]
) -> dict[str, str]:
    """Return each tied name with the one that is kept; names with different tensors of their own are not tied."""
    groups: dict[str, list[str]] = {}
    for name, source in model.all_tied_weights_keys.items():
        groups.setdefault(source, [source]).append(name)
    tied = {}
    for group in groups.values():
        first = next((name for name in group if name in present), None)
        for name in group:
            if first not in (None, name) and (name not in present or same(first, name)):
                tied[name] = first
    return tied


def _build_checkpoint(
    model: PreTrainedModel,
    config: PreTrainedConfig,
    weights: TensorSource,
    tied: dict[str, str],
    name: str,
    commit: str | None,
) -> TeacherCheckpoint:
    sizes: Counter[torch.dtype] = Counter()
    names = [key for key in weights.keys() if weights.dtype(key).is_floating_point]
    for key in names:
        sizes[weights.dtype(key)] += weights.shape(key).numel()
    dtype = sizes.most_common(1)[0][0] if sizes else torch.float32
    return TeacherCheckpoint(
        without_quantization_config(config), weights, type(model), model.base_model_prefix, tied, name, commit, dtype
    )
