"""Distill a multiple choice model on a dataset in SWAG's format: a context, the endings to choose from, a label.

    python examples/run_multiple_choice_distillation.py \
        --teacher LIAMF-USP/roberta-large-finetuned-race --model_name_or_path distilbert/distilroberta-base \
        --dataset_name allenai/swag --dataset_config_name regular \
        --do_train --do_eval --losses '{"ce": 0.3, "kd": 0.7}' --temperature 2 --output_dir student

The scores of the endings are distilled: a distribution over the choices of each question.
"""

import gc
import logging
import sys
from dataclasses import dataclass, field
from itertools import chain

import datasets
import numpy as np
import transformers
from accelerate import PartialState
from transformers import (
    AutoModelForMultipleChoice,
    AutoTokenizer,
    DataCollatorForMultipleChoice,
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
    tokenizer_name: str | None = field(default=None, metadata={"help": "Tokenizer; by default the teacher's."})
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
    context_column_name: str = field(default="sent1", metadata={"help": "Column with the context or question."})
    start_column_name: str | None = field(
        default="sent2", metadata={"help": "Column with a text that every ending continues; empty for none."}
    )
    ending_column_names: list[str] = field(
        default_factory=lambda: ["ending0", "ending1", "ending2", "ending3"],
        metadata={"help": "Columns with the endings to choose from."},
    )
    label_column_name: str = field(default="label", metadata={"help": "Column with the number of the right ending."})
    max_seq_length: int = field(default=128, metadata={"help": "Tokens of a context with one of its endings."})
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
    tokenizer = AutoTokenizer.from_pretrained(
        model_args.tokenizer_name or training_args.teacher or model_args.model_name_or_path
    )
    model = None  # the trainer makes it from the teacher, with `student_init_kwargs`
    if model_args.model_name_or_path:
        model = AutoModelForMultipleChoice.from_pretrained(
            model_args.model_name_or_path, revision=model_args.model_revision, dtype=model_args.dtype
        )

    def tokenize(examples: dict) -> dict:
        contexts = examples[data_args.context_column_name]
        choices = len(data_args.ending_column_names)
        starts = [""] * len(contexts)
        if data_args.start_column_name:
            starts = [f"{start} " for start in examples[data_args.start_column_name]]
        endings = zip(*(examples[name] for name in data_args.ending_column_names), strict=True)
        first = list(chain.from_iterable([context] * choices for context in contexts))
        second = [start + ending for start, each in zip(starts, endings, strict=True) for ending in each]
        encoded = tokenizer(first, second, truncation=True, max_length=data_args.max_seq_length)
        grouped = {
            name: [values[row : row + choices] for row in range(0, len(values), choices)]
            for name, values in encoded.items()
        }
        return grouped | {"label": [int(label) for label in examples[data_args.label_column_name]]}

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
        data_collator=DataCollatorForMultipleChoice(tokenizer),
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
