"""The initialization report: where each parameter of a student came from, saved next to its weights."""

import dataclasses
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedModel

from hf_guide.teachers.checkpoint import TeacherCheckpoint, teacher_fingerprint
from hf_guide.utils.deprecation import RenamedOptions, with_renamed_options
from hf_guide.utils.escaping import to_single_line
from hf_guide.utils.files import atomic_write_text
from hf_guide.utils.public_names import Source, absolute_name, is_local, name_source, public_name, to_repo_id
from hf_guide.utils.typed_json import read_json_record
from hf_guide.version import __version__

REPORT_NAME = "initialization_report.json"

_RENAMED_FIELDS = {"kept": "variance_explained", "widths": "sizes"}
_RENAMED_CALIBRATION_KEYS = {
    "lost": "residual_error",
    "own_text": "self_generated",
    "units": "selected",
    "influence": "block_influence",
}


@dataclass
class ParameterRecord:
    """Where one parameter of the student came from.

    Attributes:
        name, shape: the student's parameter.
        source, source_shape: the teacher's tensor that it comes from, None where it was initialised at random.
        maps: one text per axis, such as "embed: projection 576 -> 288".
        steps: what was folded, scaled or fitted besides, such as "gain of model.norm folded".
    """

    name: str
    shape: list[int]
    source: str | None = None
    source_shape: list[int] | None = None
    maps: list[str] = field(default_factory=list)
    steps: list[str] = field(default_factory=list)


@dataclass
class TeacherRecord:
    """One teacher of a student.

    Attributes:
        name: Hub id, or the bare name of a folder or class: a record is published with the weights.
        revision: Commit, where known.
        weight: Weight of this teacher in the averaged teacher signal.
        captured: Whether its signals were read from a teacher cache.
        license: Of its own model card; a list where the card names several.
        license_name, license_link, languages: Of the same card.
        fingerprint: For a folder, a hash of its weights (`utils.fingerprint.files_fingerprint`).
        source: Where it was loaded from, "hub" or "local"; None where it is not known, as in records of earlier versions.
    """

    name: str
    revision: str | None = None
    weight: float = 1.0
    captured: bool = False
    license: str | list[str] | None = None
    license_name: str | None = None
    license_link: str | None = None
    languages: list[str] = field(default_factory=list)
    fingerprint: str | None = None
    source: Source | None = None

    @property
    def repo_id(self) -> str | None:
        """Its Hub id; None if it was a folder or a model without an id."""
        return to_repo_id(self.name, self.revision, self.source)


@dataclass
class TrainingSummary:
    """A training that a student went through before its last one.

    Attributes:
        teachers: Whose signals it was trained on.
        losses: Weight of each loss.
        steps, tokens: Optimizer steps, and input tokens where they were counted.
        datasets: Hub ids of the training datasets.
    """

    teachers: list[TeacherRecord] = field(default_factory=list)
    losses: dict[str, float] = field(default_factory=dict)
    steps: int = 0
    tokens: int | None = None
    datasets: list[str] = field(default_factory=list)

    @classmethod
    def parse(cls, content: dict[str, Any]) -> "TrainingSummary":
        """Return the training that JSON describes."""
        return cls(**content | {"teachers": [TeacherRecord(**each) for each in content["teachers"]]})


@dataclass
class StageRecord:
    """One student on the way from the first teacher to a student that was cut in stages.

    Attributes:
        teacher, revision: What it was made of: an id or the bare name of a folder, and the commit where known.
        teacher_parameters, student_parameters: How many numbers each holds, tied ones counted once.
        method: The initialization method.
        sizes: By axis, the size before and after.
        blocks: By stack, the block of its own source that feeds each of its blocks.
        steps, tokens: How long it was trained: optimizer steps, and input tokens where they were counted.
        losses: Weight of each loss that it was trained on; empty where no training was recorded.
        teacher_source: Where `teacher` was loaded from; None in records of earlier versions.
        training_teachers: Whose signals it was trained on.
    """

    teacher: str
    revision: str | None
    teacher_parameters: int
    student_parameters: int
    method: str
    sizes: dict[str, list[int]] = field(default_factory=dict)
    blocks: dict[str, list[int]] = field(default_factory=dict)
    steps: int = 0
    tokens: int | None = None
    losses: dict[str, float] = field(default_factory=dict)
    teacher_source: Source | None = None
    training_teachers: list[TeacherRecord] = field(default_factory=list)

    @classmethod
    def parse(cls, content: dict[str, Any]) -> "StageRecord":
        """Return the stage that JSON describes; earlier versions did not record the teachers of its training."""
        return cls(
            **content | {"training_teachers": [TeacherRecord(**each) for each in content.get("training_teachers", [])]}
        )

    @property
    def repo_id(self) -> str | None:
        """The Hub id of `teacher`; None if it was a folder or a model without an id."""
        return to_repo_id(self.teacher, self.revision, self.teacher_source)


@with_renamed_options(RenamedOptions(names=_RENAMED_FIELDS))
@dataclass
class InitializationReport:
    """How a student was initialized from its teacher. Printed, it is a table; `summary()` is five lines.

    Attributes:
        teacher, revision: The teacher's id, folder or class, and its commit where known; of a folder only the last part of
            its path is saved.
        teacher_source: Where the teacher was loaded from, "hub" or "local"; None where it is not known, as in reports of
            earlier versions.
        teacher_fingerprint: Hash of the weights of a teacher without a commit.
        teacher_class, student_class: Names of the model classes.
        options: The fields of the `InitializationConfig` that was used, `method` among them.
        hf_guide_version, transformers_version: The versions that initialized it.
        teacher_parameters, student_parameters: How many numbers each holds, tied ones counted once.
        blocks: By stack, the teacher's block that feeds each of the student's.
        heads: By attention module (without the block's number), the teacher's heads that each block keeps, where it has fewer.
        explained_variance: By projected axis, the fraction (0 to 1) of variance explained at width 1, 2, ..., the teacher's.
        variance_explained: By projected axis, the fraction explained at the student's width.
        sizes: By axis, the teacher's size and the student's.
        parameters: One record for each parameter of the student.
        approximations: What could not be transferred exactly, and why.
        randomly_initialized: Parameters that the teacher has nothing for.
        notes: Choices that differ from what was asked for, and why, such as other blocks.
        shape_choice: How the sizes were chosen for a budget; empty where they were given.
        calibration: Of a calibrated student: `tokens` seen; `self_generated`, whether the teacher wrote them;
            `block_influence` (1 - cosine of input and output); `massive_blocks`, those that make hidden states massive and are
            kept before most others; `exchanged_blocks` of a local search: those of greatest
            influence that were `dropped`, those `kept` instead, the `loss` (divergence from the teacher in nats; of embeddings
            the difference of similarities) and the `influence_loss` without the exchange; `selected`, the indices of heads
            and neurons by output projection; `residual_error`, the relative error of the residual stream after each block;
            and `logit_scale`.
        vocabulary: Of a student whose vocabulary was reduced: its `size` and `teacher_size`; `share_kept`, the share of the
            teacher's tokens in the text that are kept; `token_ratio`, the tokens that the text takes per token of the
            teacher's; and `held_out`, whether the pieces were chosen by other texts. With another tokenizer: how many of its
            tokens are `copied` from the teacher, `composed` of several of its pieces, and `fresh`.
        lineage: Of a student that was made of another student: those before it, the first teacher's first.
        seconds: Time by step.
        peak_memory_bytes: Peak resident memory of the process, until the student was made and checked.
        bases: By axis of the residual stream, the matrix (d_T, d_S), or the indices (d_S,), by which it became narrower.
            Not saved, and empty once `from_teacher` returns.

    Example:
        >>> from hf_guide import from_teacher
        >>> student = from_teacher("HuggingFaceTB/SmolLM2-135M", num_hidden_layers=2, show_progress=False)
        >>> student.initialization_report.blocks
        {'layers': [0, 3]}
    """

    teacher: str
    revision: str | None
    teacher_class: str
    student_class: str
    options: dict[str, Any]
    hf_guide_version: str
    transformers_version: str
    teacher_parameters: int
    student_parameters: int
    blocks: dict[str, list[int]] = field(default_factory=dict)
    heads: dict[str, list[list[int]]] = field(default_factory=dict)
    explained_variance: dict[str, list[float]] = field(default_factory=dict)
    variance_explained: dict[str, float] = field(default_factory=dict)
    sizes: dict[str, list[int]] = field(default_factory=dict)
    parameters: list[ParameterRecord] = field(default_factory=list)
    approximations: list[str] = field(default_factory=list)
    randomly_initialized: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    calibration: dict[str, Any] = field(default_factory=dict)
    vocabulary: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory_bytes: int = 0
    teacher_fingerprint: str | None = None
    shape_choice: str = ""
    lineage: list[StageRecord] = field(default_factory=list)
    teacher_source: Source | None = None
    bases: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def begin(cls, student: PreTrainedModel, teacher: TeacherCheckpoint, **fields: Any) -> "InitializationReport":
        """Return a report with what is known of both models, and `fields`."""
        teacher = teacher.whole or teacher
        source = name_source(teacher.name, teacher.revision or getattr(teacher.config, "_commit_hash", None))
        return cls(
            teacher=absolute_name(teacher.name),
            revision=teacher.revision,
            teacher_class=teacher.model_class.__name__,
            student_class=type(student).__name__,
            options={},
            hf_guide_version=__version__,
            transformers_version=transformers.__version__,
            teacher_parameters=sum(teacher.weights.shape(name).numel() for name in teacher.weights.keys()),
            student_parameters=student.num_parameters(),
            teacher_fingerprint=teacher_fingerprint(teacher),
            teacher_source=source,
            **fields,
        )

    @property
    def teacher_name(self) -> str:
        """The teacher's id, or the bare name of its folder: fit to be published."""
        return public_name(self.teacher, self.teacher_source)

    @property
    def public_revision(self) -> str | None:
        """The commit of a teacher that the Hub has; None of a folder, whose name on the Hub is not known."""
        if self.teacher_source is None:  # of an earlier version
            return None if is_local(self.teacher) and "/" not in self.teacher_name else self.revision
        return self.revision if self.teacher_source == "hub" else None

    @property
    def first_stage(self) -> StageRecord:
        """The first of all stages, which names the first teacher; of a student that was cut once, this one."""
        return self.lineage[0] if self.lineage else self.as_stage()

    def as_stage(self, **training: Any) -> StageRecord:
        """Return this student as an entry of the lineage of one that is made of it; `training` is how it was trained."""
        return StageRecord(
            teacher=self.teacher_name,
            revision=self.public_revision,
            teacher_source=self.teacher_source,
            teacher_parameters=self.teacher_parameters,
            student_parameters=self.student_parameters,
            method=str(self.options.get("method", "unknown")),
            sizes=self.sizes,
            blocks=self.blocks,
            **training,
        )

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write `initialization_report.json` into a folder, which is created if need be, and return the file's path.

        A teacher's folder is named by the last part of its path: the file is published with the weights.
        """
        path = Path(folder) / REPORT_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        content = dataclasses.asdict(dataclasses.replace(self, bases={})) | {
            "teacher": self.teacher_name,
            "revision": self.public_revision,
        }
        del content["bases"]
        atomic_write_text(path, json.dumps(content, indent=1) + "\n")
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "InitializationReport":
        """Read a report from its file, or from the folder it was saved into.

        Raises:
            FileNotFoundError: there is no such file.
            HfGuideError: the file is not a report.
        """
        path = Path(path)

        def parse(content: dict[str, Any]) -> InitializationReport:
            records = [ParameterRecord(**record) for record in content.pop("parameters")]
            lineage = [StageRecord.parse(stage) for stage in content.pop("lineage", [])]
            return cls(parameters=records, lineage=lineage, **_with_new_keys(content))

        return read_json_record(
            path / REPORT_NAME if path.is_dir() else path,
            parse,
            "an initialization report",
            "Make the student again to get a new one.",
        )

    def summary(self) -> str:
        """The report in five lines: what, widths, blocks, what is not exact, cost; and one for a reduced vocabulary."""
        smaller = self.teacher_parameters / max(self.student_parameters, 1)
        revision = f" at {self.revision[:12]}" if self.revision else ""
        data = f" on {self.calibration['tokens']} tokens" if self.calibration else ""
        data += " that the teacher generated" if self.calibration.get("self_generated") else ""
        what = (
            f"{self.student_class} with {format_count(self.student_parameters)} parameters, "
            f"{smaller:.1f} times fewer than its teacher {to_single_line(self.teacher_name)}{revision} "
            f"({format_count(self.teacher_parameters)}), by "
            f"{to_single_line(self.options.get('method', 'an unnamed method'))}{data}"
        )
        explained = {axis: f" ({share:.1%} of variance explained)" for axis, share in self.variance_explained.items()}
        sizes = [
            f"{to_single_line(axis)} {old} -> {new}{explained.get(axis, '')}"
            for axis, (old, new) in self.sizes.items()
        ]
        blocks = [
            f"{to_single_line(stack)} from the teacher's {format_ranges(sources)}"
            for stack, sources in self.blocks.items()
        ]
        not_exact = [f"{len(self.approximations)} approximated"] if self.approximations else []
        not_exact += [f"{len(self.randomly_initialized)} parameters at random"] if self.randomly_initialized else []
        steps = ", ".join(f"{step} {seconds:.1f}" for step, seconds in self.seconds.items())
        cost = (
            f"Made in {sum(self.seconds.values()):.1f} s ({steps}), peak memory "
            f"{self.peak_memory_bytes / 2**30:.2f} GiB; hf_guide {self.hf_guide_version}, "
            f"transformers {self.transformers_version}"
        )
        return "\n".join(
            [
                what,
                f"Widths: {', '.join(sizes) or 'none named'}",
                f"Blocks: {'; '.join(blocks) or 'none'}",
                *([_vocabulary_line(self.vocabulary)] if self.vocabulary else []),
                f"Not exact beyond the smaller sizes: {', '.join(not_exact) or 'nothing'}",
                cost,
            ]
        )

    def __str__(self) -> str:
        lines = self.summary().splitlines()
        lines += [f"Shape: {self.shape_choice}"] if self.shape_choice else []
        lines += [f"Approximated: {text}" for text in self.approximations]
        lines += [f"At random: {text}" for text in _merge_block_numbers(self.randomly_initialized)]
        lines += [f"Note: {text}" for text in self.notes]
        return "\n".join([*lines, "", *parameter_table(self.parameters)])


def _vocabulary_line(facts: dict[str, Any]) -> str:
    if "copied" in facts:
        return (
            f"Vocabulary: {facts['size']} tokens of another tokenizer, the teacher has {facts['teacher_size']}: "
            f"{facts['copied']} copied, {facts['composed']} composed, {facts['fresh']} fresh"
        )
    text = "held-out text" if facts["held_out"] else "the calibration text"
    return (
        f"Vocabulary: {facts['size']} of the teacher's {facts['teacher_size']} pieces, {facts['share_kept']:.1%} of the "
        f"tokens of {text}, which takes {facts['token_ratio']:.3f} times as many"
    )


def _with_new_keys(content: dict[str, Any]) -> dict[str, Any]:
    """Return a report's content under today's keys: versions before 0.2 used others."""
    content = {_RENAMED_FIELDS.get(key, key): value for key, value in content.items()}
    calibration = content.get("calibration")
    if isinstance(calibration, dict):
        content["calibration"] = {_RENAMED_CALIBRATION_KEYS.get(key, key): each for key, each in calibration.items()}
    return content


def random_report(student: PreTrainedModel, teacher: TeacherCheckpoint) -> InitializationReport:
    """Return the report of a student of which nothing but its config came from the teacher."""
    records = [ParameterRecord(name, list(each.shape)) for name, each in student.named_parameters()]
    names = [record.name for record in records]
    return InitializationReport.begin(student, teacher, parameters=records, randomly_initialized=names)


def format_count(number: int) -> str:
    """A number of parameters as people write it: 576, 33.4 K, 134.5 M, 1.2 B."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return str(number)


def parameter_table(records: list[ParameterRecord]) -> list[str]:
    """One row for each parameter, those that differ only in the numbers of their blocks folded into one."""
    folded: dict[tuple[str, ...], int] = {}
    for record in records:
        source = (
            f"{record.source} {_shape(record.source_shape)}" if record.source else "none" if record.steps else "random"
        )
        how = "; ".join([*record.maps, *record.steps])
        row = tuple(without_numbers(text) for text in (f"{record.name} {_shape(record.shape)}", source, how))
        folded[row] = folded.get(row, 0) + 1
    rows = [("parameter", "times", "from", "how")]
    rows += [(name, str(times), source, how) for (name, source, how), times in folded.items()]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return [
        "  ".join([*(text.ljust(width) for text, width in zip(row, widths, strict=False)), row[3]]).rstrip()
        for row in rows
    ]


def _merge_block_numbers(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(without_numbers(name) for name in names))


def without_numbers(text: str) -> str:
    """Return the name of a parameter with "*" for each number in it.

    Example:
        >>> without_numbers("model.layers.12.mlp.experts.3.weight")
        'model.layers.*.mlp.experts.*.weight'
    """
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", text)


def _shape(shape: list[int] | None) -> str:
    return "x".join(map(str, shape)) if shape else "scalar"


def format_ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] as "0-2 5"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return " ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
