"""Run a teacher that need not fit into memory: the weights of a block are there while it runs.

What is outside of blocks stays: embeddings, the final norm and the head. On the CPU a weight that is stored in the dtype in
which it is used is mapped from its file and not copied, and what was read of a large one is given up after its module has
run. Of a mixture one expert is in memory at a time where the module loops over its experts and the file stores them apart: it
is read for each batch that it has tokens of.
"""

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_guide.models.modes import without_initialization
from hf_guide.teachers.checkpoint import TeacherCheckpoint
from hf_guide.teachers.tensor_source import TensorSource

UNLOADED_BYTES = 1 << 22
"""A weight that is mapped is mapped anew from this size on: for smaller ones that takes longer than it is worth."""


@dataclass(frozen=True)
class _Slot:
    """A parameter or a buffer of a module, by the name of its attribute."""

    module: nn.Module
    name: str

    @property
    def tensor(self) -> Tensor:
        return getattr(self.module, self.name)

    def assign(self, value: Tensor) -> None:
        parameters: dict[str, Any] = self.module._parameters
        entries = parameters if self.name in parameters else self.module._buffers
        entries[self.name] = value


class _Experts:
    """A tensor of experts, (experts, rows, columns), for a module that loops over them: each is read when it is its turn."""

    def __init__(self, source: TensorSource, name: str, meta: Tensor, device: torch.device):
        self._source, self._name, self.dtype, self.shape, self.device = source, name, meta.dtype, meta.shape, device

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, expert: "int | Tensor") -> Tensor:
        index = int(expert)
        return self._source.rows(self._name, index, index + 1)[0].to(self.device, self.dtype)


def model_without_weights(teacher: TeacherCheckpoint) -> PreTrainedModel:
    """Return a model in evaluation mode whose parameters are on the meta device, and whose buffers are computed."""
    with init_empty_weights(include_buffers=False), without_initialization():
        model: PreTrainedModel = teacher.model_class._from_config(teacher.config, dtype=teacher.dtype)
    return model.eval()


def is_used_mapped(weights: TensorSource, name: str, dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether a weight that is used in a dtype and on a device stays in its file, which is mapped."""
    return device.type == "cpu" and weights.maps(name) and weights.dtype(name) == dtype


class BlockWeights:
    """Loads the weights of each block before it runs, and drops them after it.

    Args:
        model: From `model_without_weights`; what is outside of blocks is loaded now.
        blocks: The blocks.
        teacher: The checkpoint that the weights are read from.
        device: Where the model runs.

    Example:
        >>> from hf_guide.teachers.checkpoint import open_teacher
        >>> teacher = open_teacher("HuggingFaceTB/SmolLM2-135M")
        >>> model = model_without_weights(teacher)
        >>> weights = BlockWeights(model, model.model.layers, teacher, torch.device("cpu"))
        >>> with weights.held(model.model.layers[0]):
        ...     model.model.layers[0].mlp.up_proj.weight.device
        device(type='cpu')
        >>> model.model.layers[0].mlp.up_proj.weight.device
        device(type='meta')
    """

    def __init__(
        self, model: PreTrainedModel, blocks: Iterable[nn.Module], teacher: TeacherCheckpoint, device: torch.device
    ):
        self.teacher, self.device = teacher, device
        self._blocks = list(blocks)
        self._users: Counter[int] = Counter()
        for module in model.modules():
            module._buffers.update(
                {name: value.to(device) for name, value in module._buffers.items() if value is not None}
            )
        self._slots = self._slots_by_block(model)
        self._meta = {slot: slot.tensor for slots in self._slots.values() for slot, _ in slots}
        if model._can_set_experts_implementation():
            model.set_experts_implementation("eager")  # the loop that `_Experts` can take part in
        self._load(None)
        self._unload_after_use()
        for block in self._blocks:
            block.register_forward_pre_hook(lambda block, args: self._acquire(block) if _computes(block) else None)
            block.register_forward_hook(
                lambda block, args, output: self._release(block) if _computes(block) else None, always_call=True
            )

    @contextlib.contextmanager
    def held(self, *blocks: nn.Module) -> Iterator[None]:
        """Keep the weights of blocks in memory for the duration of the block."""
        acquired: list[nn.Module] = []
        try:
            for block in blocks:
                self._acquire(block)
                acquired.append(block)
            yield
        finally:
            for block in acquired:
                self._release(block)

    def prefetch(self, block: nn.Module) -> None:
        """Have the system read the weights of a block that runs soon, and return at once."""
        for _, name in self._slots.get(id(block), ()):
            self.teacher.weights.prefetch(name)

    def keep(self, *blocks: nn.Module) -> None:
        """Keep the weights of blocks in memory from now on."""
        for block in blocks:
            self._acquire(block)

    def all_held(self) -> contextlib.AbstractContextManager[None]:
        """Keep the weights of all blocks in memory for the duration of the block."""
        return self.held(*self._blocks)

    def _unload_after_use(self) -> None:
        """Have modules outside of blocks give up what was read of their large weights that are mapped from files.

        These are mapped anew. A vocabulary's tables would stay in memory otherwise, of which a system may map up to 2 MiB
        around each row that is read.
        """
        large = [
            (slot, name)
            for slot, name in self._slots.get(None, [])
            if self._meta[slot].nbytes >= UNLOADED_BYTES
            and is_used_mapped(self.teacher.weights, name, self._meta[slot].dtype, self.device)
        ]
        for module in dict.fromkeys(slot.module for slot, _ in large):
            names = {name for slot, name in large if slot.module is module}
            slots = [(slot, name) for slot, name in large if name in names]  # also where a tied weight is used
            module.register_forward_hook(lambda *_, slots=slots: self._assign(slots), always_call=True)

    def _acquire(self, block: nn.Module) -> None:
        self._users[id(block)] += 1
        if self._users[id(block)] == 1:
            self._load(block)

    def _release(self, block: nn.Module) -> None:
        if not self._users[id(block)]:
            return  # a hook stopped the forward pass before the weights were loaded
        self._users[id(block)] -= 1
        if not self._users[id(block)]:
            for slot, _ in self._slots.get(id(block), ()):
                vars(slot.module).pop(slot.name, None)
                slot.assign(self._meta[slot])

    def _load(self, block: nn.Module | None) -> None:
        self.teacher.weights.check_unchanged()  # a mapped file that became shorter would end the process
        self._assign(self._slots.get(None if block is None else id(block), []))

    def _assign(self, slots: Sequence[tuple[_Slot, str]]) -> None:
        loaded: dict[str, Tensor] = {}
        names = self.teacher.weights.in_file_order(dict.fromkeys(name for _, name in slots))
        order = {name: position for position, name in enumerate(names)}
        for slot, name in sorted(slots, key=lambda each: order[each[1]]):
            meta = self._meta[slot]
            if self._has_expert_loop(slot) and self.teacher.weights.reads_rows(name):
                # An attribute of the instance comes before a parameter of the same name.
                vars(slot.module)[slot.name] = _Experts(self.teacher.weights, name, meta, self.device)
                continue
            if name not in loaded:
                tensor = self.teacher.weights.get(name).to(self.device, meta.dtype)
                loaded[name] = nn.Parameter(tensor, requires_grad=False) if isinstance(meta, nn.Parameter) else tensor
            slot.assign(loaded[name])

    def _has_expert_loop(self, slot: _Slot) -> bool:
        """Return whether a tensor of experts is of a class that Transformers' `use_experts_implementation` decorates."""
        return self._meta[slot].ndim == 3 and hasattr(slot.module, "_is_expert_parallel")

    def _slots_by_block(self, model: PreTrainedModel) -> dict[int | None, list[tuple[_Slot, str]]]:
        """Return the slots of each block, by its id, with the names in the checkpoint; under None those that stay.

        A weight of two blocks, or of a block and the rest, stays.
        """
        owners: dict[int, int | None] = {}
        for block in self._blocks:
            for module in block.modules():
                owners[id(module)] = None if id(module) in owners else id(block)
        by_name: dict[str, dict[_Slot, int | None]] = {}
        stored = set(self.teacher.weights.keys())
        for module_name, module in model.named_modules(remove_duplicate=False):
            for name in (*module._parameters, *module._buffers):
                full = f"{module_name}.{name}" if module_name else name
                full = self.teacher.tied.get(full, full)
                if full in stored:
                    by_name.setdefault(full, {})[_Slot(module, name)] = owners.get(id(module))
        slots: dict[int | None, list[tuple[_Slot, str]]] = {}
        for full, found in by_name.items():
            users = set(found.values())
            slots.setdefault(users.pop() if len(users) == 1 else None, []).extend((slot, full) for slot in found)
        return slots


def _computes(block: nn.Module) -> bool:
    """Return whether a block has its own forward, and not one that takes its place for the time being."""
    return "forward" not in vars(block)
