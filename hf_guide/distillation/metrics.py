"""Means of each loss over items, for the logs: exact over batches, steps and processes."""

from collections.abc import Iterable, Mapping, Sequence

import accelerate
import torch
from torch import Tensor


class RunningMeans:
    """Sum values and the items that they were measured on, without waiting for the device.

    Example:
        >>> means = RunningMeans()
        >>> means.add({"kd": torch.tensor(6.0)}, torch.tensor(3))
        >>> means.means(accelerate.Accelerator(cpu=True), ["kd"])
        {'kd': 2.0}
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._items: dict[str, Tensor] = {}

    def add(self, sums: dict[str, Tensor], items: Tensor) -> None:
        """Add each value's sum over `items` items; both are scalars on one device."""
        for name, value in sums.items():
            zero = torch.zeros(
                (), dtype=torch.float64 if value.device.type != "mps" else torch.float32, device=value.device
            )
            self._sums[name] = self._sums.get(name, zero) + value.detach()
            self._items[name] = self._items.get(name, zero) + items

    def state(self) -> dict[str, list[float]]:
        """Return each sum and its number of items so far, to be saved in a checkpoint."""
        return {name: [float(value), float(self._items[name])] for name, value in self._sums.items()}

    def add_state_dict(self, state: Mapping[str, Sequence[float]], device: torch.device) -> None:
        """Add what `state` returned."""
        dtype = torch.float64 if device.type != "mps" else torch.float32
        for name, (total, items) in state.items():
            self.add(
                {name: torch.tensor(total, dtype=dtype, device=device)},
                torch.tensor(items, dtype=dtype, device=device),
            )

    def means(self, accelerator: accelerate.Accelerator, names: Iterable[str]) -> dict[str, float]:
        """Return the mean of each of `names` over all processes' items, without those never measured, and reset all sums.

        All processes must call it with the same names.
        """
        names = sorted(names)
        zero = torch.zeros((), device=accelerator.device)
        rows = [torch.stack([each.get(name, zero).float() for name in names]) for each in (self._sums, self._items)]
        self._sums, self._items = {}, {}
        if not names:
            return {}
        sums, items = accelerator.reduce(torch.stack(rows).to(accelerator.device), reduction="sum").tolist()
        return {name: total / count for name, total, count in zip(names, sums, items, strict=True) if count}
