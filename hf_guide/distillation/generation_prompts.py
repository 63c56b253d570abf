"""Split the batches of a model without an encoder into prompts and references, for generation in evaluation.

Its batch has prompts and answers in one row. `Seq2SeqTrainer` would generate after the answers, and from rows that are padded
on the right.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_guide.errors import OptionError
from hf_guide.models.adapters import is_encoder_decoder
from hf_guide.utils.labels import IGNORE_INDEX


@dataclass(frozen=True)
class Prompts:
    """The prompts of a batch.

    Attributes:
        inputs: The batch with the prompts in place of its texts, padded on the left, and the references as its labels: the
            answers (batch, longest answer), padded with -100.
    """

    inputs: dict[str, Any]

    def generate_kwargs(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments of `generate`, where `max_length` is the length of an answer, as of an encoder-decoder."""
        kwargs = dict(given)
        length = kwargs.pop("max_length", None)
        return kwargs if length is None else {"max_new_tokens": length, **kwargs}

    def answers(self, generated: Tensor) -> Tensor:
        """Return what was generated after the prompts."""
        return generated[:, self.inputs["input_ids"].shape[1] :]


def split_prompts(inputs: Mapping[str, Any], model: Any) -> Prompts | None:
    """Return the prompts of a batch; None for a model with an encoder, which reads them as they are.

    A row's answer is its last targets without a gap, its prompt what is before them: the turns of a conversation up to the
    last of the assistant's, or the prompt of a completion. A row without targets is a prompt.

    Args:
        inputs: Of the model, with `input_ids` (batch, length) and perhaps `labels`; images belong to the prompts.
        model: The student.

    Raises:
        OptionError: A row has no prompt before its targets, or several texts.
    """
    ids = inputs.get("input_ids")
    if is_encoder_decoder(model) or not isinstance(ids, Tensor):
        return None
    if inputs.get("position_ids") is not None:
        raise OptionError(
            "predict_with_generate needs one conversation a row, and the rows have position_ids, as packed ones do. Leave "
            "packing out."
        )
    attended = torch.ones_like(ids) if inputs.get("attention_mask") is None else inputs["attention_mask"]
    labels = inputs.get("labels")
    targets = torch.zeros_like(ids, dtype=torch.bool) if labels is None else labels != IGNORE_INDEX
    prompts, answers = [], []
    for row, real in enumerate(attended.bool()):
        start, stop = _last_run(targets[row])
        chosen = real & (torch.arange(len(real), device=real.device) < start) if stop else real
        if not bool(chosen.any()):
            raise OptionError(
                "predict_with_generate needs prompts, and every token of a row is a target. Set assistant_only_loss for "
                "conversations, or give the dataset prompts and completions."
            )
        prompts.append(chosen.nonzero().squeeze(1))
        answers.append(ids[row][start:stop])
    made, pad = dict(inputs), model.config.get_text_config(decoder=True).pad_token_id or 0
    for name, value in inputs.items():
        if isinstance(value, Tensor) and value.shape == ids.shape and name != "labels":
            rows = [value[row][chosen] for row, chosen in enumerate(prompts)]
            made[name] = _padded_left(rows, pad if name == "input_ids" else 0)
    made["attention_mask"] = _padded_left([torch.ones_like(chosen) for chosen in prompts])
    if labels is not None:
        made["labels"] = torch.nn.utils.rnn.pad_sequence(answers, batch_first=True, padding_value=IGNORE_INDEX)
    return Prompts(made)


def generation_step(
    trainer: Any,
    step: Callable[..., tuple[Any, Any, Any]],
    model: Any,
    inputs: Mapping[str, Any],
    prediction_loss_only: bool,
    ignore_keys: "list[str] | None" = None,
    **gen_kwargs: Any,
) -> tuple[Any, Any, Any]:
    """Return what `Seq2SeqTrainer.prediction_step`, given as `step`, does: of a model without an encoder on the prompts.

    Raises:
        OptionError: As `split_prompts`.
    """
    prompts = split_prompts(inputs, trainer.unwrapped_student)
    if prompts is None:
        return step(model, inputs, prediction_loss_only, ignore_keys, **gen_kwargs)
    kwargs = prompts.generate_kwargs(gen_kwargs or getattr(trainer, "_gen_kwargs", {}))
    loss, generated, labels = step(model, prompts.inputs, prediction_loss_only, ignore_keys, **kwargs)
    return loss, prompts.answers(generated), labels


def _last_run(targets: Tensor) -> tuple[int, int]:
    """Return the first position of the last targets without a gap, and the position after them; (0, 0) without any."""
    positions = targets.nonzero().squeeze(1)
    if not len(positions):
        return 0, 0
    stop = int(positions[-1]) + 1
    before = (~targets[:stop]).nonzero().squeeze(1)
    return (int(before[-1]) + 1 if len(before) else 0), stop


def _padded_left(rows: list[Tensor], value: int = 0) -> Tensor:
    """Return rows (batch, longest), padded at the beginning, where nothing is attended."""
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value, padding_side="left")
