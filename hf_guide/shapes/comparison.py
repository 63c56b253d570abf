"""How far a student's outputs are from its teacher's: what scores a shape, and what a short distillation lowers.

- Causal language models are scored by the cross-entropy of the text itself.
- Classes, of tokens, examples, frames, pixels, queries or positions: the divergence KL(teacher, student) of each item; of
  independent labels the sum of each label's.
- Real numbers (regression, reconstructed images): the mean squared difference.
- Embeddings and other models without a head: how the cosine similarities of each example to all others differ, as in the
  loss "similarity". Widths need not agree. Hidden states are pooled as the teacher's sentence-transformers folder states, or
  by their mean.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_guide.calibration.data import Batch
from hf_guide.calibration.forward import forward_without_cache
from hf_guide.calibration.held_out_loss import causal_loss, divergence
from hf_guide.errors import OptionError
from hf_guide.initialization.registry import StudentSetup
from hf_guide.initialization.sentence_modules import teacher_sentence_modules
from hf_guide.models.layer_mapping import width_of_config
from hf_guide.models.outputs import last_hidden_state, task_logits
from hf_guide.models.sentence_modules import SENTENCE, TOKENS, Pooling
from hf_guide.models.targets import target_mask
from hf_guide.tasks import OutputKind, Task, output_kind, task_of


class OutputComparison:
    """Compares the outputs of models for the task of a student.

    Args:
        setup: Of the student.

    Raises:
        OptionError: The outputs of the task cannot be compared on calibration data.
    """

    def __init__(self, setup: StudentSetup):
        self.task = task_of(setup.model_class)
        self.kind = output_kind(self.task, setup.config)
        if self.task.row.outputs[0].items == "row":
            raise OptionError(
                f"Shapes of a {setup.model_class.__name__} cannot be scored on calibration data: its outputs are the pairs of "
                "a batch. Let `hf-guide shapes` rank them by its rule, without calibration data, and pass the sizes that it "
                "prints."
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

    def outputs(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        """Return what is compared of a model's outputs for a batch: (items, classes), or embeddings (examples, width).

        Raises:
            OptionError: The examples of a multiple choice have one choice each.
        """
        outputs = forward_without_cache(model, batch)
        mask_name = "decoder_attention_mask" if model.config.is_encoder_decoder else "attention_mask"
        if self.compares_examples:
            features = {TOKENS: last_hidden_state(outputs).float(), "attention_mask": batch.get(mask_name)}
            embeddings: Tensor = self.pooling(features)[SENTENCE]
            return embeddings
        logits = task_logits(self.task, outputs, batch).float()
        if self.task is Task.MULTIPLE_CHOICE and logits.shape[-1] < 2:
            raise OptionError(
                "Shapes for multiple choice are scored by how choices are ranked, and a row of calibration_dataset is one "
                "text. Pass batches whose input_ids are (batch, choices, length)."
            )
        mask = target_mask(self.task, batch, shifted=False, model=model).to(logits.device)
        return logits[mask] if mask.shape == logits.shape[:-1] else logits.flatten(0, -2)

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
