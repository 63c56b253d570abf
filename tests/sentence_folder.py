"""Write tiny sentence-transformers folders, in the layouts of several of its versions, without the package."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

WORDS = [f"w{number}" for number in range(91)]
TEXTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9 w10", "w11 w12"]
OLD, NEW = "sentence_transformers.models", "sentence_transformers.sentence_transformer.modules"
SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
}


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of whole words with the special tokens of BERT."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate([*special, *WORDS])}, "[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = {
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
    }
    return PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=40, **names)


def batch(texts: "list[str] | list[tuple[str, str]]") -> dict[str, torch.Tensor]:
    """Return the tokens of texts, or of pairs of texts."""
    return dict(tokenizer()(texts, padding=True, return_tensors="pt"))


def bert(*, labels: int | None = None, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Return a tiny BERT, every parameter away from its default: a base model, or a classifier with so many labels."""
    torch.manual_seed(seed)
    config = BertConfig(**{**SIZES, **changes}, **({} if labels is None else {"num_labels": labels}))
    model = (AutoModel if labels is None else AutoModelForSequenceClassification).from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def write_json(path: Path, values: Any) -> None:
    """Write a JSON file, in a folder that is created."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values))


def sentence_folder(folder: Path, *modules: "tuple[str, dict[str, Any] | None]", **settings: Any) -> Path:
    """Write a folder with these modules, without a transformer: the name of a class, or its full path, and its config.

    Args:
        settings: Of `config_sentence_transformers.json`.
    """
    entries = [{"idx": 0, "name": "0", "path": "", "type": f"{OLD}.Transformer"}]
    torch.manual_seed(1)
    for number, (name, config) in enumerate(modules, 1):
        short = name.rpartition(".")[2]
        path = f"{number}_{short}"
        entries.append(
            {"idx": number, "name": str(number), "path": path, "type": name if "." in name else f"{OLD}.{name}"}
        )
        if config is not None:
            write_json(folder / path / "config.json", config)
        tensors: dict[str, torch.Tensor] = {}
        if short == "Dense" and config is not None:
            inputs, outputs = config["in_features"], config["out_features"]
            tensors["linear.weight"] = torch.randn(outputs, inputs) / inputs**0.5
            if config.get("bias", True):
                tensors["linear.bias"] = torch.randn(outputs)
            if config.get("use_residual") and inputs != outputs:
                tensors["residual.weight"] = torch.randn(outputs, inputs) / inputs**0.5
        if short == "LayerNorm" and config is not None:
            tensors = {"norm.weight": torch.rand(config["dimension"]), "norm.bias": torch.randn(config["dimension"])}
        if tensors:
            save_file(tensors, folder / path / "model.safetensors")
    write_json(folder / "modules.json", entries)
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": 30, "do_lower_case": False})
    write_json(folder / "config_sentence_transformers.json", settings)
    return folder


def teacher_folder(folder: Path, *modules: "tuple[str, dict[str, Any] | None]", **settings: Any) -> Path:
    """Write a folder with a BERT, a tokenizer and these modules."""
    bert().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return sentence_folder(folder, *modules, **settings)


def pooling(*modes: str, width: int = 32, **more: Any) -> "tuple[str, dict[str, Any]]":
    """Return a Pooling, as sentence-transformers 6 writes its config."""
    return "Pooling", {"embedding_dimension": width, "pooling_mode": list(modes) or "mean", **more}


def dense(inputs: int, outputs: int, **more: Any) -> "tuple[str, dict[str, Any]]":
    """Return a Dense with a tanh."""
    return "Dense", {"in_features": inputs, "out_features": outputs, **more}
