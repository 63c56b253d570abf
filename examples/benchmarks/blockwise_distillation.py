"""Healing, tried as an arm of `initialization_comparison.py`: a calibrated student's blocks regressed on the teacher's stream.

Each block learns by itself, by Adam, from what the student's own stream brings it (no gradient goes further back) to make
of each token what the teacher has where the student's next block begins, carried through M; squared error in units of the
wanted vector's own length. One step costs one pass of the teacher and one forward and backward of the student, so as
much as a step of distillation: the tokens it uses are taken from the arm's budget.
"""

import math

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel

LEARNING_RATE = 1e-3


def carrying_matrix(teacher: LlamaForCausalLM, carried: PreTrainedModel) -> Tensor:
    """Return M, (d_T, d_S), of a student whose embedding table is the teacher's times M and nothing else."""
    table, own = (model.get_input_embeddings().weight.detach().double() for model in (teacher, carried))
    return torch.linalg.lstsq(table, own).solution.float()


def heal(
    student: PreTrainedModel, teacher: LlamaForCausalLM, matrix: Tensor, layers: list[int], batches: list[Tensor]
) -> list[float]:
    """Regress each of a student's blocks on the teacher's stream, a step a batch; return the mean loss of each step.

    Args:
        matrix: (d_T, d_S), from the teacher's stream to the student's.
        layers: which of the teacher's blocks each of the student's comes from, ascending.
        batches: token ids, (batch, length).
    """
    blocks = student.get_decoder().layers
    optimizer = torch.optim.AdamW(blocks.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    warm = max(1, len(batches) // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: (step + 1) / warm if step < warm else 0.5 + 0.5 * math.cos(math.pi * step / len(batches)),
    )
    made: list[Tensor] = []
    hooks = [block.register_forward_pre_hook(lambda _, args: (args[0].detach(), *args[1:])) for block in blocks]
    hooks += [block.register_forward_hook(lambda _, args, output: made.append(output)) for block in blocks]
    seen: list[Tensor] = []  # the teacher's stream behind each block; its own hidden_states end with the normed one
    hooks += [
        block.register_forward_hook(lambda _, args, output: seen.append(output)) for block in teacher.model.layers
    ]
    ends = [*(layer - 1 for layer in layers[1:]), len(teacher.model.layers) - 1]
    losses = []
    for batch in batches:
        made.clear()
        seen.clear()
        with torch.no_grad():
            teacher.model(input_ids=batch, use_cache=False)
        student.get_decoder()(input_ids=batch, use_cache=False)
        each = [
            ((own - wanted).square().sum(-1) / wanted.square().sum(-1)).mean()
            for own, wanted in zip(made, (seen[end] @ matrix for end in ends), strict=True)
        ]
        loss = torch.stack(each).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(blocks.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    for hook in hooks:
        hook.remove()
    return losses
