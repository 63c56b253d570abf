"""Permute a lifted model's units, so that its dead heads, neurons and blocks are at random indices."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_guide.layouts.grammar import axis_names, merge_adjacent, select_indices, solve_sizes
from hf_guide.layouts.registry import Layout, config_sizes
from tests.invariants.embed_small_in_large import first_and_last, relative_name

UNITS = ("heads", "kv_heads", "group", "mlp")


def scramble(model: PreTrainedModel, layout: Layout, small_blocks: int, seed: int) -> list[int]:
    """Permute the heads, neurons and blocks of a lifted model, which computes the same; return where its live blocks are."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {relative_name(name, model): tensor for name, tensor in model.state_dict(keep_vars=True).items()}
    blocks = 1 + max(
        int(match.numbers["block"]) for match in map(layout.find, tensors) if match and "block" in match.numbers
    )
    live = sorted(torch.randperm(blocks, generator=generator)[:small_blocks].tolist())
    dead = [block for block in range(blocks) if block not in live]
    new_index = dict(zip(first_and_last(blocks, small_blocks), live, strict=True))
    new_index |= dict(zip([block for block in range(blocks) if block not in new_index], dead, strict=True))
    permutations: dict[tuple[str, str], Tensor] = {}

    def permutation(block: str, name: str, sizes: dict[str, int]) -> Tensor:
        key = (block, name)
        if key not in permutations:
            permutations[key] = torch.randperm(sizes[name], generator=generator)
        return permutations[key]

    permuted = {}
    for name, tensor in tensors.items():
        match = layout.find(name)
        if match is None or "block" not in match.numbers:
            continue
        block = match.numbers["block"]
        sizes = solve_sizes(match.axes, tensor.shape, config_sizes(layout, model.config), name)
        value = tensor.detach().clone()
        for dim, axis in enumerate(match.axes):
            if not set(axis_names(axis)) & set(UNITS):
                continue
            pair = merge_adjacent(axis, "kv_heads", "group")
            sizes["kv_heads group"] = sizes.get("kv_heads", 1) * sizes.get("group", 1)

            def leaf(unit: str, block: str = block, sizes: dict[str, int] = sizes) -> tuple[Tensor, Tensor]:
                if unit == "kv_heads group":
                    groups = permutation(block, "kv_heads", sizes)
                    inside = [
                        permutation(block, f"group {group}", {f"group {group}": sizes["group"]})
                        for group in groups.tolist()
                    ]
                    indices = torch.cat(
                        [group * sizes["group"] + members for group, members in zip(groups, inside, strict=True)]
                    )
                else:
                    indices = permutation(block, unit, sizes) if unit in UNITS else torch.arange(sizes[unit])
                return indices, torch.ones(len(indices))

            value = value.index_select(dim, select_indices(pair, leaf, sizes)[0])
        permuted[name.replace(f".{block}.", f".{new_index[int(block)]}.", 1)] = value
    with torch.no_grad():
        for name, value in permuted.items():
            tensors[name].copy_(value)
    return live
