"""The errors hf_guide raises on purpose. All are `ValueError`s, so that a caller need not know them."""

import difflib
from collections.abc import Iterable
from typing import Any


class HfGuideError(ValueError):
    """Base of every error raised on purpose."""


class OptionError(HfGuideError):
    """An option, method or config override that does not exist or cannot be used together with another."""


class ShapeError(HfGuideError):
    """A student shape that cannot be made from this teacher."""


class LayoutError(HfGuideError):
    """A family whose axes are not known, or a layout that does not multiply out to a parameter's real shape."""


class TeacherError(HfGuideError):
    """A teacher that cannot be read: truncated, not finite, quantised, offloaded, or in need of remote code."""


class TaskError(HfGuideError):
    """A model, a batch or a dataset that does not fit the task, or an objective that asks for what is not there."""


class CaptureError(HfGuideError):
    """A capture that cannot be written or read: incomplete, damaged, of another teacher, tokenizer or dataset."""


class MissingRankError(HfGuideError):
    """One of several processes that work together has ended."""


class SubclassError(HfGuideError):
    """Embeddings, labels or a classifier that subclasses cannot be made of, or a projector that does not fit."""


class NotFiniteError(HfGuideError):
    """A loss, a gradient or a weight of the student that is NaN or infinite."""


class VocabularyError(HfGuideError):
    """Two models whose tokens, classes or labels do not mean the same."""


def one_paragraph(error: BaseException) -> str:
    """Return an error's message in one line, after its class's name where the message alone does not say what happened."""
    message = " ".join(str(error).split()).rstrip(".")
    speaks_for_itself = isinstance(error, (OSError, ValueError, ImportError, RuntimeError)) and message
    return message if speaks_for_itself else f"{type(error).__name__}: {message}".rstrip(": ")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `" Did you mean 'x' or 'y'?"`, or an empty string where nothing known is near `word`."""
    near = difflib.get_close_matches(word, list(known), n=3, cutoff=0.6)
    return f" Did you mean {' or '.join(repr(name) for name in near)}?" if near else ""


def refuse_unknown_fields(options: Any, given: Iterable[str]) -> None:
    """Refuse a keyword that is no field of a dataclass of options, where the nearest field can still be named.

    Raises:
        OptionError: names the keyword, and the fields.
    """
    known = list(options.__dataclass_fields__)
    for name in given:
        if name not in known:
            raise OptionError(
                f"{options.__name__} has no {name!r}; expected some of {known}.{did_you_mean(name, known)}"
            )
