"""Distill an image classifier (ViT, DINOv2, ...) on a dataset of the Hub, or on a folder of images, one folder a class.

    python examples/run_image_classification_distillation.py \
        --teacher nateraw/vit-base-beans --student_init_kwargs '{"num_hidden_layers": 6}' \
        --dataset_name AI-Lab-Makerere/beans --image_column_name image --label_column_name labels \
        --do_train --do_eval --losses '{"ce": 0.3, "kd": 0.7}' --temperature 2 --output_dir student

Named labels are mapped to the teacher's order. Images are resized and normalized by the teacher's processor, in the workers of
the dataloader.
"""

import gc
import logging
import sys
from dataclasses import dataclass, field

import datasets
import numpy as np
import torch
import transformers
from accelerate import PartialState
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    EvalPrediction,
    HfArgumentParser,
    set_seed,
)

from hf_guide import DistillationArguments, DistillationTrainer

logger = logging.getLogger(__name__)


@dataclass
class ModelArguments:
    """Arguments for a student that is not made from its teacher, and for the image processor."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "Student: a Hub id or a folder."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the student."})
    image_processor_name: str | None = field(
        default=None, metadata={"help": "Image processor; by default the student's, else the teacher's."}
    )
    dtype: str = field(default="float32", metadata={"help": "Precision in which the student's weights are trained."})
    ignore_mismatched_sizes: bool = field(
        default=False, metadata={"help": "Replace the head of a student that was trained for other classes."}
    )


@dataclass
class DataTrainingArguments:
    """Arguments for the training and evaluation data."""

    dataset_name: str | None = field(default=None, metadata={"help": "Name of a dataset on the Hub."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    train_dir: str | None = field(
        default=None, metadata={"help": "Folder of training images, one subfolder per class."}
    )
    validation_dir: str | None = field(default=None, metadata={"help": "Folder of evaluation images."})
    train_val_split: float = field(
        default=0.15,
        metadata={"help": "Share of the training split to hold out if there is no validation split."},
    )
    image_column_name: str = field(default="image", metadata={"help": "Column with the images."})
    label_column_name: str = field(default="label", metadata={"help": "Column with the labels."})

    def __post_init__(self) -> None:
        if self.dataset_name is None and self.train_dir is None:
            raise ValueError("Give either dataset_name or train_dir.")


def load_raw_datasets(args: DataTrainingArguments) -> datasets.DatasetDict:
    """Load a dataset with the splits train and validation."""
    if args.dataset_name is not None:
        raw = datasets.load_dataset(args.dataset_name, args.dataset_config_name)
    else:
        folders = {"train": args.train_dir, "validation": args.validation_dir}
        files = {name: f"{folder}/**" for name, folder in folders.items() if folder}
        raw = datasets.load_dataset("imagefolder", data_files=files)
    if "validation" not in raw:
        parts = raw["train"].train_test_split(test_size=args.train_val_split, seed=0)
        raw = datasets.DatasetDict(train=parts["train"], validation=parts["test"])
    return raw


def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Return the accuracy."""
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    return {"accuracy": float((np.argmax(logits, axis=-1) == prediction.label_ids).mean())}


def collate(examples: list[dict]) -> dict[str, torch.Tensor]:
    """Stack the images and the labels."""
    return {
        "pixel_values": torch.stack([example["pixel_values"] for example in examples]),
        "labels": torch.tensor([example["labels"] for example in examples]),
    }


def main() -> None:
    """Train, evaluate and save, with the arguments of the command line or of one YAML or JSON file."""
    parser = HfArgumentParser((ModelArguments, DataTrainingArguments, DistillationArguments))
    if len(sys.argv) == 2 and sys.argv[1].endswith((".yaml", ".json")):
        read = parser.parse_json_file if sys.argv[1].endswith(".json") else parser.parse_yaml_file
        model_args, data_args, training_args = read(sys.argv[1])
    else:
        model_args, data_args, training_args = parser.parse_args_into_dataclasses()
    training_args.remove_unused_columns = False  # images are converted when they are read

    if not (training_args.do_train or training_args.do_eval):
        raise ValueError("There is nothing to do: pass --do_train, --do_eval or both.")
    logging.basicConfig(level=training_args.get_process_log_level(), handlers=[logging.StreamHandler(sys.stdout)])
    transformers.utils.logging.set_verbosity(training_args.get_process_log_level())
    set_seed(training_args.seed)

    raw_datasets = load_raw_datasets(data_args)
    image_processor = AutoImageProcessor.from_pretrained(
        model_args.image_processor_name or model_args.model_name_or_path or training_args.teacher
    )
    names = raw_datasets["train"].features[data_args.label_column_name].names
    label2id = AutoConfig.from_pretrained(training_args.teacher).label2id if training_args.teacher else {}
    if set(label2id) != set(names):  # the teacher's labels are only numbered: use the dataset's names
        label2id = {name: number for number, name in enumerate(names)}
    model = None  # the trainer makes it from the teacher, with `student_init_kwargs`
    if model_args.model_name_or_path:
        model = AutoModelForImageClassification.from_pretrained(
            model_args.model_name_or_path,
            revision=model_args.model_revision,
            dtype=model_args.dtype,
            ignore_mismatched_sizes=model_args.ignore_mismatched_sizes,
            num_labels=len(names),
            label2id=label2id,
            id2label={number: name for name, number in label2id.items()},
        )

    def transform(examples: dict) -> dict:
        images = [image.convert("RGB") for image in examples[data_args.image_column_name]]
        labels = [label2id[names[number]] for number in examples[data_args.label_column_name]]
        return {"pixel_values": list(image_processor(images, return_tensors="pt")["pixel_values"]), "labels": labels}

    transformed = raw_datasets.with_transform(transform)
    trainer = DistillationTrainer(
        model=model,
        args=training_args,
        train_dataset=transformed["train"] if training_args.do_train else None,
        eval_dataset=transformed["validation"] if training_args.do_eval else None,
        processing_class=image_processor,
        data_collator=collate,
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
