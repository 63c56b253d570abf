"""Distil a masked language model (BERT, RoBERTa, ModernBERT, ...) on a text dataset or text files.

    python examples/run_mlm_distillation.py \
        --teacher answerdotai/ModernBERT-base \
        --student_init_kwargs '{"num_hidden_layers": 10, "method": "uniform"}' \
        --dataset_name Salesforce/wikitext --dataset_config_name wikitext-103-raw-v1 \
        --do_train --do_eval --losses '{"ce": 0.3, "kd": 0.7}' --temperature 2 --output_dir student

Other tokens are masked in every epoch; those of the evaluation are masked once, so that its figures can be compared.
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
    """The student, where it is not made out of its teacher, and its tokenizer."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "The student: a Hub id or a folder."})
    model_revision: str = field(default="main", metadata={"help": "Its branch, tag or commit."})
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "The tokenizer; by default the student's, else the teacher's."}
    )
    dtype: str = field(default="float32", metadata={"help": "The precision its weights are trained in."})


@dataclass
class DataTrainingArguments:
    """What is learned from."""

    dataset_name: str | None = field(default=None, metadata={"help": "A dataset on the Hub."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Which of its configurations."})
    train_file: str | None = field(default=None, metadata={"help": "A text, CSV or JSON file to train on."})
    validation_file: str | None = field(default=None, metadata={"help": "A file of the same kind to evaluate on."})
    validation_split_percentage: int = field(
        default=5, metadata={"help": "What is held out of the training split where there is no other validation."}
    )
    text_column: str = field(default="text", metadata={"help": "The column with the text."})
    max_seq_length: int = field(default=512, metadata={"help": "Tokens an example."})
    mlm_probability: float = field(default=0.15, metadata={"help": "The share of tokens that is masked."})
    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "Processes that tokenise."})

    def __post_init__(self) -> None:
        if self.dataset_name is None and self.train_file is None:
            raise ValueError("Need either a dataset name or a training file.")


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
    """Train, evaluate and save as the command line, or one YAML or JSON file, says."""
    parser = HfArgumentParser((ModelArguments, DataTrainingArguments, DistillationArguments))
    if len(sys.argv) == 2 and sys.argv[1].endswith((".yaml", ".json")):
        read = parser.parse_json_file if sys.argv[1].endswith(".json") else parser.parse_yaml_file
        model_args, data_args, training_args = read(sys.argv[1])
    else:
        model_args, data_args, training_args = parser.parse_args_into_dataclasses()

    logging.basicConfig(level=training_args.get_process_log_level(), handlers=[logging.StreamHandler(sys.stdout)])
    transformers.utils.logging.set_verbosity(training_args.get_process_log_level())
    set_seed(training_args.seed)

    raw_datasets = load_raw_datasets(data_args)
    tokenizer = AutoTokenizer.from_pretrained(
        model_args.tokenizer_name or model_args.model_name_or_path or training_args.teacher
    )
    model = None  # then the trainer makes it out of the teacher, as `student_init_kwargs` specifies
    if model_args.model_name_or_path:
        model = AutoModelForMaskedLM.from_pretrained(
            model_args.model_name_or_path, revision=model_args.model_revision, dtype=model_args.dtype
        )
    masker = DataCollatorForLanguageModeling(tokenizer, mlm_probability=data_args.mlm_probability)

    def tokenize_and_group(examples: dict) -> dict:
        """Lay texts end to end and cut them into blocks; what fills no block is left out."""
        texts = [text for text in examples[data_args.text_column] if text]
        tokens, size = list(chain(*tokenizer(texts).input_ids)), data_args.max_seq_length
        return {"input_ids": [tokens[start : start + size] for start in range(0, len(tokens) - size + 1, size)]}

    def mask(examples: dict) -> dict:
        return dict(masker([{"input_ids": ids} for ids in examples["input_ids"]], return_tensors="np"))

    options = {"batched": True, "num_proc": data_args.preprocessing_num_workers}
    with training_args.main_process_first(desc="tokenising"):
        columns = raw_datasets["train"].column_names
        blocks = raw_datasets.map(tokenize_and_group, remove_columns=columns, desc="Tokenising", **options)
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
    logger.info("%s", trainer.accelerator.state)  # which process of how many, on what, sharded or not

    if training_args.do_train:
        result = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
        trainer.save_model()
        trainer.log_metrics("train", result.metrics)
        trainer.save_metrics("train", result.metrics)
        trainer.save_state()
    if training_args.do_eval:
        metrics = trainer.evaluate()  # perplexity and agreement with the teacher are among them
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)

    told = {"dataset_tags": data_args.dataset_name} if data_args.dataset_name else {}
    if training_args.push_to_hub:
        trainer.push_to_hub(**told)
    else:
        trainer.create_model_card(**told)


if __name__ == "__main__":
    main()
    gc.collect()  # a process that leaves its group while a wrapped model is still there can hang
    PartialState().destroy_process_group()
