"""References to code in a saved model's files, which loading it would run: `auto_map` and `custom_pipelines`.

A reference in a folder that hf_guide writes names a class in a file of that folder. All others are dropped: one that a stock
class inherited from its teacher's config would make users run code that the model does not need, with
`trust_remote_code=True`, and code of another repository can change after the student was published.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hf_guide.utils.files import atomic_write_text
from hf_guide.utils.public_names import is_local, public_name

CONFIG_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "adapter_config.json",
)
"""The JSON files of a saved model that Transformers and PEFT read."""

_CODE_KEYS = ("auto_map", "custom_pipelines")
# Entries that older versions of Transformers and PEFT fill with a path or a token.
_PATH_KEYS = (
    "_name_or_path",
    "name_or_path",
    "base_model_name_or_path",
    "tokenizer_file",
    "vocab_file",
    "merges_file",
    "special_tokens_map_file",
    "cache_dir",
)
_TOKEN_KEYS = ("token", "use_auth_token", "hub_token")


def has_code_references(values: Any) -> bool:
    """Return whether a config, as a mapping, or a nested config refers to code.

    Example:
        >>> has_code_references({"text_config": {"auto_map": {"AutoConfig": "configuration.MyConfig"}}})
        True
    """
    if not isinstance(values, Mapping):
        return False
    return any(values.get(key) for key in _CODE_KEYS) or any(has_code_references(value) for value in values.values())


def without_code_references(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config's values, nested configs included, without references to code."""
    return {
        key: without_code_references(value) if isinstance(value, Mapping) else value
        for key, value in values.items()
        if key not in _CODE_KEYS
    }


def local_code_references(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return the entries of the `auto_map` in a `config.json` that name the model's own class in a file of `folder`.

    The result is empty for a stock class: the model's class, the first of `architectures`, must be among the named classes.
    """
    from transformers import CONFIG_MAPPING  # imported late: the command line imports this module to print its help

    references = config.get("auto_map")
    if not isinstance(references, Mapping):
        return {}
    local = {auto: reference for auto, reference in references.items() if _is_local_reference(reference, folder)}
    models = {_referenced_class(reference) for auto, reference in local.items() if auto.startswith("AutoModel")}
    architectures = config.get("architectures")
    architecture = architectures[0] if isinstance(architectures, list) and architectures else None
    if architecture not in models and (models or config.get("model_type") in CONFIG_MAPPING):
        return {}
    return local


def clean_saved_folder(folder: Path) -> None:
    """Remove references to code outside of `folder`, local paths and tokens from the configs saved in it.

    Files without any are not written, nor are files that are not JSON.
    """
    for name in CONFIG_FILES:
        path = folder / name
        if not path.is_file():
            continue
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            continue
        if not isinstance(values, dict):
            continue
        cleaned = _without_paths_and_tokens(_clean_code_references(values, folder, name))
        if cleaned != values:
            atomic_write_text(path, json.dumps(cleaned, indent=2, ensure_ascii=False) + "\n")


def drop_code_references(holder: Any) -> None:
    """Drop the code references of a stock tokenizer, processor or config in memory, so that they are not saved."""
    for part in _iter_components(holder):
        if not type(part).__module__.startswith("transformers."):
            continue
        for name in (*_CODE_KEYS, "_auto_map"):
            if name in vars(part):
                delattr(part, name)
        if isinstance(getattr(part, "init_kwargs", None), dict):
            part.init_kwargs.pop("auto_map", None)


def _iter_components(holder: Any) -> Iterator[Any]:
    if holder is None:
        return
    yield holder
    for name in getattr(holder, "attributes", None) or ():
        if isinstance(name, str) and getattr(holder, name, None) is not None:
            yield getattr(holder, name)


def _clean_code_references(values: dict[str, Any], folder: Path, name: str) -> dict[str, Any]:
    if not has_code_references(values):
        return values
    cleaned = without_code_references(values)
    references = values.get("auto_map")
    if name == "config.json":
        local = local_code_references(values, folder)
    elif isinstance(references, Mapping):
        local = {auto: reference for auto, reference in references.items() if _is_local_reference(reference, folder)}
    else:
        local = {"AutoTokenizer": references} if references and _is_local_reference(references, folder) else {}
    if local:
        cleaned["auto_map"] = local
    pipelines = values.get("custom_pipelines")
    if isinstance(pipelines, Mapping):
        local_pipelines = {
            task: entry
            for task, entry in pipelines.items()
            if isinstance(entry, Mapping) and _is_local_reference(entry.get("impl"), folder)
        }
        if local_pipelines:
            cleaned["custom_pipelines"] = local_pipelines
    return cleaned


def _without_paths_and_tokens(values: dict[str, Any]) -> dict[str, Any]:
    cleaned: dict[str, Any] = {}
    for key, value in values.items():
        if key in _TOKEN_KEYS:
            continue
        if key in _PATH_KEYS and isinstance(value, str) and value and is_local(value):
            if key == "base_model_name_or_path":
                base = public_name(value)  # "./" so that it is not taken for a Hub id
                cleaned[key] = base if "/" in base else f"./{base}"
            continue
        cleaned[key] = value
    return cleaned


def _is_local_reference(reference: Any, folder: Path) -> bool:
    """Return whether a reference, "module.Class" or several of which some may be None, names classes in files of `folder`."""
    if isinstance(reference, (list, tuple)):
        named = [each for each in reference if each is not None]
        return bool(named) and all(_is_local_reference(each, folder) for each in named)
    if not isinstance(reference, str) or "--" in reference or reference.count(".") != 1:
        return False
    module, class_name = reference.split(".")
    path = folder / f"{module}.py"
    if not module.isidentifier() or not path.is_file():
        return False
    return re.search(rf"\b{re.escape(class_name)}\b", path.read_text(encoding="utf-8", errors="replace")) is not None


def _referenced_class(reference: Any) -> str | None:
    return reference.rpartition(".")[2] if isinstance(reference, str) else None
