"""What `calibrated` takes besides the transfer of the weights: the teacher, the activations, and the fits.

Not counted are the statistics, the logits, the fits of vocabulary tables, and the blocks of a stack that only runs within the
whole model: what is estimated is the least.
"""

from collections import Counter
from collections.abc import Iterator

import torch
from transformers import PreTrainedModel

from hf_guide.calibration.config import CalibratedConfig, Refit
from hf_guide.calibration.data import default_num_tokens
from hf_guide.initialization.cost import CostPart
from hf_guide.initialization.registry import StudentSetup
from hf_guide.models.model_classes import strip_base_prefix

TEACHER_PASSES, STUDENT_PASSES = 3, 4


def calibration_parts(setup: StudentSetup, config: CalibratedConfig) -> Iterator[CostPart]:
    """Yield the parts of a calibration; the number of tokens is the default where none is given."""
    teacher, layout, student = setup.teacher, setup.layout, setup.meta_student()
    plan = setup.plan(student)
    blocks, outside, numbers = Counter[str](), 0, 0
    for name in teacher.weights.keys():
        count = teacher.weights.shape(name).numel()
        size = count * teacher.weights.dtype(name).itemsize
        match = layout.find(strip_base_prefix(name, teacher.base_model_prefix))
        numbers += count
        if match is None or "block" not in match.numbers:
            outside += size
        else:
            blocks[match.row.pattern.partition("{block}")[0] + match.numbers["block"]] += size
    planned = [plan.sizes(parameter) for parameter in plan.parameters.values() if parameter.source is not None]
    neurons, student_neurons = (max((sizes[index].get("mlp", 0) for sizes in planned), default=0) for index in (0, 1))
    tokens = config.calibration_tokens or default_num_tokens(neurons)
    if not isinstance(setup.source, PreTrainedModel):
        whole = outside + sum(blocks.values())
        held = outside + 2 * max(blocks.values(), default=0)
        yield CostPart("the teacher's embeddings, head and two blocks", held, is_kept=True, read=3 * whole)
    passes = TEACHER_PASSES * numbers + (
        STUDENT_PASSES * student.num_parameters() if config.refit != Refit.NONE else 0
    )
    width = max((old for old, _ in plan.widths.values()), default=0)
    kept = 4 if config.refit != Refit.NONE else 0
    yield CostPart(
        f"the activations of {tokens} tokens",
        min(4 * tokens * kept * width, round(config.activation_memory * 10**9)),
        is_kept=True,
        products={torch.float32: float(tokens) * passes},
        advice="fewer calibration_tokens, a lower activation_memory",
    )
    widest = max(student_neurons, width)
    yield CostPart("the fit of a weight", 4 * 8 * widest**2)
