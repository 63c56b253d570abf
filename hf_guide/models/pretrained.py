"""Load configs and tokenizers from a folder or the Hub, with one kind of error for files that cannot be read.

Files may be truncated, of another format, or written by hand. Transformers then raises any of `LOADING_ERRORS`. They become a
`TeacherError` (or an `OptionError` where an option named the files) that names the folder, in one paragraph.
"""

import contextlib
import json
import os
import pickle
import struct
from collections.abc import Iterator, Mapping
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import CONFIG_MAPPING, AutoConfig, AutoTokenizer, PreTrainedConfig
from transformers.utils import cached_file
from transformers.utils.peft_utils import find_adapter_config_file

from hf_guide.errors import HfGuideError, TeacherError, one_paragraph
from hf_guide.models.model_files import NAMED_CHAT_TEMPLATES, PROCESSOR_FILES, check_model_folder, no_such_folder

LOADING_ERRORS = (
    OSError,
    ValueError,  # not JSON, not UTF-8, no model_type; remote code without permission
    TypeError,  # a list or a number where a mapping or a text was expected
    AttributeError,
    KeyError,
    IndexError,
    RuntimeError,  # shapes that do not fit; a broken .bin file
    ZeroDivisionError,  # no heads
    AssertionError,
    ImportError,  # a package that the tokenizer or quantiser needs
    EOFError,
    OverflowError,
    struct.error,  # a cut GGUF file
    pickle.UnpicklingError,  # a .bin file that is not a checkpoint, or would run code
    SafetensorError,
    StrictDataclassError,
)

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt")
_SHARED_HUB_OPTIONS = ("token", "cache_dir", "local_files_only")
"""Keywords of `from_pretrained` that are not about one repository."""
_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
_MAX_BLOCKS = 10_000
"""More than any model has: building a model of so many blocks takes too long even on the meta device."""


@contextlib.contextmanager
def unreadable_as(error_class: type[HfGuideError], what: str) -> Iterator[None]:
    """Convert the errors of unreadable files into `error_class`: `what` and the reason. An HfGuideError is not converted."""
    try:
        yield
    except HfGuideError:
        raise
    except LOADING_ERRORS as error:
        advice = ""
        if isinstance(error, pickle.UnpicklingError):
            advice = (
                " It is a pickle that holds more than tensors, and is not opened, for that could run its code. Convert it to "
                "safetensors where you trust it."
            )
            error_text = "weights only load failed"
        else:
            error_text = one_paragraph(error)
        raise error_class(f"{what}: {error_text}.{advice}".replace("..", ".")) from error


def load_config(
    name: str,
    hub: Mapping[str, Any] | None = None,
    trust: bool = False,
    gguf_file: str | None = None,
    *,
    what: str | None = None,
) -> PreTrainedConfig:
    """Return the config of a folder or Hub id; of an adapter, that of its base model.

    Args:
        name: the folder or Hub id.
        hub: keywords of `from_pretrained`, such as the revision.
        trust: whether the checkpoint's own code may run.
        gguf_file: the GGUF file that contains it.
        what: the beginning of an error's message.

    Raises:
        TeacherError: there is no config, it cannot be read, it needs the checkpoint's own code without permission, or its
            sizes are impossible.
    """
    source = {**(hub or {}), **({"gguf_file": gguf_file} if gguf_file else {})}
    check_model_folder(name)
    with unreadable_as(TeacherError, f"{what or f'The config of {name} cannot be read'}{no_such_folder(name)}"):
        values, _ = PreTrainedConfig.get_config_dict(name, **source)
        if not isinstance(values, dict):
            raise TeacherError(f"The config of {name} cannot be read: it must be a mapping, found {values!r}.")
        _check_entries(values, name)
        base = None if gguf_file or "model_type" in values else _adapter_base_model(name, hub or {})
        if base is not None:
            shared = {key: value for key, value in (hub or {}).items() if key in _SHARED_HUB_OPTIONS}
            try:
                return load_config(base, shared, trust)
            except TeacherError as error:
                raise TeacherError(
                    f"{name} holds an adapter of {base!r}, which cannot be opened. An adapter names a local base model "
                    "without its path: start the command in the directory of that folder, or load the base model and add the "
                    f"adapter with PeftModel.from_pretrained. {error}"
                ) from error
        remote = "AutoConfig" in (values.get("auto_map") or {})
        if remote and not trust and values.get("model_type") not in CONFIG_MAPPING:
            raise remote_code_error(name)
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust, **source)
        _check_sizes(config, name)
        return config


def _adapter_base_model(name: str, hub: Mapping[str, Any]) -> str | None:
    """Return the base model that an adapter names; None where there is no adapter.

    Raises:
        TeacherError: an adapter that names none.
    """
    path = find_adapter_config_file(name, **hub)
    if path is None:
        return None
    with open(path, encoding="utf-8") as file:
        base = json.load(file).get("base_model_name_or_path")
    if not isinstance(base, str) or not base or base == name:
        raise TeacherError(
            f"{name} holds an adapter that does not name its base model. Load the base model, add the adapter with "
            "PeftModel.from_pretrained, and pass the result."
        )
    return base


def remote_code_error(name: str) -> TeacherError:
    """Return the error for a teacher that needs its own code."""
    return TeacherError(
        f"{name} can only be loaded by running the Python code in its repository. Read that code, and pass "
        "trust_remote_code=True if you trust it."
    )


def load_processing_class(
    auto: Any, name: str | os.PathLike[str], *, error_class: type[HfGuideError] = TeacherError, **where: Any
) -> Any:
    """Load a tokenizer or processor with an Auto class.

    Args:
        auto: the class, such as AutoTokenizer.
        name: the folder or Hub id.
        where: keywords of `from_pretrained`.

    Raises:
        TeacherError, or `error_class`: it cannot be read.
    """
    name = os.fspath(name)
    what = f"The tokenizer or processor of {name} cannot be loaded"
    check_model_folder(name, (*PROCESSOR_FILES, NAMED_CHAT_TEMPLATES))
    with unreadable_as(error_class, what):
        try:
            return auto.from_pretrained(name, **where)
        except Exception as error:
            if type(error) is Exception:  # raised by the tokenizers library for a file that it cannot parse
                raise error_class(f"{what}: {one_paragraph(error)}. Fetch tokenizer.json again.") from error
            raise


def find_tokenizer(name: str, **where: Any) -> Any:
    """Return the tokenizer of a model's folder or repository, loaded without remote code.

    None where there is none, or where it needs a package that is not installed, or its own code.

    Raises:
        TeacherError: its files exist and cannot be read.
    """
    hub = {key: value for key, value in where.items() if key != "gguf_file"}
    try:
        files = [
            cached_file(name, file, _raise_exceptions_for_missing_entries=False, **hub) for file in TOKENIZER_FILES
        ]
    except OSError:  # neither a folder nor a repository that can be reached
        return None
    if where.get("gguf_file") is None and not any(files):
        return None
    try:
        return load_processing_class(AutoTokenizer, name, trust_remote_code=False, **where)
    except TeacherError as error:
        if isinstance(error.__cause__, ImportError) or "trust_remote_code" in str(error.__cause__):
            return None
        raise


def _check_entries(values: Mapping[str, Any], name: str) -> None:
    """Check the types of entries that Transformers does not check."""
    for key, kind, expected in (
        ("auto_map", Mapping, "a mapping"),
        ("model_type", str, "a string"),
        ("quantization_config", Mapping, "a mapping"),
        ("id2label", Mapping, "a mapping"),
    ):
        value = values.get(key)
        if value is not None and not isinstance(value, kind):
            raise TeacherError(f"{key} in the config of {name} must be {expected}; found {value!r}. Fetch it again.")
    architectures = values.get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(each, str) for each in architectures):
        raise TeacherError(
            f"architectures in the config of {name} must be a list of names; found {architectures!r}. Fetch it again."
        )


def _check_sizes(config: PreTrainedConfig, name: str) -> None:
    for part in [config, *(each for each in vars(config).values() if isinstance(each, PreTrainedConfig))]:
        for size in _SIZES:
            value = vars(part).get(part.attribute_map.get(size, size))
            if isinstance(value, int) and not isinstance(value, bool) and value < 1:
                raise TeacherError(
                    f"{size} in the config of {name} must be at least 1; found {value}. Fetch it again."
                )
            if size == "num_hidden_layers" and isinstance(value, int) and value > _MAX_BLOCKS:
                raise TeacherError(
                    f"num_hidden_layers in the config of {name} must be at most {_MAX_BLOCKS}; found {value}. Fetch it again."
                )
