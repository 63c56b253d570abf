"""Refit the student's weights block by block, each to the teacher's activations on the same tokens.

An input projection is fitted to the teacher's own output (of the selected heads and neurons), an output projection to what
the student's residual stream still lacks of the teacher's, projected by M, after the dropped blocks that follow. Inputs are
the student's own, so each block corrects the error of those before it. It is ridge regression towards the transferred
weight: where nothing was lost, nothing changes.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_guide.calibration.config import Refit
from hf_guide.calibration.forward import drop_padding, is_decoder_stack, reads_decoder_tokens
from hf_guide.calibration.least_squares import (
    Fit,
    FitTarget,
    TokenRegression,
    fit_dtype,
    fit_weights,
    max_eps,
)
from hf_guide.calibration.modules import ModuleMap, ModuleRef, linear_weight, module_bias
from hf_guide.calibration.normal_equations import TrainValNormalEquations, append_bias_column, at_least_float32
from hf_guide.calibration.refit import RefitState, weight_and_bias
from hf_guide.calibration.sequential import SequentialBlocks, UnsupportedBlockStructure
from hf_guide.calibration.streams import Streams
from hf_guide.layouts.grammar import Identity, Projection, Selection
from hf_guide.models.hooks import StopForward, register_input_hook, removable_hooks
from hf_guide.utils.distributed import all_reduce_scalar
from hf_guide.utils.memory import return_freed_memory

BLOCK_OUTPUT = ""
"""The name of a block's own output among the locations where the residual stream is observed."""

RELATIVE_TOLERANCE, MAX_TOLERANCE = 1e-2, 0.1
"""How far an output may change on its way to where it is observed, relative to its RMS; with a dtype's rounding, how far."""


_REPEATED = "it runs more than once in a block, as DeBERTa-v3's projections do on relative positions, with one weight"


@dataclass
class FitStep:
    """Modules that are fitted together: input projections of one tensor, or one output projection.

    Attributes:
        refs: The modules.
        observed_at: For an output projection, the norm at whose input its output is next observed on the residual stream,
            or `BLOCK_OUTPUT`; None for input projections.
        residual_scale: The factor by which its output is multiplied before that (scaled residual connections).
    """

    refs: list[ModuleRef]
    observed_at: str | None = None
    residual_scale: float = 1.0


def fit_order(
    blocks: SequentialBlocks, modules: ModuleMap, stack: str, index: int, fittable: set[str], notes: list[str]
) -> list[FitStep]:
    """Return what is to be fitted in a block, in the order in which it runs on the first batch.

    Args:
        blocks: The student's blocks, before that block.
        modules: The student's modules.
        stack: The stack, such as "layers.{block}".
        index: The block.
        fittable: Names of the modules that may be fitted.
        notes: Extended by what cannot be fitted, and why.
    """
    residual_in, residual_out, norms = (
        [ref for ref in refs.values() if ref.stack == stack and ref.block == index]
        for refs in (modules.residual_in, modules.residual_out, modules.norms)
    )
    steps: list[FitStep] = []
    last_input: list[Tensor] = []
    observed: dict[str, Tensor] = {}

    def on_input_projection(ref: ModuleRef, inputs: Tensor) -> None:
        if last_input and last_input[-1] is inputs and steps and steps[-1].observed_at is None:
            steps[-1].refs.append(ref)
        else:
            steps.append(FitStep([ref]))
        last_input.append(inputs)

    with removable_hooks() as handles:
        for ref in residual_in:
            if ref.name in fittable:
                handles.append(register_input_hook(ref.module, lambda x, r=ref: on_input_projection(r, x)))  # type: ignore[misc]
        for ref in residual_out:
            if ref.name in fittable:
                handles.append(
                    register_input_hook(ref.module, lambda _, r=ref: steps.append(FitStep([r], BLOCK_OUTPUT)))  # type: ignore[misc]
                )
        for ref in norms:
            handles.append(register_input_hook(ref.module, lambda x, n=ref.name: observed.setdefault(n, x)))  # type: ignore[misc]
        observed[BLOCK_OUTPUT] = blocks.run_block(index, 0, blocks.hidden_states[0])
    calls = Counter(ref.name for step in steps for ref in step.refs)
    supported = []
    for step in steps:
        reasons: dict[str, str] = {}
        for ref in step.refs:
            reason = _REPEATED if calls[ref.name] > 1 else None
            if reason is None and step.observed_at is not None:
                reason = _probe_residual_location(blocks, modules, index, step, observed)
            if reason is not None:
                reasons[ref.name] = f"{ref.match.row.pattern} was not refitted: {reason}."
        step.refs = [ref for ref in step.refs if ref.name not in reasons]
        supported += [step] if step.refs else []
        notes += [note for note in dict.fromkeys(reasons.values()) if note not in notes]
    return supported


def _probe_residual_location(
    blocks: SequentialBlocks, modules: ModuleMap, index: int, step: FitStep, observed: dict[str, Tensor]
) -> str | None:
    """Set where an output projection's output is next observed, by adding noise to it; return why it is nowhere, if so."""
    (ref,) = step.refs
    if ref.match.row.output_norm is not None:
        return "a norm is between it and the residual stream"
    rms = max(
        _rms(each) for each in (blocks.hidden_states[0], *observed.values())
    )  # so that none rounds the noise away
    generator = torch.Generator().manual_seed(0)
    noise = rms * torch.randn(observed[BLOCK_OUTPUT].shape[-1], generator=generator, dtype=torch.float64)
    perturbed: dict[str, Tensor] = {}

    def add_noise(module: nn.Module, args: object, output: Tensor) -> Tensor:
        return output + noise.to(output)

    with removable_hooks() as handles:
        handles.append(ref.module.register_forward_hook(add_noise))
        for name in observed:
            if name != BLOCK_OUTPUT:
                norm = modules.norms[name].module
                handles.append(register_input_hook(norm, lambda x, n=name: perturbed.setdefault(n, x)))  # type: ignore[misc]
        perturbed[BLOCK_OUTPUT] = blocks.run_block(index, 0, blocks.hidden_states[0])
    eps = max_eps(linear_weight(ref.module).dtype, observed[BLOCK_OUTPUT].dtype)
    in_order = [*(name for name in perturbed if name != BLOCK_OUTPUT), BLOCK_OUTPUT]
    for name in in_order:
        change = (perturbed[name].double() - observed[name].double()).cpu()
        if change.abs().max() <= 1e-6 * noise.abs().max():
            continue  # this location is before it, or on another branch
        scale = (change @ noise / noise.square().sum()).mean().item()
        if not _rms(change - scale * noise) <= _residual_tolerance(scale, eps) * _rms(noise):
            break
        step.observed_at, step.residual_scale = name, scale
        return None
    return "its output is nowhere unchanged on the residual stream"


def _residual_tolerance(scale: float, eps: float) -> float:
    """Return how far the change may be from `scale` times the noise, relative to the noise's RMS.

    The output and the residual stream are at most as large as the noise, and each sum of them is rounded.
    """
    return min(RELATIVE_TOLERANCE * max(abs(scale), 1e-3) + 2 * eps, MAX_TOLERANCE * abs(scale))


def _rms(rows: Tensor) -> float:
    return rows.double().square().mean().sqrt().item()


class BlockReconstructor:
    """Refits the blocks of a student, stack by stack, and then the weights after the last block."""

    def __init__(self, state: RefitState):
        self.state = state

    def refit(self) -> None:
        """Refit everything that `config.refit` names, and record the residual error of each block."""
        state = self.state
        for stack in state.student_run.stacks_in_order():  # a decoder reads what the refitted encoder computes
            try:
                self._refit_stack(stack)
            except UnsupportedBlockStructure as error:
                state.notes.append(f"{stack.removesuffix('.{block}')} was not refitted: {error}")
        if state.config.refit == Refit.ALL and not state.resume_step("lm_head"):
            self._refit_lm_head()
            state.save_step("lm_head")

    def _refit_stack(self, stack: str) -> None:
        state = self.state
        sources, name = state.plan.block_mapping[stack], stack.removesuffix(".{block}")
        steps = [f"{name}.{index}" for index in range(len(sources))]
        if state.checkpoint is not None and state.checkpoint.steps.issuperset(steps):
            for step in steps:
                state.resume_step(step)
            return
        if not any(ref.stack == stack for ref in state.student_modules.norms.values()):
            raise UnsupportedBlockStructure(
                f"the layout of {state.plan.layout.family!r} names its blocks alone, not their axes."
            )
        if any(first >= second for first, second in zip(sources, sources[1:], strict=False)):
            raise UnsupportedBlockStructure(f"its blocks come from the teacher's {sources}, which are not in order.")
        teacher, student = state.teacher_run.start(stack), state.student_run.start(stack, changes=True)
        bar = tqdm(range(len(sources)), desc=f"refitting {name}", unit="block", disable=not state.show_progress)
        for index in bar:
            if state.resume_step(steps[index]):
                student.advance()
                continue
            teacher.run_to(sources[index])
            next_source = sources[index + 1] if index + 1 < len(sources) else len(teacher.blocks)
            error = self._refit_block(stack, teacher, student, next_source)
            state.residual_error.setdefault(name, []).append(error)
            state.save_step(steps[index])
        if teacher.next == len(teacher.blocks):
            state.teacher_run.finish(stack)
        state.student_run.finish(stack)

    def _refit_block(
        self, stack: str, teacher: SequentialBlocks, student: SequentialBlocks, next_source: int
    ) -> float:
        """Refit the student's next block; run it, and the teacher up to block `next_source`; return the residual error."""
        state, index = self.state, student.next
        fittable = {name for name, ref in state.student_modules.linear.items() if state.comes_from_teacher(ref)}
        steps = fit_order(student, state.student_modules, stack, index, fittable, state.notes)
        if state.config.refit != Refit.ALL:
            steps = [step for step in steps if step.observed_at is not None]
        targets = self._record_teacher(teacher, steps)
        teacher.run_to(next_source)  # so that the block also fits the dropped ones that follow it
        axis, outputs = state.stack_axis(stack), Streams(state.store)
        for stream in teacher.hidden_states:
            outputs.append(state.project(stream, axis))
        for step in steps:
            return_freed_memory()  # of the fit before
            if step.observed_at is None:
                self._refit_inputs(student, step, targets.pop(step.refs[0].name))
            elif step.observed_at == BLOCK_OUTPUT:
                self._refit_output(student, step, outputs)
            else:
                self._refit_output(student, step, (state.project(each, axis) for each in targets[step.observed_at]))
        student.advance()
        return self._residual_error(student.hidden_states, outputs, stack)

    def _record_teacher(self, teacher: SequentialBlocks, steps: Sequence[FitStep]) -> dict[str, Streams]:
        """Run the teacher's next block, unless it was recorded; return what the steps are fitted to, a tensor per batch.

        Inputs of input projections are recorded under the name of the student's first module, residual streams under the
        name of the norm where they are observed.
        """
        state, block = self.state, teacher.next
        refs: dict[str, ModuleRef] = {}
        for step in steps:
            if step.observed_at is None:
                refs[step.refs[0].name] = state.teacher_module(step.refs[0], block)
            elif step.observed_at != BLOCK_OUTPUT:
                norm = state.student_modules.norms[step.observed_at]
                refs[step.observed_at] = state.teacher_module(norm, block)
        taken = teacher.take_recorded([ref.name for ref in refs.values()])
        if taken is not None:
            return {name: taken[ref.name] for name, ref in refs.items()}
        recorded = {name: Streams(state.store) for name in refs}
        with removable_hooks() as handles:
            for name, ref in refs.items():
                handles.append(register_input_hook(ref.module, recorded[name].append))
            teacher.advance()
        return recorded

    # Input projections

    def _refit_inputs(self, student: SequentialBlocks, step: FitStep, teacher_inputs: Streams) -> None:
        """Fit input projections of one tensor to the teacher's outputs for its own input."""
        first = step.refs[0]
        sums: list[TrainValNormalEquations] = []

        def on_input(batch: int, inputs: Tensor) -> None:
            self._add_inputs(sums, first, inputs, teacher_inputs[batch], batch)
            raise StopForward

        for batch in range(len(self.state.batches)):
            with removable_hooks() as handles:
                handles.append(register_input_hook(first.module, lambda x, b=batch: on_input(b, x)))  # type: ignore[misc]
                student.run_next(batch)
        self._solve_inputs(step.refs, sums)

    def _add_inputs(
        self,
        sums: list[TrainValNormalEquations],
        ref: ModuleRef,
        student_inputs: Tensor,
        teacher_inputs: Tensor,
        batch: int,
    ) -> None:
        state, of_decoder = self.state, reads_decoder_tokens(ref, self.state.student.config)
        x, y = (
            append_bias_column(drop_padding(each, state.batches[batch], state.teacher, of_decoder=of_decoder), True)
            for each in (student_inputs, teacher_inputs)
        )
        if not sums:
            sums.append(TrainValNormalEquations.zeros(x.shape[1], y.shape[1]))
        sums[0].add(x, y, state.held_out_rows(student_inputs, batch, of_decoder=of_decoder))

    def _solve_inputs(self, refs: Sequence[ModuleRef], sums: Sequence[TrainValNormalEquations]) -> None:
        if not sums:
            return
        total, eps = sums[0].reduce(), self.state.eps
        groups = {
            has_bias: [ref for ref in refs if (module_bias(ref.module) is not None) == has_bias]
            for has_bias in (False, True)
        }
        for has_bias, group in groups.items():
            if not group:
                continue
            dtype = fit_dtype(eps)
            if refs[0].is_language_head:  # as many rows as a vocabulary has tokens, in a dtype as exact as the models
                dtype = torch.promote_types(linear_weight(refs[0].module).dtype, torch.float32)
            columns = total if has_bias else total.without_last_feature()
            targets = [self._input_target(ref, has_bias) for ref in group]
            sums_of_group = columns.clone() if all(groups.values()) else columns  # a fit uses them up
            fits = fit_weights(targets, sums_of_group, self.state.config.ridge, eps, dtype)
            for ref, fit in zip(group, fits, strict=True):
                self._assign(ref, fit)

    def _input_target(self, ref: ModuleRef, has_bias: bool) -> FitTarget:
        """Return how to read the rows of an input projection, and what its output lacks of the teacher's."""
        return FitTarget(
            len(linear_weight(ref.module)), lambda rows: weight_and_bias(ref.module, rows), self._teacher_rows(ref)
        )

    def _teacher_rows(self, ref: ModuleRef) -> Callable[[slice], Tensor]:
        """Return what reads the teacher's [weight bias] of outputs that the student keeps, (rows, d_T + 1)."""
        plan = self.state.plan
        parameter, bias = self.state.parameter_plan(ref), plan.parameters.get(ref.name + ".bias")
        transposed = ref.match.row.transposed
        source, axis_map = parameter.source or "", plan.maps(parameter)[len(parameter.axes) - 1 if transposed else 0]
        # Of an untied head a few rows are in memory at a time, where they are stored by themselves.
        by_rows = (
            ref.is_language_head and isinstance(axis_map, Identity) and not transposed and plan.reads_rows(source)
        )
        weight = None if by_rows else plan.read(source)
        weight = weight.T if weight is not None and transposed else weight
        teacher_bias = None if bias is None or bias.source is None else plan.read(bias.source)

        def joined(rows: Tensor | slice) -> Tensor:
            if weight is None:
                assert isinstance(rows, slice)
                part = plan.read(source, (rows.start, rows.stop))
            else:
                part = weight[rows]
            part_of_bias = part.new_zeros(len(part)) if teacher_bias is None else teacher_bias[rows]
            return torch.cat([at_least_float32(part), at_least_float32(part_of_bias)[:, None]], 1)

        def read(rows: slice) -> Tensor:
            if isinstance(axis_map, Selection):
                indices = axis_map.indices[rows]
                kept, is_kept = joined(indices.clamp(min=0)), indices >= 0
                if is_kept.all() and axis_map.factors[rows].eq(1).all():
                    return kept
                return kept.double() * (axis_map.factors[rows].double() * is_kept)[:, None]
            if isinstance(axis_map, Projection):
                return axis_map.matrix[:, rows].cpu().double().T @ joined(slice(None)).double()
            assert isinstance(axis_map, Identity)
            return joined(rows)

        return read

    # Output projections

    def _refit_output(self, student: SequentialBlocks, step: FitStep, targets: Iterable[Tensor]) -> None:
        """Fit an output projection to what the student's residual stream lacks of the teacher's projected ones, `targets`."""
        state, (ref,) = self.state, step.refs
        has_bias = module_bias(ref.module) is not None
        stream_scale = state.transfer.residual_stream_scale(state.parameter_plan(ref))
        of_decoder = reads_decoder_tokens(ref, state.student.config)
        regression = TokenRegression()
        for batch, teacher_stream in enumerate(targets):
            inputs, stream = self._run_output_projection(student, step, batch)
            x, student_stream, target = (
                drop_padding(each, state.batches[batch], state.teacher, of_decoder=of_decoder)
                for each in (inputs, stream, teacher_stream * stream_scale)
            )
            token_weights = 1 / target.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(target.dtype).tiny)
            missing = (target - student_stream) / step.residual_scale
            held_out = state.held_out_rows(inputs, batch, of_decoder=of_decoder)
            regression.add(append_bias_column(x, has_bias) * token_weights, missing * token_weights, held_out)
        self._assign(ref, regression.fit(weight_and_bias(ref.module), state.config.ridge, state.eps))

    def _run_output_projection(self, student: SequentialBlocks, step: FitStep, batch: int) -> tuple[Tensor, Tensor]:
        """Return an output projection's input on a batch, and the residual stream where its output is observed."""
        recorded: dict[str, Tensor] = {}

        def on_input(inputs: Tensor) -> None:
            recorded["inputs"] = inputs

        def on_stream(stream: Tensor) -> None:
            recorded["stream"] = stream
            if "inputs" in recorded:
                raise StopForward

        with removable_hooks() as handles:
            handles.append(register_input_hook(step.refs[0].module, on_input))
            if step.observed_at != BLOCK_OUTPUT:
                norm = self.state.student_modules.norms[step.observed_at or ""].module
                handles.append(register_input_hook(norm, on_stream))
            output = student.run_next(batch)
        stream = recorded["stream"] if step.observed_at != BLOCK_OUTPUT else output
        assert stream is not None
        return recorded["inputs"], stream

    def _assign(self, ref: ModuleRef, fit: Fit | None) -> None:
        """Assign a fit to a module, unless there is none."""
        if fit is not None:
            self.state.assign(ref, fit)
            step = f"refitted on the calibration tokens, ridge {fit.ridge:g}"
            self.state.transfer.record_step(self.state.parameter_plan(ref), step)

    # After the last block

    def _refit_lm_head(self) -> None:
        """Fit the weights outside of blocks that read the residual stream, such as an untied head."""
        state = self.state
        for name, ref in state.student_modules.residual_in.items():
            teacher_ref = state.teacher_modules.residual_in.get(name)
            if ref.block is not None or teacher_ref is None or not state.comes_from_teacher(ref):
                continue
            sums: list[TrainValNormalEquations] = []
            for index in range(len(state.batches)):
                student_inputs = state.student_run.capture_input(ref.module, index)
                teacher_inputs = state.teacher_run.capture_input(teacher_ref.module, index)
                if student_inputs is None or teacher_inputs is None:
                    continue
                if student_inputs.shape[:-1] == teacher_inputs.shape[:-1]:
                    self._add_inputs(sums, ref, student_inputs, teacher_inputs, index)
            self._solve_inputs([ref], sums)

    def _residual_error(self, student_streams: Streams, targets: Streams, stack: str) -> float:
        state = self.state
        of_decoder = is_decoder_stack(stack, state.student.config)
        error = num_tokens = 0.0
        for batch, student_stream, target in zip(state.batches, student_streams, targets, strict=True):
            x, y = (
                drop_padding(each, batch, state.teacher, of_decoder=of_decoder) for each in (student_stream, target)
            )
            squared_norm = y.square().sum(-1, dtype=torch.float64).clamp(min=1e-300)
            error += ((y - x).square().sum(-1, dtype=torch.float64) / squared_norm).sum().item()
            num_tokens += len(squared_norm)
        return all_reduce_scalar(error) / max(all_reduce_scalar(num_tokens), 1.0)
