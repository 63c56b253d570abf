"""Read and write the files of a sentence-transformers folder besides the transformer's: `modules.json` and what it names.

Does: check every module, and refuse those whose student would not be what the teacher is.
Does not: run code of a checkpoint, or import sentence_transformers: the classes that `modules.json` names are known by name.
"""

import json
import logging
import os
import posixpath
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, RemoteEntryNotFoundError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hf_guide.errors import TeacherError, one_paragraph
from hf_guide.models.adapters import without_adapter
from hf_guide.models.model_files import is_outside_folder
from hf_guide.models.pretrained import unreadable_as
from hf_guide.models.sentence_modules import (
    POOLING_MODES,
    SENTENCE,
    TOKENS,
    Dense,
    Dropout,
    LayerNorm,
    ModuleEntry,
    Normalize,
    Pooling,
    SentenceFiles,
    SentenceModules,
    find_sentence_modules,
)
from hf_guide.utils.files import atomic_write, atomic_write_text
from hf_guide.validation import did_you_mean

logger = logging.getLogger(__name__)

MODULES_NAME = "modules.json"
MODEL_CONFIG_NAME = "config_sentence_transformers.json"
TRANSFORMER_CONFIG_NAMES = (
    "sentence_bert_config.json",
    "sentence_roberta_config.json",
    "sentence_distilbert_config.json",
    "sentence_camembert_config.json",
    "sentence_albert_config.json",
    "sentence_xlm-roberta_config.json",
    "sentence_xlnet_config.json",
)
"""Names of the transformer's own config, the present one first."""

_MODULE_CONFIG_NAME = "config.json"
_SWITCHES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""The entries of an earlier form of a Pooling's config, and the mode that each switches on."""

_TEXT_ONLY = {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}
_ARGUMENTS = ("model_args", "model_kwargs", "tokenizer_args", "processor_kwargs", "config_args", "config_kwargs")
_MULTI_VECTOR = ("query_length", "document_length", "query_expansion")
_ADVICE = "Use the transformer alone as teacher, from a folder without modules.json, or another teacher."


def read_sentence_modules(
    name: "str | os.PathLike[str]",
    *,
    revision: str | None = None,
    token: "str | bool | None" = None,
    cache_dir: "str | os.PathLike[str] | None" = None,
    local_files_only: bool = False,
    subfolder: str = "",
    if_unknown: str = "error",
) -> SentenceModules | None:
    """Return the modules of a sentence-transformers folder; None for a folder without a `modules.json`.

    Args:
        name: A folder or a Hub id.
        revision, token, cache_dir, local_files_only, subfolder: As in `from_pretrained`.
        if_unknown: What follows where the Hub cannot be reached and its cache does not have the file: "error"; or "warn", and
            take it for missing; "ignore" takes it for missing without asking the Hub.

    Raises:
        TeacherError: A file is missing or cannot be read, or a module is not one that a student can have: it is named.
    """
    hub = {"revision": revision, "token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    files = _Files(os.fspath(name), hub, subfolder, if_unknown=if_unknown)
    entries = files.read_json(MODULES_NAME, list)
    if entries is None:
        return None
    read = [_read_entry(entry, number, files) for number, entry in enumerate(entries)]
    if not read or _class_name(read[0].type) != "Transformer":
        found = read[0].type if read else "no module"
        raise TeacherError(f"The first module of {files.name} must be a Transformer; found {found}. {_ADVICE}")
    if read[0].path:
        raise TeacherError(
            f"The transformer of {files.name} is in its folder {read[0].path!r}, as in an early layout of "
            "sentence-transformers; it must be at the top. Load and save it with SentenceTransformer once."
        )
    settings = _read_settings(files)
    modules = SentenceModules(read, settings)
    modules.hidden_size = _check_chain(modules, files.name)
    return modules


def modules_of_model(model: Any) -> SentenceModules:
    """Return the modules by which a model's hidden states become embeddings.

    They are those that it was initialized with, those in the folder or repository that it was loaded from, or the mean over
    the attended tokens.

    Args:
        model: A model without a head, with or without a PEFT adapter.

    Raises:
        TeacherError: Its folder has modules that are not supported.
        TaskError: Its config does not state the width of its hidden states.
    """
    return find_sentence_modules(model, _read_of_model)


def _read_of_model(model: Any) -> SentenceModules | None:
    name = getattr(model.config, "_name_or_path", "")
    if not name:
        return None
    modules = read_sentence_modules(name, revision=getattr(model.config, "_commit_hash", None))
    if modules is not None and modules.hidden_size is not None:
        width = getattr(model.config.get_text_config(decoder=True), "hidden_size", None)
        check_hidden_size(modules, width, name)
    return modules


def check_hidden_size(modules: SentenceModules, width: int | None, name: str) -> None:
    """Check that modules read hidden states of a model's width.

    Raises:
        TeacherError: They do not.
    """
    if modules.hidden_size not in (None, width):
        raise TeacherError(
            f"The modules of {name} read hidden states of width {modules.hidden_size}, and its transformer's have {width}. "
            "Fetch the folder again."
        )


def embed(model: Any, hidden_states: Tensor, inputs: Mapping[str, Any]) -> Tensor:
    """Return the embeddings of a batch of texts, (batch, width), by the modules of a model; see `modules_of_model`.

    Args:
        model: A model without a head.
        hidden_states: Its `last_hidden_state`, (batch, length, hidden_size); of images (batch, channels, height, width), too.
        inputs: What it was called with.
    """
    modules = modules_of_model(model)
    hidden_states = hidden_states.flatten(2).transpose(1, 2) if hidden_states.ndim == 4 else hidden_states
    return modules.to(hidden_states.device).train(without_adapter(model).training).embed(hidden_states, inputs)


def write_sentence_modules(modules: SentenceModules, folder: "str | os.PathLike[str]") -> None:
    """Write `modules.json` and the files of every module but the transformer's own into the folder of a saved model."""
    folder = Path(folder)
    entries = [
        {"idx": number, "name": entry.name, "path": entry.path, "type": entry.type}
        | ({"kwargs": entry.kwargs} if entry.kwargs else {})
        for number, entry in enumerate(modules.entries)
    ]
    for entry in modules.entries[1:]:
        path = folder / entry.path
        if entry.config is not None:
            path.mkdir(parents=True, exist_ok=True)
            _write_json(path / _MODULE_CONFIG_NAME, entry.config)
        state = {} if entry.module is None else entry.module.state_dict()
        if state:
            tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in state.items()}
            with atomic_write(path / "model.safetensors") as partial:
                save_file(tensors, partial, metadata={"format": "pt"})
    settings = modules.files
    for name, values in (
        (settings.transformer_file, settings.transformer_config),
        (MODEL_CONFIG_NAME, settings.model_config),
        (MODULES_NAME, entries),
    ):
        if values is not None:
            _write_json(folder / name, values)


def load_module_weights(modules: SentenceModules, folder: "str | os.PathLike[str]") -> None:
    """Read the weights of modules from a folder that `write_sentence_modules` wrote, in place.

    Raises:
        TeacherError: A file is missing or does not fit.
    """
    files = _Files(os.fspath(folder), {})
    for path, module in modules.trainable.items():
        _load_weights(module, path, files)


def _write_json(path: Path, values: Any) -> None:
    atomic_write_text(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


class _Files:
    """The files of a folder or repository, none of which may be outside of it."""

    def __init__(self, name: str, hub: dict[str, Any], subfolder: str = "", *, if_unknown: str = "error"):
        self.name, self.hub, self.subfolder, self.if_unknown = name, hub, subfolder, if_unknown

    def find(self, path: str) -> Path | None:
        """Return the path of a file; None if there is none."""
        relative = posixpath.join(self.subfolder, path)
        folder = Path(self.name)
        if folder.is_dir():
            file = folder / relative
            if not file.is_file():
                return None
            if is_outside_folder(file, folder):
                raise TeacherError(
                    f"{file} is a link to {os.path.realpath(file)}, outside of its folder. Replace it with the file."
                )
            return file
        where = {key: self.hub.get(key) for key in ("cache_dir", "revision")}
        try:
            cached = try_to_load_from_cache(self.name, relative, **where)
            if cached is _CACHED_NO_EXIST or (cached is None and self.if_unknown == "ignore"):
                return None
            return Path(cached if isinstance(cached, str) else hf_hub_download(self.name, relative, **self.hub))
        except RemoteEntryNotFoundError:
            return None
        except (OSError, HFValidationError) as error:  # neither a folder nor a repository that can be reached
            message = (
                f"Whether {self.name} has a {path}, by which its hidden states become embeddings, is not known: "
                f"{one_paragraph(error)} Download the whole repository, and name its folder."
            )
            if self.if_unknown == "ignore":
                return None
            if self.if_unknown == "error":
                raise TeacherError(message) from error
            logger.warning(message)
            return None

    def read_json(self, path: str, kind: type) -> Any:
        """Return the content of a JSON file, a mapping or a list; None if there is none."""
        with unreadable_as(TeacherError, f"{path} of {self.name} cannot be read"):
            file = self.find(path)
            if file is None:
                return None
            values = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(values, kind):
            raise TeacherError(
                f"{path} of {self.name} must be a JSON {kind.__name__}; found a {type(values).__name__}."
            )
        return values


# One module


def _class_name(type_name: str) -> str:
    return type_name.rpartition(".")[2]


def _read_entry(entry: Any, number: int, files: _Files) -> ModuleEntry:
    """Return one entry of `modules.json`, its module with its weights."""
    texts: list[Any] = [entry.get(key) for key in ("name", "path", "type")] if isinstance(entry, dict) else []
    if len(texts) != 3 or not all(isinstance(text, str) for text in texts):
        raise TeacherError(
            f"Entry {number} of {MODULES_NAME} of {files.name} must have a name, a path and a type; found {entry!r:.80}."
        )
    name, path, type_name = texts
    path = path.rstrip("/")
    if path.startswith("/") or "\\" in path or ":" in path or ".." in path.split("/"):
        raise TeacherError(f"{MODULES_NAME} of {files.name} names the folder {path!r}, outside of its own.")
    if not type_name.startswith("sentence_transformers."):
        raise TeacherError(
            f"{MODULES_NAME} of {files.name} names the module {type_name!r}, whose Python code is not sentence-transformers' "
            f"own: it is not run, and a student cannot be made of it. {_ADVICE}"
        )
    class_name = _class_name(type_name)
    if number == 0 and class_name == "Transformer":
        return ModuleEntry(name, path, type_name, kwargs=entry.get("kwargs"))
    if class_name not in _READERS or not path:
        known = ", ".join(["Transformer", *_READERS])
        raise TeacherError(
            f"{MODULES_NAME} of {files.name} names the module {class_name}, which cannot be carried over to a student; those "
            f"that can are {known}. {_ADVICE}"
        )
    config = files.read_json(f"{path}/{_MODULE_CONFIG_NAME}", dict)
    where = f"{path}/{_MODULE_CONFIG_NAME} of {files.name}"
    with unreadable_as(TeacherError, f"The module {path} of {files.name} cannot be made"):
        module = _READERS[class_name](config, where)
        if module is not None:
            _load_weights(module, path, files)
    return ModuleEntry(name, path, type_name, config, module, entry.get("kwargs"))


def _check_keys(config: Mapping[str, Any], known: "tuple[str, ...] | list[str]", where: str) -> None:
    for key in config:
        if key not in known:
            raise TeacherError(
                f"{where} has an unknown entry {key!r}; expected some of {list(known)}.{did_you_mean(key, known)}"
            )


def _required(config: dict[str, Any] | None, key: str, where: str) -> int:
    if config is None:
        raise TeacherError(f"{where} is missing. Fetch the folder again.")
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise TeacherError(f"{key} in {where} must be a positive integer; found {value!r}.")
    return value


def _read_pooling(config: dict[str, Any] | None, where: str) -> nn.Module:
    key = "embedding_dimension" if "embedding_dimension" in (config or {}) else "word_embedding_dimension"
    width = _required(config, key, where)
    assert config is not None
    _check_keys(config, (key, "pooling_mode", "include_prompt", *_SWITCHES), where)
    modes = config.get("pooling_mode")
    if modes is None:
        by_mode = {mode: config.get(switch, False) for switch, mode in _SWITCHES.items()}
        modes = [mode for mode in POOLING_MODES if by_mode[mode]] or ["mean"]
    modes = [modes] if isinstance(modes, str) else modes
    if not isinstance(modes, list) or not modes or any(mode not in POOLING_MODES for mode in modes):
        raise TeacherError(f"pooling_mode in {where} must be one or more of {list(POOLING_MODES)}; found {modes!r}.")
    return Pooling(width, modes, include_prompt=bool(config.get("include_prompt", True)))


def _feature(config: Mapping[str, Any], key: str, default: str, where: str) -> str:
    name = config.get(key) or default
    if name not in (TOKENS, SENTENCE):
        raise TeacherError(f"{key} in {where} must be {TOKENS!r} or {SENTENCE!r}; found {name!r}.")
    return str(name)


def _read_dense(config: dict[str, Any] | None, where: str) -> nn.Module:
    inputs, outputs = _required(config, "in_features", where), _required(config, "out_features", where)
    assert config is not None
    known = ("in_features", "out_features", "bias", "activation_function", "use_residual")
    _check_keys(config, (*known, "module_input_name", "module_output_name"), where)
    reads = _feature(config, "module_input_name", SENTENCE, where)
    return Dense(
        inputs,
        outputs,
        bias=bool(config.get("bias", True)),
        activation=_activation(config.get("activation_function", "torch.nn.modules.activation.Tanh"), where),
        residual=bool(config.get("use_residual", False)),
        reads=reads,
        writes=_feature(config, "module_output_name", reads, where),
    )


def _activation(name: Any, where: str) -> nn.Module:
    """Return an activation of torch by its dotted name; nothing else is imported."""
    kind = getattr(nn, _class_name(str(name)), None)
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)) or str(name) not in (
        f"{kind.__module__}.{kind.__name__}",
        f"torch.nn.{kind.__name__}",
    ):
        raise TeacherError(f"activation_function in {where} must be a class of torch.nn; found {name!r}.")
    return kind()


def _read_layer_norm(config: dict[str, Any] | None, where: str) -> nn.Module:
    width = _required(config, "dimension", where)
    _check_keys(config or {}, ("dimension",), where)
    return LayerNorm(width)


def _read_normalize(config: dict[str, Any] | None, where: str) -> nn.Module:
    config = config or {}
    _check_keys(config, ("module_input_name", "module_output_name"), where)
    reads = _feature(config, "module_input_name", SENTENCE, where)
    return Normalize(reads, _feature(config, "module_output_name", reads, where))


def _read_dropout(config: dict[str, Any] | None, where: str) -> nn.Module:
    config = config or {}
    _check_keys(config, ("dropout",), where)
    return Dropout(float(config.get("dropout", 0.2)))


def _read_logit_score(config: dict[str, Any] | None, where: str) -> None:
    """Check that a score is made of the logits of tokens: it is carried as it is, for the vocabulary is."""
    if config is None:
        raise TeacherError(f"{where} is missing. Fetch the folder again.")


_READERS: dict[str, Callable[[dict[str, Any] | None, str], nn.Module | None]] = {
    "Pooling": _read_pooling,
    "Dense": _read_dense,
    "Normalize": _read_normalize,
    "LayerNorm": _read_layer_norm,
    "Dropout": _read_dropout,
    "LogitScore": _read_logit_score,
}
"""By the name of a class of sentence-transformers, what makes its module of its config."""


def _load_weights(module: nn.Module, path: str, files: _Files) -> None:
    expected = module.state_dict()
    if not expected:
        return
    safetensors = files.find(f"{path}/model.safetensors")
    file = safetensors or files.find(f"{path}/pytorch_model.bin")
    if file is None:
        raise TeacherError(f"The weights of the module {path} of {files.name} are missing. Fetch the folder again.")
    with unreadable_as(TeacherError, f"The weights of the module {path} of {files.name} cannot be read"):
        tensors = load_file(file) if safetensors else torch.load(file, map_location="cpu", weights_only=True)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if shapes != {name: tuple(tensor.shape) for name, tensor in expected.items()}:
        raise TeacherError(
            f"The weights of the module {path} of {files.name} must be "
            f"{ {name: tuple(tensor.shape) for name, tensor in expected.items()} }; found {shapes}. Fetch the folder again."
        )
    module.to(next(iter(tensors.values())).dtype).load_state_dict(tensors)


# The settings, and the modules together


def _read_settings(files: _Files) -> SentenceFiles:
    model_config = files.read_json(MODEL_CONFIG_NAME, dict)
    kind = (model_config or {}).get("model_type", "SentenceTransformer")
    if kind not in ("SentenceTransformer", "CrossEncoder"):
        raise TeacherError(
            f"{files.name} holds a {kind}, whose outputs are no single vector or score; it must be a SentenceTransformer or a "
            f"CrossEncoder. {_ADVICE}"
        )
    for file in TRANSFORMER_CONFIG_NAMES:
        config = files.read_json(file, dict)
        if config is not None:
            break
    else:
        return SentenceFiles(model_config)
    if "modality_config" in config and kind == "SentenceTransformer":
        named = (config["modality_config"], config.get("module_output_name"))
        if (
            named != (_TEXT_ONLY, TOKENS)
            or config.get("transformer_task", "feature-extraction") != "feature-extraction"
        ):
            raise TeacherError(
                f"The transformer of {files.name} must read texts and return {TOKENS}, its last hidden states; its {file} has "
                f"{named!r:.200}. {_ADVICE}"
            )
    if any(config.get(key) is not None for key in _MULTI_VECTOR):
        raise TeacherError(f"{file} of {files.name} is that of a model with a vector per token. {_ADVICE}")
    if config.get("tokenizer_name_or_path"):
        raise TeacherError(
            f"{file} of {files.name} names a tokenizer elsewhere, {config['tokenizer_name_or_path']!r}; it must be in the "
            "folder."
        )
    kept = dict(config)
    for key in _ARGUMENTS:
        if isinstance(kept.get(key), dict):  # as sentence-transformers itself, whatever the file allows
            kept[key] = {
                name: value for name, value in kept[key].items() if name not in ("trust_remote_code", "token")
            }
    return SentenceFiles(model_config, kept, file)


def _check_chain(modules: SentenceModules, name: str) -> int | None:
    """Check that each module reads what the ones before it wrote; return the width of the hidden states."""
    widths: dict[str, int | None] = {TOKENS: None}
    hidden_size: int | None = None
    for entry in modules.entries:
        module: Any = entry.module
        if module is None:
            continue
        reads = TOKENS if isinstance(module, Pooling) else getattr(module, "reads", SENTENCE)
        writes = SENTENCE if isinstance(module, Pooling) else getattr(module, "writes", SENTENCE)
        if reads not in widths:
            raise TeacherError(
                f"The module {entry.path} of {name} reads {reads}, which no module before it writes. {_ADVICE}"
            )
        size = getattr(module, "in_features", None)
        if size is not None and widths[reads] not in (None, size):
            raise TeacherError(
                f"The module {entry.path} of {name} reads {size} directions, and is passed {widths[reads]}. Fetch the folder "
                "again."
            )
        if reads == TOKENS and hidden_size is None:
            hidden_size = size
        widths[writes] = getattr(module, "out_features", widths[reads])
    if not modules.is_cross_encoder and SENTENCE not in widths:
        raise TeacherError(
            f"No module of {name} writes a {SENTENCE}: it has a vector per token, and must have one per text (Pooling). "
            f"{_ADVICE}"
        )
    return hidden_size
