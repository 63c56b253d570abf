"""Distill a translation model on a dataset of the Hub or on JSON files, each example a `translation` with its languages.

    python examples/run_translation_distillation.py \
        --teacher Helsinki-NLP/opus-mt-tc-big-en-ro --model_name_or_path Helsinki-NLP/opus-mt-en-ro \
        --dataset_name wmt/wmt16 --dataset_config_name ro-en --source_lang en --target_lang ro \
        --do_train --do_eval --predict_with_generate --losses '{"ce": 0.5, "kd": 0.5}' --output_dir student

The logits over the vocabulary at each token of the translation are distilled, so student and teacher share a tokenizer. With
`--predict_with_generate` the evaluation also translates and compares characters.
"""

import gc
import logging
import sys
from dataclasses import dataclass, field

import datasets
import numpy as np
import transformers
from accelerate import PartialState
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    EvalPrediction,
    HfArgumentParser,
    set_seed,
)

from hf_guide import Seq2SeqDistillationArguments, Seq2SeqDistillationTrainer
from hf_guide.scripts.text_scores import chrf

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
    train_file: str | None = field(default=None, metadata={"help": "Training file: JSON lines."})
    validation_file: str | None = field(default=None, metadata={"help": "Evaluation file of the same kind."})
    validation_split_percentage: int = field(
        default=5, metadata={"help": "Percentage of the training split to hold out if there is no validation split."}
    )
    source_lang: str = field(default="en", metadata={"help": "Key of the source text, and the tokenizer's language."})
    target_lang: str = field(default="de", metadata={"help": "Key of its translation, and the tokenizer's language."})
    forced_bos_token: str | None = field(
        default=None, metadata={"help": "Token with which a multilingual model begins a text in the target language."}
    )
    source_prefix: str = field(default="", metadata={"help": "Text before each source, as T5 expects it."})
    max_source_length: int = field(default=128, metadata={"help": "Tokens of a source text."})
    max_target_length: int = field(default=128, metadata={"help": "Tokens of a translation."})
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
        raw = datasets.load_dataset("json", data_files={name: file for name, file in files.items() if file})
    if "validation" not in raw:
        parts = raw["train"].train_test_split(test_size=args.validation_split_percentage / 100, seed=0)
        raw = datasets.DatasetDict(train=parts["train"], validation=parts["test"])
    return raw


def main() -> None:
    """Train, evaluate and save, with the arguments of the command line or of one YAML or JSON file."""
    parser = HfArgumentParser((ModelArguments, DataTrainingArguments, Seq2SeqDistillationArguments))
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
    if hasattr(tokenizer, "src_lang"):  # a multilingual one marks the languages
        tokenizer.src_lang, tokenizer.tgt_lang = data_args.source_lang, data_args.target_lang
    model = None  # the trainer makes it from the teacher, with `student_init_kwargs`
    if model_args.model_name_or_path:
        model = AutoModelForSeq2SeqLM.from_pretrained(
            model_args.model_name_or_path, revision=model_args.model_revision, dtype=model_args.dtype
        )

    def tokenize(examples: dict) -> dict:
        source = [data_args.source_prefix + each[data_args.source_lang] for each in examples["translation"]]
        target = [each[data_args.target_lang] for each in examples["translation"]]
        tokenized = tokenizer(source, truncation=True, max_length=data_args.max_source_length)
        labels = tokenizer(text_target=target, truncation=True, max_length=data_args.max_target_length)
        return dict(tokenized) | {"labels": labels["input_ids"]}

    with training_args.main_process_first(desc="tokenizing"):
        tokenized = raw_datasets.map(
            tokenize,
            batched=True,
            num_proc=data_args.preprocessing_num_workers,
            remove_columns=raw_datasets["train"].column_names,
            desc="Tokenizing",
        )

    def decode(ids: np.ndarray) -> list[str]:
        return tokenizer.batch_decode(np.where(ids == -100, tokenizer.pad_token_id, ids), skip_special_tokens=True)

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        """Return chrF of the translations, in percent, and their mean number of tokens."""
        kept = (prediction.predictions != -100) & (prediction.predictions != tokenizer.pad_token_id)
        return {
            "chrf": 100 * chrf(decode(prediction.predictions), decode(prediction.label_ids)),
            "gen_len": float(kept.sum(axis=-1).mean()),
        }

    training_args.generation_max_length = training_args.generation_max_length or data_args.max_target_length
    data_collator = DataCollatorForSeq2Seq(tokenizer)
    trainer = Seq2SeqDistillationTrainer(
        model=model,
        args=training_args,
        train_dataset=tokenized["train"] if training_args.do_train else None,
        eval_dataset=tokenized["validation"] if training_args.do_eval else None,
        processing_class=tokenizer,
        data_collator=data_collator,
        compute_metrics=compute_metrics if training_args.predict_with_generate else None,
    )
    data_collator.model = trainer.model  # it makes the decoder's inputs, which label smoothing needs
    if data_args.forced_bos_token is not None:
        first = tokenizer.convert_tokens_to_ids(data_args.forced_bos_token)
        trainer.model.generation_config.forced_bos_token_id = first
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
