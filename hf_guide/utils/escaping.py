"""Text from outside (names of teachers, labels, licences, datasets, metrics) where it lands: Markdown, figures, a terminal.

Each function returns one line that shows the text as it is and is nothing else: no markup, no control sequence.
"""

import re
import unicodedata

_BIDI_CONTROLS = frozenset("\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Characters that make a reader see other text than stands there."""


def to_single_line(text: object) -> str:
    """Return a text in one line: white space as single blanks, without control characters."""
    kept = "".join(" " if _is_control(character) else character for character in str(text))
    return " ".join(kept.split())


def escape_control_characters(text: object) -> str:
    """Return a text, of one line or several, whose control characters are written out: a terminal would act on them."""
    return "".join(
        character if character in "\n\t" or not _is_control(character) else ascii(character)[1:-1]
        for character in str(text)
    )


def escape_markdown(text: object) -> str:
    """Return a text as Markdown, in a paragraph, a list item, a heading, or a cell of a table.

    >>> escape_markdown("a|b")
    'a\\\\|b'
    """
    escaped = re.sub(
        r"[\\`*$|\[\]]|<(?=[A-Za-z!/?])|-->|~(?=~)|(?<![^\W_])_+|_+(?![^\W_])", _escape_match, to_single_line(text)
    )
    return re.sub(r"^([#>+=-]|\d+[.)](?=\s|$))", _escape_line_start, escaped)


def markdown_code(text: object) -> str:
    """Return a text as Markdown's code, also in a cell of a table."""
    shown = to_single_line(text).replace("<!--", "<! --").replace("-->", "-- >").replace("|", "\\|")
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", shown)), default=0))
    blank = " " if "`" in shown or not shown else ""
    return f"{fence}{blank}{shown}{blank}{fence}"


def escape_mathtext(text: object, longest: int = 80) -> str:
    """Return a text for matplotlib, which would read what stands between dollar signs as TeX."""
    shown = to_single_line(text)
    shown = shown if len(shown) <= longest else shown[: longest - 1] + "…"
    return shown.replace("$", r"\$")


def _is_control(character: str) -> bool:
    return character in _BIDI_CONTROLS or unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")


def _escape_match(found: "re.Match[str]") -> str:
    if found[0] == "-->":
        return "--\\>"
    return "".join("\\" + character for character in found[0])


def _escape_line_start(found: "re.Match[str]") -> str:
    return found[0][:-1] + "\\" + found[0][-1]
