"""Load the splits of a dataset from the Hub or from files, and find its columns.

Does: select and hold out splits, find columns by name or type, check that texts are texts.
Does not: preprocess (`preprocessing.py`).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Audio, ClassLabel, Dataset, DatasetDict, Image, ReadInstruction, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError

from hf_guide.chat.formats import MESSAGES_COLUMNS
from hf_guide.data.arguments import DATASET_BUILDERS, DataArguments, first_file
from hf_guide.errors import OptionError
from hf_guide.tasks import Task
from hf_guide.validation import did_you_mean

TEXT_COLUMNS = ("text", "sentence", "content", "document", "article", "source", "question")
TARGET_COLUMNS = ("target", "summary", "highlights", "answer", "translation")
ANSWER_COLUMNS = ("answers", "completion", "response", "output", "chosen", "rejected")
WORD_COLUMNS = ("tokens", "words", "text")
TOKEN_LABEL_COLUMNS = ("ner_tags", "pos_tags", "labels", "tags", "label")
CLASS_COLUMNS = ("label", "labels", "fine_label", "class", "target")
IMAGE_COLUMNS = ("image", "img", "pixel_values")
AUDIO_COLUMNS = ("audio", "speech", "sound", "file", "path")
TRANSCRIPT_COLUMNS = ("text", "sentence", "transcription", "transcript", "normalized_text", "raw_text")


def load_splits(options: DataArguments) -> tuple[Dataset, Dataset | None]:
    """Return the raw training split and the raw evaluation split, None if nothing is held out.

    Without a split for evaluation, `validation_split_percentage` of the training split is held out. The selection depends on
    `validation_split_seed` only, so all runs hold out the same examples.

    Raises:
        OptionError: There is no such split or configuration, or there are too few examples to hold any out.
        OSError: There is no such dataset or file.
    """
    return load_named_splits(options)[:2]


def load_named_splits(options: DataArguments) -> tuple[Dataset, Dataset | None, str | None]:
    """Return the splits of `load_splits`, and the name of the one for evaluation for a model card."""
    splits = _load_dataset(options)
    train = _select_split(splits, options.dataset_train_split, options)
    held_out: Dataset | None = None
    name: str | None = None
    if options.dataset_test_split is not None or "validation" in splits:
        split = options.dataset_test_split or "validation"
        held_out, name = _select_split(splits, split, options), options.name_of(split)
    elif options.validation_split_percentage > 0:
        fraction = options.validation_split_percentage / 100
        if round(len(train) * fraction) < 1:
            raise OptionError(
                f"{options.validation_split_percentage:g}% of {len(train)} examples leaves none to evaluate on: set "
                "dataset_test_split, increase validation_split_percentage, or set it to 0 for no evaluation."
            )
        parts = train.train_test_split(test_size=fraction, seed=options.validation_split_seed)
        train, held_out = parts["train"], parts["test"]
        name = f"{options.name_of(options.dataset_train_split)}, {options.validation_split_percentage:g}% held out"
    train = _truncate(train, options.max_train_samples)
    return train, None if held_out is None else _truncate(held_out, options.max_eval_samples), name


def _load_dataset(options: DataArguments) -> DatasetDict:
    """Return all splits of a dataset."""
    folder = Path(options.dataset_name)
    is_folder = options.dataset_name not in DATASET_BUILDERS and folder.is_dir()
    if any((folder / name).is_file() for name in ("dataset_dict.json", "dataset_info.json")):
        dataset = load_from_disk(folder)
    else:
        try:
            dataset = load_dataset(
                # datasets takes the last component of a folder's path for its name, which "." does not have
                str(folder.resolve()) if is_folder else options.dataset_name,
                options.dataset_config_name,
                data_files=options.data_files,
                revision=options.dataset_revision,
            )
        except StopIteration as error:  # raised by datasets if the first file has no row to infer the columns from
            raise OptionError(f"{options.name} contains no examples: its first file is empty.") from error
        except (ValueError, DatasetsError) as error:
            if isinstance(error, OSError):
                raise
            cause = f": {error.__cause__}" if error.__cause__ else ""  # datasets' own message lacks the reason
            raise OptionError(f"{options.name} cannot be read: {error}{cause}") from error
    return dataset if isinstance(dataset, DatasetDict) else DatasetDict(train=dataset)


def _select_split(splits: DatasetDict, split: str, options: DataArguments) -> Dataset:
    """Return a split, or a slice of one such as train[:10%]."""
    name = split.partition("[")[0]
    if name not in splits:
        raise OptionError(
            f"{options.name} has no split {name!r}; it has {list(splits)}.{did_you_mean(name, splits)} Choose one of these."
        )
    whole = splits[name]
    try:
        (part,) = ReadInstruction.from_spec(split).to_absolute({name: len(whole)})
    except (ValueError, AssertionError) as error:
        raise OptionError(
            f"The slice {split!r} is invalid: {error}. It must be written as train[:10%] or train[:500]."
        ) from error
    rows = range(part.from_ or 0, len(whole) if part.to is None else part.to)
    if not rows:
        raise OptionError(f"{split!r} selects no examples of {options.name}, which has {len(whole)}.")
    return whole.select(rows)


_READ_OPTIONS: dict[str, tuple[Task, ...]] = {
    "text_pair_column": (
        Task.SEQUENCE_CLASSIFICATION,
        Task.QUESTION_ANSWERING,
        Task.MULTIPLE_CHOICE,
        Task.FEATURE_EXTRACTION,
    ),
    "target_column": (Task.CAUSAL_LM, Task.SEQ2SEQ_LM),
    "source_prefix": (Task.SEQ2SEQ_LM, Task.FEATURE_EXTRACTION),
    "language": (Task.SPEECH_SEQ2SEQ,),
    "speech_task": (Task.SPEECH_SEQ2SEQ,),
}
"""Options that are for some tasks only, besides the columns of inputs and labels."""


def check_options_of_task(task: Task, options: DataArguments) -> None:
    """Check that every column and language that is set is one that the preparation of a task's data reads.

    Raises:
        OptionError: One would be ignored; names those that are read.
    """
    read = [f"{role}_column" for role in task.row.inputs.split("-")]
    read += ["text_column"] if task in (Task.SPEECH_SEQ2SEQ, Task.CTC) else []  # the transcripts
    answers = (Task.QUESTION_ANSWERING, Task.MULTIPLE_CHOICE, Task.FEATURE_EXTRACTION)
    read += ["label_column"] if task.has_labels or task in answers else []
    read += [name for name, tasks in _READ_OPTIONS.items() if task in tasks]
    every = (*(f"{role}_column" for role in ("text", "image", "audio", "label")), *_READ_OPTIONS)
    ignored = [name for name in every if name not in read and getattr(options, name)]
    if ignored:
        raise OptionError(
            f"{' and '.join(ignored)} would be ignored: the task is {task}, which reads {', '.join(read)}. Leave "
            f"{'it' if len(ignored) == 1 else 'them'} out."
        )


def _truncate(split: Dataset, count: int | None) -> Dataset:
    return split if count is None else split.select(range(min(len(split), count)))


def find_column(dataset: Dataset, task: Task, role: str, options: DataArguments) -> str:
    """Return the column for a role: the one in the options, otherwise the first default name, otherwise the only candidate.

    Args:
        dataset: Raw split.
        task: The student's task.
        role: "text", "target", "image", "audio" or "label".
        options: May set `text_column`, `target_column`, `image_column`, `audio_column`, `label_column`.

    Raises:
        OptionError: There is no such column, or none can be chosen; lists the columns of the dataset.
    """
    columns = dataset.column_names
    requested = getattr(options, f"{role}_column")
    if requested is not None:
        if requested not in columns:
            raise OptionError(
                f"{options.name} has no column {requested!r}; it has {columns}.{did_you_mean(requested, columns)} Set "
                f"{role}_column to one of these."
            )
        return requested
    defaults = [name for name in default_columns(task, role) if name in columns]
    if defaults:
        if role == "text":
            _check_single_text_column(defaults[0], columns, task, options)
        return defaults[0]
    feature_types = {"image": Image, "audio": Audio, "label": ClassLabel}
    candidates = [
        name
        for name, feature in dataset.features.items()
        if role in feature_types and isinstance(feature, feature_types[role])
    ]
    if role == "text" and len(columns) == 1:
        candidates = columns
    if len(candidates) == 1:
        return candidates[0]
    raise OptionError(
        f"The {role} column of {options.name} cannot be inferred; set {role}_column to one of {columns}."
    )


def _check_single_text_column(column: str, columns: list[str], task: Task, options: DataArguments) -> None:
    """Check that there is one column of text only: of several, such as questions and answers, the user must choose."""
    if column == "text" or task in (Task.SEQ2SEQ_LM, Task.TOKEN_CLASSIFICATION) or task.row.inputs == "audio":
        return
    others = (*TEXT_COLUMNS, *TARGET_COLUMNS, *ANSWER_COLUMNS) if task.is_language_model else TEXT_COLUMNS
    further = [name for name in columns if name in others and name not in (column, options.text_pair_column)]
    if further:
        raise OptionError(
            f"{options.name} has text in {column!r} and in {', '.join(map(repr, further))}: set text_column to the "
            "one to train on. To train on several, join them in one column first."
        )


def default_columns(task: Task, role: str) -> tuple[str, ...]:
    """Return the default names of the column for a role, the preferred one first."""
    if task is Task.TOKEN_CLASSIFICATION and role in ("text", "label"):
        return WORD_COLUMNS if role == "text" else TOKEN_LABEL_COLUMNS
    if task.row.inputs == "audio" and role in ("text", "audio"):
        return TRANSCRIPT_COLUMNS if role == "text" else AUDIO_COLUMNS
    texts = (*TEXT_COLUMNS, *MESSAGES_COLUMNS) if task is Task.CAUSAL_LM else TEXT_COLUMNS
    return {"text": texts, "target": TARGET_COLUMNS, "label": CLASS_COLUMNS, "image": IMAGE_COLUMNS}[role]


def dataset_folder(options: DataArguments) -> Path | None:
    """Return the folder of a local dataset, in which its relative paths may begin."""
    if options.dataset_name not in DATASET_BUILDERS:
        return Path(options.dataset_name) if options.is_local else None
    return Path(first_file(options.data_files)).parent


def check_strings(values: Sequence[Any], rows: Sequence[int], column: str, dataset: str) -> list[str]:
    """Return the values of a column if all are strings.

    Args:
        values: Values of some rows.
        rows: Indices of these rows.
        column, dataset: Names, for the error.

    Raises:
        OptionError: A value is not a string; names the first such row and the value's type.
    """
    for value, row in zip(values, rows, strict=True):
        if not isinstance(value, str):
            raise not_text_error(value, row, column, dataset)
    return list(values)


def not_text_error(value: Any, row: int, column: str, dataset: str) -> OptionError:
    """Return the error of a value that should be a text."""
    description = "None" if value is None else f"a value of type {type(value).__name__}"
    return OptionError(
        f"{dataset}: column {column!r} must contain text; row {row} has {description}. Set text_column to a column of "
        "texts, or correct the row."
    )
