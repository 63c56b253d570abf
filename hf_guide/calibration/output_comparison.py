"""How far a model's outputs are from its teacher's, as a score and as what a short distillation lowers.

- Causal language models are scored by the cross-entropy of the text itself.
- Classes, of tokens, examples, frames, pixels, queries or positions: the divergence KL(teacher, student) of each item; of
  independent labels the sum of each label's.
- Real numbers (regression, reconstructed images): the mean squared difference.
- Embeddings and other models without a head: how the cosine similarities of each example to all others differ, as in the
  loss "similarity". Widths need not agree. Hidden states are pooled as the teacher's sentence-transformers folder states, or
  by their mean.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_guide.calibration.batches import Batch, iter_rows, unpadded_ids
from hf_guide.calibration.forward import forward_without_cache
from hf_guide.errors import OptionError
from hf_guide.initialization.registry import StudentSetup
from hf_guide.initialization.sentence_modules import teacher_sentence_modules
from hf_guide.models.layer_mapping import width_of_config
from hf_guide.models.outputs import last_hidden_state, task_logits
from hf_guide.models.sentence_modules import SENTENCE, TOKENS, Pooling
from hf_guide.models.targets import target_mask
from hf_guide.tasks import OutputKind, Task, output_kind, task_of

NUMBERS_AT_A_TIME = 2**20
"""Logits of which a divergence is computed at a time: it takes several copies of them."""


class IncomparableOutputs(OptionError):
    """Outputs of a model that cannot be compared with those of another on calibration data."""


class OutputComparison:
    """Compares the outputs of models for a task.

    Args:
        setup: Of a model of the task, which is that of its class.
        what: What is scored, for errors.
        advice: What can be done where it cannot be, as a sentence.

    Raises:
        IncomparableOutputs: The outputs of the task cannot be compared on calibration data.
    """

    def __init__(self, setup: StudentSetup, *, what: str, advice: str):
        self.what = what
        self.task = task_of(setup.model_class)
        self.kind = output_kind(self.task, setup.config)
        if self.task.row.outputs[0].items == "row":
            raise IncomparableOutputs(
                f"{what} of a {setup.model_class.__name__} cannot be scored on calibration data: its outputs are the pairs of "
                f"a batch. {advice}"
            )
        if self.compares_examples:
            modules = teacher_sentence_modules(setup.source, setup.teacher, setup.model_class, setup.hub)
            layers = () if modules is None else tuple(modules.layers)
            found = [each for each in layers if isinstance(each, Pooling)]
            self.pooling = found[0] if found else Pooling(width_of_config(setup.config) or 0)

    @property
    def compares_examples(self) -> bool:
        """Whether an example's value depends on the others: it is then at least two that are compared."""
        return self.kind is OutputKind.FEATURES

    @property
    def needs_teacher(self) -> bool:
        """Whether a score needs the teacher's outputs."""
        return self.task is not Task.CAUSAL_LM

    def parts(self, batch: Batch) -> list[Batch]:
        """Return what a batch is run as: its rows, whose logits are large, or the whole of it where examples are compared."""
        return [batch] if self.compares_examples else list(iter_rows(batch))

    def outputs(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        """Return what is compared of a model's outputs for a batch: (items, classes), or embeddings (examples, width).

        Raises:
            IncomparableOutputs: The examples of a multiple choice have one choice each.
        """
        outputs = forward_without_cache(model, batch)
        mask_name = "decoder_attention_mask" if model.config.is_encoder_decoder else "attention_mask"
        if self.compares_examples:
            features = {TOKENS: last_hidden_state(outputs).float(), "attention_mask": batch.get(mask_name)}
            embeddings: Tensor = self.pooling(features)[SENTENCE]
            return embeddings
        logits = task_logits(self.task, outputs, batch)
        if self.task is Task.MULTIPLE_CHOICE and logits.shape[-1] < 2:
            raise IncomparableOutputs(
                f"{self.what} for multiple choice are scored by how choices are ranked, and a row of calibration_dataset is "
                "one text. Pass batches whose input_ids are (batch, choices, length)."
            )
        mask = target_mask(self.task, batch, shifted=False, model=model).to(logits.device)
        return (logits[mask] if mask.shape == logits.shape[:-1] else logits.flatten(0, -2)).float()

    def differences(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return how far a student's outputs are from the teacher's, (items,)."""
        if self.compares_examples:
            return similarity_differences(student, teacher)
        if self.kind is OutputKind.REAL:
            return (student - teacher).square().mean(-1)
        if self.kind is OutputKind.BERNOULLI:  # each label as two classes, of which one has the logit 0
            both = (torch.stack([each, torch.zeros_like(each)], -1) for each in (student, teacher))
            return divergence(*both).sum(-1)
        return divergence(student, teacher)

    def check_examples(self, count: int) -> None:
        """Raise where examples are compared with each other, and there is only one.

        Raises:
            IncomparableOutputs: States what to do.
        """
        if self.compares_examples and count < 2:
            raise IncomparableOutputs(
                f"{self.what} of a model of embeddings are scored by how examples compare with each other, and "
                f"calibration_dataset has {count} for it: pass more data."
            )

    def losses(self, outputs: Iterable[Tensor], reference: Sequence[Tensor], parts: Sequence[Batch]) -> Tensor:
        """Return what a model is scored by for parts of batches, (items,).

        Args:
            outputs: The model's, of each part; read one by one.
            reference: The teacher's; not read where `needs_teacher` is false.
            parts: The inputs.
        """
        if not self.needs_teacher:
            return torch.cat([causal_loss(each, part) for each, part in zip(outputs, parts, strict=True)])
        return self.all_differences(outputs, reference)

    def all_differences(self, outputs: Iterable[Tensor], reference: Sequence[Tensor]) -> Tensor:
        """Return how far a model's outputs for parts of batches are from the teacher's, (items,).

        Args:
            outputs: The model's, of each part; read one by one.
            reference: The teacher's.
        """
        if self.compares_examples:
            return self.differences(torch.cat(list(outputs)), torch.cat(list(reference)))
        return torch.cat([self.differences(*pair) for pair in zip(outputs, reference, strict=True)])

    def objective(self, student: Tensor, teacher: Tensor, batch: Batch) -> Tensor:
        """Return what a short distillation lowers, a scalar: the differences; of causal models half of it cross-entropy."""
        loss = self.differences(student, teacher).mean()
        return (loss + causal_loss(student, batch).mean()) / 2 if self.task is Task.CAUSAL_LM else loss


def similarity_differences(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean squared difference of each example's cosine similarities to the others, (examples,).

    Args:
        student, teacher: Embeddings, (examples, width) each; the widths may differ.

    Example:
        >>> similarity_differences(torch.eye(2), torch.ones(2, 5)).round(decimals=3)
        tensor([1., 1.])
    """
    unit = (torch.nn.functional.normalize(each, dim=-1) for each in (student, teacher))
    first, second = (each @ each.T for each in unit)
    return (first - second).square().sum(-1) / max(len(student) - 1, 1)


def causal_loss(logits: Tensor, row: Batch) -> Tensor:
    """Return the cross-entropy of each next token, (tokens,).

    Args:
        logits: (tokens, vocabulary), of the tokens that are not padding.
        row: The inputs of one row.
    """
    targets = unpadded_ids(row)[1:].to(logits.device)
    return torch.nn.functional.cross_entropy(logits[:-1], targets, reduction="none")


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the divergence KL(teacher, student) of each item, in nats, (items,); classes of logit -inf do not count.

    Args:
        student, teacher: Logits, (items, classes).

    Example:
        >>> divergence(torch.zeros(1, 2), torch.tensor([[0.0, 100.0]]))
        tensor([0.6931])
    """
    step = max(1, NUMBERS_AT_A_TIME // max(1, student.shape[-1]))
    parts = zip(student.split(step), teacher.split(step), strict=True)
    return torch.cat([_divergence(*part) for part in parts])


def _divergence(student: Tensor, teacher: Tensor) -> Tensor:
    own, target = student.log_softmax(-1), teacher.log_softmax(-1)
    possible = target > -torch.inf
    difference = torch.where(possible, target, 0) - torch.where(possible, own, 0)
    return (target.exp() * difference).sum(-1)
