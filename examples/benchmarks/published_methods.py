"""Published initializations of a smaller Llama, re-implemented for `initialization_comparison.py` only.

All of them select indices of the teacher's axes, and differ in which, and in how they scale the weights:

- subcloning: Samragh et al., "Weight subcloning", arXiv 2312.09299. Channels, heads and neurons with the largest
  mean activation; consecutive blocks in the middle are left out; weights are scaled by the root of how many inputs were cut,
  so that outputs keep their spread.
- minitron: Muralidharan et al., "Compact language models via pruning and knowledge distillation", arXiv 2407.14679.
  Importance is a mean over the sequence and a length over the batch of the outputs of norms (channels), of
  heads and of neurons; the blocks that change the residual stream least are dropped. Nothing is scaled.
- dropped blocks: the first blocks, or evenly spaced ones, at the teacher's full width.

Several papers leave details open; this is one interpretation.
"""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM


@dataclass
class Activity:
    """Mean activity of each index of a teacher's axes on some text.

    Attributes:
        stream: (width,), summed over all norms.
        groups: by block, (key/value heads,): the activity of the query heads that share one.
        neurons: by block, (neurons,).
        influence: by block, 1 - the mean cosine between its input and its output.
    """

    stream: Tensor
    groups: list[Tensor] = field(default_factory=list)
    neurons: list[Tensor] = field(default_factory=list)
    influence: list[float] = field(default_factory=list)


Measure = Callable[[Tensor], Tensor]


def mean_magnitude(activations: Tensor) -> Tensor:
    """Return the mean magnitude over (batch, length) of (batch, length, indices): subcloning's importance."""
    return activations.abs().mean((0, 1))


def length_of_means(activations: Tensor) -> Tensor:
    """Return the norm over the batch of the mean over positions: Minitron's importance."""
    return activations.abs().mean(1).norm(dim=0)


@torch.no_grad()
def collect_activity(teacher: LlamaForCausalLM, batches: Iterable[Tensor], measure: Measure) -> Activity:
    """Collect the activity of a teacher on batches of token ids, (batch, length)."""
    config, blocks = teacher.config, teacher.model.layers
    assert config.head_dim is not None
    activity = Activity(
        torch.zeros(config.hidden_size, device=teacher.device),
        [torch.zeros(config.num_key_value_heads, device=teacher.device) for _ in blocks],
        [torch.zeros(config.intermediate_size, device=teacher.device) for _ in blocks],
        [0.0 for _ in blocks],
    )
    hooks = []

    def on_norm(_: object, __: object, output: Tensor) -> None:
        activity.stream += measure(output)

    for number, block in enumerate(blocks):

        def on_heads(_: object, inputs: tuple[Tensor], number: int = number) -> None:
            heads = inputs[0].unflatten(-1, (config.num_attention_heads, -1)).norm(dim=-1)
            activity.groups[number] += measure(heads).view(config.num_key_value_heads, -1).sum(-1)

        def on_neurons(_: object, inputs: tuple[Tensor], number: int = number) -> None:
            activity.neurons[number] += measure(inputs[0])

        def on_block(_: object, inputs: tuple[Tensor], output: Tensor, number: int = number) -> None:
            activity.influence[number] += 1 - torch.cosine_similarity(inputs[0], output, dim=-1).mean().item()

        hooks += [block.input_layernorm.register_forward_hook(on_norm)]
        hooks += [block.post_attention_layernorm.register_forward_hook(on_norm)]
        hooks += [block.self_attn.o_proj.register_forward_pre_hook(on_heads)]
        hooks += [block.mlp.down_proj.register_forward_pre_hook(on_neurons)]
        hooks += [block.register_forward_hook(on_block)]
    teacher.eval()
    for batch in batches:
        teacher(input_ids=batch, use_cache=False)
    for hook in hooks:
        hook.remove()
    activity.stream = activity.stream.cpu()
    activity.groups, activity.neurons = (
        [each.cpu() for each in those] for those in (activity.groups, activity.neurons)
    )
    return activity


def subcloned(teacher: LlamaForCausalLM, config: LlamaConfig, batches: Iterable[Tensor]) -> LlamaForCausalLM:
    """Return a student initialized by weight subcloning."""
    activity = collect_activity(teacher, batches, mean_magnitude)
    kept, num_blocks = config.num_hidden_layers, teacher.config.num_hidden_layers
    blocks = [*range((kept + 1) // 2), *range(num_blocks - kept // 2, num_blocks)]
    return selected(teacher, config, activity, blocks, scaled=True)


def pruned_as_minitron(teacher: LlamaForCausalLM, config: LlamaConfig, batches: Iterable[Tensor]) -> LlamaForCausalLM:
    """Return a student initialized by Minitron's pruning, without its retraining."""
    activity = collect_activity(teacher, batches, length_of_means)
    ranked = sorted(range(len(activity.influence)), key=lambda block: -activity.influence[block])
    return selected(teacher, config, activity, sorted(ranked[: config.num_hidden_layers]), scaled=False)


def selected(
    teacher: LlamaForCausalLM, config: LlamaConfig, activity: Activity, blocks: list[int], *, scaled: bool
) -> LlamaForCausalLM:
    """Return a student with the most active indices of some of the teacher's blocks.

    Args:
        scaled: multiply each weight by the root of how many times more inputs the teacher's has.
    """
    student, size = LlamaForCausalLM(config), config.head_dim
    assert size is not None
    stream = most_active(activity.stream, config.hidden_size)
    width_factor = (teacher.config.hidden_size / config.hidden_size) ** 0.5 if scaled else 1.0
    with torch.no_grad():
        student.model.embed_tokens.weight.copy_(teacher.model.embed_tokens.weight[:, stream])
        student.model.norm.weight.copy_(teacher.model.norm.weight[stream])
        if config.tie_word_embeddings:
            student.model.norm.weight.mul_(width_factor)  # the head is the table itself
        else:
            student.lm_head.weight.copy_(teacher.lm_head.weight[:, stream] * width_factor)
        shared = teacher.config.num_attention_heads // teacher.config.num_key_value_heads
        own = config.num_attention_heads // config.num_key_value_heads
        for block, source in zip(student.model.layers, blocks, strict=True):
            source_block = teacher.model.layers[source]
            groups = most_active(activity.groups[source], config.num_key_value_heads)
            neurons = most_active(activity.neurons[source], config.intermediate_size)
            queries = (groups[:, None] * shared + torch.arange(own)).flatten()
            rows = {
                "q_proj": head_rows(queries, size),
                "k_proj": head_rows(groups, size),
                "v_proj": head_rows(groups, size),
            }
            for name, kept in rows.items():
                _copy_selected(block.self_attn, source_block.self_attn, name, kept, stream, width_factor)
            fewer = (teacher.config.num_attention_heads / config.num_attention_heads) ** 0.5 if scaled else 1.0
            _copy_selected(block.self_attn, source_block.self_attn, "o_proj", stream, rows["q_proj"], fewer)
            for name in ("gate_proj", "up_proj"):
                _copy_selected(block.mlp, source_block.mlp, name, neurons, stream, width_factor)
            fewer = (teacher.config.intermediate_size / config.intermediate_size) ** 0.5 if scaled else 1.0
            _copy_selected(block.mlp, source_block.mlp, "down_proj", stream, neurons, fewer)
            block.input_layernorm.weight.copy_(source_block.input_layernorm.weight[stream])
            block.post_attention_layernorm.weight.copy_(source_block.post_attention_layernorm.weight[stream])
    return student


def with_blocks(teacher: LlamaForCausalLM, blocks: list[int]) -> LlamaForCausalLM:
    """Return a student of some of the teacher's blocks at its full width."""
    config = copy.deepcopy(teacher.config)
    config.num_hidden_layers = len(blocks)
    student = LlamaForCausalLM(config)
    student.load_state_dict(teacher.state_dict(), strict=False)
    for block, source in zip(student.model.layers, blocks, strict=True):
        block.load_state_dict(teacher.model.layers[source].state_dict())
    return student


def most_active(activity: Tensor, count: int) -> Tensor:
    """Return the `count` most active indices, in ascending order."""
    return activity.topk(count).indices.sort().values


def head_rows(heads: Tensor, size: int) -> Tensor:
    """Return the rows of some heads."""
    return (heads[:, None] * size + torch.arange(size)).flatten()


def _copy_selected(
    student: torch.nn.Module, teacher: torch.nn.Module, name: str, rows: Tensor, columns: Tensor, factor: float
) -> None:
    own, source_block = student.get_submodule(name), teacher.get_submodule(name)
    own.get_parameter("weight").copy_(source_block.get_parameter("weight")[rows][:, columns] * factor)
