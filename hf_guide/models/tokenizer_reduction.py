"""Make a tokenizer of some of a fast tokenizer's pieces, of the same class and with the same settings.

Does: rewrite tokenizer.json: pieces, merges, and the ids in its post-processor and padding; load it as a user would.
Does not: choose the pieces (`piece_ranking` does) or touch a model.
"""

import copy
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hf_guide.errors import VocabularyError
from hf_guide.models.piece_ranking import SUPPORTED_MODELS, merge_pair

_TOKENIZER_NAME, _CONFIG_NAME = "tokenizer.json", "tokenizer_config.json"
_KEPT_FILES = (_TOKENIZER_NAME, _CONFIG_NAME, "special_tokens_map.json", "chat_template.jinja")
"""Others state the vocabulary a second time (vocab.json, merges.txt, ...)."""


def tokenizer_spec(tokenizer: Any) -> dict[str, Any]:
    """Return the parsed tokenizer.json of a fast tokenizer.

    Raises:
        VocabularyError: The tokenizer is not a fast one.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not getattr(tokenizer, "is_fast", False):
        raise VocabularyError(
            f"The vocabulary of a {type(tokenizer).__name__} cannot be changed: it must be a fast tokenizer, which has a "
            f"tokenizer.json, with a {', '.join(SUPPORTED_MODELS[:-1])} or {SUPPORTED_MODELS[-1]} model. Leave the vocabulary "
            "at the teacher's, or convert the tokenizer to a fast one."
        )
    return json.loads(backend.to_str())


def reduce_tokenizer(tokenizer: Any, kept_ids: Sequence[int]) -> PreTrainedTokenizerBase:
    """Return a tokenizer with some of another's pieces, in the same order, as `AutoTokenizer` loads it from its files.

    Special and added tokens, the chat template and all settings stay.

    Args:
        tokenizer: A fast tokenizer.
        kept_ids: Ids of the pieces, as `PieceRanking.kept_ids` returns them.

    Raises:
        VocabularyError: A slow tokenizer; the ids leave out an added token; or the files do not load as the same pieces.
    """
    spec = tokenizer_spec(tokenizer)
    new_ids = {old: new for new, old in enumerate(sorted(kept_ids))}
    expected = {token: new_ids[old] for token, old in tokenizer.get_vocab().items() if old in new_ids}
    missing = [token["content"] for token in spec.get("added_tokens", ()) if token["id"] not in new_ids]
    if missing:
        raise VocabularyError(f"The vocabulary must keep all added tokens; found {missing[0]!r} left out.")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer.save_pretrained(folder)
        for file in folder.iterdir():
            if file.name not in _KEPT_FILES and file.is_file():
                file.unlink()
        text = json.dumps(reduce_spec(spec, kept_ids), ensure_ascii=False)
        (folder / _TOKENIZER_NAME).write_text(text, encoding="utf-8")
        _reduce_config(folder / _CONFIG_NAME, new_ids)
        reduced = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    reduced.name_or_path = ""
    reduced.init_kwargs.pop("name_or_path", None)
    if reduced.get_vocab() != expected:
        changed = sorted(set(reduced.get_vocab().items()) ^ set(expected.items()))
        raise VocabularyError(
            f"The reduced tokenizer loads as a {type(reduced).__name__} with other ids than were kept, such as {changed[0]}: "
            f"the vocabulary of {type(tokenizer).__name__} cannot be reduced. Leave vocab_size at the teacher's."
        )
    return reduced


def reduce_spec(spec: Mapping[str, Any], kept_ids: Sequence[int]) -> dict[str, Any]:
    """Return the parsed tokenizer.json with some of its pieces alone, in the same order.

    A merge stays if both of its parts and its result do.
    """
    new_ids = {old: new for new, old in enumerate(sorted(kept_ids))}
    reduced = {**spec, "model": dict(spec["model"])}
    for name in ("added_tokens", "padding", "post_processor"):
        reduced[name] = copy.deepcopy(spec.get(name))
    model = reduced["model"]
    if model["type"] == "Unigram":
        model["vocab"] = [entry for index, entry in enumerate(model["vocab"]) if index in new_ids]
        if model.get("unk_id") is not None:
            model["unk_id"] = new_ids[model["unk_id"]]
    else:
        model["vocab"] = {token: new_ids[old] for token, old in model["vocab"].items() if old in new_ids}
    if "merges" in model:
        pieces = model["vocab"]
        model["merges"] = [
            merge for merge in model["merges"] if {*merge_pair(merge), "".join(merge_pair(merge))} <= pieces.keys()
        ]
    vocab = (
        {piece[0]: index for index, piece in enumerate(model["vocab"])}
        if model["type"] == "Unigram"
        else model["vocab"]
    )
    for token in reduced["added_tokens"] or ():
        token["id"] = new_ids[token["id"]]
    vocab = {**vocab, **{token["content"]: token["id"] for token in reduced["added_tokens"] or ()}}
    if reduced.get("padding"):
        reduced["padding"]["pad_id"] = vocab[reduced["padding"]["pad_token"]]
    _reduce_post_processor(reduced.get("post_processor"), vocab)
    return reduced


def _reduce_post_processor(processor: Any, vocab: Mapping[str, int]) -> None:
    """Replace the ids in a post-processor, in place, and in those that it is a sequence of."""
    if not processor:
        return
    for inner in processor.get("processors", ()):
        _reduce_post_processor(inner, vocab)
    for name in ("sep", "cls"):  # of BERT and RoBERTa
        if name in processor:
            processor[name] = [processor[name][0], vocab[processor[name][0]]]
    special = processor.get("special_tokens", {})
    for entry in special.values() if isinstance(special, dict) else special:
        entry["ids"] = [vocab[token] for token in entry["tokens"]]


def _reduce_config(path: Path, new_ids: Mapping[int, int]) -> None:
    """Replace the ids of added tokens in tokenizer_config.json, where it lists them."""
    config = json.loads(path.read_text(encoding="utf-8"))
    if "added_tokens_decoder" in config:
        added = config["added_tokens_decoder"]
        config["added_tokens_decoder"] = {str(new_ids[int(index)]): token for index, token in added.items()}
    path.write_text(json.dumps(config, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
