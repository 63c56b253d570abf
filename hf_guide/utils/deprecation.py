"""Accept the old names of renamed options for one release, with a warning that states the new name.

Does: translate keyword arguments of a function or dataclass, the entries of a mapping (YAML, JSON) and values that were
renamed; raise for an option that was removed, with the reason. Does not: keep an old behavior alive.
"""

import argparse
import dataclasses
import functools
import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from hf_guide.errors import OptionError

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class RenamedOptions:
    """Names and values that an earlier release used.

    Args:
        names: Old option name -> new option name.
        values: New option name -> {old value: new value}.
        conversions: Old option name -> function that converts its value to the new option's, such as a fraction into a
            percentage.
        removed: Old option name -> why it is gone and what to do instead, as the end of a sentence.
        moved: Old option name -> a function that puts its value into the translated options, which are passed to it, and
            returns what to write instead.

    Example:
        >>> import warnings
        >>> renamed = RenamedOptions(
        ...     names={"layers": "layer_selection"}, values={"layer_selection": {"even": "uniform"}}
        ... )
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     options = renamed.translate({"layers": "even"}, "InitializationConfig")
        >>> options, str(caught[0].message)
        ({'layer_selection': 'uniform'}, "InitializationConfig: 'layers' is deprecated; use 'layer_selection'.")
    """

    names: Mapping[str, str] = field(default_factory=dict)
    values: Mapping[str, Mapping[Any, Any]] = field(default_factory=dict)
    removed: Mapping[str, str] = field(default_factory=dict)
    moved: Mapping[str, Callable[[dict[str, Any], Any], str]] = field(default_factory=dict)
    conversions: Mapping[str, Callable[[Any], Any]] = field(default_factory=dict)

    def translate(self, options: Mapping[str, Any], owner: str, stacklevel: int = 3) -> dict[str, Any]:
        """Return `options` under their new names and values; warn (FutureWarning) for each old one.

        Raises:
            OptionError: An option was removed, or is given under both its old and its new name.
        """
        translated = {}
        for name, value in options.items():
            if name in self.removed:
                raise OptionError(f"{owner}: {name!r} was removed: {self.removed[name]}")
            new_name = self.names.get(name, name)
            if new_name != name:
                if new_name in options:
                    raise OptionError(
                        f"{owner}: {new_name!r} and its deprecated name {name!r} are both given; keep {new_name!r}."
                    )
                warn_renamed(owner, name, new_name, stacklevel)
                value = self.conversions.get(name, lambda same: same)(value)
            translated[new_name] = self._new_value(new_name, value, owner, stacklevel)
        for name in [name for name in self.moved if name in translated]:
            replacement = self.moved[name](translated, translated.pop(name))
            warnings.warn(f"{owner}: {name!r} is deprecated; use {replacement}.", FutureWarning, stacklevel=stacklevel)
        return translated

    def _new_value(self, name: str, value: Any, owner: str, stacklevel: int) -> Any:
        if not isinstance(value, str) or value not in self.values.get(name, {}):
            return value
        new_value = self.values[name][value]
        warnings.warn(
            f"{owner}: {name}={value!r} is deprecated; use {new_value!r}.", FutureWarning, stacklevel=stacklevel + 1
        )
        return new_value


def warn_renamed(owner: str, old: str, new: str, stacklevel: int = 2) -> None:
    """Warn that `old` is deprecated and `new` replaces it."""
    warnings.warn(f"{owner}: {old!r} is deprecated; use {new!r}.", FutureWarning, stacklevel=stacklevel + 1)


def with_renamed_options(renamed: RenamedOptions) -> Callable[[type[T]], type[T]]:
    """Decorate a dataclass: its constructor takes old names too, and an old attribute can still be read and set.

    Place it above `@dataclass`. Both uses warn (FutureWarning); removed options raise OptionError. Attributes whose values
    are converted have no alias: their values would not be comparable.
    """

    def decorate(cls: type[T]) -> type[T]:
        construct = cls.__init__

        @functools.wraps(construct)
        def __init__(self: T, *args: Any, **kwargs: Any) -> None:  # noqa: N807
            construct(self, *args, **renamed.translate(kwargs, cls.__name__))

        setattr(cls, "__init__", __init__)  # noqa: B010
        setattr(cls, "_renamed_options", renamed)  # noqa: B010
        for old, new in renamed.names.items():
            if not hasattr(cls, old) and old not in renamed.conversions:
                setattr(cls, old, _deprecated_attribute(cls.__name__, old, new))
        return cls

    return decorate


def renamed_options_of(*classes: type) -> RenamedOptions:
    """Return the old names of all options of dataclasses that `with_renamed_options` decorates, for files and flags."""
    merged: dict[str, dict[str, Any]] = {part.name: {} for part in dataclasses.fields(RenamedOptions)}
    for cls in classes:
        for part, entries in merged.items():
            entries.update(getattr(getattr(cls, "_renamed_options", RenamedOptions()), part))
    return RenamedOptions(**merged)


def add_renamed_flags(parser: argparse.ArgumentParser, renamed: RenamedOptions) -> None:
    """Let a parser accept the old flags of its options, hidden from its help.

    A namespace holds an old name only if its flag was used: pass the values through `translate`, or to the constructor of a
    dataclass that `with_renamed_options` decorates.
    """
    actions: dict[str, list[argparse.Action]] = {}
    for action in parser._actions:
        actions.setdefault(action.dest, []).append(action)
    for old, new in renamed.names.items():
        for action in actions.get(new, []):
            hidden: dict[str, Any] = {"dest": old, "default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
            flags = [f"--{old.replace('_', '-')}", f"--{old}"]
            if isinstance(action, argparse.BooleanOptionalAction):
                parser.add_argument(flags[0], action=argparse.BooleanOptionalAction, **hidden)
            elif isinstance(action, argparse._StoreFalseAction):
                negated = [flag.replace("--", "--no-", 1) for flag in flags[:1]] + [f"--no_{old}"]
                parser.add_argument(*dict.fromkeys(negated), action="store_false", **hidden)
            elif action.nargs == 0:
                parser.add_argument(*dict.fromkeys(flags), action=type(action), **hidden)
            else:
                hidden["action"] = type(action)
                hidden |= {name: getattr(action, name) for name in ("type", "nargs", "const", "choices", "metavar")}
                parser.add_argument(*dict.fromkeys(flags), **hidden)
    for old in renamed.moved:
        parser.add_argument(f"--{old}", type=_json_or_text, default=argparse.SUPPRESS, help=argparse.SUPPRESS)


def _json_or_text(text: str) -> Any:
    """Return a value as JSON has it; other text is a string."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def with_renamed_parameters(renamed: RenamedOptions) -> Callable[[F], F]:
    """Decorate a function or method: it takes the old names of its keyword parameters too, with a warning."""

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            return function(*args, **renamed.translate(kwargs, function.__qualname__))

        return call  # type: ignore[return-value]

    return decorate


def _deprecated_attribute(owner: str, old: str, new: str) -> property:
    def read(self: Any) -> Any:
        warn_renamed(owner, old, new, stacklevel=2)
        return getattr(self, new)

    def write(self: Any, value: Any) -> None:
        warn_renamed(owner, old, new, stacklevel=2)
        setattr(self, new, value)

    return property(read, write, doc=f"Deprecated: use `{new}`.")
