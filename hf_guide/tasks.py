"""The table of tasks: for each one the classes that it covers, its names on the Hub, and what of its outputs is distilled.

Does: name the tasks, map model classes to them and to the Hub's pipeline tags. Every other module reads the row of a task.
Does not: import torch, or look at a batch (`hf_guide.models.targets` does).

To add a task, add a member to `Task`: its value and its `TaskRow`.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType
from typing import Any

from hf_guide.errors import TaskError

NON_CATEGORICAL_PROBLEM_TYPES = ("regression", "multi_label_classification")
"""Values of `config.problem_type` whose logits are no distribution over mutually exclusive classes."""

PROCESSOR_CLASSES: Mapping[str, str] = MappingProxyType({"text": "AutoTokenizer", "image": "AutoImageProcessor"})
"""The Auto class of the processor for each modality of inputs."""


class OutputKind(str, Enum):
    """What the numbers of an output mean, and so which losses apply to them."""

    CATEGORICAL = "categorical"
    """Logits of mutually exclusive classes: a softmax over the class axis."""
    BERNOULLI = "bernoulli"
    """Logits of independent labels: a sigmoid each."""
    REAL = "real"
    """Real numbers, as of a regression."""
    FEATURES = "features"
    """Vectors that only their distance or direction makes comparable."""

    def __str__(self) -> str:
        return str(self.value)


@dataclass(frozen=True)
class DistilledOutput:
    """One output of a model that is compared with a teacher's.

    Attributes:
        name: Its name among the model's outputs.
        kind: What its numbers mean. For a classifier the config decides: see `output_kind`.
        classes: What the last axis counts: "vocabulary" (rows of the language head) or "labels" (`config.num_labels`).
        items: What one loss value is for: "token" (output (batch, length, classes), masked by labels and attention) or
            "example" (output (batch, classes)).
    """

    name: str
    kind: OutputKind
    classes: str
    items: str


@dataclass(frozen=True)
class TaskRow:
    """What the package needs to know of a task.

    Attributes:
        auto_class: The Auto class of Transformers that loads a model for it.
        pipeline_tags: For each mapping of Transformers that it covers (`MODEL_FOR_{name}_MAPPING_NAMES`) the pipeline tag
            of its classes on the Hub.
        class_suffixes: How the names of its classes end, for classes that are in no mapping.
        outputs: What of its outputs is distilled.
        inputs: The modality of what the processor makes: a key of `PROCESSOR_CLASSES`.
        targets_in_decoder: Whether the targets are what a decoder with inputs of its own predicts.
        checkpoint_order: When the task is tried for a checkpoint whose config names no class; None for never.
    """

    auto_class: str
    pipeline_tags: Mapping[str, str]
    class_suffixes: tuple[str, ...]
    outputs: tuple[DistilledOutput, ...]
    inputs: str = "text"
    targets_in_decoder: bool = False
    checkpoint_order: int | None = None


_VOCABULARY = DistilledOutput("logits", OutputKind.CATEGORICAL, classes="vocabulary", items="token")
_TOKEN_LABELS = DistilledOutput("logits", OutputKind.CATEGORICAL, classes="labels", items="token")
_EXAMPLE_LABELS = DistilledOutput("logits", OutputKind.CATEGORICAL, classes="labels", items="example")


class Task(str, Enum):
    """What a model's head is for. A class in the mappings of several members belongs to the first of them.

    Example:
        >>> Task("seq2seq-lm").row.auto_class
        'AutoModelForSeq2SeqLM'
    """

    row: TaskRow

    SEQ2SEQ_LM = (
        "seq2seq-lm",
        TaskRow(
            auto_class="AutoModelForSeq2SeqLM",
            # Speech first: many of its classes are in both mappings.
            pipeline_tags={
                "SPEECH_SEQ_2_SEQ": "automatic-speech-recognition",
                "SEQ_TO_SEQ_CAUSAL_LM": "text2text-generation",
            },
            class_suffixes=("ForSeq2SeqLM",),
            outputs=(_VOCABULARY,),
            targets_in_decoder=True,
            checkpoint_order=0,
        ),
    )
    CAUSAL_LM = (
        "causal-lm",
        TaskRow(
            auto_class="AutoModelForCausalLM",
            pipeline_tags={"CAUSAL_LM": "text-generation"},
            class_suffixes=("ForCausalLM", "LMHeadModel"),
            outputs=(_VOCABULARY,),
            checkpoint_order=2,
        ),
    )
    MASKED_LM = (
        "masked-lm",
        TaskRow(
            auto_class="AutoModelForMaskedLM",
            pipeline_tags={"MASKED_LM": "fill-mask"},
            class_suffixes=("ForMaskedLM",),
            outputs=(_VOCABULARY,),
            checkpoint_order=1,
        ),
    )
    SEQUENCE_CLASSIFICATION = (
        "sequence-classification",
        TaskRow(
            auto_class="AutoModelForSequenceClassification",
            pipeline_tags={"SEQUENCE_CLASSIFICATION": "text-classification"},
            class_suffixes=("ForSequenceClassification",),
            outputs=(_EXAMPLE_LABELS,),
            checkpoint_order=4,
        ),
    )
    TOKEN_CLASSIFICATION = (
        "token-classification",
        TaskRow(
            auto_class="AutoModelForTokenClassification",
            pipeline_tags={"TOKEN_CLASSIFICATION": "token-classification"},
            class_suffixes=("ForTokenClassification",),
            outputs=(_TOKEN_LABELS,),
        ),
    )
    IMAGE_CLASSIFICATION = (
        "image-classification",
        TaskRow(
            auto_class="AutoModelForImageClassification",
            pipeline_tags={"IMAGE_CLASSIFICATION": "image-classification"},
            class_suffixes=("ForImageClassification",),
            outputs=(_EXAMPLE_LABELS,),
            inputs="image",
            checkpoint_order=3,
        ),
    )

    def __new__(cls, value: str, row: TaskRow | None = None) -> "Task":
        """Make a member whose value is its name and which has its row; `Task("causal-lm")` looks one up."""
        assert row is not None
        task = str.__new__(cls, value)
        task._value_ = value
        task.row = row
        return task

    def __str__(self) -> str:
        return str(self.value)

    @property
    def is_language_model(self) -> bool:
        """Whether its classes are a vocabulary."""
        return self.row.outputs[0].classes == "vocabulary"

    @property
    def is_per_token(self) -> bool:
        """Whether its items are tokens rather than examples."""
        return self.row.outputs[0].items == "token"

    @property
    def is_example_classification(self) -> bool:
        """Whether it assigns one label to a whole example."""
        return self.row.outputs[0].classes == "labels" and not self.is_per_token

    @property
    def has_token_positions(self) -> bool:
        """Whether the length axis of its hidden states is that of the tokens in the batch."""
        return self.row.inputs == "text"

    @property
    def processor_class(self) -> str:
        """The Auto class that loads its tokenizer or processor."""
        return PROCESSOR_CLASSES[self.row.inputs]

    @property
    def auto_student_class(self) -> str:
        """The name of the class in `hf_guide` that makes a student for it."""
        return self.row.auto_class.replace("AutoModel", "AutoStudent", 1)


def task_of(model: Any) -> Task:
    """Return what the head of a model is for, by its class or the stock class that it derives from.

    Args:
        model: A model, with or without a PEFT adapter, or a model's class.

    Raises:
        TaskError: It has no head, or one for a task that cannot be distilled.
    """
    from hf_guide.models.adapters import without_adapter  # it imports torch

    model_class = model if isinstance(model, type) else type(without_adapter(model))
    for base in model_class.__mro__:
        if base.__name__ in _stock_classes():
            return _stock_classes()[base.__name__][0]
    raise TaskError(_unsupported_model_message(model_class.__name__))


def pipeline_tag(model_class: type | str) -> str | None:
    """Return the Hub's pipeline tag for a model class; None for a class of no known task.

    Args:
        model_class: A class, or its name as configs have it in `architectures`.

    Example:
        >>> pipeline_tag("WhisperForConditionalGeneration"), pipeline_tag("T5ForConditionalGeneration")
        ('automatic-speech-recognition', 'text2text-generation')
    """
    task_and_tag = _task_and_tag(model_class)
    return None if task_and_tag is None else task_and_tag[1]


def task_of_class_name(model_class: str) -> Task | None:
    """Return the task of a class by its name alone: a stock class, or one whose name ends as those of a task do."""
    task_and_tag = _task_and_tag(model_class)
    return None if task_and_tag is None else task_and_tag[0]


def mapping_names(mapping: str) -> Mapping[str, Any]:
    """Return `MODEL_FOR_{mapping}_MAPPING_NAMES` of Transformers: a class's name, or a tuple of them, by model type."""
    from transformers.models.auto import modeling_auto  # it imports torch

    names: Mapping[str, Any] = getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES")
    return names


def output_kind(task: Task, config: Any) -> OutputKind:
    """Return what the logits of a model are; for a classifier its config decides.

    Args:
        task: The model's.
        config: The model's: its `problem_type`, and else `num_labels`, of which one means a regression.
    """
    kind = task.row.outputs[0].kind
    if kind is not OutputKind.CATEGORICAL or task.is_language_model:
        return kind
    problem_type = getattr(config, "problem_type", None)
    if problem_type == "multi_label_classification":
        return OutputKind.BERNOULLI
    if problem_type == "regression" or (problem_type is None and config.num_labels == 1):
        return OutputKind.REAL
    return kind


def _task_and_tag(model_class: type | str) -> tuple[Task, str] | None:
    names = [model_class] if isinstance(model_class, str) else [base.__name__ for base in model_class.__mro__]
    for name in names:
        if name in _stock_classes():
            return _stock_classes()[name]
    for task in Task:
        if any(name.endswith(task.row.class_suffixes) for name in names):
            return task, next(iter(task.row.pipeline_tags.values()))
    return None


@functools.cache
def _stock_classes() -> Mapping[str, tuple[Task, str]]:
    """Return the task and the pipeline tag of each class of Transformers that has them, by its name."""
    classes: dict[str, tuple[Task, str]] = {}
    for task in Task:
        for mapping, tag in task.row.pipeline_tags.items():
            for names in mapping_names(mapping).values():
                for name in (names,) if isinstance(names, str) else names:
                    classes.setdefault(name, (task, tag))
    return MappingProxyType(classes)


def _unsupported_model_message(name: str) -> str:
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES  # it imports torch

    tasks = ", ".join(map(str, Task))
    bases = MODEL_MAPPING_NAMES.values()
    if any(name in ((names,) if isinstance(names, str) else names) for names in bases):
        return (
            f"{name} has no head, so there is nothing to distil. Load it with the AutoModelFor... class of its task, one of "
            f"{tasks}."
        )
    return f"{name} is for a task that cannot be distilled; expected a model for one of {tasks}."
