"""Blockwise distillation, an arm of `initialization_comparison.py`: regress a calibrated student's blocks on hidden states.

Each block is trained by Adam on the student's own hidden states, detached, to produce the teacher's hidden states at the
input of the student's next block, projected by M; the squared error is relative to the target's squared norm.
One step costs one pass of the teacher and one forward and backward of the student, so as
much as a step of distillation: the tokens it uses are taken from the arm's budget.
"""

import math

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel

LEARNING_RATE = 1e-3


def projection_matrix(teacher: LlamaForCausalLM, projected: PreTrainedModel) -> Tensor:
    """Return M, (d_T, d_S), of a student whose embedding table is the teacher's times M and nothing else."""
    table, student_state = (model.get_input_embeddings().weight.detach().double() for model in (teacher, projected))
    return torch.linalg.lstsq(table, student_state).solution.float()


def distill_blockwise(
    student: PreTrainedModel, teacher: LlamaForCausalLM, matrix: Tensor, layers: list[int], batches: list[Tensor]
) -> list[float]:
    """Regress each of a student's blocks on the teacher's hidden states, one step per batch; return the mean loss of
    each step.

    Args:
        matrix: (d_T, d_S), from the teacher's residual stream to the student's.
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
    student_states: list[Tensor] = []
    hooks = [block.register_forward_pre_hook(lambda _, args: (args[0].detach(), *args[1:])) for block in blocks]
    hooks += [block.register_forward_hook(lambda _, args, output: student_states.append(output)) for block in blocks]
    teacher_states: list[
        Tensor
    ] = []  # the teacher's hidden states after each block; those of its output end with the normalized ones
    hooks += [
        block.register_forward_hook(lambda _, args, output: teacher_states.append(output))
        for block in teacher.model.layers
    ]
    ends = [*(layer - 1 for layer in layers[1:]), len(teacher.model.layers) - 1]
    losses = []
    for batch in batches:
        student_states.clear()
        teacher_states.clear()
        with torch.no_grad():
            teacher.model(input_ids=batch, use_cache=False)
        student.get_decoder()(input_ids=batch, use_cache=False)
        each = [
            ((student_state - target).square().sum(-1) / target.square().sum(-1)).mean()
            for student_state, target in zip(
                student_states, (teacher_states[end] @ matrix for end in ends), strict=True
            )
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
