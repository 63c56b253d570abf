"""What a teacher expects of its inputs, and how a batch that was made for a student becomes that.

A batch follows the conventions of the processor that made it and of the student's config. A teacher may have others: how
pixels are normalised, which token pads, what its decoder starts with, how long a text may be. Each is compared before the
first step, converted where that is exact, and refused otherwise.
"""

import contextlib
import dataclasses
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
from hf_guide.teachers.processors import PixelConversion, check_processors, num_token_rows
from hf_guide.utils.labels import IGNORE_INDEX, decoder_ids_from_labels


@dataclass(frozen=True)
class TeacherInputs:
    """How batches become what one teacher expects.

    Attributes:
        teacher: the model, without what wraps it.
        name: the teacher's, for errors.
        task: of both models.
        student: the student, without what wraps it; None where there is none, as in a capture.
        pad_token: the tokenizer's padding token, where there is no student whose config has it.
        pixels: how pixels become normalised as the teacher expects; None where they are.
        pair_separator: the token that separates two texts, where the teacher tells them apart by token types that the
            student's tokenizer does not make.
    """

    teacher: Any
    name: str
    task: Task
    student: Any = None
    pad_token: int | None = None
    pixels: PixelConversion | None = None
    pair_separator: int | None = None
    _shifts_alike: list[bool] = field(default_factory=list, repr=False)

    def for_pair(self, student: Any, teacher: Any) -> "TeacherInputs":
        """Return the same for another student, as of the next trial of a search, and for the teacher where it was placed."""
        pair = {"student": without_adapter(student), "teacher": without_adapter(teacher)}
        return dataclasses.replace(self, **pair, _shifts_alike=[])

    def convert(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Return a batch as the teacher expects it. What needs no change is the same tensor.

        Raises:
            TeacherError: it cannot be; names what the batch has and what the teacher expects.
        """
        found = dict(inputs)
        if self.pixels is not None and isinstance(found.get("pixel_values"), Tensor):
            found["pixel_values"] = self.pixels.apply(found["pixel_values"])
        ids = found.get("input_ids")
        if isinstance(ids, Tensor) and ids.ndim == 2:
            self._check_text(found, ids)
            found["input_ids"] = self._with_own_padding(ids, found.get("attention_mask"))
        if self.task.row.targets_in_decoder:
            self._start_decoder(found)
        return found

    @contextlib.contextmanager
    def special_tokens(self) -> Iterator[None]:
        """Let the teacher find padding and ends in a batch by the ids that they have there, for as long as it runs."""
        config = _text_config(self.teacher)
        names = ["pad_token_id"]
        if self.task is Task.SEQUENCE_CLASSIFICATION and self.teacher.config.is_encoder_decoder:
            names.append("eos_token_id")  # such classifiers read the last of them
        before = {name: getattr(config, name, None) for name in names}
        for name in names:
            value = self._replaced_pad if name == "pad_token_id" and self._replaces_padding else self._token(name)
            if value is not None and value != before[name]:
                setattr(config, name, value)
        try:
            yield
        finally:
            for name, value in before.items():
                setattr(config, name, value)

    # Tokens

    def _token(self, name: str) -> int | None:
        """Return the id of a special token in the batches."""
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
        """The tokens by which student and teacher count positions."""
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
                "Distil from a teacher that has the student's tokens."
            )
        return ids

    # Texts

    @functools.cached_property
    def _longest(self) -> tuple[int | None, int | None]:
        config = self.teacher.config
        rope = getattr(_text_config(self.teacher), "rope_parameters", None) or {}
        if self._positions.max_tokens is None and rope.get("rope_type", "default") != "default":
            return None, None  # scaled to be longer than the config states
        return max_input_tokens(config), max_input_tokens(config, target=True) if config.is_encoder_decoder else None

    def _check_text(self, inputs: Mapping[str, Any], ids: Tensor) -> None:
        for name, limit in zip(("input_ids", "decoder_input_ids"), self._longest, strict=True):
            tokens = inputs.get(name)
            if limit is None or not isinstance(tokens, Tensor):
                continue
            length = tokens.shape[-1]
            if name == "input_ids" and isinstance(inputs.get("position_ids"), Tensor):  # texts may lie end to end
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
                f"The batch is padded on the left, and the teacher {self.name} counts positions from the first place of a "
                f"row, padding or not: its texts would begin at another position than 0. {remedy}"
            )
        needed = self._needed_pads[0]
        found = int(ids[padded][0, 0])
        if needed is not None and found != needed:
            raise TeacherError(
                f"The batch is padded on the left with the token {found}, and the student counts positions from one after "
                f"the token {needed}. Set the tokenizer's pad_token to that token. {remedy}"
            )

    def _check_last_token(self, ids: Tensor, mask: Tensor) -> None:
        """Refuse texts whose last token is padding to the teacher: it would have read the token before."""
        own, here = self._own_pad, self._token("pad_token_id")
        if own is None or here is None or own == here or self.teacher.config.is_encoder_decoder:
            return
        last = (mask * torch.arange(1, ids.shape[1] + 1, device=ids.device)).argmax(1)
        if bool((ids.gather(1, last[:, None]) == own).any()):
            raise TeacherError(
                f"The batch has texts that end with the token {own}, which is padding to the teacher {self.name} "
                f"(pad_token_id={own}), and not in the batch (pad_token_id={here}). Give both configs the same "
                "pad_token_id: the one that the teacher was trained with."
            )

    def _check_pairs(self, inputs: Mapping[str, Any], ids: Tensor) -> None:
        if self.pair_separator is None or inputs.get("token_type_ids") is not None:
            return
        if bool(((ids == self.pair_separator).sum(1) > 1).any()):
            raise TeacherError(
                f"The batch has pairs of texts without token_type_ids, by which the teacher {self.name} tells the second from "
                "the first. Tokenise with return_token_type_ids=True; the student is not fed what it does not take."
            )

    # Decoders

    def _start_decoder(self, inputs: dict[str, Any]) -> None:
        """Give the teacher's decoder the labels shifted by its own start token, in place of the student's."""
        labels, given = inputs.get("labels"), inputs.get("decoder_input_ids")
        if self.student is None or not isinstance(labels, Tensor) or not isinstance(given, Tensor):
            return
        if not self._shifts_alike:
            self._shifts_alike.append(self._compare_shifts())
        if self._shifts_alike[0]:
            return
        real = labels != IGNORE_INDEX
        if not torch.equal(decoder_ids_from_labels(labels, self.student)[real], given[real]):
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
    """Return how batches become what a teacher expects.

    Args:
        teacher: a loaded model; what lies beside its files says how its inputs are to be processed.
        task: of both models.
        processing_class: what the batches are made with; None where that is not known.
        student: whom the batches are for; None in a capture.
        init_kwargs: `from_pretrained`'s, of which those that find files on the Hub are used.

    Raises:
        TeacherError: a convention of the teacher's processor or tokenizer that its batches cannot be converted to; names both
            values.
        VocabularyError: a tokenizer with other tokens.
    """
    bare = without_adapter(teacher)
    name = getattr(bare.config, "_name_or_path", "") or type(bare).__name__
    found = check_processors(bare, task, name, processing_class, student=student, init_kwargs=init_kwargs)
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    reads_types = "token_type_ids" in forward_parameters(bare)
    return TeacherInputs(
        bare,
        name,
        task,
        None if student is None else without_adapter(student),
        getattr(tokenizer, "pad_token_id", None),
        found.pixels,
        found.pair_separator if reads_types else None,
    )


def _text_config(model: Any) -> PreTrainedConfig:
    config = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config
