"""Distill a speech recognizer, Whisper or one with CTC (wav2vec 2.0, HuBERT), on a dataset of the Hub or on files.

    python examples/run_speech_recognition_distillation.py \
        --teacher openai/whisper-small --student_init_kwargs '{"decoder_layers": 2}' \
        --dataset_name google/fleurs --dataset_config_name de_de --text_column_name transcription \
        --language german --task transcribe --predict_with_generate \
        --do_train --do_eval --losses '{"ce": 0.5, "kd": 0.5}' --output_dir student

    python examples/run_speech_recognition_distillation.py \
        --teacher facebook/wav2vec2-base-960h --student_init_kwargs '{"num_hidden_layers": 6}' \
        --train_file recordings.jsonl --do_train --do_eval --losses '{"ce": 0.5, "kd": 0.5}' --output_dir student

A file has one row per recording: its path and its text. To train on the teacher's own transcripts, as Distil-Whisper does,
write them first with `hf-guide label`, and pass its folder as `--dataset_name`.
"""

import gc
import logging
import sys
from dataclasses import dataclass, field
from typing import Any

import datasets
import evaluate
import numpy as np
import torch
import transformers
from accelerate import PartialState
from transformers import (
    AutoConfig,
    AutoModelForCTC,
    AutoModelForSpeechSeq2Seq,
    AutoProcessor,
    EvalPrediction,
    HfArgumentParser,
    set_seed,
)

from hf_guide import DistillationTrainer, Seq2SeqDistillationArguments, Seq2SeqDistillationTrainer, metrics
from hf_guide.data.sounds import decode_sound

logger = logging.getLogger(__name__)


@dataclass
class ModelArguments:
    """Arguments for a student that is not made from its teacher, and for the processor."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "Student: a Hub id or a folder."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the student."})
    processor_name: str | None = field(
        default=None,
        metadata={"help": "Tokenizer and feature extractor; by default the student's, else the teacher's."},
    )
    freeze_feature_encoder: bool = field(
        default=True, metadata={"help": "Do not train the convolutions that read the waveform (CTC)."}
    )
    freeze_encoder: bool = field(default=False, metadata={"help": "Do not train the encoder (Whisper)."})


@dataclass
class DataTrainingArguments:
    """Arguments for the training and evaluation data."""

    dataset_name: str | None = field(default=None, metadata={"help": "Name of a dataset on the Hub, or a folder."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    train_file: str | None = field(default=None, metadata={"help": "Training data: a CSV or JSON lines file."})
    validation_file: str | None = field(default=None, metadata={"help": "Evaluation data: a CSV or JSON lines file."})
    train_val_split: float = field(
        default=0.1, metadata={"help": "Share of the training split to hold out if there is no validation split."}
    )
    audio_column_name: str = field(default="audio", metadata={"help": "Column with the sounds or their paths."})
    text_column_name: str = field(default="text", metadata={"help": "Column with the transcripts."})
    max_duration_in_seconds: float = field(default=20.0, metadata={"help": "Longer sounds are left out."})
    min_duration_in_seconds: float = field(default=0.0, metadata={"help": "Shorter sounds are left out."})
    do_lower_case: bool = field(default=False, metadata={"help": "Write the transcripts in lower case."})
    language: str | None = field(
        default=None, metadata={"help": "Language of the transcripts (multilingual Whisper)."}
    )
    task: str | None = field(default=None, metadata={"help": "transcribe or translate (multilingual Whisper)."})
    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "Processes that extract features."})

    def __post_init__(self) -> None:
        if self.dataset_name is None and self.train_file is None:
            raise ValueError("Give either dataset_name or train_file.")


@dataclass
class SpeechCollator:
    """Pads sounds with the feature extractor, and transcripts with -100.

    Attributes:
        processor: A tokenizer with a feature extractor.
        start_token: What the decoder prepends itself: it is cut from the transcripts.
    """

    processor: Any
    start_token: int | None

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Return a batch."""
        features = [{name: each[name] for name in each if name != "labels"} for each in examples]
        batch = dict(self.processor.feature_extractor.pad(features, return_tensors="pt"))
        labels = [torch.tensor(each["labels"]) for each in examples]
        if self.start_token is not None and all(each[0] == self.start_token for each in labels):
            labels = [each[1:] for each in labels]
        batch["labels"] = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
        return batch


def load_raw_datasets(args: DataTrainingArguments) -> datasets.DatasetDict:
    """Load a dataset with the splits train and validation, its sounds not decoded yet."""
    if args.dataset_name is not None:
        raw = datasets.load_dataset(args.dataset_name, args.dataset_config_name)
    else:
        files = {"train": args.train_file, "validation": args.validation_file}
        builder = "csv" if str(args.train_file).endswith(".csv") else "json"
        raw = datasets.load_dataset(builder, data_files={name: file for name, file in files.items() if file})
    if "validation" not in raw:
        parts = raw["train"].train_test_split(test_size=args.train_val_split, seed=0)
        raw = datasets.DatasetDict(train=parts["train"], validation=parts["test"])
    for column in (args.audio_column_name, args.text_column_name):
        if column not in raw["train"].column_names:
            raise ValueError(f"There is no column {column!r}; the dataset has {raw['train'].column_names}.")
    if isinstance(raw["train"].features[args.audio_column_name], datasets.Audio):
        raw = raw.cast_column(args.audio_column_name, datasets.Audio(decode=False))
    return raw


def prepare(
    raw: datasets.DatasetDict, processor: Any, args: DataTrainingArguments, training: Any
) -> datasets.DatasetDict:
    """Return features and labels of sounds of the allowed durations."""
    rate = processor.feature_extractor.sampling_rate
    name = args.dataset_name or str(args.train_file)

    def to_inputs(row: dict[str, Any], index: int) -> dict[str, Any]:
        column = args.audio_column_name
        sound = decode_sound(row[column], rate, row=index, column=column, dataset=name)
        inputs = processor.feature_extractor(sound, sampling_rate=rate)
        text = row[args.text_column_name].lower() if args.do_lower_case else row[args.text_column_name]
        made = {key: values[0] for key, values in inputs.items()}
        return made | {"labels": processor.tokenizer(text).input_ids, "seconds": len(sound) / rate}

    with training.main_process_first(desc="extracting features"):
        prepared = raw.map(
            to_inputs,
            with_indices=True,
            remove_columns=raw["train"].column_names,
            num_proc=args.preprocessing_num_workers,
            desc="extracting features",
        )
        shortest, longest = args.min_duration_in_seconds, args.max_duration_in_seconds
        return prepared.filter(lambda seconds: shortest <= seconds <= longest, input_columns="seconds")


def error_rates(processor: Any, is_ctc: bool) -> Any:
    """Return a `compute_metrics` of the word and the character error rate."""
    metric = evaluate.load(metrics.path("word_error_rate"))
    tokenizer = processor.tokenizer
    ungrouped = {"group_tokens": False} if is_ctc else {}

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        tokens, labels = (
            np.where(each == -100, tokenizer.pad_token_id, each)
            for each in (prediction.predictions, prediction.label_ids)
        )
        predicted = tokenizer.batch_decode(tokens, skip_special_tokens=True)
        true = tokenizer.batch_decode(labels, skip_special_tokens=True, **ungrouped)
        rates = metric.compute(predictions=predicted, references=true)
        return {name: rates[name] for name in ("wer", "cer")}

    return compute_metrics


def most_probable(logits: Any, labels: torch.Tensor) -> torch.Tensor:
    """Return the most probable token of each frame, which is all that is gathered."""
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)


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

    source = model_args.model_name_or_path or training_args.teacher
    config = AutoConfig.from_pretrained(source)
    is_ctc = not config.is_encoder_decoder
    processor = AutoProcessor.from_pretrained(model_args.processor_name or source)
    if data_args.language is not None or data_args.task is not None:
        processor.tokenizer.set_prefix_tokens(language=data_args.language, task=data_args.task)
    prepared = prepare(load_raw_datasets(data_args), processor, data_args, training_args)
    model = None  # the trainer makes it from the teacher, with `student_init_kwargs`
    if model_args.model_name_or_path:
        loader = AutoModelForCTC if is_ctc else AutoModelForSpeechSeq2Seq
        model = loader.from_pretrained(model_args.model_name_or_path, revision=model_args.model_revision)

    trainer_class = DistillationTrainer if is_ctc else Seq2SeqDistillationTrainer
    has_texts = is_ctc or training_args.predict_with_generate
    trainer = trainer_class(
        model=model,
        args=training_args,
        train_dataset=prepared["train"] if training_args.do_train else None,
        eval_dataset=prepared["validation"] if training_args.do_eval else None,
        processing_class=processor,
        data_collator=SpeechCollator(processor, None if is_ctc else config.decoder_start_token_id),
        compute_metrics=error_rates(processor, is_ctc) if has_texts else None,
        preprocess_logits_for_metrics=most_probable if is_ctc else None,
    )
    if is_ctc and model_args.freeze_feature_encoder:
        trainer.model.freeze_feature_encoder()
    if not is_ctc:
        if model_args.freeze_encoder:
            trainer.model.freeze_encoder()
        for name, value in (("language", data_args.language), ("task", data_args.task)):
            if value is not None:
                setattr(trainer.model.generation_config, name, value)
    logger.info("%s", trainer.accelerator.state)  # rank, world size, device, sharding

    if training_args.do_train:
        result = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
        trainer.save_model()
        trainer.log_metrics("train", result.metrics)
        trainer.save_metrics("train", result.metrics)
        trainer.save_state()
    if training_args.do_eval:
        measured = trainer.evaluate()  # word error rate, and agreement with the teacher
        trainer.log_metrics("eval", measured)
        trainer.save_metrics("eval", measured)

    card = {"dataset_tags": data_args.dataset_name} if data_args.dataset_name else {}
    if training_args.push_to_hub:
        trainer.push_to_hub(**card)
    else:
        trainer.create_model_card(**card)


if __name__ == "__main__":
    main()
    gc.collect()  # destroying the process group while a wrapped model exists can hang
    PartialState().destroy_process_group()
