"""How models, datasets and files of this machine are called in what may be published: without a path.

Every file that hf_guide writes and a user may upload takes its names from here: a folder is known by the last part of
its path (and, next to it, by a fingerprint), a Hub id by itself.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_PRIVATE_KEYS = frozenset({"_name_or_path", "token", "hub_token", "use_auth_token", "cache_dir"})
"""Entries that say where a model was found and with what right, and nothing of the model."""


def is_local(name: str) -> bool:
    """Whether a name is a path on this machine, and not an id on the Hub."""
    return name.startswith((".", "~")) or os.path.isabs(name) or os.path.exists(name)


def public_name(name: str) -> str:
    """Return a name without the path that leads to it.

    >>> public_name("org/name")
    'org/name'
    >>> public_name("/home/someone/models/my-teacher")
    'my-teacher'

    A snapshot in the Hub's cache is called by the id it was downloaded from.
    """
    if not is_local(name):
        return name
    path = Path(os.path.abspath(os.path.expanduser(name)))
    repository = path.parent.parent.name
    if path.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.removeprefix("models--").replace("--", "/")
    return path.name or "model"


def public_value(value: Any) -> Any:
    """Return a text, or all texts of a list or mapping, as `public_name` has them; entries with tokens are left out."""
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
    """Return a config's mapping, nested ones included, without the entries that say where the model was found."""
    if isinstance(config, Mapping):
        return {key: without_private_keys(entry) for key, entry in config.items() if key not in _PRIVATE_KEYS}
    if isinstance(config, list):
        return [without_private_keys(entry) for entry in config]
    return config
