"""Small trained tokenizers of every kind whose vocabulary can be reduced, and teachers that read them."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

TEXTS = (Path(__file__).parent / "small_texts.txt").read_text(encoding="utf-8").splitlines()
"""Lines of documents of this repository as they were: what a vocabulary keeps of them does not change with the documents."""
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
CHAT_TEMPLATE = "{% for message in messages %}<|user|>{{ message['content'] }}<|end|>{% endfor %}"


def _trained(model: Any, trainer: Any, pre_tokenizer: Any, normalizer: Any = None) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.train_from_iterator([*TEXTS, "été naïve Größe"], trainer)
    return tokenizer


def _byte_level(ignore_merges: bool = False) -> Tokenizer:
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<s>", "</s>", "<pad>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer = _trained(models.BPE(), trainer, pre_tokenizers.ByteLevel(add_prefix_space=False))
    tokenizer.model.ignore_merges = ignore_merges
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def byte_level_bpe() -> Any:
    """As Llama 3: bytes, a post-processor that adds a token, further tokens beyond the model's, and a chat template."""
    backend = _byte_level(ignore_merges=True)
    backend.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]),
        ]
    )
    backend.add_special_tokens(["<|user|>", "<|end|>"])
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def gpt2_bpe() -> Any:
    """As GPT-2: merges written a second time in its class, and one token for everything special."""
    backend = _byte_level()
    tokenizer = transformers.GPT2Tokenizer(
        vocab=backend.get_vocab(), merges=_merges(backend), bos_token="</s>", eos_token="</s>", unk_token="</s>"
    )
    tokenizer.pad_token = "<pad>"
    return tokenizer


def _merges(backend: Tokenizer) -> list[tuple[str, str]]:
    return [tuple(merge) for merge in json.loads(backend.to_str())["model"]["merges"]]


def _sentencepiece_vocab(special: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return pieces and merges as converted from SentencePiece: byte pieces, and of each piece every split as a merge."""
    space = pre_tokenizers.Split(" ", "merged_with_next")
    trained = _trained(models.BPE(), trainers.BpeTrainer(vocab_size=500), space, normalizers.Replace(" ", "▁"))
    pieces = sorted(trained.get_vocab(), key=trained.token_to_id)
    vocab = {piece: index for index, piece in enumerate([*special, *BYTES, *pieces])}
    merges = []
    for piece in pieces:  # in the order in which they were learned
        splits = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        merges += sorted((pair for pair in splits if pair[0] in vocab and pair[1] in vocab), key=lambda p: vocab[p[0]])
    return vocab, merges


def llama_bpe() -> Any:
    """As Llama 2: SentencePiece's BPE with byte fallback."""
    vocab, merges = _sentencepiece_vocab(["<unk>", "<s>", "</s>"])
    return transformers.LlamaTokenizer(vocab=vocab, merges=merges, pad_token="</s>")


def gemma_bpe() -> Any:
    """As Gemma."""
    vocab, merges = _sentencepiece_vocab(["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"])
    return transformers.GemmaTokenizer(vocab=vocab, merges=merges)


def _unigram_pieces(special: list[str], byte_fallback: bool = False) -> list[tuple[str, float]]:
    trainer = trainers.UnigramTrainer(vocab_size=500, unk_token="<unk>", special_tokens=["<unk>"])
    trained = _trained(models.Unigram(), trainer, pre_tokenizers.Metaspace())
    learned = [(piece, score) for piece, score in json.loads(trained.to_str())["model"]["vocab"] if piece != "<unk>"]
    return [(piece, 0.0) for piece in [*special, *(BYTES if byte_fallback else [])]] + learned


def t5_unigram() -> Any:
    """As T5: sentinels after all pieces."""
    pieces = _unigram_pieces(["<pad>", "</s>", "<unk>"]) + [(f"<extra_id_{index}>", 0.0) for index in range(4)]
    return transformers.T5Tokenizer(vocab=pieces, extra_ids=4)


def xlm_roberta_unigram() -> Any:
    """As XLM-RoBERTa: a mask after all pieces."""
    pieces = [*_unigram_pieces(["<s>", "<pad>", "</s>", "<unk>"]), ("<mask>", 0.0)]
    return transformers.XLMRobertaTokenizer(vocab=pieces)


def fallback_unigram() -> Any:
    """A Unigram model with byte fallback."""
    pieces = _unigram_pieces(["<unk>", "<s>", "</s>"], byte_fallback=True)
    backend = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def bert_wordpiece() -> Any:
    """As BERT: it cuts and pads by settings of its file."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=500, special_tokens=special)
    backend = _trained(
        models.WordPiece(unk_token="[UNK]"),
        trainer,
        pre_tokenizers.BertPreTokenizer(),
        normalizers.BertNormalizer(lowercase=True),
    )
    tokenizer = transformers.BertTokenizer(vocab=backend.get_vocab())
    tokenizer.backend_tokenizer.enable_truncation(24)
    return tokenizer


@dataclass(frozen=True)
class Kind:
    """A tokenizer and a model class that reads it.

    Attributes:
        make: Returns the tokenizer.
        model_class, config: The teacher's.
        bytes: Whether any text at all is encoded and decoded again.
    """

    make: Callable[[], Any]
    model_class: str
    config: dict[str, Any]
    bytes: bool = False

    def teacher(self, folder: Path) -> tuple[PreTrainedModel, Any]:
        """Return a seeded teacher, saved in a folder with its tokenizer, and the tokenizer as it loads from there."""
        made = self.make()
        made.save_pretrained(folder)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        names = ("bos", "eos", "pad")
        ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id", None) for name in names}
        model_class = getattr(transformers, self.model_class)
        config = model_class.config_class(vocab_size=len(tokenizer) + 8, **{**ids, **self.config})  # with padded rows
        torch.manual_seed(0)
        model = model_class(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        model.save_pretrained(folder)
        return model_class.from_pretrained(folder).eval(), tokenizer


_SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
KINDS = {
    "byte-level BPE": Kind(byte_level_bpe, "LlamaForCausalLM", _SMALL, bytes=True),
    "GPT-2": Kind(gpt2_bpe, "GPT2LMHeadModel", {"n_embd": 16, "n_layer": 2, "n_head": 2}, bytes=True),
    "Llama BPE": Kind(llama_bpe, "LlamaForCausalLM", {**_SMALL, "tie_word_embeddings": True}, bytes=True),
    "Gemma BPE": Kind(gemma_bpe, "GemmaForCausalLM", {**_SMALL, "head_dim": 8, "num_key_value_heads": 1}, bytes=True),
    "T5 Unigram": Kind(
        t5_unigram,
        "T5ForConditionalGeneration",
        {"d_model": 16, "d_ff": 24, "d_kv": 8, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0},
    ),
    "XLM-R Unigram": Kind(xlm_roberta_unigram, "XLMRobertaForMaskedLM", _SMALL),
    "byte-fallback Unigram": Kind(fallback_unigram, "LlamaForCausalLM", _SMALL, bytes=True),
    "WordPiece": Kind(bert_wordpiece, "BertForMaskedLM", _SMALL),
}
