"""A dataset read from the Hub or from files: what to train on and what to evaluate on, and which column is which."""

from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, DatasetDict, Image, List, ReadInstruction, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError

from hf_guide.data.arguments import DataArguments
from hf_guide.data.texts import CONVERSATION_COLUMNS
from hf_guide.errors import OptionError
from hf_guide.tasks import Task
from hf_guide.validation import did_you_mean

TEXT_COLUMNS = ("text", "sentence", "content", "document", "article", "source", "question")
TARGET_COLUMNS = ("target", "summary", "highlights", "answer", "translation")
ANSWER_COLUMNS = ("answers", "completion", "response", "output", "chosen", "rejected")
WORD_COLUMNS = ("tokens", "words", "text")
TOKEN_LABEL_COLUMNS = ("ner_tags", "pos_tags", "labels", "tags", "label")
LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "target")
IMAGE_COLUMNS = ("image", "img", "pixel_values")


def load_splits(options: DataArguments) -> tuple[Dataset, Dataset | None]:
    """Return what to train on and what to evaluate on, raw; None where nothing is to be held out.

    Where there is no split to evaluate on, a share of the training split is held out by `validation_seed` alone, so that
    every run holds out the same.

    Raises:
        OptionError: no such split or configuration, or too few examples to hold any out.
        OSError: no such dataset or file.
    """
    found = _load_dataset(options)
    train = _select_split(found, options.train_split, options)
    held_out: Dataset | None = None
    if options.eval_split is not None or "validation" in found:
        held_out = _select_split(found, options.eval_split or "validation", options)
    elif options.validation_share > 0:
        if round(len(train) * options.validation_share) < 1:
            raise OptionError(
                f"{len(train)} examples leave none of a share of {options.validation_share} to evaluate on: give "
                "eval_split, a larger validation_share, or 0 to evaluate on nothing."
            )
        parts = train.train_test_split(test_size=options.validation_share, seed=options.validation_seed)
        train, held_out = parts["train"], parts["test"]
    train = _truncate(train, options.max_train_examples)
    return train, None if held_out is None else _truncate(held_out, options.max_eval_examples)


def _load_dataset(options: DataArguments) -> DatasetDict:
    """Return all splits of a dataset."""
    folder = Path(options.dataset)
    if any((folder / name).is_file() for name in ("dataset_dict.json", "dataset_info.json")):
        found = load_from_disk(folder)
    else:
        try:
            found = load_dataset(
                options.dataset,
                options.dataset_config_name,
                data_files=options.data_files,
                revision=options.dataset_revision,
            )
        except StopIteration as error:  # of datasets, where the first file has no row to tell the columns by
            raise OptionError(f"{options.name} has no example: its first file is empty.") from error
        except (ValueError, DatasetsError) as error:
            if isinstance(error, OSError):
                raise
            why = f": {error.__cause__}" if error.__cause__ else ""  # datasets' own words do not say what ails a file
            raise OptionError(f"{options.name} cannot be read: {error}{why}") from error
    return found if isinstance(found, DatasetDict) else DatasetDict(train=found)


def _select_split(found: DatasetDict, split: str, options: DataArguments) -> Dataset:
    """Return a split, or a slice of one such as train[:10%]."""
    name = split.partition("[")[0]
    if name not in found:
        raise OptionError(
            f"{options.name} has no split {name!r}; it has {list(found)}.{did_you_mean(name, found)} Name one with "
            "train_split or eval_split."
        )
    whole = found[name]
    try:
        (part,) = ReadInstruction.from_spec(split).to_absolute({name: len(whole)})
    except (ValueError, AssertionError) as error:
        raise OptionError(
            f"The slice {split!r} is not understood: {error}. Write train[:10%] or train[:500]."
        ) from error
    rows = range(part.from_ or 0, len(whole) if part.to is None else part.to)
    if not rows:
        raise OptionError(f"There are no examples in {split!r} of {options.name}, which has {len(whole)}.")
    return whole.select(rows)


def _truncate(split: Dataset, count: int | None) -> Dataset:
    return split if count is None else split.select(range(min(len(split), count)))


def find_column(dataset: Dataset, task: Task, role: str, options: DataArguments) -> str:
    """Return the column that plays a role: the one that is named, or the first of the usual names, or the only one.

    Args:
        dataset: a raw split.
        task: what the student is for.
        role: "text", "target", "image" or "label".
        options: names columns as `text_column` and so on.

    Raises:
        OptionError: there is no such column, or none of the usual names; lists those there are.
    """
    columns = dataset.column_names
    named = getattr(options, f"{role}_column")
    if named is not None:
        if named not in columns:
            raise OptionError(
                f"{options.name} has no column {named!r}; it has {columns}.{did_you_mean(named, columns)} Name one with "
                f"{role}_column."
            )
        return named
    usual = [name for name in default_columns(task, role) if name in columns]
    if usual:
        if role == "text":
            _check_single_text_column(usual[0], columns, task, options)
        return usual[0]
    kinds = {"image": Image, "label": ClassLabel}
    fitting = [name for name, kind in dataset.features.items() if role in kinds and isinstance(kind, kinds[role])]
    if role == "text" and len(columns) == 1:
        fitting = columns
    if len(fitting) == 1:
        return fitting[0]
    raise OptionError(
        f"Which column of {options.name} is the {role} is not known; say {role}_column, one of {columns}."
    )


def _check_single_text_column(column: str, columns: list[str], task: Task, options: DataArguments) -> None:
    """Refuse to choose one of several columns of text, such as a question without its answer, unless it is named."""
    if column == "text" or task in (Task.SEQ2SEQ_LM, Task.TOKEN_CLASSIFICATION):
        return
    others = (*TEXT_COLUMNS, *TARGET_COLUMNS, *ANSWER_COLUMNS) if task.is_language_model else TEXT_COLUMNS
    also = [name for name in columns if name in others and name not in (column, options.text_pair_column)]
    if also:
        raise OptionError(
            f"{options.name} has text in {column!r} and in {', '.join(map(repr, also))}: which is to be learned from must be "
            "named, with text_column. To learn from several, join them in a column of their own."
        )


def default_columns(task: Task, role: str) -> tuple[str, ...]:
    """Return the names that a column of a role usually has, the likeliest first."""
    if task is Task.TOKEN_CLASSIFICATION and role in ("text", "label"):
        return WORD_COLUMNS if role == "text" else TOKEN_LABEL_COLUMNS
    texts = (*TEXT_COLUMNS, *CONVERSATION_COLUMNS) if task is Task.CAUSAL_LM else TEXT_COLUMNS
    return {"text": texts, "target": TARGET_COLUMNS, "label": LABEL_COLUMNS, "image": IMAGE_COLUMNS}[role]


def class_names(dataset: Dataset, column: str) -> list[str] | None:
    """Return the names of the classes in a column of labels, or of lists of labels; None where they are only numbers.

    Raises:
        OptionError: the labels are no classes.
    """
    feature = dataset.features[column]
    feature = feature.feature if isinstance(feature, List) else feature
    if isinstance(feature, ClassLabel):
        return list(feature.names)
    kind = getattr(feature, "dtype", str(feature))
    if kind in ("string", "large_string"):
        return sorted(_unique_values(dataset, column))
    if kind == "bool":
        return ["False", "True"]
    if not kind.startswith(("int", "uint")):
        raise OptionError(f"The column {column!r} is of {kind}; classes are whole numbers or names.")
    return None


def count_classes(dataset: Dataset, column: str) -> int:
    """Return one more than the largest number in a column of labels, or of lists of labels."""
    return 1 + max(_unique_values(dataset, column))


def _unique_values(dataset: Dataset, column: str) -> set[Any]:
    found: set[Any] = set()
    for batch in dataset.select_columns([column]).iter(batch_size=1000):
        for value in batch[column]:
            found.update(value if isinstance(value, list) else [value])
    return found
