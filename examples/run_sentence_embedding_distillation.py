"""Distill an embedding model on plain texts, of a dataset of the Hub, or of text, CSV or JSON files; no labels are needed.

    python examples/run_sentence_embedding_distillation.py \
        --teacher sentence-transformers/all-MiniLM-L6-v2 \
        --student_init_kwargs '{"method": "calibrated", "hidden_size": 192, "num_hidden_layers": 3}' \
        --dataset_name sentence-transformers/stsb --text_column_names sentence1 sentence2 --score_column_name score \
        --do_train --do_eval --output_dir student

The student has the pooling, dense layers, normalization and prompts of the teacher; SentenceTransformer("student") loads it.
Evaluation correlates its similarities with the teacher's, and with the gold scores of pairs where there are any.
"""

import gc
import logging
import sys
from dataclasses import dataclass, field

import datasets
import transformers
from accelerate import PartialState
from transformers import AutoModel, AutoTokenizer, HfArgumentParser, set_seed

from hf_guide import DistillationArguments, DistillationTrainer, SentenceCollator

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
    text_column_names: list[str] | None = field(
        default=None,
        metadata={"help": "Columns with texts, each a text of its own; by default every column of texts."},
    )
    score_column_name: str = field(
        default="score", metadata={"help": "Column with the gold similarity of the first two texts, for evaluation."}
    )
    prompt: str | None = field(default=None, metadata={"help": "What every text begins with, such as 'query: '."})
    max_seq_length: int = field(default=128, metadata={"help": "Tokens per text."})

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
        kind = {"jsonl": "json", "txt": "text"}.get(ending, ending)
        raw = datasets.load_dataset(kind, data_files={name: file for name, file in files.items() if file})
    if "validation" not in raw:
        parts = raw["train"].train_test_split(test_size=args.validation_split_percentage / 100, seed=0)
        raw = datasets.DatasetDict(train=parts["train"], validation=parts["test"])
    return raw


def main() -> None:
    """Train, evaluate and save, with the arguments of the command line or of one YAML or JSON file."""
    parser = HfArgumentParser((ModelArguments, DataTrainingArguments, DistillationArguments))
    parser.set_defaults(losses={"features": 1.0})  # there are no labels for "ce"
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
        model = AutoModel.from_pretrained(
            model_args.model_name_or_path, revision=model_args.model_revision, dtype=model_args.dtype
        )

    example = raw_datasets["train"][0]
    columns = data_args.text_column_names or [name for name, value in example.items() if isinstance(value, str)]
    trainer = DistillationTrainer(
        model=model,
        args=training_args,
        train_dataset=raw_datasets["train"] if training_args.do_train else None,
        eval_dataset=raw_datasets["validation"] if training_args.do_eval else None,
        processing_class=tokenizer,
        data_collator=SentenceCollator(
            tokenizer,
            columns,
            prompts=dict.fromkeys(columns, data_args.prompt) if data_args.prompt else None,
            max_length=data_args.max_seq_length,
            score_column=data_args.score_column_name,
        ),
    )
    logger.info("%s", trainer.accelerator.state)  # rank, world size, device, sharding

    if training_args.do_train:
        result = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
        trainer.save_model()
        trainer.log_metrics("train", result.metrics)
        trainer.save_metrics("train", result.metrics)
        trainer.save_state()
    if training_args.do_eval:
        metrics = trainer.evaluate()  # includes the correlation of the similarities with the teacher's
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
