"""The table of tasks: for each one the classes that it covers, its names on the Hub, and what of its outputs is distilled.

Does: name the tasks, map model classes to them and to the Hub's pipeline tags. Every other module reads the row of a task.
Does not: import torch, or look at a batch (`hf_guide.models.targets` does).

To add a task, add a member to `Task`: its value and its `TaskRow`.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from hf_guide.errors import TaskError
from hf_guide.validation import StringEnum

PROCESSOR_CLASSES: Mapping[str, str] = MappingProxyType(
    {
        "text": "AutoTokenizer",
        "image": "AutoImageProcessor",
        "audio": "AutoProcessor",
        "image-text": "AutoProcessor",
    }
)
"""The Auto class of the processor for each modality of inputs."""

BASE_MAPPING = "BASE"
"""The name in this table of `MODEL_MAPPING_NAMES`, the models without a head."""

_SIGMOID_PAIRS = ("siglip", "siglip2")
_WITH_NO_OBJECT_CLASS = (
    *("detr", "yolos", "table-transformer", "maskformer", "mask2former", "oneformer"),
    *("eomt", "eomt_dinov3", "videomt"),
)
"""Types of detectors whose last class is "no object", so that their classes exclude each other."""

_MAPPINGS_WITHOUT_A_TASK = ("PRETRAINING", "MULTIMODAL_LM", "BACKBONE")
"""Mappings that group classes otherwise than by what their outputs are."""

SENTENCE_PIPELINE_TAGS: dict[str | None, str] = {
    "SentenceTransformer": "sentence-similarity",
    "CrossEncoder": "text-ranking",
}
SENTENCE_TAGS: dict[str | None, list[str]] = {
    "SentenceTransformer": ["sentence-transformers", "feature-extraction"],
    "CrossEncoder": ["sentence-transformers", "cross-encoder"],
}
"""By the class of sentence-transformers that loads a student, what the Hub finds it by."""


class OutputKind(StringEnum):
    """What the numbers of an output mean, and so which losses apply to them."""

    CATEGORICAL = "categorical"
    """Logits of mutually exclusive classes: a softmax over the class axis."""
    BERNOULLI = "bernoulli"
    """Logits of independent labels: a sigmoid each."""
    REAL = "real"
    """Real numbers, as of a regression."""
    FEATURES = "features"
    """Vectors that only their distance or direction makes comparable."""


@dataclass(frozen=True)
class DistilledOutput:
    """One output of a model that is compared with a teacher's.

    Attributes:
        name: Its name among the model's outputs.
        kind: What its numbers mean. For a classifier the config decides: see `output_kind`.
        classes: What the class axis counts: "vocabulary" (rows of the language head), "labels" (`config.num_labels`),
            "characters" (the tokens of a CTC head), "positions" (of the tokens in the batch), "choices", "pairs" (the other
            half of the batch's image-text pairs), "values" (of pixels) or "features".
        items: What one loss value is for: "token", "example", "boundary" (the start and the end of an answer), "frame",
            "pixel", "query", "row" (each image, and each text, of the batch) or "patch".
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
        targets_in_decoder: Whether the targets are what a decoder with inputs of its own predicts, where a model has one.
        checkpoint_order: When the task is tried for a checkpoint whose config names no class; None for never.
        class_tags: Pipeline tags of classes that belong to it by their name, whatever mapping they are in.
        teacher_tasks: Other tasks whose models have the same outputs for the inputs of this one, and can be its teachers.
    """

    auto_class: str
    pipeline_tags: Mapping[str, str]
    class_suffixes: tuple[str, ...]
    outputs: tuple[DistilledOutput, ...]
    inputs: str = "text"
    targets_in_decoder: bool = False
    checkpoint_order: int | None = None
    class_tags: Mapping[str, str] = field(default_factory=dict)
    teacher_tasks: tuple[str, ...] = ()


_VOCABULARY = DistilledOutput("logits", OutputKind.CATEGORICAL, classes="vocabulary", items="token")
_TOKEN_LABELS = DistilledOutput("logits", OutputKind.CATEGORICAL, classes="labels", items="token")
_EXAMPLE_LABELS = DistilledOutput("logits", OutputKind.CATEGORICAL, classes="labels", items="example")
_SPAN = (
    DistilledOutput("start_logits", OutputKind.CATEGORICAL, classes="positions", items="boundary"),
    DistilledOutput("end_logits", OutputKind.CATEGORICAL, classes="positions", items="boundary"),
)
_CHOICES = DistilledOutput("logits", OutputKind.CATEGORICAL, classes="choices", items="example")
_FRAMES = DistilledOutput("logits", OutputKind.CATEGORICAL, classes="characters", items="frame")
_PIXEL_LABELS = DistilledOutput("logits", OutputKind.CATEGORICAL, classes="labels", items="pixel")
_QUERY_LABELS = DistilledOutput("logits", OutputKind.CATEGORICAL, classes="labels", items="query")
_BOXES = DistilledOutput("pred_boxes", OutputKind.REAL, classes="values", items="query")
_MASK_LABELS = DistilledOutput("class_queries_logits", OutputKind.CATEGORICAL, classes="labels", items="query")
_PAIRS = (
    DistilledOutput("logits_per_image", OutputKind.CATEGORICAL, classes="pairs", items="row"),
    DistilledOutput("logits_per_text", OutputKind.CATEGORICAL, classes="pairs", items="row"),
)
_RECONSTRUCTED_IMAGE = DistilledOutput("reconstruction", OutputKind.REAL, classes="values", items="patch")
_RECONSTRUCTED_PATCHES = DistilledOutput("logits", OutputKind.REAL, classes="values", items="patch")
_FEATURES = DistilledOutput("last_hidden_state", OutputKind.FEATURES, classes="features", items="example")


class Task(StringEnum):
    """What a model's head is for. A class in the mappings of several members belongs to the first of them.

    Example:
        >>> Task("seq2seq-lm").row.auto_class
        'AutoModelForSeq2SeqLM'
    """

    row: TaskRow

    SPEECH_SEQ2SEQ = (
        "speech-seq2seq",
        TaskRow(
            auto_class="AutoModelForSpeechSeq2Seq",
            pipeline_tags={"SPEECH_SEQ_2_SEQ": "automatic-speech-recognition"},
            class_suffixes=("ForSpeechSeq2Seq", "ForSpeechToText"),
            outputs=(_VOCABULARY,),
            inputs="audio",
            targets_in_decoder=True,
            checkpoint_order=0,
        ),
    )
    SEQ2SEQ_LM = (
        "seq2seq-lm",
        TaskRow(
            auto_class="AutoModelForSeq2SeqLM",
            pipeline_tags={"SEQ_TO_SEQ_CAUSAL_LM": "text2text-generation"},
            class_suffixes=("ForSeq2SeqLM",),
            outputs=(_VOCABULARY,),
            targets_in_decoder=True,
            checkpoint_order=1,
        ),
    )
    IMAGE_TEXT_TO_TEXT = (
        "image-text-to-text",
        TaskRow(
            auto_class="AutoModelForImageTextToText",
            pipeline_tags={"IMAGE_TEXT_TO_TEXT": "image-text-to-text"},
            class_suffixes=("ForImageTextToText", "ForVision2Seq"),
            outputs=(_VOCABULARY,),
            inputs="image-text",
            targets_in_decoder=True,
        ),
    )
    CAUSAL_LM = (
        "causal-lm",
        TaskRow(
            auto_class="AutoModelForCausalLM",
            pipeline_tags={"CAUSAL_LM": "text-generation"},
            class_suffixes=("ForCausalLM", "LMHeadModel"),
            outputs=(_VOCABULARY,),
            checkpoint_order=3,
            teacher_tasks=("image-text-to-text",),
        ),
    )
    MASKED_LM = (
        "masked-lm",
        TaskRow(
            auto_class="AutoModelForMaskedLM",
            pipeline_tags={"MASKED_LM": "fill-mask"},
            class_suffixes=("ForMaskedLM",),
            outputs=(_VOCABULARY,),
            checkpoint_order=2,
        ),
    )
    AUDIO_CLASSIFICATION = (
        "audio-classification",
        TaskRow(
            auto_class="AutoModelForAudioClassification",
            pipeline_tags={"AUDIO_CLASSIFICATION": "audio-classification"},
            class_suffixes=("ForAudioClassification",),
            outputs=(_EXAMPLE_LABELS,),
            inputs="audio",
        ),
    )
    CTC = (
        "ctc",
        TaskRow(
            auto_class="AutoModelForCTC",
            pipeline_tags={"CTC": "automatic-speech-recognition"},
            class_suffixes=("ForCTC",),
            outputs=(_FRAMES,),
            inputs="audio",
        ),
    )
    SEQUENCE_CLASSIFICATION = (
        "sequence-classification",
        TaskRow(
            auto_class="AutoModelForSequenceClassification",
            pipeline_tags={"SEQUENCE_CLASSIFICATION": "text-classification"},
            class_suffixes=("ForSequenceClassification",),
            outputs=(_EXAMPLE_LABELS,),
            checkpoint_order=5,
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
    QUESTION_ANSWERING = (
        "question-answering",
        TaskRow(
            auto_class="AutoModelForQuestionAnswering",
            pipeline_tags={
                "QUESTION_ANSWERING": "question-answering",
                "DOCUMENT_QUESTION_ANSWERING": "document-question-answering",
            },
            class_suffixes=("ForQuestionAnswering", "ForQuestionAnsweringSimple"),
            outputs=_SPAN,
        ),
    )
    MULTIPLE_CHOICE = (
        "multiple-choice",
        TaskRow(
            auto_class="AutoModelForMultipleChoice",
            pipeline_tags={"MULTIPLE_CHOICE": "multiple-choice"},
            class_suffixes=("ForMultipleChoice",),
            outputs=(_CHOICES,),
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
            checkpoint_order=4,
        ),
    )
    SEMANTIC_SEGMENTATION = (
        "semantic-segmentation",
        TaskRow(
            auto_class="AutoModelForSemanticSegmentation",
            pipeline_tags={"SEMANTIC_SEGMENTATION": "image-segmentation"},
            class_suffixes=("ForSemanticSegmentation",),
            outputs=(_PIXEL_LABELS,),
            inputs="image",
        ),
    )
    OBJECT_DETECTION = (
        "object-detection",
        TaskRow(
            auto_class="AutoModelForObjectDetection",
            pipeline_tags={"OBJECT_DETECTION": "object-detection"},
            class_suffixes=("ForObjectDetection",),
            outputs=(_QUERY_LABELS, _BOXES),
            inputs="image",
        ),
    )
    INSTANCE_SEGMENTATION = (
        "instance-segmentation",
        TaskRow(
            auto_class="AutoModelForUniversalSegmentation",
            pipeline_tags={
                "UNIVERSAL_SEGMENTATION": "image-segmentation",
                "INSTANCE_SEGMENTATION": "image-segmentation",
            },
            class_suffixes=("ForUniversalSegmentation", "ForInstanceSegmentation"),
            outputs=(_MASK_LABELS,),
            inputs="image",
        ),
    )
    ZERO_SHOT_IMAGE_CLASSIFICATION = (
        "zero-shot-image-classification",
        TaskRow(
            auto_class="AutoModelForZeroShotImageClassification",
            pipeline_tags={"ZERO_SHOT_IMAGE_CLASSIFICATION": "zero-shot-image-classification"},
            class_suffixes=("ForZeroShotImageClassification",),
            outputs=_PAIRS,
            inputs="image-text",
            class_tags={"VisionTextDualEncoderModel": "zero-shot-image-classification"},
        ),
    )
    MASKED_IMAGE_MODELING = (
        "masked-image-modeling",
        TaskRow(
            auto_class="AutoModelForMaskedImageModeling",
            pipeline_tags={"MASKED_IMAGE_MODELING": "image-feature-extraction"},
            class_suffixes=("ForMaskedImageModeling",),
            outputs=(_RECONSTRUCTED_IMAGE,),
            inputs="image",
        ),
    )
    IMAGE_PRETRAINING = (
        "image-pretraining",
        TaskRow(
            auto_class="AutoModelForPreTraining",
            pipeline_tags={},
            class_suffixes=(),
            outputs=(_RECONSTRUCTED_PATCHES,),
            inputs="image",
            class_tags={"ViTMAEForPreTraining": "image-feature-extraction"},
        ),
    )
    FEATURE_EXTRACTION = (
        "feature-extraction",
        TaskRow(
            auto_class="AutoModel",
            pipeline_tags={
                "IMAGE": "image-feature-extraction",
                "TEXT_ENCODING": "feature-extraction",
                BASE_MAPPING: "feature-extraction",
            },
            class_suffixes=(),
            outputs=(_FEATURES,),
        ),
    )

    def __new__(cls, value: str, row: TaskRow | None = None) -> "Task":
        """Make a member whose value is its name and which has its row; `Task("causal-lm")` looks one up."""
        assert row is not None
        task = str.__new__(cls, value)
        task._value_ = value
        task.row = row
        return task

    @property
    def is_language_model(self) -> bool:
        """Whether its classes are a vocabulary."""
        return self.row.outputs[0].classes == "vocabulary"

    @property
    def has_labels(self) -> bool:
        """Whether its classes are the labels of a dataset, which `config.id2label` names."""
        return self.row.outputs[0].classes == "labels"

    @property
    def is_per_token(self) -> bool:
        """Whether its items are tokens rather than examples."""
        return self.row.outputs[0].items == "token"

    @property
    def is_example_classification(self) -> bool:
        """Whether it assigns one label to a whole text or image."""
        output = self.row.outputs[0]
        return output.classes == "labels" and output.items == "example" and self.row.inputs in ("text", "image")

    @property
    def has_token_positions(self) -> bool:
        """Whether the length axis of its hidden states is that of the tokens in the batch."""
        return self.row.inputs in ("text", "image-text") or self.row.targets_in_decoder

    def accepts_teacher_for(self, teacher: "Task") -> bool:
        """Return whether a model for `teacher` has outputs that a student of this task can learn from."""
        return teacher is self or str(teacher) in self.row.teacher_tasks

    @property
    def processor_class(self) -> str:
        """The Auto class that loads its tokenizer or processor."""
        if self.row.inputs == "audio" and self.has_labels:
            return "AutoFeatureExtractor"  # AutoProcessor fails where a family's processor has a tokenizer
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
    task_and_tag = _task_and_tag(model_class)
    if task_and_tag is None:
        raise TaskError(_unsupported_model_message(model_class.__name__))
    return task_and_tag[0]


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

    attribute = "MODEL_MAPPING_NAMES" if mapping == BASE_MAPPING else f"MODEL_FOR_{mapping}_MAPPING_NAMES"
    names: Mapping[str, Any] = getattr(modeling_auto, attribute)
    return names


def output_kind(task: Task, config: Any) -> OutputKind:
    """Return what the logits of a model are, before it runs: its config decides.

    A classifier with one output is a regression, whatever its `problem_type`; a detector without a class for "no object" has
    a sigmoid per class, as do pairs of images and texts that are compared one by one (SigLIP).

    Args:
        task: The model's.
        config: The model's.

    Example:
        >>> from transformers import BertConfig
        >>> str(output_kind(Task.SEQUENCE_CLASSIFICATION, BertConfig(num_labels=1)))
        'real'
    """
    output, model_type = task.row.outputs[0], getattr(config, "model_type", None)
    if output.kind is not OutputKind.CATEGORICAL:
        return output.kind
    if output.classes == "pairs":
        return OutputKind.BERNOULLI if model_type in _SIGMOID_PAIRS else OutputKind.CATEGORICAL
    if output.items == "query":
        return OutputKind.CATEGORICAL if model_type in _WITH_NO_OBJECT_CLASS else OutputKind.BERNOULLI
    if output.classes != "labels":
        return output.kind
    # A teacher of another library may have a config without a number of labels.
    if getattr(config, "num_labels", 2) // (getattr(config, "num_subclasses", None) or 1) == 1:
        return OutputKind.BERNOULLI if output.items == "pixel" else OutputKind.REAL
    problem_type = getattr(config, "problem_type", None) if output.items == "example" else None
    kinds = {"multi_label_classification": OutputKind.BERNOULLI, "regression": OutputKind.REAL}
    return kinds.get(str(problem_type), output.kind)


def _task_and_tag(model_class: type | str) -> tuple[Task, str] | None:
    names = [model_class] if isinstance(model_class, str) else [base.__name__ for base in model_class.__mro__]
    for name in names:
        if name in _stock_classes():
            return _stock_classes()[name]
        if name in _classes_of_other_tasks():
            return None
    for task in Task:
        if any(name.endswith(task.row.class_suffixes) for name in names):
            return task, next(iter(task.row.pipeline_tags.values()))
    return None


@functools.cache
def _stock_classes() -> Mapping[str, tuple[Task, str]]:
    """Return the task and the pipeline tag of each class of Transformers that has them, by its name."""
    classes = {name: (task, tag) for task in Task for name, tag in task.row.class_tags.items()}
    for task in Task:
        excluded = _classes_of_other_tasks() if BASE_MAPPING in task.row.pipeline_tags else frozenset()
        for mapping, tag in task.row.pipeline_tags.items():
            for name in model_class_names(mapping) - excluded:
                classes.setdefault(name, (task, tag))
    return MappingProxyType(classes)


@functools.cache
def _classes_of_other_tasks() -> frozenset[str]:
    """Return the names of Transformers' classes with a head for a task that this table does not have."""
    from transformers.models.auto import modeling_auto  # it imports torch

    mappings = {name.removeprefix("MODEL_FOR_") for name in vars(modeling_auto) if name.startswith("MODEL_FOR_")}
    mappings = {name.removesuffix("_MAPPING_NAMES") for name in mappings if name.endswith("_MAPPING_NAMES")}
    covered = {mapping for task in Task for mapping in task.row.pipeline_tags}
    others: set[str] = set().union(*map(model_class_names, mappings - covered - set(_MAPPINGS_WITHOUT_A_TASK)))
    return frozenset(others.difference(*map(model_class_names, covered - {BASE_MAPPING})))


def model_class_names(mapping: str) -> set[str]:
    """Return the names of all model classes in a mapping of Transformers, named as in `mapping_names`."""
    entries = mapping_names(mapping).values()
    return {name for names in entries for name in ((names,) if isinstance(names, str) else names)}


def _unsupported_model_message(name: str) -> str:
    return (
        f"{name} is for a task that cannot be distilled; expected a model for one of {', '.join(map(str, Task))}. Load it "
        "with the AutoModelFor... class of its task."
    )
