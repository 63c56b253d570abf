"""Whether a student is what was asked for: every override is found in its config and in the model that is built of it.

A config class takes any keyword, and some families compute a size from others (`hidden_size` from Swin's `embed_dim`): what is
then asked for under the computed name changes the config's text and not the model.
"""

import copy
import dataclasses
import inspect
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from hf_guide.errors import HfGuideError, OptionError, ShapeError
from hf_guide.initialization.requested_sizes import is_size
from hf_guide.initialization.student_config import derive_student_config
from hf_guide.models.model_classes import meta_model
from hf_guide.models.module_signature import module_signature
from hf_guide.models.tiny_models import MODEL_ERRORS

_NO_ENTRY = object()
_CONSTRUCTION_METHODS = ("__init__", "_init_weights")


def check_config_agrees(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, teacher: PreTrainedConfig
) -> None:
    """Refuse a config in which an entry, other than the teacher's, contradicts what its class computes for it from the others.

    An entry that the model reads all the same is none of these: what is built of it is another model.

    Raises:
        ShapeError: names the entry, both values, and the entries that it is computed from.
    """
    for path, part, had in _nested_configs(config, teacher):
        for name, computed in _computed(part).items():
            held = part.__dict__.get(name, _NO_ENTRY)
            if _plain(held) in (_plain(computed), _plain(had.__dict__.get(name, _NO_ENTRY))):
                continue
            if held is _NO_ENTRY or not _is_number(computed) or not _is_number(held):
                continue
            other = copy.deepcopy(config)
            setattr(_parent(other, (*path, name)), name, copy.deepcopy(computed))
            if _structure(model_class, config) != _structure(model_class, other):
                continue
            raise ShapeError(
                f"{'.'.join((*path, name))}={held!r} was asked for, but {type(part).__name__} computes {name}={computed!r} "
                f"and the model is built of that: {_what_to_set(part, name)}"
            )


def check_computed_overrides(
    model_class: type[PreTrainedModel], teacher: PreTrainedConfig, overrides: Mapping[str, Any]
) -> None:
    """Refuse overrides of sizes that the config's class computes from other entries and that the model does not read.

    It needs no student: so the reason is named before a choice of blocks can fail for want of what was asked for.

    Raises:
        ShapeError: as `check_config_agrees`.
    """
    config = copy.deepcopy(teacher)
    for path, value in _flatten_overrides(overrides, teacher):
        parent = _parent(config, path)
        if is_size(path[-1]) and path[-1] not in _declared(parent):
            parent.__dict__[path[-1]] = copy.deepcopy(value)  # some families forbid setting what they compute
    check_config_agrees(model_class, config, teacher)


def _nested_configs(
    config: PreTrainedConfig, teacher: PreTrainedConfig, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], PreTrainedConfig, PreTrainedConfig]]:
    """Give a config and those nested in it, with the names that lead to each and the teacher's of the same names."""
    yield path, config, teacher
    for name, value in vars(config).items():
        had = teacher.__dict__.get(name)
        if isinstance(value, PreTrainedConfig) and isinstance(had, PreTrainedConfig):
            yield from _nested_configs(value, had, (*path, name))


def check_overrides_hold(
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    teacher: PreTrainedConfig,
    overrides: Mapping[str, Any],
) -> None:
    """Refuse overrides that are not in the student's config, are lost when it is saved, or change nothing in the model.

    Args:
        overrides: as the user gave them, nested configs as mappings.

    Raises:
        ShapeError: an override that the class replaced by another value, or computes.
        OptionError: a size that the model does not have.
    """
    check_config_agrees(model_class, config, teacher)
    asked = list(_flatten_overrides(overrides, config))
    if not asked:
        return
    reloaded = _round_trip(config, teacher)
    for path, value in asked:
        for held, when in ((_entry(config, path), "holds"), (_entry(reloaded, path), "holds, once saved and loaded,")):
            if _is_number(value) and _plain(held) != _plain(value):
                raise ShapeError(
                    f"{'.'.join(path)}={value!r} was asked for, but {type(config).__name__} {when} "
                    f"{'nothing' if held is _NO_ENTRY else repr(held)} under this name: "
                    f"{_what_to_set(_parent(config, path), path[-1])}"
                )
    sizes = [
        (path, value)
        for path, value in asked
        if is_size(path[-1]) and _is_number(value) and _plain(_entry(teacher, path)) != _plain(value)
    ]
    if not sizes:
        return
    built = _structure(model_class, config)
    for path, value in sizes:
        if built is None or built != _structure(model_class, _with_entry_of(teacher, config, path)):
            continue
        if built != _requested_structure(model_class, teacher, _without_override(overrides, path, teacher)):
            continue  # it acts by what the class derives from it
        if path[-1] in _names_read_at_runtime(model_class, config):
            continue  # ALBERT runs one block as often as the config says
        raise OptionError(
            f"{'.'.join(path)}={value!r} changes nothing in a {model_class.__name__} of this config: the model "
            "has no such size, or takes it from another entry. Leave it out, or override the entry that the model reads."
        )


def _flatten_overrides(
    overrides: Mapping[str, Any], config: PreTrainedConfig, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Give every override with the names that lead to it, its own as the family has it."""
    for name, value in overrides.items():
        real = config.attribute_map.get(name, name)
        nested = config.__dict__.get(real)
        if isinstance(nested, PreTrainedConfig) and isinstance(value, Mapping):
            yield from _flatten_overrides(value, nested, (*path, real))
        else:
            yield (*path, real), value


def _parent(config: PreTrainedConfig, path: tuple[str, ...]) -> PreTrainedConfig:
    for name in path[:-1]:
        config = getattr(config, name)
    return config


def _entry(config: PreTrainedConfig, path: tuple[str, ...]) -> Any:
    parent = _parent(config, path)
    if path[-1] == "num_labels":
        return parent.num_labels
    return parent.__dict__.get(parent.attribute_map.get(path[-1], path[-1]), _NO_ENTRY)


def _without_override(overrides: Mapping[str, Any], path: tuple[str, ...], config: PreTrainedConfig) -> dict[str, Any]:
    """Return `overrides` without the one that `path`, of the family's own names, leads to."""
    left: dict[str, Any] = {}
    for name, value in overrides.items():
        real = config.attribute_map.get(name, name)
        if real != path[0]:
            left[name] = value
        elif len(path) > 1:
            left[name] = _without_override(value, path[1:], getattr(config, real))
    return left


def _requested_structure(
    model_class: type[PreTrainedModel], teacher: PreTrainedConfig, overrides: Mapping[str, Any]
) -> Any:
    """Return the structure of the student that `overrides` ask for; None where there is none."""
    try:
        return _structure(model_class, derive_student_config(teacher, overrides))
    except HfGuideError:
        return None


def _with_entry_of(teacher: PreTrainedConfig, config: PreTrainedConfig, path: tuple[str, ...]) -> PreTrainedConfig:
    """Return a copy of `config` in which one entry is the teacher's."""
    changed = copy.deepcopy(config)
    had = _entry(teacher, path)
    parent = _parent(changed, path)
    if had is not _NO_ENTRY:
        setattr(parent, path[-1], copy.deepcopy(had))
    return changed


def _structure(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> Any:
    """Return the modules, settings and shapes of the model that a config makes; None where it makes none."""
    try:
        return module_signature(meta_model(model_class, config))
    except MODEL_ERRORS:
        return None


def _names_read_at_runtime(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> set[str]:
    """Return the names that the model's own code reads other than when it is built, config entries among them."""
    model = meta_model(model_class, config)
    classes = {base for module in model.modules() for base in type(module).__mro__}
    own = [base for base in classes if base.__module__.startswith(("transformers.models.", "transformers_modules."))]
    functions = [
        inspect.unwrap(value)
        for base in own
        for name, value in vars(base).items()
        if name not in _CONSTRUCTION_METHODS
    ]
    return {name for each in functions if inspect.isfunction(each) for name in each.__code__.co_names}


def _round_trip(config: PreTrainedConfig, teacher: PreTrainedConfig) -> PreTrainedConfig:
    """Return the config that is read again from what `save_pretrained` writes, or itself where not even the teacher's is.

    Raises:
        ShapeError: it cannot be read, though the teacher's can.
    """
    try:
        return _save_and_load(config)
    except MODEL_ERRORS as error:
        try:
            _save_and_load(teacher)
        except MODEL_ERRORS:
            return config
        raise ShapeError(
            f"The student's {type(config).__name__} cannot be loaded once it is saved: {error}"
        ) from error


def _save_and_load(config: PreTrainedConfig) -> PreTrainedConfig:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        config.to_json_file(path)
        return type(config).from_json_file(path)


def _computed(config: PreTrainedConfig) -> dict[str, Any]:
    """Return what the class computes, from the entries it declares, for entries that it does not declare."""
    declared = _declared(config)
    extra = {
        name for name in vars(config) if name not in declared and not name.startswith("_") and is_size(name)
    } - config.attribute_map.keys()
    if not extra:
        return {}
    rebuilt = _rebuilt(config, {})
    return {} if rebuilt is None else {name: value for name, value in vars(rebuilt).items() if name in extra}


def _what_to_set(config: PreTrainedConfig, name: str) -> str:
    """Return advice that names the declared entries which an entry is computed from."""
    sources = []
    before = None if (rebuilt := _rebuilt(config, {})) is None else rebuilt.__dict__.get(name)
    for field in _declared(config):
        value = config.__dict__.get(field)
        if not is_size(field) or field == name or not _is_number(value):
            continue
        other = [*value[:-1]] if isinstance(value, (list, tuple)) else 2 * (value or 0)
        changed = _rebuilt(config, {field: other}) if other else None
        if changed is not None and changed.__dict__.get(name) != before:
            sources.append(field)
    if not sources:
        return "leave it out, or set the entries that the family computes it from."
    return f"set {' and '.join(sources)} instead, which it is computed from."


def _rebuilt(config: PreTrainedConfig, changes: Mapping[str, Any]) -> PreTrainedConfig | None:
    values = {
        name: value for name in _declared(config) if (value := config.__dict__.get(name, _NO_ENTRY)) is not _NO_ENTRY
    }
    try:
        return type(config)(**copy.deepcopy({**values, **changes}))
    except MODEL_ERRORS:
        return None


def _declared(config: PreTrainedConfig) -> list[str]:
    fields = (field.name for field in dataclasses.fields(config) if field.init)
    return [name for name in fields if not name.startswith("_") and name != "transformers_version"]


def _is_number(value: Any) -> bool:
    """Whether a value is a number or a list of numbers, which can be compared."""
    if isinstance(value, (list, tuple)):
        return all(_is_number(each) for each in value)
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _plain(value: Any) -> Any:
    return [_plain(each) for each in value] if isinstance(value, (list, tuple)) else value
