"""Find the shapes of a budget and rank them: `find_shapes`, and what `from_teacher(num_parameters=...)` does."""

import dataclasses
import functools
import inspect
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedConfig, PreTrainedModel

from hf_guide.calibration.vocabulary import ReducedVocabulary, change_vocabulary, vocabulary_reducer
from hf_guide.errors import HfGuideError, OptionError, ShapeError
from hf_guide.initialization.build import build_student
from hf_guide.initialization.config import InitializationConfig
from hf_guide.initialization.registry import InitializationMethod, StudentSetup, make_method
from hf_guide.initialization.report import format_count
from hf_guide.initialization.size_checks import check_initialization, check_requested_sizes, is_size, too_large_error
from hf_guide.initialization.student_config import derive_student_config, is_head_size
from hf_guide.initialization.student_shape import (
    StudentShape,
    resolve_class,
    resolve_config,
    resolve_dtype,
    resolve_student,
    vocab_row_indices,
)
from hf_guide.initialization.trial_forward import check_forward
from hf_guide.methods.calibrated import CalibratedMethod
from hf_guide.shapes.budget import Budget
from hf_guide.shapes.cache import CacheMeter
from hf_guide.shapes.candidates import ShapeCandidate, are_alike, rule_scores
from hf_guide.shapes.counting import ParameterCounter, exact_cost
from hf_guide.shapes.enumeration import (
    ShapeEnumerator,
    ShapeGrid,
    cache_positions,
    fits_budget,
    overrides_of,
)
from hf_guide.shapes.fields import (
    ModelProbe,
    SizeFields,
    SizeRole,
    axes_agree,
    build_on_meta,
    find_size_fields,
)
from hf_guide.shapes.scoring import CalibratedScorer
from hf_guide.shapes.vocabulary_search import AUTO, choose_vocab_size
from hf_guide.teachers.checkpoint import TeacherCheckpoint, open_teacher
from hf_guide.validation import check_integer

DEFAULT_LIMIT = 12
"""How many shapes are listed, and get a quick start where there is calibration data."""

MAX_TRIED = 5
"""Times `limit`, of at least `DEFAULT_LIMIT`, how many shapes are counted exactly at most."""

MAX_RUN_PARAMETERS = 300_000_000
"""Up to how many parameters a shape is run before it is listed."""

COUPLED_ROLES = (SizeRole.WIDTH, SizeRole.HEADS, SizeRole.KEY_VALUE_HEADS)
"""Roles of which a family may only allow some sizes together."""

SEARCH_FOLDER, START_FOLDER = "shapes", "student"
"""In a `calibration_cache_dir`, the folders of the search and of the start that follows it."""


@dataclass(frozen=True)
class ShapeSearch:
    """The search for a student of a budget.

    Attributes:
        setup: Of a student of the teacher's own shape: the teacher, its source, the student's class and dtype, and the data.
        budget: What the student may cost.
        overrides: Those of the user, which every shape has.
        method: The initialization method: "calibrated" scores by its starts.
        keywords: Of the caller, one of which may be meant by an unknown override.
        limit: How many shapes are listed.
        search_steps: Steps of distillation by which the best starts are compared; None for none.
    """

    setup: StudentSetup
    budget: Budget
    overrides: Mapping[str, Any]
    method: InitializationMethod
    keywords: Collection[str] = ()
    limit: int = DEFAULT_LIMIT
    search_steps: int | None = None

    @property
    def teacher(self) -> TeacherCheckpoint:
        """The opened teacher."""
        return self.setup.teacher

    def run(self) -> list[ShapeCandidate]:
        """Return at most `limit` shapes, the best first.

        Raises:
            OptionError, ShapeError, LayoutError: As `find_shapes`.
        """
        candidates = self.candidates()
        if not isinstance(self.method, CalibratedMethod):
            return candidates
        folder = search_folder(self.setup.calibration_cache_dir, SEARCH_FOLDER)
        scorer = CalibratedScorer(
            self.setup, self.method.config, self.resolve, folder, self.search_steps, positions_of=self.fixed_config
        )
        return scorer.rank(candidates)

    @property
    def fixed_config(self) -> PreTrainedConfig:
        """Return the teacher's config with the fields that every student changes.

        A width or a number of heads that the family only allows with others than the teacher's is left out: the search varies
        those, and checks them together.
        """
        check_requested_sizes(self.teacher.config, self.overrides)
        try:
            return derive_student_config(self.teacher.config, self.overrides, keywords=self.keywords)
        except ShapeError:
            roles = {each.role for each in self.size_fields.fields if each.name in self._coupled}
            if not roles or roles >= {SizeRole.WIDTH, SizeRole.HEADS}:
                raise
            others = {name: value for name, value in self._fixed.items() if name not in self._coupled}
            return derive_student_config(self.teacher.config, others, keywords=self.keywords)

    @functools.cached_property
    def _fixed(self) -> dict[str, Any]:
        """The overrides under the config's own names."""
        names = self.teacher.config.attribute_map
        return {names.get(name, name): value for name, value in self.overrides.items()}

    @functools.cached_property
    def _coupled(self) -> dict[str, Any]:
        """Of these the width, and the numbers of heads and of key/value heads."""
        names = {each.name for each in self.size_fields.fields if each.role in COUPLED_ROLES}
        return {name: value for name, value in self._fixed.items() if name in names}

    @functools.cached_property
    def _counted_changes(self) -> dict[str, Any]:
        """The overrides of models to count: these are of the teacher's depth, for which a list of another is no config."""
        of_teacher = vars(self.teacher.config)
        return {
            name: value for name, value in self._fixed.items() if not _has_other_length(value, of_teacher.get(name))
        }

    @functools.cached_property
    def size_fields(self) -> SizeFields:
        """The size fields of the teacher's config."""
        changes = self._counted_changes
        others = {name: value for name, value in changes.items() if not is_size(name) or is_head_size(name)}
        return find_size_fields(ModelProbe(self.teacher, self.setup.model_class, others))

    def candidates(self) -> list[ShapeCandidate]:
        """Return at most `limit` shapes by their rule score, none like another, counted exactly."""
        derived = self.fixed_config
        student_class, fields, fixed = self.setup.model_class, self.size_fields, self._fixed
        self._check_bounds()
        names = {each.name for each in fields.fields}
        changes = {name: value for name, value in self._counted_changes.items() if name not in names}
        probe = ModelProbe(self.teacher, student_class, changes)
        positions = cache_positions(self.budget, derived) if student_class.can_generate() else (0, 0)
        cache = CacheMeter(self.setup.dtype, *positions)
        counter = ParameterCounter(probe, fields, None if self.budget.memory is None else cache)
        sizes = {name: size for name in names if isinstance(size := fixed.get(name, vars(derived).get(name)), int)}
        enumerator = ShapeEnumerator(
            fields,
            counter,
            fixed,
            sizes,
            self.setup.dtype.itemsize,
            cache,
            allows=lambda heads: probe.build({**self._coupled, **heads}) is not None,
            first_possible=lambda sizes, order: self._first_possible(sizes, order, probe),
        )
        self._check_fixed(enumerator, probe)
        grid = enumerator.enumerate(self.budget)
        return self._best_unlike(enumerator, grid, probe)

    def _check_bounds(self) -> None:
        """Raise a ShapeError for a size above the teacher's; of blocks, which may be repeated, the plan checks the number."""
        for each in self.size_fields.fields:
            size = self._fixed.get(each.name, 0)
            if each.role is not SizeRole.DEPTH and isinstance(size, int) and size > each.size:
                raise too_large_error(each.name, size, each.size)

    def _check_fixed(self, enumerator: ShapeEnumerator, probe: ModelProbe) -> None:
        """Raise a ShapeError where the plan of no shape can have the user's overrides, whatever the budget is.

        That is known where it rejects the smallest and the largest shape, which share no size that is varied, for the same
        reason in the same words: a reason that depends on what is varied states other sizes, or rejects only one of them.
        """
        if not self._fixed:
            return
        reasons: list[str] = []
        shapes: list[dict[str, float]] = []
        bounds = enumerator.bounds()
        for sizes, order in bounds:
            index = next(self._allowed(sizes, order, probe), None)
            if index is None:
                return
            shapes.append({name: float(values[index]) for name, values in sizes.items()})
            overrides = overrides_of(sizes, index, self.size_fields, self._fixed)
            try:
                self._check_plan(overrides, *self._build(overrides, probe.model_class))
            except HfGuideError as error:
                reasons.append(str(error))
            else:
                return
        varied = [name for name in shapes[0] if len(np.unique([sizes[name] for sizes, _ in bounds])) > 1]
        if len(set(reasons)) == 1 and all(shapes[0][name] != shapes[1][name] for name in varied):
            raise ShapeError(
                f"No shape with {enumerator.describe_fixed()} can be made of this teacher, whatever its other sizes are: "
                f"{reasons[0]}"
            )

    def _best_unlike(self, enumerator: ShapeEnumerator, grid: ShapeGrid, probe: ModelProbe) -> list[ShapeCandidate]:
        """Return the shapes of the best rule scores that can be built, none like one before it.

        Raises:
            ShapeError: None can; states why the last one cannot.
        """
        fields = enumerator.fields
        scores = rule_scores(grid.sizes, fields)
        skipped, tried = np.zeros(len(grid), dtype=bool), 0
        found: list[ShapeCandidate] = []
        planned: list[Collection[str]] = []
        rejection: HfGuideError | None = None
        for index in self._allowed(grid.sizes, np.argsort(scores, kind="stable"), probe):
            if len(found) == self.limit or tried == MAX_TRIED * max(self.limit, DEFAULT_LIMIT):
                break
            if skipped[index]:
                continue
            tried += 1
            try:
                candidate, config = self._count(
                    enumerator, grid, index, float(scores[index]), probe.model_class, planned
                )
            except HfGuideError as error:
                rejection = error
                continue
            skipped |= are_alike(grid.sizes, index)  # where it cannot run, neither can those like it
            try:
                self._check_runs(probe.model_class, config, candidate.parameters)
            except HfGuideError as error:
                rejection = error
                continue
            found.append(candidate)
        if found:
            return found
        if rejection is None:
            raise enumerator.unreachable(self.budget)
        raise ShapeError(
            f"None of the {len(grid)} shapes of {self.budget} can be made of this teacher. The last one that was tried: "
            f"{rejection} Choose another budget, or pass all sizes by name."
        )

    def _allowed(self, sizes: Mapping[str, np.ndarray], order: np.ndarray, probe: ModelProbe) -> Iterator[int]:
        """Yield the indices of the shapes whose width the family allows with their heads, in the order that is given."""
        names = [each.name for role in COUPLED_ROLES for each in self.size_fields.of(role)]
        known: dict[tuple[float, ...], bool] = {}
        for index in map(int, order):
            key = tuple(float(sizes[name][index]) for name in names)
            if key not in known:
                known[key] = self._is_valid(sizes, index, names, probe)
            if known[key]:
                yield index

    def _first_possible(self, sizes: Mapping[str, np.ndarray], order: np.ndarray, probe: ModelProbe) -> int | None:
        """Return the first shape that can be made, and runs, of those that are tried; None where none can."""
        skipped, tried = np.zeros(len(order), dtype=bool), 0
        for index in self._allowed(sizes, order, probe):
            if skipped[index]:
                continue
            if tried == MAX_TRIED * DEFAULT_LIMIT:
                break
            tried += 1
            try:
                overrides = overrides_of(sizes, index, self.size_fields, self._fixed)
                config, model = self._build(overrides, probe.model_class)
                self._check_plan(overrides, config, model)
                self._check_runs(probe.model_class, config, model.num_parameters())
            except HfGuideError:
                skipped |= are_alike(sizes, index)
                continue
            return index
        return None

    def _is_valid(self, sizes: Mapping[str, np.ndarray], index: int, names: list[str], probe: ModelProbe) -> bool:
        """Return whether the family allows the width and the heads of a shape: in some, one follows from the other."""
        fields = self.size_fields
        changed = overrides_of(sizes, index, fields, self._fixed)
        changed = {name: size for name, size in changed.items() if name in names}
        sizes_to_build = {**self._coupled, **changed}
        built = probe.build(sizes_to_build)
        if built is None or not axes_agree(self.setup.layout, *built):
            return False
        shallow = probe.build({**sizes_to_build, **{each.name: 1 for each in fields.of(SizeRole.DEPTH)}})
        try:
            check_initialization(probe.model_class, (shallow or built)[0], self.teacher.config)
        except ShapeError:
            return False
        return True

    def _count(
        self,
        enumerator: ShapeEnumerator,
        grid: ShapeGrid,
        index: int,
        score: float,
        student_class: type[PreTrainedModel],
        planned: list[Collection[str]],
    ) -> tuple[ShapeCandidate, PreTrainedConfig]:
        """Return one shape, counted exactly, and its config.

        Args:
            enumerator, grid, index, score, student_class: The shape.
            planned: Sets of fields of which a shape that changes them was planned: which axes may be shortened does not
                depend on by how much. The shape's own is added.

        Raises:
            HfGuideError: The family rejects it, the teacher's weights cannot make it, or it is outside the budget.
        """
        fields, fixed = enumerator.fields, enumerator.fixed
        overrides = overrides_of(grid.sizes, index, fields, fixed)
        config, model = self._build(overrides, student_class)
        cost = exact_cost(model, config)
        sizes = {name: values[[index]] for name, values in grid.sizes.items()}
        try:
            cached = enumerator.cache.num_bytes(model)
        except ShapeError:
            if self.budget.memory is not None:
                raise
            cached = 0  # stated for information alone
        memory = enumerator.itemsize * cost["parameters"] + cached
        if not fits_budget(self.budget, cost["parameters"], cost["active_parameters"], memory):
            raise ShapeError(
                f"It has {format_count(cost['parameters'])} parameters and needs {memory:,} bytes, because its blocks are of "
                "several kinds, or its depths differ."
            )
        if overrides.keys() not in planned:
            self._check_plan(overrides, config, model)
            planned.append(overrides.keys())
        candidate = ShapeCandidate(
            overrides=overrides,
            parameters=cost["parameters"],
            active_parameters=cost["active_parameters"],
            memory=memory,
            flops_per_token=cost["flops_per_token"],
            rule_score=score,
            sizes={name: int(values[0]) for name, values in sizes.items()},
            width=int(max(sizes[each.name][0] for each in fields.of(SizeRole.WIDTH))),
            depth=int(max((sizes[each.name][0] for each in fields.of(SizeRole.DEPTH)), default=0)),
        )
        return candidate, config

    def _build(
        self, overrides: Mapping[str, Any], student_class: type[PreTrainedModel]
    ) -> tuple[PreTrainedConfig, PreTrainedModel]:
        """Return the config of a shape's overrides and its model on the meta device.

        Raises:
            HfGuideError: The family rejects it.
        """
        config = resolve_config(
            self.teacher, None, {**self.overrides, **overrides}, self.setup.options, keywords=self.keywords
        ).config
        return config, build_on_meta(student_class, config, self.teacher)

    def _check_plan(self, overrides: Mapping[str, Any], config: PreTrainedConfig, model: PreTrainedModel) -> None:
        """Raise a ShapeError or LayoutError where the method cannot make a shape of the teacher's weights."""
        if self.method.requires_layout:
            options = self.resolve(overrides, None).plan_options(self.setup.options)
            dataclasses.replace(self.setup, config=config, options=options).plan(model)

    def _check_runs(self, student_class: type[PreTrainedModel], config: PreTrainedConfig, parameters: int) -> None:
        """Raise a ShapeError for a shape that builds but cannot run, such as a hybrid without one of its kinds of blocks.

        One of many parameters is not tried: its weights would be allocated, and `from_teacher` tries the one that it makes.
        """
        if parameters > MAX_RUN_PARAMETERS:
            return
        student = build_student(student_class, config, self.setup.dtype, seed=self.setup.options.seed)
        check_forward(student, self.teacher.config, filled=False)

    def resolve(self, overrides: Mapping[str, Any], influence: Any) -> StudentShape:
        """Return the student of a shape's overrides, with the blocks that an influence selects."""
        return resolve_student(
            self.teacher,
            None,
            {**self.overrides, **overrides},
            self.setup.options,
            self.setup.model_class,
            keywords=self.keywords,
            influence=influence,
        )


def _has_other_length(value: Any, of_teacher: Any) -> bool:
    """Return whether a value is a list, and the teacher's is one of another length."""
    return all(isinstance(each, (list, tuple)) for each in (value, of_teacher)) and len(value) != len(of_teacher)


def describe_choice(
    candidates: "list[ShapeCandidate]", budget: Mapping[str, Any], parameters: int, *, head_rows: int | None = None
) -> str:
    """Return what the report notes of the shape that was taken, the first of `candidates`.

    Args:
        candidates: What `find_shapes` returned.
        budget: What was asked for.
        parameters: How many the student has. It differs from the candidate's where blocks differ in size, and the method
            selected others than the evenly spaced ones that were counted.
        head_rows: Outputs per class of a classifier, of which one was counted; None for no subclasses.
    """
    best, compared = candidates[0], [each for each in candidates if each.loss is not None]
    if compared:
        loss = f"{best.loss:.3f}" if best.distilled_loss is None else f"{best.distilled_loss:.3f}"
        after = (
            ""
            if best.distilled_loss is None
            else f" after {budget['search_steps']} steps of distillation (before them {best.loss:.3f})"
        )
        how = (
            f"with the lowest loss ({loss}) on held-out calibration data of {len(compared)} calibrated starts{after}, "
            f"made of the best of {len(candidates)} shapes by a quicker start"
        )
    else:
        how = f"with the lowest rule score ({best.rule_score:.2f}) of {len(candidates)} shapes"
    stated = ", ".join(f"{name}={value!r}" for name, value in budget.items())
    counted = "" if parameters == best.parameters else f" ({format_count(best.parameters)} with evenly spaced blocks)"
    if head_rows is not None:
        counted = f" ({format_count(best.parameters)} with one output per class, as the budget counts it)"
    return f"{best.describe()} was chosen for {stated}: {format_count(parameters)} parameters{counted}, {how}."


def find_shapes(
    teacher: "str | os.PathLike[str] | PreTrainedModel",
    *,
    num_parameters: "int | str | None" = None,
    active_parameters: "int | str | None" = None,
    memory: "int | str | None" = None,
    cache_length: int | None = None,
    search_steps: int | None = None,
    limit: int = DEFAULT_LIMIT,
    method: "str | InitializationConfig | Mapping[str, Any] | None" = None,
    calibration_dataset: Any = None,
    calibration_cache_dir: "str | os.PathLike[str] | None" = None,
    model_class: type[Any] | None = None,
    dtype: Any = None,
    tokenizer: Any = None,
    revision: str | None = None,
    token: "str | bool | None" = None,
    cache_dir: "str | os.PathLike[str] | None" = None,
    local_files_only: bool = False,
    trust_remote_code: bool = False,
    gguf_file: str | None = None,
    subfolder: str = "",
    show_progress: bool = True,
    **overrides: Any,
) -> list[ShapeCandidate]:
    """Return the best student shapes of a budget, none like another, the best first: what `from_teacher` chooses from.

    Widths, depths, heads (whole: of the teacher's size), key/value heads and experts are varied on a grid of multiples that
    hardware likes, and the MLP fills the budget to within 2 %. Without data they are ranked by a rule (`rule_scores`); with
    calibration data by the loss of untrained `calibrated` students on a quarter of it: of a quick start of each, refitted on
    an eighth of the rest, then of whole starts of the best three, which `search_steps` distils before they are compared.

    Args:
        teacher: A Hub id, a folder, or a loaded model.
        num_parameters: Of the student, tied ones counted once: a number, or a text such as "23M", "1.5B" or "25%" (of the
            teacher's).
        active_parameters: Those that a token passes in a mixture of experts, likewise.
        memory: Bytes of the weights in the student's dtype and of the key-value cache, or a text such as "500MB" or "1.5GiB";
            never exceeded. The cache is measured: windows of attention, a compressed cache and recurrent states count as what
            they take.
        cache_length: Positions of that cache; 2,048 by default, or as many as the model has if these are fewer.
        search_steps: With calibration data, for how many steps the best three are distilled on it by the running teacher's
            outputs, a calibration batch each; then the lowest loss is first. None compares them untrained.
        limit: How many shapes to return.
        method: As in `from_teacher`; None is "calibrated" with calibration data and "guide" without.
        calibration_dataset, calibration_cache_dir: As in `from_teacher`. With a folder, an interrupted search continues.
        model_class, dtype, tokenizer: Of the student, as in `from_teacher`.
        revision, token, cache_dir, local_files_only, trust_remote_code, gguf_file, subfolder: As in `from_pretrained`.
        show_progress: Whether to show progress bars.
        **overrides: Fields of the teacher's config that every student changes, such as `hidden_size=288`. A smaller
            `vocab_size` keeps the pieces that the texts of `calibration_dataset` use, as in `from_teacher`; losses are then
            per token of these pieces. "auto" tries the teacher's and smaller ones with a quick start each, and takes the one
            with the fewest bits per byte of held-out text.

    Raises:
        OptionError: No budget, or one that does not parse; data of which none can be held out, or outputs that cannot be
            compared; `search_steps` with another method than "calibrated"; a `limit` below 1.
        ShapeError: No shape is within 2 % of the budget; the smallest and the largest are stated.
        LayoutError: A family whose shapes cannot be enumerated.
        TeacherError: A teacher that cannot be read.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> teacher = LlamaForCausalLM(LlamaConfig(
        ...     vocab_size=96, hidden_size=48, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4
        ... ))
        >>> best, second = find_shapes(teacher, num_parameters="50%", limit=2, show_progress=False)
        >>> 0.98 < best.parameters / (0.5 * teacher.num_parameters()) < 1.02
        True
    """
    limit = check_integer("limit", limit)
    if method is None:
        method = "guide" if calibration_dataset is None else "calibrated"
    initializer = make_method(InitializationConfig.parse(method))
    folder = search_folder(calibration_cache_dir, SEARCH_FOLDER)
    if "vocab_size" not in overrides:  # a dataset may be for the vocabulary alone
        initializer.check_data(calibration_dataset, folder)
    if search_steps is not None and not isinstance(initializer, CalibratedMethod):
        raise OptionError(
            f"search_steps distils calibrated starts, and method is {initializer.config.method!r}: leave it out, or pass "
            "method='calibrated' and a calibration_dataset."
        )
    if search_steps is not None:
        search_steps = check_integer("search_steps", search_steps)
    files: dict[str, Any] = {
        "token": token,
        "cache_dir": cache_dir,
        "local_files_only": local_files_only,
        "subfolder": subfolder,
    }
    code = {"trust_remote_code": trust_remote_code, "gguf_file": gguf_file}
    checkpoint = open_teacher(teacher, revision=revision, **code, **files)  # type: ignore[arg-type]
    budget = Budget.parse(
        num_parameters, active_parameters, memory, cache_length, teacher_parameters=count_teacher(checkpoint)
    )
    if budget is None:
        raise OptionError("Set what the student may cost: num_parameters=, active_parameters= or memory=.")
    keywords = inspect.signature(find_shapes).parameters

    def search_of(teacher_of_tokens: TeacherCheckpoint, chosen: Mapping[str, Any], dataset: Any) -> ShapeSearch:
        sizes = {**overrides, **chosen}
        config = teacher_of_tokens.config
        if sizes.get("vocab_size") not in (None, getattr(config, "vocab_size", None)):  # it differs in padded rows
            check_requested_sizes(config, sizes)
            config = derive_student_config(config, {"vocab_size": sizes["vocab_size"]}, keywords=keywords)
        setup = StudentSetup(
            teacher=teacher_of_tokens,
            source=teacher,
            model_class=resolve_class(teacher_of_tokens, teacher_of_tokens.config, model_class),
            config=config,
            dtype=resolve_dtype(dtype, teacher_of_tokens),
            options=initializer.plan_options(),
            vocab_indices=vocab_row_indices(teacher_of_tokens, config, gguf_file=gguf_file, **files),
            calibration_dataset=dataset,
            calibration_cache_dir=calibration_cache_dir,
            hub={**files, **code},
            show_progress=show_progress,
        )
        return ShapeSearch(setup, budget, sizes, initializer, keywords, limit, search_steps)

    tokens: dict[str, int] = {}
    if overrides.get("vocab_size") == AUTO:
        reducer = vocabulary_reducer(checkpoint, teacher, None, calibration_dataset, gguf_file=gguf_file, **files)
        sizes = choose_vocab_size(
            checkpoint,
            reducer,
            lambda small, chosen: search_of(small, chosen, calibration_dataset),
            initializer,
            lambda size: search_folder(calibration_cache_dir, f"vocabulary_{size}"),
            show_progress=show_progress,
        )
        tokens = {"vocab_size": next(iter(sizes))}
        overrides = {**overrides, **tokens}
    checkpoint, _, vocabulary = change_vocabulary(
        checkpoint, teacher, None, overrides, calibration_dataset, tokenizer=tokenizer, gguf_file=gguf_file, **files
    )
    if isinstance(vocabulary, ReducedVocabulary) and not initializer.requires_data:
        calibration_dataset = None
    initializer.check_data(calibration_dataset, folder)
    found = search_of(checkpoint, {}, calibration_dataset).run()
    return [
        dataclasses.replace(each, overrides={**tokens, **each.overrides}, sizes={**tokens, **each.sizes})
        for each in found
    ]


def count_teacher(teacher: TeacherCheckpoint) -> int:
    """Return the teacher's number of parameters, tied ones counted once."""
    return sum(teacher.weights.shape(name).numel() for name in teacher.weights.keys())


def search_folder(calibration_cache_dir: "str | os.PathLike[str] | None", name: str) -> Path | None:
    """Return a folder of a search in a `calibration_cache_dir`; None without one."""
    return None if calibration_cache_dir is None else Path(calibration_cache_dir).expanduser() / name
