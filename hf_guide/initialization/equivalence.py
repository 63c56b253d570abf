"""The laws as a judge: does a layout hold on a tiny model of its family?

Turning the residual stream by a random rotation must leave the function as it is (SliceGPT's invariance,
arXiv 2401.15024), and so must dropping heads and neurons that write nothing. Without one of its blocks it must be the
teacher in which that block is bypassed; a layout that fails there alone still serves a narrower student of the same depth.
"""

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_guide.errors import HfGuideError, ShapeError
from hf_guide.initialization.apply import initialize
from hf_guide.initialization.config import InitializationConfig
from hf_guide.initialization.depth_equivalence import depth_dependence
from hf_guide.initialization.planning import make_plan, strip_base_prefix
from hf_guide.layouts.grammar import AxisName, Selection, axis_names
from hf_guide.layouts.registry import Layout
from hf_guide.models.tiny_models import MODEL_ERRORS, TINY_SIZES, build_tiny_model, tiny_config
from hf_guide.teachers.checkpoint import open_teacher

TOLERANCE = 1e-5
"""Of the largest logit: many families compute norms and softmax in float32."""


@dataclass(frozen=True)
class EquivalenceReport:
    """Whether a layout passed, the largest relative error seen, and what failed; `depth` is why no block may be dropped."""

    passed: bool
    error: float
    reason: str = ""
    depth: str = ""


def check_equivalence(layout: Layout, twin: PreTrainedModel) -> EquivalenceReport:
    """Return whether `layout` holds on `twin`, a float64 model whose parameters are away from their defaults.

    The gains of norms that no weight is said to read are made constant first: then they turn with the stream, and the axes
    can be judged although these gains cannot be carried exactly.
    """
    teacher = copy.deepcopy(twin)
    width = _residual_width(layout, teacher)
    if width is None:
        return EquivalenceReport(False, math.inf, "no table on the residual stream was found")
    _constant_gains(layout, teacher)
    try:
        turned = rotation_error(layout, teacher, width)
        if not turned <= TOLERANCE:
            return EquivalenceReport(
                False, turned, f"turning its residual stream changed its logits by {turned:.1e} of the largest"
            )
        dropped = pruning_error(layout, teacher)
        if not dropped <= TOLERANCE:
            return EquivalenceReport(
                False,
                dropped,
                f"dropping heads and neurons that write nothing changed its logits by {dropped:.1e} of the largest",
            )
    except HfGuideError as error:
        return EquivalenceReport(False, math.inf, str(error).rstrip("."))
    return EquivalenceReport(True, max(turned, dropped), depth=depth_dependence(layout, twin))


def rotation_error(layout: Layout, twin: PreTrainedModel, width: int) -> float:
    """Return by how much the function changes, of the largest logit, when the residual stream is turned at random."""
    student = build_tiny_model(type(twin), copy.deepcopy(twin.config), seed=1)
    rotation = random_stream_rotation(width, keep_mean=layout.norm == "layer")
    options = InitializationConfig(energy_correction=False, fold_norms=any(row.reads for row in layout.rows))
    initialize(student, open_teacher(twin), layout, options, bases={"embed": rotation})
    return relative_logit_error(student, twin)


def pruning_error(layout: Layout, twin: PreTrainedModel) -> float:
    """Return by how much the function changes when heads and neurons that write nothing are dropped."""
    names = {name for row in layout.rows for axis in row.axes for name in axis_names(axis)}
    sizes: dict[str, int] = {}
    if "kv_heads" in names:
        sizes["num_attention_heads"] = sizes["num_key_value_heads"] = 2
    if "mlp" in names:
        sizes |= {"intermediate_size": 48, "ffn_dim": 48, "n_inner": 48}
    if not sizes:
        return 0.0
    try:
        config = tiny_config(twin.config, **sizes)
        if "qk_rope_head_dim" not in config.to_dict():
            config.head_dim = TINY_SIZES["head_dim"]  # most families read it also where it is no field of theirs
        student = build_tiny_model(type(twin), config, seed=1)
    except MODEL_ERRORS as error:
        raise ShapeError(
            f"a twin with fewer heads and neurons cannot be built: {type(error).__name__}: {error}"
        ) from error
    teacher = copy.deepcopy(twin)
    options = InitializationConfig(energy_correction=False)
    plan = make_plan(student, open_teacher(teacher), layout, options)
    tensors = {
        strip_base_prefix(name, teacher.base_model_prefix): tensor
        for name, tensor in teacher.state_dict(keep_vars=True).items()
    }
    with torch.no_grad():
        for site in plan.parameters.values():
            writes = AxisName("embed") in site.axes and not site.match.row.reads and len(site.axes) > 1
            for dim, chosen in enumerate(plan.maps(site) if writes and site.source else []):
                if isinstance(chosen, Selection):
                    dead = torch.ones(chosen.size, dtype=torch.bool)
                    dead[chosen.places] = False
                    tensors[site.source or ""].index_fill_(dim, dead.nonzero().flatten(), 0.0)
    initialize(student, open_teacher(teacher), layout, options)
    try:
        return relative_logit_error(student, teacher)
    except MODEL_ERRORS as error:
        raise ShapeError(f"a twin with fewer heads and neurons cannot run: {type(error).__name__}: {error}") from error


def random_stream_rotation(width: int, *, keep_mean: bool, seed: int = 2) -> Tensor:
    """Return a random (width, width) rotation, float64; with `keep_mean` one that leaves the all-ones vector where it is."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(width, width, generator=generator, dtype=torch.float64)
    if not keep_mean:
        return torch.linalg.qr(start)[0]
    start[:, 0] = 1.0
    outside = torch.linalg.qr(start)[0][:, 1:]
    inner = torch.linalg.qr(torch.randn(width - 1, width - 1, generator=generator, dtype=torch.float64))[0]
    return outside @ inner @ outside.T + 1.0 / width


@torch.no_grad()
def relative_logit_error(student: PreTrainedModel, teacher: PreTrainedModel) -> float:
    """Return the largest difference of two models' logits on fixed tokens, of the largest logit."""
    ids = torch.arange(3, 14)[None]
    expected = teacher(input_ids=ids).logits
    return ((student(input_ids=ids).logits - expected).abs().max() / expected.abs().max()).item()


def _residual_width(layout: Layout, twin: PreTrainedModel) -> int | None:
    for name, tensor in twin.state_dict().items():
        match = layout.find(strip_base_prefix(name, twin.base_model_prefix))
        if match is not None and match.row.kind == "table" and AxisName("embed") in match.axes:
            return tensor.shape[match.axes.index(AxisName("embed"))]
    return None


def _constant_gains(layout: Layout, twin: PreTrainedModel) -> None:
    read = {norm for row in layout.rows for norm in row.reads}
    with torch.no_grad():
        for name, tensor in twin.state_dict(keep_vars=True).items():
            match = layout.find(strip_base_prefix(name, twin.base_model_prefix))
            if match is not None and match.row.pattern.removesuffix(".weight").removesuffix(".bias") in read:
                continue
            if (
                match is not None
                and match.row.kind == "norm"
                and match.axes[-1] == AxisName("embed")
                and not name.endswith("bias")
            ):
                tensor.fill_(0.8 - layout.norm_offset)
