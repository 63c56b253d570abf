"""`probe_subclasses`: whether pseudo-subclasses are likely to help a student, measured on the user's data before training."""

import copy
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Subset
from tqdm.auto import tqdm
from transformers import PreTrainedConfig, PreTrainedModel

from hf_guide.errors import OptionError
from hf_guide.initialization.report import format_count
from hf_guide.initialization.student_config import derive_student_config
from hf_guide.lelp.analysis.probe import (
    BATCH_SIZE,
    NUM_SEEDS,
    STEPS,
    ProbeData,
    ProbeStudents,
    SubclassProbe,
    run_probe,
    split_folds,
)
from hf_guide.lelp.data import (
    FeatureChunk,
    LabelReader,
    build_collator,
    check_classifier_task,
    classifier_weight,
    iter_live,
    peek_first,
)
from hf_guide.lelp.fitting import load_classifier
from hf_guide.lelp.projector import SubclassProjector
from hf_guide.lelp.validation import resolve_classes
from hf_guide.models.adapters import forward_parameters, without_adapter
from hf_guide.models.modes import eval_mode
from hf_guide.models.penultimate import find_classifier
from hf_guide.signal_cache.data import is_map_style
from hf_guide.signal_cache.writer import distributed_state
from hf_guide.tasks import task_of
from hf_guide.teachers.forward import TeacherRunner, forward_outputs
from hf_guide.utils.labels import TRAINER_LABEL_COLUMNS
from hf_guide.validation import check_integer, check_positive

logger = logging.getLogger(__name__)

MAX_SAMPLES = 4000
SHRINK_WIDTH, SHRINK_DEPTH = 4, 3
MAX_LEARNING_RATE, RATE_TIMES_WIDTH = 2e-3, 0.128
_SIZE_FIELDS = ("hidden_size", "num_attention_heads", "num_hidden_layers")
_MLP_FIELDS = ("intermediate_size", "n_inner", "hidden_dim", "d_ff", "ffn_dim")


@dataclass(frozen=True)
class ProbeFeatures:
    """What a teacher makes of N examples.

    Attributes:
        embeddings, logits: (N, D) and (N, C), float32.
        labels: (N,), the class that the teacher predicts where an example has none.
        fine_labels: (N,), if there are any.
    """

    embeddings: Tensor
    logits: Tensor
    labels: Tensor
    fine_labels: Tensor | None


def probe_subclasses(
    teacher: "str | os.PathLike[str] | PreTrainedModel",
    dataset: Any,
    eval_dataset: Any = None,
    *,
    student: "PreTrainedModel | PreTrainedConfig | None" = None,
    projector: SubclassProjector | None = None,
    steps: int = STEPS,
    num_seeds: int = NUM_SEEDS,
    batch_size: int = BATCH_SIZE,
    learning_rate: float | None = None,
    max_samples: int = MAX_SAMPLES,
    seed: int = 0,
    processing_class: Any = None,
    data_collator: Callable[[Any], Mapping[str, Any]] | None = None,
    student_collator: Callable[[Any], Mapping[str, Any]] | None = None,
    label_column: str | None = None,
    fine_label_column: str | None = None,
    revision: str | None = None,
    token: "str | bool | None" = None,
    trust_remote_code: bool = False,
    show_progress: bool = True,
) -> SubclassProbe:
    """Train small students by LELP and by KD, 900 steps by default, and decide whether subclasses are likely to help.

    The cost is one pass of the teacher over the examples and `2 * num_seeds * steps` training steps of the student, twice as
    many where these leave it undecided; a bar shows them, with the time left. Subclasses help where a student that knew
    hidden classes would be better, and can learn the teacher's features: both depend on data and student, so pass the
    student that you will train.

    Args:
        teacher: A Hub id, a folder or a loaded model, a classifier of sequences or images.
        dataset: Processed as for `Trainer`; at most `max_samples` random examples are read (of a stream the first).
        eval_dataset: Examples to measure on; None holds out another third of `dataset` for each seed.
        student: A model, of which copies are trained, or a config of the teacher's class, for random weights. None takes a
            quarter of the teacher's width and a third of its depth, with random weights.
        projector: Of this teacher; None fits one to the examples, by the defaults of `fit_subclasses`.
        steps, num_seeds, batch_size: Of the students. Pass the steps of your training where they are fewer than the default:
            the gain grows with them.
        learning_rate: Of AdamW; None takes 0.128 / width of the features, at most 0.002.
        max_samples: Of each dataset.
        seed: Of the examples, the splits and the students.
        processing_class, data_collator, label_column: As of `fit_subclasses`.
        student_collator: Makes the students' batches from the same examples, where they read something else than the
            teacher, such as the texts of a teacher's images. None makes one batch for both.
        fine_label_column: A column of fine labels. The headroom is measured as well, by students that are given these.
        revision, token, trust_remote_code: Of a teacher that is loaded here.
        show_progress: Whether to show bars.

    Raises:
        SubclassError: Too few examples, examples of one class only, too few to fit the projector, or a projector of another
            teacher.
        OptionError: An option out of range, a missing column, a student that does not read the batches, or none that can be
            derived from the teacher's config.
        TaskError: The teacher or the student is not a classifier, or its classes do not exclude each other.

    Example:
        >>> from transformers import AutoTokenizer
        >>> name = "distilbert/distilbert-base-uncased-finetuned-sst-2-english"
        >>> tokenizer = AutoTokenizer.from_pretrained(name)
        >>> processed = dataset.map(lambda row: tokenizer(row["text"])).remove_columns("text")
        >>> probe = probe_subclasses(
        ...     name, processed, processing_class=tokenizer, steps=2, num_seeds=2, show_progress=False
        ... )
        >>> probe.verdict in ("likely to help", "unlikely to help", "undecided")
        True
    """
    counts = {"steps": steps, "num_seeds": num_seeds, "batch_size": batch_size, "max_samples": max_samples}
    for name, value in counts.items():
        check_integer(name, value)
    seed = check_integer("seed", seed, 0, 2**32 - 1)
    if projector is not None and not isinstance(projector, SubclassProjector):
        raise OptionError(
            f"projector must be a SubclassProjector, as fit_subclasses returns it; found a {type(projector).__name__}."
        )
    state = distributed_state()
    hub = {"revision": revision, "token": token, "trust_remote_code": trust_remote_code}
    model = load_classifier(teacher, device=state.device, **hub)
    if projector is not None:
        projector.check_teacher(model)
    students = build_students(model, student, learning_rate)
    given = [each for each in (dataset, eval_dataset) if each is not None]
    parts = [_sample(each, max_samples, seed) for each in given]
    examples: Any = ConcatDataset(parts)
    task = task_of(model)
    collate, _ = build_collator(model, task, peek_first(parts[0])[1], data_collator, processing_class)
    student_collate = student_collator or collate
    check_student_inputs(students, student_collate([examples[0]]))
    id2label = without_adapter(model).config.id2label
    readers = [LabelReader(each, id2label, label_column, fine_label_column) for each in given]
    with eval_mode(model):
        runner = TeacherRunner(model, task, processing_class)
        chunks = chain.from_iterable(
            iter_live(runner, part, collate, labels, batch_size=batch_size)
            for part, labels in zip(parts, readers, strict=True)
        )
        total = sum(-(-len(part) // batch_size) for part in parts)
        features = _concatenate(tqdm(chunks, desc="Running the teacher", total=total, disable=not show_progress))
    count = len(parts[0])
    if projector is None:
        weight = classifier_weight(find_classifier(model, task))
        projector = SubclassProjector.fit(features.embeddings[:count], features.labels[:count], weight, seed=seed)
    return probe_features(
        students,
        examples,
        student_collate,
        projector,
        features,
        num_train=count,
        steps=steps,
        num_seeds=num_seeds,
        batch_size=batch_size,
        seed=seed,
        show_progress=show_progress,
    )


def _concatenate(chunks: Iterable[FeatureChunk]) -> ProbeFeatures:
    """Return the features of all chunks, on the CPU; the class that the teacher predicts where a label is missing."""
    columns = [
        (
            chunk.embeddings.float().cpu(),
            chunk.logits.float().cpu(),
            resolve_classes(chunk.labels, chunk.logits, len(chunk.logits), chunk.logits.shape[1], chunk.indices).cpu(),
            torch.empty(0) if chunk.fine_labels is None else chunk.fine_labels.cpu(),
        )
        for chunk in chunks
    ]
    embeddings, logits, labels, fine_labels = (torch.cat(each) for each in zip(*columns, strict=True))
    return ProbeFeatures(embeddings, logits, labels, fine_labels.long() if len(fine_labels) else None)


def check_student_inputs(students: ProbeStudents, batch: Mapping[str, Any]) -> None:
    """Check that a batch has something that the students read.

    Raises:
        OptionError: States the columns of both.
    """
    columns = {name for name, value in batch.items() if isinstance(value, Tensor)} - {*TRAINER_LABEL_COLUMNS}
    known = forward_parameters(students.build()) - {*TRAINER_LABEL_COLUMNS}
    if not columns & known:
        raise OptionError(
            f"The batches have the columns {sorted(columns)}, and the student takes {sorted(known)}. Pass student_collator=, "
            "which makes the student's batches of the same examples."
        )


def probe_features(
    students: ProbeStudents,
    examples: Any,
    collate: Callable[[Any], Mapping[str, Any]],
    projector: SubclassProjector,
    features: ProbeFeatures,
    *,
    num_train: int,
    steps: int = STEPS,
    num_seeds: int = NUM_SEEDS,
    batch_size: int = BATCH_SIZE,
    seed: int = 0,
    show_progress: bool = True,
) -> SubclassProbe:
    """Do the work of `probe_subclasses` where the teacher has run already.

    Args:
        students: Of `build_students`.
        examples: With a length and an index; those from `num_train` on are held out, or of all a third for each seed.
        collate: Makes the students' batches.
        features: Of all examples.
    """
    device = next(students.build().parameters()).device

    def inputs(rows: Tensor) -> dict[str, Tensor]:
        batch = collate([examples[row] for row in rows.tolist()])
        return {name: value.to(device) for name, value in batch.items() if isinstance(value, Tensor)}

    count, fine_labels = len(features.logits), features.fine_labels
    splits = split_folds(count, num_seeds, seed)
    if num_train < count:
        splits = [(torch.arange(num_train), torch.arange(num_train, count))] * num_seeds
    given = {"fine_labels": fine_labels} if projector.scores.needs_fine_labels else {}
    targets = projector.transform(features.embeddings, features.logits, **given).flatten(1)
    data = ProbeData(features.logits, targets, features.labels, fine_labels, splits, inputs)
    logger.info("The probe trains %d students: %s", 2 * num_seeds, students.description)
    return run_probe(data, students, steps=steps, batch_size=batch_size, seed=seed, show_progress=show_progress)


def build_students(
    teacher: Any, student: "PreTrainedModel | PreTrainedConfig | None", learning_rate: float | None = None
) -> ProbeStudents:
    """Return how the students of a probe are made and run, on the teacher's device.

    Raises:
        OptionError: No student can be made of the config, or derived from the teacher's; the learning rate is not positive.
        TaskError: A student that is no classifier.
    """
    bare, device = without_adapter(teacher), teacher.device
    how = "as given"
    if isinstance(student, nn.Module):
        template: Any = copy.deepcopy(student)
    else:
        config = smaller_config(bare.config) if student is None else student
        how = "with random weights"
        template = _from_config(type(bare), config)
    task = task_of(template)
    check_classifier_task(task, f"the student, a {type(template).__name__},")
    outputs = copy.deepcopy(template.config)
    if outputs.num_labels != bare.config.num_labels:
        raise OptionError(
            f"The student has {outputs.num_labels} outputs and the teacher {bare.config.num_labels} classes. Pass a student "
            "with one output for each class; the probe adds those of the subclasses."
        )
    width = int(find_classifier(template, task).in_features)

    def build() -> nn.Module:
        made: Any = copy.deepcopy(student) if isinstance(student, nn.Module) else _from_config(type(bare), config)
        made = nn.Module.to(made, device=device, dtype=torch.float32)
        # A model that was loaded as a teacher is frozen as a whole; adapters freeze a part.
        return made if any(each.requires_grad for each in made.parameters()) else made.requires_grad_(True)

    def forward(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        made = forward_outputs(model, task, batch, features=True)
        every = torch.ones(len(made.logits), dtype=torch.bool, device=made.logits.device)
        return made.item_features(task, every, outputs), made.logits

    if learning_rate is None:
        learning_rate = min(MAX_LEARNING_RATE, RATE_TIMES_WIDTH / width)
    description = f"{type(template).__name__} of {format_count(template.num_parameters())} parameters, {how}"
    return ProbeStudents(build, forward, width, check_positive("learning_rate", learning_rate), description)


def smaller_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return a config of a quarter of the width and a third of the depth; heads keep their size.

    Raises:
        OptionError: The config states its sizes under other names.

    Example:
        >>> from transformers import ViTConfig
        >>> small = smaller_config(ViTConfig())
        >>> small.hidden_size, small.num_attention_heads, small.intermediate_size, small.num_hidden_layers
        (192, 3, 768, 4)
    """
    sizes: dict[str, Any] = {}
    widths, depths = getattr(config, "hidden_sizes", None), getattr(config, "depths", None)
    if isinstance(widths, (list, tuple)) and isinstance(depths, (list, tuple)):
        sizes = {
            "hidden_sizes": [max(8, width // SHRINK_WIDTH) for width in widths],
            "depths": [max(1, depth // SHRINK_DEPTH) for depth in depths],
        }
        if isinstance(getattr(config, "embedding_size", None), int):
            sizes["embedding_size"] = max(8, config.embedding_size // SHRINK_WIDTH)
    elif all(isinstance(getattr(config, name, None), int) for name in _SIZE_FIELDS):
        heads = max(1, config.num_attention_heads // SHRINK_WIDTH)
        sizes = {
            "hidden_size": config.hidden_size // config.num_attention_heads * heads,
            "num_attention_heads": heads,
            "num_hidden_layers": max(1, config.num_hidden_layers // SHRINK_DEPTH),
        }
        groups = getattr(config, "num_key_value_heads", None)
        if isinstance(groups, int):
            sizes["num_key_value_heads"] = max(1, groups * heads // config.num_attention_heads)
        name = next((each for each in _MLP_FIELDS if isinstance(getattr(config, each, None), int)), None)
        if name is not None:
            sizes[name] = max(8, getattr(config, name) // SHRINK_WIDTH)
    if not sizes:
        raise OptionError(
            f"No smaller student can be derived from a {type(config).__name__}, which states its sizes in a way of its own. "
            "Pass the student, a model or a config."
        )
    return derive_student_config(config, sizes)


def _from_config(model_class: Any, config: Any) -> Any:
    """Return a model of random weights.

    Raises:
        OptionError: The class cannot be built from the config.
    """
    if not isinstance(config, PreTrainedConfig):
        raise OptionError(f"student must be a model or a config; found a {type(config).__name__}.")
    if not isinstance(config, model_class.config_class):
        raise OptionError(
            f"The student's config is a {type(config).__name__} and the teacher a {model_class.__name__}. Pass a config of "
            "the teacher's class, or a model of any class."
        )
    return model_class._from_config(copy.deepcopy(config), dtype=torch.float32)


def _sample(dataset: Any, count: int, seed: int) -> Any:
    """Return at most `count` examples, by index: random ones, or the first of a stream."""
    dataset, _ = peek_first(dataset)
    if not is_map_style(dataset):
        return list(islice(dataset, count))
    rows = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))[:count]
    return Subset(dataset, rows.tolist())
