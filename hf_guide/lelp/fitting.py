"""`fit_subclasses`: from a teacher and a dataset to a projector, in one pass."""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hf_guide.errors import CaptureError, HfGuideError, OptionError, SubclassError
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
    iter_all_cached,
    iter_cached,
    iter_live,
    linear_weight,
    peek_first,
)
from hf_guide.lelp.projector import SubclassProjector, check_embedding_width, check_fit_options, to_weight_matrix
from hf_guide.lelp.splitters.registry import get_splitter
from hf_guide.lelp.validation import check_integer
from hf_guide.models.adapters import without_adapter
from hf_guide.models.modes import eval_mode
from hf_guide.models.penultimate import classifier_registered, find_classifier
from hf_guide.signal_cache.config import CaptureConfig
from hf_guide.signal_cache.manifest import MANIFEST_NAME
from hf_guide.signal_cache.reader import Capture
from hf_guide.signal_cache.teacher_outputs import TeacherRunner
from hf_guide.signal_cache.writer import capture_teacher, distributed_state
from hf_guide.tasks import task_of
from hf_guide.teachers.loading import load_teacher
from hf_guide.utils.distributed import rank_and_world_size, report_missing_ranks
from hf_guide.utils.fingerprint import weights_fingerprint


def fit_subclasses(
    teacher: "str | os.PathLike[str] | PreTrainedModel | Capture",
    dataset: Any = None,
    num_subclasses: int = 8,
    *,
    subclass_temperature: float = 1.0,
    temperature: float = 1.0,
    splitter: str = "lelp",
    seed: int = 0,
    processing_class: Any = None,
    data_collator: Callable[[Any], Mapping[str, Any]] | None = None,
    label_column: str | None = None,
    subclass_label_column: str | None = None,
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
    """Fit a projector to what a classifier makes of a dataset, in one pass (LELP, arXiv 2409.20449).

    The teacher runs here; or what it says was captured, and need not be run. Under `torchrun` the processes share the
    examples; each calls this and returns the same projector.

    Args:
        teacher: a Hub id, a folder or a loaded model, for sequences or images; or a `Capture` with embeddings.
        dataset: processed as for `Trainer`, with a length or streamed. Of a `Capture` it may be left out: then all that was
            captured counts, by the teacher's own classes.
        num_subclasses: S.
        subclass_temperature, temperature, splitter, seed: as of `SubclassProjector.fit`.
        processing_class: the tokenizer or processor, used to pad where there is no collator.
        data_collator: as for training, but for its padding.
        label_column: where labels are; by default "labels", "label" or "label_ids". Missing ones (None, -1, -100, or all)
            stand for the teacher's own class. Names, and numbers whose names are the teacher's, are aligned by name.
        subclass_label_column: finer labels, for the splitter "labels".
        capture: a `Capture` of this teacher; or a folder, where what it says is kept: that which is there is read, what is
            missing is captured first, so that a killed run goes on where it was and training needs no teacher.
        classifier: the layer that makes the logits, or its name, where it is not found. It is remembered, as by
            `register_classifier`, unless the fit fails.
        classifier_weight: W, (classes, width), where it is not that layer's. Of a `Capture` alone it is told from the data.
        batch_size: examples a forward pass.
        dtype, revision, token, trust_remote_code: of a teacher that is loaded here.
        show_progress: whether the first process shows a bar.

    Raises:
        SubclassError: as of `SubclassProjector.fit`, or logits that are not linear in the embeddings.
        OptionError: an option out of range, a missing column.
        TaskError, TeacherError, CaptureError: a teacher that is no classifier, or whose classes do not exclude each other; a
            capture that is not of it.
    """
    num_subclasses, seed = check_fit_options(num_subclasses, temperature, subclass_temperature, splitter, seed)
    batch_size = check_integer("batch_size", batch_size)
    if get_splitter(splitter).needs_labels and (dataset is None or subclass_label_column is None):
        raise SubclassError(
            f"The splitter {splitter!r} needs one finer label an example: give a dataset, and name their column with "
            "subclass_label_column=."
        )
    state = distributed_state()
    if isinstance(teacher, (str, os.PathLike)) and (Path(teacher) / MANIFEST_NAME).is_file():
        teacher = Capture.open(teacher)
    model = None
    if isinstance(teacher, Capture):
        if capture is not None or classifier is not None:
            raise OptionError(
                "The teacher is a capture already; capture= and classifier= are for one that is a model."
            )
        capture = teacher
    else:
        if dataset is None:
            raise OptionError("A teacher that is run needs a dataset; only a capture can do without.")
        model = _load_model(teacher, state, dtype, revision, token, trust_remote_code)
        check_classifier_task(task_of(model), type(model).__name__)
        check_single_label(without_adapter(model).config, type(model).__name__)
    with classifier_registered(model, classifier):
        if capture is not None and not isinstance(capture, Capture):
            capture = _cache_features(
                model, dataset, capture, data_collator, processing_class, batch_size, show_progress
            )
        source = _FeatureSource(model, capture, dataset, data_collator, processing_class)
        weight = _resolve_classifier_weight(source, classifier_weight, num_subclasses, splitter)
        classes, width = len(source.id2label), source.width if weight is None else weight.shape[1]
        labels = LabelReader(dataset, source.id2label, label_column, subclass_label_column)
        gathering = StatisticsAccumulator(classes, width, splitter=splitter, seed=seed)
        regression = StreamingLeastSquares(classes, width) if weight is None else None
        with _raise_on_all_ranks():
            bar = tqdm(
                source.parts(labels, batch_size, state),
                desc="Fitting subclasses",
                unit="batch",
                disable=not (show_progress and state.is_main_process),
            )
            for number, part in enumerate(bar):
                if number == 0 and weight is not None and classifier_weight is None:
                    check_linear_classifier(weight, part, source.model)
                gathering.add(part.embeddings, part.labels, part.logits, part.finer, part.numbers)
                if regression is not None:
                    regression.update(part.embeddings, part.logits)
        gathering.reduce()
        if regression is not None:
            regression.reduce()
            weight = regression.weight(gathering.moments)
        assert weight is not None
        return SubclassProjector.from_statistics(
            gathering,
            weight,
            num_subclasses,
            subclass_temperature=subclass_temperature,
            temperature=temperature,
            id2label=source.id2label,
            teacher=source.name,
            teacher_fingerprint=source.fingerprint,
        )


class _FeatureSource:
    """Where embeddings and logits come from: a model that is run, or a capture, with its model where that is at hand."""

    def __init__(self, model: Any, capture: Capture | None, dataset: Any, data_collator: Any, processing_class: Any):
        self.model, self.capture, self.dataset = model, capture, dataset
        self.data_collator, self.processing_class = data_collator, processing_class
        if capture is not None:
            manifest = capture.manifest
            check_classifier_task(capture.task, str(capture.folder))
            check_single_label(manifest.teacher_config, str(capture.folder))
            if "embedding" not in manifest.shapes:
                raise CaptureError(
                    f"{capture.folder} holds no embeddings, which subclasses are made of. Capture again with "
                    'config={"embedding": True}.'
                )
            capture.check(processing_class=processing_class, teacher=model)
            self.task, self.name, self.fingerprint = capture.task, manifest.teacher, manifest.weights
            names = manifest.teacher_config.get("id2label") or {}
            self.id2label = {number: _class_name(names, number) for number in range(manifest.classes)}
        else:
            config = without_adapter(model).config
            self.task, self.fingerprint = task_of(model), weights_fingerprint(model)
            self.name = config._name_or_path or type(without_adapter(model)).__name__
            self.id2label = {int(number): str(name) for number, name in config.id2label.items()}
        if len(self.id2label) < 2:
            raise SubclassError(
                f"{self.name} has a single output; subclasses are of two classes or more. Give a classifier with one output "
                "a class."
            )

    @property
    def width(self) -> int:
        """How many numbers an embedding has, by the capture."""
        assert self.capture is not None
        return int(self.capture.manifest.shapes["embedding"][-1])

    def weight(self) -> Tensor | None:
        """Return the classifier's weight, (classes, width), where the model is at hand."""
        return None if self.model is None else linear_weight(find_classifier(self.model, self.task))

    def parts(self, labels: LabelReader, batch_size: int, state: PartialState) -> Iterator[FeatureChunk]:
        """Yield this process's share of the examples."""
        share = {"process": state.process_index, "processes": state.num_processes}
        capture, dataset = self.capture, self.dataset
        if dataset is None:
            assert capture is not None
            yield from iter_all_cached(capture, batch_size=batch_size, **share)
            return
        dataset, first = peek_first(dataset)
        takes = self.model if self.model is not None or capture is None else cached_teacher_class(capture)
        collate, _ = build_collator(takes, self.task, first, self.data_collator, self.processing_class)
        if capture is not None:
            yield from iter_cached(capture, dataset, collate, labels, batch_size=batch_size, **share)
            return
        with eval_mode(self.model):
            listener = TeacherRunner(self.model, self.task, self.processing_class)
            yield from iter_live(listener, dataset, collate, labels, batch_size=batch_size, **share)


def _load_model(
    teacher: Any, state: PartialState, dtype: Any, revision: str | None, token: Any, trust_remote_code: bool
) -> Any:
    if isinstance(teacher, PreTrainedModel) or hasattr(teacher, "get_base_model"):
        if dtype is not None or revision is not None:
            raise OptionError("dtype and revision are for a teacher that is loaded here; this one is loaded already.")
        return teacher
    if not isinstance(teacher, (str, os.PathLike)):
        raise OptionError(
            f"A teacher is a Hub id, a folder, a PreTrainedModel or a Capture, not a {type(teacher).__name__}. Of any other, "
            "SubclassProjector.fit takes the arrays."
        )
    return load_teacher(
        teacher, dtype=dtype, device=state.device, revision=revision, token=token, trust_remote_code=trust_remote_code
    )


def _resolve_classifier_weight(
    source: _FeatureSource, given: Any, num_subclasses: int, splitter: str
) -> Tensor | None:
    """Return W, (classes, width), as it is given or of the model; None where it is to be told from the data.

    Raises:
        SubclassError: it is not of this teacher's classes, or has no room for the subclasses.
    """
    weight = source.weight() if given is None else to_weight_matrix(given)
    if weight is None:
        return None
    rows, columns = weight.shape
    if rows != len(source.id2label):
        turned = f" It looks transposed: give it as ({columns}, {rows})." if columns == len(source.id2label) else ""
        raise SubclassError(
            f"The classifier's weight has {rows} rows; the teacher has {len(source.id2label)} classes.{turned}"
        )
    check_embedding_width(weight, num_subclasses, splitter)
    return weight


def _cache_features(
    model: Any, dataset: Any, folder: Any, data_collator: Any, processing_class: Any, batch_size: int, show: bool
) -> Capture:
    _, first = peek_first(dataset)
    _, drop = build_collator(model, task_of(model), first, data_collator, processing_class)
    config = CaptureConfig(embedding=True, hidden_dtype="float32", batch_size=batch_size, remove_unused_columns=drop)
    return capture_teacher(
        model,
        dataset,
        folder,
        processing_class=processing_class,
        data_collator=data_collator,
        config=config,
        show_progress=show,
    )


@contextlib.contextmanager
def _raise_on_all_ranks() -> Iterator[None]:
    """Let an error of one process be one of all, before they wait for each other."""
    failure: HfGuideError | None = None
    try:
        yield
    except HfGuideError as error:
        failure = error
    if rank_and_world_size()[1] > 1:
        everyone: list[str | None] = [None] * rank_and_world_size()[1]
        with report_missing_ranks():
            dist.all_gather_object(everyone, None if failure is None else str(failure))
        said = [(rank, message) for rank, message in enumerate(everyone) if message is not None]
        if failure is None and said:
            raise SubclassError(f"Process {said[0][0]} found: {said[0][1]}")
    if failure is not None:
        raise failure


def _class_name(names: Mapping[Any, str], number: int) -> str:
    return str(names.get(number, names.get(str(number), f"LABEL_{number}")))
