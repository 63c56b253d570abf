"""Distill a vision-language model (LLaVA, Qwen2.5-VL, SmolVLM, Gemma 3, ...) on conversations about images.

    python examples/run_image_text_to_text_distillation.py \
        --teacher HuggingFaceTB/SmolVLM-500M-Instruct \
        --student_init_kwargs '{"text_config": {"num_hidden_layers": 16}}' \
        --dataset_name trl-lib/llava-instruct-mix --messages_column_name messages --images_column_name images \
        --do_train --do_eval --losses '{"ce": 0.5, "kd": 0.5}' --output_dir student

A row has messages, whose contents are texts or lists of parts (`{"type": "image"}`, `{"type": "text", "text": ...}`), and
the images of these parts in their order. `train_file` is a JSON-lines file of such rows whose images are paths, relative to
the file. The processor's chat template makes a text of the messages; targets are the assistant's turns alone, never the
tokens of an image. Teacher and student read the same tokens and pixels, so the student takes its teacher's processor.
"""

import gc
import logging
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import transformers
from accelerate import PartialState
from transformers import AutoModelForImageTextToText, AutoProcessor, HfArgumentParser, set_seed

from hf_guide import DistillationArguments, DistillationTrainer
from hf_guide.data.image_text import ImageTextCollator

logger = logging.getLogger(__name__)


@dataclass
class ModelArguments:
    """Arguments for a student that is not made from its teacher, and for the processor."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "Student: a Hub id or a folder."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the student."})
    processor_name: str | None = field(
        default=None, metadata={"help": "Processor; by default the student's, else the teacher's."}
    )
    dtype: str = field(default="float32", metadata={"help": "Precision in which the student's weights are trained."})


@dataclass
class DataTrainingArguments:
    """Arguments for the training and evaluation data."""

    dataset_name: str | None = field(default=None, metadata={"help": "Name of a dataset on the Hub."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    train_file: str | None = field(default=None, metadata={"help": "JSON-lines file of training rows."})
    validation_file: str | None = field(default=None, metadata={"help": "JSON-lines file of evaluation rows."})
    validation_split_percentage: int = field(
        default=5,
        metadata={"help": "Share of the training split to hold out if there is no validation split, in percent."},
    )
    messages_column_name: str = field(default="messages", metadata={"help": "Column with the messages."})
    images_column_name: str = field(default="images", metadata={"help": "Column with the images of a row."})
    assistant_only_loss: bool = field(
        default=True, metadata={"help": "Whether only the assistant's turns are targets, instead of all texts."}
    )

    def __post_init__(self) -> None:
        if self.dataset_name is None and self.train_file is None:
            raise ValueError("Give either dataset_name or train_file.")


def load_raw_datasets(args: DataTrainingArguments) -> datasets.DatasetDict:
    """Load a dataset with the splits train and validation, and the columns messages and images."""
    if args.dataset_name is not None:
        raw = datasets.load_dataset(args.dataset_name, args.dataset_config_name)
    else:
        files = {"train": args.train_file, "validation": args.validation_file}
        raw = datasets.DatasetDict({name: load_file(file, args) for name, file in files.items() if file})
    raw = raw.select_columns([args.messages_column_name, args.images_column_name])
    raw = raw.rename_columns(
        {
            old: new
            for old, new in ((args.messages_column_name, "messages"), (args.images_column_name, "images"))
            if old != new
        }
    )
    if "validation" not in raw:
        parts = raw["train"].train_test_split(test_size=args.validation_split_percentage / 100, seed=0)
        raw = datasets.DatasetDict(train=parts["train"], validation=parts["test"])
    return raw


def load_file(file: str, args: DataTrainingArguments) -> datasets.Dataset:
    """Load a JSON-lines file; its images are paths relative to it."""
    column, folder = args.images_column_name, Path(file).parent
    split = datasets.load_dataset("json", data_files=file, split="train")
    split = split.map(lambda row: {column: [os.fspath(folder / name) for name in row[column] or []]})
    return split.cast_column(column, datasets.List(datasets.Image()))


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
    processor = AutoProcessor.from_pretrained(
        model_args.processor_name or model_args.model_name_or_path or training_args.teacher
    )
    model = None  # the trainer makes it from the teacher, with `student_init_kwargs`
    if model_args.model_name_or_path:
        model = AutoModelForImageTextToText.from_pretrained(
            model_args.model_name_or_path, revision=model_args.model_revision, dtype=model_args.dtype
        )
    trainer = DistillationTrainer(
        model=model,
        args=training_args,
        train_dataset=raw_datasets["train"] if training_args.do_train else None,
        eval_dataset=raw_datasets["validation"] if training_args.do_eval else None,
        processing_class=processor,
        data_collator=ImageTextCollator(processor, assistant_only_loss=data_args.assistant_only_loss),
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
