"""The sizes a student is asked to have, checked against its teacher's before anything is built.

Does: refuse what is no whole number, not positive, or larger than the teacher's; experts fewer than each token is routed to.
Does not: build a config or a model; what only building or running shows is found later.
"""

import re
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

from hf_guide.errors import OptionError, ShapeError

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
"""Times the teacher's size, above which nothing is built; what is a little too large is refused where it shows, by name."""

_DEPTH = re.compile(r"(^|_)(layers?|blocks)$")

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")
_EXPERTS_PER_TOKEN = (
    *("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_k", "moe_top_k"),
    *("num_selected_experts", "experts_per_token"),
)


def is_size(name: str) -> bool:
    """Whether a config's entry of this name says how large the model is along some axis, or how many blocks it has."""
    return _SIZE.search(name) is not None and _NOT_A_SIZE.search(name) is None


def check_requested_sizes(
    teacher: PreTrainedConfig, overrides: Mapping[str, Any], *, deepest: int = 0, part: str = ""
) -> None:
    """Refuse sizes among `overrides` that no student of this teacher can have; nested configs are gone through.

    Args:
        deepest: how many blocks a stack may have where the user lists the teacher's block for each; 0 without such a list.
        part: the name of the nested config, for errors.

    Raises:
        OptionError: a size that is no whole number.
        ShapeError: one that is below 1 or above the teacher's, or lists of sizes of another length.
    """
    for name, value in overrides.items():
        real = teacher.attribute_map.get(name, name)
        had = teacher.__dict__.get(real)
        if isinstance(had, PreTrainedConfig) and isinstance(value, Mapping):
            check_requested_sizes(had, value, deepest=deepest, part=f"{part}{name}.")
            continue
        if name == "num_labels" and value is not None:
            _check_number(part + name, value, teacher.num_labels or 1, bounded=False)
            continue
        sized = is_size(name) or is_size(real)
        if value is None or not (sized or _POSITIVE.search(real)) or value == had and type(value) is type(had):
            continue
        shown = part + name
        if isinstance(had, (list, tuple)) and had and all(isinstance(each, int) for each in had):
            _check_list(shown, value, list(had), teacher)
        elif isinstance(had, int) and not isinstance(had, bool) and not isinstance(value, (list, tuple, Mapping)):
            _check_number(shown, value, had, bounded=sized, deepest=deepest if _DEPTH.search(real) else 0)


def check_config_sizes(
    config: PreTrainedConfig, teacher: PreTrainedConfig, *, deepest: int = 0, part: str = ""
) -> None:
    """Refuse sizes of a whole config that no student of this teacher can have; nested configs are gone through.

    Entries that the model may not read are let pass: the plan compares what is built of them.

    Raises:
        OptionError, ShapeError: as `check_requested_sizes`.
    """
    for name, value in vars(config).items():
        had = teacher.__dict__.get(name)
        if isinstance(value, PreTrainedConfig) and isinstance(had, PreTrainedConfig):
            check_config_sizes(value, had, deepest=deepest, part=f"{part}{name}.")
        elif (
            isinstance(had, int) and not isinstance(had, bool) and value is not None and value != had and is_size(name)
        ):
            is_depth = name == config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
            if not isinstance(value, (list, tuple)):
                _check_number(part + name, value, had, bounded=is_depth, deepest=deepest)


def _check_number(name: str, value: Any, had: int, *, bounded: bool, deepest: int = 0) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        kind = type(value).__name__
        raise OptionError(
            f"{name}={value!r} must be a whole number: expected int, got {kind}; the teacher's is {had}."
        )
    if had >= 1 > value:
        raise ShapeError(f"{name} must be at least 1, not {value}; the teacher's is {had}.")
    if bounded and value > max(MAX_SIZE_RATIO * had, deepest) and had >= 1:
        repeated = (
            " To repeat blocks, name the teacher's block that feeds each with layer_selection=[...]."
            if _DEPTH.search(name)
            else ""
        )
        raise ShapeError(
            f"The student's {name} is {value}, its teacher's {had}: a student starts inside its teacher, so it must be 1 to "
            f"{had}.{repeated}"
        )


def _check_list(name: str, value: Any, had: list[int], teacher: PreTrainedConfig) -> None:
    stages = next(
        (len(each) for key in ("depths", "depth") if isinstance(each := teacher.__dict__.get(key), (list, tuple))),
        None,
    )
    if len(had) != stages:
        return  # one entry for each block, or several numbers of one axis
    if not isinstance(value, (list, tuple)) or len(value) != len(had):
        raise ShapeError(
            f"{name} must list {len(had)} numbers, one for each stage as the teacher's {had}, found {value!r}."
        )
    for stage, (wanted, size) in enumerate(zip(value, had, strict=True)):
        _check_number(f"{name}[{stage}]", wanted, size, bounded=True)


def check_expert_counts(config: PreTrainedConfig, teacher: PreTrainedConfig, part: str = "") -> None:
    """Refuse a mixture, other than the teacher's, with fewer experts than each token is routed to, nested configs included.

    Raises:
        ShapeError: names both entries of the config.
    """
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig) and isinstance(had := teacher.__dict__.get(name), PreTrainedConfig):
            check_expert_counts(value, had, f"{part}{name}.")
    mixture = (_EXPERTS, _EXPERTS_PER_TOKEN, ("n_group",), ("topk_group",))
    if all(_entry(config, names) == _entry(teacher, names) for names in mixture):
        return
    per_token = _entry(config, _EXPERTS_PER_TOKEN)
    experts = _entry(config, _EXPERTS)
    if experts is None or per_token is None or experts[1] < 1:
        return
    if per_token[1] < 1:
        raise ShapeError(f"{part}{per_token[0]} must be at least 1, not {per_token[1]}: each token needs an expert.")
    if per_token[1] > experts[1]:
        raise ShapeError(
            f"{part}{experts[0]}={experts[1]} is fewer than {part}{per_token[0]}={per_token[1]}, the experts that each token "
            f"goes to: keep at least {per_token[1]} experts, or set {per_token[0]} to at most {experts[1]} as well."
        )
    groups, kept = _entry(config, ("n_group",)), _entry(config, ("topk_group",))
    if groups is None or kept is None or groups[1] < 1:
        return
    if experts[1] % groups[1] or kept[1] > groups[1]:
        raise ShapeError(
            f"{part}{experts[0]}={experts[1]} do not divide into {part}n_group={groups[1]} groups of which topk_group="
            f"{kept[1]} are kept: set n_group to a divisor of {experts[1]}, and topk_group to at most that."
        )
    if groups[1] > 1 and experts[1] // groups[1] * kept[1] < per_token[1]:
        raise ShapeError(
            f"{part}topk_group={kept[1]} groups of {experts[1] // groups[1]} experts are fewer than {per_token[0]}="
            f"{per_token[1]}, the experts that each token goes to: lower {per_token[0]} or n_group, or keep more experts."
        )


def _entry(config: PreTrainedConfig, names: tuple[str, ...]) -> tuple[str, int] | None:
    """Return the first of `names` that a config holds a whole number under, by the name it is held under, and the number."""
    for name in names:
        real = config.attribute_map.get(name, name)
        value = config.__dict__.get(real)
        if isinstance(value, int) and not isinstance(value, bool):
            return real, value
    return None
