"""Merge a student's adapter: save a stock model that computes what the student with its adapter computes.

Does: merge a copy, untie tensors that the adapter made different, write it, and verify the files by loading them again.
Does not: change the student, or merge what stock weights cannot represent.
"""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from hf_guide.errors import OptionError
from hf_guide.models.adapters import adapter_layers, has_adapter, without_adapter
from hf_guide.models.modes import eval_mode
from hf_guide.utils.files import staged_update
from hf_guide.utils.finite import check_weights_finite

logger = logging.get_logger(__name__)

# Relative error of the logits. In half precision the merged weight is rounded, and the adapter's sum is not.
_TOLERANCES = {torch.float64: 1e-5, torch.float32: 1e-3}
_HALF_TOLERANCE = 0.2


def save_merged(student: Any, folder: Path, *, add_files: Callable[[Path], None] | None = None) -> None:
    """Write a student with its adapter merged: the files of its stock class, verified by loading them again.

    Embeddings that are tied in the base model and are no longer equal are written as two tensors, with
    `tie_word_embeddings=False` where the family's config has it. The student is not changed; a second copy of it is in memory
    meanwhile.

    Args:
        student: A `PeftModel`, whose active adapters are merged.
        folder: A new folder, or one whose weights are replaced.
        add_files: Writes further files, such as a tokenizer, into the folder that is passed to it; they are published
            together with the weights.

    Raises:
        NotFiniteError: A merged weight is NaN or infinite; nothing is written.
        OptionError: There is no adapter, or it cannot be merged; or the written model gives other logits. Then nothing is
            written.
    """
    check_mergeable(student)
    if (folder / "adapter_config.json").exists():
        raise OptionError(
            f"{folder.name} has an adapter, which Transformers would add to the merged model. Choose another folder."
        )
    with staged_update(folder) as written:
        merged, expected = merge_adapter(student), _expected_logits(student)
        check_weights_finite(merged, "The merged student")
        model_class = type(merged)
        merged.save_pretrained(written)
        del merged
        _verify_saved_model(model_class, written, student, expected)
        if add_files is not None:
            add_files(written)


def check_mergeable(student: Any) -> None:
    """Check that a student has an adapter that can become part of its weights.

    Raises:
        OptionError: It has none, or one that cannot be merged; the message states why, and what to do.
    """
    if not has_adapter(student):
        raise OptionError("The student has no adapter to merge; save_model saves it as it is.")
    virtual = [each.peft_type.value for each in student.peft_config.values() if each.is_prompt_learning]
    if virtual:
        raise OptionError(
            f"{virtual[0]} adds virtual tokens, which are not part of any weight and cannot be merged. save_model saves the "
            "adapter."
        )
    if without_adapter(student) is student:
        raise OptionError(
            f"The adapter is inside a {type(student).__name__} (by add_adapter, or from_pretrained of an adapter's folder), "
            "which cannot merge it. Wrap the base model with peft.get_peft_model or PeftModel.from_pretrained instead; "
            "save_model saves the adapter."
        )
    if not hasattr(student, "merge_and_unload"):
        kinds = ", ".join(each.peft_type.value for each in student.peft_config.values())
        raise OptionError(f"PEFT cannot merge {kinds}. save_model saves the adapter.")
    if getattr(without_adapter(student), "is_quantized", False):
        raise OptionError(
            "The base model is quantized, and merging would lose the adapter to rounding. Save the adapter with save_model, "
            "load the base model in full precision, and merge there: PeftModel.from_pretrained(base, "
            "folder).merge_and_unload()."
        )


def merge_adapter(student: Any) -> PreTrainedModel:
    """Return a stock model that is a merged copy of a student; they share no tensor.

    Raises:
        OptionError: PEFT cannot merge this adapter; has its reason.
    """
    duplicate = copy.deepcopy(student, _deepcopy_memo(student))
    base = without_adapter(duplicate)
    ties, tied = dict(base.all_tied_weights_keys), getattr(base.config, "tie_word_embeddings", None)
    _clone_shared_parameters(base)
    try:
        merged = duplicate.merge_and_unload()
    except (ValueError, NotImplementedError, AttributeError, TypeError, RuntimeError) as error:
        raise OptionError(
            f"PEFT cannot merge this adapter: {error or type(error).__name__}. save_model saves the adapter by itself."
        ) from error
    left = next(adapter_layers(merged), None)
    if left is not None:
        raise OptionError(f"PEFT left {left[0]} unmerged. save_model saves the adapter by itself.")
    if tied is not None:
        merged.config.tie_word_embeddings = tied  # PEFT unsets it where it finds two tensors, equal or not
    _restore_ties(merged, ties)
    return merged


def _deepcopy_memo(model: nn.Module) -> dict[int, Any]:
    """Return the memo with which `deepcopy` copies tensors computed from parameters, as in PEFT's tied adapters."""
    memo: dict[int, Any] = {}

    def add(value: Any) -> None:
        if isinstance(value, Tensor) and not value.is_leaf:
            memo[id(value)] = value.detach().clone()
        elif isinstance(value, (Mapping, list, tuple)):
            for each in value.values() if isinstance(value, Mapping) else value:
                add(each)

    for module in model.modules():
        add({name: value for name, value in vars(module).items() if not name.startswith("_")})
    return memo


def _clone_shared_parameters(model: nn.Module) -> None:
    """Clone tensors that several modules share: PEFT merges in place, and so into all of them."""
    seen: set[int] = set()
    for module in model.modules():
        for key, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) in seen:
                setattr(module, key, nn.Parameter(parameter.detach().clone()))
            seen.add(id(parameter))


def _restore_ties(model: PreTrainedModel, ties: dict[str, str]) -> None:
    """Restore the ties of tensors that are still equal; if one is not, keep all separate and set it in the config."""
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    different = [name for name, source in ties.items() if not torch.equal(tensors[name], tensors[source])]
    if different and _untie_config(model.config):
        for name in ties:
            _set_tensor(model, name, nn.Parameter(tensors[name].detach().clone()))
        ties = {}
    # A family may tie whatever its config sets (T5). Of a checkpoint that holds both tensors Transformers ties none that
    # differ, so these are written apart there too.
    ties = {name: source for name, source in ties.items() if name not in different}
    for name, source in ties.items():
        _set_tensor(model, name, tensors[source])
    model.all_tied_weights_keys = ties


def _untie_config(config: Any) -> bool:
    """Set `tie_word_embeddings=False`; return whether it only unties: in T5 it changes the function, and is undone."""
    parts = [part for part in (config, config.get_text_config(decoder=True)) if hasattr(part, "tie_word_embeddings")]
    before = [part.tie_word_embeddings for part in parts]
    for part in parts:
        part.tie_word_embeddings = False
    if type(config).from_dict(config.to_dict()).to_dict() == config.to_dict():
        return True
    for part, tied in zip(parts, before, strict=True):
        part.tie_word_embeddings = tied
    return False


def _set_tensor(model: nn.Module, name: str, tensor: Any) -> None:
    home, _, last = name.rpartition(".")
    setattr(model.get_submodule(home), last, tensor)


def _verify_saved_model(
    model_class: type[PreTrainedModel], folder: Path, student: Any, expected: Tensor | None
) -> None:
    if expected is None:
        return
    base = without_adapter(student)
    is_sharded = len(set(getattr(base, "hf_device_map", {}).values())) > 1
    loaded: Any = model_class.from_pretrained(folder, dtype="auto", output_loading_info=True)
    model, report = loaded
    missing = sorted(report["missing_keys"])
    actual = _logits(model if is_sharded else model.to(base.device), student)
    error = float((actual - expected).norm() / expected.norm())
    if missing or not error <= _logits_tolerance(base):
        reason = f"lacks {missing[0]}" if missing else f"gives logits that are off by {100 * error:.2g} %"
        raise OptionError(
            f"The merged model, loaded again, {reason}, so nothing was written: this adapter has no exact equivalent as a "
            f"{model_class.__name__}. Save the adapter with save_model, or train one on other layers (not on tied "
            "embeddings or a tied head)."
        )


def _logits_tolerance(model: Any) -> float:
    exact = _TOLERANCES.get(model.dtype, _HALF_TOLERANCE)
    return exact if model.device.type == "cpu" else max(exact, 1e-2)  # TF32


def _expected_logits(student: Any) -> Tensor | None:
    """Return a student's logits of a small input; None, with a warning, where it needs another kind of input."""
    try:
        return _logits(student, student)
    except (TypeError, ValueError, RuntimeError, LookupError, AttributeError) as error:
        logger.warning(
            f"The merged {type(without_adapter(student)).__name__} is not compared with the student, which needs inputs other "
            f"than token ids or pixels: {error}"
        )
        return None


@torch.no_grad()
def _logits(model: Any, student: Any) -> Tensor:
    """Return a model's logits, float64 and on the CPU, of a small input for the student, in evaluation mode."""
    base = without_adapter(model)
    inputs = {
        name: each.to(base.device, base.dtype if each.is_floating_point() else each.dtype)
        for name, each in _tiny_inputs(without_adapter(student)).items()
    }
    with eval_mode(model):
        # Not `model(...)`, which autocasts while it is trained in mixed precision.
        return type(model).forward(model, **inputs).logits.double().cpu()


def _tiny_inputs(model: Any) -> dict[str, Tensor]:
    """Return two short examples for a model of tokens, of images or of Whisper's features."""
    config, generator = model.config, torch.Generator().manual_seed(0)
    text = config.get_text_config(decoder=True)
    vocabulary = getattr(text, "vocab_size", None)
    kind = model.main_input_name
    ids = torch.randint(vocabulary, (2, 6), generator=generator) if vocabulary else None
    if kind == "input_ids" and ids is not None:
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    elif kind == "pixel_values":
        size = getattr(config, "image_size", None) or 64
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        channels = getattr(config, "num_channels", 3)
        inputs = {"pixel_values": torch.randn(2, channels, height, width, generator=generator)}
    elif kind == "input_features" and hasattr(config, "max_source_positions"):
        frames = (2, config.num_mel_bins, 2 * config.max_source_positions)
        inputs = {"input_features": torch.randn(frames, generator=generator)}
    else:
        raise TypeError(f"it reads {kind}")
    if config.is_encoder_decoder and ids is not None:
        inputs["decoder_input_ids"] = ids.flip(1)
    return inputs
