"""The options of an initialization: the base class that every method's config extends, and what a plan reads of them.

Does: parse and check values, with errors that name the option. Does not: know any method (see `registry`).
"""

import dataclasses
import difflib
import importlib
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from hf_guide.errors import OptionError
from hf_guide.utils.deprecation import RenamedOptions
from hf_guide.validation import StringEnum, check_bool, check_choice, check_integer, check_number, did_you_mean

LayerSpec = str | list[int] | dict[str, list[int]]
"""Which teacher block feeds each student block: a rule's name, a list of block numbers, or a list for each stack."""


class LayerSelection(StringEnum):
    """Rules by which the teacher's blocks are selected where no explicit list is given."""

    UNIFORM = "uniform"
    FIRST = "first"
    FIRST_LAST = "first_last"
    BLOCK_INFLUENCE = "block_influence"
    LOCAL_SEARCH = "local_search"


MEASURED_SELECTIONS = (LayerSelection.BLOCK_INFLUENCE, LayerSelection.LOCAL_SEARCH)
"""The rules that need the teacher's activations."""


class SubsequentLayers(StringEnum):
    """How `guide` initializes the blocks after the first."""

    PROJECT = "project"
    UNIFORM = "uniform"
    RANDOM = "random"


def parse_layer_selection(layers: Any, *, allows_influence: bool = False) -> LayerSpec:
    """Return the rule, the block numbers, or the block numbers by stack that `layers` specifies.

    Args:
        allows_influence: Whether the method measures the influence of blocks.

    Raises:
        OptionError: An unknown rule, or something other than whole numbers.

    Example:
        >>> parse_layer_selection({"encoder.block": (0, 3)})
        {'encoder.block': [0, 3]}
    """
    option = "layer_selection"
    if isinstance(layers, str):
        rule = LayerSelection.parse(layers, option)
        if rule in MEASURED_SELECTIONS and not allows_influence:
            raise OptionError(f"{option}={layers!r} needs activations, which method='calibrated' collects.")
        return str(rule)
    if isinstance(layers, Mapping):
        return {str(stack): _block_numbers(blocks, f"{option}[{stack!r}]") for stack, blocks in layers.items()}
    return _block_numbers(layers, option)


def _block_numbers(blocks: Any, option: str) -> list[int]:
    rules = [rule.value for rule in LayerSelection]
    expected = f"{option} must be a list of teacher block numbers such as [0, 4, 9]"
    if isinstance(blocks, str) or not isinstance(blocks, Iterable):
        raise OptionError(f"{expected}{f', or one of {rules}' if '[' not in option else ''}; found {blocks!r}.")
    numbers = list(blocks)
    if any(isinstance(number, bool) for number in numbers):  # a mask of blocks is no list of their numbers
        raise OptionError(f"{expected}; found {numbers!r}.")
    try:
        return [operator.index(number) for number in numbers]
    except TypeError as error:
        raise OptionError(f"{expected}; found {numbers!r}.") from error


@dataclass(frozen=True)
class PlanOptions:
    """What a plan and its transfer need to know of a method, whatever its own options are.

    Attributes:
        layer_selection: Which teacher block feeds each student block.
        projects: Whether the residual stream is projected onto a basis; False selects its channels evenly.
        subsequent_layers: How blocks after the first are initialized where the residual stream is projected.
        fold_norms: Fold the gains and biases of norms into the weights that read them, which is exact.
        norm_correction: Scale what is read after a norm by the fraction of the norm that the projection retains.
        logit_scale: Factor on the logits of the language head.
        seed: Of every random draw.
    """

    layer_selection: LayerSpec = LayerSelection.UNIFORM.value
    projects: bool = False
    subsequent_layers: str = SubsequentLayers.PROJECT.value
    fold_norms: bool = True
    norm_correction: bool = True
    logit_scale: float = 1.0
    seed: int = 0


CONFIG_CLASSES: "dict[str, type[InitializationConfig]]" = {}
"""The config class of each method registered so far. `registry.register_method` fills it; read `registered_configs()`."""


def registered_configs() -> "dict[str, type[InitializationConfig]]":
    """Return the config class of each registered method by the method's name, the built-in methods first."""
    importlib.import_module("hf_guide.methods")  # registers them; by its name, because it builds on this module
    return CONFIG_CLASSES


@dataclass(init=False)
class InitializationConfig:
    """The options of an initialization method; the base class of every method's config.

    `InitializationConfig(method=..., **options)` returns an instance of the config class that is registered for `method`,
    so a method's own options are keywords here too. `hf-guide methods` lists them. Enums accept plain strings.

    Args:
        method: Name of a registered method: "guide" (default), "calibrated", "uniform", "random", or one of your own.
        **options: The method's options, and `seed`.

    Raises:
        OptionError: An unknown method, an option the method does not have (the nearest one is named), or a wrong value.

    Example:
        >>> from hf_guide import InitializationConfig
        >>> InitializationConfig(method="guide", layer_selection=[0, 3]).layer_selection
        [0, 3]
    """

    method: str = field(default="guide", metadata={"help": "How the student is initialized."})
    seed: int = field(default=0, metadata={"help": "Seeds every random draw: the same call gives the same bits."})

    renamed_options: ClassVar[RenamedOptions] = RenamedOptions()
    """Deprecated names and values of the options, which `register_method` makes the constructor accept."""

    def __new__(cls, method: str = "guide", **options: Any) -> "InitializationConfig":
        """Return an instance of the config class of `method`, having checked the names of the options."""
        config_class = cls if cls is not InitializationConfig else _config_class(method)
        config_class._check_names(options)
        return super().__new__(config_class)

    def __init__(self, method: str = "guide", **options: Any) -> None:
        raise AssertionError("InitializationConfig() makes an instance of a method's config class.")

    @classmethod
    def _check_names(cls, names: Iterable[str]) -> None:
        known = [each.name for each in dataclasses.fields(cls)]
        renamed = cls.renamed_options
        for name in names:
            if name in known or name in renamed.names or name in renamed.removed:
                continue
            default = cls.__dataclass_fields__["method"].default
            owners = _owners(name)
            where = f" It is an option of {' and '.join(map(repr, owners))}." if owners else ""
            options = [each for each in known if each != "method"]
            raise OptionError(
                f"{name!r} is not an option of method {default!r}; its options are {options}."
                f"{where or did_you_mean(name, options) or _renamed_hint(name, renamed.names)}"
            )

    def __post_init__(self) -> None:
        """Check every field by its metadata: `choices` (a StringEnum) and Boolean defaults."""
        if _config_class(self.method) is not type(self):
            expected = [name for name, config_class in registered_configs().items() if config_class is type(self)]
            raise OptionError(
                f"{type(self).__name__}(method={self.method!r}) must have the name that its class is registered under: "
                f"{expected or 'none yet; call hf_guide.register_method first'}."
            )
        for each in dataclasses.fields(self):
            value = getattr(self, each.name)
            if "choices" in each.metadata:
                setattr(self, each.name, str(each.metadata["choices"].parse(value, each.name)))
            elif isinstance(each.default, bool):
                check_bool(each.name, value)
        self.seed = check_integer("seed", self.seed, 0, 2**64 - 1)

    @classmethod
    def parse(cls, method: "str | InitializationConfig | Mapping[str, Any]") -> "InitializationConfig":
        """Return the config that `method` specifies: a name, a mapping of options, or a config, which is copied.

        Raises:
            OptionError: As the class.
        """
        if isinstance(method, InitializationConfig):
            return dataclasses.replace(method)  # checked again, for its fields may have been set since
        if isinstance(method, str):
            return cls(method=method)
        if isinstance(method, Mapping):
            return cls(**{str(name): value for name, value in method.items()})
        raise OptionError(
            f"method must be one of {list(registered_configs())}, an InitializationConfig or a mapping of its options; "
            f"found {method!r}."
        )


def owner_of_option(name: str) -> str | None:
    """Return the first method that has an option of this name, today's or a deprecated one; None where none has."""
    if name in InitializationConfig.__dataclass_fields__:
        return next(iter(registered_configs()))
    return next(iter(_owners(name)), None)


def renamed_options_of_method(method: str) -> RenamedOptions:
    """Return the old names of a registered method's options."""
    return _config_class(method).renamed_options


def _owners(name: str) -> list[str]:
    return [
        method
        for method, config_class in registered_configs().items()
        if name in config_class.__dataclass_fields__ or name in config_class.renamed_options.names
    ]


def _renamed_hint(name: str, names: Mapping[str, str]) -> str:
    near = difflib.get_close_matches(name, list(names), n=1, cutoff=0.6)
    return f" Did you mean {names[near[0]]!r}?" if near else ""


def _config_class(method: str) -> type[InitializationConfig]:
    return registered_configs()[check_choice("method", method, registered_configs())]


_REMOVED = "no benchmark shows who should set it otherwise, so leave it out."
REMOVED_OPTIONS = {
    "centered": f"the basis is fitted to the uncentered embedding table; {_REMOVED}",
    "token_weights": f"all rows of the embedding table weigh alike; {_REMOVED}",
    "energy_correction": f"it is always on; {_REMOVED}",
    "fold_norms": f"norms are always folded, which is exact; {_REMOVED}",
    "restore_logit_scale": f"attention logits always keep the teacher's scale; {_REMOVED}",
    "pooling": f"each norm's input and each token weigh alike; {_REMOVED}",
    "repair_inputs": f"a block is always refitted on the student's own residual stream; {_REMOVED}",
    "absorb_blocks": f"dropped blocks are always merged into the block before them; {_REMOVED}",
    "turn_queries": f"queries and keys are always rotated where no operation is between them; {_REMOVED}",
    "turn_values": f"values are always rotated where heads shrink; {_REMOVED}",
    "heads": f"calibrated selects heads by their activations, the other methods evenly; {_REMOVED}",
    "neurons": f"calibrated selects neurons by their activations, the other methods evenly; {_REMOVED}",
    "experts": f"calibrated selects experts by their activations, the other methods evenly; {_REMOVED}",
    "fit_table": f"calibrated fits a tied embedding unless refit='none'; {_REMOVED}",
    "fit_gain": f"calibrated fits the norm before a tied head unless refit='none'; {_REMOVED}",
}


def builtin_renames(
    default_layers: LayerSelection,
    names: Mapping[str, str] | None = None,
    values: Mapping[str, Mapping[str, str]] | None = None,
) -> RenamedOptions:
    """Return the deprecated names and values of a built-in method's options, and those that were removed.

    Args:
        default_layers: What the former layers="auto" means for the method.
        names, values: Renames beyond those of the options that all methods share.
    """
    layers = {"even": "uniform", "ends": "first_last", "influence": "block_influence", "auto": default_layers.value}
    return RenamedOptions(
        names={"layers": "layer_selection", **(names or {})},
        values={"layer_selection": layers, **(values or {})},
        removed=REMOVED_OPTIONS,
    )


def layer_selection_field(default: LayerSelection) -> Any:
    """Return the field of `layer_selection`, which most methods have, with a method's own default."""
    influence = (
        ", block_influence (those that change the residual stream most or make it massive), local_search (the same; at the "
        "teacher's width, of the six nearest to the threshold, other three if these bring the outputs on 128 tokens nearer to "
        "the teacher's by a tenth)"
    )
    return field(
        default=default.value,
        metadata={
            "help": "Which teacher block feeds each student block: uniform (evenly spaced), first, first_last (the middle is "
            f"left out){influence if default in MEASURED_SELECTIONS else ''}, a list of block numbers, or a "
            "mapping from stack (such as encoder.block) to a list."
        },
    )


def logit_scale_field() -> Any:
    """Return the field of `logit_scale`, which the methods that project have."""
    return field(
        default=1.0,
        metadata={
            "help": "Factor on the logits, applied to the norm or weight that makes them. 1 keeps the teacher's; below 1 a "
            "heavily cut student starts less certain, which helps on a small training budget and hurts on a large one."
        },
    )


def check_logit_scale(value: Any) -> float:
    """Return a positive factor of the logits.

    Raises:
        OptionError: Something else.
    """
    return check_number("logit_scale", value, 0.0, 1e6, includes_low=False)
