"""A head taken out of its model gives the model's own logits, loss and gradients, in flat memory."""

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from transformers import PreTrainedModel

from hf_guide.distillation.losses.chunked import chunked_loss
from hf_guide.distillation.losses.divergences import divergence
from hf_guide.errors import HfGuideError, OptionError
from hf_guide.models.lm_head import LMHead, find_lm_head, skip_lm_head
from hf_guide.teachers.signals import DenseTarget
from tests.tiny import SIZES, run_python

VOCABULARY = SIZES["vocab_size"]
SHAPE = SIZES | {"num_hidden_layers": 1, "num_key_value_heads": 2}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
PAIR = SPECIAL | {
    "vocab_size": VOCABULARY,
    "d_model": 24,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 20,
    "decoder_ffn_dim": 16,
}
T5 = {"vocab_size": VOCABULARY, "d_model": 24, "d_kv": 12, "d_ff": 32, "num_layers": 1, "num_heads": 2}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 24, "n_layer": 1, "n_head": 2, "n_positions": 32}
MODERN = {"pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2}
HEADS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", SHAPE),
    "llama, tied": ("LlamaForCausalLM", SHAPE | {"tie_word_embeddings": True}),
    "gpt2": ("GPT2LMHeadModel", GPT2),
    "phi, head bias": ("PhiForCausalLM", SHAPE),
    "gemma2, soft-cap": ("Gemma2ForCausalLM", SHAPE | {"head_dim": 12}),
    "cohere, logit scale": ("CohereForCausalLM", SHAPE | {"logit_scale": 0.25}),
    "granite, logits scaling": ("GraniteForCausalLM", SHAPE | {"logits_scaling": 8.0}),
    "mixtral": ("MixtralForCausalLM", SHAPE | {"num_local_experts": 4}),
    "bert": ("BertForMaskedLM", SHAPE),
    "roberta": ("RobertaForMaskedLM", SHAPE),
    "modernbert": ("ModernBertForMaskedLM", SHAPE | MODERN),
    "t5": ("T5ForConditionalGeneration", T5),
    "t5, untied": ("T5ForConditionalGeneration", T5 | {"tie_word_embeddings": False}),
    "bart": ("BartForConditionalGeneration", PAIR),
    "marian, logits bias": ("MarianMTModel", PAIR),
    "whisper": (
        "WhisperForConditionalGeneration",
        PAIR | {"num_mel_bins": 7, "max_source_positions": 10, "max_target_positions": 16},
    ),
}


def build(name: str) -> PreTrainedModel:
    """A seeded model, every parameter and logit bias away from its default, logits large enough for a soft-cap to act."""
    model_class, config = HEADS[name]
    cls = getattr(transformers, model_class)
    torch.manual_seed(0)
    model = cls(cls.config_class(**config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        for buffer_name, buffer in model.named_buffers():
            if buffer_name.endswith("final_logits_bias"):
                buffer.normal_()
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")  # the others multiply no float64
    return model


def batch_for(model: PreTrainedModel) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, VOCABULARY, (3, 7), generator=generator)
    labels = torch.randint(3, VOCABULARY, (3, 7), generator=generator)
    labels[0, 4:] = -100
    batch = {"input_ids": ids, "labels": labels}
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = ids.flip(1)
    if model.main_input_name == "input_features":
        del batch["input_ids"]
        batch["input_features"] = torch.randn(3, 7, 20, generator=generator, dtype=model.dtype)
    return batch


def items(head: LMHead, positions: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the values at the positions with a label, and the labels."""
    if head.shifted:
        positions, labels = positions[:, :-1], labels[:, 1:]
    return positions[labels != -100], labels[labels != -100]


def inputs_of_head(model: nn.Module, head: LMHead, batch: dict[str, Tensor]) -> Tensor:
    head_inputs: list[Tensor] = []
    with skip_lm_head(model, head, head_inputs.append):
        outputs = model(**{name: value for name, value in batch.items() if name != "labels"})
    assert outputs.logits.shape == (3, 0, VOCABULARY)
    return head_inputs[0]


def two_terms(labels: Tensor, teacher: Tensor):
    def loss(logits: Tensor, rows: slice) -> dict[str, Tensor]:
        return {
            "ce": nn.functional.cross_entropy(logits, labels[rows], reduction="none"),
            "kd": divergence(logits, DenseTarget(teacher[rows]), temperature=2.0),
        }

    return loss


def error(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def same(gradient: Tensor | None, expected: Tensor | None) -> bool:
    if gradient is None or expected is None or not expected.any():
        return gradient is None and expected is None or not gradient.any()
    return error(gradient, expected) < 1e-5 or (gradient - expected).abs().max() < 1e-9


@pytest.mark.parametrize("name", HEADS)
def test_loss_and_gradients_are_the_models_own(name):
    model = build(name).double()
    head = find_lm_head(model)
    assert head is not None
    batch = batch_for(model)
    own = model(**batch).loss
    own.backward()
    expected = {key: parameter.grad for key, parameter in model.named_parameters()}
    model.zero_grad()
    hidden, labels = items(head, inputs_of_head(model, head, batch), batch["labels"])
    total, sums = chunked_loss(
        hidden,
        head,
        lambda logits, rows: {"ce": nn.functional.cross_entropy(logits, labels[rows], reduction="none")},
        {"ce": 1.0},
        max_logits=4 * VOCABULARY,
    )
    loss = total / len(labels)
    loss.backward()
    assert error(loss.detach(), own.detach()) < 1e-6  # many models take theirs in float32
    torch.testing.assert_close(sums["ce"], total.detach())
    for key, parameter in model.named_parameters():
        assert same(parameter.grad, expected[key]), key


@pytest.mark.parametrize("rows", [1, 4, 1000])
@pytest.mark.parametrize(
    "name", ["gemma2, soft-cap", "phi, head bias", "marian, logits bias", "granite, logits scaling"]
)
def test_values_and_gradients_are_those_of_whole_float64_logits(name, rows):
    model = build(name)
    head = find_lm_head(model)
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(13, head.module.in_features, generator=generator)
    labels = torch.randint(VOCABULARY, (13,), generator=generator)
    teacher = 3 * torch.randn(13, VOCABULARY, generator=generator)
    loss, weights = two_terms(labels, teacher), {"ce": 0.3, "kd": 1.7}

    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, *head.module.parameters())]
    logits = head.transform(nn.functional.linear(*exact))
    terms = loss(logits, slice(None))
    expected = sum(weights[key] * term.sum() for key, term in terms.items()) / 13
    expected.backward()

    hidden.requires_grad_()
    total, sums = chunked_loss(hidden, head, loss, weights, max_logits=rows * VOCABULARY)
    assert total.dtype == torch.float32
    (total / 13).backward()
    assert error(total.detach() / 13, expected.detach()) < 1e-6
    for key, term in terms.items():
        assert error(sums[key], term.detach().sum()) < 1e-6
        assert not sums[key].requires_grad
    for found, one in zip((hidden, *head.module.parameters()), exact, strict=True):
        assert error(found.grad, one.grad) < 1e-6


def test_a_tied_head_is_its_table():
    model = build("llama, tied")
    head = find_lm_head(model)
    assert head.module.weight is model.get_input_embeddings().weight


NOT_PLAIN: dict[str, Any] = {
    "router losses": lambda: ("MixtralForCausalLM", SHAPE | {"num_local_experts": 4, "output_router_logits": True}),
    "no language head": lambda: ("BertForSequenceClassification", SHAPE),
    "two heads": lambda: ("BertForPreTraining", SHAPE),
    "no head at all": lambda: ("LlamaModel", SHAPE),
}


@pytest.mark.parametrize("why", NOT_PLAIN)
def test_what_is_not_certain_is_not_taken_out(why):
    model_class, config = NOT_PLAIN[why]()
    cls = getattr(transformers, model_class)
    assert find_lm_head(cls(cls.config_class(**config))) is None


class MaskingLlama(transformers.LlamaForCausalLM):
    """A model that masks a logit, of which its config holds no trace."""

    def forward(self, *args: Any, **options: Any) -> Any:
        outputs = super().forward(*args, **options)
        outputs.logits = outputs.logits.masked_fill(torch.arange(VOCABULARY) == 7, -1e9)
        return outputs


class LookingLlama(transformers.LlamaForCausalLM):
    """Looks at the logits of a place, so that there must be one."""

    def forward(self, *args: Any, **options: Any) -> Any:
        outputs = super().forward(*args, **options)
        outputs.last_logits = outputs.logits[:, -1]
        return outputs


class DearLlama(transformers.LlamaForCausalLM):
    """Adds a little of its own to the loss."""

    def forward(self, *args: Any, **options: Any) -> Any:
        outputs = super().forward(*args, **options)
        if outputs.loss is not None:
            outputs.loss = outputs.loss + 1e-4 * self.lm_head.weight.square().mean()
        return outputs


@pytest.mark.parametrize("cls", [MaskingLlama, LookingLlama, DearLlama])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_with_ways_of_its_own_is_found_out(cls, dtype):
    model = cls(transformers.LlamaConfig(**SHAPE)).to(dtype)
    with torch.no_grad():
        model.lm_head.weight.add_(1.0)
    assert find_lm_head(model) is None


@pytest.mark.parametrize("name", HEADS)
def test_a_head_is_found_in_bfloat16_too(name):
    assert find_lm_head(build(name).bfloat16()) is not None


def test_a_logits_bias_is_read_when_it_is_used():
    model = build("marian, logits bias")
    head = find_lm_head(model)
    model.final_logits_bias = model.final_logits_bias + 1.0
    logits = torch.zeros(2, VOCABULARY)
    torch.testing.assert_close(head.transform(logits), model.final_logits_bias.expand(2, -1))


def test_finding_a_head_leaves_no_trace():
    model = build("bart")
    model.train()
    model.model.encoder.eval()
    modes = [module.training for module in model.modules()]
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    assert find_lm_head(model) is not None
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert "forward" not in vars(model.lm_head)


def test_the_logits_of_a_head_are_those_of_its_model():
    for name in ("gemma2, soft-cap", "marian, logits bias"):
        model = build(name)
        head = find_lm_head(model)
        batch = batch_for(model)
        with torch.no_grad():
            torch.testing.assert_close(head.logits(inputs_of_head(model, head, batch)), model(**batch).logits)


def lora(model: PreTrainedModel, **options: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    wrapped = get_peft_model(model, LoraConfig(r=2, init_lora_weights=False, task_type="CAUSAL_LM", **options))
    return wrapped.double().eval()


# PEFT looks at a property that Transformers has since renamed.
renamed = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@renamed
@pytest.mark.parametrize("copied", [{}, {"modules_to_save": ["lm_head"]}], ids=["elsewhere", "and a copied head"])
def test_a_lora_elsewhere_and_a_copy_of_the_head_train_as_they_do_with_whole_logits(copied):
    model = lora(build("llama"), target_modules=["q_proj"], **copied)
    head = find_lm_head(model)
    assert head is not None
    batch = batch_for(model)
    own = model(**batch).loss
    own.backward()
    expected = {key: parameter.grad for key, parameter in model.named_parameters()}
    model.zero_grad()
    hidden, labels = items(head, inputs_of_head(model, head, batch), batch["labels"])
    total, _ = chunked_loss(
        hidden,
        head,
        lambda logits, rows: {"ce": nn.functional.cross_entropy(logits, labels[rows], reduction="none")},
        {"ce": 1.0},
        max_logits=500,
    )
    (total / len(labels)).backward()
    trained = [key for key, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 + len(copied)
    for key, parameter in model.named_parameters():
        if key in trained:
            assert same(parameter.grad, expected[key]), key
        else:
            assert parameter.grad is None


@renamed
def test_a_lora_on_the_head_is_not_taken_out():
    assert find_lm_head(lora(build("llama"), target_modules=["q_proj", "lm_head"])) is None


def simple(width: int = 8, *, bias: bool = True, dtype: torch.dtype = torch.float32) -> LMHead:
    torch.manual_seed(0)
    return LMHead(nn.Linear(width, VOCABULARY, bias=bias, dtype=dtype), lambda logits: logits)


def squares(logits: Tensor, rows: slice) -> dict[str, Tensor]:
    return {"a": logits.square().mean(-1), "b": logits.mean(-1)}


def test_what_is_frozen_gets_no_gradient():
    hidden = torch.randn(5, 8)
    head = simple()
    chunked_loss(hidden, head, squares, {"a": 1.0})[0].backward()
    assert hidden.grad is None
    assert head.module.weight.grad.any() and head.module.bias.grad.any()
    head = simple()
    head.module.requires_grad_(False)
    hidden.requires_grad_()
    chunked_loss(hidden, head, squares, {"a": 1.0})[0].backward()
    assert hidden.grad.any()
    assert head.module.weight.grad is None


def test_names_without_a_weight_are_summed_without_gradient():
    hidden = torch.randn(5, 8, requires_grad=True)
    head = simple()
    total, sums = chunked_loss(hidden, head, squares, {"a": 2.0}, max_logits=2 * VOCABULARY)
    (alone,) = torch.autograd.grad(total, hidden)
    expected = squares(head.module(hidden), slice(None))
    torch.testing.assert_close(sums["b"], expected["b"].sum().detach())
    torch.testing.assert_close(total, 2 * expected["a"].sum())
    torch.testing.assert_close(alone, torch.autograd.grad(2 * expected["a"].sum(), hidden)[0])


def test_without_grad_mode_the_sum_is_the_same_and_has_no_graph():
    hidden = torch.randn(5, 8, requires_grad=True)
    head = simple()
    total, sums = chunked_loss(hidden, head, squares, {"a": 2.0})
    with torch.no_grad():
        again, sums_again = chunked_loss(hidden, head, squares, {"a": 2.0})
    assert total.requires_grad and not again.requires_grad
    assert torch.equal(total, again)
    assert {name: value.item() for name, value in sums.items()} == {
        name: value.item() for name, value in sums_again.items()
    }


def test_no_items_sum_to_zero_under_every_name():
    hidden = torch.zeros(0, 8, requires_grad=True)
    head = simple()
    total, sums = chunked_loss(hidden, head, squares, {"a": 2.0})
    total.backward()
    assert total == 0 and sums == {"a": 0.0, "b": 0.0}
    assert hidden.grad.shape == (0, 8)


def test_a_loss_that_does_not_depend_on_the_logits_gives_zero_gradient():
    hidden = torch.randn(5, 8, requires_grad=True)
    head = simple()
    total, _ = chunked_loss(hidden, head, lambda logits, rows: {"a": torch.ones(len(logits))}, {"a": 1.0})
    total.backward()
    assert total == 5
    assert not hidden.grad.any() and not head.module.weight.grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision_is_as_near_as_whole_logits_in_half_precision_are(dtype, autocast):
    generator = torch.Generator().manual_seed(2)
    labels = torch.randint(VOCABULARY, (40,), generator=generator)
    teacher = 2 * torch.randn(40, VOCABULARY, generator=generator)
    loss, weights = two_terms(labels, teacher), {"ce": 0.5, "kd": 0.5}
    start = torch.randn(40, 8, generator=generator).to(torch.float32 if autocast else dtype)
    results = []
    for chunked in (None, False, True):
        head = simple(dtype=torch.float64 if chunked is None else torch.float32 if autocast else dtype)
        head.module.load_state_dict(simple(dtype=torch.float32 if autocast else dtype).module.state_dict())
        hidden = start.to(head.module.weight.dtype).requires_grad_()
        with torch.autocast("cpu", dtype, enabled=autocast and chunked is not None):
            if chunked:
                total, _ = chunked_loss(hidden, head, loss, weights, max_logits=7 * VOCABULARY)
            else:
                logits = head.module(hidden)
                terms = loss(logits if chunked is None else logits.float(), slice(None))
                total = sum(weights[key] * term.sum() for key, term in terms.items())
        (total / 40).backward()
        assert hidden.grad.dtype == hidden.dtype
        results.append([total.detach(), hidden.grad, head.module.weight.grad, head.module.bias.grad])
    for exact, whole, in_chunks in zip(*results, strict=True):
        assert error(in_chunks, exact) <= 1.5 * error(whole, exact) + 1e-6


def test_logits_of_no_position_have_the_dtype_that_the_head_would_give():
    model = build("gemma2, soft-cap")
    head = find_lm_head(model)
    batch = {"input_ids": batch_for(model)["input_ids"]}
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            expected = model(**batch).logits.dtype
            with skip_lm_head(model, head, lambda hidden: None):
                assert model(**batch).logits.dtype == expected


def test_a_hook_of_accelerates_around_the_head_still_runs():
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    class Counting(ModelHook):
        calls = 0

        def pre_forward(self, module: nn.Module, *args: Any, **options: Any) -> Any:
            self.calls += 1
            return args, options

    model = build("llama")
    head = find_lm_head(model)
    hook = Counting()
    add_hook_to_module(model.lm_head, hook)
    batch = batch_for(model)
    hidden = inputs_of_head(model, head, batch)
    assert hook.calls == 1
    torch.testing.assert_close(model(**batch).logits, head.logits(hidden))
    assert hook.calls == 2
    assert find_lm_head(model) is not None
    remove_hook_from_module(model.lm_head)
    torch.testing.assert_close(model(**batch).logits, head.logits(hidden))


def test_the_head_is_itself_again_when_the_model_fails():
    model = build("llama")
    head = find_lm_head(model)

    def raise_error(hidden: Tensor) -> None:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"), skip_lm_head(model, head, raise_error):
        model(**batch_for(model))
    assert "forward" not in vars(model.lm_head)
    assert model(input_ids=batch_for(model)["input_ids"]).logits.shape == (3, 7, VOCABULARY)


@pytest.mark.slow
def test_a_compiled_model_is_not_compiled_anew_for_every_step():
    model = build("llama")
    head = find_lm_head(model)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter)
    batch = batch_for(model)
    first = inputs_of_head(compiled, head, batch)
    frames = counter.frame_count
    for _ in range(3):
        torch.testing.assert_close(inputs_of_head(compiled, head, batch), first)
    assert counter.frame_count == frames > 0
    with torch.no_grad():
        torch.testing.assert_close(compiled(input_ids=batch["input_ids"]).logits, head.logits(first))


def test_wrong_shapes_and_uses_are_errors():
    head, hidden = simple(), torch.randn(5, 8, requires_grad=True)
    with pytest.raises(HfGuideError, match=r"\(items, 8\); found \(1, 5, 8\)"):
        chunked_loss(hidden[None], head, squares, {"a": 1.0})
    with pytest.raises(OptionError, match=r"returns \['a', 'b'\]; weights also has \['c'\]"):
        chunked_loss(hidden, head, squares, {"a": 1.0, "c": 1.0})
    with pytest.raises(HfGuideError, match=r"'a' must be one value per item, \(5,\); found \(\)"):
        chunked_loss(hidden, head, lambda logits, rows: {"a": logits.sum()}, {"a": 1.0})
    total, _ = chunked_loss(hidden, head, squares, {"a": 1.0})
    total.backward(retain_graph=True)
    with pytest.raises(HfGuideError, match="already called"):
        total.backward()
    model, other = build("llama"), build("llama")
    found = find_lm_head(other)
    with pytest.raises(HfGuideError, match="did not call its head"), skip_lm_head(model, found, print):
        model(**batch_for(model))
    with pytest.raises(HfGuideError, match="skipped already"), skip_lm_head(other, found, print):
        with skip_lm_head(other, found, print):
            pass


PEAK = """
import torch
from torch import nn
from hf_guide.distillation.losses.divergences import divergence
from hf_guide.teachers.signals import DenseTarget
from hf_guide.distillation.losses.chunked import chunked_loss
from hf_guide.models.lm_head import LMHead

vocabulary, width = 16384, 16
student, teacher = (nn.Linear(width, vocabulary, bias=False) for _ in range(2))

def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024

def step(items):
    hidden = torch.randn(items, width, requires_grad=True)
    labels = torch.zeros(items, dtype=torch.long)

    def loss(logits, rows):
        with torch.no_grad():
            target = DenseTarget(teacher(hidden[rows]))
        return {"ce": nn.functional.cross_entropy(logits, labels[rows], reduction="none"), "kd": divergence(logits, target)}

    total, _ = chunked_loss(hidden, LMHead(student, lambda logits: logits), loss, {"ce": 0.5, "kd": 0.5}, max_logits=2**19)
    total.backward()
    return peak()

few = step(128)
print(step(2048) - few)
"""


@pytest.mark.extended
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_memory_does_not_grow_with_the_items():
    growth = int(run_python(PEAK, OMP_NUM_THREADS="1"))
    whole_logits = (2048 - 128) * 16384 * 4
    assert growth < whole_logits / 4  # the allocator takes some; the plain formula holds six times the logits


TWO_PROCESSES = """
import torch, torch.distributed as dist
import hf_guide.utils.distributed  # waits for gloo's threads before the process exits
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from hf_guide.distillation.losses.chunked import chunked_loss
from hf_guide.models.lm_head import find_lm_head, skip_lm_head
from tests.models.test_lm_head import batch_for, build, items, same

dist.init_process_group("gloo")
assert dist.get_world_size() == 2

def run(model, head, rank):
    labels = batch["labels"][rank : rank + 2]
    losses = []

    def on_hidden(hidden):  # here, where the head's weights are gathered
        picked, aims = items(head, hidden, labels)
        loss = lambda logits, rows: {"ce": nn.functional.cross_entropy(logits, aims[rows], reduction="none")}
        losses.append(chunked_loss(picked, head, loss, {"ce": 1.0}, max_logits=400)[0])

    with skip_lm_head(model, head, on_hidden):
        model(input_ids=batch["input_ids"][rank : rank + 2])
    return losses[0]

for name in ("llama", "llama, tied"):
    alone = build(name)
    head, batch = find_lm_head(alone), batch_for(alone)
    (sum(run(alone, head, rank) for rank in range(2)) / 2).backward()
    expected = {key: parameter.grad for key, parameter in alone.named_parameters()}
    for wrapper in ("ddp", "fsdp2"):
        model = build(name)
        head = find_lm_head(model)
        if wrapper == "ddp":
            wrapped = DistributedDataParallel(model)
        else:
            for block in model.model.layers:
                fully_shard(block)
            wrapped = fully_shard(model)
        for _ in range(2):
            model.zero_grad()
            run(wrapped, head, dist.get_rank()).backward()
        for key, parameter in model.named_parameters():
            gradient = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
            assert same(gradient, expected[key]), (name, wrapper, key)
dist.destroy_process_group()
"""


@pytest.mark.extended
def test_two_processes_get_the_gradients_of_one_with_replicas_and_with_shards(tmp_path):
    script = tmp_path / "two_processes.py"
    script.write_text(TWO_PROCESSES)
    here = str(Path(__file__).parents[2])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    environment = {**os.environ, "PYTHONPATH": here, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
