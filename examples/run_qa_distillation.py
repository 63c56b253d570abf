"""Distill an extractive question answering model on a dataset in SQuAD's format: `question`, `context`, `answers`.

    python examples/run_qa_distillation.py \
        --teacher deepset/roberta-large-squad2 --model_name_or_path distilbert/distilroberta-base \
        --dataset_name rajpurkar/squad_v2 \
        --do_train --do_eval --losses '{"ce": 0.3, "kd": 0.7}' --temperature 2 --output_dir student

The logits of the start and of the end of the answer are distilled, each a distribution over the tokens. Student and teacher
read the same tokens, so they share a tokenizer. A question without an answer has the first token as its answer.
"""

import collections
import gc
import logging
import re
import string
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

import datasets
import numpy as np
import transformers
from accelerate import PartialState
from transformers import (
    AutoModelForQuestionAnswering,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    HfArgumentParser,
    set_seed,
)

from hf_guide import DistillationArguments, DistillationTrainer
from hf_guide.data.questions import no_answer_token

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
    max_seq_length: int = field(default=384, metadata={"help": "Tokens of a question and a piece of its context."})
    doc_stride: int = field(default=128, metadata={"help": "Tokens that two pieces of a long context share."})
    max_answer_length: int = field(default=30, metadata={"help": "Tokens of the longest answer that is predicted."})
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


def answer_tokens(offsets: list[list[int]], parts: list[int | None], answers: dict, none: int) -> tuple[int, int]:
    """Return the first and the last token of an answer; `none` for both if this piece of the context lacks it."""
    if not answers["text"]:
        return none, none
    first_character = answers["answer_start"][0]
    last_character = first_character + len(answers["text"][0])
    context = [token for token, part in enumerate(parts) if part == 1]
    if not context or offsets[context[0]][0] > first_character or offsets[context[-1]][1] < last_character:
        return none, none
    start = max(token for token in context if offsets[token][0] <= first_character)
    end = min(token for token in context if offsets[token][1] >= last_character)
    return start, end


def predict_answers(
    examples: datasets.Dataset, features: datasets.Dataset, logits: Sequence[np.ndarray], max_answer_length: int
) -> list[str]:
    """Return the text of the most probable answer of each example, empty for none."""
    best: dict[str, tuple[float, str]] = {}
    contexts = dict(zip(examples["id"], examples["context"], strict=True))
    for feature, start, end in zip(features, *logits, strict=True):
        inside = np.array([offset is not None for offset in feature["offset_mapping"]])
        inside = np.pad(inside, (0, len(start) - len(inside)))  # a batch is padded, and so are its logits
        none = feature["none"]
        scores = np.where(inside, start, -np.inf)[:, None] + np.where(inside, end, -np.inf)[None, :]
        scores = np.triu(scores) - np.where(np.tri(len(start), k=-1), np.inf, 0)  # the end is not before the start
        scores[np.triu_indices(len(start), k=max_answer_length)] = -np.inf
        first, last = np.unravel_index(np.argmax(scores), scores.shape)
        score, text = start[none] + end[none], ""
        if scores[first, last] > score:
            characters = feature["offset_mapping"][first][0], feature["offset_mapping"][last][1]
            score, text = scores[first, last], contexts[feature["example_id"]][slice(*characters)]
        if feature["example_id"] not in best or score > best[feature["example_id"]][0]:
            best[feature["example_id"]] = (float(score), text)
    return [best[number][1] for number in examples["id"]]


def words(text: str) -> list[str]:
    """Return the words of an answer as SQuAD compares them: lower case, without punctuation and articles."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def f1(answer: str, reference: str) -> float:
    """Return the F1 score of the words that two answers share."""
    predicted, expected = words(answer), words(reference)
    common = sum((collections.Counter(predicted) & collections.Counter(expected)).values())
    if not predicted or not expected or not common:
        return float(predicted == expected)
    return 2 * common / (len(predicted) + len(expected))


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
    tokenizer.padding_side = "right"
    model = None  # the trainer makes it from the teacher, with `student_init_kwargs`
    if model_args.model_name_or_path:
        model = AutoModelForQuestionAnswering.from_pretrained(
            model_args.model_name_or_path, revision=model_args.model_revision, dtype=model_args.dtype
        )

    def tokenize(examples: dict) -> dict:
        encoded = tokenizer(
            [question.lstrip() for question in examples["question"]],
            examples["context"],
            truncation="only_second",
            max_length=min(data_args.max_seq_length, tokenizer.model_max_length),
            stride=data_args.doc_stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        rows = encoded.pop("overflow_to_sample_mapping")
        features = dict(encoded) | {"start_positions": [], "end_positions": [], "example_id": [], "none": []}
        for number, row in enumerate(rows):
            parts, offsets = encoded.sequence_ids(number), encoded["offset_mapping"][number]
            none = no_answer_token(encoded["input_ids"][number], tokenizer)
            start, end = answer_tokens(offsets, parts, examples["answers"][row], none)
            features["start_positions"].append(start)
            features["end_positions"].append(end)
            features["example_id"].append(examples["id"][row])
            features["none"].append(none)
            features["offset_mapping"][number] = [
                offset if part == 1 else None for offset, part in zip(offsets, parts, strict=True)
            ]
        return features

    with training_args.main_process_first(desc="tokenizing"):
        tokenized = raw_datasets.map(
            tokenize,
            batched=True,
            num_proc=data_args.preprocessing_num_workers,
            remove_columns=raw_datasets["train"].column_names,
            desc="Tokenizing",
        )

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        """Return exact match and F1 of the answers, in percent."""
        examples = raw_datasets["validation"]
        answers = predict_answers(
            examples, tokenized["validation"], prediction.predictions[:2], data_args.max_answer_length
        )
        references = [each["text"] or [""] for each in examples["answers"]]
        pairs = list(zip(answers, references, strict=True))
        return {
            "exact_match": 100 * float(np.mean([any(words(a) == words(r) for r in texts) for a, texts in pairs])),
            "f1": 100 * float(np.mean([max(f1(a, r) for r in texts) for a, texts in pairs])),
        }

    trainer = DistillationTrainer(
        model=model,
        args=training_args,
        train_dataset=tokenized["train"] if training_args.do_train else None,
        eval_dataset=tokenized["validation"] if training_args.do_eval else None,
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
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
