"""A text that every Python carries, a tokenizer learned from it, and a tiny teacher that reads it."""

import argparse
import importlib
import inspect
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

MODULES = ["asyncio", "collections", "csv", "decimal", "logging", "os", "pathlib", "random", "shutil", "statistics"]


@pytest.fixture(scope="session")
def documents() -> list[str]:
    """The docstrings of some of the standard library: real English, in one document a function or class."""
    found = {inspect.getdoc(argparse.ArgumentParser) or ""}
    for name in MODULES:
        module = importlib.import_module(name)
        for member in vars(module).values():
            if inspect.isclass(member) or inspect.isfunction(member):
                found.add(inspect.getdoc(member) or "")
    return sorted(text for text in found if len(text) > 80)


@pytest.fixture(scope="session")
def tokenizer(documents: list[str]) -> PreTrainedTokenizerBase:
    """A byte-level tokenizer of 400 tokens."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(documents, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(tokenizer_object=core)


@pytest.fixture(scope="session")
def config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=400,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=3,
        num_key_value_heads=3,
        head_dim=16,
        tie_word_embeddings=True,
    )


@pytest.fixture(scope="session")
def teacher_folder(
    tmp_path_factory: pytest.TempPathFactory, config: LlamaConfig, tokenizer: PreTrainedTokenizerBase
) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
