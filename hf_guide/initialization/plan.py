"""Where each of a student's parameters comes from, and how each of its axes gets smaller.

A `Plan` is made from names and shapes alone: no weight is read here, so what cannot work is refused before any work.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from hf_guide.errors import LayoutError, OptionError, ShapeError, TeacherError, did_you_mean
from hf_guide.initialization.axes import (
    Axis,
    AxisMap,
    Identity,
    Name,
    Product,
    Projection,
    Selection,
    Sum,
    axis_names,
    axis_size,
    repeated,
    select,
    solve_sizes,
)
from hf_guide.initialization.layouts import FIXED_AXES, PREFIX_AXES, Layout, Match, config_sizes, rotary_size
from hf_guide.initialization.options import InitializationConfig, LaterBlocks, Method
from hf_guide.initialization.selection import alibi_places, choose_blocks, even_places, rope_places
from hf_guide.initialization.weights import Teacher

HEADS = ("heads", "kv_heads", "group")

READABLE = {
    "group": "query heads per key/value head",
    "kv_heads": "key/value heads",
    "heads": "heads",
    "head_dim": "head size",
    "q_dim": "head size of queries and keys",
    "k_dim": "head size of queries and keys",
    "mlp": "intermediate size",
    "embed": "hidden size",
    "vocab": "vocabulary",
}


@dataclass(frozen=True)
class Site:
    """One parameter of the student, its place in the layout, and the teacher's parameter that feeds it (or None)."""

    name: str
    canonical: str
    shape: torch.Size
    match: Match
    source: str | None
    source_shape: torch.Size | None
    block: int | None

    @property
    def axes(self) -> tuple[Axis, ...]:
        return self.match.axes


@dataclass
class Plan:
    """All that a transfer needs to know besides the weights and the bases."""

    layout: Layout
    options: InitializationConfig
    teacher: Teacher
    student_config: PreTrainedConfig
    sites: dict[str, Site]
    shared: dict[str, str]
    teacher_names: dict[str, str]
    stacks: dict[str, list[int]]
    widths: dict[str, tuple[int, int]]
    vocab_places: Tensor | None
    label_places: Tensor | None
    random: list[str]
    lost: list[str]
    bases: dict[str, Tensor] = field(default_factory=dict)
    _seen_finite: set[str] = field(default_factory=set)
    _maps: dict[tuple[str, int], list[AxisMap]] = field(default_factory=dict)

    def read(self, canonical: str) -> Tensor:
        """Return the teacher's tensor of this canonical name, on the CPU, in the dtype it is stored in.

        Raises:
            TeacherError: it holds NaN or infinite values; says which tensor, how many, and where the first is.
        """
        name = self.teacher_names[canonical]
        tensor = self.teacher.weights.get(name).cpu()
        if name not in self._seen_finite and tensor.is_floating_point():
            refuse_not_finite(tensor, f"{name!r} of the teacher {self.teacher.name}")
            self._seen_finite.add(name)
        return tensor

    def is_projected(self, site: Site, axis: Axis) -> bool:
        """Whether `axis` of `site` is contracted with a basis, rather than kept or selected."""
        name, _ = repeated(axis)
        if name not in self.widths or self.options.method != Method.GUIDE:
            return False
        teacher, student = self.widths[name]
        selected = site.block is not None and site.block > 0 and self.options.later_blocks == LaterBlocks.SELECT
        return (teacher != student or name in self.bases) and not selected

    def maps(self, site: Site) -> list[AxisMap]:
        """Return the map of each of the site's axes. A projection has an empty matrix until its basis is known.

        Raises:
            ShapeError, LayoutError: the student's shape cannot be made from the teacher's.
        """
        key = (site.name, len(self.bases))
        if key not in self._maps:
            self._maps[key] = self._find_maps(site)
        return self._maps[key]

    def _find_maps(self, site: Site) -> list[AxisMap]:
        assert site.source_shape is not None
        source_name = self.teacher_names.get(site.source or "", site.source or "")
        teacher = solve_sizes(
            site.axes, site.source_shape, config_sizes(self.layout, self.teacher.config), source_name
        )
        student = solve_sizes(site.axes, site.shape, config_sizes(self.layout, self.student_config), site.name)
        found: list[AxisMap] = []
        for axis in site.axes:
            if self.is_projected(site, axis):
                name, times = repeated(axis)
                matrix = self.bases.get(name, torch.empty(self.widths[name]))
                found.append(Projection(matrix if times == 1 else torch.block_diag(*[matrix] * times)))
            elif axis in (Name("vocab"), Name("labels")):
                places = self.vocab_places if axis == Name("vocab") else self.label_places
                if places is None and teacher[str(axis)] != student[str(axis)]:
                    raise ShapeError(
                        f"{site.name}: the student has {student[str(axis)]} rows for its {axis}, the teacher "
                        f"{teacher[str(axis)]}: they must agree."
                    )
                found.append(self._kept_or(places, teacher[str(axis)]))
            elif all(teacher[name] == student[name] for name in axis_names(axis)):
                found.append(Identity())
            else:
                places, factors = select(axis, lambda name: self._leaf(site, name, teacher, student), teacher)
                found.append(Selection(places, factors, axis_size(axis, teacher) or 0))
        return found

    @staticmethod
    def _kept_or(places: Tensor | None, size: int) -> AxisMap:
        return Identity() if places is None else Selection(places, torch.ones(len(places), dtype=torch.float64), size)

    def _leaf(
        self, site: Site, name: str, teacher: Mapping[str, int], student: Mapping[str, int]
    ) -> tuple[Tensor, Tensor]:
        had, wanted = teacher[name], student[name]
        what = READABLE.get(name, name)
        if (name in FIXED_AXES or name.startswith("fixed")) and had != wanted:
            if name in FIXED_AXES:
                raise ShapeError(f"{site.name}: {what} must be the teacher's {had}, found {wanted}.")
            raise ShapeError(
                f"{site.name}: this size must be the teacher's {had}, found {wanted}. What is known of "
                f"{self.layout.family!r}: {self.layout.exactness.rstrip('.')}. Keep the size, choose method='random', or "
                "say what the axes mean with hf_guide.register_layout."
            )
        if not 1 <= wanted <= had:
            raise ShapeError(
                f"{site.name}: the student's {what} is {wanted}, the teacher's {had}: a student starts inside its teacher, so "
                f"choose 1 to {had}."
            )
        factor = 1.0
        if name in PREFIX_AXES:
            places = list(range(wanted))
        elif name.endswith(("q_dim", "k_dim")):
            rotary = (
                rotary_size(self.layout, self.teacher.config, had),
                rotary_size(self.layout, self.student_config, wanted),
            )
            places = rope_places(had, wanted, *rotary, self.layout.rope)
            scaled_here = site.match.row.kind == "norm" or not self._has_query_norm(site)
            if (
                name.endswith("q_dim")
                and had != wanted
                and scaled_here
                and self.options.method == Method.GUIDE
                and self.options.restore_logit_scale
            ):
                factor = (
                    had
                    / wanted
                    * self._attention_scale(self.teacher.config, had)
                    / self._attention_scale(self.student_config, wanted)
                )
        elif name in HEADS and self.layout.alibi is not None and self.layout.alibi(self.teacher.config):
            places = alibi_places(had, wanted)
        else:
            places = even_places(had, wanted)
        return torch.tensor(places, dtype=torch.long), torch.full((wanted,), factor, dtype=torch.float64)

    def _attention_scale(self, config: PreTrainedConfig, head_dim: int) -> float:
        scale = self.layout.attention_scale
        return float(scale(config)) if scale is not None else head_dim**-0.5

    def _has_query_norm(self, site: Site) -> bool:
        """Whether a learned norm stands between this query weight and the logits, which then carries their scale."""
        home = site.canonical.rpartition(".")[0].rpartition(".")[0]
        return any(
            other.match.row.kind == "norm"
            and other.canonical.startswith(home)
            and "q_dim" in (name for axis in other.axes for name in axis_names(axis))
            for other in self.sites.values()
        )


def refuse_not_finite(tensor: Tensor, what: str) -> None:
    """Refuse a tensor with NaN or infinite values.

    Raises:
        TeacherError: says how many there are and where the first is.
    """
    if torch.isfinite(tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32))):
        return  # one pass without a copy; a sum that overflows is looked at again
    wrong = ~torch.isfinite(tensor)
    if bool(wrong.any()):
        raise TeacherError(
            f"{what} holds {int(wrong.sum())} NaN or infinite values, the first at {wrong.nonzero()[0].tolist()}. A teacher's "
            "weights must be finite: fetch it again, or take a checkpoint from before its training diverged."
        )


def canonical(name: str, prefix: str) -> str:
    """Return `name` relative to the base model."""
    return name.removeprefix(prefix + ".") if prefix else name


def resolve_alike(layout: Layout, names: Iterable[str]) -> Layout:
    """Return `layout` with two axes made one where the module that would tie them is not in the model."""
    names = list(names)
    renamed = {
        axis: same for module, axis, same in layout.alike if not any(name.startswith(module + ".") for name in names)
    }
    if not renamed:
        return layout

    def rename(axis: Axis) -> Axis:
        if isinstance(axis, Name):
            return Name(renamed.get(axis.name, axis.name))
        if isinstance(axis, Product):
            return Product(tuple(map(rename, axis.factors)))
        return Sum(tuple(map(rename, axis.terms)))

    return dataclasses.replace(
        layout, rows=tuple(dataclasses.replace(row, axes=tuple(map(rename, row.axes))) for row in layout.rows)
    )


def student_tensors(model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return a model's saved tensors by name, each once, and the other names of those that are shared."""
    tensors: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    first: dict[int, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in first:
            shared[name] = first[id(tensor)]
        else:
            first[id(tensor)] = name
            tensors[name] = tensor
    return tensors, shared


def _stack_sizes(layout: Layout, names: Iterable[str]) -> dict[str, int]:
    """Return how many blocks (or listed modules) stand in each stack, by the text before the placeholder."""
    sizes: dict[str, int] = {}
    for name in names:
        found = layout.find(name)
        if found is None:
            continue
        for placeholder, number in found.numbers.items():
            stack = found.row.pattern.partition("{" + placeholder + "}")[0] + "{" + placeholder + "}"
            sizes[stack] = max(sizes.get(stack, 0), int(number) + 1)
    return sizes


def make_plan(
    student: PreTrainedModel,
    teacher: Teacher,
    layout: Layout,
    options: InitializationConfig,
    *,
    vocab_places: Tensor | None = None,
    label_places: Tensor | None = None,
) -> Plan:
    """Return the plan of a transfer, having checked every shape.

    Raises:
        LayoutError: a parameter that the layout does not know, or whose axes do not multiply out.
        ShapeError: a student that is longer than its teacher on some axis.
    """
    tensors, shared = student_tensors(student)
    if layout.variant is not None and layout.variant(student.config) != layout.family:
        raise ShapeError(
            f"The student is built as {layout.variant(student.config)!r}, its teacher as {layout.family!r}: "
            "their blocks are wired differently. Leave the config's switches for the order of norms and branches as "
            "the teacher has them."
        )
    student_names = {canonical(name, student.base_model_prefix): name for name in tensors}
    if len(student_names) < len(tensors):
        raise LayoutError(
            f"{type(student).__name__} has two parameters of one name inside and outside its base model; no layout can tell."
        )
    shared_names = {
        canonical(name, student.base_model_prefix): canonical(first, student.base_model_prefix)
        for name, first in shared.items()
    }
    teacher_names = {canonical(name, teacher.base_model_prefix): name for name in teacher.weights.keys()}
    for name, first in teacher.tied.items():
        if canonical(name, teacher.base_model_prefix) not in teacher_names and first in teacher.weights.keys():
            teacher_names[canonical(name, teacher.base_model_prefix)] = first
    teacher_layout, layout = (
        resolve_alike(layout, teacher_names),
        resolve_alike(layout, [*student_names, *shared_names]),
    )
    if teacher_layout.projected() != layout.projected():
        raise ShapeError(
            f"The teacher's projected axes are {teacher_layout.projected()}, the student's {layout.projected()}: one has a "
            "projection after its embedding table, the other has not. Keep the embedding size different from, or equal "
            "to, the hidden size as there."
        )

    had, wanted = _stack_sizes(layout, teacher_names), _stack_sizes(layout, student_names)
    _refuse_unknown_stacks(options, had)
    stacks = {
        stack: choose_blocks(had[stack], count, options.layers, stack.removesuffix(".{block}"))
        if stack.endswith("{block}")
        else _listed_places(layout, teacher.config, student.config, stack, had[stack], count)
        for stack, count in wanted.items()
        if stack in had
    }
    known_somewhere = {found.row.pattern + found.suffix for name in teacher_names if (found := layout.find(name))}
    sites: dict[str, Site] = {}
    random: list[str] = []
    for name, actual in student_names.items():
        match = layout.find(name)
        if match is None:
            if name in teacher_names:
                raise LayoutError(
                    f"The layout of {layout.family!r} does not say what the axes of {actual!r}, shape "
                    f"{tuple(tensors[actual].shape)}, mean. Add a row for it: see hf_guide.register_layout."
                )
            random.append(actual)
            continue
        source, block = _source_name(match, stacks)
        before = teacher_layout.find(source)
        if Name("labels") in match.axes and before is not None and before.axes != match.axes:
            random.append(actual)  # a head of one name that reads something else there
            continue
        if source not in teacher_names:
            elsewhere = match.row.pattern + match.suffix in known_somewhere
            if elsewhere and block is not None:
                raise ShapeError(
                    f"{actual}: the teacher's block that feeds it has no {source!r}: blocks of another kind. "
                    "Choose blocks of the same kinds with layers=[...], or leave per-block lists to the teacher's config."
                )
            if not (match.is_bias and match.row.reads):
                random.append(actual)
                continue
        source_shape = teacher.weights.shape(teacher_names[source]) if source in teacher_names else None
        sites[name] = Site(
            actual,
            name,
            tensors[actual].shape,
            match,
            source if source in teacher_names else None,
            source_shape,
            block,
        )

    widths = _projected_widths(layout, sites.values())
    random_blocks = options.method == Method.GUIDE and options.later_blocks == LaterBlocks.RANDOM
    for name, site in list(sites.items()):
        carries_labels = label_places is not None and len(label_places) == 0 and Name("labels") in site.axes
        if carries_labels or (random_blocks and site.block is not None and site.block > 0):
            random.append(site.name)
            del sites[name]
    used = {site.source for site in sites.values()} | set(student_names) | set(shared_names)
    lost = [  # a head of its own, for which a tied student has no tensor
        f"{teacher_names[name]} (the student's is tied to {first}; tie_word_embeddings=False keeps it)"
        for name, first in shared_names.items()
        if first in teacher_names and teacher_names.get(name, teacher_names[first]) != teacher_names[first]
    ]
    lost += [
        actual
        for name, actual in teacher_names.items()
        if name not in used
        and (found := layout.find(name))
        and "block" not in found.numbers
        and actual.startswith(teacher.base_model_prefix + ".")
    ]
    kinds = {
        found.row.pattern + found.suffix for name in [*student_names, *shared_names] if (found := layout.find(name))
    }
    lost += dict.fromkeys(
        f"{found.row.pattern}{found.suffix} of every block"
        for name in teacher_names
        if (found := layout.find(name)) and "block" in found.numbers and found.row.pattern + found.suffix not in kinds
    )
    plan = Plan(
        layout,
        options,
        teacher,
        student.config,
        sites,
        shared_names,
        teacher_names,
        stacks,
        widths,
        vocab_places,
        label_places,
        random,
        lost,
    )
    for site in sites.values():
        if site.source is not None:
            plan.maps(site)
    return plan


def _refuse_unknown_stacks(options: InitializationConfig, stacks: Iterable[str]) -> None:
    known = [stack.removesuffix(".{block}") for stack in stacks if stack.endswith(".{block}")]
    for name in options.layers if isinstance(options.layers, dict) else ():
        if name not in known:
            raise OptionError(
                f"layers names the stack {name!r}, but this teacher's stacks are {known}.{did_you_mean(name, known)}"
            )


def _listed_places(
    layout: Layout, teacher: PreTrainedConfig, student: PreTrainedConfig, stack: str, had: int, wanted: int
) -> list[int]:
    """Return the teacher's listed module that feeds each of the student's: `{heads}` go as query heads do."""
    sizes = config_sizes(layout, teacher), config_sizes(layout, student)
    if stack.endswith("{heads}") and all("group" in known for known in sizes):
        heads = Product((Name("kv_heads"), Name("group")))

        def leaf(name: str) -> tuple[Tensor, Tensor]:
            places = even_places(sizes[0][name], sizes[1][name])
            return torch.tensor(places), torch.ones(len(places), dtype=torch.float64)

        return select(heads, leaf, sizes[0])[0].tolist()
    return choose_blocks(had, wanted, "even", stack)


def _source_name(match: Match, stacks: Mapping[str, list[int]]) -> tuple[str, int | None]:
    """Return the canonical name of the teacher's parameter that feeds a match, and the student's block number."""
    pattern, block = match.row.pattern, None
    source = pattern
    for placeholder, number in match.numbers.items():
        stack = pattern.partition("{" + placeholder + "}")[0] + "{" + placeholder + "}"
        fed = stacks[stack][int(number)] if stack in stacks else int(number)
        source = source.replace("{" + placeholder + "}", str(fed))
        if placeholder == "block":
            block = int(number)
    return source + match.suffix, block


def _projected_widths(layout: Layout, sites: Iterable[Site]) -> dict[str, tuple[int, int]]:
    """Return teacher's and student's width of every projected axis.

    Raises:
        ShapeError: a student that is wider than its teacher.
    """
    widths: dict[str, tuple[int, int]] = {}
    projected = layout.projected()
    for site in sites:
        if site.source_shape is None or len(site.source_shape) != len(site.axes):
            continue
        for axis, had, wanted in zip(site.axes, site.source_shape, site.shape, strict=True):
            if isinstance(axis, Name) and axis.name in projected:
                if wanted > had:
                    raise ShapeError(
                        f"The student's {READABLE.get(axis.name, axis.name)} is {wanted}, wider than its teacher's {had} "
                        f"(seen at {site.name}): a student starts inside its teacher, so choose at most {had}."
                    )
                if widths.setdefault(axis.name, (had, wanted)) != (had, wanted):
                    raise LayoutError(
                        f"{site.name} is {had} -> {wanted} along {axis.name!r}, elsewhere it is {widths[axis.name]}: "
                        f"the layout of {layout.family!r} calls two different axes by one name."
                    )
    return widths
