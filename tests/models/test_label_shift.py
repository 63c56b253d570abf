"""The task loss is the model's own, and a teacher is compared where that loss looks, for every class that can be trained."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig, PreTrainedModel
from transformers.models.auto import modeling_auto as auto

from hf_guide import DistillationTrainer
from hf_guide.errors import TaskError
from hf_guide.models.label_shift import shifts_labels
from hf_guide.models.tiny_models import MODEL_ERRORS, build_tiny_model, tiny_config
from hf_guide.tasks import Task, task_of
from tests.distillation.test_trainer import arguments

MAPPINGS = {
    Task.CAUSAL_LM: auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    Task.MASKED_LM: auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    Task.SEQ2SEQ_LM: auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    Task.SEQUENCE_CLASSIFICATION: auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    Task.TOKEN_CLASSIFICATION: auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    Task.IMAGE_CLASSIFICATION: auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
}
LABELS = 4


def every_class() -> Iterator[tuple[Task, str, str]]:
    """Yield each class of the mappings once, with its task and model type."""
    seen = set()
    for task, mapping in MAPPINGS.items():
        for kind, names in mapping.items():
            for name in (names,) if isinstance(names, str) else names:
                if name not in seen:
                    seen.add(name)
                    yield task, kind, name


SMALL: dict[str, dict[str, Any]] = {
    "xlnet": {"vocab_size": 99, "d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 32},
    "xlm": {"vocab_size": 99, "emb_dim": 16, "n_layers": 2, "n_heads": 2, "max_position_embeddings": 32},
}
"""Sizes of families whose names for them the twins do not know; they compute in float32."""


def build(kind: str, name: str, task: Task, seed: int = 0, **changes: Any) -> PreTrainedModel:
    model_class = getattr(transformers, name)
    if kind in SMALL:
        torch.manual_seed(seed)
        config = AutoConfig.for_model(kind, **(SMALL[kind] | changes))
        return model_class._from_config(config).eval()
    config = tiny_config(AutoConfig.for_model(kind, **changes))
    if not task.is_language_model:
        config.num_labels = LABELS
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = 0
    if task is Task.SEQ2SEQ_LM and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = 1
    return build_tiny_model(model_class, config, seed)


def batch_for(model: PreTrainedModel, task: Task) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    if task is Task.IMAGE_CLASSIFICATION:
        size = getattr(model.config, "image_size", 32)
        size = size if isinstance(size, int) else size[0]
        images = torch.randn(3, getattr(model.config, "num_channels", 3), size, size, generator=draw)
        return {"pixel_values": images.double(), "labels": torch.tensor([0, 2, 1])}
    ids = torch.randint(5, 30, (3, 7), generator=draw)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if task is Task.SEQUENCE_CLASSIFICATION:
        return batch | {"labels": torch.tensor([0, 2, 1])}
    labels = torch.randint(0, LABELS, ids.shape, generator=draw) if task is Task.TOKEN_CLASSIFICATION else ids.clone()
    labels[0, :2] = labels[1, 3] = labels[2, 5:] = -100
    return batch | {"labels": labels}


def reference(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the model's own loss, and which places of its logits it depends on."""
    outputs = model(**batch, return_dict=True)
    (slope,) = torch.autograd.grad(outputs["loss"], outputs["logits"])
    assert bool(outputs["logits"].isfinite().all())
    return outputs["loss"].detach(), slope.abs().sum(-1) > 0


def check_task_loss(model: PreTrainedModel, task: Task, batch: dict[str, torch.Tensor], folder: Path) -> None:
    teacher = copy.deepcopy(model)
    loss, items = reference(model, batch)
    with torch.no_grad():
        for each in teacher.parameters():
            each.add_(0.05 * torch.randn(each.shape, generator=torch.Generator().manual_seed(2)).to(each))
        divergence = torch.nn.functional.kl_div(
            model(**batch)["logits"].float().log_softmax(-1),
            teacher(**batch)["logits"].float().log_softmax(-1),
            reduction="none",
            log_target=True,
        ).sum(-1)[items]
    trainer = DistillationTrainer(
        model,
        arguments(folder, losses={"ce": 0.5, "kd": 0.5}, label_names=["labels"]),
        lambda _: dict(batch),
        [{}] * 3,
        teacher=teacher,
    )
    model.eval()
    trainer.state.epoch = 0
    counted = trainer._get_num_items_in_batch([batch], torch.device("cpu"))
    model.training = True  # the top alone: dropout inside stays off
    trainer.compute_loss(model, dict(batch), num_items_in_batch=counted)
    found = trainer._train_means.means(trainer.accelerator, ["ce", "kd"])
    tolerance = 1e-5 if loss.dtype is torch.float64 else 1e-4
    assert found["ce"] == pytest.approx(loss.item(), rel=tolerance), "ce in training"
    assert found["kd"] == pytest.approx(divergence.mean().item(), rel=1e-3, abs=1e-7), "kd"
    model.eval()
    evaluated = trainer.compute_loss(model, dict(batch), num_items_in_batch=counted)
    assert evaluated.item() == pytest.approx(loss.item(), rel=tolerance), "ce in evaluation"


FIRST = {
    "LlamaForCausalLM",
    "GPT2LMHeadModel",
    "CohereForCausalLM",
    "GraniteForCausalLM",
    "Gemma2ForCausalLM",
    "GlmForCausalLM",
    "XLNetLMHeadModel",
    "XLMWithLMHeadModel",
    "MambaForCausalLM",
    "BertForMaskedLM",
    "ModernBertForMaskedLM",
    "IBertForMaskedLM",
    "T5ForConditionalGeneration",
    "BartForConditionalGeneration",
    "Qwen2AudioForConditionalGeneration",
    "BertForSequenceClassification",
    "LlamaForSequenceClassification",
    "ModernBertForTokenClassification",
    "ViTForImageClassification",
    "DeiTForImageClassification",
}
NOT_ALIKE = {
    # Its decoder masks padding only where it has no cache: in evaluation its logits are others than in training.
    "T5GemmaForConditionalGeneration",
}


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    ("task", "kind", "name"),
    [pytest.param(*each, marks=() if each[2] in FIRST else pytest.mark.slow) for each in every_class()],
)
def test_the_task_loss_is_the_models_own(task: Task, kind: str, name: str, tmp_path: Path) -> None:
    try:
        model = build(kind, name, task)
        task = task_of(model)  # a class that serves several tasks counts for the first
        batch = batch_for(model, task)
        reference(model, batch)
    except (*MODEL_ERRORS, OSError) as error:
        assert name not in FIRST, error
        pytest.skip(f"no small model, or it cannot be run on this batch: {error}"[:200])
    except AssertionError:
        pytest.skip("its logits are not finite with random weights")
    if name in NOT_ALIKE:
        pytest.skip("its logits depend on its mode")
    check_task_loss(model, task, batch, tmp_path)


def test_permutation_language_modelling_is_not_shifted(tmp_path: Path) -> None:
    """As `DataCollatorForPermutationLanguageModeling` makes it: each target predicted at its own place."""
    model = build("xlnet", "XLNetLMHeadModel", Task.CAUSAL_LM)
    draw = torch.Generator().manual_seed(3)
    ids = torch.randint(5, 90, (3, 8), generator=draw)
    targets = torch.rand(ids.shape, generator=draw) < 0.4
    batch = {
        "input_ids": ids,
        "perm_mask": (torch.rand(3, 8, 8, generator=draw) < 0.4).float(),
        "target_mapping": torch.eye(8).repeat(3, 1, 1),
        "labels": ids.masked_fill(~targets, -100),
    }
    check_task_loss(model, Task.CAUSAL_LM, batch, tmp_path)


@pytest.mark.parametrize(("kind", "name"), [("mixtral", "MixtralForCausalLM"), ("qwen2_moe", "Qwen2MoeForCausalLM")])
def test_a_loss_with_something_added_is_taken_whole(kind: str, name: str, tmp_path: Path) -> None:
    model = build(kind, name, Task.CAUSAL_LM)
    batch = batch_for(model, Task.CAUSAL_LM)
    plain, _ = reference(model, batch)
    model.config.output_router_logits = True
    loss, _ = reference(model, batch)
    assert loss > plain + 1e-4
    check_task_loss(model, Task.CAUSAL_LM, batch, tmp_path)


def test_what_is_added_in_training_alone_is_found(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from hf_guide.models.lm_head import find_lm_head

    class Penalised(LlamaForCausalLM):
        def forward(self, *args: Any, **keywords: Any) -> Any:
            outputs = super().forward(*args, **keywords)
            if self.training and outputs.loss is not None:
                outputs.loss = outputs.loss + 0.5
            return outputs

    config = LlamaConfig(
        vocab_size=61, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    assert find_lm_head(LlamaForCausalLM(config)) is not None and find_lm_head(Penalised(config)) is None


def test_logits_of_different_tokens_are_not_compared(tmp_path: Path) -> None:
    student = build("llama", "LlamaForCausalLM", Task.CAUSAL_LM)
    teacher = build("xlnet", "XLNetLMHeadModel", Task.CAUSAL_LM)
    assert shifts_labels(student, Task.CAUSAL_LM) and not shifts_labels(teacher, Task.CAUSAL_LM)
    with pytest.raises(TaskError, match="Only the student's logits .LlamaForCausalLM. predict the next token"):
        DistillationTrainer(student, arguments(tmp_path, losses="kd"), teacher=teacher)
