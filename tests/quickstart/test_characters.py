"""Images of characters: distinct glyphs of real fonts, split by family, distorted by a seed."""

from pathlib import Path

import pytest
import torch

from examples.common.characters import CHARACTERS, Glyphs, draw_characters, fonts_below, read_glyphs, split_fonts

matplotlib = pytest.importorskip("matplotlib")  # it ships fonts


@pytest.fixture(scope="module")
def fonts() -> list[Path]:
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return [folder / f"{name}.ttf" for name in ("DejaVuSans", "DejaVuSerif-Bold", "STIXGeneral", "STIXSizOneSymReg")]


@pytest.fixture(scope="module")
def glyphs(fonts: list[Path]) -> Glyphs:
    return read_glyphs(fonts)


def test_a_font_without_most_characters_is_left_out(glyphs: Glyphs) -> None:
    assert glyphs.families == ("DejaVu", "DejaVu", "STIXGeneral")
    assert glyphs.pixels.shape == (3, 64, 56, 56) and len(set(CHARACTERS)) == 64


def test_no_family_is_in_two_parts(glyphs: Glyphs) -> None:
    first, second = split_fonts(glyphs, [0.6, 0.4])
    assert {glyphs.families[font] for font in first.tolist()}.isdisjoint(
        glyphs.families[font] for font in second.tolist()
    )
    assert sorted([*first.tolist(), *second.tolist()]) == [0, 1, 2]


def test_images_depend_on_the_seed_alone_and_show_their_character(glyphs: Glyphs) -> None:
    fonts = torch.tensor([0, 2])
    images, characters = draw_characters(glyphs, fonts, 1500, seed=1)
    again = draw_characters(glyphs, fonts, 1500, seed=1)
    other = draw_characters(glyphs, fonts, 300, seed=2)
    assert images.shape == (1500, 1, 28, 28) and torch.equal(images, again[0]) and torch.equal(characters, again[1])
    nearest = torch.cdist(other[0].flatten(1), images.flatten(1)).argmin(1)
    assert (characters[nearest] == other[1]).float().mean() > 0.6  # by chance 1 of 64


def test_families_whose_names_begin_alike_stay_together(glyphs: Glyphs) -> None:
    """ "Go" and "Goudy" are no such pair: two letters are too few."""
    names = ("Cabin", "Lato", "CabinSketch", "Go", "Goudy", "Cabin_One")
    parts = split_fonts(Glyphs(glyphs.pixels[[0] * 6], names), [1, 1, 1, 1])
    assert sorted(sorted(part.tolist()) for part in parts) == [[0, 2, 5], [1], [3], [4]]


def test_a_folder_without_fonts_raises(tmp_path: Path) -> None:
    (tmp_path / "b.TTF").touch()
    (tmp_path / "a.otf").touch()
    assert [file.name for file in fonts_below(tmp_path)] == ["a.otf", "b.TTF"]
    with pytest.raises(ValueError, match="must contain TTF or OTF files"):
        fonts_below(tmp_path / "none")
