"""What a teacher does with real data, in sums whose size does not depend on how much data there was."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hf_guide.calibration.data import Batch, count_tokens
from hf_guide.calibration.forward import (
    calibration_mode,
    drop_padding,
    forward_no_cache,
    is_decoder_stack,
    reads_decoder_tokens,
)
from hf_guide.calibration.modules import ModuleMap, ModuleRef, linear_weight
from hf_guide.calibration.resume import CalibrationCheckpoint
from hf_guide.errors import TeacherError
from hf_guide.layouts.grammar import AxisName, AxisProduct, axis_names, axis_size, group_indices
from hf_guide.layouts.registry import Layout, config_sizes, rotary_size
from hf_guide.models.hooks import StopForward, first_output, hidden_states_arg, register_input_hook, removable_hooks
from hf_guide.utils.distributed import all_reduce_scalar, all_reduce_sum_, local_shard
from hf_guide.utils.finite import is_finite


@dataclass
class ActivationStatistics:
    """Sums over tokens, float64 (the products of one batch are in the model's dtype, float32 at least).

    Attributes:
        tokens: how many tokens of input were seen.
        moments: for each projected axis the second moment of the stream, (d_T, d_T), pooled over where it is read.
        turned: for each stack 1 - mean cosine of a block's input and output, (blocks,): its influence.
        inner: for each writer the second moment of its input: of each neuron, (f,), or among a head's own places,
            (heads, l, l).
        projected: for each weight that makes queries or keys, by its name and the size, ".../q_dim", the second moment of what
            a head's places are given, with a one beside them, (heads, l + 1, l + 1); not where they are rotated.
        heard: for each projected axis how many tokens were seen on it, at the block that was given most.
    """

    tokens: int = 0
    moments: dict[str, Tensor] = field(default_factory=dict)
    block_influence: dict[str, Tensor] = field(default_factory=dict)
    inner: dict[str, Tensor] = field(default_factory=dict)
    projected: dict[str, Tensor] = field(default_factory=dict)
    heard: dict[str, int] = field(default_factory=dict)

    def parts(self, seen: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """Return all sums by what they are of, and beside them on how many tokens each block was heard."""
        named = {
            "moments": self.moments,
            "turned": self.block_influence,
            "inner": self.inner,
            "projected": self.projected,
        }
        return {**named, "seen": seen}

    def sums(self, seen: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the same under one name each."""
        return {f"{part}/{name}": tensor for part, sums in self.parts(seen).items() for name, tensor in sums.items()}


def collect_statistics(
    model: PreTrainedModel,
    anatomy: ModuleMap,
    layout: Layout,
    batches: Sequence[Batch],
    *,
    checkpoint: CalibrationCheckpoint | None = None,
    show_progress: bool = False,
) -> ActivationStatistics:
    """Hear a teacher once on all batches; with several processes each takes its share and all get the same sums.

    Args:
        checkpoint: where sums are kept meanwhile, and gone on with.

    Raises:
        TeacherError: activations that are not finite, as soon as a block makes such; names it, and weights that are not.
    """
    found = ActivationStatistics()
    seen = {stack: torch.zeros(len(blocks), dtype=torch.float64) for stack, blocks in anatomy.blocks.items()}
    found.block_influence = {stack: torch.zeros_like(count) for stack, count in seen.items()}
    places = residual_inputs(anatomy)
    heads = {name: head_size(part, layout, model) for name, part in anatomy.writers.items()}
    current: Batch = {}
    last: list[Tensor] = []

    def real(heard: Tensor, part: ModuleRef) -> Tensor:
        rows = drop_padding(heard, current, of_decoder=reads_decoder_tokens(part, model.config))
        return rows.to(torch.promote_types(rows.dtype, torch.float32))

    def hear_stream(place: ModuleRef, stream: Tensor) -> None:
        if last and last[0] is stream:
            return  # another weight reads the same
        last[:] = [stream]
        rows = real(stream, place)
        if layout.norm == "layer":
            rows = rows - rows.mean(-1, keepdim=True)
        rows = rows / rows.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)
        found.moments[place.axis] = found.moments.get(place.axis, 0) + (rows.T @ rows).double().cpu()

    def hear_inner(name: str, part: ModuleRef, inner: Tensor) -> None:
        rows, size = real(inner, part), heads[name]
        if size is None:
            total = rows.square().sum(0, dtype=torch.float64).cpu()
        else:
            split = rows.unflatten(-1, (-1, size)).movedim(1, 0)
            total = (split.mT @ split).double().cpu()
        found.inner[name] = found.inner.get(name, 0) + total

    def hear_block(stack: str, number: int, stream: Tensor, output: Tensor) -> None:
        of_decoder = is_decoder_stack(stack, model.config)
        before, after = (drop_padding(each, current, of_decoder=of_decoder).double() for each in (stream, output))
        cosine = torch.nn.functional.cosine_similarity(before, after, dim=-1)
        turned = (1 - cosine).sum().cpu()
        if not turned.isfinite():
            does = "makes" if before.isfinite().all() else "is given"
            raise _non_finite_error(model, f"first in what {stack.replace('{block}', str(number))} {does}")
        found.block_influence[stack][number] += turned
        seen[stack][number] += len(cosine)

    def hear_projected(name: str, part: ModuleRef, places: Tensor, output: Tensor) -> None:
        rows = real(output, part)[:, places]  # (tokens, heads, l)
        rows = torch.cat([rows, torch.ones_like(rows[..., :1])], -1).movedim(1, 0)
        found.projected[name] = found.projected.get(name, 0) + (rows.mT @ rows).double().cpu()

    def enough(heard: Tensor) -> None:
        raise StopForward

    with removable_hooks() as handles, calibration_mode(model):
        for name, (part, where) in query_key_outputs(anatomy, layout, model).items():
            handles.append(
                part.module.register_forward_hook(
                    lambda _, args, output, n=name, p=part, w=where: hear_projected(n, p, w, output)
                )
            )
        for place in places:
            handles.append(register_input_hook(place.module, lambda heard, p=place: hear_stream(p, heard)))  # type: ignore[misc]
        for name, part in anatomy.writers.items():
            handles.append(register_input_hook(part.module, lambda heard, n=name, p=part: hear_inner(n, p, heard)))  # type: ignore[misc]
        for stack, blocks in anatomy.blocks.items():
            for number, block in enumerate(blocks):
                handles.append(
                    block.register_forward_hook(
                        lambda _, args, kwargs, output, s=stack, n=number: hear_block(
                            s, n, hidden_states_arg(args, kwargs), first_output(output)
                        ),
                        with_kwargs=True,
                    )
                )
        for part in anatomy.readers.values():
            if part.is_language_head:  # the last of all: not needed
                handles.append(register_input_hook(part.module, enough))
        own = local_shard(batches)
        begun = _resume(found, seen, checkpoint)
        bar = {"total": len(own), "initial": begun, "unit": "batch", "disable": not show_progress}
        for number, current in enumerate(tqdm(own[begun:], desc="hearing the teacher", **bar), begun + 1):
            last.clear()
            forward_no_cache(model, current)
            found.tokens += count_tokens(current, model)
            if checkpoint is not None:
                facts = {"batches": number, "tokens": found.tokens}
                checkpoint.save_statistics(found.sums(seen), facts, complete=number == len(own))
    found.inner |= {
        name: torch.zeros(_input_moment_shape(part, heads[name]), dtype=torch.float64)
        for name, part in anatomy.writers.items()
        if name not in found.inner
    }
    found.inner = {name: found.inner[name] for name in anatomy.writers}
    found.tokens = round(all_reduce_scalar(found.tokens))
    found.moments, found.projected = (dict(sorted(sums.items())) for sums in (found.moments, found.projected))
    # sorted, for a process that was resumed may have them in another order
    all_reduce_sum_([*found.moments.values(), *found.block_influence.values(), *seen.values(), *found.inner.values()])
    all_reduce_sum_(found.projected.values())
    for stack, count in seen.items():
        found.block_influence[stack] /= count.clamp(min=1)
    for place in places:
        if place.stack in seen:
            found.heard[place.axis] = max(found.heard.get(place.axis, 0), int(seen[place.stack].max()))
    _check_statistics_finite(found, model)
    return found


def _resume(found: ActivationStatistics, seen: dict[str, Tensor], checkpoint: CalibrationCheckpoint | None) -> int:
    """Take up what was heard before; return how many batches that were."""
    kept = None if checkpoint is None else checkpoint.load_statistics()
    if kept is None:
        return 0
    sums, facts = kept
    parts = found.parts(seen)
    for name, tensor in sums.items():
        part, _, where = name.partition("/")
        parts[part][where] = tensor
    found.tokens = facts["tokens"]
    return int(facts["batches"])


def residual_inputs(anatomy: ModuleMap) -> list[ModuleRef]:
    """Return the modules whose input is the residual stream: norms that are read, and weights in blocks that read no norm."""
    bare = [
        part for part in anatomy.readers.values() if part.block is not None and not any(part.match.row.input_norms)
    ]
    return [*anatomy.read_norms.values(), *bare]


def query_key_outputs(
    anatomy: ModuleMap, layout: Layout, model: PreTrainedModel
) -> dict[str, tuple[ModuleRef, Tensor]]:
    """Return the weights that make queries and keys which nothing turns, and where each head's places are, (heads, l).

    By the weight's name and that of the size, "layers.0.attn.q_proj/q_dim".
    """
    found: dict[str, tuple[ModuleRef, Tensor]] = {}
    known = config_sizes(layout, model.config)
    for name, part in anatomy.readers.items():
        axis = part.match.row.output_axis
        for size in axis_names(axis):
            if not size.endswith(("q_dim", "k_dim")) or rotary_size(layout, model.config, known.get(size, 0)):
                continue
            if axis_size(axis, known) != len(linear_weight(part.module)):
                continue
            heads = next(other for other in axis_names(axis) if other.endswith("heads"))
            places = [group_indices(axis, heads, head, size, known) for head in range(known[heads])]
            found[f"{name}/{size}"] = (part, torch.cat(places).view(-1, known[size]))
    return found


def head_size(part: ModuleRef, layout: Layout, model: PreTrainedModel) -> int | None:
    """Return the size of a head where a writer's input is heads side by side, None where it is neurons."""
    axis = part.match.axes[part.match.row.input_axis]
    if isinstance(axis, AxisProduct) and isinstance(axis.factors[-1], AxisName):
        return config_sizes(layout, model.config).get(axis.factors[-1].name)
    return None


def mlp_width(anatomy: ModuleMap, layout: Layout, model: PreTrainedModel) -> int:
    """Return how many neurons the widest MLP has, 0 where there is none."""
    mlps = [part for part in anatomy.writers.values() if head_size(part, layout, model) is None]
    return max((linear_weight(part.module).shape[1] for part in mlps), default=0)


def _input_moment_shape(part: ModuleRef, head: int | None) -> tuple[int, ...]:
    width = linear_weight(part.module).shape[1]
    return (width,) if head is None else (width // head, head, head)


def _check_statistics_finite(found: ActivationStatistics, model: PreTrainedModel) -> None:
    for what, tensors in (("the residual stream", found.moments), ("the input of", found.inner)):
        for name, tensor in tensors.items():
            if not is_finite(tensor):
                raise _non_finite_error(model, f"{what} {name!r}")


def _non_finite_error(model: PreTrainedModel, where: str) -> TeacherError:
    weights = [name for name, weight in model.named_parameters() if not is_finite(weight)]
    if weights:
        advice = f"{len(weights)} of its weights are not either, such as {weights[0]}: fetch the checkpoint again"
    else:
        advice = "Its weights are: load it in a wider dtype, or look at the data"
    return TeacherError(f"The teacher's activations are not finite on the calibration dataset, {where}. {advice}.")
