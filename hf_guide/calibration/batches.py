"""Batches of calibration data: dicts of tensors as the teacher's forward pass takes them; their rows, tokens and checks."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from hf_guide.errors import OptionError
from hf_guide.models.positions import text_positions
from hf_guide.models.targets import num_frames
from hf_guide.tasks import Task, task_of_class_name
from hf_guide.teachers.processors import num_token_rows

Batch = dict[str, Tensor]
DEFAULT_PATCH_SIDE = 16
CONTEXT, HASH_FACTOR = 8, 6364136223846793005
_MASKS = {"input_ids": "attention_mask", "decoder_input_ids": "decoder_attention_mask"}
_TEXT_INPUTS = {*_MASKS, *_MASKS.values(), "position_ids", "token_type_ids"}


def num_rows(batch: Batch) -> int | None:
    """Return how many examples a batch has; None where a row is not an example, as of patches of several images.

    Example:
        >>> num_rows({"input_ids": torch.zeros(8, 16)})
        8
    """
    lengths = {len(value) for value in batch.values()}
    return lengths.pop() if len(lengths) == 1 else None


def first_rows(batch: Batch, rows: int | None) -> Batch:
    """Return the first rows of a batch; the whole batch if `rows` is None, or if a row is not an example.

    Example:
        >>> first_rows({"input_ids": torch.zeros(8, 16)}, 3)["input_ids"].shape
        torch.Size([3, 16])
    """
    return batch if rows is None or num_rows(batch) is None else {name: value[:rows] for name, value in batch.items()}


def iter_rows(batch: Batch) -> Iterator[Batch]:
    """Yield a batch's rows, each as a batch of one; the whole batch where a row is not an example."""
    count = num_rows(batch)
    if count is None:
        yield batch
        return
    for index in range(count):
        yield {name: value[index : index + 1] for name, value in batch.items()}


def first_tokens(batch: Batch, tokens: int) -> Batch:
    """Return a batch with the first tokens of each row alone; the whole batch if it is more than text or padded on the left.

    Example:
        >>> first_tokens({"input_ids": torch.zeros(8, 16)}, 3)["input_ids"].shape
        torch.Size([8, 3])
    """
    ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    is_text = ids is not None and all(
        name in _TEXT_INPUTS and value.ndim == 2 and value.shape == ids.shape for name, value in batch.items()
    )
    if not is_text or (mask is not None and not mask[:, 0].all()):
        return batch
    return {name: value[:, :tokens] for name, value in batch.items()}


def has_sounds(batch: Batch) -> bool:
    """Return whether a batch is of waveforms or spectrograms.

    Example:
        >>> has_sounds({"input_values": torch.zeros(2, 16000)})
        True
    """
    return bool({"input_values", "input_features"} & batch.keys()) and "input_ids" not in batch


def count_tokens(batch: Batch, model: PreTrainedModel) -> int:
    """Return the number of tokens of a batch; an image counts as its patches, and a sound as its frames."""
    frames = _count_frames(batch, model) if has_sounds(batch) else None
    if frames is not None:
        return int(frames.sum())
    mask = padding_mask(batch)
    if mask is not None:
        return int(mask.sum())
    if "input_ids" in batch:
        return batch["input_ids"].numel()
    first = next(iter(batch.values()))
    if first.ndim == 4:
        patch = _patch_side(model.config)
        return first.shape[0] * (first.shape[-2] // patch) * (first.shape[-1] // patch)
    return first.shape[0] * (first.shape[1] if first.ndim > 1 else 1)


def count_rows(batch: Batch, tokens: float, model: PreTrainedModel, *, of_decoder: bool = False) -> int | None:
    """Return how many of a batch's first rows have that many tokens, at least one; None if a row is not an example.

    Args:
        batch: The inputs.
        tokens: The number of tokens.
        model: Of which they are the inputs.
        of_decoder: Whether those of an encoder-decoder's decoder count.

    Example:
        >>> from transformers import LlamaConfig, LlamaModel
        >>> model = LlamaModel(LlamaConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1))
        >>> count_rows({"input_ids": torch.zeros(8, 16)}, 40, model)
        3
    """
    rows = num_rows(batch)
    if rows is None:
        return None
    if of_decoder and "decoder_input_ids" in batch:
        mask = padding_mask(batch, "decoder_input_ids")
        lengths = (torch.ones_like(batch["decoder_input_ids"]) if mask is None else mask).sum(1)
    else:
        lengths = torch.tensor([count_tokens(row, model) for row in iter_rows(batch)])
    return min(rows, int((lengths.cumsum(0) < tokens).sum()) + 1)


def _count_frames(batch: Batch, model: PreTrainedModel) -> Tensor | None:
    """Return how many frames the model makes of each sound, (rows,), padding excluded; None where it does not state it."""
    sounds, mask = batch.get("input_values", batch.get("input_features")), batch.get("attention_mask")
    assert sounds is not None
    # A spectrogram is (rows, frames, bands), and Whisper's (rows, bands, frames), of which it runs those of padding too.
    is_transposed = sounds.ndim == 3 and sounds.shape[1] == getattr(model.config, "num_mel_bins", None)
    if mask is not None and not is_transposed and mask.shape == sounds.shape[:2]:
        return num_frames(model, mask.sum(1))
    return num_frames(model, torch.full((len(sounds),), sounds.shape[2 if is_transposed else 1]))


def frame_padding_mask(batch: Batch, model: PreTrainedModel) -> Tensor | None:
    """Return which frames of sounds are not padding, (rows, frames); None of other batches, or where there is no padding.

    Args:
        batch: The inputs. Their mask is one of samples, or of the vectors of a spectrogram.
        model: Of which they are the inputs.
    """
    mask = batch.get("attention_mask")
    if not has_sounds(batch) or mask is None or bool(mask.all()):
        return None
    lengths = _count_frames(batch, model)
    total = num_frames(model, torch.tensor(mask.shape[-1]))
    return None if lengths is None or total is None else torch.arange(int(total)) < lengths[:, None]


def padding_mask(batch: Batch, ids: str = "input_ids") -> Tensor | None:
    """Return which tokens are not padding, (rows, length), of several choices (rows * choices, length); None without a mask.

    A mask of four axes states which tokens each token attends to.

    Args:
        batch: The inputs.
        ids: The ids that it is of, "input_ids" or "decoder_input_ids".

    Example:
        >>> padding_mask({"input_ids": torch.zeros(1, 2), "attention_mask": torch.tensor([[1, 0]])})
        tensor([[1, 0]])
    """
    mask = batch.get(_MASKS[ids])
    return None if mask is None or mask.ndim > 3 else mask.reshape(-1, mask.shape[-1])


def unpadded_ids(batch: Batch) -> Tensor:
    """Return the token ids of a batch without its padding, (tokens,).

    Example:
        >>> unpadded_ids({"input_ids": torch.tensor([[5, 6, 0]]), "attention_mask": torch.tensor([[1, 1, 0]])})
        tensor([5, 6])
    """
    ids, mask = batch["input_ids"].flatten(), padding_mask(batch)
    return ids if mask is None else ids[mask.flatten().bool()]


def count_contexts(batches: Iterable[Batch]) -> int | None:
    """Return how many tokens of all batches differ in themselves or in one of the seven before them.

    Hidden states of tokens that do not differ are nearly the same, and a fit learns nothing from the second. None where they
    depend on more than text, as on an image.

    Example:
        >>> count_contexts([{"input_ids": torch.arange(32).expand(4, 32)}])
        32
    """
    hashes: list[Tensor] = []
    for batch in batches:
        if not batch.keys() <= _TEXT_INPUTS:
            return None
        for name in _MASKS.keys() & batch.keys():
            ids = batch[name].reshape(-1, batch[name].shape[-1]).long()
            padded, mask = torch.nn.functional.pad(ids + 1, (CONTEXT - 1, 0)), padding_mask(batch, name)
            hashed = torch.zeros_like(ids)
            for start in range(CONTEXT):
                hashed = hashed * HASH_FACTOR + padded[:, start : start + ids.shape[-1]]  # wraps around
            hashes.append(hashed.flatten() if mask is None else hashed[mask.bool()])
    return len(torch.cat(hashes).unique()) if hashes else None


def _patch_side(config: PreTrainedConfig) -> int:
    """Return the side of an image's patch: of SegFormer's first stage, and 16 pixels where a config has none."""
    patch = getattr(config, "patch_size", None)
    if isinstance(patch, int):
        return patch
    strides = getattr(config, "strides", None)
    return strides[0] if isinstance(strides, (list, tuple)) and strides else DEFAULT_PATCH_SIDE


def check_batch(batch: Batch, model: PreTrainedModel, student: PreTrainedConfig | None = None) -> None:
    """Raise for a batch that the teacher or the student cannot take, before either runs.

    Args:
        batch: The inputs.
        model: The teacher.
        student: The config of the student, which may have fewer positions.

    Raises:
        OptionError: The teacher's embeddings take the place of ids; ids are no whole numbers, or beyond the teacher's table,
            where a GPU would become unusable; a mask has another shape than its ids; a row is longer than the positions.
    """
    for name in batch:
        if name.endswith("inputs_embeds"):
            raise OptionError(
                f"calibration_dataset has {name}, which are of the teacher's width: the student is fitted to the same tokens "
                "with embeddings of its own. Pass input_ids."
            )
    for name, mask_name in _MASKS.items():
        if name in batch:
            _check_ids(name, batch[name], model)
            _check_mask(mask_name, batch.get(mask_name), name, batch[name])
    _check_lengths(batch, model.config, type(model).__name__)
    if student is not None:
        _check_lengths(batch, student, "the student")


def _check_ids(name: str, ids: Tensor, model: PreTrainedModel) -> None:
    check_whole_numbers(name, ids)
    has_choices = task_of_class_name(type(model).__name__) is Task.MULTIPLE_CHOICE
    if ids.ndim != 2 and not (has_choices and ids.ndim == 3):
        raise OptionError(
            f"calibration_dataset has a batch of {name} of the shape {tuple(ids.shape)}, which must be (rows, tokens)."
        )
    rows = num_token_rows(model)
    if rows is None or not ids.numel():
        return
    smallest, largest = int(ids.min()), int(ids.max())
    if smallest < 0 or largest >= rows:
        outside = smallest if smallest < 0 else largest
        raise OptionError(
            f"calibration_dataset has the token id {outside} in {name}, and {type(model).__name__} has tokens 0 to "
            f"{rows - 1}: tokenize with the teacher's own tokenizer, and pad with a token of it."
        )


def check_whole_numbers(name: str, ids: Tensor) -> None:
    """Raise an `OptionError` for token ids that are no whole numbers, which a conversion would make other tokens."""
    if ids.is_floating_point() or ids.is_complex() or ids.dtype is torch.bool:
        raise OptionError(
            f"calibration_dataset has {name} of {ids.dtype}: token ids are whole numbers. Tokenize it again, or convert them."
        )


def _check_mask(name: str, mask: Tensor | None, ids_name: str, ids: Tensor) -> None:
    """Raise for a mask of another shape than its ids; one of four axes, (rows, heads or 1, tokens, tokens), is the model's."""
    if mask is not None and mask.ndim != 4 and mask.shape != ids.shape:
        raise OptionError(
            f"calibration_dataset has a batch with {name} of the shape {tuple(mask.shape)}, and {ids_name} of "
            f"{tuple(ids.shape)}: they must have the same, or leave out the mask."
        )


def _check_lengths(batch: Batch, config: PreTrainedConfig, model_name: str) -> None:
    positions = text_positions(config)
    for name, max_length in (("input_ids", positions.max_tokens), ("decoder_input_ids", positions.max_target_tokens)):
        if name in batch and max_length is not None and batch[name].shape[-1] > max_length:
            raise OptionError(
                f"calibration_dataset has rows of {batch[name].shape[-1]} tokens in {name}, and {model_name} has {max_length} "
                "positions for them: cut them."
            )
