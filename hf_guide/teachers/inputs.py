"""Convert batches that were made for a student to what a teacher expects.

A batch follows the conventions of its processor and of the student's config. A teacher may have others: how pixels are
normalised, which token pads, what its decoder starts with, how long a text may be. Each is compared before the first step,
converted where the conversion is exact, and an error otherwise.
"""

import contextlib
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from hf_guide.errors import TeacherError
from hf_guide.models.adapters import forward_parameters, without_adapter
from hf_guide.models.positions import TextPositions, max_input_tokens, position_padding_token, text_positions
from hf_guide.tasks import Task
from hf_guide.teachers.processors import PixelConversion, SoundConversion, check_processors, num_token_rows
from hf_guide.teachers.retokenization import Retokenizer, attached_retokenizer
from hf_guide.utils.labels import IGNORE_INDEX, decoder_ids_from_labels


@dataclass(frozen=True)
class TeacherInputs:
    """Converts batches to what one teacher expects.

    Attributes:
        teacher: The model, without wrappers.
        name: The teacher's, for errors.
        task: Of both models.
        student: The student, without wrappers; None where there is none, as in a capture.
        pad_token: The tokenizer's padding token, where there is no student whose config has it.
        pixels: Converts pixels to the teacher's normalisation; None where it is the same.
        pair_separator: The token between two texts, where the teacher distinguishes them by token types that the student's
            tokenizer does not make.
        sounds: Converts waveforms or spectrograms to the teacher's normalisation; None where it is the same.
        retokenizer: Joins pieces to the teacher's tokens, where the batches have a smaller vocabulary; None elsewhere.
    """

    teacher: Any
    name: str
    task: Task
    student: Any = None
    pad_token: int | None = None
    pixels: PixelConversion | None = None
    pair_separator: int | None = None
    sounds: SoundConversion | None = None
    retokenizer: Retokenizer | None = None
    _shifts_alike: list[bool] = field(default_factory=list, repr=False)

    def convert(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Return a batch as the teacher expects it. Inputs that need no change are the same tensors.

        Raises:
            TeacherError: The batch cannot be converted; what it has and what the teacher expects are named.
        """
        converted = dict(inputs)
        if self.pixels is not None and isinstance(converted.get("pixel_values"), Tensor):
            converted["pixel_values"] = self.pixels.apply(converted["pixel_values"])
        if self.sounds is not None and isinstance(converted.get(self.sounds.name), Tensor):
            converted = self.sounds.apply(converted)
        ids = converted.get("input_ids")
        if isinstance(ids, Tensor) and ids.ndim in (2, 3):  # (batch, choices, length) of multiple choice
            if ids.ndim == 2:
                self._check_text(converted, ids)
            else:
                flat = {name: value.flatten(0, 1) for name, value in converted.items() if _has_axes_of(value, ids)}
                self._check_text(flat, flat["input_ids"])
            converted["input_ids"] = self._with_own_padding(ids, converted.get("attention_mask"))
        if self.task.row.targets_in_decoder:
            self._start_decoder(converted)
        return converted

    @contextlib.contextmanager
    def special_tokens(self) -> Iterator[None]:
        """Set the padding and end tokens in the teacher's config to those of the batch, for the duration of the block."""
        config = _text_config(self.teacher)
        names = ["pad_token_id"]
        if self.task is Task.SEQUENCE_CLASSIFICATION and self.teacher.config.is_encoder_decoder:
            names.append("eos_token_id")  # such classifiers use its last position
        previous = {name: getattr(config, name, None) for name in names}
        for name in names:
            value = self._replaced_pad if name == "pad_token_id" and self._replaces_padding else self._token(name)
            if value is not None and value != previous[name]:
                setattr(config, name, value)
        try:
            yield
        finally:
            for name, value in previous.items():
                setattr(config, name, value)

    # Tokens

    def _token(self, name: str) -> int | None:
        """Return the id that a special token has in the batches."""
        if self.student is not None:
            return getattr(_text_config(self.student), name, None)
        return self.pad_token if name == "pad_token_id" else None

    @functools.cached_property
    def _own_pad(self) -> int | None:
        return getattr(_text_config(self.teacher), "pad_token_id", None)

    @functools.cached_property
    def _rows(self) -> int | None:
        return num_token_rows(self.teacher)

    @functools.cached_property
    def _positions(self) -> TextPositions:
        return text_positions(self.teacher.config)

    @functools.cached_property
    def _needed_pads(self) -> tuple[int | None, int | None]:
        """The padding tokens from which student and teacher count positions."""
        return None if self.student is None else position_padding_token(self.student), position_padding_token(
            self.teacher
        )

    @property
    def _replaces_padding(self) -> bool:
        pad = self._token("pad_token_id")
        return self._needed_pads[1] is not None or (pad is not None and self._rows is not None and pad >= self._rows)

    @property
    def _replaced_pad(self) -> int:
        if self._needed_pads[1] is not None:
            return self._needed_pads[1]
        return self._own_pad if self._own_pad is not None else 0

    def _with_own_padding(self, ids: Tensor, mask: Any) -> Tensor:
        if isinstance(mask, Tensor) and mask.shape == ids.shape and self._replaces_padding:
            ids = ids.masked_fill(mask == 0, self._replaced_pad)
        if self._rows is not None and bool((ids >= self._rows).any()):
            raise TeacherError(
                f"The batch has the token {int(ids.max())}, and the teacher {self.name} has tokens 0 to {self._rows - 1}. "
                "Distil from a teacher with the student's vocabulary."
            )
        return ids

    # Texts

    @functools.cached_property
    def _longest(self) -> tuple[int | None, int | None]:
        config = self.teacher.config
        rope = getattr(_text_config(self.teacher), "rope_parameters", None) or {}
        if self._positions.max_tokens is None and rope.get("rope_type", "default") != "default":
            return None, None  # rope scaling extends what the config states
        return max_input_tokens(config), max_input_tokens(config, target=True) if config.is_encoder_decoder else None

    def _check_text(self, inputs: Mapping[str, Any], ids: Tensor) -> None:
        for name, limit in zip(("input_ids", "decoder_input_ids"), self._longest, strict=True):
            tokens = inputs.get(name)
            if limit is None or not isinstance(tokens, Tensor):
                continue
            length = tokens.shape[-1]
            if name == "input_ids" and isinstance(inputs.get("position_ids"), Tensor):  # several texts may be packed
                if self._positions.offset_token is not None:
                    continue
                length = int(inputs["position_ids"].max()) + 1
            if length > limit:
                raise TeacherError(
                    f"The batch has {name} of {length} tokens, and the teacher {self.name} reads at most {limit}. "
                    "Cut the texts to that length."
                )
        mask = inputs.get("attention_mask")
        if not isinstance(mask, Tensor) or mask.shape != ids.shape:
            return
        if inputs.get("position_ids") is None:
            self._check_left_padding(ids, mask)
        if self.task is Task.SEQUENCE_CLASSIFICATION:
            self._check_last_token(ids, mask)
            self._check_pairs(inputs, ids)

    def _check_left_padding(self, ids: Tensor, mask: Tensor) -> None:
        padded = (mask[:, 0] == 0) & mask.bool().any(1)
        if not bool(padded.any()):
            return
        remedy = "Pad on the right (tokenizer.padding_side), or give position_ids."
        if self._positions.shifted_by_left_padding:
            raise TeacherError(
                f"The batch is padded on the left, and the teacher {self.name} counts positions from the start of a "
                f"row, padding included: its texts would not begin at position 0. {remedy}"
            )
        needed = self._needed_pads[0]
        pad = int(ids[padded][0, 0])
        if needed is not None and pad != needed:
            raise TeacherError(
                f"The batch is padded on the left with the token {pad}, and the student counts positions after the "
                f"token {needed}. Set the tokenizer's pad_token to that token. {remedy}"
            )

    def _check_last_token(self, ids: Tensor, mask: Tensor) -> None:
        """Check that no text ends with the teacher's padding token: it would use the logits of the token before.

        Raises:
            TeacherError: One does.
        """
        teacher_pad, batch_pad = self._own_pad, self._token("pad_token_id")
        if (
            teacher_pad is None
            or batch_pad is None
            or teacher_pad == batch_pad
            or self.teacher.config.is_encoder_decoder
        ):
            return
        last = (mask * torch.arange(1, ids.shape[1] + 1, device=ids.device)).argmax(1)
        if bool((ids.gather(1, last[:, None]) == teacher_pad).any()):
            raise TeacherError(
                f"The batch has texts that end with the token {teacher_pad}, which is padding to the teacher {self.name} "
                f"(pad_token_id={teacher_pad}), and not in the batch (pad_token_id={batch_pad}). Give both configs the same "
                "pad_token_id: the one that the teacher was trained with."
            )

    def _check_pairs(self, inputs: Mapping[str, Any], ids: Tensor) -> None:
        if self.pair_separator is None or inputs.get("token_type_ids") is not None:
            return
        if bool(((ids == self.pair_separator).sum(1) > 1).any()):
            raise TeacherError(
                f"The batch has pairs of texts without token_type_ids, by which the teacher {self.name} distinguishes "
                "them. Tokenise with return_token_type_ids=True; the student ignores inputs that it does not take."
            )

    # Decoders

    def _start_decoder(self, inputs: dict[str, Any]) -> None:
        """Replace the decoder inputs by the labels shifted with the teacher's own start token.

        Raises:
            TeacherError: The decoder inputs are not the labels shifted with the student's.
        """
        labels, decoder_ids = inputs.get("labels"), inputs.get("decoder_input_ids")
        if self.student is None or not isinstance(labels, Tensor) or not isinstance(decoder_ids, Tensor):
            return
        if not self._shifts_alike:
            self._shifts_alike.append(self._compare_shifts())
        if self._shifts_alike[0]:
            return
        real = labels != IGNORE_INDEX
        if not torch.equal(decoder_ids_from_labels(labels, self.student)[real], decoder_ids[real]):
            starts = [
                getattr(_text_config(each), "decoder_start_token_id", None) for each in (self.student, self.teacher)
            ]
            raise TeacherError(
                f"The batch has decoder_input_ids that are not its labels shifted by the student's decoder_start_token_id, "
                f"{starts[0]}, and that of the teacher {self.name} is {starts[1]}. Leave decoder_input_ids out: each model "
                "is then given its own."
            )
        inputs["decoder_input_ids"] = decoder_ids_from_labels(labels, self.teacher)

    def _compare_shifts(self) -> bool:
        labels = torch.tensor([[5, 6, 7, 8], [5, 6, IGNORE_INDEX, IGNORE_INDEX]])
        real = labels != IGNORE_INDEX
        shifted = [decoder_ids_from_labels(labels.clone(), each)[real] for each in (self.student, self.teacher)]
        return torch.equal(*shifted)


def build_teacher_inputs(
    teacher: Any,
    task: Task,
    processing_class: Any,
    *,
    student: Any = None,
    init_kwargs: Mapping[str, Any] | None = None,
) -> TeacherInputs:
    """Compare the conventions of a teacher with those of the batches, and return what converts them.

    Args:
        teacher: A loaded model; the processor among its files determines how its inputs are made.
        task: Of both models.
        processing_class: What makes the batches; None where that is not known.
        student: The model that the batches are made for; None in a capture.
        init_kwargs: `from_pretrained`'s, of which those that find files on the Hub are used.

    Raises:
        TeacherError: The batches cannot be converted to a convention of the teacher's; both values are named.
        VocabularyError: The tokenizers have other tokens.
    """
    bare = without_adapter(teacher)
    name = getattr(bare.config, "_name_or_path", "") or type(bare).__name__
    conversion = check_processors(bare, task, name, processing_class, student=student, init_kwargs=init_kwargs)
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    reads_types = "token_type_ids" in forward_parameters(bare)
    return TeacherInputs(
        bare,
        name,
        task,
        None if student is None else without_adapter(student),
        getattr(tokenizer, "pad_token_id", None),
        conversion.pixels,
        conversion.pair_separator if reads_types else None,
        conversion.sounds,
        attached_retokenizer(bare),
    )


def _has_axes_of(value: Any, ids: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape[:3] == ids.shape


def _text_config(model: Any) -> PreTrainedConfig:
    config = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config
