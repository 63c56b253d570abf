"""`SubclassProjector`: from a teacher's embeddings and logits to the probabilities of pseudo-subclasses.

LELP, arXiv 2409.20449: the linear structure inside each class becomes distillation targets; each class keeps exactly the
probability that the teacher gives it.
"""

import copy
import dataclasses
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo, HfApi
from torch import Tensor, nn

from hf_guide.errors import OptionError, SubclassError
from hf_guide.lelp.accumulator import StatisticsAccumulator
from hf_guide.lelp.data import check_single_label
from hf_guide.lelp.projector_files import read_projector, write_projector
from hf_guide.lelp.splitters.registry import get_splitter
from hf_guide.lelp.splitters.scorers import LinearScorer, SubclassScorer
from hf_guide.lelp.subclass_count import (
    DEFAULT_SUBCLASS_TEMPERATURE,
    MIN_SUBCLASSES,
    check_embedding_width,
    choose_num_subclasses,
)
from hf_guide.lelp.validation import as_tensor, check_finite_rows, check_integer_labels, iter_aligned_chunks
from hf_guide.signal_cache.reader import Capture
from hf_guide.utils.deprecation import RenamedOptions, warn_renamed, with_renamed_parameters
from hf_guide.utils.fingerprint import weights_fingerprint
from hf_guide.utils.finite import is_finite
from hf_guide.validation import check_integer, check_positive

_RENAMED = RenamedOptions(names={"subclass_labels": "fine_labels"})


@dataclass(frozen=True, eq=False)
class SubclassProjector:
    """Computes subclass targets from a teacher's embeddings and logits. The flat axis of classes times subclasses is
    class-major everywhere: subclass s of class c is number c * num_subclasses + s.

    Attributes:
        scores: Scores an embedding for each subclass.
        num_classes, num_subclasses, embedding_size: C, S and D.
        temperature: tau, of the teacher's logits and of the loss.
        subclass_temperature: beta, of the scores within a class.
        splitter, seed: Of the split that made the subclasses.
        id2label: The names of the classes.
        counts: (C,), the number of examples of each class, float64.
        eigenvalues: (C, D), descending: the spectrum of each class's covariance in the null space of the classifier.
        variances: (C,): the trace of each class's whole covariance.
        teacher: The teacher's name or path, if known.
        teacher_fingerprint: Of its weights (`weights_fingerprint`), if there is a model.
        num_subclasses_rule: The limit by which `num_subclasses` was chosen; None where it was given.

    Example:
        >>> import torch
        >>> embeddings, labels = torch.randn(300, 16), torch.arange(300) % 2
        >>> classifier_weight = torch.randn(2, 16)
        >>> projector = SubclassProjector.fit(embeddings, labels, classifier_weight, num_subclasses=4)
        >>> projector.transform(embeddings, embeddings @ classifier_weight.T).shape
        torch.Size([300, 2, 4])
    """

    scores: SubclassScorer
    num_classes: int
    num_subclasses: int
    embedding_size: int
    temperature: float
    subclass_temperature: float
    splitter: str
    seed: int
    id2label: Mapping[int, str]
    counts: Tensor
    eigenvalues: Tensor
    variances: Tensor
    teacher: str | None = None
    teacher_fingerprint: str | None = None
    num_subclasses_rule: str | None = None

    def __post_init__(self) -> None:
        for name in ("temperature", "subclass_temperature"):
            object.__setattr__(self, name, check_positive(name, getattr(self, name)))

    @classmethod
    @with_renamed_parameters(_RENAMED)
    def fit(
        cls,
        embeddings: Any,
        labels: Any,
        classifier_weight: Any,
        num_subclasses: int | None = None,
        *,
        logits: Any = None,
        subclass_temperature: float = DEFAULT_SUBCLASS_TEMPERATURE,
        temperature: float = 1.0,
        splitter: str = "lelp",
        seed: int = 0,
        fine_labels: Any = None,
        id2label: "Mapping[int, str] | Sequence[str] | None" = None,
    ) -> "SubclassProjector":
        """Fit a projector to arrays, torch's or NumPy's, of any teacher and modality.

        Args:
            embeddings: (N, D), or an iterable of chunks (any, D), of which only statistics are kept.
            labels: (N,), whole numbers or bool, or an iterable of chunks; -1, -100 and, in a list, None, or None for all,
                mark missing ones: those examples are grouped by the class that the teacher predicts.
            classifier_weight: W, (C, D); a single row means two classes, as in scikit-learn.
            num_subclasses: S, at least 1; None takes as many as the embeddings and the smallest class allow, 2 to 16 (the
                projector's `num_subclasses_rule` states which limit was met).
            logits: (N, C), or chunks; needed where labels are missing.
            subclass_temperature: beta: the larger, the more even the probabilities of a class's subclasses.
            temperature: tau, of the teacher's logits and the student's. Try 1 first: a larger one flattens the classes'
                probabilities and not the subclasses' shares, so it also shifts weight from the former to the latter.
            splitter: "lelp", "kmeans" (needs scikit-learn), "labels", or one of `register_splitter`.
            seed: Of the rotation, and of the splitter's other random numbers.
            fine_labels: (N,), or chunks, for the splitter "labels".
            id2label: The names of the classes.

        Raises:
            SubclassError: Too few examples in a class, or none; no variance; labels outside the classes; shapes that do not
                match, D < C + S among them; embeddings that are not finite.
            OptionError: S or a temperature that is not positive; an unknown splitter, or one that is not installed.
        """
        weight = to_weight_matrix(classifier_weight)
        num_subclasses, seed = check_fit_options(num_subclasses, temperature, subclass_temperature, splitter, seed)
        chunks = iter_aligned_chunks(embeddings, labels, logits, fine_labels)
        first = next(chunks, None)
        if first is not None:
            check_not_transposed(weight, first[0])
        check_embedding_width(weight, num_subclasses, splitter)
        statistics = StatisticsAccumulator(*weight.shape, splitter=splitter, seed=seed)
        for chunk in chunks if first is None else chain([first], chunks):
            statistics.update(*chunk)
        return cls.from_statistics(
            statistics,
            weight,
            num_subclasses,
            subclass_temperature=subclass_temperature,
            temperature=temperature,
            id2label=id2label,
        )

    @classmethod
    def from_statistics(
        cls,
        statistics: StatisticsAccumulator,
        classifier_weight: Tensor,
        num_subclasses: int | None,
        *,
        subclass_temperature: float = DEFAULT_SUBCLASS_TEMPERATURE,
        temperature: float = 1.0,
        id2label: "Mapping[int, str] | Sequence[str] | None" = None,
        teacher: str | None = None,
        teacher_fingerprint: str | None = None,
    ) -> "SubclassProjector":
        """Return the projector of accumulated statistics. Arguments and errors are those of `fit`."""
        classes, width = check_embedding_width(classifier_weight, num_subclasses, statistics.splitter)
        names = _class_names(id2label, classes)
        class_names = list(names.values()) if id2label else None
        inputs = statistics.splitter_inputs(classifier_weight, num_subclasses or MIN_SUBCLASSES, class_names)
        spectra = torch.stack([torch.linalg.eigvalsh(inputs.covariance(number)).flip(0) for number in range(classes)])
        rule = None
        if num_subclasses is None:
            num_subclasses, rule = choose_num_subclasses(statistics, spectra, names)
            inputs = dataclasses.replace(inputs, num_subclasses=num_subclasses)
        scores = get_splitter(statistics.splitter).split(inputs)
        tensors = {name: tensor.cpu().contiguous() for name, tensor in scores.tensors().items()}
        moments = statistics.moments
        variances = moments.scatters.diagonal(dim1=1, dim2=2).sum(1) / moments.counts
        return cls(
            scores=dataclasses.replace(scores, **tensors),
            num_classes=classes,
            num_subclasses=int(num_subclasses),
            embedding_size=width,
            temperature=float(temperature),
            subclass_temperature=float(subclass_temperature),
            splitter=statistics.splitter,
            seed=statistics.seed,
            id2label=names,
            counts=moments.counts.cpu(),
            eigenvalues=spectra.clamp(min=0).cpu(),
            variances=variances.cpu(),
            teacher=teacher,
            teacher_fingerprint=teacher_fingerprint,
            num_subclasses_rule=rule,
        )

    @with_renamed_parameters(_RENAMED)
    @torch.no_grad()
    def transform(self, embeddings: Any, logits: Any, fine_labels: Any = None) -> Tensor:
        """Return subclass probabilities: softmax(logits / tau)_c softmax_s(scores_c / beta).

        Args:
            embeddings: (N, D), tensor or NumPy array.
            logits: (N, C); log-probabilities do as well.
            fine_labels: (N,), needed only by the splitter "labels".

        Returns:
            (N, C, S), of the dtype of the embeddings, float32 at least, on their device. Those of a class sum to exactly
            the teacher's probability of the class.

        Raises:
            SubclassError: Another shape, or values that are not finite.
        """
        h, z = self._rows(embeddings), as_tensor(logits)
        if z.ndim != 2 or z.shape[1] != self.num_classes or len(z) != len(h):
            raise SubclassError(
                f"{len(h)} embeddings need logits of the shape ({len(h)}, {self.num_classes}); found {tuple(z.shape)}."
            )
        dtype = torch.promote_types(h.dtype if h.is_floating_point() else torch.float64, torch.float32)
        shares = (self.coordinates(h, fine_labels) / self.subclass_temperature).softmax(-1)
        z = z.to(shares)
        if bool(z.isnan().any() | z.isposinf().any() | z.isneginf().all(1).any()):
            wrong = z.isnan().any(1) | z.isposinf().any(1) | z.isneginf().all(1)
            raise SubclassError(f"The logits of example {int(wrong.int().argmax())} are not finite.")
        return ((z / self.temperature).softmax(-1)[:, :, None] * shares).to(dtype)

    @with_renamed_parameters(_RENAMED)
    @torch.no_grad()
    def coordinates(self, embeddings: Any, fine_labels: Any = None) -> Tensor:
        """Return scores (N, C, S) of embeddings (N, D), before temperature and softmax, in float64 where the device has it.

        For linear splitters these are coordinates in each class's subspace.

        Raises:
            SubclassError: Another shape, or values that are not finite.
        """
        h = self._rows(embeddings)
        h = h.to(torch.float32 if h.device.type == "mps" else torch.float64)
        check_finite_rows(h, range(len(h)), "embedding")
        if fine_labels is None:
            return self.scores.score(h, None)
        labels = as_tensor(fine_labels)
        if labels.shape != (len(h),):
            raise SubclassError(f"{len(h)} embeddings need {len(h)} fine_labels; found {tuple(labels.shape)}.")
        check_integer_labels(labels, "Fine labels")
        return self.scores.score(h, labels.long().to(h.device))

    def _rows(self, embeddings: Any) -> Tensor:
        """Return embeddings as a tensor (N, D).

        Raises:
            SubclassError: Another shape.
        """
        rows = as_tensor(embeddings)
        if rows.ndim != 2 or rows.shape[1] != self.embedding_size:
            raise SubclassError(
                f"Embeddings must have the shape (N, {self.embedding_size}); found {tuple(rows.shape)}. Take those of the "
                f"teacher that this projector was fitted to{f', {self.teacher}' if self.teacher else ''}."
            )
        return rows

    @property
    def explained_variance_ratio(self) -> Tensor:
        """The share (C,) of each class's variance in the classifier's null space that its first S directions explain."""
        explained = self.eigenvalues[:, : self.num_subclasses].sum(1)
        return explained / self.eigenvalues.sum(1).clamp(min=1e-300)

    @property
    def explained(self) -> Tensor:
        """Deprecated: use `explained_variance_ratio`."""
        warn_renamed("SubclassProjector", "explained", "explained_variance_ratio")
        return self.explained_variance_ratio

    @property
    def subclass_id2label(self) -> dict[int, str]:
        """The names of all C * S subclasses, such as "positive/3"."""
        size = self.num_subclasses
        return {c * size + s: f"{self.id2label[c]}/{s}" for c in range(self.num_classes) for s in range(size)}

    def at(
        self, *, temperature: float | None = None, subclass_temperature: float | None = None
    ) -> "SubclassProjector":
        """Deprecated: use `with_temperature`."""
        warn_renamed("SubclassProjector", "at", "with_temperature")
        return self.with_temperature(temperature, subclass_temperature)

    def with_temperature(
        self, temperature: float | None = None, subclass_temperature: float | None = None
    ) -> "SubclassProjector":
        """Return the same projector with other temperatures, without fitting again; None keeps one.

        Raises:
            OptionError: Not a positive number.
        """
        return dataclasses.replace(
            self,
            temperature=self.temperature if temperature is None else temperature,
            subclass_temperature=self.subclass_temperature if subclass_temperature is None else subclass_temperature,
        )

    def head_offsets(self) -> tuple[Tensor, Tensor]:
        """Return what the rows of subclasses add to their class's row, (C * S, D), and to its bias, (C * S,).

        A head of the teacher's rows w_c + tau / beta u_{c,s}, u the directions, has the logits of the subclasses, up to a
        number that all subclasses of a class share.

        Raises:
            OptionError: The splitter finds no directions.
        """
        if not isinstance(self.scores, LinearScorer):
            raise OptionError(
                f"The splitter {self.splitter!r} finds no directions that a head could be initialized from. Leave projector "
                "out: all rows of a class are then the teacher's."
            )
        slope = self.temperature / self.subclass_temperature
        rows = slope * self.scores.directions.transpose(1, 2).flatten(0, 1)
        return rows, slope * self.scores.offsets.flatten()

    def settings(self) -> dict[str, Any]:
        """Return what the probabilities depend on besides the scores' tensors."""
        names = ("num_classes", "num_subclasses", "temperature", "subclass_temperature", "splitter", "seed")
        return {name: getattr(self, name) for name in names} | {"teacher_fingerprint": self.teacher_fingerprint}

    def fingerprint(self) -> str:
        """Return a hash of everything that the probabilities depend on."""
        digest = blake2b(repr(sorted(self.settings().items())).encode(), digest_size=16)
        for name, tensor in sorted(self.scores.tensors().items()):
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def check_teacher(self, teacher: "nn.Module | Capture") -> None:
        """Check that a teacher, or a capture of one, is the one that this projector was fitted to.

        A projector that was fitted to arrays is compared by the number of classes alone.

        Raises:
            SubclassError: States what differs.
            TaskError: The teacher's classes do not exclude each other.
        """
        if isinstance(teacher, Capture):
            classes, fingerprint, name = teacher.manifest.classes, teacher.manifest.weights, str(teacher.folder)
            check_single_label(teacher.manifest.teacher_config, name)
        else:
            config: Any = getattr(teacher, "config", None)
            if config is not None:
                check_single_label(config, type(teacher).__name__)
            classes = getattr(config, "num_labels", self.num_classes)
            fingerprint = weights_fingerprint(teacher)
            name = getattr(config, "_name_or_path", "") or type(teacher).__name__
        if classes != self.num_classes:
            raise SubclassError(f"The teacher {name} has {classes} classes; this projector has {self.num_classes}.")
        if self.teacher_fingerprint is not None and fingerprint != self.teacher_fingerprint:
            raise SubclassError(
                f"This projector is of another teacher ({self.teacher}, fingerprint {self.teacher_fingerprint}) than {name} "
                f"({fingerprint}), so its directions do not apply. Fit one to this teacher with fit_subclasses."
            )

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        **push: Any,
    ) -> list[str]:
        """Write `subclass_projector.json` and `subclass_projector.safetensors` into a folder; return their paths.

        Args:
            push_to_hub: Upload them as well, to `repo_id` (by default the folder's name).
            **push: Further arguments of `push_to_hub`.

        Raises:
            NotADirectoryError: `save_directory` is a file.
        """
        paths = write_projector(self, save_directory)
        if push_to_hub:
            self.push_to_hub(repo_id or Path(save_directory).name, **push)
        return paths

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> "SubclassProjector":
        """Load a projector from a folder or from the Hub.

        Raises:
            SubclassError: The files are not those of a projector, or damaged.
            OSError: There is no such folder, nor a repository of this name on the Hub.
        """
        where: dict[str, Any] = {
            "revision": revision,
            "token": token,
            "cache_dir": cache_dir,
            "local_files_only": local_files_only,
        }
        return cls(**read_projector(pretrained_model_name_or_path, **where))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
    ) -> CommitInfo:
        """Upload both files in one commit, to a new repository or next to the files of an existing one."""
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=commit_message or "Upload subclass projector",
                commit_description=commit_description,
                revision=revision,
                create_pr=create_pr,
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> "SubclassProjector":
        return dataclasses.replace(self, id2label=copy.copy(dict(self.id2label)))  # its tensors are never modified

    def __repr__(self) -> str:
        return (
            f"SubclassProjector({self.num_classes} classes x {self.num_subclasses} subclasses of {self.embedding_size} "
            f"numbers, splitter={self.splitter!r}, temperature={self.temperature:g}, "
            f"subclass_temperature={self.subclass_temperature:g})"
        )


def to_weight_matrix(classifier_weight: Any) -> Tensor:
    """Return W, (C, D), float64; a single row w means two classes and becomes -w / 2 and w / 2.

    Raises:
        SubclassError: Not a matrix, or not finite.
    """
    weight = as_tensor(classifier_weight)
    if weight.ndim != 2:
        raise SubclassError(
            f"A classifier's weight must have the shape (classes, width); found {tuple(weight.shape)}."
        )
    weight = weight.to("cpu", torch.float64)
    if not is_finite(weight):
        raise SubclassError("The classifier's weight holds NaN or infinity; check how the teacher was saved.")
    return torch.cat([-weight / 2, weight / 2]) if len(weight) == 1 else weight


def check_fit_options(
    num_subclasses: int | None, temperature: float, subclass_temperature: float, splitter: str, seed: int
) -> tuple[int | None, int]:
    """Check the options of a fit; return `num_subclasses` and `seed` as Python's numbers.

    Raises:
        OptionError: Names the option and its valid values.
    """
    size = None if num_subclasses is None else check_integer("num_subclasses", num_subclasses)
    check_positive("temperature", temperature)
    check_positive("subclass_temperature", subclass_temperature)
    get_splitter(splitter).check_requirements()
    return size, check_integer("seed", seed, 0, 2**32 - 1)


def check_not_transposed(weight: Tensor, embeddings: Tensor) -> None:
    """Check that a weight's columns, not its rows, are as many as the embeddings (rows, width) are wide.

    Raises:
        SubclassError: It looks transposed.
    """
    rows, columns = weight.shape
    if embeddings.ndim == 2 and embeddings.shape[1] == rows != columns:
        raise SubclassError(
            f"The classifier's weight looks transposed: it has the shape ({rows}, {columns}), and embeddings are {rows} wide. "
            f"Give it as (classes, width), ({columns}, {rows})."
        )


def _class_names(id2label: "Mapping[int, str] | Sequence[str] | None", classes: int) -> dict[int, str]:
    if id2label is None:
        return {number: f"LABEL_{number}" for number in range(classes)}
    pairs: Iterable[tuple[Any, str]] = id2label.items() if isinstance(id2label, Mapping) else enumerate(id2label)
    names = {int(number): str(name) for number, name in pairs}
    if sorted(names) != list(range(classes)):
        raise SubclassError(f"id2label must name the classes 0 to {classes - 1}; found {sorted(names)}.")
    return {number: names[number] for number in range(classes)}
