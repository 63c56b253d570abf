"""Distill a semantic segmentation model (SegFormer, BEiT, DPT, UPerNet, ...) on a dataset of the Hub, or on two folders.

    python examples/run_semantic_segmentation_distillation.py \
        --teacher nvidia/segformer-b2-finetuned-ade-512-512 \
        --student_init_kwargs '{"hidden_sizes": [32, 64, 160, 256], "decoder_hidden_size": 256, "method": "calibrated"}' \
        --dataset_name segments/sidewalk-semantic --image_column_name pixel_values --label_column_name label \
        --do_train --do_eval --losses '{"ce": 0.5, "kd": 0.5}' --temperature 2 --output_dir student

`train_dir` is a folder with `images/` and `annotations/`: for each image a map of class numbers (PNG) of the same name. Images
and maps are resized and normalized by the teacher's processor, in the workers of the dataloader. What is distilled are the
distributions over the classes at every fourth pixel in both directions, where the map has a class.
"""

import gc
import json
import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import numpy as np
import torch
import transformers
from accelerate import PartialState
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForSemanticSegmentation,
    EvalPrediction,
    HfArgumentParser,
    set_seed,
)

from hf_guide import DistillationArguments, DistillationTrainer

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")


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
        default=None, metadata={"help": "Folder of training data, with the folders images/ and annotations/."}
    )
    validation_dir: str | None = field(default=None, metadata={"help": "Folder of evaluation data."})
    train_val_split: float = field(
        default=0.15, metadata={"help": "Share of the training split to hold out if there is no validation split."}
    )
    id2label_file: str | None = field(
        default=None,
        metadata={"help": "JSON file with the name of each class number; by default the teacher's names."},
    )
    image_column_name: str = field(default="image", metadata={"help": "Column with the images."})
    label_column_name: str = field(default="label", metadata={"help": "Column with the maps of classes."})
    do_reduce_labels: bool = field(
        default=False, metadata={"help": "Whether 0 in a map is background, which is ignored, and class 0 is 1 there."}
    )

    def __post_init__(self) -> None:
        if self.dataset_name is None and self.train_dir is None:
            raise ValueError("Give either dataset_name or train_dir.")


def load_folder(folder: str, args: DataTrainingArguments) -> datasets.Dataset:
    """Load the images and maps of a folder.

    Raises:
        ValueError: An image without a map, or no image at all.
    """
    images = sorted(path for path in Path(folder, "images").glob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    maps = [Path(folder, "annotations", f"{path.stem}.png") for path in images]
    missing = [path for path in maps if not path.is_file()]
    if missing or not images:
        what = f"no map {missing[0].name} in annotations/" if missing else "no images in images/"
        raise ValueError(f"{folder} has {what}: it must have images/NAME.jpg and annotations/NAME.png.")
    columns = {args.image_column_name: [*map(str, images)], args.label_column_name: [*map(str, maps)]}
    features = datasets.Features({name: datasets.Image() for name in columns})
    return datasets.Dataset.from_dict(columns, features=features)


def load_raw_datasets(args: DataTrainingArguments) -> datasets.DatasetDict:
    """Load a dataset with the splits train and validation."""
    if args.dataset_name is not None:
        raw = datasets.load_dataset(args.dataset_name, args.dataset_config_name)
    else:
        folders = {"train": args.train_dir, "validation": args.validation_dir}
        raw = datasets.DatasetDict({name: load_folder(folder, args) for name, folder in folders.items() if folder})
    if "validation" not in raw:
        parts = raw["train"].train_test_split(test_size=args.train_val_split, seed=0)
        raw = datasets.DatasetDict(train=parts["train"], validation=parts["test"])
    return raw


def predicted_classes(outputs: Tensor | tuple, labels: Tensor) -> Tensor:
    """Return the class of each pixel of the maps, so that an evaluation need not hold the logits."""
    logits = outputs[0] if isinstance(outputs, tuple) else outputs
    resized = torch.nn.functional.interpolate(logits, size=labels.shape[-2:], mode="bilinear", align_corners=False)
    return resized.argmax(1)


class SegmentationMetrics:
    """Compute the mean intersection over union, the mean accuracy of the classes and that of the pixels.

    Args:
        num_labels: The number of classes; those that neither the maps nor the predictions have do not count.
        ignore_index: The number of pixels that do not count.
    """

    def __init__(self, num_labels: int, ignore_index: int):
        self.num_labels, self.ignore_index = num_labels, ignore_index

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        """Return the metrics of all predictions."""
        labels, predicted = (np.asarray(each) for each in (prediction.label_ids, prediction.predictions))
        counted = labels != self.ignore_index
        pairs = self.num_labels * labels[counted].astype(np.int64) + predicted[counted]
        confusion = np.bincount(pairs, minlength=self.num_labels**2).reshape(self.num_labels, self.num_labels)
        correct, of_class, of_prediction = np.diag(confusion), confusion.sum(1), confusion.sum(0)
        union = of_class + of_prediction - correct
        return {
            "mean_iou": float(np.mean(correct[union > 0] / union[union > 0])),
            "mean_accuracy": float(np.mean(correct[of_class > 0] / of_class[of_class > 0])),
            "overall_accuracy": float(correct.sum() / max(1, of_class.sum())),
        }


def collate(examples: list[dict]) -> dict[str, Tensor]:
    """Stack the images and the maps."""
    return {name: torch.stack([example[name] for example in examples]) for name in ("pixel_values", "labels")}


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
        model_args.image_processor_name or model_args.model_name_or_path or training_args.teacher,
        do_reduce_labels=data_args.do_reduce_labels,
    )
    config = AutoConfig.from_pretrained(training_args.teacher or model_args.model_name_or_path)
    id2label = config.id2label
    if data_args.id2label_file:
        named = json.loads(Path(data_args.id2label_file).read_text(encoding="utf-8"))
        id2label = {int(number): name for number, name in named.items()}
    model = None  # the trainer makes it from the teacher, with `student_init_kwargs`
    if model_args.model_name_or_path:
        model = AutoModelForSemanticSegmentation.from_pretrained(
            model_args.model_name_or_path,
            revision=model_args.model_revision,
            dtype=model_args.dtype,
            ignore_mismatched_sizes=model_args.ignore_mismatched_sizes,
            id2label=id2label,
            label2id={name: number for number, name in id2label.items()},
        )

    def transform(examples: dict) -> dict:
        images = [image.convert("RGB") for image in examples[data_args.image_column_name]]
        maps = [image.convert("L") for image in examples[data_args.label_column_name]]
        encoded = image_processor(images, segmentation_maps=maps, return_tensors="pt")
        return {"pixel_values": list(encoded["pixel_values"]), "labels": list(encoded["labels"])}

    transformed = raw_datasets.with_transform(transform)
    ignore_index = getattr(config, "semantic_loss_ignore_index", None)
    trainer = DistillationTrainer(
        model=model,
        args=training_args,
        train_dataset=transformed["train"] if training_args.do_train else None,
        eval_dataset=transformed["validation"] if training_args.do_eval else None,
        processing_class=image_processor,
        data_collator=collate,
        compute_metrics=SegmentationMetrics(len(id2label), 255 if ignore_index is None else ignore_index),
        preprocess_logits_for_metrics=predicted_classes,
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
