"""What a loss may compare with a teacher: its logits, whole or the k largest, hidden states, penultimate features.

Does: name these signals and define the form in which a teacher's distribution is passed to a loss.
Does not: run a model (`teachers.forward`), read a cache (`signal_cache`), or compute a loss (`distillation.losses`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from hf_guide.tasks import OutputKind
from hf_guide.validation import StringEnum


class TeacherSignal(StringEnum):
    """What of student and teacher a term looks at."""

    LABELS = "labels"
    LOGITS = "logits"
    HIDDEN_STATES = "hidden_states"
    FEATURES = "features"
    BOXES = "boxes"
    SUBCLASSES = "subclasses"


@dataclass(frozen=True)
class DenseTarget:
    """A teacher's whole distribution.

    Args:
        logits: (items, classes), any floating dtype; no gradient goes into them.
        kind: What they mean: classes that exclude each other, labels that hold independently, or real numbers.
    """

    logits: Tensor
    kind: OutputKind = OutputKind.CATEGORICAL


@dataclass(frozen=True)
class TopKTarget:
    """A teacher's k largest log-probabilities; the mass of all other outcomes is taken together as one more outcome.

    Args:
        indices: whole numbers (items, k), distinct in each row; int64 saves a copy.
        log_probs: (items, k) in nats, at temperature 1.
        log_normalizer: (items,), log sum_j exp(log p_j / temperature) over the whole vocabulary, for the temperature
            that will be used; zero at temperature 1.
    """

    indices: Tensor
    log_probs: Tensor
    log_normalizer: Tensor


@dataclass(frozen=True)
class TeacherSignals:
    """The signals of one teacher for one batch.

    Attributes:
        target: the distribution at some of the items, in their order; None where none was asked for or captured.
        hidden_states: (batch, length, width) by number of blocks passed.
        features: what its head is fed, (items, width).
        boxes: Of a detector, its boxes (items, 4) and the probability (items,) that the query is an object.
        weight: this teacher's share.
    """

    target: Callable[[slice], DenseTarget | TopKTarget] | None = None
    hidden_states: Mapping[int, Tensor] = field(default_factory=dict)
    features: Tensor | None = None
    boxes: tuple[Tensor, Tensor] | None = None
    weight: float = 1.0
