"""Distill in stages: cut, train, cut what was trained, train again, with the first teacher's signals throughout.

Does: read the stages of a configuration file, check them before the first one runs, run them one after another, and skip those
that an earlier run finished. Does not: distill (`distill.py`).
"""

import copy
import dataclasses
import gc
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from hf_guide.data.arguments import DataArguments, ModelArguments
from hf_guide.distillation.arguments import Seq2SeqDistillationArguments
from hf_guide.errors import OptionError, ShapeError
from hf_guide.initialization.size_checks import check_requested_sizes, is_size
from hf_guide.initialization.student_config import derive_student_config, is_head_size
from hf_guide.modeling import FROM_TEACHER_PARAMETERS
from hf_guide.models.model_classes import meta_model
from hf_guide.models.pretrained import unreadable_as
from hf_guide.scripts.run_record import (
    STAGES_FOLDER,
    DistillConfig,
    check_finished,
    check_resumed,
    copy_record,
    has_record,
    has_stages,
)
from hf_guide.shapes.budget import TOLERANCE, Budget
from hf_guide.shapes.vocabulary_search import AUTO
from hf_guide.utils.deprecation import renamed_options_of
from hf_guide.utils.distributed import barrier
from hf_guide.validation import did_you_mean

_OF_ALL_STAGES = frozenset(
    "output_dir resume_from_checkpoint teacher teacher_cache teacher_init_kwargs teacher_weights losses loss_options "
    "push_to_hub hub_model_id hub_token hub_revision hub_private_repo".split()
)
"""Training arguments that a stage cannot change: where the signals come from, and where the student goes."""

_OF_FIRST_STAGE = frozenset(("teacher", "tokenizer", "vocab_size"))
"""Entries of `student_init_kwargs` that only the first stage can have."""

_UNCOUNTED = frozenset(("tokenizer", "num_labels", "id2label", "num_subclasses"))
"""Entries of `student_init_kwargs` by which a student may have more parameters than a model of its config's sizes."""


def stage_changes(config: DistillConfig) -> list[dict[str, Any]]:
    """Return what each stage changes in the options of a file, its `student_init_kwargs` completed by the common ones.

    Raises:
        OptionError: A key that is not a training argument (names the nearest one), or one that stages have in common; or a
            smaller vocabulary after the first stage.
    """
    classes = (ModelArguments, DataArguments, Seq2SeqDistillationArguments)
    training = [
        field.name for field in dataclasses.fields(Seq2SeqDistillationArguments) if field.name not in _OF_ALL_STAGES
    ]
    others = {field.name for each in classes for field in dataclasses.fields(each)} - set(training)
    common: dict[str, Any] = dict(config.training.student_init_kwargs or {})  # type: ignore[arg-type]  # parsed by now
    changes = []
    for number, entries in enumerate(config.models.stages or [], 1):
        stage = renamed_options_of(*classes).translate(dict(entries), f"stage {number}")
        for name in stage:
            if name in others:
                raise OptionError(
                    f"Stage {number} sets {name}, which all stages have in common: set it outside of stages."
                )
            if name not in training:
                raise OptionError(f"Stage {number} has an unknown key {name!r}.{did_you_mean(str(name), training)}")
        own = stage.get("student_init_kwargs") or {}
        if not isinstance(own, Mapping):
            raise OptionError(f"student_init_kwargs of stage {number} must be a mapping; found {own!r}.")
        if number > 1 and _OF_FIRST_STAGE & {*own}:
            raise OptionError(
                f"Stage {number} sets {sorted(_OF_FIRST_STAGE & {*own})}: its student is made of the one before it, and the "
                "data are tokenized for that one's vocabulary. Set them in the first stage only."
            )
        inherited = {name: value for name, value in common.items() if number == 1 or name not in _OF_FIRST_STAGE}
        changes.append(stage | {"student_init_kwargs": inherited | dict(own)})
    return changes


def as_stages(stages: Sequence[DistillConfig]) -> tuple[DistillConfig, ...]:
    """Return the options of each stage with its own folder, and its student made of the one before it."""
    output = Path(stages[-1].training.output_dir or "")
    folders = [*(output / STAGES_FOLDER / f"stage-{number}" for number in range(1, len(stages))), output]
    placed: list[DistillConfig] = []
    for number, (stage, folder) in enumerate(zip(stages, folders, strict=True), 1):
        models, training = copy.copy(stage.models), stage.training
        kwargs: dict[str, Any] = dict(training.student_init_kwargs or {})  # type: ignore[arg-type]  # parsed by now
        training.output_dir = str(folder)
        if training.include_num_input_tokens_seen == "no":  # the card states the tokens of each stage
            training.include_num_input_tokens_seen = "non_padding"
        if number < len(stages):
            training.push_to_hub = False
        if number > 1:
            kwargs["teacher"] = str(folders[number - 2])
            if {"vocab_size", "tokenizer"} & set(placed[0].training.student_init_kwargs or {}):
                models.processing_class_name_or_path = models.processing_class_name_or_path or kwargs["teacher"]
        if kwargs.get("calibration_cache_dir") is not None and len(stages) > 1:
            kwargs["calibration_cache_dir"] = os.path.join(kwargs["calibration_cache_dir"], f"stage-{number}")
        training.student_init_kwargs = kwargs
        placed.append(dataclasses.replace(stage, models=models))
    return tuple(placed)


def check_stages(stages: Sequence[DistillConfig], teacher: PreTrainedConfig | None) -> None:
    """Check, before the first stage runs, that no stage makes the student larger than the one before it.

    `teacher` is the config of the model that the first student is made of. The sizes that follow from a budget
    (`num_parameters`, ...) are not known before the stage runs: here the student before is at most as large as the budget, and
    has at most the teacher's sizes.

    Raises:
        OptionError, ShapeError: Names the stage; or a checkpoint to resume from, of which each stage has its own.
    """
    resume = stages[0].training.resume_from_checkpoint
    if resume and str(resume).lower() not in ("true", "false"):
        raise OptionError(
            f"resume_from_checkpoint must be true with stages, each of which has checkpoints of its own; found {resume!r}."
        )
    config = teacher
    is_counted = not any(_UNCOUNTED & {*(stage.training.student_init_kwargs or {})} for stage in stages)
    is_exact, most = True, dict[str, int]()
    for number, stage in enumerate(stages, 1):
        kwargs: dict[str, Any] = stage.training.student_init_kwargs  # type: ignore[assignment]  # parsed by now
        sizes = {name: value for name, value in kwargs.items() if name not in (*FROM_TEACHER_PARAMETERS, "teacher")}
        if sizes.get("vocab_size") == AUTO:
            del sizes["vocab_size"]
        if config is None:
            return  # there is no teacher, which is an error of its own
        try:
            check_requested_sizes(config, sizes)
            _check_not_larger(config, sizes)
            before = _with_limit(most, _num_parameters(config) if is_counted else None)
            config = derive_student_config(config, sizes, keywords=FROM_TEACHER_PARAMETERS)
            count = _num_parameters(config) if is_counted else None
            most = _with_limit(before, count)
            is_fixed = kwargs.get("vocab_size") != AUTO and _has_every_size(config, sizes)
            is_exact = _check_budget(kwargs, before, most, count if is_fixed else None, is_exact=is_exact)
            is_exact = is_exact and kwargs.get("vocab_size") != AUTO
        except (OptionError, ShapeError) as error:
            raise type(error)(f"Stage {number}: {error}") from error


def _check_not_larger(before: PreTrainedConfig, sizes: Mapping[str, Any]) -> None:
    for name, size in sizes.items():
        earlier = getattr(before, name, None)
        if is_size(name) and isinstance(size, int) and isinstance(earlier, int) and size > earlier:
            raise ShapeError(
                f"{name} is {size}, and {earlier} in the student before: a stage must not make the student larger."
            )


def _has_every_size(config: PreTrainedConfig, sizes: Mapping[str, Any]) -> bool:
    """Return whether sizes leave a budget none to choose: the size of a head is the teacher's."""
    requested = {config.attribute_map.get(name, name) for name in sizes}
    return all(
        name in requested
        for name, value in vars(config).items()
        if is_size(name) and not is_head_size(name) and isinstance(value, int)
    )


def _check_budget(
    kwargs: Mapping[str, Any], before: Mapping[str, int], most: dict[str, int], fixed: int | None, *, is_exact: bool
) -> bool:
    """Check a stage's budget, and lower the limits to it; return whether the student's number of parameters is known.

    Args:
        kwargs: Arguments of the stage's `from_teacher`.
        before: By the budget's names, what the student before has at most; without those that are not known.
        most: The same of the stage's student, as its sizes limit it.
        fixed: How many parameters a student of its sizes has, where these are all given.
        is_exact: Whether the student before has just as many parameters, of which a share is compared with the sizes.

    Raises:
        OptionError: It does not parse.
        ShapeError: It is above what the student can have, or below what its sizes take.
    """
    options = {name: kwargs.get(name) for name in ("num_parameters", "active_parameters", "memory", "cache_length")}
    budget = Budget.parse(**options, teacher_parameters=before.get("num_parameters", 1))
    if budget is None:
        return is_exact
    for name in ("num_parameters", "active_parameters"):
        count, is_share = getattr(budget, name), str(options[name]).strip().endswith("%")
        if count is None or (is_share and "num_parameters" not in before):
            continue
        limit = most.get(name, most.get("num_parameters", count))
        if count > limit * (1 + TOLERANCE) and (is_exact or not is_share):
            larger = count > before.get(name, before.get("num_parameters", count)) * (1 + TOLERANCE)
            reason = "a stage must not make the student larger" if larger else "leave out the budget, or some sizes"
            whose = "the student before has" if larger else "a student of these sizes has"
            raise ShapeError(f"{name} is {options[name]!r}, {count:,}, and {whose} at most {limit:,}: {reason}.")
        if name == "num_parameters" and fixed is not None and count < fixed * (1 - TOLERANCE):
            raise ShapeError(
                f"{name} is {options[name]!r}, {count:,}{' at most' if is_share and not is_exact else ''}, and a student of "
                f"these sizes has {fixed:,}: leave out the budget, or some sizes."
            )
        most[name] = min(count, limit)
    return False


def _with_limit(most: Mapping[str, int], parameters: int | None) -> dict[str, int]:
    """Return limits of which that of all parameters is at most `parameters`, where these are known."""
    if parameters is None:
        return dict(most)
    return {**most, "num_parameters": min(parameters, most.get("num_parameters", parameters))}


def _num_parameters(config: PreTrainedConfig) -> int | None:
    """Return the number of parameters of a stock model; None for others."""
    model_class = getattr(transformers, next(iter(config.architectures or ()), ""), None)
    if not isinstance(model_class, type) or not issubclass(model_class, PreTrainedModel):
        return None
    with unreadable_as(ShapeError, f"{model_class.__name__} cannot be built from the config of a stage"):
        return meta_model(model_class, config).num_parameters()


def run_stages(stages: Sequence[DistillConfig], run: Callable[[DistillConfig], dict[str, float]]) -> dict[str, float]:
    """Run each stage that is not finished; return the metrics of the last one.

    Raises:
        OptionError: A finished stage of an earlier run, and `resume_from_checkpoint` is not set, or its options were others.
    """
    metrics: dict[str, float] = {}
    for stage in stages:
        if stage is not stages[-1] and finished_record(stage).is_file():
            continue
        metrics = run(stage)
        gc.collect()  # its trainer, before there is another one
        if stage is not stages[-1]:
            barrier()
            if stage.training.process_index == 0:
                copy_record(stage, finished_record(stage))
            barrier()
    return metrics


def check_earlier_runs(stages: Sequence[DistillConfig]) -> None:
    """Compare the options of each stage with those of an earlier run that finished it, or that is resumed in it.

    Raises:
        OptionError: A finished stage, and `resume_from_checkpoint` is not set; other options, of which it names the first; or
            a run of several stages that would be resumed as one.
        DamagedFileError: A record cannot be read.
    """
    output_dir, resume = Path(stages[-1].training.output_dir or ""), stages[-1].training.resume_from_checkpoint
    if len(stages) == 1 and str(resume).lower() == "true" and has_stages(output_dir) and not has_record(output_dir):
        raise OptionError(
            f"The run in {output_dir} was begun with several stages, and the options have no stages. Restore them, or name "
            "another output_dir."
        )
    for stage in stages:
        finished = finished_record(stage)
        if stage is stages[-1] or not finished.is_file():
            check_resumed(stage)
            continue
        if str(stage.training.resume_from_checkpoint).lower() != "true":
            raise OptionError(
                f"{finished.with_suffix('')} was finished by an earlier run. Set resume_from_checkpoint: true to go on after "
                "it, or name another output_dir."
            )
        check_finished(stage, finished)


def finished_record(stage: DistillConfig) -> Path:
    """Return the file that marks a stage as finished, with the options that it had."""
    folder = Path(stage.training.output_dir or "")
    return folder.with_name(folder.name + ".json")
