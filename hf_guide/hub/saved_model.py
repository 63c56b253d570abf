"""The folder of a saved student: the class that loads it, and the tokenizer or processor that it shares with its teacher.

Does: read a folder's configs; copy and check the teacher's tokenizer and processor files.
Does not: write weights, or read more of them than their sizes and a sample of their values.
"""

import contextlib
import json
import logging
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME

from hf_guide.errors import HfGuideError, TeacherError
from hf_guide.models.code_references import (
    CONFIG_FILES,
    clean_saved_folder,
    has_code_references,
    local_code_references,
)
from hf_guide.models.model_files import (
    NAMED_CHAT_TEMPLATES,
    PROCESSOR_FILES,
    check_model_folder,
    no_such_folder,
    regular_files,
)
from hf_guide.models.sentence_files import MODEL_CONFIG_NAME, MODULES_NAME
from hf_guide.teachers.shards import find_safetensors, read_headers
from hf_guide.utils.fingerprint import tensors_fingerprint
from hf_guide.utils.public_names import public_name

logger = logging.getLogger(__name__)

_PROCESSOR = "processor_config.json"
_TOKENIZER = "tokenizer_config.json"
_PREPROCESSOR = "preprocessor_config.json"

_EXECUTABLE_SUFFIXES = (".py", ".pyc", ".so", ".pkl", ".pickle", ".pt", ".pth", ".bin")


@dataclass(frozen=True)
class SavedModel:
    """The configs of a folder that a student was saved in.

    Attributes:
        config: The model's config; empty for an adapter.
        code: By Auto class, the classes whose code is in the folder.
        processor: Auto class that loads the folder's tokenizer or processor; None if it has none.
        adapter_base: For an adapter, its base model: a Hub id, or the bare name of a folder; None for a model.
        sentence_class: The class of sentence-transformers that loads the folder, "SentenceTransformer" or "CrossEncoder";
            None for a folder without a modules.json.
    """

    config: dict[str, Any]
    code: dict[str, Any]
    processor: str | None
    adapter_base: str | None
    sentence_class: str | None = None

    @classmethod
    def read(cls, folder: Path) -> "SavedModel":
        """Read the configs of a folder, which need not hold a model yet.

        Raises:
            HfGuideError: A config cannot be read.
        """
        config = _read_json(folder / "config.json")
        adapter = _read_json(folder / "adapter_config.json")
        return cls(
            config=config or {},
            code=local_code_references(config or {}, folder),
            processor=_processor_class(folder, config or {}),
            adapter_base=_adapter_base(adapter) if adapter is not None and config is None else None,
            sentence_class=_sentence_class(folder),
        )

    @property
    def stock_class(self) -> str | None:
        """The class that loads the folder: the config names the stock class, for users' own subclasses too."""
        names = self.config.get("architectures")
        names = names if isinstance(names, list) else []
        return next((name for name in names if isinstance(name, str) and name.isidentifier()), None)

    @property
    def code_class(self) -> str | None:
        """The Auto class that loads a model with its own code; None for a stock model."""
        return next((name for name in self.code if name.startswith("AutoModel") and name.isidentifier()), None)


def stored_sizes(folder: Path) -> dict[str, int]:
    """Return the number of values of each floating-point tensor in a folder's weights.

    Empty where there are no weights, or only a pointer to them, as in a repository that was cloned without large files.
    """
    try:
        files = find_safetensors(str(folder), {}) if folder.is_dir() else None
        tensors = read_headers(files or [])
    except TeacherError as error:
        logger.info("The sizes of the student's parameters are not read: %s", error)
        return {}
    return {
        each.key: each.shape.numel() for each in tensors if each.dtype is not None and each.dtype.is_floating_point
    }


def saved_weights_fingerprint(folder: Path) -> str | None:
    """Return a hash of a sample of the values of each tensor in a folder's weights, of a model or an adapter.

    It does not depend on how they are divided into files. None where there are no weights, or only a pointer to them; or both
    a model and an adapter, of which one is left from another student.
    """
    with _saved_tensors(folder) as tensors:
        return _fingerprint_of_files(tensors) if tensors else None


def is_saved_in(model: nn.Module, folder: Path) -> bool:
    """Whether a folder's weights are those that a model has in memory now, as far as the names of its tensors show it."""
    with _saved_tensors(folder) as tensors:
        state = model.state_dict() if tensors else {}
        return (
            bool(tensors)
            and tensors.keys() <= state.keys()
            and (
                tensors_fingerprint((name, state[name]) for name in sorted(tensors)) == _fingerprint_of_files(tensors)
            )
        )


def stores_float16(folder: Path) -> bool:
    """Whether a tensor of a folder's weights is in float16, in which it may have another fingerprint than before the cast."""
    with _saved_tensors(folder) as tensors:
        return any(file.get_slice(name).get_dtype() == "F16" for name, file in tensors.items())


@contextlib.contextmanager
def _saved_tensors(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the open files of a folder's weights by the names of their tensors; empty if the files are ambiguous."""
    tensors: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        try:
            files = find_safetensors(str(folder), {}) if folder.is_dir() else None
            adapter = [str(path) for path in [folder / ADAPTER_SAFE_WEIGHTS_NAME] if path.is_file()]
            opened = [stack.enter_context(safe_open(file, framework="pt")) for file in files or adapter]
            if not (files and adapter):
                tensors = {name: file for file in opened for name in file.keys()}
        except (TeacherError, SafetensorError) as error:
            logger.info("The student's weights are not read: %s", error)
        yield tensors


def _fingerprint_of_files(tensors: dict[str, Any]) -> str:
    return tensors_fingerprint((name, tensors[name].get_tensor(name)) for name in sorted(tensors))


def _processor_class(folder: Path, config: dict[str, Any]) -> str | None:
    """Return the Auto class that loads all of a folder's tokenizer and processor; None if it has none."""
    has_tokenizer, has_preprocessor = ((folder / name).is_file() for name in (_TOKENIZER, _PREPROCESSOR))
    has_both = has_tokenizer and has_preprocessor and config.get("model_type") in PROCESSOR_MAPPING_NAMES
    if (folder / _PROCESSOR).is_file() or has_both:
        return "AutoProcessor"
    if has_tokenizer:
        return "AutoTokenizer"
    return _preprocessor_class(_read_json(folder / _PREPROCESSOR) or {}, config) if has_preprocessor else None


def _preprocessor_class(values: dict[str, Any], config: dict[str, Any]) -> str:
    """Return the Auto class of a preprocessor_config.json: sounds have a feature extractor, as images had once."""
    of_sounds = "feature_extractor_type" in values and config.get("model_type") not in IMAGE_PROCESSOR_MAPPING_NAMES
    return "AutoFeatureExtractor" if of_sounds else "AutoImageProcessor"


def _sentence_class(folder: Path) -> str | None:
    if not (folder / MODULES_NAME).is_file():
        return None
    name = (_read_json(folder / MODEL_CONFIG_NAME) or {}).get("model_type")
    return "CrossEncoder" if name == "CrossEncoder" else "SentenceTransformer"


def copy_tokenizer_files(
    teacher: str,
    folder: Path,
    *,
    gguf_file: str | None = None,
    revision: str | None = None,
    token: str | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Copy the teacher's tokenizer and processor into a student's folder; existing files are not overwritten.

    Only regular files inside the teacher's folder are copied. A tokenizer or processor with its own Python code is saved
    with that code if `trust_remote_code` allows running it; otherwise references to the code are dropped, with a warning.

    Args:
        teacher: Hub id or folder.
        folder: Where the student is saved.
        gguf_file: GGUF file of the teacher that describes its tokenizer, which is then converted.
        revision, token, trust_remote_code: As in `from_pretrained`.
    """
    hub_kwargs: dict[str, Any] = {"revision": revision, "token": token, "trust_remote_code": trust_remote_code}
    if gguf_file:
        from transformers import AutoTokenizer

        AutoTokenizer.from_pretrained(teacher, gguf_file=gguf_file, **hub_kwargs).save_pretrained(folder)
        clean_saved_folder(folder)
        return
    source, patterns = Path(teacher), [*PROCESSOR_FILES, NAMED_CHAT_TEMPLATES]
    if not source.is_dir():
        from huggingface_hub import snapshot_download

        source = Path(snapshot_download(teacher, revision=revision, token=token, allow_patterns=patterns))
    files = [file for file in regular_files(source, patterns) if file.suffix not in _EXECUTABLE_SUFFIXES]
    with_code = [
        file.name for file in files if file.name in CONFIG_FILES and has_code_references(_read_json_or_none(file))
    ]
    for file in files:
        target = folder / file.relative_to(source)
        if not target.exists():
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, target)
    if with_code and trust_remote_code:
        _save_with_code(teacher, folder, with_code, hub_kwargs)
    elif with_code:
        logger.warning(
            "%s of %s refer to Python code of the teacher; the student is saved without it. If the student needs this "
            "tokenizer or processor, read the code and pass trust_remote_code=True.",
            ", ".join(with_code),
            teacher,
        )
    clean_saved_folder(folder)


def check_tokenizer_files(
    teacher: str, *, gguf_file: str | None = None, revision: str | None = None, token: str | None = None
) -> None:
    """Check, before a student is made, that the teacher's tokenizer and processor files are complete JSON.

    Raises:
        TeacherError: A file is truncated or is not a JSON mapping.
    """
    from transformers.utils import cached_file

    from hf_guide.models.pretrained import unreadable_as

    check_model_folder(teacher)
    if gguf_file is not None:
        return
    hub_kwargs: dict[str, Any] = {"revision": revision, "token": token}
    for name in ("tokenizer.json", *CONFIG_FILES):
        with unreadable_as(TeacherError, f"{name} of {teacher} cannot be read{no_such_folder(teacher)}"):
            path = cached_file(teacher, name, _raise_exceptions_for_missing_entries=False, **hub_kwargs)
            if path is not None and not isinstance(json.loads(Path(path).read_text(encoding="utf-8")), dict):
                raise TeacherError(f"{name} of {teacher} must be a JSON mapping. Download it again.")


def _save_with_code(teacher: str, folder: Path, names: list[str], hub_kwargs: dict[str, Any]) -> None:
    """Save the tokenizers and processors of these config files by their own classes, which also saves their code."""
    import transformers

    preprocessor, config = (_read_json(folder / name) or {} for name in (_PREPROCESSOR, "config.json"))
    auto_classes = {
        _PROCESSOR: "AutoProcessor",
        _TOKENIZER: "AutoTokenizer",
        _PREPROCESSOR: _preprocessor_class(preprocessor, config),
    }
    for name, auto_class in auto_classes.items():
        if name in names:
            getattr(transformers, auto_class).from_pretrained(teacher, **hub_kwargs).save_pretrained(folder)


def _read_json(file: Path) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise HfGuideError(f"{file} cannot be read: {error}. Save the student again.") from error
    if not isinstance(values, dict):
        raise HfGuideError(f"{file} must be a JSON mapping; found a {type(values).__name__}. Save the student again.")
    return values


def _read_json_or_none(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return None


def _adapter_base(adapter: dict[str, Any]) -> str:
    return public_name(str(adapter.get("base_model_name_or_path") or "its student"))
