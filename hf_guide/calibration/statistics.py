"""Collect statistics of a teacher's activations on calibration data, in sums whose size does not depend on the data's."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hf_guide.calibration.batches import Batch, count_tokens
from hf_guide.calibration.forward import calibration_mode, drop_padding, is_decoder_stack, reads_decoder_tokens
from hf_guide.calibration.modules import ModuleMap, ModuleRef, linear_weight
from hf_guide.calibration.normal_equations import RowBuffer, add_symmetric_product_
from hf_guide.calibration.resume import CalibrationCheckpoint
from hf_guide.calibration.sequential import SequentialModel, find_probes
from hf_guide.errors import TeacherError
from hf_guide.layouts.grammar import AxisName, AxisProduct, axis_names, axis_size, group_indices
from hf_guide.layouts.registry import Layout, config_sizes, rotary_size
from hf_guide.models.hooks import StopForward, first_output, hidden_states_arg, register_input_hook
from hf_guide.utils.distributed import all_reduce_scalar, all_reduce_sum_, local_shard
from hf_guide.utils.finite import is_finite, overflow_advice

MAX_INFLUENCE = 2.0
"""Of a block whose output has the opposite direction of its input."""

MASSIVE = 5.0
"""A block makes a hidden state massive if it multiplies its norm by so many medians of that factor, to so many median norms.

Massive activations (Sun et al., arXiv 2402.17762) are mostly of the first token, to which the heads of later blocks attend.
The block that makes them has little influence in the mean over tokens, and no other does it in its place. Of SmolLM2-135M
block 2 multiplies the norm of such tokens by 7.5 and block 11 by 180, of the others none by more than 3.9. With both of them
students of 12 and 15 of its 30 blocks end lower after training (`examples/benchmarks/README.md`).
"""

STRONGEST = 3
"""One of so many blocks, those of most influence, is selected before those that make hidden states massive.

A student of 10 of 30 blocks, or fewer, ends higher with them, as others of its later half are lost for them.
"""


@dataclass
class ActivationStatistics:
    """Sums over tokens, float64; the products of one batch are in the model's dtype, float32 at least.

    Attributes:
        num_tokens: Number of input tokens.
        residual_second_moments: For each projected axis the second moment of the residual stream, (d_T, d_T), summed over
            the modules that read it, each token scaled to length 1.
        block_influence: For each stack 1 - the mean cosine similarity of a block's input and output, (blocks,)
            (ShortGPT, arXiv 2403.03853, equation 1).
        massive_tokens: For each stack the number of tokens whose hidden states a block makes massive, (blocks,).
        input_second_moments: For each output projection the second moment of its input: per neuron, (f,), or within each
            head, (heads, head_dim, head_dim).
        qk_second_moments: For each query or key projection, by its name and its axis, ".../q_dim", the second moment of its
            output within each head, a one appended, (heads, head_dim + 1, head_dim + 1). Not of rotary ones.
        token_counts: For each projected axis the number of tokens at the block that reads most.
    """

    num_tokens: int = 0
    residual_second_moments: dict[str, Tensor] = field(default_factory=dict)
    block_influence: dict[str, Tensor] = field(default_factory=dict)
    massive_tokens: dict[str, Tensor] = field(default_factory=dict)
    input_second_moments: dict[str, Tensor] = field(default_factory=dict)
    qk_second_moments: dict[str, Tensor] = field(default_factory=dict)
    token_counts: dict[str, int] = field(default_factory=dict)

    @property
    def block_scores(self) -> dict[str, Tensor]:
        """By stack, scores by which blocks are selected: their influence, or more where they make hidden states massive."""
        scores = {}
        for stack, influence in self.block_influence.items():
            ranked, strongest = influence.sort(descending=True).values, -(-len(influence) // STRONGEST)
            least = ranked[strongest - 1 : strongest + 1].mean()  # between those and the next
            scores[stack] = torch.where(self.massive_tokens[stack] > 0, influence.clamp(min=least), influence)
        return scores


def collect_statistics(
    model: PreTrainedModel,
    modules: ModuleMap,
    layout: Layout,
    batches: Sequence[Batch],
    *,
    sequential: SequentialModel | None = None,
    checkpoint: CalibrationCheckpoint | None = None,
    records: bool = False,
    show_progress: bool = False,
) -> ActivationStatistics:
    """Run the teacher once on all batches, block by block; each process runs its share, and all return the same sums.

    Args:
        model: The teacher.
        modules: Its modules, from `find_modules`.
        layout: Its layout.
        batches: The calibration batches of all processes.
        sequential: The teacher on this process's batches; None where it is in memory.
        checkpoint: Where sums are saved meanwhile, and continued from.
        records: Whether inputs of the teacher's modules are kept for a refit.
        show_progress: Whether to show a progress bar.

    Raises:
        TeacherError: Activations are not finite; names the first block that computes such and the tokens, and weights that
            are not finite.
    """
    if sequential is None:
        own = local_shard(batches)
        sequential = SequentialModel(model, modules, own, is_teacher=True, probes=find_probes(own, batches))
    collector = _StatisticsCollector(sequential, modules, layout)
    done, is_complete = collector.resume(checkpoint)
    if not is_complete:
        blocks = sum(map(len, modules.blocks.values()))
        with (
            calibration_mode(model),
            tqdm(total=blocks, desc="calibration: teacher", unit="block", disable=not show_progress) as bar,
        ):

            def after_block(count: int) -> None:
                bar.update()
                collector.flush()
                if count > done:
                    collector.save(checkpoint, count, complete=False)

            sequential.visit(
                collector.register_hooks, collector.begin, skip=done, after_block=after_block, records=records
            )
            collector.flush()
            collector.save(checkpoint, blocks, complete=True)
    return collector.reduce()


class _StatisticsCollector:
    """Hooks on a teacher that add to `statistics`, block by block and batch by batch."""

    def __init__(self, sequential: SequentialModel, modules: ModuleMap, layout: Layout):
        self.sequential, self.model, self.modules, self.layout = sequential, sequential.model, modules, layout
        model = self.model
        self.statistics = ActivationStatistics(
            num_tokens=sum(count_tokens(batch, model) for batch in sequential.batches)
        )
        self.block_tokens = {
            stack: torch.zeros(len(blocks), dtype=torch.float64) for stack, blocks in modules.blocks.items()
        }
        for sums in (self.statistics.block_influence, self.statistics.massive_tokens):
            sums.update({stack: torch.zeros_like(count) for stack, count in self.block_tokens.items()})
        self.readers = residual_inputs(modules)
        self.head_dims = {name: head_size(ref, layout, model) for name, ref in modules.residual_out.items()}
        self.buffers: dict[str, RowBuffer] = {}
        self.index, self.batch = 0, Batch()
        self.last_input: Tensor | None = None

    def register_hooks(self, handles: list[Any], stack: str | None, index: int) -> None:
        """Register the hooks of a block, or of what runs outside of the visited stacks, up to the language head."""

        def includes(ref: ModuleRef) -> bool:
            if stack is None:
                return ref.stack not in self.sequential.visited
            return ref.stack == stack and ref.block == index

        for name, (ref, indices) in query_key_outputs(self.modules, self.layout, self.model).items():
            if includes(ref):
                handles.append(
                    ref.module.register_forward_hook(
                        lambda _, args, output, n=name, r=ref, i=indices: self.on_query_key(n, r, i, output)
                    )
                )
        for ref in filter(includes, self.readers):
            handles.append(register_input_hook(ref.module, lambda stream, r=ref: self.on_residual(r, stream)))  # type: ignore[misc]
        for ref in filter(includes, self.modules.residual_out.values()):
            handles.append(register_input_hook(ref.module, lambda inputs, r=ref: self.on_output_projection(r, inputs)))  # type: ignore[misc]
        for name, blocks in self.modules.blocks.items():
            for number, block in enumerate(blocks):
                if (name, number) == (stack, index) or (stack is None and name not in self.sequential.visited):
                    handles.append(self._register_block_hook(name, number, block))
        if stack is None:
            for head in self.modules.language_heads:  # its logits are not needed
                handles.append(register_input_hook(head, self.on_language_head))

    def _register_block_hook(self, stack: str, index: int, block: nn.Module) -> Any:
        return block.register_forward_hook(
            lambda _, args, kwargs, output: self.on_block(
                stack, index, hidden_states_arg(args, kwargs), first_output(output)
            ),
            with_kwargs=True,
        )

    def begin(self, index: int) -> None:
        """Begin with a batch of this process."""
        self.index, self.batch, self.last_input = index, self.sequential.batches[index], None

    # Hooks

    def on_residual(self, ref: ModuleRef, stream: Tensor) -> None:
        """Add the second moment of the residual stream where a module reads it."""
        if self.last_input is stream:
            return  # another weight reads the same tensor
        self.last_input = stream
        rows = self._rows(stream, ref)
        if self.layout.norm == "layer":
            rows = rows - rows.mean(-1, keepdim=True)
        rows = rows / rows.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)
        if ref.axis not in self.buffers:
            self.buffers[ref.axis] = RowBuffer(lambda rows, axis=ref.axis: self._add_residual_moment(axis, rows))
        self.buffers[ref.axis].add(rows)

    def _add_residual_moment(self, axis: str, rows: Tensor) -> None:
        moments, width = self.statistics.residual_second_moments, rows.shape[1]
        if axis not in moments:
            moments[axis] = torch.zeros(width, width, dtype=torch.float64)
        add_symmetric_product_(moments[axis], rows)

    def flush(self) -> None:
        """Add the residual streams of which the moments are still to be taken."""
        for buffer in self.buffers.values():
            buffer.flush()

    def on_output_projection(self, ref: ModuleRef, inputs: Tensor) -> None:
        """Add the second moment of an output projection's input: per neuron, or within each head."""
        rows, head_dim = self._rows(inputs, ref), self.head_dims[ref.name]
        if head_dim is None:
            moment = rows.square().sum(0, dtype=torch.float64).cpu()
        else:
            heads = rows.unflatten(-1, (-1, head_dim)).movedim(1, 0)
            moment = (heads.mT @ heads).cpu()
        _add(self.statistics.input_second_moments, ref.name, moment)

    def on_block(self, stack: str, index: int, stream: Tensor, output: Tensor) -> None:
        """Add 1 - the cosine similarity of a block's input and output, and count the tokens that it makes massive."""
        of_decoder = is_decoder_stack(stack, self.model.config)
        before, after = (
            drop_padding(each, self.batch, self.model, of_decoder=of_decoder).double() for each in (stream, output)
        )
        if before.shape != after.shape:  # it changes the length or the width, so it cannot be left out
            self.statistics.block_influence[stack][index] += MAX_INFLUENCE * len(after)
            self.block_tokens[stack][index] += len(after)
            return
        cosine = torch.nn.functional.cosine_similarity(before, after, dim=-1)
        influence = (1 - cosine).sum().cpu()
        if not influence.isfinite():
            side, wrong = ("output", after) if before.isfinite().all() else ("input", before)
            where = f"first in the {side} of {stack.replace('{block}', str(index))}, {self._tokens(stream, wrong, of_decoder)}"
            raise _non_finite_error(self.sequential, where)
        self.statistics.block_influence[stack][index] += influence
        self.statistics.massive_tokens[stack][index] += _count_massive(before, after)
        self.block_tokens[stack][index] += len(cosine)

    def _tokens(self, stream: Tensor, wrong: Tensor, of_decoder: bool) -> str:
        """Return which tokens of this process's batch are not finite in `wrong`, (tokens, width), and how many."""
        numbers = torch.arange(stream[..., 0].numel(), device=stream.device).view(stream.shape[:-1])
        rows = drop_padding(numbers[..., None], self.batch, self.model, of_decoder=of_decoder).flatten()[
            ~wrong.isfinite().all(-1)
        ]
        row, token = divmod(int(rows[0]), stream.shape[-2])
        return f"for {len(rows)} of the {len(wrong)} tokens of batch {self.index}, the first in row {row} at position {token}"

    def on_query_key(self, name: str, ref: ModuleRef, indices: Tensor, output: Tensor) -> None:
        """Add the second moment of queries or keys within each head, a one appended."""
        rows = self._rows(output, ref)[:, indices]  # (tokens, heads, head_dim)
        rows = torch.cat([rows, torch.ones_like(rows[..., :1])], -1).movedim(1, 0)
        _add(self.statistics.qk_second_moments, name, (rows.mT @ rows).cpu())

    def on_language_head(self, inputs: Tensor) -> None:
        """Stop the forward pass."""
        raise StopForward

    def _rows(self, activations: Tensor, ref: ModuleRef) -> Tensor:
        of_decoder = reads_decoder_tokens(ref, self.model.config)
        rows = drop_padding(activations, self.batch, self.model, of_decoder=of_decoder)
        return rows.to(torch.promote_types(rows.dtype, torch.float32))

    # Sums

    def _sums(self) -> dict[str, dict[str, Tensor]]:
        statistics = self.statistics
        return {
            "residual_second_moments": statistics.residual_second_moments,
            "block_influence": statistics.block_influence,
            "massive_tokens": statistics.massive_tokens,
            "input_second_moments": statistics.input_second_moments,
            "qk_second_moments": statistics.qk_second_moments,
            "block_tokens": self.block_tokens,
        }

    def resume(self, checkpoint: CalibrationCheckpoint | None) -> tuple[int, bool]:
        """Load the sums of an earlier run; return over how many of the blocks they are, and whether they are complete."""
        saved = None if checkpoint is None else checkpoint.load_statistics()
        if saved is None:
            return 0, False
        tensors, progress = saved
        sums = self._sums()
        for key, tensor in tensors.items():
            kind, _, name = key.partition("/")
            sums[kind][name] = tensor
        return int(progress["blocks"]), bool(progress["complete"])

    def save(self, checkpoint: CalibrationCheckpoint | None, blocks: int, *, complete: bool) -> None:
        """Save the sums over the first blocks."""
        if checkpoint is not None:
            tensors = {
                f"{kind}/{name}": tensor for kind, sums in self._sums().items() for name, tensor in sums.items()
            }
            checkpoint.save_statistics(tensors, {"blocks": blocks, "complete": complete}, complete=complete)

    def reduce(self) -> ActivationStatistics:
        """Return the statistics over all processes."""
        statistics = self.statistics
        for name, ref in self.modules.residual_out.items():  # a module that no batch reached has zeros
            shape = _input_moment_shape(ref, self.head_dims[name])
            statistics.input_second_moments.setdefault(name, torch.zeros(shape, dtype=torch.float64))
        statistics.input_second_moments = {
            name: statistics.input_second_moments[name] for name in self.modules.residual_out
        }
        # Sorted, because a process that was resumed may have them in another order.
        statistics.residual_second_moments = dict(sorted(statistics.residual_second_moments.items()))
        statistics.qk_second_moments = dict(sorted(statistics.qk_second_moments.items()))
        statistics.num_tokens = round(all_reduce_scalar(statistics.num_tokens))
        all_reduce_sum_(
            [
                *statistics.residual_second_moments.values(),
                *statistics.block_influence.values(),
                *statistics.massive_tokens.values(),
                *self.block_tokens.values(),
                *statistics.input_second_moments.values(),
            ]
        )
        all_reduce_sum_(statistics.qk_second_moments.values())
        for stack, count in self.block_tokens.items():
            statistics.block_influence[stack] /= count.clamp(min=1)
        for ref in self.readers:
            if ref.stack in self.block_tokens:
                most = int(self.block_tokens[ref.stack].max())
                statistics.token_counts[ref.axis] = max(statistics.token_counts.get(ref.axis, 0), most)
        _check_statistics_finite(statistics, self.sequential)
        return statistics


def _add(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    """Add a tensor to a sum in float64."""
    if name in sums:
        sums[name] += value  # in place, without a copy in float64
    else:
        sums[name] = value.double()


def _count_massive(before: Tensor, after: Tensor) -> int:
    """Return how many hidden states, (tokens, d), a block makes massive."""
    norms = after.norm(dim=-1)
    growth = norms / before.norm(dim=-1).clamp(min=torch.finfo(before.dtype).tiny)
    is_massive = (growth > MASSIVE * growth.median()) & (norms > MASSIVE * norms.median())
    return int(is_massive.sum())


def residual_inputs(modules: ModuleMap) -> list[ModuleRef]:
    """Return the modules whose input is the residual stream: norms that are read, and weights in blocks without a norm."""
    without_norm = [
        ref for ref in modules.residual_in.values() if ref.block is not None and not any(ref.match.row.input_norms)
    ]
    return [*modules.read_norms.values(), *without_norm]


def query_key_outputs(
    modules: ModuleMap, layout: Layout, model: PreTrainedModel
) -> dict[str, tuple[ModuleRef, Tensor]]:
    """Return the query and key projections whose outputs are not rotary, and each head's indices there, (heads, head_dim).

    The keys are the weight's name and that of its axis, such as "layers.0.attn.q_proj/q_dim".
    """
    outputs: dict[str, tuple[ModuleRef, Tensor]] = {}
    sizes = config_sizes(layout, model.config)
    for name, ref in modules.residual_in.items():
        axis = ref.match.row.output_axis
        for dim in axis_names(axis):
            if not dim.endswith(("q_dim", "k_dim")) or rotary_size(layout, model.config, sizes.get(dim, 0)):
                continue
            if axis_size(axis, sizes) != len(linear_weight(ref.module)):
                continue
            heads = next(other for other in axis_names(axis) if other.endswith("heads"))
            indices = [group_indices(axis, heads, head, dim, sizes) for head in range(sizes[heads])]
            outputs[f"{name}/{dim}"] = (ref, torch.cat(indices).view(-1, sizes[dim]))
    return outputs


def head_size(ref: ModuleRef, layout: Layout, model: PreTrainedModel) -> int | None:
    """Return the size of a head if the input of an output projection is heads; None if it is neurons."""
    axis = ref.match.axes[ref.match.row.input_axis]
    if isinstance(axis, AxisProduct) and isinstance(axis.factors[-1], AxisName):
        return config_sizes(layout, model.config).get(axis.factors[-1].name)
    return None


def mlp_width(modules: ModuleMap, layout: Layout, model: PreTrainedModel) -> int:
    """Return the number of neurons of the widest MLP; 0 if there is none."""
    mlps = [ref for ref in modules.residual_out.values() if head_size(ref, layout, model) is None]
    return max((linear_weight(ref.module).shape[1] for ref in mlps), default=0)


def _input_moment_shape(ref: ModuleRef, head_dim: int | None) -> tuple[int, ...]:
    width = linear_weight(ref.module).shape[1]
    return (width,) if head_dim is None else (width // head_dim, head_dim, head_dim)


def _check_statistics_finite(statistics: ActivationStatistics, sequential: SequentialModel) -> None:
    for what, moments in (
        ("in the residual stream", statistics.residual_second_moments),
        ("in the input of", statistics.input_second_moments),
    ):
        for name, moment in moments.items():
            if not is_finite(moment):
                raise _non_finite_error(sequential, f"{what} {name!r}")


def _non_finite_error(sequential: SequentialModel, where: str) -> TeacherError:
    weights = [name for name, weight in sequential.named_weights() if not is_finite(weight)]
    if weights:
        advice = f"{len(weights)} of its weights are not either, such as {weights[0]}: download the checkpoint again."
    else:
        dtype = sequential.model.dtype
        advice = f"Its weights are, in {dtype}. " + overflow_advice(
            dtype, "Check them and the calibration dataset for extreme values", "Load the teacher"
        )
    return TeacherError(f"The teacher's activations are not finite on the calibration dataset, {where}. {advice}")
