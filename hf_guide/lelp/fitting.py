"""`fit_subclasses`: fit a projector to a teacher and a dataset, in one pass over the data."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hf_guide.errors import CaptureError, OptionError, SubclassError
from hf_guide.lelp.accumulator import StatisticsAccumulator
from hf_guide.lelp.classifier_recovery import StreamingLeastSquares
from hf_guide.lelp.data import (
    FeatureChunk,
    LabelReader,
    build_collator,
    cached_teacher_class,
    check_classifier_task,
    check_linear_classifier,
    check_single_label,
    classifier_weight,
    iter_all_cached,
    iter_cached,
    iter_live,
    peek_first,
)
from hf_guide.lelp.projector import SubclassProjector, check_fit_options, to_weight_matrix
from hf_guide.lelp.splitters.registry import get_splitter
from hf_guide.lelp.subclass_count import DEFAULT_SUBCLASS_TEMPERATURE, check_embedding_width
from hf_guide.models.adapters import without_adapter
from hf_guide.models.modes import eval_mode
from hf_guide.models.penultimate import classifier_registered, find_classifier
from hf_guide.signal_cache.config import CaptureConfig
from hf_guide.signal_cache.manifest import MANIFEST_NAME
from hf_guide.signal_cache.reader import Capture
from hf_guide.signal_cache.writer import capture_teacher, distributed_state
from hf_guide.tasks import task_of
from hf_guide.teachers.forward import TeacherRunner
from hf_guide.teachers.loading import is_loaded, load_teacher
from hf_guide.utils.deprecation import RenamedOptions, with_renamed_parameters
from hf_guide.utils.distributed import raise_on_all_ranks
from hf_guide.utils.fingerprint import weights_fingerprint
from hf_guide.validation import check_integer

_RENAMED = RenamedOptions(names={"subclass_label_column": "fine_label_column"})


@with_renamed_parameters(_RENAMED)
def fit_subclasses(
    teacher: "str | os.PathLike[str] | PreTrainedModel | Capture",
    dataset: Any = None,
    num_subclasses: int | None = None,
    *,
    subclass_temperature: float = DEFAULT_SUBCLASS_TEMPERATURE,
    temperature: float = 1.0,
    splitter: str = "lelp",
    seed: int = 0,
    processing_class: Any = None,
    data_collator: Callable[[Any], Mapping[str, Any]] | None = None,
    label_column: str | None = None,
    fine_label_column: str | None = None,
    capture: "Capture | str | os.PathLike[str] | None" = None,
    classifier: "nn.Module | str | None" = None,
    classifier_weight: Any = None,
    batch_size: int = 32,
    dtype: "str | torch.dtype | None" = None,
    revision: str | None = None,
    token: "str | bool | None" = None,
    trust_remote_code: bool = False,
    show_progress: bool = True,
) -> SubclassProjector:
    """Fit a projector to a classifier's embeddings of a dataset, in one pass (LELP, arXiv 2409.20449).

    The teacher is run, or its captured signals are read. Under `torchrun` the processes share the examples; each must call
    this function, and all return the same projector.

    Args:
        teacher: A Hub id, a folder or a loaded model, a classifier of sequences or images; or a `Capture` with embeddings.
        dataset: Processed as for `Trainer`, with a length or streamed. With a `Capture` as teacher it may be left out: then
            all captured examples count, grouped by the classes that the teacher predicts.
        num_subclasses, subclass_temperature, temperature, splitter, seed: As of `SubclassProjector.fit`; without a number,
            as many subclasses as embeddings and examples allow, 2 to 16.
        processing_class: The tokenizer or processor, which pads where there is no `data_collator`.
        data_collator: As for training.
        label_column: The column of labels; None takes "labels", "label" or "label_ids". For missing labels (None, -1, -100,
            or all) the class that the teacher predicts counts. Names, and numbers whose names are the teacher's, are aligned
            by name.
        fine_label_column: The column of fine labels, for the splitter "labels".
        capture: A `Capture` of this teacher, which is read; or a folder, into which examples that are missing are captured
            first. A killed run resumes from the folder, and training can read it instead of running the teacher.
        classifier: The layer that computes the logits, or its name, if it is not detected. It is registered for this model,
            as by `register_classifier`, unless the fit fails.
        classifier_weight: W, (classes, width), where it is not that layer's. For a `Capture` alone it is recovered from the
            data.
        batch_size: Examples of a forward pass.
        dtype, revision, token, trust_remote_code: Of a teacher that is loaded here.
        show_progress: Whether the main process shows a bar.

    Raises:
        SubclassError: As of `SubclassProjector.fit`, or the logits are not linear in the embeddings.
        OptionError: An option out of range, or a missing column.
        TaskError, TeacherError, CaptureError: The teacher is not a classifier, its classes do not exclude each other, or the
            capture is of another teacher.

    Example:
        >>> from transformers import AutoTokenizer
        >>> name = "distilbert/distilbert-base-uncased-finetuned-sst-2-english"
        >>> tokenizer = AutoTokenizer.from_pretrained(name)
        >>> processed = dataset.map(lambda row: tokenizer(row["text"])).remove_columns("text")
        >>> fit_subclasses(name, processed, processing_class=tokenizer, show_progress=False)
        SubclassProjector(2 classes x 3 subclasses of 768 numbers, splitter='lelp', temperature=1, subclass_temperature=0.5)
    """
    num_subclasses, seed = check_fit_options(num_subclasses, temperature, subclass_temperature, splitter, seed)
    batch_size = check_integer("batch_size", batch_size)
    if get_splitter(splitter).needs_fine_labels and (dataset is None or fine_label_column is None):
        raise SubclassError(
            f"The splitter {splitter!r} needs one fine label an example: give a dataset, and name their column with "
            "fine_label_column=."
        )
    state = distributed_state()
    if isinstance(teacher, (str, os.PathLike)) and (Path(teacher) / MANIFEST_NAME).is_file():
        teacher = Capture.open(teacher)
    model = None
    if isinstance(teacher, Capture):
        if capture is not None or classifier is not None:
            raise OptionError(
                "The teacher is a capture; leave capture= and classifier= out, which belong to a teacher that is a model."
            )
        capture = teacher
    else:
        if dataset is None:
            raise OptionError("A teacher that is a model needs a dataset; only a capture can do without.")
        hub = {"revision": revision, "token": token, "trust_remote_code": trust_remote_code}
        model = load_classifier(teacher, dtype=dtype, device=state.device, **hub)
    with classifier_registered(model, classifier):
        if capture is not None and not isinstance(capture, Capture):
            capture = _cache_features(
                model, dataset, capture, data_collator, processing_class, batch_size, show_progress
            )
        source = _FeatureSource(model, capture, dataset, data_collator, processing_class)
        weight = _resolve_classifier_weight(source, classifier_weight, num_subclasses, splitter)
        classes, width = len(source.id2label), source.width if weight is None else weight.shape[1]
        labels = LabelReader(dataset, source.id2label, label_column, fine_label_column)
        statistics = StatisticsAccumulator(classes, width, splitter=splitter, seed=seed)
        chunks = tqdm(
            source.chunks(labels, batch_size, state),
            desc="Fitting subclasses",
            unit="batch",
            disable=not (show_progress and state.is_main_process),
        )
        weight = _accumulate(statistics, chunks, weight, None if classifier_weight is not None else source.model)
        return SubclassProjector.from_statistics(
            statistics,
            weight,
            num_subclasses,
            subclass_temperature=subclass_temperature,
            temperature=temperature,
            id2label=source.id2label,
            teacher=source.name,
            teacher_fingerprint=source.fingerprint,
        )


def load_classifier(teacher: Any, **options: Any) -> Any:
    """Return the teacher, loaded with the options of `load_teacher`, after checking that it is a single-label classifier."""
    if not is_loaded(teacher) and not isinstance(teacher, (str, os.PathLike)):
        raise OptionError(
            f"A teacher must be a Hub id, a folder, a PreTrainedModel or a Capture; found a {type(teacher).__name__}. For "
            "any other, pass its embeddings to SubclassProjector.fit."
        )
    model = load_teacher(teacher, **options)
    check_classifier_task(task_of(model), type(model).__name__)
    check_single_label(without_adapter(model).config, type(model).__name__)
    return model


def _accumulate(
    statistics: StatisticsAccumulator, chunks: Iterable[FeatureChunk], weight: Tensor | None, model: Any
) -> Tensor:
    """Add all chunks of all processes to `statistics`; return the classifier's weight, recovered from them where it is None.

    Args:
        model: The model whose classifier has the weight, which is compared with the first chunk; None does not compare.
    """
    moments = statistics.moments
    regression = StreamingLeastSquares(moments.num_classes, moments.width) if weight is None else None
    with raise_on_all_ranks(SubclassError):
        for number, chunk in enumerate(chunks):
            if number == 0 and weight is not None and model is not None:
                check_linear_classifier(weight, chunk, model)
            statistics.update(chunk.embeddings, chunk.labels, chunk.logits, chunk.fine_labels, chunk.indices)
            if regression is not None:
                regression.update(chunk.embeddings, chunk.logits)
    statistics.reduce()
    if regression is not None:
        regression.reduce()
        weight = regression.weight(moments)
    assert weight is not None
    return weight


class _FeatureSource:
    """The source of embeddings and logits: a model that is run, or a capture, with its model where that is loaded."""

    def __init__(self, model: Any, capture: Capture | None, dataset: Any, data_collator: Any, processing_class: Any):
        self.model, self.capture, self.dataset = model, capture, dataset
        self.data_collator, self.processing_class = data_collator, processing_class
        if capture is not None:
            manifest = capture.manifest
            check_classifier_task(capture.task, str(capture.folder))
            check_single_label(manifest.teacher_config, str(capture.folder))
            if "features" not in manifest.shapes:
                raise CaptureError(
                    f"{capture.folder} holds no embeddings, which subclasses are computed from. Capture again with "
                    'config={"save_penultimate": True}.'
                )
            capture.check(processing_class=processing_class, teacher=model)
            self.task, self.name, self.fingerprint = capture.task, manifest.teacher, manifest.weights
            names = manifest.teacher_config.get("id2label") or {}
            self.id2label = {number: _label_name(names, number) for number in range(manifest.classes)}
        else:
            config = without_adapter(model).config
            self.task, self.fingerprint = task_of(model), weights_fingerprint(model)
            self.name = config._name_or_path or type(without_adapter(model)).__name__
            self.id2label = {int(number): str(name) for number, name in config.id2label.items()}

    @property
    def width(self) -> int:
        """The width of captured embeddings."""
        assert self.capture is not None
        return int(self.capture.manifest.shapes["features"][-1])

    def weight(self) -> Tensor | None:
        """Return the classifier's weight, (classes, width), or None without a model."""
        return None if self.model is None else classifier_weight(find_classifier(self.model, self.task))

    def chunks(self, labels: LabelReader, batch_size: int, state: PartialState) -> Iterator[FeatureChunk]:
        """Yield the features of this process's shard of the examples."""
        shard = {"rank": state.process_index, "world_size": state.num_processes}
        capture, dataset = self.capture, self.dataset
        if dataset is None:
            assert capture is not None
            yield from iter_all_cached(capture, batch_size=batch_size, **shard)
            return
        dataset, first = peek_first(dataset)
        model = self.model if self.model is not None or capture is None else cached_teacher_class(capture)
        collate, _ = build_collator(model, self.task, first, self.data_collator, self.processing_class)
        if capture is not None:
            yield from iter_cached(capture, dataset, collate, labels, batch_size=batch_size, **shard)
            return
        with eval_mode(self.model):
            teacher = TeacherRunner(self.model, self.task, self.processing_class)
            yield from iter_live(teacher, dataset, collate, labels, batch_size=batch_size, **shard)


def _resolve_classifier_weight(
    source: _FeatureSource, classifier_weight: Any, num_subclasses: int | None, splitter: str
) -> Tensor | None:
    """Return W, (classes, width), as passed or of the model; None where it must be recovered from the data.

    Raises:
        SubclassError: It has another number of classes than the teacher, or is too narrow for the subclasses.
    """
    weight = source.weight() if classifier_weight is None else to_weight_matrix(classifier_weight)
    if weight is None:
        return None
    rows, columns = weight.shape
    if rows != len(source.id2label):
        hint = f" It looks transposed: give it as ({columns}, {rows})." if columns == len(source.id2label) else ""
        raise SubclassError(
            f"The classifier's weight has {rows} rows; the teacher has {len(source.id2label)} classes.{hint}"
        )
    check_embedding_width(weight, num_subclasses, splitter)
    return weight


def _cache_features(
    model: Any, dataset: Any, folder: Any, data_collator: Any, processing_class: Any, batch_size: int, show: bool
) -> Capture:
    _, first = peek_first(dataset)
    _, drop = build_collator(model, task_of(model), first, data_collator, processing_class)
    config = CaptureConfig(
        save_penultimate=True, hidden_dtype="float32", batch_size=batch_size, remove_unused_columns=drop
    )
    return capture_teacher(
        model,
        dataset,
        folder,
        processing_class=processing_class,
        data_collator=data_collator,
        config=config,
        show_progress=show,
    )


def _label_name(names: Mapping[Any, str], number: int) -> str:
    return str(names.get(number, names.get(str(number), f"LABEL_{number}")))
