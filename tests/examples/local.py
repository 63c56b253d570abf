"""Tiny teachers with real tokenizers, and real files to learn from: what the examples and the command take from the Hub."""

import atexit
import csv
import functools
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerFast, ViTImageProcessorPil, set_seed

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"

SUBJECTS = ["The teacher", "A student", "My neighbour", "The old captain", "Nobody", "Every child"]
GOOD, BAD = ["loves", "admires", "praises"], ["hates", "mocks", "blames"]
OBJECTS = ["the sea", "this town", "long books", "a cold morning", "the great machine", "quiet music"]
LABELS = ["bad", "good"]

# Half the width and one of two blocks, as `from_teacher` takes them.
SMALLER: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 32},
    "bert": {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 32},
    "t5": {"d_model": 16, "num_layers": 1, "num_decoder_layers": 1, "d_ff": 32},
    "vit": {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 32},
}


def sentences(count: int, seed: int = 0) -> list[tuple[str, int]]:
    """Return sentences, and whether each is a good one."""
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        good = draw.random() < 0.5
        found.append(
            (f"{draw.choice(SUBJECTS)} {draw.choice(GOOD if good else BAD)} {draw.choice(OBJECTS)}.", int(good))
        )
    return found


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer that was trained on such sentences, with every special token."""
    special = ["<pad>", "<s>", "</s>", "<unk>", "<mask>"]
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    texts = [text for text, _ in sentences(300)]
    made.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=200, special_tokens=special, show_progress=False))
    ids = [("<s>", 1), ("</s>", 2)]
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=ids
    )
    names = ["pad_token", "bos_token", "eos_token", "unk_token", "mask_token"]
    own = dict(zip(names, special, strict=True)) | {"cls_token": "<s>", "sep_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=64, **own)


def _sizes(family: str, width: int, blocks: int) -> dict[str, Any]:
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    common = {
        "num_attention_heads": 2,
        "hidden_size": width,
        "num_hidden_layers": blocks,
        "intermediate_size": 2 * width,
    }
    if family == "t5":
        sizes = {"d_model": width, "d_kv": width // 2, "d_ff": 2 * width, "num_layers": blocks, "num_heads": 2}
        return {
            "vocab_size": len(tokenizer()),
            **sizes,
            "decoder_start_token_id": 0,
            "pad_token_id": 0,
            "eos_token_id": 2,
        }
    if family == "vit":
        return common | {"image_size": 16, "patch_size": 8}
    return common | ids | {"vocab_size": len(tokenizer()), "max_position_embeddings": 64}


def make_model(
    folder: Path, family: str, kind: str, *, seed: int = 0, width: int = 32, blocks: int = 2, **changes: Any
) -> Path:
    """Save a seeded model of a family with its tokenizer or image processor, and return its folder.

    Args:
        kind: the ending of an auto class, such as "ForCausalLM".
        changes: further entries of its config.
    """
    set_seed(seed)
    config = AutoConfig.for_model(family, **(_sizes(family, width, blocks) | changes))
    auto = "AutoModelForSeq2SeqLM" if family == "t5" else f"AutoModel{kind}"
    model: PreTrainedModel = getattr(transformers, auto).from_config(config)
    for parameter in model.parameters():
        parameter.data.mul_(2.0)
    model.save_pretrained(folder)
    if family == "vit":
        ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    else:
        tokenizer().save_pretrained(folder)
    return folder


def write_text(path: Path, count: int = 120, seed: int = 0) -> Path:
    """Write a text file, one sentence a line."""
    path.write_text("\n".join(text for text, _ in sentences(count, seed)) + "\n", encoding="utf-8")
    return path


def write_labelled(path: Path, count: int = 60, seed: int = 0) -> Path:
    """Write a CSV file of sentences and the names of their classes."""
    with path.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["sentence", "label"])
        rows.writerows((text, LABELS[good]) for text, good in sentences(count, seed))
    return path


def write_pairs(path: Path, count: int = 60) -> Path:
    """Write a JSON-lines file of sentences, each with what it is about."""
    rows = ({"source": text, "target": text.split()[-1]} for text, _ in sentences(count))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_words(path: Path, count: int = 60) -> Path:
    """Write a JSON-lines file of lists of words, each word with its class."""
    with path.open("w", encoding="utf-8") as file:
        for text, _ in sentences(count):
            words = text.split()
            tags = ["VERB" if word in GOOD + BAD else "OTHER" for word in words]
            file.write(json.dumps({"tokens": words, "ner_tags": tags}) + "\n")
    return path


def write_images(folder: Path, count: int = 24, seed: int = 0) -> Path:
    """Write a folder of images, a folder a class: dark ones are bad, bright ones are good."""
    draw = np.random.default_rng(seed)
    for number in range(count):
        good = number % 2
        pixels = draw.integers(0, 100, (20, 24, 3)) + 150 * good
        path = folder / "train" / LABELS[good] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(path)
    return folder


def write_segmentation(folder: Path, count: int = 12, seed: int = 0) -> Path:
    """Write images, each with a rectangle of one of two classes, and maps of the class of each pixel."""
    draw = np.random.default_rng(seed)
    for part in ("images", "annotations"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for number in range(count):
        classes = np.zeros((36, 48), dtype=np.uint8)
        top, left = draw.integers(0, 16, 2)
        classes[top : top + 16, left : left + 24] = 1 + number % 2
        classes[0] = 255  # not labelled
        pixels = draw.integers(0, 80, (36, 48, 3)) + 80 * (classes % 255)[..., None]
        Image.fromarray(pixels.astype(np.uint8)).save(folder / "images" / f"{number}.png")
        Image.fromarray(classes).save(folder / "annotations" / f"{number}.png")
    return folder


QUICK = {
    "max_steps": 3,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
}
"""Options of a run that takes a second."""


def flags(**options: Any) -> list[str]:
    """Return options as words of a command line; mappings as JSON."""
    words: list[str] = []
    for name, value in options.items():
        words += [f"--{name}", json.dumps(value) if isinstance(value, (dict, list)) else str(value)]
    return words


@functools.cache
def cache() -> str:
    """Return a folder for what datasets keeps, which ends with the tests."""
    folder = tempfile.mkdtemp(prefix="hf_guide_datasets_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def run_process(command: list[str], *, seconds: int = 240) -> str:
    """Run a process that knows no Hub and one thread, and return what it printed."""
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": cache(),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "TOKENIZERS_PARALLELISM": "false",
    }
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=seconds, env=environment, cwd=ROOT
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    return done.stdout


def run_example(name: str, *words: str, launcher: tuple[str, ...] = ()) -> str:
    """Run one of the example scripts and return what it printed."""
    return run_process([sys.executable, *launcher, str(EXAMPLES / name), *words])
