"""The splitters by name: how a class is split into subclasses. `register_splitter` adds one."""

import importlib.util
from dataclasses import dataclass
from typing import Any, Protocol

from hf_guide.errors import OptionError
from hf_guide.lelp.splitters.base import SplitterInputs
from hf_guide.lelp.splitters.fine_labels import split_by_fine_labels
from hf_guide.lelp.splitters.kmeans import split_by_kmeans
from hf_guide.lelp.splitters.principal_components import split_by_principal_components
from hf_guide.lelp.splitters.scorers import SubclassScorer
from hf_guide.validation import did_you_mean

BENCHMARK_SPLITTERS = (
    "no-null-space",
    "no-rotation",
    "no-scaling",
    "random-projection",
    "random-partition",
    "spectral",
)
"""Names of ablations that an earlier release had; examples/benchmarks/lelp_splitters.py registers them."""


class Splitter(Protocol):
    """Finds the subclasses of every class, from streamed statistics of a teacher's embeddings."""

    def __call__(self, inputs: SplitterInputs) -> SubclassScorer:
        """Return scores of embeddings (items, width) for each subclass of each class, mostly a `LinearScorer`.

        Over a class's own examples the scores should have a root mean square of 1, so that one `subclass_temperature` serves
        all splitters. All randomness must come from `inputs.seed`. Raise `SubclassError` where a class cannot be split.
        """


@dataclass(frozen=True)
class SplitterEntry:
    """A registered splitter and what it needs; see `register_splitter`."""

    name: str
    split: Splitter
    needs_sample: bool = False
    needs_fine_labels: bool = False
    finds_directions: bool = True
    takes_top_variance: bool = False
    requires: str | None = None

    @property
    def is_installed(self) -> bool:
        """Whether the module that the splitter imports is there."""
        return self.requires is None or importlib.util.find_spec(self.requires) is not None

    def check_requirements(self) -> None:
        """Check that the module that the splitter imports is installed.

        Raises:
            OptionError: It is missing; the message states how to install it.
        """
        if not self.is_installed:
            how = "pip install 'hf_guide[lelp]'" if self.requires == "sklearn" else f"install {self.requires}"
            raise OptionError(
                f"splitter={self.name!r} needs the module {self.requires}, which is not installed: {how}."
            )


_SPLITTERS: dict[str, SplitterEntry] = {}


def register_splitter(
    name: str,
    split: Splitter,
    *,
    needs_sample: bool = False,
    needs_fine_labels: bool = False,
    finds_directions: bool = True,
    takes_top_variance: bool = False,
    requires: str | None = None,
) -> None:
    """Register a splitter, for `fit_subclasses(splitter=name)` and `SubclassProjector.fit(splitter=name)`.

    Saved projectors hold the scores, not the splitter: they load where it is not registered.

    Args:
        name: How it is selected.
        split: Returns the scores of the subclasses, see `Splitter`.
        needs_sample: It needs embeddings, not only moments; then `SplitterInputs.sample` holds up to 2,048 of each class.
        needs_fine_labels: It needs fine labels; then `SplitterInputs.fine_label_counts` is there.
        finds_directions: Each subclass is a direction outside the classifier's row space, so that embeddings must be at least
            C + S wide and a class must have more than S examples.
        takes_top_variance: The directions are those of largest variance, so that `explained` describes them.
        requires: A module that `split` imports, checked before the teacher runs.

    Raises:
        OptionError: The name is taken.

    Example:
        >>> import torch
        >>> from hf_guide.lelp.splitters.scorers import LinearScorer
        >>> def split_by_first_coordinates(inputs):
        ...     shape = (inputs.moments.num_classes, inputs.moments.width, inputs.num_subclasses)
        ...     directions = torch.eye(*shape[1:], dtype=torch.float64).expand(shape)
        ...     offsets = -(inputs.moments.means[:, None] @ directions).squeeze(1)
        ...     return LinearScorer(directions, offsets)
        >>> register_splitter("first-coordinates", split_by_first_coordinates)
    """
    if name in _SPLITTERS:
        raise OptionError(
            f"The splitter {name!r} is registered already, as {_qualified_name(_SPLITTERS[name].split)}; choose another name."
        )
    _SPLITTERS[name] = SplitterEntry(
        name, split, needs_sample, needs_fine_labels, finds_directions, takes_top_variance, requires
    )


def get_splitter(name: str) -> SplitterEntry:
    """Return a splitter and what it needs.

    Raises:
        OptionError: None of this name is registered; states the nearest name, or where an ablation moved.
    """
    if isinstance(name, str) and name in _SPLITTERS:
        return _SPLITTERS[name]
    if name in BENCHMARK_SPLITTERS:
        raise OptionError(
            f"splitter={name!r} is an ablation of the benchmarks and not registered: import "
            "examples/benchmarks/lelp_splitters.py, which registers it. Projectors that were fitted with it still load."
        )
    nearest = did_you_mean(name, _SPLITTERS) if isinstance(name, str) else ""
    raise OptionError(f"splitter must be one of {known_splitters()}; found {name!r}.{nearest}")


def known_splitters() -> list[str]:
    """Return the names of all registered splitters."""
    return list(_SPLITTERS)


def takes_top_variance(name: str) -> bool:
    """Whether a splitter is registered and takes the directions of largest variance."""
    return name in _SPLITTERS and _SPLITTERS[name].takes_top_variance


def can_fit(name: str) -> bool:
    """Whether a splitter is registered and what it requires is installed."""
    return name in _SPLITTERS and _SPLITTERS[name].is_installed


def _qualified_name(function: Any) -> str:
    return f"{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', repr(function))}"


register_splitter("lelp", split_by_principal_components, takes_top_variance=True)
register_splitter("kmeans", split_by_kmeans, needs_sample=True, requires="sklearn")
register_splitter("labels", split_by_fine_labels, needs_fine_labels=True, finds_directions=False)
