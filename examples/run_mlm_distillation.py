"""Distill a masked language model (BERT, RoBERTa, ModernBERT, ...) on a text dataset or text files.

    python examples/run_mlm_distillation.py \
        --teacher answerdotai/ModernBERT-base \
        --student_init_kwargs '{"num_hidden_layers": 10, "method": "uniform"}' \
        --dataset_name Salesforce/wikitext --dataset_config_name wikitext-103-raw-v1 \
        --do_train --do_eval --losses '{"ce": 0.3, "kd": 0.7}' --temperature 2 --output_dir student

Training tokens are masked anew in every epoch; evaluation tokens are masked once, so that evaluations are comparable.
"""

import gc
import logging
import sys
from dataclasses import dataclass, field
from itertools import chain

import datasets
import transformers
from accelerate import PartialState
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    HfArgumentParser,
    default_data_collator,
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
    train_file: str | None = field(default=None, metadata={"help": "Training file: text, CSV or JSON."})
    validation_file: str | None = field(default=None, metadata={"help": "Evaluation file of the same kind."})
    validation_split_percentage: int = field(
        default=5, metadata={"help": "Percentage of the training split to hold out if there is no validation split."}
    )
    text_column_name: str = field(default="text", metadata={"help": "Column with the text."})
    max_seq_length: int = field(default=512, metadata={"help": "Tokens per example."})
    mlm_probability: float = field(default=0.15, metadata={"help": "Share of tokens to mask."})
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
        kind = {"txt": "text", "jsonl": "json"}.get(ending, ending)
        raw = datasets.load_dataset(kind, data_files={name: file for name, file in files.items() if file})
    if "validation" not in raw:
        parts = raw["train"].train_test_split(test_size=args.validation_split_percentage / 100, seed=0)
        raw = datasets.DatasetDict(train=parts["train"], validation=parts["test"])
    return raw


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
    model = None  # the trainer makes it from the teacher, with `student_init_kwargs`
    if model_args.model_name_or_path:
        model = AutoModelForMaskedLM.from_pretrained(
            model_args.model_name_or_path, revision=model_args.model_revision, dtype=model_args.dtype
        )
    masker = DataCollatorForLanguageModeling(tokenizer, mlm_probability=data_args.mlm_probability)

    def tokenize_and_group(examples: dict) -> dict:
        """Concatenate texts and cut them into blocks; the rest that fills no block is dropped."""
        texts = [text for text in examples[data_args.text_column_name] if text]
        tokens, size = list(chain(*tokenizer(texts).input_ids)), data_args.max_seq_length
        return {"input_ids": [tokens[start : start + size] for start in range(0, len(tokens) - size + 1, size)]}

    def mask(examples: dict) -> dict:
        return dict(masker([{"input_ids": ids} for ids in examples["input_ids"]], return_tensors="np"))

    options = {"batched": True, "num_proc": data_args.preprocessing_num_workers}
    with training_args.main_process_first(desc="tokenizing"):
        columns = raw_datasets["train"].column_names
        blocks = raw_datasets.map(tokenize_and_group, remove_columns=columns, desc="Tokenizing", **options)
        eval_dataset = blocks["validation"].map(mask, batched=True, desc="Masking")

    def collate(examples: list[dict]) -> dict:
        return default_data_collator(examples) if "labels" in examples[0] else masker(examples)

    trainer = DistillationTrainer(
        model=model,
        args=training_args,
        train_dataset=blocks["train"] if training_args.do_train else None,
        eval_dataset=eval_dataset if training_args.do_eval else None,
        processing_class=tokenizer,
        data_collator=collate,
    )
    logger.info("%s", trainer.accelerator.state)  # rank, world size, device, sharding

    if training_args.do_train:
        result = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
        trainer.save_model()
        trainer.log_metrics("train", result.metrics)
        trainer.save_metrics("train", result.metrics)
        trainer.save_state()
    if training_args.do_eval:
        metrics = trainer.evaluate()  # includes perplexity and agreement with the teacher
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
