"""Names of local models, datasets and files for publication: without the path.

All files that hf_guide writes and a user may upload use these names: a folder is named by the last component of its path
(and identified by a fingerprint), a Hub model by its id.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_PRIVATE_KEYS = frozenset({"_name_or_path", "token", "hub_token", "use_auth_token", "cache_dir"})
"""Config entries about where a model was loaded from and with which token, not about the model."""


def is_local(name: str) -> bool:
    """Return whether a name is a path on this machine rather than a Hub id."""
    return name.startswith((".", "~")) or os.path.isabs(name) or os.path.exists(name)


def public_name(name: str) -> str:
    """Return a name without its path.

    >>> public_name("org/name")
    'org/name'
    >>> public_name("/home/someone/models/my-teacher")
    'my-teacher'

    A snapshot in the Hub's cache is named by its Hub id.
    """
    if not is_local(name):
        return name
    path = Path(os.path.abspath(os.path.expanduser(name)))
    repository = path.parent.parent.name
    if path.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.removeprefix("models--").replace("--", "/")
    return path.name or "model"


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
