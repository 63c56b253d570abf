"""`initialize`: a plan, its bases, and every parameter of the student filled."""

import contextlib
import dataclasses
import resource
import sys
import time
from collections.abc import Iterator

import torch
import transformers
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

import hf_guide
from hf_guide.errors import OptionError
from hf_guide.initialization.axes import Name, axis_names
from hf_guide.initialization.basis import ResidualBasis, explained_variance, fit_basis, second_moment
from hf_guide.initialization.layouts import Layout
from hf_guide.initialization.options import InitializationConfig, Method
from hf_guide.initialization.plan import Plan, Site, canonical, make_plan, student_tensors
from hf_guide.initialization.report import InitializationReport, ParameterRecord
from hf_guide.initialization.transfer import Transfer, check_stored
from hf_guide.initialization.weights import Teacher


@torch.no_grad()
def initialize(
    student: PreTrainedModel,
    teacher: Teacher,
    layout: Layout,
    options: InitializationConfig,
    *,
    vocab_places: Tensor | None = None,
    label_places: Tensor | None = None,
    bases: dict[str, Tensor] | None = None,
    show_progress: bool = False,
) -> InitializationReport:
    """Fill `student`, a stock model whose parameters may be uninitialised, from `teacher`; return where all came from.

    Args:
        vocab_places: which of the teacher's rows the student's vocabulary keeps, -1 for a row of zeros; None keeps all.
        label_places: the same for a classification head; empty where the labels do not agree and the head is new.
        bases: a basis by projected axis, (d_T, d_S) with orthonormal columns, instead of a fitted one.

    Raises:
        ShapeError, LayoutError: what the plan refuses, before any weight is read.
        TeacherError: weights that are truncated or not finite.
    """
    started = time.perf_counter()
    untie_as_teacher(student, teacher)
    plan = make_plan(student, teacher, layout, options, vocab_places=vocab_places, label_places=label_places)
    plan.bases = dict(bases or {})
    reduced = [] if options.method != Method.GUIDE else [axis for axis, (had, wanted) in plan.widths.items() if had != wanted or axis in plan.bases]
    moments = table_moments(plan, reduced)
    fitted = {axis: fit_axis(plan, axis, moments) for axis in reduced if axis not in plan.bases}
    plan.bases.update({axis: basis.matrix for axis, basis in fitted.items()})
    transfer = Transfer(
        plan,
        moments,
        {axis: length_kept(moments[axis], plan.bases[axis], centered=layout.norm == "layer") for axis in reduced},
        torch.promote_types(teacher.dtype, torch.float32),
    )
    basis_seconds = time.perf_counter() - started

    tensors, _ = student_tensors(student)
    carried = [site for site in plan.sites.values() if site.name not in plan.random]
    for site in tqdm(carried, desc=f"{options.method} initialization", unit="tensor", disable=not show_progress):
        target = tensors[site.name]
        value = transfer.value(site)
        target.data.copy_(value)
        check_stored(target, value, site.name)
        target._is_hf_initialized = True  # type: ignore[attr-defined]  # Transformers' own mark: left alone by initialize_weights
    initialize_the_rest(student, options.seed)
    seconds = {"basis": basis_seconds, "transfer": time.perf_counter() - started - basis_seconds}
    return make_report(student, transfer, fitted, seconds)


def untie_as_teacher(student: PreTrainedModel, teacher: Teacher) -> None:
    """Give the student a tensor of its own where the teacher has two though its config says tied (mT5, T5 v1.1).

    Transformers loads such a checkpoint untied, and so it will load the student's.
    """
    if not getattr(teacher.config, "tie_word_embeddings", False):
        return
    held = {canonical(name, teacher.base_model_prefix) for name in teacher.weights.keys()}
    for name, source in list(student.all_tied_weights_keys.items()):
        if {canonical(name, student.base_model_prefix), canonical(source, student.base_model_prefix)} <= held:
            home, _, last = name.rpartition(".")
            module = student.get_submodule(home)
            setattr(module, last, torch.nn.Parameter(torch.empty_like(getattr(module, last))))
            del student.all_tied_weights_keys[name]


def initialize_the_rest(student: PreTrainedModel, seed: int) -> None:
    """Give every parameter that is not marked as initialised the model's own random initialisation."""
    with seeded(seed):
        student.initialize_weights()
    student.tie_weights(recompute_mapping=False)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw from `seed` within, and leave the caller's random state as it was."""
    device = torch.get_default_device()
    if device.type == "cpu":
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the other devices for good
            yield
    else:
        with torch.random.fork_rng(devices=[device], device_type=device.type):
            torch.manual_seed(seed)
            yield


def table_moments(plan: Plan, axes: list[str]) -> dict[str, Tensor]:
    """Return E^T E, (d_T, d_T) float64, of the tables that lie on each of `axes`.

    A table whose rows are themselves coordinates of another projected axis (ALBERT's embedding_hidden_mapping_in) is
    weighed with that axis's moment.
    """
    tables: dict[str, list[Site]] = {axis: [] for axis in axes}
    chained = set(plan.layout.projected())
    for site in plan.sites.values():
        for axis in axes:
            read = len(chained & set(_names(site))) > 1 and site.axes[site.match.row.input_axis] == Name(axis)
            if site.match.row.kind == "table" and Name(axis) in site.axes and not read and not site.match.is_bias:
                tables[axis].append(site)
    moments: dict[str, Tensor] = {}
    for axis in sorted(axes, key=lambda axis: any(len(chained & set(_names(site))) > 1 for site in tables[axis])):
        if not tables[axis]:
            raise OptionError(f"The layout of {plan.layout.family!r} has no table on its projected axis {axis!r} to fit directions on.")
        width = plan.widths[axis][0]
        moment = torch.zeros(width, width, dtype=torch.float64)
        for site in tables[axis]:
            tensor = plan.read(site.source or "")
            rows = tensor.movedim(site.axes.index(Name(axis)), -1).reshape(-1, width)
            other = [name for name in _names(site) if name in chained and name != axis]
            if other:
                inner = moments.get(other[0])
                inner = table_moments(plan, other)[other[0]] if inner is None else inner
                moment += rows.double().T @ inner @ rows.double()
                continue
            weights = _weights_of_rows(plan, site, len(rows))
            moment += second_moment(_chunks(rows), width, weights=weights, centered=plan.options.centered, name=site.source or "")
        moments[axis] = moment
    return moments


def _weights_of_rows(plan: Plan, site: Site, rows: int) -> Tensor | None:
    """Return one weight a row, (rows,), for a table of tokens where weights are given; None for others."""
    if plan.options.token_weights is None or "vocab" not in _names(site):
        return None
    if len(plan.options.token_weights) != rows:
        raise OptionError(
            f"token_weights has {len(plan.options.token_weights)} numbers, but the teacher's table {site.source!r} has "
            f"{rows} rows: give one weight a row."
        )
    return torch.tensor(plan.options.token_weights, dtype=torch.float64)


def fit_axis(plan: Plan, axis: str, moments: dict[str, Tensor]) -> ResidualBasis:
    """Return the directions of `axis`, (d_T, d_S), that its tables span best.

    Where the tables span fewer (a factorised embedding, few patches), what the blocks write onto the stream says which
    others to keep: its second moment, (d_T, d_T), is then added to that in `moments`, small enough to leave the first as they are.
    """
    width, size = plan.widths[axis]
    keep_mean = plan.layout.norm == "layer"
    basis = fit_basis(moments[axis], size, keep_mean=keep_mean)
    if size == width or basis.eigenvalues[size - 1] > 1e-10 * basis.eigenvalues[0]:
        return basis
    written = torch.zeros(width, width, dtype=torch.float64)
    for site in plan.sites.values():
        if site.source is None or site.match.row.kind != "weight":
            continue
        for dim, name in enumerate(site.axes):
            if name == Name(axis) and (site.match.is_bias or dim != site.match.row.input_axis):
                rows = plan.read(site.source).movedim(dim, -1).reshape(-1, width)
                written += second_moment(_chunks(rows), width, name=site.source)
    moments[axis] = moments[axis] + 1e-6 * moments[axis].trace() / written.trace().clamp(min=1e-300) * written
    return fit_basis(moments[axis], size, keep_mean=keep_mean)


def _names(site: Site) -> list[str]:
    return [name for axis in site.axes for name in axis_names(axis)]


def _chunks(rows: Tensor, size: int = 8192) -> Iterator[Tensor]:
    return iter(rows.split(size))


def length_kept(moment: Tensor, matrix: Tensor, *, centered: bool) -> float:
    """Return the share |x M| / |x| of the rows' root mean square length that a basis keeps, means removed for LayerNorm."""
    if centered:
        moment = moment - moment.mean(0, keepdim=True)
        moment = moment - moment.mean(1, keepdim=True)
    total = moment.trace().item()
    return (((matrix * (moment @ matrix)).sum().item()) / total) ** 0.5 if total > 0 else 1.0


def make_report(
    student: PreTrainedModel, transfer: Transfer, fitted: dict[str, ResidualBasis], seconds: dict[str, float]
) -> InitializationReport:
    """Return what came from where."""
    plan = transfer.plan
    records = []
    by_name = {site.name: site for site in plan.sites.values()}
    for name, tensor in student_tensors(student)[0].items():
        site = by_name.get(name)
        if site is None or site.source is None or name in plan.random:
            records.append(ParameterRecord(name, list(tensor.shape), None, None, [], ["the model's own initialisation"] if site is None else transfer.steps.get(name, [])))
            continue
        maps = [f"{axis}: {chosen}" for axis, chosen in zip(site.axes, plan.maps(site), strict=True)]
        records.append(ParameterRecord(name, list(tensor.shape), plan.teacher_names[site.source], list(site.source_shape or ()), maps, transfer.steps.get(name, [])))
    notes = list(transfer.notes) + [f"{name}: the student has no place for it" for name in plan.lost]
    return InitializationReport(
        teacher=plan.teacher.name,
        revision=plan.teacher.revision,
        teacher_class=plan.teacher.model_class.__name__,
        student_class=type(student).__name__,
        options=dataclasses.asdict(plan.options),
        hf_guide_version=hf_guide.__version__,
        transformers_version=transformers.__version__,
        teacher_parameters=sum(plan.teacher.weights.shape(name).numel() for name in plan.teacher.weights.keys()),
        student_parameters=student.num_parameters(),
        blocks={stack.removesuffix(".{block}"): blocks for stack, blocks in plan.stacks.items() if stack.endswith("{block}")},
        explained_variance={axis: explained_variance(basis.eigenvalues).tolist() for axis, basis in fitted.items()},
        kept={axis: basis.explained for axis, basis in fitted.items()},
        widths={axis: list(widths) for axis, widths in plan.widths.items()},
        parameters=records,
        approximations=notes,
        randomly_initialized=list(plan.random),
        seconds=seconds,
        peak_memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024),
    )

