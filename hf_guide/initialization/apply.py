"""`initialize`: a plan, its bases, and every parameter of the student filled."""

import contextlib
import dataclasses
import resource
import sys
import time
from collections.abc import Iterator, Mapping

import torch
import transformers
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hf_guide.initialization.basis import (
    ResidualBasis,
    embedding_second_moments,
    explained_variance,
    fit_basis,
    fit_channel_selection,
    fit_embedding_basis,
    norm_retained,
)
from hf_guide.initialization.config import InitializationConfig
from hf_guide.initialization.plan import Plan
from hf_guide.initialization.planning import is_parameter, make_plan, strip_base_prefix, unique_tensors
from hf_guide.initialization.report import InitializationReport, ParameterRecord
from hf_guide.initialization.transfer import Transfer, check_no_overflow, parameter_value
from hf_guide.layouts.registry import Layout, config_sizes, rotary_size
from hf_guide.teachers.checkpoint import TeacherCheckpoint, teacher_fingerprint
from hf_guide.version import __version__


@torch.no_grad()
def initialize(
    student: PreTrainedModel,
    teacher: TeacherCheckpoint,
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
    untie_like_teacher(student, teacher)
    plan = make_plan(student, teacher, layout, options, vocab_places=vocab_places, label_places=label_places)
    plan.bases = dict(bases or {})
    transfer, fitted = fit_bases(plan)
    basis_seconds = time.perf_counter() - started
    fill_parameters(student, transfer, show_progress=show_progress)
    seconds = {"basis": basis_seconds, "transfer": time.perf_counter() - started - basis_seconds}
    return make_report(student, transfer, fitted, seconds)


def projected_axes(plan: Plan) -> list[str]:
    """Return the axes that are contracted with a basis."""
    if not plan.options.projects:
        return []
    return [axis for axis, (had, wanted) in plan.widths.items() if had != wanted or axis in plan.bases]


def fit_bases(
    plan: Plan, activations: Mapping[str, Tensor] | None = None, *, places: bool = False
) -> tuple[Transfer, dict[str, ResidualBasis]]:
    """Fit a basis for each reduced axis that has none; return the transfer and what was fitted.

    Args:
        activations: by axis the second moment, (d_T, d_T), to fit to instead of that of the teacher's tables.
        places: of the activations keep the places with most energy, not the directions.
    """
    reduced = projected_axes(plan)
    moments = embedding_second_moments(plan, reduced)
    centered = plan.layout.norm == "layer"
    fitted: dict[str, ResidualBasis] = {}
    for axis in reduced:
        if axis in plan.bases:
            continue
        if activations is not None and axis in activations:
            moment, size = activations[axis], plan.widths[axis][1]
            fitted[axis] = (
                fit_channel_selection(moment, size) if places else fit_basis(moment, size, keep_mean=centered)
            )
        else:
            fitted[axis] = fit_embedding_basis(plan, axis, moments)
    plan.bases.update({axis: basis.matrix for axis, basis in fitted.items()})
    looked_at = {**moments, **(activations or {})}
    shares = {axis: norm_retained(looked_at[axis], plan.bases[axis], centered=centered) for axis in reduced}
    return Transfer(plan, moments, shares, torch.promote_types(plan.teacher.dtype, torch.float32)), fitted


def fill_parameters(student: PreTrainedModel, transfer: Transfer, *, show_progress: bool = False) -> None:
    """Fill every parameter of `student`: from its teacher where the plan says so, and as the model itself does elsewhere."""
    plan, options = transfer.plan, transfer.plan.options
    tensors, _ = unique_tensors(student)
    carried = [site for site in plan.parameters.values() if site.name not in plan.random]
    for site in tqdm(carried, desc=f"{options.method} initialization", unit="tensor", disable=not show_progress):
        target = tensors[site.name]
        value = parameter_value(transfer, site)
        target.data.copy_(value)
        if is_parameter(target):
            check_no_overflow(target, value, site.name)
        target._is_hf_initialized = True  # type: ignore[attr-defined]  # Transformers' own mark: left alone by initialize_weights
    init_missing_weights(student, options.seed)


def untie_like_teacher(student: PreTrainedModel, teacher: TeacherCheckpoint) -> None:
    """Give the student a tensor of its own where the teacher has two though its config says tied (mT5, T5 v1.1).

    Transformers loads such a checkpoint untied, and so it will load the student's.
    """
    if not getattr(teacher.config, "tie_word_embeddings", False):
        return
    held = {strip_base_prefix(name, teacher.base_model_prefix) for name in teacher.weights.keys()}
    for name, source in list(student.all_tied_weights_keys.items()):
        if {
            strip_base_prefix(name, student.base_model_prefix),
            strip_base_prefix(source, student.base_model_prefix),
        } <= held:
            home, _, last = name.rpartition(".")
            module = student.get_submodule(home)
            setattr(module, last, torch.nn.Parameter(torch.empty_like(getattr(module, last))))
            del student.all_tied_weights_keys[name]


def init_missing_weights(student: PreTrainedModel, seed: int) -> None:
    """Give every parameter that is not marked as initialised the model's own random initialisation."""
    with rng_seed(seed):
        student.initialize_weights()
    student.tie_weights(recompute_mapping=False)


@contextlib.contextmanager
def rng_seed(seed: int) -> Iterator[None]:
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


def rope_mismatch_notes(plan: Plan) -> list[str]:
    """Return what the report says where the student's own rotary frequencies are not those of the pairs it keeps."""
    heads = [config_sizes(plan.layout, config).get("q_dim") for config in (plan.teacher.config, plan.student_config)]
    if plan.layout.rope is None or heads[0] is None or heads[1] is None:
        return []
    had = rotary_size(plan.layout, plan.teacher.config, heads[0])
    wanted = rotary_size(plan.layout, plan.student_config, heads[1])
    if not wanted or had % wanted == 0:
        return []
    return [
        f"heads rotate {wanted} dimensions, which does not divide the teacher's {had}: the student's rotary frequencies "
        "lie beside those of the pairs it keeps."
    ]


def selected_heads_by_block(plan: Plan) -> dict[str, list[list[int]]]:
    """Return the teacher's heads that each block's attention keeps, by module, where it has fewer than the teacher."""
    found: dict[str, dict[int, list[int]]] = {}
    for site in plan.parameters.values():
        if site.source is None or site.block is None or len(site.axes) < 2:
            continue
        heads = plan.selected_heads(site)
        if heads is not None:
            module = site.match.row.pattern.replace(".{block}", "").rpartition(".")[0]
            found.setdefault(module, {})[site.block] = heads
    return {module: [heads[block] for block in sorted(heads)] for module, heads in found.items()}


def make_report(
    student: PreTrainedModel, transfer: Transfer, fitted: dict[str, ResidualBasis], seconds: dict[str, float]
) -> InitializationReport:
    """Return what came from where."""
    plan = transfer.plan
    records = []
    by_name = {site.name: site for site in plan.parameters.values()}
    for name, tensor in unique_tensors(student)[0].items():
        site = by_name.get(name)
        if site is None or site.source is None or name in plan.random:
            records.append(
                ParameterRecord(
                    name,
                    list(tensor.shape),
                    None,
                    None,
                    [],
                    transfer.steps.get(name, []),
                )
            )
            continue
        maps = [f"{axis}: {chosen}" for axis, chosen in zip(site.axes, plan.maps(site), strict=True)]
        records.append(
            ParameterRecord(
                name,
                list(tensor.shape),
                plan.teacher_names[site.source],
                list(site.source_shape or ()),
                maps,
                transfer.steps.get(name, []),
            )
        )
    notes = [*plan.notes, *transfer.notes] + [f"{name}: the student has no place for it" for name in plan.lost]
    notes += rope_mismatch_notes(plan)
    if plan.options.logit_gain != 1.0 and not any(
        "logits times" in step for steps in transfer.steps.values() for step in steps
    ):
        notes.append("logit_gain found no norm or weight of the teacher's that makes logits, and changed nothing.")
    return InitializationReport(
        teacher=plan.teacher.name,
        revision=plan.teacher.revision,
        teacher_class=plan.teacher.model_class.__name__,
        student_class=type(student).__name__,
        options=dataclasses.asdict(plan.options),
        hf_guide_version=__version__,
        transformers_version=transformers.__version__,
        teacher_parameters=sum(plan.teacher.weights.shape(name).numel() for name in plan.teacher.weights.keys()),
        student_parameters=student.num_parameters(),
        blocks={
            stack.rpartition(".")[0]: blocks
            for stack, blocks in plan.stacks.items()
            if stack.endswith("{block}") or stack.count("{") == 1  # the second: blocks within one stage
        },
        explained_variance={axis: explained_variance(basis.eigenvalues).tolist() for axis, basis in fitted.items()},
        kept={axis: basis.explained for axis, basis in fitted.items()},
        heads=selected_heads_by_block(plan),
        widths={axis: list(widths) for axis, widths in plan.widths.items()},
        parameters=records,
        approximations=notes,
        randomly_initialized=list(plan.random),
        seconds=seconds,
        peak_memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        * (1 if sys.platform == "darwin" else 1024),
        teacher_fingerprint=teacher_fingerprint(plan.teacher),
    )
