"""Weights fitted again, block by block: each to what the teacher makes of the same tokens, seen from the student's own stream.

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

from hf_guide.calibration.anatomy import Part, bias_of, study, weight_of
from hf_guide.calibration.batches import Batch
from hf_guide.calibration.checkpoint import CalibrationCheckpoint
from hf_guide.calibration.listening import Heard, heard_at, hears_decoder, hooks, is_decoder, on_input, real_tokens
from hf_guide.calibration.regression import Halves, best_correction, in_single, rounding_of, with_one
from hf_guide.calibration.replay import NotReplayable, Replay
from hf_guide.calibration.stages import OUTPUT, Stage, find_stages
from hf_guide.errors import ShapeError
from hf_guide.initialization.axes import Identity, Projection, Selection
from hf_guide.initialization.choices import Repair, RepairInputs
from hf_guide.initialization.parameters import check_stored
from hf_guide.initialization.plan import Site
from hf_guide.initialization.transfer import Transfer
from hf_guide.worlds import add_number, own_share


@dataclass
class Mender:
    """What a repair needs to know: both models and what was planned.

    `lost` tells for each of a stack's blocks how much of the stream the student has not, |x_T M - x_S|^2 / |x_T M|^2 with
    each token at length 1, before and after. `checkpoint` is where each step is kept, and gone on with.
    """

    teacher: PreTrainedModel
    student: PreTrainedModel
    transfer: Transfer
    batches: Sequence[Batch]
    lost: dict[str, list[float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    progress: bool = False
    checkpoint: CalibrationCheckpoint | None = None
    changed: list[Part] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.plan = self.transfer.plan
        self.options = self.plan.options
        self.batches = own_share(self.batches)
        self.rounding = rounding_of(self.teacher.dtype, self.student.dtype)
        self.of_teacher, self.of_student = (study(model, self.plan.layout) for model in (self.teacher, self.student))

    def mend(self) -> None:
        """Fit the student's weights again, stack by stack and then behind the last block."""
        for stack in self.of_student.blocks:
            try:
                self._mend_stack(stack)
            except NotReplayable as error:
                self.notes.append(f"{stack.removesuffix('.{block}')} was not repaired: {error}")
        if self.options.repair == Repair.ALL and not self.restore("heads"):
            self._mend_heads()
            self.keep("heads")

    # Going on where a killed run was

    def restore(self, step: str) -> bool:
        """Put back the weights that an earlier run of the same call fitted in a step; return whether there are any.

        Steps are asked for in the order in which they are fitted. After one that is not there, none is put back.
        """
        if self.checkpoint is None:
            return False
        kept = self.checkpoint.fitted(step)
        if kept is None:
            self.checkpoint.steps.clear()  # those after it were fitted to what it had made of the student
            return False
        weights, facts = kept
        parts = {**self.of_student.readers, **self.of_student.writers}
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
            self.checkpoint.keep_fitted(step, weights, facts)
        self.changed.clear()

    def write(self, part: Part, weight: Tensor, bias: Tensor | None = None) -> None:
        """Give a module of the student a fitted weight, (out, in), and a bias where it has one.

        Raises:
            ShapeError: as `store`.
        """
        store(weight_of(part.module), weight, part.name + ".weight")
        own = bias_of(part.module)
        if own is not None and bias is not None:
            store(own, bias, part.name + ".bias")
        self.changed.append(part)

    # One stack

    def _mend_stack(self, stack: str) -> None:
        fed, name = self.plan.stacks[stack], stack.removesuffix(".{block}")
        steps = [f"{name}.{number}" for number in range(len(fed))]
        if self.checkpoint is not None and self.checkpoint.steps.issuperset(steps):
            for step in steps:
                self.restore(step)
            return
        if not any(part.stack == stack for part in self.of_student.norms.values()):
            raise NotReplayable(f"what is known of {self.plan.layout.family!r} is its blocks alone, not their axes.")
        if any(first >= second for first, second in zip(fed, fed[1:], strict=False)):
            raise NotReplayable(f"its blocks come from the teacher's {fed}, which is not their order there.")
        teacher = Replay(self.teacher, self.of_teacher.blocks[stack], self.batches, "the teacher")
        student = Replay(self.student, self.of_student.blocks[stack], self.batches, "the student")
        parts = {**self.of_student.readers, **self.of_student.writers}
        may = {name for name, part in parts.items() if self._is_fed(part)}
        for number in tqdm(range(len(fed)), desc=f"repairing {stack}", unit="block", disable=not self.progress):
            if self.restore(steps[number]):
                student.step()
                continue
            while teacher.next < fed[number]:
                teacher.step()
            if self.options.repair_inputs == RepairInputs.TEACHER:
                dtype = student.streams[0].dtype
                student.streams = [self._carried(stream, stack).to(dtype) for stream in teacher.streams]
            stages = find_stages(student, self.of_student, stack, number, may, self.notes)
            if self.options.repair != Repair.ALL:
                stages = [stage for stage in stages if stage.point is not None]
            taps = self._tap(teacher, stack, fed[number], stages)
            end = fed[number + 1] if number + 1 < len(fed) else len(teacher.blocks)
            if self.options.absorb_blocks:
                while teacher.next < end:
                    teacher.step()
            taps[OUTPUT] = list(teacher.streams)
            for stage in stages:
                if stage.point is None:
                    self._mend_readers(student, number, stage, taps.pop(stage.parts[0].name))
                else:
                    self._mend_writer(student, number, stage, taps[stage.point])
            student.step()
            self.lost.setdefault(name, []).append(self._share_lost(student.streams, taps[OUTPUT], stack))
            taps.clear()  # before the next block's are held beside them
            self.keep(steps[number])

    def _tap(self, teacher: Replay, stack: str, number: int, stages: Sequence[Stage]) -> dict[str, list[Tensor]]:
        """Run the teacher's block and return what is given to the twins of readers and of points, a tensor a batch."""
        taps: dict[str, list[Tensor]] = {}
        names: dict[str, nn.Module] = {}
        for stage in stages:
            if stage.point is None:
                names[stage.parts[0].name] = self._twin(stage.parts[0], number).module
            elif stage.point != OUTPUT:
                names[stage.point] = self._twin(self.of_student.norms[stage.point], number).module
        with hooks() as handles:
            for name, module in names.items():
                handles.append(on_input(module, taps.setdefault(name, []).append))
            teacher.step()
        return taps

    def _twin(self, part: Part, number: int) -> Part:
        """Return the teacher's module that a student's module comes from."""
        name = part.match.row.pattern.replace("{block}", str(number))
        for placeholder, value in part.match.numbers.items():
            name = name.replace("{" + placeholder + "}", value)
        return {**self.of_teacher.norms, **self.of_teacher.readers, **self.of_teacher.writers}[name]

    # One weight

    def _mend_readers(self, student: Replay, number: int, stage: Stage, taps: Sequence[Tensor]) -> None:
        """Fit weights that read one tensor to what the teacher's make of theirs."""
        first = stage.parts[0]
        sums: list[Halves] = []

        def hear(batch: int, heard: Tensor) -> None:
            self._add_read(sums, first, heard, taps[batch], batch)
            raise Heard

        for batch in range(len(self.batches)):
            with hooks() as handles:
                handles.append(on_input(first.module, lambda heard, b=batch: hear(b, heard)))  # type: ignore[misc]
                student.hear(number, batch)
        self._fit_readers(stage.parts, sums)

    def _add_read(self, sums: list[Halves], part: Part, heard: Tensor, wanted: Tensor, batch: int) -> None:
        of_decoder, mask = hears_decoder(part, self.student.config), self.batches[batch]
        x, y = (with_one(real_tokens(each, mask, of_decoder=of_decoder), True) for each in (heard, wanted))
        if not sums:
            sums.append(Halves.of(x.shape[1], y.shape[1]))
        sums[0].add(x, y, batch)

    def _fit_readers(self, parts: Sequence[Part], sums: Sequence[Halves]) -> None:
        if not sums:
            return
        total = sums[0].gather()
        for part in parts:
            biased = bias_of(part.module) is not None
            size = None if biased else -1
            own = with_bias(part.module) if biased else weight_of(part.module).double().cpu()
            source = self._source(part)
            first, second = (
                (half.gram[:size, :size], half.cross[:, :size]) for half in (total.fitted, total.held_out)
            )
            residuals = source @ first[1] - own @ first[0], source @ second[1] - own @ second[0]
            self._correct(part, own, (first[0], second[0]), residuals, biased)

    def _source(self, part: Part) -> Tensor:
        """Return the teacher's [weight bias] with the output that the student keeps, (out_S, d_T + 1), float64."""
        weight, bias = self._site(part, "weight"), self.plan.sites.get(part.name + ".bias")
        kept = self.plan.read(weight.source or "").double()
        kept = kept.T if part.match.row.transposed else kept
        chosen = self.plan.maps(weight)[len(weight.axes) - 1 if part.match.row.transposed else 0]
        teacher_bias = torch.zeros(len(kept), dtype=torch.float64)
        if bias is not None and bias.source is not None:
            teacher_bias = self.plan.read(bias.source).double()
        kept = torch.cat([kept, teacher_bias[:, None]], 1)
        if isinstance(chosen, Selection):
            rows = kept[chosen.places.clamp(min=0)] * (chosen.places >= 0).double()[:, None]
            return rows * chosen.factors.double()[:, None]
        if isinstance(chosen, Projection):
            return chosen.matrix.cpu().double().T @ kept
        assert isinstance(chosen, Identity)
        return kept

    def _mend_writer(self, student: Replay, number: int, stage: Stage, taps: Sequence[Tensor]) -> None:
        """Fit a weight that writes onto the stream to what is missing there."""
        (part,) = stage.parts
        biased = bias_of(part.module) is not None
        sums: list[Halves] = []
        factor = self.transfer.stream_scale(self._site(part, "weight"))
        of_decoder = hears_decoder(part, self.student.config)
        for batch in range(len(self.batches)):
            heard: dict[str, Tensor] = {}

            def hear(name: str, tensor: Tensor, last: bool, heard: dict[str, Tensor] = heard) -> None:
                heard[name] = tensor
                if last:
                    raise Heard

            with hooks() as handles:
                handles.append(on_input(part.module, lambda t: hear("inner", t, False)))
                if stage.point != OUTPUT:
                    point = self.of_student.norms[stage.point or ""].module
                    handles.append(on_input(point, lambda t: hear("stream", t, "inner" in heard)))  # noqa: B023
                output = student.hear(number, batch)
            stream = heard["stream"] if stage.point != OUTPUT else output
            assert stream is not None
            x, has, wanted = (
                real_tokens(each, self.batches[batch], of_decoder=of_decoder)
                for each in (heard["inner"], stream, self._carried(taps[batch], part.axis) * factor)
            )
            weights = 1 / wanted.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(wanted.dtype).tiny)
            missing = (wanted - has) / stage.slope
            if not sums:
                sums.append(Halves.of(x.shape[1] + biased, missing.shape[1]))
            sums[0].add(with_one(x, biased) * weights, missing * weights, batch)
        if sums:
            total = sums[0].gather()
            own = with_bias(part.module) if biased else weight_of(part.module).double().cpu()
            grams = total.fitted.gram, total.held_out.gram
            self._correct(part, own, grams, (total.fitted.cross, total.held_out.cross), biased)

    def _correct(
        self, part: Part, own: Tensor, grams: tuple[Tensor, Tensor], residuals: tuple[Tensor, Tensor], biased: bool
    ) -> None:
        found, ridge = best_correction(own, grams, residuals, self.options.ridge, self.rounding)
        if ridge is None:
            return
        value = own + found
        self.write(part, value[:, :-1] if biased else value, value[:, -1] if biased else None)
        self.transfer.note_step(self._site(part, "weight"), f"fitted again on the calibration tokens, ridge {ridge:g}")

    # Behind the last block

    def _mend_heads(self) -> None:
        """Fit the weights outside of blocks that read the stream, such as an untied head."""
        for name, part in self.of_student.readers.items():
            twin = self.of_teacher.readers.get(name)
            if part.block is not None or twin is None or not self._is_fed(part):
                continue
            sums: list[Halves] = []
            for number, batch in enumerate(self.batches):
                heard = [
                    heard_at(model, each.module, batch) for model, each in ((self.student, part), (self.teacher, twin))
                ]
                if heard[0] is not None and heard[1] is not None and heard[0].shape[:-1] == heard[1].shape[:-1]:
                    self._add_read(sums, part, heard[0], heard[1], number)
            self._fit_readers([part], sums)

    # Small things

    def _is_fed(self, part: Part) -> bool:
        """Whether a module's weight came from the teacher, and is no other's as well."""
        site = self.plan.sites.get(part.name + ".weight")
        return site is not None and site.source is not None and site.name not in self.plan.random

    def _site(self, part: Part, parameter: str) -> Site:
        return self.plan.sites[f"{part.name}.{parameter}"]

    def _carried(self, stream: Tensor, axis: str) -> Tensor:
        """Return the teacher's stream in the student's coordinates, in float32 or better, and so all that is made of it."""
        axis = axis if axis in self.plan.widths else self._axis_of(axis)
        matrix = self.plan.bases.get(axis)
        stream = in_single(stream)
        return stream if matrix is None else stream @ matrix.to(stream)

    def _axis_of(self, stack: str) -> str:
        return next(part.axis for part in self.of_student.norms.values() if part.stack == stack)

    def _share_lost(self, has: Sequence[Tensor], wanted: Sequence[Tensor], stack: str) -> float:
        lost = whole = 0.0
        of_decoder = is_decoder(stack, self.student.config)
        for batch, one, other in zip(self.batches, has, wanted, strict=True):
            x, y = (real_tokens(each, batch, of_decoder=of_decoder) for each in (one, self._carried(other, stack)))
            length = y.square().sum(-1, dtype=torch.float64).clamp(min=1e-300)
            lost += ((y - x).square().sum(-1, dtype=torch.float64) / length).sum().item()
            whole += len(length)
        return add_number(lost) / max(add_number(whole), 1.0)


def store(parameter: Tensor, value: Tensor, name: str) -> None:
    """Give a parameter of the student a fitted value of its shape.

    Raises:
        ShapeError: a value that is not finite, or more than the parameter's dtype holds.
    """
    if not bool(value.isfinite().all()):
        raise ShapeError(
            f"What was fitted for {name} is not finite, expected finite numbers: activations overflow in {parameter.dtype}. "
            "Make the student with dtype='bfloat16' or 'float32'."
        )
    parameter.data.copy_(value)
    check_stored(parameter, value, name)


def with_bias(module: nn.Module) -> Tensor:
    """Return a linear module's [weight bias], (out, in + 1), float64, on the CPU."""
    bias = bias_of(module)
    assert bias is not None
    return torch.cat([weight_of(module), bias[:, None]], 1).detach().double().cpu()
