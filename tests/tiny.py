"""Tiny seeded teachers of several kinds, with students smaller in every way, for tests of the whole library."""

import os
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

SIZES = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}
SMALLER = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}


@dataclass(frozen=True)
class Kind:
    """A model class with the config of a teacher, and what a student of it overrides."""

    model_class: str
    auto_class: str
    config: Mapping[str, Any]
    smaller: Mapping[str, Any]
    inputs: str = "tokens"

    def teacher(self, **changes: Any) -> PreTrainedModel:
        """Return the teacher, seeded, every parameter away from its default."""
        model_class = getattr(transformers, self.model_class)
        torch.manual_seed(0)
        model = model_class(model_class.config_class(**{**self.config, **changes})).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        return model


def _kind(model_class: str, auto_class: str, config: Mapping[str, Any] | None = None, **more: Any) -> Kind:
    return Kind(model_class, auto_class, {**SIZES, **(config or {})}, {**SMALLER, **more})


KINDS = {
    "llama": _kind("LlamaForCausalLM", "AutoModelForCausalLM", {"num_key_value_heads": 2}, num_key_value_heads=1),
    "llama tied": _kind("LlamaForCausalLM", "AutoModelForCausalLM", {"tie_word_embeddings": True}),
    "gpt2": Kind(
        "GPT2LMHeadModel",
        "AutoModelForCausalLM",
        {"vocab_size": 96, "n_embd": 48, "n_layer": 4, "n_head": 4, "n_inner": 64, "n_positions": 32},
        {"n_embd": 24, "n_layer": 2, "n_head": 2, "n_inner": 40},
    ),
    "gemma3": _kind(
        "Gemma3ForCausalLM",
        "AutoModelForCausalLM",
        {
            "num_key_value_heads": 2,
            "head_dim": 12,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
        num_key_value_heads=1,
    ),
    "mixtral": _kind(
        "MixtralForCausalLM",
        "AutoModelForCausalLM",
        {"num_key_value_heads": 2, "num_local_experts": 4},
        num_key_value_heads=1,
    ),
    "bert": _kind("BertForMaskedLM", "AutoModelForMaskedLM"),
    "bert classifier": _kind(
        "BertForSequenceClassification",
        "AutoModelForSequenceClassification",
        {"id2label": {0: "good", 1: "bad", 2: "neither"}, "label2id": {"good": 0, "bad": 1, "neither": 2}},
    ),
    "t5": Kind(
        "T5ForConditionalGeneration",
        "AutoModelForSeq2SeqLM",
        {"vocab_size": 96, "d_model": 48, "d_kv": 12, "d_ff": 64, "num_layers": 4, "num_heads": 4},
        {"d_model": 24, "d_ff": 40, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 2},
        "pairs",
    ),
    "vit": Kind(
        "ViTForImageClassification",
        "AutoModelForImageClassification",
        {
            "hidden_size": 48,
            "intermediate_size": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "image_size": 16,
            "patch_size": 4,
        },
        SMALLER,
        "images",
    ),
}


def inputs(kind: Kind) -> dict[str, torch.Tensor]:
    """Return fixed input for the models of a kind."""
    generator = torch.Generator().manual_seed(5)
    if kind.inputs == "images":
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}
    tokens = torch.randint(3, 96, (2, 9), generator=generator)
    return {"input_ids": tokens} | ({"decoder_input_ids": tokens.flip(1)} if kind.inputs == "pairs" else {})


@torch.no_grad()
def logits(model: PreTrainedModel, kind: Kind) -> torch.Tensor:
    """Return what a model makes of the fixed input."""
    return model(**inputs(kind)).logits


def same_bits(first: PreTrainedModel, second: PreTrainedModel) -> bool:
    """Whether two models have the same parameters and buffers, bit for bit."""
    one, other = everything(first), everything(second)
    return one.keys() == other.keys() and all(
        tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]) for name, tensor in one.items()
    )


def everything(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return all parameters and buffers, those that are not saved as well."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {name: tensor.detach() for name, tensor in (parameters | dict(model.named_buffers())).items()}


def run_python(
    script: str, *arguments: object, flags: tuple[str, ...] = (), seconds: int = 300, **environment: str
) -> str:
    """Run a script in a process of its own and return what it prints; its error output is shown where it fails."""
    done = subprocess.run(
        [sys.executable, *flags, "-c", textwrap.dedent(script), *map(str, arguments)],
        env={**os.environ, **environment},
        cwd=Path(__file__).parent.parent,
        check=False,
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
