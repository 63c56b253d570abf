"""Define the errors that hf_guide raises on purpose. All are subclasses of `ValueError`."""


class HfGuideError(ValueError):
    """Base of every error raised on purpose."""


class OptionError(HfGuideError):
    """An option, method or config override does not exist or conflicts with another."""


class ShapeError(HfGuideError):
    """The student's shape cannot be made from this teacher."""


class LayoutError(HfGuideError):
    """A family's axes are unknown, or a layout does not multiply out to a parameter's shape."""


class TeacherError(HfGuideError):
    """The teacher cannot be read: truncated, not finite, quantised, offloaded, or in need of remote code."""


class ResourceError(HfGuideError):
    """What is asked for does not fit into the memory that is available."""


class TaskError(HfGuideError):
    """A model, batch or dataset does not fit the task, or the objective needs outputs that are missing."""


class CaptureError(HfGuideError):
    """A signal cache cannot be written or read: incomplete, damaged, of another teacher, tokenizer or dataset."""


class MissingRankError(HfGuideError):
    """A process of the distributed group has ended."""


class SubclassError(HfGuideError):
    """Subclasses cannot be made from these embeddings, labels or classifier, or a projector does not fit."""


class NotFiniteError(HfGuideError):
    """A loss, gradient or weight of the student is NaN or infinite."""


class VocabularyError(HfGuideError):
    """The tokens, classes or labels of two models differ in meaning."""


def one_paragraph(error: BaseException) -> str:
    """Return an error's message on one line, prefixed with its class where the message alone is not clear."""
    message = " ".join(str(error).split()).rstrip(".")
    is_clear_alone = isinstance(error, (OSError, ValueError, ImportError, RuntimeError)) and message
    return message if is_clear_alone else f"{type(error).__name__}: {message}".rstrip(": ")
