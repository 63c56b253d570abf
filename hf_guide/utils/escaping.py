"""Escape untrusted text (names of teachers, labels, licenses, datasets, metrics) for Markdown, figures and terminals.

Each function returns text that is displayed literally: no markup, no control sequence.
"""

import re
import unicodedata

_BIDI_CONTROLS = frozenset("\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Characters that change the displayed order of text."""


def to_single_line(text: object) -> str:
    """Return a text on one line, with white space collapsed to single spaces and without control characters."""
    printable = "".join(" " if _is_control(character) else character for character in str(text))
    return " ".join(printable.split())


def escape_control_characters(text: object) -> str:
    """Return a text with control characters, which a terminal would execute, as escape sequences."""
    return "".join(
        character if character in "\n\t" or not _is_control(character) else ascii(character)[1:-1]
        for character in str(text)
    )


def escape_markdown(text: object) -> str:
    """Escape a text for Markdown: paragraphs, list items, headings and table cells.

    >>> escape_markdown("a|b")
    'a\\\\|b'
    """
    escaped = re.sub(
        r"[\\`*$|\[\]]|<(?=[A-Za-z!/?])|-->|~(?=~)|(?<![^\W_])_+|_+(?![^\W_])", _escape_match, to_single_line(text)
    )
    return re.sub(r"^([#>+=-]|\d+[.)](?=\s|$))", _escape_line_start, escaped)


def markdown_code(text: object) -> str:
    """Return a text as a Markdown code span, which is also valid in a table cell."""
    shown = to_single_line(text).replace("<!--", "<! --").replace("-->", "-- >").replace("|", "\\|")
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", shown)), default=0))
    blank = " " if "`" in shown or not shown else ""
    return f"{fence}{blank}{shown}{blank}{fence}"


def escape_mathtext(text: object, longest: int = 80) -> str:
    """Escape a text for matplotlib, which interprets text between dollar signs as TeX, and shorten it."""
    shown = to_single_line(text)
    shown = shown if len(shown) <= longest else shown[: longest - 1] + "…"
    return shown.replace("$", r"\$")


def _is_control(character: str) -> bool:
    return character in _BIDI_CONTROLS or unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")


def _escape_match(match: "re.Match[str]") -> str:
    if match[0] == "-->":
        return "--\\>"
    return "".join("\\" + character for character in match[0])


def _escape_line_start(match: "re.Match[str]") -> str:
    return match[0][:-1] + "\\" + match[0][-1]
