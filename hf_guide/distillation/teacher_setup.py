"""Live teachers of a student: loaded, checked against it, and moved to its device or shards."""

from collections.abc import Mapping, Sequence
from typing import Any

import accelerate
import torch
from accelerate.utils import DistributedType
from torch.torch_version import TorchVersion
from transformers import PreTrainedModel

from hf_guide.errors import OptionError, TaskError, TeacherError
from hf_guide.models.adapters import forward_parameters, without_adapter
from hf_guide.models.label_shift import check_label_shift
from hf_guide.models.lm_head import find_lm_head
from hf_guide.tasks import Task
from hf_guide.teachers.alignment import align_labels, check_same_tokens, shared_vocabulary_size
from hf_guide.teachers.forward import LiveTeacher
from hf_guide.teachers.inputs import build_teacher_inputs
from hf_guide.teachers.loading import load_teachers, model_name, teacher_tokenizer
from hf_guide.teachers.patches import normalizes_patches
from hf_guide.teachers.processors import batch_tokenizer
from hf_guide.teachers.vocabulary import with_vocabulary_of
from hf_guide.utils.public_names import absolute_name, name_source


def build_live_teachers(
    teacher: Any,
    student: Any,
    task: Task,
    *,
    init_kwargs: Mapping[str, Any] | None,
    weights: Sequence[float] | None,
    processing_class: Any,
    accelerator: accelerate.Accelerator,
) -> list[LiveTeacher]:
    """Return teachers that are loaded, compatible with the student, and on its device or shards.

    Raises:
        OptionError, TaskError, TeacherError: as `load_teachers`, or weights of another number than teachers.
        VocabularyError: vocabularies or labels that do not agree.
    """
    models = load_teachers(teacher, task, init_kwargs=init_kwargs, student=student)
    shares = [1.0] * len(models) if weights is None else list(weights)
    if len(shares) != len(models):
        raise OptionError(f"There are {len(shares)} teacher_weights for {len(models)} teachers; give one weight each.")
    teachers = []
    tokenizer = batch_tokenizer(processing_class, student)
    for whole, share in zip(models, shares, strict=True):
        model = with_vocabulary_of(whole, tokenizer, init_kwargs)
        if model.main_input_name != student.main_input_name:
            raise TaskError(
                f"The teacher {model_name(model)} reads {model.main_input_name}, the student {student.main_input_name}: "
                "they cannot be fed the same batch."
            )
        _check_input_sizes(student, model)
        check_label_shift(model, student, task)
        classes, order = None, None
        if task.is_language_model:
            sizes = [each.get_output_embeddings().weight.shape[0] for each in (student, model)]
            own_tokenizer = teacher_tokenizer(model, init_kwargs)
            classes = shared_vocabulary_size(tokenizer, own_tokenizer, *sizes)
        elif task.row.outputs[0].classes == "characters":
            sizes = [each.config.vocab_size for each in (student, model)]
            own_tokenizer = teacher_tokenizer(model, init_kwargs)
            check_same_tokens(student.config, model.config, shared_vocabulary_size(tokenizer, own_tokenizer, *sizes))
        elif task.row.outputs[0].classes == "labels":
            order = align_labels(student.config, model.config, task)
        inputs = build_teacher_inputs(model, task, processing_class, student=student, init_kwargs=init_kwargs)
        # Before it is sharded: what is proved on whole weights still holds then, but they are no longer whole.
        head = find_lm_head(model) if task.is_language_model else None
        prepared, sharded = prepare_teacher(model, accelerator)
        head = None if sharded else head
        normalized = normalizes_patches(student.config)
        name = absolute_name(model_name(model))
        teachers.append(
            LiveTeacher(
                prepared,
                task,
                classes,
                order,
                share / sum(shares),
                head,
                inputs,
                normalized,
                name=name,
                source=name_source(name, getattr(model.config, "_commit_hash", None)),
            )
        )
    return teachers


def _check_input_sizes(student: Any, teacher: Any) -> None:
    """Check that a teacher reads images or sounds of the size that the student does.

    Raises:
        TeacherError: It reads another one; both are named.
    """
    names = ["num_mel_bins", "num_channels"]
    if "interpolate_pos_encoding" in forward_parameters(teacher):  # off by default: images of one size alone
        names.append("image_size")
    for name in names:
        sizes = [getattr(model.config, name, None) for model in (student, teacher)]
        if None not in sizes and sizes[0] != sizes[1]:
            raise TeacherError(
                f"The teacher {model_name(teacher)} reads inputs of {name}={sizes[1]}, the student of {name}={sizes[0]}: they "
                "cannot be fed the same batch. Use a teacher of the student's input size."
            )


def prepare_teacher(model: PreTrainedModel, accelerator: accelerate.Accelerator) -> tuple[PreTrainedModel, bool]:
    """Bring a teacher to where the student is trained, sharded as the student is; return it and whether it is sharded.

    A quantised one, or one that accelerate has offloaded or spread over devices already, stays where it is.
    """
    is_spread = len(set(getattr(model, "hf_device_map", {}).values())) > 1 or any(
        parameter.is_meta for parameter in model.parameters()
    )
    if is_spread or getattr(model, "is_quantized", False):
        return model, False
    if accelerator.distributed_type == DistributedType.FSDP:
        check_shardable(model, "teacher", accelerator)
        if accelerator.is_fsdp2:
            from accelerate.utils.fsdp_utils import fsdp2_prepare_model

            return fsdp2_prepare_model(accelerator, model), True
        return accelerator.prepare_model(model), True
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return _prepare_with_deepspeed(model, accelerator)
    return model.to(accelerator.device), False


def check_shardable(model: Any, role: str, accelerator: accelerate.Accelerator) -> None:
    """Check that FSDP2 can shard a model's embedding, which Accelerate puts in one group with the head at most.

    Raises:
        OptionError: More modules share its weight, as in T5; since torch 2.13 their first forward pass fails.
    """
    if not accelerator.is_fsdp2 or TorchVersion(torch.__version__) < "2.13":
        return
    bare = without_adapter(model)
    try:
        grouped = (bare.get_input_embeddings(), bare.get_output_embeddings())
    except NotImplementedError:  # models of characters hash them
        return
    weight = getattr(grouped[0], "weight", None)
    others = [
        name
        for name, module in bare.named_modules()
        if weight is not None and getattr(module, "weight", None) is weight and module not in grouped
    ]
    if others:
        raise OptionError(
            f"FSDP2 cannot shard the {role} {model_name(bare)}: {', '.join(others)} share the weight of its input embedding, "
            "and the embedding and the head alone may. Train without fsdp: each process then holds a replica."
        )


def _prepare_with_deepspeed(
    model: PreTrainedModel, accelerator: accelerate.Accelerator
) -> tuple[PreTrainedModel, bool]:
    """Shard a teacher where the student's weights are: ZeRO-3 alone shards them, other stages gradients and optimizers."""
    plugin = accelerator.state.deepspeed_plugin
    if plugin.zero_stage != 3:
        return model.to(accelerator.device), False
    import deepspeed

    sharding = {"stage": 3}
    if "offload_param" in plugin.deepspeed_config["zero_optimization"]:
        sharding["offload_param"] = plugin.deepspeed_config["zero_optimization"]["offload_param"]
    config: dict[str, Any] = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": sharding}
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float16, "fp16")):
        config[name] = {"enabled": model.dtype is dtype}
    engine, *_ = deepspeed.initialize(model=model, config=config)
    engine.eval()
    return engine, True
