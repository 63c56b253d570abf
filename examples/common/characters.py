"""Images of characters in many fonts: few classes that are a hard function of many hidden ones, the characters.

Does: draw glyphs with Pillow from font files, those of the package `trdg` among them, and turn, scale, shear, shift and blur
them with noise. Does not: download anything.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from examples.common.data import package_dir
from hf_guide.errors import OptionError

CHARACTERS = "0123456789ABCDEFGHJKLMNOPQRSTUVWXYZabdefghijkmnpqrty&@#%?!$+=*<>"
"""64 characters; lower-case letters that look like their capitals, and I and l, are left out."""

SIZE, DRAWN_SIZE = 28, 56
MIN_DISTINCT = 60
"""How many of the glyphs of a usable font must differ from each other; missing ones are all drawn as the same box."""


@dataclass(frozen=True)
class Glyphs:
    """All characters in some fonts.

    Attributes:
        pixels: uint8 (fonts, characters, 56, 56), ink 255.
        families: The family of each font, the first word of its name.
    """

    pixels: Tensor
    families: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.families)


def trdg_fonts() -> list[Path]:
    """Return the Latin fonts of the package `trdg`.

    Raises:
        OptionError: The package is not installed.
    """
    return sorted((package_dir("trdg", "trdg") / "fonts" / "latin").glob("*.ttf"))


def fonts_below(folder: Path) -> list[Path]:
    """Return the TTF and OTF files below a folder, by name.

    Raises:
        OptionError: There is none.
    """
    files = [file for file in folder.glob("**/*") if file.suffix.lower() in (".ttf", ".otf") and not file.is_symlink()]
    if not files:
        raise OptionError(f"The folder {str(folder)!r} must contain TTF or OTF files; found none.")
    return sorted(files, key=lambda file: (file.name, str(file)))


def read_glyphs(fonts: Sequence[Path], characters: str = CHARACTERS) -> Glyphs:
    """Draw all characters in each font; fonts in which fewer than 60 of 64 (or the same share) differ are left out."""
    drawn, families = [], []
    for file in fonts:
        font = ImageFont.truetype(str(file), round(0.85 * DRAWN_SIZE))
        glyphs = np.stack([draw_glyph(character, font) for character in characters])
        distinct = len(np.unique(glyphs.reshape(len(glyphs), -1), axis=0))
        if distinct * len(CHARACTERS) >= MIN_DISTINCT * len(characters):
            drawn.append(torch.from_numpy(glyphs))
            families.append(str(font.getname()[0]).split()[0])
    return Glyphs(torch.stack(drawn), tuple(families))


def split_fonts(glyphs: Glyphs, shares: Sequence[float], seed: int = 0) -> list[Tensor]:
    """Return the numbers of the fonts of each part, of about these shares; no family is in two parts.

    Families of which one's name begins with the other's, as "Cabin" and "CabinSketch", are taken for one.
    """
    families = _merged(glyphs.families)
    names = sorted(set(families))
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
    parts: list[list[int]] = [[] for _ in shares]
    # Large families first, each to the part that lacks most.
    for number in sorted(order, key=lambda number: -families.count(names[number])):
        members = [font for font, family in enumerate(families) if family == names[number]]
        missing = [share * len(glyphs) - len(part) for share, part in zip(shares, parts, strict=True)]
        parts[max(range(len(parts)), key=missing.__getitem__)] += members
    return [torch.tensor(part) for part in parts]


def _merged(families: Sequence[str]) -> list[str]:
    """Return for each family the shortest name, of three letters or more, that its own begins with."""
    plain = [re.split("[_-]", family)[0].casefold() for family in families]
    short = sorted({name for name in plain if len(name) > 2}, key=len)
    return [next((start for start in short if name.startswith(start)), name) for name in plain]


def draw_characters(glyphs: Glyphs, fonts: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw random characters in random fonts, distorted at random.

    Args:
        glyphs: Of `read_glyphs`.
        fonts: The numbers of the fonts to draw from.
        count: How many images.

    Returns:
        Images (count, 1, 28, 28), float32 from -1 to about 1, and the number of each image's character, (count,).
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=generator)

    characters = torch.randint(glyphs.pixels.shape[1], (count,), generator=generator)
    chosen = fonts[torch.randint(len(fonts), (count,), generator=generator)]
    angle, shear = uniform(-8, 8) * math.pi / 180, uniform(-0.15, 0.15)
    scale_x, scale_y = uniform(0.9, 1.1), uniform(0.9, 1.1)
    cos, sin = angle.cos(), angle.sin()
    moves = torch.stack([uniform(-0.1, 0.1), uniform(-0.1, 0.1)], 1)
    rows = torch.stack(
        [torch.stack([cos, shear - sin], 1) * scale_x[:, None], torch.stack([sin, cos], 1) * scale_y[:, None]], 1
    )
    maps = torch.cat([rows, moves[:, :, None]], 2)
    images = torch.empty(count, 1, SIZE, SIZE)
    for numbers in torch.arange(count).split(1024):
        ink = glyphs.pixels[chosen[numbers], characters[numbers]].float().unsqueeze(1) / 255
        grid = affine_grid(maps[numbers], [len(numbers), 1, DRAWN_SIZE, DRAWN_SIZE], align_corners=False)
        images[numbers] = torch.nn.functional.avg_pool2d(grid_sample(ink, grid, align_corners=False), 2)
    images += 0.1 * torch.randn(images.shape, generator=generator)
    return 2 * images - 1, characters


def draw_glyph(character: str, font: ImageFont.FreeTypeFont, size: int = DRAWN_SIZE) -> np.ndarray:
    """Return a character in the middle of a square, uint8 (size, size), shrunk where it is too large."""
    image = Image.new("L", (3 * size, 3 * size))
    ImageDraw.Draw(image).text((size, size), character, 255, font)
    box = image.getbbox() or (0, 0, 1, 1)
    glyph = image.crop(box)
    largest = round(0.85 * size)
    if max(glyph.size) > largest:
        ratio = largest / max(glyph.size)
        glyph = glyph.resize((max(1, round(glyph.width * ratio)), max(1, round(glyph.height * ratio))))
    square = Image.new("L", (size, size))
    square.paste(glyph, ((size - glyph.width) // 2, (size - glyph.height) // 2))
    return np.asarray(square)
