"""Whether a model's own loss is divided by the number of items it is told of, or by that of its own batch.

`Trainer` tells every model whose forward takes keywords, and then expects the former; some take the mean all the same (T5,
BERT's classifiers), and their gradients grow with accumulation and processes.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from hf_guide.models.modes import eval_mode


@torch.no_grad()
def accepts_num_items_in_batch(model: nn.Module, inputs: Mapping[str, Any]) -> bool:
    """Ask the model itself: the same batch, said to be one item and two. Modes and random states are left as they were."""
    devices = sorted({tensor.device.index for tensor in inputs.values() if getattr(tensor, "is_cuda", False)})
    with torch.random.fork_rng(devices=devices), eval_mode(model):
        one, two = (model(**inputs, num_items_in_batch=torch.tensor(float(count))) for count in (1, 2))
    losses = [outputs["loss"] if isinstance(outputs, dict) else outputs[0] for outputs in (one, two)]
    return bool(torch.isclose(losses[0], 2 * losses[1], rtol=1e-3)) and bool(losses[0] != losses[1])
