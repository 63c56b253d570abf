"""The errors hf_guide raises on purpose. All are `ValueError`s, so that a caller need not know them."""


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
