"""Options of `hf-guide distill` and `hf-guide capture` about models and data, named as in Transformers' example scripts.

Does: declare the fields, check their values, accept the names of earlier releases with a warning.
Does not: load anything (`loading.py`) or declare the options of training (`distillation/arguments.py`).
"""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_guide.errors import OptionError
from hf_guide.tasks import Task
from hf_guide.utils.deprecation import RenamedOptions, with_renamed_options
from hf_guide.validation import check_bool, check_choice, check_integer, check_mapping, check_number

DEFAULT_TARGET_LENGTH = 128

DATASET_BUILDERS = ("json", "csv", "text", "parquet", "arrow", "imagefolder", "audiofolder")
"""Values of `dataset_name` that only specify the format of `data_files`."""

_BUILDER_BY_SUFFIX = {
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".txt": "text",
    ".parquet": "parquet",
}


def _to_percentage(fraction: Any) -> Any:
    """Convert a number, or its text from a YAML file; other values are left for the checks of the option."""
    try:
        return fraction if isinstance(fraction, bool) else round(100 * float(fraction), 10)
    except (TypeError, ValueError):
        return fraction


@with_renamed_options(RenamedOptions(names={"processor_name_or_path": "processing_class_name_or_path"}))
@dataclass
class ModelArguments:
    """The student model and its tokenizer or image processor.

    Raises:
        OptionError: Unknown task, or a value that is not a mapping where one is needed.

    Example:
        >>> ModelArguments(model_init_kwargs='{"dtype": "float32"}').model_init_kwargs
        {'dtype': 'float32'}
    """

    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "An existing student: a Hub id or a folder. Without it, the student is initialized from the teacher as "
            "`student` specifies."
        },
    )
    model_init_kwargs: dict | str | None = field(
        default=None,
        metadata={
            "help": "Arguments of from_pretrained for model_name_or_path, as JSON: revision, dtype, attn_implementation, "
            "trust_remote_code."
        },
    )
    processing_class_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Tokenizer or image processor; by default the student's, otherwise the teacher's."},
    )
    task: str | None = field(
        default=None, metadata={"help": f"{', '.join(map(str, Task))}; by default the teacher's task."}
    )
    peft_config: dict | str | None = field(
        default=None,
        metadata={"help": 'Train an adapter on the student, as JSON: \'{"peft_type": "LORA", "r": 8}\'.'},
    )
    stages: list | str | None = field(
        default=None,
        metadata={
            "help": "Cut and train in stages: a list of changes to these options, one mapping a stage, such as "
            "{student_init_kwargs: {num_hidden_layers: 14}, max_steps: 1000}. The student of a stage is made of the one "
            "before it; teacher, losses and data are common to all, and so are student_init_kwargs outside of stages."
        },
    )

    def __post_init__(self) -> None:
        if self.task is not None:
            self.task = check_choice("task", self.task, Task)
        for option in ("model_init_kwargs", "peft_config"):
            value = getattr(self, option)
            if value is not None:
                setattr(self, option, check_mapping(option, value))
        if self.stages is not None:
            self.stages = _parse_stages(self.stages)


def _parse_stages(stages: Any) -> list[dict[str, Any]]:
    if isinstance(stages, str):
        try:
            stages = json.loads(stages)
        except json.JSONDecodeError as error:
            raise OptionError(f"stages must be a JSON list of mappings: {error}.") from error
    if not isinstance(stages, list) or not stages or not all(isinstance(stage, dict) for stage in stages):
        raise OptionError(
            "stages must be a list of at least one mapping, such as [{student_init_kwargs: {num_hidden_layers: 14}}, "
            f"{{student_init_kwargs: {{hidden_size: 240}}}}]; found {stages!r}."
        )
    return stages


@with_renamed_options(
    RenamedOptions(
        names={
            "dataset": "dataset_name",
            "train_split": "dataset_train_split",
            "eval_split": "dataset_test_split",
            "validation_share": "validation_split_percentage",
            "validation_seed": "validation_split_seed",
            "pack": "packing",
            "mask_once": "static_masking",
            "max_train_examples": "max_train_samples",
            "max_eval_examples": "max_eval_samples",
        },
        conversions={"validation_share": _to_percentage},
    )
)
@dataclass
class DataArguments:
    """The dataset, its columns and its preprocessing.

    Raises:
        OptionError: Neither a dataset nor files, or a number out of range.

    Example:
        >>> DataArguments(data_files="corpus.jsonl").dataset_name
        'json'
    """

    dataset_name: str = field(
        default="",
        metadata={
            "help": "A Hub id, a folder (of files, or written by save_to_disk), or the format of data_files: json, csv, text, "
            "parquet, imagefolder, audiofolder."
        },
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the dataset."})
    data_files: dict | str | list | None = field(
        default=None,
        metadata={
            "help": "Local files: one, a glob pattern, a list, or as JSON a mapping of splits to these: "
            '\'{"train": "train.jsonl", "validation": "held_out.jsonl"}\'.'
        },
    )
    dataset_train_split: str = field(
        default="train", metadata={"help": "Split to train on; slices such as train[:10%%] are supported."}
    )
    dataset_test_split: str | None = field(
        default=None, metadata={"help": "Split to evaluate on; by default `validation`, if there is one."}
    )
    validation_split_percentage: float = field(
        default=5.0,
        metadata={"help": "Percentage of the training split held out for evaluation if there is no split for it."},
    )
    validation_split_seed: int = field(
        default=0, metadata={"help": "Seed that selects the held-out examples; independent of `seed`."}
    )
    text_column: str | None = field(
        default=None,
        metadata={
            "help": "Column of texts, of lists of words (token-classification), or of conversations or prompts (causal-lm, "
            "image-text-to-text). By default found by its name: for causal-lm messages or conversations, prompt and "
            "completion, instruction, input and output, or text; for feature-extraction every column of texts."
        },
    )
    text_pair_column: str | None = field(
        default=None,
        metadata={"help": "Column of a second text for each example (sequence-classification, feature-extraction)."},
    )
    target_column: str | None = field(
        default=None,
        metadata={"help": "Column of target texts (seq2seq-lm), or of the completions of text_column (causal-lm)."},
    )
    chat_template_path: str | None = field(
        default=None,
        metadata={
            "help": "Chat template of the student: a Jinja file, or the folder or Hub id of a tokenizer that has one; by "
            "default that of the tokenizer."
        },
    )
    assistant_only_loss: bool = field(
        default=False,
        metadata={"help": "Train on what the assistant writes only, not on the other turns of a conversation."},
    )
    completion_only_loss: bool | None = field(
        default=None,
        metadata={"help": "Train on completions only, not on prompts; by default true for data that has both."},
    )
    image_column: str | None = field(
        default=None, metadata={"help": "Column of images, or of lists of them (image-text-to-text)."}
    )
    audio_column: str | None = field(
        default=None,
        metadata={
            "help": "Column of sounds: paths, files, or arrays with their sampling_rate. They are resampled to the model's."
        },
    )
    language: str | None = field(
        default=None,
        metadata={
            "help": "Language of the transcripts, such as german (speech-seq2seq): a token of Whisper's before each."
        },
    )
    speech_task: str | None = field(
        default=None,
        metadata={"help": "transcribe or translate (speech-seq2seq): a token of Whisper's before each transcript."},
    )
    max_duration_in_seconds: float | None = field(
        default=None,
        metadata={
            "help": "Longer sounds are left out, or for audio-classification cut; by default the model's window, else 20."
        },
    )
    min_duration_in_seconds: float = field(default=0.0, metadata={"help": "Shorter sounds are left out."})
    label_column: str | None = field(
        default=None,
        metadata={
            "help": "Column of class names or class indices, of lists of them, or of real numbers; of answers as in SQuAD "
            "(question-answering), of the right choice's number (multiple-choice), or of the gold similarity of two texts "
            "(feature-extraction, by default score)."
        },
    )
    source_prefix: str = field(
        default="",
        metadata={
            "help": "Text before every source, such as 'summarize: ' (seq2seq-lm), or before every text (feature-extraction)."
        },
    )
    max_length: int | None = field(
        default=None, metadata={"help": "Tokens per example; by default what the model supports, at most 512."}
    )
    max_target_length: int = field(default=DEFAULT_TARGET_LENGTH, metadata={"help": "Tokens per target (seq2seq-lm)."})
    packing: bool = field(
        default=True,
        metadata={
            "help": "Concatenate texts and split them into blocks of max_length tokens (causal-lm, masked-lm); put several "
            "conversations, or prompts with completions, into one row, where none attends to another. Otherwise each is one "
            "example. An example that is longer is truncated to max_length; without a target left it is dropped."
        },
    )
    mlm_probability: float = field(default=0.15, metadata={"help": "Fraction of tokens to mask (masked-lm)."})
    static_masking: bool = field(
        default=False,
        metadata={
            "help": "Mask each training example once instead of anew in every epoch (masked-lm). Always on for "
            "evaluation, and for training from a teacher cache."
        },
    )
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Train on the first N rows of the dataset only."}
    )
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on the first N rows only."})
    preprocessing_num_workers: int | None = field(
        default=None, metadata={"help": "Processes that preprocess the dataset before training."}
    )

    def __post_init__(self) -> None:
        if isinstance(self.data_files, str) and self.data_files[:1] in "{[":
            self.data_files = _parse_json(self.data_files, "data_files")
        if not self.data_files and (not self.dataset_name or self.dataset_name in DATASET_BUILDERS):
            raise OptionError("No dataset is given: set dataset_name (a Hub id or a folder), or data_files.")
        self.dataset_name = self.dataset_name or _builder_for(self.data_files)
        for name in ("max_length", "max_target_length", "max_train_samples", "max_eval_samples"):
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, check_integer(name, value))
        if self.max_duration_in_seconds is not None:
            self.max_duration_in_seconds = check_number(
                "max_duration_in_seconds", self.max_duration_in_seconds, 0, 86_400, includes_low=False
            )
        self.min_duration_in_seconds = check_number("min_duration_in_seconds", self.min_duration_in_seconds, 0, 3600)
        if self.speech_task is not None:
            self.speech_task = check_choice("speech_task", self.speech_task, ("transcribe", "translate"))
        for name in ("packing", "assistant_only_loss", "completion_only_loss"):
            if getattr(self, name) is not None or name != "completion_only_loss":
                check_bool(name, getattr(self, name))
        if self.preprocessing_num_workers is not None:
            check_integer("preprocessing_num_workers", self.preprocessing_num_workers)
        check_integer("validation_split_seed", self.validation_split_seed, low=0)
        self.validation_split_percentage = check_number(
            "validation_split_percentage", self.validation_split_percentage, 0, 100, includes_high=False
        )
        self.mlm_probability = check_number(
            "mlm_probability", self.mlm_probability, 0, 1, includes_low=False, includes_high=False
        )

    @property
    def name(self) -> str:
        """Name of the dataset: a Hub id, or the last component of the path of a folder or of the first file to train on."""
        if not self.is_local:
            return self.dataset_name
        path = self.dataset_name
        if path in DATASET_BUILDERS:
            path = first_file(self._files_of(self.dataset_train_split))
        return Path(path).resolve().name

    def name_of(self, split: str) -> str:
        """Return the name of a split for a model card: its file without a path, or the dataset, configuration and split.

        Example:
            >>> files = DataArguments(data_files={"train": "a.jsonl", "validation": "data/b.jsonl"})
            >>> files.name_of("validation"), files.name_of("validation[:10%]")
            ('b.jsonl', 'b.jsonl (validation[:10%])')
            >>> DataArguments("nyu-mll/glue", "mrpc").name_of("test")
            'nyu-mll/glue, mrpc (test)'
        """
        name, is_own_file = self.name, False
        if self.dataset_name in DATASET_BUILDERS and self.data_files:
            files = all_files(self._files_of(split))
            others = f" and {len(files) - 1} more" if len(files) > 1 else ""
            name = Path(files[0]).resolve().name + others
            is_own_file = isinstance(self.data_files, dict) and split in self.data_files
        config = f", {self.dataset_config_name}" if self.dataset_config_name else ""
        return f"{name}{config}" + ("" if is_own_file else f" ({split})")

    def _files_of(self, split: str) -> Any:
        """Return the files of a split, or of all splits if they are not separate."""
        separate = self.data_files if isinstance(self.data_files, dict) else {}
        return separate.get(split.partition("[")[0], self.data_files)

    @property
    def is_local(self) -> bool:
        """Whether the dataset exists on this machine only, so that a model card cannot link to it."""
        return self.dataset_name in DATASET_BUILDERS or os.path.isdir(self.dataset_name)


def first_file(data_files: Any) -> str:
    """Return the first file name in `data_files`: a string, a list, or a mapping of these.

    Raises:
        OptionError: There is none.
    """
    return all_files(data_files)[0]


def all_files(data_files: Any) -> list[str]:
    """Return the file names in `data_files`: a string, a list, or a mapping of these.

    Raises:
        OptionError: There is none.
    """
    if isinstance(data_files, str):
        return [data_files]
    entries = data_files.values() if isinstance(data_files, dict) else data_files or ()
    files = [file for entry in entries for file in all_files(entry)]
    if not files:
        raise OptionError("data_files contains no file name.")
    return files


def _builder_for(data_files: Any) -> str:
    name = first_file(data_files)
    suffixes = [suffix for suffix in Path(name).suffixes if suffix in _BUILDER_BY_SUFFIX]
    if not suffixes:
        raise OptionError(
            f"The format of {name!r} cannot be inferred from its name; set dataset_name to one of {list(DATASET_BUILDERS)}."
        )
    return _BUILDER_BY_SUFFIX[suffixes[-1]]


def _parse_json(text: str, option: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise OptionError(f"{option} must be valid JSON: {error}; found {text!r}.") from error
