"""The record of the options that a run of `hf-guide distill` was begun with, which a resumed run is compared with.

Does: write the record into `output_dir` before the first step, compare it, distinguish several runs in one folder.
Does not: choose the checkpoint to resume from (`distillation/checkpoints.py`).
"""

import dataclasses
import glob
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_guide.data.arguments import DATASET_BUILDERS, DataArguments, ModelArguments
from hf_guide.distillation.arguments import DistillationArguments, Seq2SeqDistillationArguments
from hf_guide.distillation.checkpoints import (
    explain_write_errors,
    has_checkpoints,
    list_checkpoints,
    read_run_id,
)
from hf_guide.errors import OptionError
from hf_guide.utils.checksums import DamagedFileError, read_json, write_json
from hf_guide.utils.fingerprint import files_fingerprint, sampled_fingerprint
from hf_guide.utils.public_names import public_name, public_value

RECORD_NAME = "_distill_options.json"
"""The record's file in `output_dir`. `Trainer` pushes no file whose name begins with "_"."""

STAGES_FOLDER = "_stages"
"""In `output_dir`, the folder of all students but the last. `Trainer` pushes no folder whose name begins with "_"."""

_COMPARED = tuple(
    "losses loss_options temperature kd_loss_type beta layer_mapping teacher_weights label_smoothing_factor "
    "optim optim_args learning_rate weight_decay adam_beta1 adam_beta2 adam_epsilon seed data_seed".split()
)
"""Training arguments that a resumed run must have in common with what it resumes.

The optimizer's own are in its saved state: `Trainer` restores them, so that other values would have no effect.
"""

_OF_LENGTH = tuple(
    "max_steps num_train_epochs lr_scheduler_type warmup_steps per_device_train_batch_size "
    "gradient_accumulation_steps".split()
)
"""Training arguments that a resumed run may change, and that of a finished stage must be the same."""

_NOT_OF_THE_DATA = ("preprocessing_num_workers", "max_eval_samples")
"""Fields of `DataArguments` that do not change what is trained on."""

_VERSION_KEYWORDS = ("revision", "subfolder", "gguf_file")
"""Keywords of `from_pretrained` that select other weights."""

_NOT_OF_THE_STUDENT = frozenset(
    "teacher calibration_cache_dir token cache_dir local_files_only trust_remote_code show_progress".split()
)
"""Entries of `student_init_kwargs` that do not change the student's start; its `teacher` is recorded without its path."""

_EARLIER = "earlier"
_SHOWN_CHARACTERS = 200


@dataclass(frozen=True)
class DistillConfig:
    """All options of one distillation.

    Attributes:
        stages: The options of each stage where there are several; the last one's are the options above.
    """

    models: ModelArguments
    data: DataArguments
    training: Seq2SeqDistillationArguments
    stages: "tuple[DistillConfig, ...]" = ()


def has_stages(output_dir: Path) -> bool:
    """Return whether a run in this folder has begun one of several stages."""
    return (output_dir / STAGES_FOLDER).is_dir()


def has_record(output_dir: Path) -> bool:
    """Return whether a run in this folder has recorded its options."""
    return (output_dir / RECORD_NAME).is_file()


def teacher_names(teacher: str | None) -> list[str]:
    """Return the Hub ids and folders in the option `teacher`, which are separated by commas."""
    if not teacher:
        return []
    return [teacher] if os.path.exists(teacher) else [name.strip() for name in teacher.split(",")]


def checkpoint_to_resume(args: DistillationArguments) -> "str | bool | None":
    """Return `resume_from_checkpoint` as `Trainer.train` takes it: true only if there is a checkpoint in `output_dir`."""
    resume = args.resume_from_checkpoint
    if str(resume).lower() not in ("true", "false"):
        return resume
    return str(resume).lower() == "true" and has_checkpoints(args.output_dir or "")


def recorded_options(config: DistillConfig) -> dict[str, Any]:
    """Return the options that determine the start, the data, the objective and the length of a run, as JSON has them.

    Models, files and folders have their names without paths and a fingerprint of their contents, so that they may be moved.
    """
    models, training = config.models, config.training
    options = training.to_dict()  # without tokens
    kwargs: dict[str, Any] = dict(options["student_init_kwargs"] or {})
    recorded: dict[str, Any] = {name: options[name] for name in (*_COMPARED, *_OF_LENGTH)}
    recorded |= {
        "teacher": [_identify_model(name) for name in teacher_names(training.teacher)],
        "teacher_init_kwargs": _version(options["teacher_init_kwargs"]),
        "teacher_cache": training.teacher_cache and _identify_files(training.teacher_cache),
        "student_init_kwargs": public_value(
            {name: value for name, value in kwargs.items() if name not in _NOT_OF_THE_STUDENT}
        ),
        "student_init_kwargs.teacher": kwargs.get("teacher") and _identify_model(str(kwargs["teacher"])),
        "model_name_or_path": models.model_name_or_path and _identify_model(models.model_name_or_path),
        "model_init_kwargs": _version(models.model_init_kwargs),
        "processing_class_name_or_path": public_value(models.processing_class_name_or_path),
        "task": models.task,
        "peft_config": models.peft_config,
    }
    for field in dataclasses.fields(config.data):
        if field.name not in _NOT_OF_THE_DATA:
            recorded[field.name] = getattr(config.data, field.name)
    for name in ("dataset_name", "data_files", "chat_template_path"):
        recorded[name] = _identify_files(recorded[name])
    plain: dict[str, Any] = json.loads(json.dumps(recorded, default=str))
    return plain


def write_record(args: DistillationArguments, options: Mapping[str, Any]) -> None:
    """Write the options of a run that begins or goes on, in the main process only.

    The options of other runs whose checkpoints are in the folder are kept, since these can be resumed from.
    """
    if args.process_index != 0:
        return
    folder, resume = Path(args.output_dir or ""), checkpoint_to_resume(args)
    try:
        before = _Record.read(folder)
    except DamagedFileError:
        if resume:
            raise
        before = _Record({}, [])
    resumed = before.run_to_resume(resume, folder) if resume else None
    present, runs = _run_ids(folder), list(before.earlier)
    if resume is not True or resumed is not None:  # otherwise the last run goes on
        runs.append((present - before.earlier_runs, before.options))
    kept = [{"runs": sorted(ids & present - {resumed}), "options": its} for ids, its in runs]
    with explain_write_errors("The record of the options", folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / RECORD_NAME, {**options, _EARLIER: [each for each in kept if each["runs"]]})


def remove_unused_record(output_dir: Path) -> None:
    """Remove the record of a run that ended before it wrote anything else."""
    if has_record(output_dir) and len(list(output_dir.iterdir())) == 1:
        (output_dir / RECORD_NAME).unlink()


def copy_record(config: DistillConfig, path: Path) -> None:
    """Write the options that a finished run was begun with into a file of their own."""
    write_json(path, _Record.read(Path(config.training.output_dir or "")).options)


def check_resumed(config: DistillConfig) -> None:
    """Compare the options with those of the run that is resumed, if there is one and it was recorded.

    Raises:
        OptionError: They determine another start, other data or another objective.
        DamagedFileError: The record cannot be read.
    """
    resume, output_dir = checkpoint_to_resume(config.training), Path(config.training.output_dir or "")
    if not resume:
        return
    folder = output_dir if resume is True else Path(resume).resolve().parent
    record = _Record.read(folder)
    compare_options(
        record.options_of(record.run_to_resume(resume, folder)),
        {name: value for name, value in recorded_options(config).items() if name not in _OF_LENGTH},
        f"The run in {folder} was begun",
        "Restore them, or train anew: leave out resume_from_checkpoint, and name another output_dir.",
    )


def check_finished(config: DistillConfig, record: Path) -> None:
    """Compare the options with those of a finished stage, of which also the length must be the same.

    Raises:
        OptionError: They differ.
        DamagedFileError: The record cannot be read.
    """
    what, advice = f"{record.with_suffix('')} was finished", "Restore them, or name another output_dir."
    compare_options(read_json(record)[0], recorded_options(config), what, advice)


def compare_options(before: Mapping[str, Any], now: Mapping[str, Any], what: str, advice: str) -> None:
    """Compare the options that both records have.

    Args:
        before: Of the earlier run; one of an earlier version has fewer.
        now: Of this run.
        what: How the error begins.
        advice: How it ends.

    Raises:
        OptionError: They differ.
    """
    different = [
        each for name in sorted(before.keys() & now.keys()) for each in _differences(name, before[name], now[name])
    ]
    if different:
        (first, was, found), others = different[0], [name for name, _, _ in different[1:]]
        raise OptionError(
            f"{what} with other options: {first} was {_shorten(was)} and is {_shorten(found)}"
            f"{f', and {others} differ too' if others else ''}. {advice}"
        )


def _differences(name: str, before: Any, now: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield what differs in an option, entry by entry of a mapping: its name and both values."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in sorted(before.keys() | now.keys()):
            yield from _differences(f"{name}.{key}", before.get(key), now.get(key))
    elif before != now:
        yield name, before, now


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."


@dataclass(frozen=True)
class _Record:
    """What `RECORD_NAME` has.

    Attributes:
        options: Of the run that began last; empty without a record.
        earlier: Of the runs before it: the ids that their checkpoints have, and their options, the first one first.
    """

    options: Mapping[str, Any]
    earlier: list[tuple[set[str], Mapping[str, Any]]]

    @classmethod
    def read(cls, folder: Path) -> "_Record":
        """Return the record of a folder."""
        if not has_record(folder):
            return cls({}, [])
        options = read_json(folder / RECORD_NAME)[0]
        return cls(options, [({*each["runs"]}, each["options"]) for each in options.pop(_EARLIER)])

    @property
    def earlier_runs(self) -> set[str]:
        """The ids of all runs but the last."""
        return set[str]().union(*(ids for ids, _ in self.earlier))

    def run_to_resume(self, resume: "str | bool", folder: Path) -> str | None:
        """Return the id of the run whose checkpoint is resumed from; None for one without an id, or the last run's."""
        if resume is not True:
            return read_run_id(Path(str(resume)))
        present = _run_ids(folder)
        if present - self.earlier_runs:
            return None  # the last run has saved one
        return next((min(ids & present) for ids, _ in reversed(self.earlier) if ids & present), None)

    def options_of(self, run: str | None) -> Mapping[str, Any]:
        """Return the options of the run with an id."""
        return next((options for ids, options in self.earlier if run in ids), self.options)


def _run_ids(folder: Path) -> set[str]:
    return {run for run in map(read_run_id, list_checkpoints(folder)) if run is not None}


def _version(keywords: Any) -> dict[str, Any]:
    return {name: value for name, value in (keywords or {}).items() if name in _VERSION_KEYWORDS}


def _identify_model(name: str) -> str:
    """Return a model's name, for a folder without its path and with a fingerprint of its weights."""
    folder = Path(os.path.expanduser(name))
    if folder.parent.name == STAGES_FOLDER:
        return folder.name  # the student of the stage before, which may not exist yet
    return _with_fingerprint(public_name(name), files_fingerprint(folder) if folder.is_dir() else None)


def _identify_files(names: Any) -> Any:
    """Return names of files, patterns and folders, for those on this machine without paths and with a fingerprint."""
    if isinstance(names, Mapping):
        return {key: _identify_files(each) for key, each in names.items()}
    if isinstance(names, (list, tuple)):
        return [_identify_files(each) for each in names]
    if not names or names in DATASET_BUILDERS:
        return names
    path = os.path.expanduser(names)
    matches = (
        [Path(path)] if os.path.exists(path) else [Path(each) for each in sorted(glob.glob(path, recursive=True))]
    )
    return _with_fingerprint(Path(path).name, sampled_fingerprint(matches)) if matches else names


def _with_fingerprint(name: str, fingerprint: str | None) -> str:
    return name if fingerprint is None else f"{name} (fingerprint {fingerprint[:12]})"
