"""Distill a classifier of sounds (AST, wav2vec 2.0, HuBERT, ...) on a dataset of the Hub, or on files.

    python examples/run_audio_classification_distillation.py \
        --teacher MIT/ast-finetuned-speech-commands-v2 --student_init_kwargs '{"num_hidden_layers": 4}' \
        --dataset_name google/speech_commands --dataset_config_name v0.02 --max_length_seconds 1 \
        --do_train --do_eval --losses '{"ce": 0.3, "kd": 0.7}' --temperature 2 --output_dir student

A file has one row per recording: its path and its label. Labels are mapped to the teacher's order by name. Longer sounds
are cut.
"""

import gc
import logging
import sys
from dataclasses import dataclass, field
from typing import Any

import datasets
import numpy as np
import torch
import transformers
from accelerate import PartialState
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModelForAudioClassification,
    EvalPrediction,
    HfArgumentParser,
    set_seed,
)

from hf_guide import DistillationArguments, DistillationTrainer
from hf_guide.data.sounds import decode_sound

logger = logging.getLogger(__name__)


@dataclass
class ModelArguments:
    """Arguments for a student that is not made from its teacher, and for the feature extractor."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "Student: a Hub id or a folder."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the student."})
    feature_extractor_name: str | None = field(
        default=None, metadata={"help": "Feature extractor; by default the student's, else the teacher's."}
    )
    ignore_mismatched_sizes: bool = field(
        default=False, metadata={"help": "Replace the head of a student that was trained for other classes."}
    )


@dataclass
class DataTrainingArguments:
    """Arguments for the training and evaluation data."""

    dataset_name: str | None = field(default=None, metadata={"help": "Name of a dataset on the Hub, or a folder."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    train_file: str | None = field(default=None, metadata={"help": "Training data: a CSV or JSON lines file."})
    validation_file: str | None = field(default=None, metadata={"help": "Evaluation data: a CSV or JSON lines file."})
    train_val_split: float = field(
        default=0.15, metadata={"help": "Share of the training split to hold out if there is no validation split."}
    )
    audio_column_name: str = field(default="audio", metadata={"help": "Column with the sounds or their paths."})
    label_column_name: str = field(default="label", metadata={"help": "Column with the labels."})
    max_length_seconds: float = field(default=20.0, metadata={"help": "Longer sounds are cut to this length."})
    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "Processes that extract features."})

    def __post_init__(self) -> None:
        if self.dataset_name is None and self.train_file is None:
            raise ValueError("Give either dataset_name or train_file.")


@dataclass
class SoundCollator:
    """Pads sounds with the feature extractor, where they differ in length."""

    feature_extractor: Any

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Return a batch."""
        features = [{name: each[name] for name in each if name != "labels"} for each in examples]
        batch = dict(self.feature_extractor.pad(features, return_tensors="pt"))
        return batch | {"labels": torch.tensor([each["labels"] for each in examples])}


def load_raw_datasets(args: DataTrainingArguments) -> datasets.DatasetDict:
    """Load a dataset with the splits train and validation, its labels as classes and its sounds not decoded yet."""
    if args.dataset_name is not None:
        raw = datasets.load_dataset(args.dataset_name, args.dataset_config_name)
    else:
        files = {"train": args.train_file, "validation": args.validation_file}
        builder = "csv" if str(args.train_file).endswith(".csv") else "json"
        raw = datasets.load_dataset(builder, data_files={name: file for name, file in files.items() if file})
    if "validation" not in raw:
        parts = raw["train"].train_test_split(test_size=args.train_val_split, seed=0)
        raw = datasets.DatasetDict(train=parts["train"], validation=parts["test"])
    for column in (args.audio_column_name, args.label_column_name):
        if column not in raw["train"].column_names:
            raise ValueError(f"There is no column {column!r}; the dataset has {raw['train'].column_names}.")
    if not isinstance(raw["train"].features[args.label_column_name], datasets.ClassLabel):
        raw = raw.class_encode_column(args.label_column_name)
    if isinstance(raw["train"].features[args.audio_column_name], datasets.Audio):
        raw = raw.cast_column(args.audio_column_name, datasets.Audio(decode=False))
    return raw


def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Return the accuracy."""
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    return {"accuracy": float((np.argmax(logits, axis=-1) == prediction.label_ids).mean())}


def main() -> None:
    """Train, evaluate and save, with the arguments of the command line or of one YAML or JSON file."""
    parser = HfArgumentParser((ModelArguments, DataTrainingArguments, DistillationArguments))
    if len(sys.argv) == 2 and sys.argv[1].endswith((".yaml", ".json")):
        read = parser.parse_json_file if sys.argv[1].endswith(".json") else parser.parse_yaml_file
        model_args, data_args, training_args = read(sys.argv[1])
    else:
        model_args, data_args, training_args = parser.parse_args_into_dataclasses()

    if not (training_args.do_train or training_args.do_eval):
        raise ValueError("There is nothing to do: pass --do_train, --do_eval or both.")
    logging.basicConfig(level=training_args.get_process_log_level(), handlers=[logging.StreamHandler(sys.stdout)])
    transformers.utils.logging.set_verbosity(training_args.get_process_log_level())
    set_seed(training_args.seed)

    raw_datasets = load_raw_datasets(data_args)
    feature_extractor = AutoFeatureExtractor.from_pretrained(
        model_args.feature_extractor_name or model_args.model_name_or_path or training_args.teacher
    )
    rate = feature_extractor.sampling_rate
    names = raw_datasets["train"].features[data_args.label_column_name].names
    label2id = AutoConfig.from_pretrained(training_args.teacher).label2id if training_args.teacher else {}
    if set(label2id) != set(names):  # the teacher's labels are only numbered: use the dataset's names
        label2id = {name: number for number, name in enumerate(names)}
    model = None  # the trainer makes it from the teacher, with `student_init_kwargs`
    if model_args.model_name_or_path:
        model = AutoModelForAudioClassification.from_pretrained(
            model_args.model_name_or_path,
            revision=model_args.model_revision,
            ignore_mismatched_sizes=model_args.ignore_mismatched_sizes,
            num_labels=len(names),
            label2id=label2id,
            id2label={number: name for name, number in label2id.items()},
        )

    def to_inputs(row: dict[str, Any], index: int) -> dict[str, Any]:
        column = data_args.audio_column_name
        sound = decode_sound(row[column], rate, row=index, column=column, dataset=data_args.dataset_name or "the file")
        inputs = feature_extractor(sound[: int(data_args.max_length_seconds * rate)], sampling_rate=rate)
        made = {key: values[0] for key, values in inputs.items()}
        return made | {"labels": label2id[names[row[data_args.label_column_name]]]}

    with training_args.main_process_first(desc="extracting features"):
        prepared = raw_datasets.map(
            to_inputs,
            with_indices=True,
            remove_columns=raw_datasets["train"].column_names,
            num_proc=data_args.preprocessing_num_workers,
            desc="extracting features",
        )
    trainer = DistillationTrainer(
        model=model,
        args=training_args,
        train_dataset=prepared["train"] if training_args.do_train else None,
        eval_dataset=prepared["validation"] if training_args.do_eval else None,
        processing_class=feature_extractor,
        data_collator=SoundCollator(feature_extractor),
        compute_metrics=compute_metrics,
    )
    logger.info("%s", trainer.accelerator.state)  # rank, world size, device, sharding

    if training_args.do_train:
        result = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
        trainer.save_model()
        trainer.log_metrics("train", result.metrics)
        trainer.save_metrics("train", result.metrics)
        trainer.save_state()
    if training_args.do_eval:
        metrics = trainer.evaluate()  # includes agreement with the teacher
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)

    card = {"dataset_tags": data_args.dataset_name} if data_args.dataset_name else {}
    if training_args.push_to_hub:
        trainer.push_to_hub(**card)
    else:
        trainer.create_model_card(**card)


if __name__ == "__main__":
    main()
    gc.collect()  # destroying the process group while a wrapped model exists can hang
    PartialState().destroy_process_group()
