"""Names and prose use the field's words: activations are collected and outputs predicted, nothing is heard or said."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

HOUSE_WORDS = re.compile(
    r"(?<![A-Za-z])(hear|hears|heard|hearing|listens?|listened|listening|listeners?|says?|said|tells?|told|mends?|mended|menders?"
    r"|foretells?|foretold|beside|loud|faint|whoever)(?![A-Za-z])",
    re.IGNORECASE,
)
"""Metaphors of hearing, speaking and mending; as words and as parts of snake_case names."""


def files() -> Iterator[Path]:
    """Yield what a person reads: code, documentation, examples and configuration."""
    for folder in ("hf_guide", "model_cards", "examples", "tests"):
        for ending in ("py", "md", "yaml", "ipynb"):
            yield from sorted((ROOT / folder).rglob(f"*.{ending}"))
    yield from (ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "setup.cfg", "Makefile"))


def test_house_words_do_not_return() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in files()
        if path != Path(__file__)
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if HOUSE_WORDS.search(line)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("line", ["def hear_stream(model)", "what the teacher says", "_heard = []", "TOLD = 3"])
def test_a_house_word_is_noticed_in_prose_and_in_names(line: str) -> None:
    assert HOUSE_WORDS.search(line)
