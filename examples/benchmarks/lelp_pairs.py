"""Pairs of a drawing and a text: Chinese characters in many fonts, and their English definitions of the Unihan database.

Does: read the files of Debian's package unicode-data and fonts from a folder, draw, and embed the definitions once by a frozen
all-MiniLM-L6-v2. Does not: show a text to the teacher, or a drawing to a student.
"""

import bz2
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from lelp_models import Batches, Classifier, make_teacher, make_tokenizer
from PIL import ImageFont
from safetensors.torch import load_file, save_file
from torch import Tensor

from examples.common.characters import SIZE, draw_glyph, fonts_below
from hf_guide.errors import OptionError

RADICALS = 40
FILES = ("Unihan_Readings.txt.bz2", "Unihan_IRGSources.txt.bz2")
CACHED = "definitions.safetensors"
TRAIN_SHARE, VALIDATION_SHARE = 0.6, 0.2
DRAWINGS = 2  # of each character for training, in two fonts; one of the others

_REFERENCE = re.compile(
    r"\(?U\+[0-9A-F]+\)?|[^\x20-\x7e]+|\((?:a |same|simplified|standard|variant|non-classical)[^)]*\)"
)


def read_definitions(folder: Path | None) -> dict[str, Tensor]:
    """Return the pairs of a folder, which are kept there in one file when they were made.

    Returns:
        "embeddings" (N, 384) of the definitions; "pictures" (N, 1, 28, 28); "radicals" (N,), the rank of the character's
        radical among the 40 most frequent; "parts" (N,), 0 for training, 1 for validation, 2 for the test: no character, and
        no definition, is in two of them.

    Raises:
        OptionError: The files of Unihan, or fonts, are not below the folder.
    """
    found = [] if folder is None else [next(folder.glob(f"**/{name}"), None) for name in FILES]
    if folder is None or None in found:
        raise OptionError(
            f"--fonts must name a folder with fonts of Chinese characters and {' and '.join(FILES)}; found {folder}."
        )
    if (folder / CACHED).is_file():
        return load_file(folder / CACHED)
    defined = dict(_usable_definitions(*found))
    frequent = [radical for radical, _ in Counter(radical for radical, _ in defined.values()).most_common(RADICALS)]
    defined = {
        code: (frequent.index(radical), text) for code, (radical, text) in defined.items() if radical in frequent
    }
    generator = torch.Generator().manual_seed(0)
    codes = [list(defined)[number] for number in torch.randperm(len(defined), generator=generator).tolist()]
    limits = (int(len(codes) * TRAIN_SHARE), int(len(codes) * (TRAIN_SHARE + VALIDATION_SHARE)))
    drawn: dict[str, list[Tensor]] = {"rows": [], "pictures": [], "parts": []}
    fonts = [ImageFont.truetype(str(file), SIZE) for file in fonts_below(folder)]
    missing = [(b"", _ink("\ue123", font)) for font in fonts]  # drawn as nothing, or as a box
    for row, code in enumerate(codes):
        part = sum(row >= limit for limit in limits)
        own = [font for font, none in zip(fonts, missing, strict=True) if _ink(chr(code), font) not in none]
        for number in torch.randperm(len(own), generator=generator)[: 1 if part else DRAWINGS].tolist():
            drawn["rows"].append(torch.tensor(row))
            drawn["pictures"].append(torch.from_numpy(draw_glyph(chr(code), own[number], SIZE)))
            drawn["parts"].append(torch.tensor(part))
    rows, pictures, parts = (torch.stack(each) for each in drawn.values())
    embedded = embed([defined[code][1] for code in codes])
    pairs = {
        "embeddings": embedded[rows],
        "pictures": pictures.unsqueeze(1).float() / 127.5 - 1,
        "radicals": torch.tensor([defined[code][0] for code in codes])[rows],
        "parts": parts,
    }
    save_file(pairs, folder / CACHED)
    return pairs


def _usable_definitions(readings: Path, sources: Path) -> Iterator[tuple[int, tuple[int, str]]]:
    """Yield (code point, (radical, definition)), each definition once, without what it states about other characters."""
    radicals = {code: int(value.split(".")[0].rstrip("'")) for code, value in _fields(sources, "kRSUnicode")}
    seen: set[str] = set()
    for code, value in _fields(readings, "kDefinition"):
        text = " ".join(_REFERENCE.sub(" ", value).split()).strip(" ,;")
        if 0x4E00 <= code < 0xA000 and len(text) > 2 and text not in seen:
            seen.add(text)
            yield code, (radicals[code], text)


def _fields(file: Path, field: str) -> Iterator[tuple[int, str]]:
    with bz2.open(file, "rt", encoding="utf-8") as lines:
        for line in lines:
            if f"\t{field}\t" in line:
                code, _, value = line.rstrip("\n").split("\t", 2)
                yield int(code[2:], 16), value


def _ink(character: str, font: ImageFont.FreeTypeFont) -> bytes:
    """Return the pixels of a character, b"" where none is inked."""
    return bytes(font.getmask(character)).strip(b"\0")


def embed(texts: list[str]) -> Tensor:
    """Return the mean token states of texts, (N, 384), each to length 20."""
    from lelp_data import Labelled

    data = Labelled(texts, torch.zeros(len(texts), dtype=torch.long), 2)
    model: Classifier = make_teacher(data, "").eval()
    (states,) = Batches(data, make_tokenizer(data), 48).of_each(lambda inputs: (model.features(inputs),))
    return 20 * torch.nn.functional.normalize(states, dim=1)
