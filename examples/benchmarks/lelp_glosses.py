"""Glosses of WordNet's nouns as sentence embeddings: many texts, 94 topics, and a student that is an MLP.

Does: read the files of Debian's package wordnet-base, take its subtrees of at most 1,500 nouns as topics, and embed the
glosses once by a frozen sentence encoder. Does not: download anything.
"""

from collections import defaultdict
from pathlib import Path

import torch
from lelp_pairs import embed
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_guide.errors import OptionError

MOST, LEAST = 1500, 250  # nouns of a topic
COUNT = 16000  # glosses that are embedded, at random
CACHED = "glosses.safetensors"
ENTITY = "00001740"  # the noun that is above all others


def read_glosses(folder: Path | None) -> dict[str, Tensor]:
    """Return the embeddings of a folder, which are kept there in one file when they were made.

    Returns:
        "embeddings" (16000, 384); "topics" (16000,), below 94.

    Raises:
        OptionError: WordNet is not below the folder.
    """
    file = None if folder is None else next(folder.glob("**/data.noun"), None)
    if folder is None or file is None:
        raise OptionError(
            f"WordNet was not found below --texts {folder}. Name a folder that holds data.noun; Debian's package "
            "wordnet-base has it."
        )
    if (folder / CACHED).is_file():
        return load_file(folder / CACHED)
    topic_by_gloss = _topics(file)
    names = sorted(set(topic_by_gloss.values()))
    chosen = torch.randperm(len(topic_by_gloss), generator=torch.Generator().manual_seed(0))[:COUNT].tolist()
    glosses = list(topic_by_gloss)
    topics = torch.tensor([names.index(topic_by_gloss[glosses[row]]) for row in chosen])
    made = {"embeddings": embed([glosses[row] for row in chosen]), "topics": topics}
    save_file(made, folder / CACHED)
    return made


def _topics(file: Path) -> dict[str, str]:
    """Return the topic of each gloss: the largest subtree with at most 1,500 nouns that its noun is in."""
    glosses, below = {}, defaultdict(list)
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.startswith(" "):
            continue
        head, _, gloss = line.partition("|")
        fields = head.split()
        number = fields[0]
        glosses[number] = gloss.split('"')[0].strip().rstrip(";").strip()
        start = 5 + 2 * int(fields[3], 16)  # the pointers follow the words and their count
        pointers = [fields[place : place + 4] for place in range(start, start + 4 * int(fields[start - 1]), 4)]
        above = [target for symbol, target, kind, _ in pointers if symbol in ("@", "@i") and kind == "n"]
        if above:
            below[above[0]].append(number)
    subtrees = {ENTITY: [ENTITY]}
    found, waiting = [], [ENTITY]
    while waiting:
        top = waiting.pop()
        subtree = [top]
        for number in subtree:
            subtree += below[number]
        subtrees[top] = subtree
        if len(subtree) > MOST:
            waiting += below[top]
        elif len(subtree) >= LEAST:
            found.append(top)
    return {glosses[number]: top for top in sorted(found) for number in subtrees[top][1:] if glosses[number]}
