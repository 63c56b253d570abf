"""In which order a block's weights can be fitted, and where on the stream each is heard: found by running it.

Weights fitted again, block by block: each to what the teacher makes of the same tokens, seen from the student's own stream.

A reading weight is fitted to the teacher's own output (of the heads and neurons that are kept), a writing weight to the
teacher's stream after it, carried through M, less what the student's stream has already. So each block sees, and makes up for,
what those before it have lost. It is ridge regression towards the weight that was carried over: where nothing was lost,
nothing changes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hf_guide.calibration.config import CalibratedConfig, Refit
from hf_guide.calibration.data import Batch
from hf_guide.calibration.forward import capture_input, drop_padding, is_decoder_stack, reads_decoder_tokens
from hf_guide.calibration.least_squares import (
    TrainValNormalEquations,
    append_bias_column,
    at_least_float32,
    max_eps,
    select_ridge,
)
from hf_guide.calibration.modules import ModuleMap, ModuleRef, find_modules, linear_weight, module_bias
from hf_guide.calibration.resume import CalibrationCheckpoint
from hf_guide.calibration.sequential import SequentialBlocks, UnsupportedBlockStructure
from hf_guide.errors import ShapeError
from hf_guide.initialization.plan import ParameterPlan
from hf_guide.initialization.transfer import Transfer, check_no_overflow
from hf_guide.layouts.grammar import Identity, Projection, Selection
from hf_guide.models.hooks import StopForward, register_input_hook, removable_hooks
from hf_guide.utils.distributed import all_reduce_scalar, local_shard
from hf_guide.utils.finite import is_finite

BLOCK_OUTPUT = ""
"""The name of the place where a block's own output is heard."""

RELATIVE_TOLERANCE, MAX_TOLERANCE = 1e-2, 0.1
"""What is written may arrive so far from itself, in units of its length, and with the rounding errors of a dtype so far."""


@dataclass
class FitStep:
    """Modules that are fitted together: readers of one tensor, or one writer, which is heard again at `point`.

    What a writer writes arrives there times `slope` (of a scaled residual connection).
    """

    parts: list[ModuleRef]
    observed_at: str | None = None
    residual_scale: float = 1.0


def fit_order(
    replay: SequentialBlocks, anatomy: ModuleMap, stack: str, number: int, fed: set[str], notes: list[str]
) -> list[FitStep]:
    """Return what is to be fitted in a block, in the order in which it runs, heard on the first batch.

    Args:
        fed: names of the modules that may be fitted.
        notes: takes what cannot be fitted and why.
    """
    readers, writers, points = (
        [part for part in parts.values() if part.stack == stack and part.block == number]
        for parts in (anatomy.readers, anatomy.writers, anatomy.norms)
    )
    found: list[FitStep] = []
    read: list[Tensor] = []

    def hear_reader(part: ModuleRef, heard: Tensor) -> None:
        if read and read[-1] is heard and found and found[-1].observed_at is None:
            found[-1].parts.append(part)
        else:
            found.append(FitStep([part]))
        read.append(heard)

    before: dict[str, Tensor] = {}
    with removable_hooks() as handles:
        for part in readers:
            if part.name in fed:
                handles.append(register_input_hook(part.module, lambda heard, p=part: hear_reader(p, heard)))  # type: ignore[misc]
        for part in writers:
            if part.name in fed:
                hear_writer = lambda _, p=part: found.append(FitStep([p], BLOCK_OUTPUT))  # noqa: E731
                handles.append(register_input_hook(part.module, hear_writer))
        for part in points:
            handles.append(register_input_hook(part.module, lambda heard, n=part.name: before.setdefault(n, heard)))  # type: ignore[misc]
        before[BLOCK_OUTPUT] = replay.run(number, 0, replay.hidden_states[0])
    kept = []
    for stage in found:
        reason = (
            None if stage.observed_at is None else _probe_residual_location(replay, anatomy, number, stage, before)
        )
        note = f"{stage.parts[0].match.row.pattern} was not repaired: {reason}."
        if reason is None:
            kept.append(stage)
        elif note not in notes:
            notes.append(note)
    return kept


def _probe_residual_location(
    replay: SequentialBlocks, anatomy: ModuleMap, number: int, stage: FitStep, before: dict[str, Tensor]
) -> str | None:
    """Find where what a writer writes is next seen on the stream, by writing something else; return why it is nowhere."""
    (part,) = stage.parts
    if part.match.row.output_norm is not None:
        return "a norm stands between it and the stream"
    size = max(_rms(stream) for stream in (replay.hidden_states[0], *before.values()))  # so that none rounds it away
    generator = torch.Generator().manual_seed(0)
    noise = size * torch.randn(before[BLOCK_OUTPUT].shape[-1], generator=generator, dtype=torch.float64)
    after: dict[str, Tensor] = {}

    def disturb(module: nn.Module, args: object, output: Tensor) -> Tensor:
        return output + noise.to(output)

    with removable_hooks() as handles:
        handles.append(part.module.register_forward_hook(disturb))
        for name in before:
            if name != BLOCK_OUTPUT:
                module = anatomy.norms[name].module
                handles.append(register_input_hook(module, lambda heard, n=name: after.setdefault(n, heard)))  # type: ignore[misc]
        after[BLOCK_OUTPUT] = replay.run(number, 0, replay.hidden_states[0])
    rounding = max_eps(linear_weight(part.module).dtype, before[BLOCK_OUTPUT].dtype)
    for name in [*(name for name in after if name != BLOCK_OUTPUT), BLOCK_OUTPUT]:  # in the order in which they run
        change = (after[name].double() - before[name].double()).cpu()
        if change.abs().max() <= 1e-6 * noise.abs().max():
            continue  # this place is before it, or beside it
        slope = (change @ noise / noise.square().sum()).mean().item()
        if not _rms(change - slope * noise) <= _tolerance(slope, rounding) * _rms(noise):
            break
        stage.observed_at, stage.residual_scale = name, slope
        return None
    return "what it writes is nowhere seen on the stream as it is"


def _tolerance(slope: float, rounding: float) -> float:
    """Return how far from `slope` times the noise, in lengths of the noise, it may arrive.

    What is written and the stream it is added to are as long as the noise at most, and each sum of them is rounded.
    """
    return min(RELATIVE_TOLERANCE * max(abs(slope), 1e-3) + 2 * rounding, MAX_TOLERANCE * abs(slope))


def _rms(rows: Tensor) -> float:
    """Return the root mean square of all that is in a tensor."""
    return rows.double().square().mean().sqrt().item()


@dataclass
class BlockReconstructor:
    """What a repair needs to know: both models and what was planned.

    `lost` tells for each of a stack's blocks how much of the stream the student has not, |x_T M - x_S|^2 / |x_T M|^2 with
    each token at length 1, before and after. `checkpoint` is where each step is kept, and gone on with.
    """

    teacher: PreTrainedModel
    student: PreTrainedModel
    transfer: Transfer
    batches: Sequence[Batch]
    config: CalibratedConfig
    lost: dict[str, list[float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    progress: bool = False
    checkpoint: CalibrationCheckpoint | None = None
    changed: list[ModuleRef] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.plan = self.transfer.plan
        self.batches = local_shard(self.batches)
        self.rounding = max_eps(self.teacher.dtype, self.student.dtype)
        self.of_teacher, self.student_modules = (
            find_modules(model, self.plan.layout) for model in (self.teacher, self.student)
        )

    def refit(self) -> None:
        """Fit the student's weights again, stack by stack and then behind the last block."""
        for stack in self.student_modules.blocks:
            try:
                self._refit_stack(stack)
            except UnsupportedBlockStructure as error:
                self.notes.append(f"{stack.removesuffix('.{block}')} was not repaired: {error}")
        if self.config.refit == Refit.ALL and not self.resume_step("heads"):
            self._refit_lm_head()
            self.keep("heads")

    # Going on where a killed run was

    def resume_step(self, step: str) -> bool:
        """Put back the weights that an earlier run of the same call fitted in a step; return whether there are any.

        Steps are asked for in the order in which they are fitted. After one that is not there, none is put back.
        """
        if self.checkpoint is None:
            return False
        kept = self.checkpoint.load_step(step)
        if kept is None:
            self.checkpoint.steps.clear()  # those after it were fitted to what it had made of the student
            return False
        weights, facts = kept
        parts = {**self.student_modules.readers, **self.student_modules.writers}
        for name, value in weights.items():
            module, _, parameter = name.rpartition(".")
            getattr(parts[module].module, parameter).data.copy_(value)
        self.lost, self.notes, self.transfer.steps = facts["lost"], facts["notes"], facts["steps"]
        return True

    def keep(self, step: str) -> None:
        """Keep the weights that were written since the last step."""
        if self.checkpoint is not None:
            weights = {
                f"{part.name}.{name}": value
                for part in self.changed
                for name, value in part.module.named_parameters(recurse=False)
            }
            facts = {"lost": self.lost, "notes": self.notes, "steps": self.transfer.steps}
            self.checkpoint.save_step(step, weights, facts)
        self.changed.clear()

    def write(self, part: ModuleRef, weight: Tensor, bias: Tensor | None = None) -> None:
        """Give a module of the student a fitted weight, (out, in), and a bias where it has one.

        Raises:
            ShapeError: as `store`.
        """
        assign_checked(linear_weight(part.module), weight, part.name + ".weight")
        own = module_bias(part.module)
        if own is not None and bias is not None:
            assign_checked(own, bias, part.name + ".bias")
        self.changed.append(part)

    # One stack

    def _refit_stack(self, stack: str) -> None:
        fed, name = self.plan.stacks[stack], stack.removesuffix(".{block}")
        steps = [f"{name}.{number}" for number in range(len(fed))]
        if self.checkpoint is not None and self.checkpoint.steps.issuperset(steps):
            for step in steps:
                self.resume_step(step)
            return
        if not any(part.stack == stack for part in self.student_modules.norms.values()):
            raise UnsupportedBlockStructure(
                f"what is known of {self.plan.layout.family!r} is its blocks alone, not their axes."
            )
        if any(first >= second for first, second in zip(fed, fed[1:], strict=False)):
            raise UnsupportedBlockStructure(
                f"its blocks come from the teacher's {fed}, which is not their order there."
            )
        teacher = SequentialBlocks(self.teacher, self.of_teacher.blocks[stack], self.batches, "the teacher")
        student = SequentialBlocks(self.student, self.student_modules.blocks[stack], self.batches, "the student")
        parts = {**self.student_modules.readers, **self.student_modules.writers}
        may = {name for name, part in parts.items() if self._comes_from_teacher(part)}
        for number in tqdm(range(len(fed)), desc=f"repairing {stack}", unit="block", disable=not self.progress):
            if self.resume_step(steps[number]):
                student.step()
                continue
            while teacher.next < fed[number]:
                teacher.step()
            stages = fit_order(student, self.student_modules, stack, number, may, self.notes)
            if self.config.refit != Refit.ALL:
                stages = [stage for stage in stages if stage.observed_at is not None]
            taps = self._tap(teacher, stack, fed[number], stages)
            end = fed[number + 1] if number + 1 < len(fed) else len(teacher.blocks)
            while teacher.next < end:  # dropped blocks are merged into the one before them
                teacher.step()
            taps[BLOCK_OUTPUT] = list(teacher.hidden_states)
            for stage in stages:
                if stage.observed_at is None:
                    self._refit_inputs(student, number, stage, taps.pop(stage.parts[0].name))
                else:
                    self._refit_output(student, number, stage, taps[stage.observed_at])
            student.step()
            self.lost.setdefault(name, []).append(
                self._relative_error(student.hidden_states, taps[BLOCK_OUTPUT], stack)
            )
            taps.clear()  # before the next block's are held beside them
            self.keep(steps[number])

    def _tap(
        self, teacher: SequentialBlocks, stack: str, number: int, stages: Sequence[FitStep]
    ) -> dict[str, list[Tensor]]:
        """Run the teacher's block and return what is given to the twins of readers and of points, a tensor a batch."""
        taps: dict[str, list[Tensor]] = {}
        names: dict[str, nn.Module] = {}
        for stage in stages:
            if stage.observed_at is None:
                names[stage.parts[0].name] = self._twin(stage.parts[0], number).module
            elif stage.observed_at != BLOCK_OUTPUT:
                names[stage.observed_at] = self._twin(self.student_modules.norms[stage.observed_at], number).module
        with removable_hooks() as handles:
            for name, module in names.items():
                handles.append(register_input_hook(module, taps.setdefault(name, []).append))
            teacher.step()
        return taps

    def _twin(self, part: ModuleRef, number: int) -> ModuleRef:
        """Return the teacher's module that a student's module comes from."""
        name = part.match.row.pattern.replace("{block}", str(number))
        for placeholder, value in part.match.numbers.items():
            name = name.replace("{" + placeholder + "}", value)
        return {**self.of_teacher.norms, **self.of_teacher.readers, **self.of_teacher.writers}[name]

    # One weight

    def _refit_inputs(self, student: SequentialBlocks, number: int, stage: FitStep, taps: Sequence[Tensor]) -> None:
        """Fit weights that read one tensor to what the teacher's make of theirs."""
        first = stage.parts[0]
        sums: list[TrainValNormalEquations] = []

        def hear(batch: int, heard: Tensor) -> None:
            self._add_input_rows(sums, first, heard, taps[batch], batch)
            raise StopForward

        for batch in range(len(self.batches)):
            with removable_hooks() as handles:
                handles.append(register_input_hook(first.module, lambda heard, b=batch: hear(b, heard)))  # type: ignore[misc]
                student.hear(number, batch)
        self._solve_inputs(stage.parts, sums)

    def _add_input_rows(
        self, sums: list[TrainValNormalEquations], part: ModuleRef, heard: Tensor, wanted: Tensor, batch: int
    ) -> None:
        of_decoder, mask = reads_decoder_tokens(part, self.student.config), self.batches[batch]
        x, y = (append_bias_column(drop_padding(each, mask, of_decoder=of_decoder), True) for each in (heard, wanted))
        if not sums:
            sums.append(TrainValNormalEquations.of(x.shape[1], y.shape[1]))
        sums[0].add(x, y, batch)

    def _solve_inputs(self, parts: Sequence[ModuleRef], sums: Sequence[TrainValNormalEquations]) -> None:
        if not sums:
            return
        total = sums[0].gather()
        for part in parts:
            biased = module_bias(part.module) is not None
            size = None if biased else -1
            own = weight_and_bias(part.module) if biased else linear_weight(part.module).double().cpu()
            source = self._source(part)
            first, second = (
                (half.gram[:size, :size], half.cross[:, :size]) for half in (total.fitted, total.held_out)
            )
            residuals = source @ first[1] - own @ first[0], source @ second[1] - own @ second[0]
            self._correct(part, own, (first[0], second[0]), residuals, biased)

    def _source(self, part: ModuleRef) -> Tensor:
        """Return the teacher's [weight bias] with the output that the student keeps, (out_S, d_T + 1), float64."""
        weight, bias = self._site(part, "weight"), self.plan.parameters.get(part.name + ".bias")
        kept = self.plan.read(weight.source or "").double()
        kept = kept.T if part.match.row.transposed else kept
        chosen = self.plan.maps(weight)[len(weight.axes) - 1 if part.match.row.transposed else 0]
        teacher_bias = torch.zeros(len(kept), dtype=torch.float64)
        if bias is not None and bias.source is not None:
            teacher_bias = self.plan.read(bias.source).double()
        kept = torch.cat([kept, teacher_bias[:, None]], 1)
        if isinstance(chosen, Selection):
            rows = kept[chosen.indices.clamp(min=0)] * (chosen.indices >= 0).double()[:, None]
            return rows * chosen.factors.double()[:, None]
        if isinstance(chosen, Projection):
            return chosen.matrix.cpu().double().T @ kept
        assert isinstance(chosen, Identity)
        return kept

    def _refit_output(self, student: SequentialBlocks, number: int, stage: FitStep, taps: Sequence[Tensor]) -> None:
        """Fit a weight that writes onto the stream to what is missing there."""
        (part,) = stage.parts
        biased = module_bias(part.module) is not None
        sums: list[TrainValNormalEquations] = []
        factor = self.transfer.residual_stream_scale(self._site(part, "weight"))
        of_decoder = reads_decoder_tokens(part, self.student.config)
        for batch in range(len(self.batches)):
            heard: dict[str, Tensor] = {}

            def hear(name: str, tensor: Tensor, last: bool, heard: dict[str, Tensor] = heard) -> None:
                heard[name] = tensor
                if last:
                    raise StopForward

            with removable_hooks() as handles:
                handles.append(register_input_hook(part.module, lambda t: hear("inner", t, False)))
                if stage.observed_at != BLOCK_OUTPUT:
                    point = self.student_modules.norms[stage.observed_at or ""].module
                    handles.append(register_input_hook(point, lambda t: hear("stream", t, "inner" in heard)))  # noqa: B023
                output = student.hear(number, batch)
            stream = heard["stream"] if stage.observed_at != BLOCK_OUTPUT else output
            assert stream is not None
            x, has, wanted = (
                drop_padding(each, self.batches[batch], of_decoder=of_decoder)
                for each in (heard["inner"], stream, self._carried(taps[batch], part.axis) * factor)
            )
            weights = 1 / wanted.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(wanted.dtype).tiny)
            missing = (wanted - has) / stage.residual_scale
            if not sums:
                sums.append(TrainValNormalEquations.of(x.shape[1] + biased, missing.shape[1]))
            sums[0].add(append_bias_column(x, biased) * weights, missing * weights, batch)
        if sums:
            total = sums[0].gather()
            own = weight_and_bias(part.module) if biased else linear_weight(part.module).double().cpu()
            grams = total.fitted.gram, total.held_out.gram
            self._correct(part, own, grams, (total.fitted.cross, total.held_out.cross), biased)

    def _correct(
        self,
        part: ModuleRef,
        own: Tensor,
        grams: tuple[Tensor, Tensor],
        residuals: tuple[Tensor, Tensor],
        biased: bool,
    ) -> None:
        found, ridge = select_ridge(own, grams, residuals, self.config.ridge, self.rounding)
        if ridge is None:
            return
        value = own + found
        self.write(part, value[:, :-1] if biased else value, value[:, -1] if biased else None)
        self.transfer.record_step(
            self._site(part, "weight"), f"fitted again on the calibration tokens, ridge {ridge:g}"
        )

    # Behind the last block

    def _refit_lm_head(self) -> None:
        """Fit the weights outside of blocks that read the stream, such as an untied head."""
        for name, part in self.student_modules.readers.items():
            twin = self.of_teacher.readers.get(name)
            if part.block is not None or twin is None or not self._comes_from_teacher(part):
                continue
            sums: list[TrainValNormalEquations] = []
            for number, batch in enumerate(self.batches):
                heard = [
                    capture_input(model, each.module, batch)
                    for model, each in ((self.student, part), (self.teacher, twin))
                ]
                if heard[0] is not None and heard[1] is not None and heard[0].shape[:-1] == heard[1].shape[:-1]:
                    self._add_input_rows(sums, part, heard[0], heard[1], number)
            self._solve_inputs([part], sums)

    # Small things

    def _comes_from_teacher(self, part: ModuleRef) -> bool:
        """Whether a module's weight came from the teacher, and is no other's as well."""
        site = self.plan.parameters.get(part.name + ".weight")
        return site is not None and site.source is not None and site.name not in self.plan.random

    def _site(self, part: ModuleRef, parameter: str) -> ParameterPlan:
        return self.plan.parameters[f"{part.name}.{parameter}"]

    def _carried(self, stream: Tensor, axis: str) -> Tensor:
        """Return the teacher's stream in the student's coordinates, in float32 or better, and so all that is made of it."""
        axis = axis if axis in self.plan.widths else self._axis_of(axis)
        matrix = self.plan.bases.get(axis)
        stream = at_least_float32(stream)
        return stream if matrix is None else stream @ matrix.to(stream)

    def _axis_of(self, stack: str) -> str:
        return next(part.axis for part in self.student_modules.norms.values() if part.stack == stack)

    def _relative_error(self, has: Sequence[Tensor], wanted: Sequence[Tensor], stack: str) -> float:
        lost = whole = 0.0
        of_decoder = is_decoder_stack(stack, self.student.config)
        for batch, one, other in zip(self.batches, has, wanted, strict=True):
            x, y = (drop_padding(each, batch, of_decoder=of_decoder) for each in (one, self._carried(other, stack)))
            length = y.square().sum(-1, dtype=torch.float64).clamp(min=1e-300)
            lost += ((y - x).square().sum(-1, dtype=torch.float64) / length).sum().item()
            whole += len(length)
        return all_reduce_scalar(lost) / max(all_reduce_scalar(whole), 1.0)


def assign_checked(parameter: Tensor, value: Tensor, name: str) -> None:
    """Give a parameter of the student a fitted value of its shape.

    Raises:
        ShapeError: a value that is not finite, or more than the parameter's dtype holds.
    """
    if not is_finite(value):
        raise ShapeError(
            f"What was fitted for {name} is not finite, expected finite numbers: activations overflow in {parameter.dtype}. "
            "Make the student with dtype='bfloat16' or 'float32'."
        )
    parameter.data.copy_(value)
    check_no_overflow(parameter, value, name)


def weight_and_bias(module: nn.Module) -> Tensor:
    """Return a linear module's [weight bias], (out, in + 1), float64, on the CPU."""
    bias = module_bias(module)
    assert bias is not None
    return torch.cat([linear_weight(module), bias[:, None]], 1).detach().double().cpu()
