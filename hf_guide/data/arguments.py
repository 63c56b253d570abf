"""What `hf-guide distill` is told besides `DistillationArguments`: which models, and what they learn from."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_guide.errors import OptionError
from hf_guide.validation import check_choice, check_integer, check_mapping, check_number

DEFAULT_TARGET_LENGTH = 128


@dataclass
class ModelArguments:
    """The student and what belongs to it.

    Raises:
        OptionError: an unknown task, or a mapping that is none.
    """

    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "A student that is there already: a Hub id or a folder. Without it the student is made out of its "
            "teacher, as `student` says."
        },
    )
    model_init_kwargs: dict | str | None = field(
        default=None,
        metadata={
            "help": "What from_pretrained of model_name_or_path is called with, as JSON: revision, dtype, "
            "attn_implementation, trust_remote_code."
        },
    )
    processor_name_or_path: str | None = field(
        default=None,
        metadata={"help": "The tokenizer or image processor; by default the student's, else the teacher's."},
    )
    task: str | None = field(
        default=None,
        metadata={
            "help": "causal-lm, masked-lm, seq2seq-lm, sequence-classification, token-classification or "
            "image-classification; by default what the teacher is for."
        },
    )
    peft_config: dict | str | None = field(
        default=None,
        metadata={"help": 'Train an adapter on the student, as JSON: \'{"peft_type": "LORA", "r": 8}\'.'},
    )

    def __post_init__(self) -> None:
        from hf_guide.tasks import Task

        if self.task is not None:
            self.task = check_choice("task", self.task, Task)
        if self.model_init_kwargs is not None:
            self.model_init_kwargs = check_mapping("model_init_kwargs", self.model_init_kwargs)
        if self.peft_config is not None:
            self.peft_config = check_mapping("peft_config", self.peft_config, like='{"peft_type": "LORA", "r": 8}')


@dataclass
class DataArguments:
    """What is learned from, and how it is cut into examples.

    Raises:
        OptionError: neither a dataset nor files, or a number out of range.
    """

    dataset: str = field(
        default="",
        metadata={
            "help": "A dataset: a Hub id, a folder (one of files, or one that save_to_disk wrote), or how data_files are to "
            "be read: json, csv, text, parquet, imagefolder."
        },
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Which of the dataset's configurations."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the dataset."})
    data_files: dict | str | list | None = field(
        default=None,
        metadata={
            "help": "Local files to read: one, a pattern, a list, or as JSON a mapping of splits to these: "
            '\'{"train": "train.jsonl", "validation": "held_out.jsonl"}\'.'
        },
    )
    train_split: str = field(
        default="train", metadata={"help": "The split to train on; slices such as train[:10%%] are understood."}
    )
    eval_split: str | None = field(
        default=None, metadata={"help": "The split to evaluate on; by default validation, where there is one."}
    )
    validation_share: float = field(
        default=0.05,
        metadata={"help": "Where there is no split to evaluate on, the share of the training split that is held out."},
    )
    validation_seed: int = field(default=0, metadata={"help": "Which examples are held out; apart from `seed`."})
    text_column: str | None = field(
        default=None,
        metadata={
            "help": "The column to read: texts, lists of words (token-classification), or conversations, which the chat "
            "template renders (causal-lm); by default the usual names."
        },
    )
    text_pair_column: str | None = field(
        default=None, metadata={"help": "Of sequence classification: a second text beside the first."}
    )
    target_column: str | None = field(default=None, metadata={"help": "Of seq2seq-lm: the column to write."})
    image_column: str | None = field(default=None, metadata={"help": "The column of images."})
    label_column: str | None = field(default=None, metadata={"help": "The column of classes, by number or by name."})
    source_prefix: str = field(
        default="", metadata={"help": "Of seq2seq-lm: text before every source, such as 'summarize: '."}
    )
    max_length: int | None = field(
        default=None, metadata={"help": "Tokens an example; by default what the model reads, but at most 512."}
    )
    max_target_length: int = field(
        default=DEFAULT_TARGET_LENGTH, metadata={"help": "Of seq2seq-lm: tokens of a target."}
    )
    pack: bool = field(
        default=True,
        metadata={
            "help": "Of causal and masked language models: lay texts end to end in blocks of max_length tokens; otherwise "
            "each text is an example, cut at max_length, or ended by the end token where it is shorter."
        },
    )
    mlm_probability: float = field(default=0.15, metadata={"help": "Of masked-lm: the share of tokens to mask."})
    mask_once: bool = field(
        default=False,
        metadata={
            "help": "Of masked-lm: mask every example once, in place of anew in every epoch. It is so for evaluation, and "
            "wherever a capture is read."
        },
    )
    max_train_examples: int | None = field(
        default=None, metadata={"help": "Train on the first so many rows of the dataset."}
    )
    max_eval_examples: int | None = field(default=None, metadata={"help": "Evaluate on the first so many rows."})
    preprocessing_num_workers: int | None = field(
        default=None, metadata={"help": "Processes that prepare examples before the training."}
    )

    def __post_init__(self) -> None:
        if isinstance(self.data_files, str) and self.data_files[:1] in "{[":
            self.data_files = _parse_json(self.data_files, "data_files")
        if not self.data_files and (not self.dataset or self.dataset in DATASET_BUILDERS):
            raise OptionError("There is nothing to learn from: give dataset (a Hub id or a folder), or data_files.")
        self.dataset = self.dataset or _builder_for(self.data_files)
        for name in ("max_length", "max_target_length", "max_train_examples", "max_eval_examples"):
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, check_integer(name, value))
        if self.preprocessing_num_workers is not None:
            check_integer("preprocessing_num_workers", self.preprocessing_num_workers)
        check_integer("validation_seed", self.validation_seed, low=0)
        self.validation_share = check_number("validation_share", self.validation_share, 0, 1, includes_high=False)
        self.mlm_probability = check_number(
            "mlm_probability", self.mlm_probability, 0, 1, includes_low=False, includes_high=False
        )

    @property
    def name(self) -> str:
        """What the data is called in a card; of local data no more than the bare name."""
        if not self.is_local:
            return self.dataset
        return Path(first_file(self.data_files) if self.dataset in DATASET_BUILDERS else self.dataset).resolve().name

    @property
    def is_local(self) -> bool:
        """Whether the data is on this machine alone, so that a card cannot link to it."""
        return self.dataset in DATASET_BUILDERS or os.path.isdir(self.dataset)


DATASET_BUILDERS = ("json", "csv", "text", "parquet", "arrow", "imagefolder")
"""Names of a dataset that only say how files are to be read."""

_BUILDER_BY_SUFFIX = {
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".txt": "text",
    ".parquet": "parquet",
}


def first_file(files: Any) -> str:
    """Return the first name in what `data_files` may be.

    Raises:
        OptionError: there is none.
    """
    if isinstance(files, str):
        return files
    inner = list(files.values() if isinstance(files, dict) else files or ())
    if not inner:
        raise OptionError("data_files names no file.")
    return first_file(inner[0])


def _builder_for(files: Any) -> str:
    name = first_file(files)
    endings = [ending for ending in Path(name).suffixes if ending in _BUILDER_BY_SUFFIX]
    if not endings:
        raise OptionError(
            f"How {name!r} is to be read is not known by its name; say dataset: one of {list(DATASET_BUILDERS)}."
        )
    return _BUILDER_BY_SUFFIX[endings[-1]]


def _parse_json(text: str, option: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise OptionError(f"{option} is read as JSON: {error}; found {text!r}.") from error
