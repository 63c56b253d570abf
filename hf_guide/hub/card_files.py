"""`README.md` as a file in two hands: the part between our two comments is redrawn, every other word is kept."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import CardData, EvalResult, ModelCard, ModelCardData, RepoCard
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results

from hf_guide.errors import HfGuideError
from hf_guide.initialization.config import Method
from hf_guide.utils.files import atomic_write

CARD_NAME = "README.md"
BEGIN = "<!-- hf_guide:begin -->"
END = "<!-- hf_guide:end -->"
LIBRARY_TAG = "hf_guide"
MODEL_INDEX = "model-index"
_TEXT_KEYS = ("license", "license_name", "license_link", "language", "datasets", "tags", "base_model", "pipeline_tag")


def read_card(path: Path) -> RepoCard | None:
    """Return the card in a file, its metadata as they stand there, or None where there is no file.

    Raises:
        HfGuideError: its text is not UTF-8, or its metadata are not a YAML mapping.
    """
    if not path.is_file():
        return None
    try:
        text = path.read_bytes().decode("utf-8-sig")
        card = RepoCard(text if text.lstrip().startswith("---") else f"---\n{{}}\n---\n{text}")
    except (UnicodeDecodeError, yaml.YAMLError, ValueError) as error:
        raise HfGuideError(
            f"The model card {path} cannot be read: {error}. Mend the metadata between its two lines of dashes, or "
            "move the file away to get a new one."
        ) from error
    for key in _TEXT_KEYS:
        if any(isinstance(value, (Mapping, list)) for value in as_list(card.data.get(key))):
            raise HfGuideError(
                f"The metadata of the model card {path} cannot be read: {key} must be a text or a list of texts, found "
                f"{card.data.get(key)!r}. Change it, or move the file away to get a new one."
            )
    return card


def write_card(path: Path, card: RepoCard) -> None:
    """Write a card, whole or not at all: what stood there may be someone's work."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as partial:
        partial.write_bytes(str(card).encode("utf-8"))


def is_default_template(card: RepoCard | None) -> bool:
    """Whether a card says nothing of anyone's: the Hub's template, with which PEFT saves every adapter."""
    blank = ModelCard.from_template(ModelCardData()).text.strip()
    return card is not None and card.text.strip().startswith(blank)


def replace_section(text: str, part: str, path: Path) -> str:
    """Return a card's text with our part in it: in the place of an older one, or at the end.

    Args:
        text: what the card says below its metadata.
        part: from one comment to the other, both included.
        path: the card's, for the error.

    Raises:
        HfGuideError: the text has one of the two comments without the other after it.
    """
    if "\r\n" in text:
        part = part.replace("\n", "\r\n")
    begin = text.find(BEGIN)
    end = text.find(END, max(begin, 0))
    if (begin < 0) != (end < 0) or END in text[: max(begin, 0)]:
        raise HfGuideError(
            f"{path} has only one of the comments {BEGIN} and {END}, or has them in the wrong order, so what may be "
            "redrawn cannot be told from what is to be kept. Put the other one back, or remove both and the part's text."
        )
    if begin < 0:
        line = "\r\n" if "\r\n" in text else "\n"
        return f"{text.rstrip()}{line * 2}{part}{line}" if text.strip() else f"{line}{part}{line}"
    return text[:begin] + part + text[end + len(END) :]


def extract_section(text: str) -> str:
    """Return our part of a text that has one, both comments included."""
    return text[text.index(BEGIN) : text.index(END) + len(END)]


def card_title(card: RepoCard | None) -> str | None:
    """Return the first heading of a card."""
    lines = card.text.splitlines() if card is not None else []
    return next((line[2:].strip() for line in lines if line.startswith("# ")), None)


def merge_metadata(
    data: CardData, *, ours: Mapping[str, Any], added: Mapping[str, Iterable[str]], defaults: Mapping[str, Any]
) -> None:
    """Change a card's metadata in place.

    Args:
        ours: replace what stands there, except where they are None.
        added: join the lists that stand there.
        defaults: take the places that are empty.
    """
    for key, value in ours.items():
        if value:
            data[key] = value
    for key, value in defaults.items():
        if value and not data.get(key):
            data[key] = value
    for key, values in added.items():
        values, known = list(values), as_list(data.get(key))
        if key == "tags" and LIBRARY_TAG in known:  # an earlier part was ours, and may have told of another method
            outdated = {method.value for method in Method} - set(values)
            known = [tag for tag in known if tag not in outdated]
        joined = list(dict.fromkeys([*known, *values]))
        if joined:
            data[key] = joined


def merge_results(data: CardData, results: Sequence[EvalResult], model_id: str) -> list[EvalResult]:
    """Put results into a card's metadata, each in the place of an older one of the same metric, and return all of them.

    An index that the Hub's own parser does not understand is left as it is.
    """
    index = data.get(MODEL_INDEX)
    known: list[EvalResult] = []
    if index:
        try:
            model_id, known = model_index_to_eval_results(index)
        except (KeyError, TypeError, AttributeError, ValueError):
            return list(results)
    kept = [old for old in known if not any(new.is_equal_except_value(old) for new in results)]
    merged = [*kept, *results]
    if merged:
        data[MODEL_INDEX] = eval_results_to_model_index(model_id, merged)
    return merged


def as_list(value: Any) -> list[Any]:
    """Return what metadata hold as one word, as a list or not at all, as a list."""
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]
