"""Names of local models, datasets and files for publication: without the path.

All files that hf_guide writes and a user may upload use these names: a folder is named by the last component of its path
(and identified by a fingerprint), a Hub model by its id.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

_PRIVATE_KEYS = frozenset({"_name_or_path", "token", "hub_token", "use_auth_token", "cache_dir"})
"""Config entries about where a model was loaded from and with which token, not about the model."""


def is_local(name: str) -> bool:
    """Return whether a name is a path on this machine rather than a Hub id."""
    return name.startswith((".", "~")) or os.path.isabs(name) or os.path.exists(name)


Source = Literal["hub", "local"]
"""Where a model was loaded from: a repository of the Hub, or a folder or the memory of this machine."""


def name_source(name: str, revision: str | None = None) -> Source | None:
    """Return where a model was loaded from, to be recorded at that time: its folder may be moved later.

    Args:
        name: Hub id, folder, or name of a class.
        revision: Its commit, which only the Hub gives.

    Returns:
        None where it is not known: a name of two parts without a commit, and no such folder.
    """
    if is_local(name):
        return "local" if _snapshot_repo_id(name) is None else "hub"
    if revision is not None:
        return "hub"
    return None if "/" in name else "local"


def absolute_name(name: str) -> str:
    """Return the absolute path of a folder, by which it is found from another working directory too, or another name."""
    return os.path.abspath(os.path.expanduser(name)) if is_local(name) else name


def to_repo_id(name: str, revision: str | None, source: Source | None = None) -> str | None:
    """Return a public name if it is a Hub id, or None if it is the name of a folder or a class.

    Where the source is not recorded, a name without an owner counts as an id only if the Hub returned a commit for it.

    >>> to_repo_id("org/name", None), to_repo_id("LlamaForCausalLM", None), to_repo_id("models/teacher", None, "local")
    ('org/name', None, None)
    """
    if source == "local" or (source is None and "/" not in name and revision is None):
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def public_name(name: str, source: Source | None = None) -> str:
    """Return a name without its path; without a `source`, what exists on this machine is a path.

    >>> public_name("org/name")
    'org/name'
    >>> public_name("/home/someone/models/my-teacher")
    'my-teacher'

    A snapshot in the Hub's cache is named by its Hub id.
    """
    if source != "local" and not is_local(name):
        return name
    repo_id = _snapshot_repo_id(name)
    if repo_id is not None or source == "hub":
        return repo_id or name
    return Path(os.path.abspath(os.path.expanduser(name))).name or "model"


def _snapshot_repo_id(name: str) -> str | None:
    """Return the Hub id of a snapshot's folder in the Hub's cache; None for other names."""
    path = Path(os.path.abspath(os.path.expanduser(name)))
    repository = path.parent.parent.name
    if path.parent.name != "snapshots" or not repository.startswith("models--"):
        return None
    return repository.removeprefix("models--").replace("--", "/")


def public_value(value: Any) -> Any:
    """Apply `public_name` to a string, or to all strings of a list or mapping; entries with tokens are removed."""
    if isinstance(value, os.PathLike):
        return public_name(os.fspath(value))
    if isinstance(value, str):
        return public_name(value) if value else value
    if isinstance(value, Mapping):
        return {key: public_value(entry) for key, entry in value.items() if key not in _PRIVATE_KEYS}
    if isinstance(value, (list, tuple)):
        return type(value)(public_value(entry) for entry in value)
    return value


def without_private_keys(config: Any) -> Any:
    """Return a config mapping, nested ones included, without entries about where the model was loaded from."""
    if isinstance(config, Mapping):
        return {key: without_private_keys(entry) for key, entry in config.items() if key not in _PRIVATE_KEYS}
    if isinstance(config, list):
        return [without_private_keys(entry) for entry in config]
    return config
