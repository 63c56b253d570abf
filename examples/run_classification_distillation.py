"""Distill a text classifier on a dataset of the Hub, or on CSV or JSON files, with a column of text and one of labels.

    python examples/run_classification_distillation.py \
        --teacher textattack/roberta-base-SST-2 --model_name_or_path distilbert/distilroberta-base \
        --dataset_name stanfordnlp/sst2 --text_column_name sentence \
        --do_train --do_eval --losses '{"ce": 0.3, "kd": 0.7}' --temperature 2 --output_dir student

Named labels are mapped to the teacher's order; numeric labels are used unchanged. A column of floats makes it a regression
(`kd` is then the squared error of the predictions), one with a list of labels per text a multi-label classification (`kd` is
then a divergence per label).
"""

import gc
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import datasets
import numpy as np
import transformers
from accelerate import PartialState
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    HfArgumentParser,
    set_seed,
)

from hf_guide import DistillationArguments, DistillationTrainer

logger = logging.getLogger(__name__)


@dataclass
class ModelArguments:
    """Arguments for a student that is not made from its teacher, and for the tokenizer."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "Student: a Hub id or a folder."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the student."})
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "Tokenizer; by default the student's, else the teacher's."}
    )
    dtype: str = field(default="float32", metadata={"help": "Precision in which the student's weights are trained."})


@dataclass
class DataTrainingArguments:
    """Arguments for the training and evaluation data."""

    dataset_name: str | None = field(default=None, metadata={"help": "Name of a dataset on the Hub."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    train_file: str | None = field(default=None, metadata={"help": "Training file: CSV or JSON."})
    validation_file: str | None = field(default=None, metadata={"help": "Evaluation file of the same kind."})
    validation_split_percentage: int = field(
        default=5, metadata={"help": "Percentage of the training split to hold out if there is no validation split."}
    )
    text_column_name: str = field(default="text", metadata={"help": "Column with the text."})
    second_text_column_name: str | None = field(
        default=None, metadata={"help": "Column with the second text of a pair."}
    )
    label_column_name: str = field(
        default="label", metadata={"help": "Column with the labels: one, a list of them, or a float."}
    )
    max_seq_length: int = field(default=128, metadata={"help": "Tokens per example."})
    preprocessing_num_workers: int | None = field(
        default=None, metadata={"help": "Number of processes for preprocessing."}
    )

    def __post_init__(self) -> None:
        if self.dataset_name is None and self.train_file is None:
            raise ValueError("Give either dataset_name or train_file.")


def load_raw_datasets(args: DataTrainingArguments) -> datasets.DatasetDict:
    """Load a dataset with the splits train and validation."""
    if args.dataset_name is not None:
        raw = datasets.load_dataset(args.dataset_name, args.dataset_config_name)
    else:
        files = {"train": args.train_file, "validation": args.validation_file}
        ending = args.train_file.rsplit(".", 1)[-1]
        kind = "json" if ending == "jsonl" else ending
        raw = datasets.load_dataset(kind, data_files={name: file for name, file in files.items() if file})
    if "validation" not in raw:
        parts = raw["train"].train_test_split(test_size=args.validation_split_percentage / 100, seed=0)
        raw = datasets.DatasetDict(train=parts["train"], validation=parts["test"])
    return raw


def encode_classes(raw: datasets.DatasetDict, column: str) -> tuple[datasets.DatasetDict, str, list[str]]:
    """Return the dataset with numbered classes, its problem type as Transformers names it, and the names of the classes."""
    feature = raw["train"].features[column]
    if isinstance(feature, datasets.List):
        if isinstance(feature.feature, datasets.ClassLabel):
            return raw, "multi_label_classification", feature.feature.names
        names = sorted({str(name) for split in raw.values() for labels in split[column] for name in labels})
        numbers = {name: number for number, name in enumerate(names)}
        raw = raw.map(lambda example: {column: [numbers[str(name)] for name in example[column]]}, desc="Labels")
        return raw, "multi_label_classification", names
    if feature.dtype.startswith("float"):
        return raw, "regression", []
    if not isinstance(feature, datasets.ClassLabel):
        raw = raw.class_encode_column(column)
    return raw, "single_label_classification", raw["train"].features[column].names


def make_compute_metrics(problem_type: str) -> Callable[[EvalPrediction], dict[str, float]]:
    """Return the function that computes accuracy, micro-averaged F1, or error and correlation."""

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
        labels = prediction.label_ids
        if problem_type == "regression":
            errors, correlation = logits.squeeze(-1) - labels, np.corrcoef(logits.squeeze(-1), labels)[0, 1]
            return {"mse": float((errors**2).mean()), "pearson": float(correlation)}
        if problem_type == "multi_label_classification":
            predicted = logits > 0
            return {"f1": float(2 * (predicted * labels).sum() / max(predicted.sum() + labels.sum(), 1))}
        return {"accuracy": float((np.argmax(logits, axis=-1) == labels).mean())}

    return compute_metrics


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
    tokenizer = AutoTokenizer.from_pretrained(
        model_args.tokenizer_name or model_args.model_name_or_path or training_args.teacher
    )
    raw_datasets, problem_type, names = encode_classes(raw_datasets, data_args.label_column_name)
    label2id = AutoConfig.from_pretrained(training_args.teacher).label2id if training_args.teacher else {}
    if set(label2id) != set(names):  # the teacher's labels are only numbered: use the dataset's names
        label2id = {name: number for number, name in enumerate(names)}
    if problem_type == "regression":
        label2id = {"LABEL_0": 0}
    model = None  # the trainer makes it from the teacher, with `student_init_kwargs`
    if model_args.model_name_or_path:
        model = AutoModelForSequenceClassification.from_pretrained(
            model_args.model_name_or_path,
            revision=model_args.model_revision,
            dtype=model_args.dtype,
            problem_type=problem_type,
            label2id=label2id,
            id2label={number: name for name, number in label2id.items()},
        )

    def encode(label: Any) -> float | int | list[float]:
        if problem_type == "regression":
            return float(label)
        if problem_type == "single_label_classification":
            return label2id[names[label]]
        numbers = {label2id[names[each]] for each in label}
        return [float(number in numbers) for number in range(len(names))]

    def tokenize(examples: dict) -> dict:
        columns = [data_args.text_column_name, data_args.second_text_column_name]
        texts = [examples[column] for column in columns if column is not None]
        tokenized = tokenizer(*texts, truncation=True, max_length=data_args.max_seq_length)
        tokenized["labels"] = [encode(label) for label in examples[data_args.label_column_name]]
        return tokenized

    with training_args.main_process_first(desc="tokenizing"):
        tokenized = raw_datasets.map(
            tokenize,
            batched=True,
            num_proc=data_args.preprocessing_num_workers,
            remove_columns=raw_datasets["train"].column_names,
            desc="Tokenizing",
        )

    trainer = DistillationTrainer(
        model=model,
        args=training_args,
        train_dataset=tokenized["train"] if training_args.do_train else None,
        eval_dataset=tokenized["validation"] if training_args.do_eval else None,
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=make_compute_metrics(problem_type),
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
