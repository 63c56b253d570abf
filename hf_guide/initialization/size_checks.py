"""Check the sizes that a student is asked to have: against its teacher's, and in the model that is built of its config.

Two kinds of checks. Before anything is built: whole numbers, positive, not larger than the teacher's; at least as many
experts as each token is routed to. After the config is derived: every override is in the config, survives saving, and acts
on the model. A config class takes any keyword, and some families compute a size from others (`hidden_size` from Swin's
`embed_dim`): a request under the computed name would change the config's text and not the model.
"""

import copy
import dataclasses
import functools
import inspect
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from hf_guide.errors import HfGuideError, OptionError, ShapeError
from hf_guide.initialization.student_config import derive_student_config, tuples_to_lists
from hf_guide.models.model_classes import meta_model
from hf_guide.models.modes import on_meta_device
from hf_guide.models.module_signature import config_signature
from hf_guide.models.tiny_models import MODEL_ERRORS
from hf_guide.utils.by_value import ByValue

_SIZE = re.compile(
    r"(^|_)(hidden_sizes?|intermediate_size(_mlp)?|ffn_(hidden_)?(size|dim)|embedding_size|embed_dims?|proj_dim"
    r"|d_(model|ff|kv|head|inner|embed)|n_(embd|inner|heads?|layers?)|layers|blocks|depths?|heads?|dim|lora_rank|experts"
    r"|(embed_dim|blocks|num_attention_heads)_per_stage|block_sizes|lru_width)$"
)
_NOT_A_SIZE = re.compile(
    r"(every_n|only|rope\w*|window|shared|predict|hash|moe|skip|dense|cross_attention|out|used|null|global|attention|sparse|hub|"
    r"mtp|norm|unk|first|last|expert|selected|keep|feature|fusion|mem|aux|topk|random|local|ahead|backward|source|target|extract|lm)"
    r"_?(layers|blocks|head)$|(max|min)_depth$|loss"
)
_POSITIVE = re.compile(
    r"(^|_)(vocab_size|position_embeddings|n_positions|image_size|patch_size|num_channels|window_size)$"
)
MAX_SIZE_RATIO = 4
"""Times the teacher's size, above which nothing is built; slightly larger sizes raise later, by name."""

_DEPTH = re.compile(r"(^|_)(layers?|blocks)$")

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")
_EXPERTS_PER_TOKEN = (
    *("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_k", "moe_top_k"),
    *("num_selected_experts", "experts_per_token"),
)


def is_size(name: str) -> bool:
    """Return whether a config field of this name is the size of an axis or a number of blocks."""
    return _SIZE.search(name) is not None and _NOT_A_SIZE.search(name) is None


def check_requested_sizes(
    teacher: PreTrainedConfig, overrides: Mapping[str, Any], *, deepest: int = 0, part: str = ""
) -> None:
    """Check the sizes among `overrides`, nested configs included, against the teacher's.

    Args:
        deepest: how many blocks a stack may have where the user lists the teacher's block for each; 0 without such a list.
        part: the name of the nested config, for errors.

    Raises:
        OptionError: A size that is not a whole number.
        ShapeError: A size below 1 or above the teacher's, or a list of sizes of another length.
    """
    for name, value in overrides.items():
        real = teacher.attribute_map.get(name, name)
        teacher_value = teacher.__dict__.get(real)
        if isinstance(teacher_value, PreTrainedConfig) and isinstance(value, Mapping):
            check_requested_sizes(teacher_value, value, deepest=deepest, part=f"{part}{name}.")
            continue
        if name == "num_labels" and value is not None:
            _check_number(part + name, value, teacher.num_labels or 1, bounded=False)
            continue
        sized = is_size(name) or is_size(real)
        if (
            value is None
            or not (sized or _POSITIVE.search(real))
            or value == teacher_value
            and type(value) is type(teacher_value)
        ):
            continue
        shown = part + name
        if (
            isinstance(teacher_value, (list, tuple))
            and teacher_value
            and all(isinstance(each, int) for each in teacher_value)
        ):
            _check_list(shown, value, list(teacher_value), teacher)
        elif (
            isinstance(teacher_value, int)
            and not isinstance(teacher_value, bool)
            and not isinstance(value, (list, tuple, Mapping))
        ):
            _check_number(shown, value, teacher_value, bounded=sized, deepest=deepest if _DEPTH.search(real) else 0)


def check_config_sizes(
    config: PreTrainedConfig, teacher: PreTrainedConfig, *, deepest: int = 0, part: str = ""
) -> None:
    """Check the sizes of a config, nested ones included, against the teacher's.

    Fields that the model may not read are not checked here: the plan compares the model that is built.

    Raises:
        OptionError, ShapeError: as `check_requested_sizes`.
    """
    for name, value in vars(config).items():
        teacher_value = teacher.__dict__.get(name)
        if isinstance(value, PreTrainedConfig) and isinstance(teacher_value, PreTrainedConfig):
            check_config_sizes(value, teacher_value, deepest=deepest, part=f"{part}{name}.")
        elif (
            isinstance(teacher_value, int)
            and not isinstance(teacher_value, bool)
            and value is not None
            and value != teacher_value
            and is_size(name)
        ):
            is_depth = name == config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
            if not isinstance(value, (list, tuple)):
                _check_number(part + name, value, teacher_value, bounded=is_depth, deepest=deepest)


def _check_number(name: str, value: Any, teacher_value: int, *, bounded: bool, deepest: int = 0) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        kind = type(value).__name__
        raise OptionError(
            f"{name}={value!r} must be a whole number: expected int, got {kind}; the teacher's is {teacher_value}."
        )
    if teacher_value >= 1 > value:
        raise ShapeError(f"{name} must be at least 1, not {value}; the teacher's is {teacher_value}.")
    if bounded and value > max(MAX_SIZE_RATIO * teacher_value, deepest) and teacher_value >= 1:
        raise too_large_error(name, value, teacher_value)


def too_large_error(name: str, value: int, teacher_value: int) -> ShapeError:
    """Return the error of a size above the teacher's; of a number of blocks it states how to repeat them."""
    repeated = (
        " To repeat blocks, name the teacher's block that feeds each with layer_selection=[...]."
        if _DEPTH.search(name)
        else ""
    )
    return ShapeError(
        f"The student's {name} is {value}, its teacher's {teacher_value}: it must be 1 to {teacher_value}.{repeated}"
    )


def _check_list(name: str, value: Any, teacher_value: list[int], teacher: PreTrainedConfig) -> None:
    stages = next(
        (len(each) for key in ("depths", "depth") if isinstance(each := teacher.__dict__.get(key), (list, tuple))),
        None,
    )
    if len(teacher_value) != stages:
        return  # one entry for each block, or several numbers of one axis
    if not isinstance(value, (list, tuple)) or len(value) != len(teacher_value):
        raise ShapeError(
            f"{name} must list {len(teacher_value)} numbers, one for each stage as the teacher's {teacher_value}, "
            f"found {value!r}."
        )
    for stage, (number, size) in enumerate(zip(value, teacher_value, strict=True)):
        _check_number(f"{name}[{stage}]", number, size, bounded=True)


def check_expert_counts(config: PreTrainedConfig, teacher: PreTrainedConfig, part: str = "") -> None:
    """Check that a mixture has as many experts as each token is routed to, nested configs included.

    Raises:
        ShapeError: It has fewer; names both fields.
    """
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig) and isinstance(
            teacher_value := teacher.__dict__.get(name), PreTrainedConfig
        ):
            check_expert_counts(value, teacher_value, f"{part}{name}.")
    mixture = (_EXPERTS, _EXPERTS_PER_TOKEN, ("n_group",), ("topk_group",))
    if all(_first_number(config, names) == _first_number(teacher, names) for names in mixture):
        return
    per_token = _first_number(config, _EXPERTS_PER_TOKEN)
    experts = _first_number(config, _EXPERTS)
    if experts is None or per_token is None or experts[1] < 1:
        return
    if per_token[1] < 1:
        raise ShapeError(f"{part}{per_token[0]} must be at least 1, not {per_token[1]}: each token needs an expert.")
    if per_token[1] > experts[1]:
        raise ShapeError(
            f"{part}{experts[0]}={experts[1]} is fewer than {part}{per_token[0]}={per_token[1]}, the experts that each token "
            f"goes to: keep at least {per_token[1]} experts, or set {per_token[0]} to at most {experts[1]} as well."
        )
    groups, top_groups = _first_number(config, ("n_group",)), _first_number(config, ("topk_group",))
    if groups is None or top_groups is None or groups[1] < 1:
        return
    if experts[1] % groups[1] or top_groups[1] > groups[1]:
        raise ShapeError(
            f"{part}{experts[0]}={experts[1]} do not divide into {part}n_group={groups[1]} groups of which topk_group="
            f"{top_groups[1]} are kept: set n_group to a divisor of {experts[1]}, and topk_group to at most that."
        )
    if groups[1] > 1 and experts[1] // groups[1] * top_groups[1] < per_token[1]:
        raise ShapeError(
            f"{part}topk_group={top_groups[1]} groups of {experts[1] // groups[1]} experts are fewer than {per_token[0]}="
            f"{per_token[1]}, the experts that each token goes to: lower {per_token[0]} or n_group, or keep more experts."
        )


def experts_per_token(config: PreTrainedConfig) -> int | None:
    """Return how many experts each token of a mixture is routed to; None of other models."""
    found = _first_number(config, _EXPERTS_PER_TOKEN)
    return None if found is None else found[1]


def _first_number(config: PreTrainedConfig, names: tuple[str, ...]) -> tuple[str, int] | None:
    """Return the first of `names` under which a config has a whole number, and the number; None if there is none."""
    for name in names:
        real = config.attribute_map.get(name, name)
        value = config.__dict__.get(real)
        if isinstance(value, int) and not isinstance(value, bool):
            return real, value
    return None


_NO_ENTRY = object()
_CONSTRUCTION_METHODS = ("__init__", "_init_weights")


def check_config_agrees(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, teacher: PreTrainedConfig
) -> None:
    """Check that no changed field contradicts the value that the config's class computes for it from other fields.

    A field that the model reads anyway is fine: it builds another model.

    Raises:
        ShapeError: A contradiction; names the field, both values, and the fields that it is computed from.
    """
    for path, part, teacher_value in _nested_configs(config, teacher):
        for name, computed in _computed(part).items():
            held = part.__dict__.get(name, _NO_ENTRY)
            if tuples_to_lists(held) in (
                tuples_to_lists(computed),
                tuples_to_lists(teacher_value.__dict__.get(name, _NO_ENTRY)),
            ):
                continue
            if held is _NO_ENTRY or not _is_number(computed) or not _is_number(held):
                continue
            other = copy.deepcopy(config)
            setattr(_parent(other, (*path, name)), name, copy.deepcopy(computed))
            if config_signature(model_class, config) != config_signature(model_class, other):
                continue
            raise ShapeError(
                f"{'.'.join((*path, name))}={held!r} was requested, but {type(part).__name__} computes {name}={computed!r} "
                f"and the model is built of that: {_what_to_set(part, name)}"
            )


def check_computed_overrides(
    model_class: type[PreTrainedModel], teacher: PreTrainedConfig, overrides: Mapping[str, Any]
) -> None:
    """Check that no override is of a size that the config's class computes and the model does not read.

    It needs no student config, so the reason is given before a selection of blocks can fail for the same cause.

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
    """Yield a config and those nested in it, each with its path and the teacher's config at the same path."""
    yield path, config, teacher
    for name, value in vars(config).items():
        teacher_value = teacher.__dict__.get(name)
        if isinstance(value, PreTrainedConfig) and isinstance(teacher_value, PreTrainedConfig):
            yield from _nested_configs(value, teacher_value, (*path, name))


def check_overrides_hold(
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    teacher: PreTrainedConfig,
    overrides: Mapping[str, Any],
) -> None:
    """Check that every override is in the student's config, survives saving, and changes the model.

    Args:
        overrides: As passed by the user, nested configs as mappings.

    Raises:
        ShapeError: The class replaced an override by another value, or computes it.
        OptionError: A size that the model does not have.
    """
    check_config_agrees(model_class, config, teacher)
    requested = list(_flatten_overrides(overrides, config))
    if not requested:
        return
    reloaded = _round_trip(config, teacher)
    for path, value in requested:
        for held, when in ((_entry(config, path), "holds"), (_entry(reloaded, path), "holds, once saved and loaded,")):
            if _is_number(value) and tuples_to_lists(held) != tuples_to_lists(value):
                raise ShapeError(
                    f"{'.'.join(path)}={value!r} was requested, but {type(config).__name__} {when} "
                    f"{'nothing' if held is _NO_ENTRY else repr(held)} under this name: "
                    f"{_what_to_set(_parent(config, path), path[-1])}"
                )
    sizes = [
        (path, value)
        for path, value in requested
        if is_size(path[-1]) and _is_number(value) and tuples_to_lists(_entry(teacher, path)) != tuples_to_lists(value)
    ]
    if not sizes:
        return
    built = config_signature(model_class, config)
    for path, value in sizes:
        if built is None or built != config_signature(model_class, _with_entry_of(teacher, config, path)):
            continue
        if built != _requested_structure(model_class, teacher, _without_override(overrides, path, teacher)):
            continue  # it acts by what the class derives from it
        if path[-1] in _names_read_at_runtime(model_class, config):
            continue  # ALBERT runs one block as often as the config sets
        raise OptionError(
            f"{'.'.join(path)}={value!r} changes nothing in a {model_class.__name__} of this config: the model "
            "has no such size, or takes it from another entry. Leave it out, or override the entry that the model reads."
        )


def check_initialization(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, teacher: PreTrainedConfig
) -> None:
    """Check that the family computes initial weights for a config, on the meta device.

    Whisper's sinusoidal positions need an even width, for example. What no weight of the teacher fills is initialized last, so
    that this would be an error after the whole of a calibration.

    Args:
        teacher: The teacher's config: where its weights are not initialized there either, nothing is known.

    Raises:
        ShapeError: It does not; with its reason.
    """
    reason = _initialization_error(ByValue.of((model_class, config)))
    if reason is not None and _initialization_error(ByValue.of((model_class, teacher))) is None:
        raise ShapeError(f"{model_class.__name__} rejects this config: {reason}")


@functools.lru_cache(maxsize=64)
def _initialization_error(model: ByValue[tuple[type[PreTrainedModel], PreTrainedConfig]]) -> str | None:
    try:
        built = meta_model(*model.value)
    except MODEL_ERRORS:
        return None  # an error wherever it is built
    try:
        with on_meta_device():
            built.initialize_weights()
    except MODEL_ERRORS as error:
        return str(error)
    return None


def _flatten_overrides(
    overrides: Mapping[str, Any], config: PreTrainedConfig, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield every override with its path, under the family's own names."""
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
    """Return `overrides` without the one at `path`, which has the family's own names."""
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
    """Return the structure of the student with these overrides; None if it cannot be built."""
    try:
        return config_signature(model_class, derive_student_config(teacher, overrides))
    except HfGuideError:
        return None


def _with_entry_of(teacher: PreTrainedConfig, config: PreTrainedConfig, path: tuple[str, ...]) -> PreTrainedConfig:
    """Return a copy of `config` with the teacher's value at `path`."""
    changed = copy.deepcopy(config)
    teacher_value = _entry(teacher, path)
    parent = _parent(changed, path)
    if teacher_value is not _NO_ENTRY:
        setattr(parent, path[-1], copy.deepcopy(teacher_value))
    return changed


def _names_read_at_runtime(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> set[str]:
    """Return the names that the model's code reads after construction, config fields among them."""
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
    """Return the config after saving and loading it, or itself where even the teacher's cannot be loaded.

    Raises:
        ShapeError: It cannot be loaded, though the teacher's can.
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
    """Return the values that the class computes from its declared fields for fields that it does not declare."""
    declared = _declared(config)
    extra = {
        name for name in vars(config) if name not in declared and not name.startswith("_") and is_size(name)
    } - config.attribute_map.keys()
    if not extra:
        return {}
    rebuilt = _rebuilt(config, {})
    return {} if rebuilt is None else {name: value for name, value in vars(rebuilt).items() if name in extra}


def _what_to_set(config: PreTrainedConfig, name: str) -> str:
    """Return advice that names the declared fields from which a field is computed."""
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
