"""What the files of a saved student say of it: which class loads it, with which tokenizer or processor, upon what."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_guide.errors import HfGuideError
from hf_guide.models.code_references import local_code_references
from hf_guide.utils.public_names import public_name

# The file by which a folder shows that it holds a tokenizer or processor, and the class that loads it.
PROCESSOR_CLASSES = {
    "processor_config.json": "AutoProcessor",
    "tokenizer_config.json": "AutoTokenizer",
    "preprocessor_config.json": "AutoImageProcessor",
}


@dataclass(frozen=True)
class SavedModel:
    """A folder that a student was saved in.

    Attributes:
        config: the whole model's; of an adapter's folder nothing.
        code: the classes, by Auto class, whose code stands beside the weights.
        processor: the class that loads its tokenizer or processor, where there is one.
        adapter_base: of an adapter's folder, what it belongs to: an id, or the bare name of a folder.
    """

    config: dict[str, Any]
    code: dict[str, Any]
    processor: str | None
    adapter_base: str | None

    @classmethod
    def read(cls, folder: Path) -> "SavedModel":
        """Read what is there; a folder may hold no model yet.

        Raises:
            HfGuideError: a config that cannot be read.
        """
        config = _read_json(folder / "config.json")
        adapter = _read_json(folder / "adapter_config.json")
        return cls(
            config=config or {},
            code=local_code_references(config or {}, folder),
            processor=next((name for file, name in PROCESSOR_CLASSES.items() if (folder / file).is_file()), None),
            adapter_base=_adapter_base(adapter) if adapter is not None and config is None else None,
        )

    @property
    def stock_class(self) -> str | None:
        """The class that loads the folder: its config names the stock one, also of a student of one's own class."""
        names = self.config.get("architectures")
        names = names if isinstance(names, list) else []
        return next((name for name in names if isinstance(name, str) and name.isidentifier()), None)

    @property
    def code_class(self) -> str | None:
        """The Auto class that loads a folder with code of its own; None of a stock model's."""
        return next((name for name in self.code if name.startswith("AutoModel") and name.isidentifier()), None)


def _read_json(file: Path) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise HfGuideError(f"{file} cannot be read: {error}. Save the student again.") from error
    if not isinstance(values, dict):
        raise HfGuideError(
            f"{file} must be a mapping in JSON; found a {type(values).__name__}. Save the student again."
        )
    return values


def _adapter_base(adapter: dict[str, Any]) -> str:
    return public_name(str(adapter.get("base_model_name_or_path") or "its student"))
