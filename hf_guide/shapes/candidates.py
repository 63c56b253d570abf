"""What a shape is to the user: its overrides, its costs and its scores; and the score that needs no data."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hf_guide.shapes.fields import SizeFields, SizeRole

RULE_WEIGHTS: Mapping[SizeRole, float] = {
    SizeRole.WIDTH: 2.0,
    SizeRole.DEPTH: 1.0,
    SizeRole.HEAD_SIZE: 1.0,
    SizeRole.HEADS: 0.5,
    SizeRole.MLP: 0.5,
    SizeRole.EXPERTS: 0.25,
}
"""How much each size weighs in `rule_scores`.

They were chosen on ten students of SmolLM2-135M of 23 M parameters, one seed, 51,200 tokens of distillation: on those the rank
correlation (Spearman) of the score with the perplexity after training is 0.92, that of the untrained calibrated student's
perplexity 0.92. On eight shapes trained again, three of them others, they are 0.90 and 0.86; on twelve of 8 M 0.79 and 0.87,
on twelve of 45 M 0.92 and 0.91 (student_shapes.py). The weight of the experts is not measured.
"""


@dataclass(frozen=True)
class ShapeCandidate:
    """One shape that a budget allows.

    Attributes:
        overrides: What `from_teacher` takes to make it, such as {"hidden_size": 240, "num_hidden_layers": 14}; without the
            overrides that the search was given.
        parameters: Number of parameters, tied ones counted once; exact, with evenly spaced blocks where blocks differ in size.
        active_parameters: Those that a token passes in a mixture of experts; all of any other model.
        memory: Bytes of the weights and of the cache; of the weights alone where a cache cannot be measured and the
            budget is not of memory.
        flops_per_token: Of a forward pass, 2 for each weight that a token passes; without attention's products of queries
            and keys, which grow with the context.
        rule_score: See `rule_scores`; lower is better, 0 is the teacher's own shape.
        quick_loss: Of a start that is refitted on an eighth of the calibration data, on held-out calibration data, as
            `hf_guide.calibration.output_comparison` measures it; None where it was not made.
        loss: Of the whole start, on the same data; None where it was not made.
        distilled_loss: The same after `search_steps` of distillation; None without.
        sizes: The value of every size field, those that are the teacher's or the user's too.
        width, depth: Of the widest stream, and of the deepest stack.

    Example:
        >>> from hf_guide import find_shapes
        >>> best = find_shapes("HuggingFaceTB/SmolLM2-135M", num_parameters="50%", show_progress=False)[0]
        >>> 0 < best.rule_score, best.loss
        (True, None)
    """

    overrides: dict[str, int]
    parameters: int
    active_parameters: int
    memory: int
    flops_per_token: int
    rule_score: float
    quick_loss: float | None = None
    loss: float | None = None
    distilled_loss: float | None = None
    sizes: dict[str, int] = field(default_factory=dict)
    width: int = 0
    depth: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return dataclasses.asdict(self)

    def describe(self) -> str:
        """Return the sizes as one text, such as "hidden_size=240, num_hidden_layers=14"."""
        return ", ".join(f"{name}={size}" for name, size in self.sizes.items())


def rule_scores(sizes: Mapping[str, np.ndarray], fields: SizeFields) -> np.ndarray:
    r"""Return a score of every shape that needs no data; lower is better, 0 is the teacher's own.

    For each role r (width, depth, heads, their size, MLP, experts), with teacher's size n_r and student's s_r,

        score = sum over r of w_r (n_r / s_r - 1),

    with the weights of `RULE_WEIGHTS`: how many of the teacher's units each of the student's stands for. It is convex, so its
    best shape has no size near its minimum. Several fields of a role count as their mean. It is a rule for shapes of equal
    cost, not an estimate of a loss.

    Args:
        sizes: For each size field its value in every shape.
        fields: The teacher's size fields.
    """
    scores = np.zeros(len(next(iter(sizes.values()))))
    for role, weight in RULE_WEIGHTS.items():
        ratios = [each.size / sizes[each.name] - 1 for each in fields.of(role)]
        if ratios:
            scores = scores + weight * np.mean(ratios, axis=0)
    head_size: Any = fields.head_size
    if fields.heads_follow_width:
        width, heads = fields.main(SizeRole.WIDTH), fields.main(SizeRole.HEADS)
        head_size = None if width is None or heads is None else sizes[width.name] / sizes[heads.name]
    if head_size is not None and fields.teacher_head_size is not None:
        scores = scores + RULE_WEIGHTS[SizeRole.HEAD_SIZE] * (fields.teacher_head_size / head_size - 1)
    return scores


def are_alike(sizes: Mapping[str, np.ndarray], index: int) -> np.ndarray:
    """Return which shapes are like the one at `index`: no size differs by more than `ALIKE`.

    Example:
        >>> are_alike({"hidden_size": np.array([240.0, 250.0, 400.0])}, 0).tolist()
        [True, True, False]
    """
    logs = np.log(np.stack(list(sizes.values()), axis=1))
    return np.abs(logs - logs[index]).max(axis=1) <= np.log1p(ALIKE)


ALIKE = 0.15
"""By how much, as a share, some size of a shape must differ from another's for both to be listed."""
