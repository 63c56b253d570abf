"""Score shapes by the loss of an untrained calibrated start on calibration data that the start has not seen.

The teacher is run once for statistics that all shapes share, and shapes of one depth keep the same blocks. Every shape gets a
quick start, refitted on a part of the data, and the best of them a whole one: with `WHOLE_STARTS` of these the search costs a
few times one `from_teacher`. Where the user allows `search_steps`, the whole starts are distilled for so many steps and scored
again. With a folder, an interrupted search continues: only self-generated text is generated again.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from hf_guide.calibration.batches import Batch, first_rows, iter_rows, unpadded_ids
from hf_guide.calibration.block_weights import BlockWeights
from hf_guide.calibration.collection import (
    CalibrationResult,
    all_held,
    check_same_call,
    collect_calibration,
    read_calibration_data,
    running_teacher,
    split_for_processes,
)
from hf_guide.calibration.config import CalibratedConfig
from hf_guide.calibration.forward import calibration_mode, running_device
from hf_guide.calibration.importance import BlockSelection
from hf_guide.calibration.output_comparison import OutputComparison
from hf_guide.initialization.registry import StudentSetup
from hf_guide.initialization.student_shape import StudentShape
from hf_guide.methods.calibrated import CalibratedMethod
from hf_guide.models.layer_mapping import width_of_config
from hf_guide.models.targets import complete_inputs
from hf_guide.shapes.candidates import ShapeCandidate
from hf_guide.utils.checksums import read_json, write_json
from hf_guide.utils.distributed import all_reduce_scalar, all_reduce_sum_, rank_and_world_size
from hf_guide.utils.fingerprint import comparable_config
from hf_guide.utils.half_precision import without_autocast

HELD_OUT_SHARE = 0.25
"""Of the calibration examples, which only score."""

WHOLE_STARTS = 3
"""How many shapes get a whole start."""

QUICK_SHARE = 0.125
"""Of the batches that starts are calibrated on, those of a quick start; at least one."""

MAX_REFERENCE_NUMBERS = 1 << 26
"""Numbers of the teacher's outputs that are kept to compare with: 256 MiB."""

SEARCH_LEARNING_RATE, SEARCH_RATE_WIDTH = 1e-3, 576
"""Of `search_steps`: AdamW's peak rate for teachers up to this width, and less in proportion for wider ones."""

SCORES_NAME = "scores.json"


def split_examples(batches: Sequence[Batch], share: float) -> tuple[list[Batch], list[Batch]]:
    """Return the batches without the last of their examples, a share of all and at least one, and these one by one.

    Example:
        >>> fitted, rows = split_examples([{"input_ids": torch.zeros(6, 9)}, {"input_ids": torch.zeros(2, 9)}], 0.5)
        >>> len(fitted), len(fitted[0]["input_ids"]), len(rows)
        (1, 4, 4)
    """
    examples = [list(iter_rows(batch)) for batch in batches]
    missing = max(1, round(share * sum(map(len, examples))))
    fitted, held_out = list(batches), list[Batch]()
    while missing > len(held_out):
        last, rows = fitted.pop(), examples.pop()
        kept = max(0, len(rows) - (missing - len(held_out)))
        held_out[:0] = rows[kept:]
        if kept:
            fitted.append(first_rows(last, kept))
    return fitted, held_out


class CalibratedScorer:
    """Scores shapes by calibrated starts.

    Args:
        setup: As of a student of the teacher's own shape: each shape replaces its config, class and options.
        config: The method's options.
        resolve: Returns the student of overrides, with the blocks that an influence selects.
        folder: Where statistics and scores are saved and continued from; None for nowhere.
        search_steps: Steps of distillation of the whole starts, a calibration batch each; None for none.
        positions_of: A config with as many positions as every shape; None where they have the teacher's.

    Raises:
        OptionError: The outputs of the task cannot be compared, or there is too little data to hold some out.
    """

    @without_autocast()
    def __init__(
        self,
        setup: StudentSetup,
        config: CalibratedConfig,
        resolve: "Callable[[Mapping[str, Any], Any], StudentShape]",
        folder: Path | None,
        search_steps: int | None = None,
        *,
        positions_of: PreTrainedConfig | None = None,
    ):
        self.setup, self.config, self.resolve, self.search_steps = setup, config, resolve, search_steps
        self.positions_of = positions_of
        self.comparison = OutputComparison(
            setup,
            what="Shapes",
            advice="Let `hf-guide shapes` rank them by its rule, without calibration data, and pass the sizes that it prints.",
        )
        call = _describe_search(setup, config)
        check_same_call(setup.calibration_dataset, folder, call)
        teacher, weights = running_teacher(setup.source, setup.teacher, setup.layout)
        with all_held(weights):
            fitted, self.held_out = self._split(teacher, weights)
            self.reference = self._reference(teacher)
        self.calibration = collect_calibration(
            setup.source,
            setup.teacher,
            fitted,
            config,
            calibration_cache_dir=folder,
            call=call,
            show_progress=setup.show_progress,
            **setup.hub,
        )
        self.folder = folder
        self.saved = _read_scores(folder)
        self._selections: dict[str, dict[str, BlockSelection]] = {}

    @without_autocast()
    def rank(self, candidates: Sequence[ShapeCandidate]) -> list[ShapeCandidate]:
        """Return the candidates with their losses, the best first: those with a whole start before the others."""
        bar = {"unit": "shape", "disable": not self.setup.show_progress}
        quick = [
            dataclasses.replace(each, quick_loss=self._losses(each, quick=True)[0])
            for each in tqdm(candidates, desc="shapes: quick starts", **bar)
        ]
        quick.sort(key=lambda each: _rank_of(each.quick_loss))
        whole = []
        for each in tqdm(quick[:WHOLE_STARTS], desc="shapes: whole starts", **bar):
            loss, *distilled = self._losses(each, quick=False)
            whole.append(dataclasses.replace(each, loss=loss, distilled_loss=distilled[0] if distilled else None))
        whole.sort(key=lambda each: _rank_of(each.distilled_loss if self.search_steps else each.loss))
        return [*whole, *quick[WHOLE_STARTS:]]

    @without_autocast()
    def bits_per_byte(self, candidate: ShapeCandidate, tokenizer: PreTrainedTokenizerBase) -> float:
        """Return the bits that a causal model's quick start needs for a byte of the text held out."""
        # The loss is a mean over these tokens: without padding and the first one, which nothing predicts.
        rows = [unpadded_ids(row)[1:] for row in self.held_out]
        num_bytes = sum(len(str(tokenizer.decode(ids, skip_special_tokens=True)).encode()) for ids in rows)
        return self._losses(candidate, quick=True)[0] * sum(map(len, rows)) / max(num_bytes, 1) / math.log(2)

    def _split(self, teacher: PreTrainedModel, weights: BlockWeights | None) -> tuple[list[Batch], list[Batch]]:
        """Return the batches that starts are calibrated on, and rows that only score."""
        setup = self.setup
        data = read_calibration_data(
            setup.calibration_dataset,
            teacher,
            weights,
            setup.teacher,
            setup.layout,
            self.config,
            student=self.positions_of,
            show_progress=setup.show_progress,
            **setup.hub,
        )
        self.num_tokens = data.num_tokens
        fitted, rows = split_examples(data.batches, HELD_OUT_SHARE)
        fitted = split_for_processes(fitted, data.token_limit, held_out=len(rows))
        self.comparison.check_examples(len(rows))
        return fitted, [complete_inputs(teacher, self.comparison.task, row) for row in rows]

    def _losses(self, candidate: ShapeCandidate, *, quick: bool) -> list[float]:
        """Return the loss of a start, and that after `search_steps` of distillation where it is a whole one."""
        distils = self.search_steps is not None and not quick
        key = json.dumps([candidate.sizes, candidate.overrides, quick, *([self.search_steps] if distils else [])])
        if key not in self.saved:
            student = self._start(candidate, quick=quick)
            self.saved[key] = [self._held_out_loss(student)]
            if distils:
                self._distil(student)
                self.saved[key].append(self._held_out_loss(student))
            if self.folder is not None and rank_and_world_size()[0] == 0:
                write_json(self.folder / SCORES_NAME, self.saved)
        return self.saved[key]

    def _start(self, candidate: ShapeCandidate, *, quick: bool) -> PreTrainedModel:
        """Return the student of a candidate; a quick one is refitted on a part of the data."""
        config, calibration = self.config, dataclasses.replace(self.calibration, checkpoint=None, notes=[])
        if quick:
            batches = calibration.teacher.batches
            count = max(1, round(QUICK_SHARE * len(batches)))
            calibration = dataclasses.replace(calibration, teacher=calibration.teacher.on_first_batches(count))
        setup, layers = self._setup(candidate, calibration)
        method = CalibratedMethod(config)
        method.reuse(calibration, setup)
        key = json.dumps([layers, method.searched_stacks()], sort_keys=True)
        method.searched = self._selections.get(key)
        while method.reselect(layers) is not None:
            setup, layers = self._setup(candidate, calibration)
        if method.searched is not None:
            self._selections[key] = method.searched
        student = method.build(setup)
        method.initialize(student, setup)
        return student.eval()

    def _setup(
        self, candidate: ShapeCandidate, calibration: CalibrationResult
    ) -> tuple[StudentSetup, dict[str, list[int]]]:
        """Return the setup of a candidate's student, and by stack the blocks that its config has by the scores."""
        scores = {stack: each.tolist() for stack, each in calibration.block_scores.items()}
        shape = self.resolve(candidate.overrides, scores)
        setup = dataclasses.replace(
            self.setup,
            model_class=shape.model_class,
            config=shape.config,
            options=shape.plan_options(self.setup.options),
            show_progress=False,
        )
        return setup, shape.layers

    def _distil(self, student: PreTrainedModel) -> None:
        """Train a student on the teacher's outputs for the batches that it was calibrated on, in float32, in their order."""
        steps, world_size = self.search_steps or 0, rank_and_world_size()[1]
        running = self.calibration.teacher
        teacher, batches, weights = running.model, running.batches, running.weights
        student.float().to(running_device(teacher))
        parameters = list(student.parameters())
        optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.95), weight_decay=0.0)
        peak = SEARCH_LEARNING_RATE * min(1.0, SEARCH_RATE_WIDTH / (width_of_config(self.setup.teacher.config) or 1))
        with calibration_mode(teacher), calibration_mode(student), all_held(weights):
            for step in range(steps):
                optimizer.param_groups[0]["lr"] = peak * min((step + 1) / max(1, steps // 10), 1 - step / (steps + 1))
                batch = batches[step % len(batches)]
                parts = self.comparison.parts(batch)
                for part in parts:
                    inputs = complete_inputs(teacher, self.comparison.task, part)
                    with torch.no_grad():
                        target = self.comparison.outputs(teacher, inputs)
                    loss = self.comparison.objective(self.comparison.outputs(student, inputs), target, inputs)
                    (loss / len(parts) / world_size).backward()
                for parameter in parameters:
                    parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                all_reduce_sum_(parameter.grad for parameter in parameters if parameter.grad is not None)
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                optimizer.zero_grad()

    @torch.no_grad()
    def _held_out_loss(self, student: PreTrainedModel) -> float:
        student.to(running_device(self.calibration.teacher.model))  # type: ignore[arg-type]
        with calibration_mode(student):
            outputs = (self.comparison.outputs(student, row).cpu() for row in self.held_out)
            loss = self.comparison.losses(outputs, self.reference, self.held_out).double().mean().item()
        return all_reduce_scalar(loss) / rank_and_world_size()[1]

    @torch.no_grad()
    def _reference(self, teacher: PreTrainedModel) -> list[Tensor]:
        """Return the teacher's outputs for the rows held out, of which those beyond `MAX_REFERENCE_NUMBERS` are left out."""
        if not self.comparison.needs_teacher:
            return []
        kept: list[Tensor] = []
        with calibration_mode(teacher):
            for row in self.held_out:
                if sum(each.numel() for each in kept) > MAX_REFERENCE_NUMBERS:
                    break
                kept.append(self.comparison.outputs(teacher, row).cpu())
        self.held_out = self.held_out[: len(kept)]
        return kept


def _describe_search(setup: StudentSetup, config: CalibratedConfig) -> dict[str, Any]:
    """Return what the scores depend on besides the data and the shape."""
    return {
        "search": "shapes",
        "teacher_class": setup.teacher.model_class.__name__,
        "teacher_config": comparable_config(setup.teacher.config),
        "teacher_dtype": str(setup.teacher.dtype),
        "student_class": setup.model_class.__name__,
        "student_config": comparable_config(setup.config),
        "student_dtype": str(setup.dtype),
        "options": dataclasses.asdict(config),
    }


def _read_scores(folder: Path | None) -> dict[str, list[float]]:
    if folder is None or not (folder / SCORES_NAME).exists():
        return {}
    entries, _ = read_json(folder / SCORES_NAME)
    return {key: [float(each) for each in values] for key, values in entries.items()}


def _rank_of(loss: float | None) -> tuple[bool, float]:
    """Return what losses are sorted by: one that is not a number comes last."""
    return loss is None or math.isnan(loss), loss or 0.0
