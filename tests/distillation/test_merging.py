"""Laws of adapters: they train as in a plain loop, save, merge and load equal, and teach as their merged selves."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    ResNetConfig,
    ResNetForImageClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    WhisperConfig,
    WhisperForConditionalGeneration,
    set_seed,
)

from hf_guide import DistillationTrainer, capture_teacher
from hf_guide.distillation import merging
from hf_guide.distillation.merging import save_merged
from hf_guide.errors import OptionError
from hf_guide.models.penultimate import find_classifier, register_classifier
from hf_guide.tasks import Task
from tests.distillation.small import CLASSES, VOCABULARY, collate, examples_for, llama, model_for
from tests.distillation.test_trainer import arguments

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own, of tied embeddings and gradient checkpointing

TEMPERATURE, LEARNING_RATE = 2.0, 0.03


def gpt2(seed: int) -> GPT2LMHeadModel:
    set_seed(seed)
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    sizes = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
    return GPT2LMHeadModel(GPT2Config(**sizes, **dropout, initializer_range=0.3))


# By family: its task, its model by a seed, its Auto class, its linear layers, its table of embeddings and its head.
FAMILIES: dict[str, tuple[str, Callable[[int], Any], Any, list[str], str, str]] = {
    "llama": (
        "causal-lm",
        llama,
        AutoModelForCausalLM,
        ["q_proj", "down_proj"],
        "embed_tokens",
        "lm_head",
    ),
    "llama, tied": (
        "causal-lm",
        lambda seed: llama(seed, tie_word_embeddings=True),
        AutoModelForCausalLM,
        ["q_proj", "down_proj"],
        "embed_tokens",
        "lm_head",
    ),
    "gpt2, tied": ("causal-lm", gpt2, AutoModelForCausalLM, ["c_attn", "c_proj"], "wte", "lm_head"),
    "bert, tied": (
        "masked-lm",
        lambda seed: model_for("masked-lm", seed),
        AutoModelForMaskedLM,
        ["query", "output.dense"],
        "word_embeddings",
        "decoder",
    ),
    "t5, tied": (
        "seq2seq-lm",
        lambda seed: model_for("seq2seq-lm", seed),
        AutoModelForSeq2SeqLM,
        ["q", "wo"],
        "shared",
        "lm_head",
    ),
    "bert classifier": (
        "sequence-classification",
        lambda seed: model_for("sequence-classification", seed),
        AutoModelForSequenceClassification,
        ["query"],
        "word_embeddings",
        "classifier",
    ),
}
# What an adapter is put on, by the family's linear layers, table and head.
TARGETS: dict[str, Callable[[list[str], str, str], dict[str, Any]]] = {
    "linear layers": lambda linear, table, head: {"target_modules": linear},
    "linear layers, DoRA": lambda linear, table, head: {"target_modules": linear, "use_dora": True},
    "linear layers, rsLoRA": lambda linear, table, head: {"target_modules": linear, "use_rslora": True},
    "linear layers and all biases": lambda linear, table, head: {"target_modules": linear, "bias": "all"},
    "one block": lambda linear, table, head: {"target_modules": linear, "layers_to_transform": [1]},
    "head": lambda linear, table, head: {"target_modules": [*linear, head]},
    "head, DoRA": lambda linear, table, head: {"target_modules": [*linear, head], "use_dora": True},
    "embeddings": lambda linear, table, head: {"target_modules": [*linear, table]},
    "embeddings, DoRA": lambda linear, table, head: {"target_modules": [*linear, table], "use_dora": True},
    "embeddings and head": lambda linear, table, head: {"target_modules": [*linear, table, head]},
    "a copy of the head": lambda linear, table, head: {"target_modules": linear, "modules_to_save": [head]},
    "a copy of the embeddings": lambda linear, table, head: {"target_modules": linear, "modules_to_save": [table]},
    "copies of both": lambda linear, table, head: {"target_modules": linear, "modules_to_save": [table, head]},
    "some tokens": lambda linear, table, head: {
        "target_modules": linear,
        "trainable_token_indices": {table: [3, 5, 7]},
    },
    "tied adapters": lambda linear, table, head: {"target_modules": [*linear, table], "ensure_weight_tying": True},
    "tied copies": lambda linear, table, head: {
        "target_modules": linear,
        "modules_to_save": [table],
        "ensure_weight_tying": True,
    },
}
QUICK = {
    ("llama", "embeddings"),
    ("llama, tied", "head"),
    ("llama, tied", "embeddings"),
    ("llama, tied", "a copy of the head"),
    ("llama, tied", "some tokens"),
    ("llama, tied", "tied adapters"),
    ("gpt2, tied", "embeddings, DoRA"),
    ("bert, tied", "head, DoRA"),
    ("bert, tied", "a copy of the embeddings"),
    ("t5, tied", "head"),
    ("bert classifier", "a copy of the head"),
}
CASES = [
    pytest.param(family, target, marks=[] if (family, target) in QUICK else pytest.mark.slow)
    for family in FAMILIES
    for target in TARGETS
    if "tied" in family or not target.startswith("tied ")
]


def adapted(family: str, target: str, seed: int = 1, model: Any = None) -> Any:
    """Return a float64 model whose adapter, drawn from the seed, is not zero."""
    _, make, _, *layers = FAMILIES[family]
    model = make(seed) if model is None else model
    torch.manual_seed(seed + 100)
    config = peft.LoraConfig(r=2, init_lora_weights=False, **TARGETS[target](*layers))
    return peft.get_peft_model(model.double(), config)


def reference_curve(student: Any, teacher: Any, batch: dict[str, Tensor], task: str) -> list[float]:
    """Train on cross-entropy and forward KL of whole logits by SGD, and return the losses."""
    student.train()
    optimizer = torch.optim.SGD([each for each in student.parameters() if each.requires_grad], lr=LEARNING_RATE)
    losses = []
    for _ in range(3):
        labels, own = batch["labels"], student(**batch).logits
        with torch.no_grad():
            theirs = teacher.eval()(**batch).logits
        if task == "causal-lm":
            labels, own, theirs = labels[:, 1:], own[:, :-1], theirs[:, :-1]
        labels, own, theirs = (each[labels != -100] for each in (labels, own, theirs))
        q, p = ((each / TEMPERATURE).log_softmax(-1) for each in (own, theirs))
        kd = TEMPERATURE**2 * nn.functional.kl_div(q, p, log_target=True, reduction="batchmean")
        loss = 0.5 * nn.functional.cross_entropy(own, labels) + 0.5 * kd
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def trained_by_us(family: str, student: Any, teacher: Any, folder: Path, *, chunked: bool) -> DistillationTrainer:
    task = FAMILIES[family][0]
    args = arguments(
        folder, losses={"ce": 0.5, "kd": 0.5}, temperature=TEMPERATURE, learning_rate=LEARNING_RATE, max_steps=3
    )
    trainer = DistillationTrainer(student, args, collate, examples_for(task, 8), teacher=teacher)
    if not chunked:
        trainer.distillation_objective.head = None
        trainer.teachers[0].head = None
    trainer.train()
    return trainer


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm().clamp(min=1e-3))


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("family", "target"), CASES)
def test_an_adapter_trains_as_a_plain_loop_trains_it_and_saves_and_merges_equal(
    family: str, target: str, tmp_path: Path
) -> None:
    task, make, auto, *_ = FAMILIES[family]
    teacher, batch = make(2).double(), collate(examples_for(task, 8))
    reference = adapted(family, target)
    losses = reference_curve(reference, teacher, batch, task)
    expected = {name: each.detach() for name, each in reference.named_parameters() if each.requires_grad}
    for chunked in (True, False) if task.endswith("lm") else (False,):
        student = adapted(family, target)
        trainer = trained_by_us(family, student, teacher, tmp_path, chunked=chunked)
        curve = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert curve == pytest.approx(losses, rel=1e-6)
        found = {name: each.detach() for name, each in student.named_parameters() if each.requires_grad}
        assert found.keys() == expected.keys() and len(found) > 0
        # Transformers takes its cross-entropy in float32.
        assert all(error(each, expected[name]) < 1e-4 for name, each in found.items())
    trainer.save_model(str(tmp_path / "adapter"))
    trainer.save_merged_model(tmp_path / "merged")
    files = {path.name for path in (tmp_path / "adapter").glob("*.safetensors")}
    assert files == {"adapter_model.safetensors"}
    merged = auto.from_pretrained(tmp_path / "merged", dtype="auto")
    loaded = peft.PeftModel.from_pretrained(make(1).double(), tmp_path / "adapter")
    with torch.no_grad():
        logits = student.eval()(**batch).logits
        assert error(merged.eval()(**batch).logits, logits) < 1e-9
        assert error(loaded.double().eval()(**batch).logits, logits) < 1e-6


EVERY_TERM = {"ce": 0.2, "kd": 0.3, "hidden_states": 0.2, "features": 0.3}


def measured(task: str, student: Any, teacher: Any, folder: Path, **changes: Any) -> dict[str, float]:
    """Return every term of the objective, evaluated without training."""
    data = examples_for(task, 8)
    args = arguments(folder, losses=EVERY_TERM, **changes)
    trainer = DistillationTrainer(student, args, collate, eval_dataset=data, teacher=teacher)
    metrics = trainer.evaluate()
    return {
        name: value for name, value in metrics.items() if not name.endswith(("runtime", "second", "preparation_time"))
    }


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    ("family", "target"),
    [
        ("llama, tied", "head"),
        ("llama, tied", "a copy of the head"),
        ("bert, tied", "embeddings, DoRA"),
        ("t5, tied", "a copy of the head"),
        ("bert classifier", "head"),
        ("bert classifier", "a copy of the head"),
    ],
)
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_every_term_of_an_adapted_model_is_that_of_its_merged_self(
    side: str, family: str, target: str, tmp_path: Path
) -> None:
    task, make, auto, *_ = FAMILIES[family]
    with_adapter = adapted(family, target)
    save_merged(with_adapter, tmp_path / "merged")
    found = []
    for model in (auto.from_pretrained(tmp_path / "merged", dtype="auto"), with_adapter):
        other = make(2).double()
        pair = (model, other) if side == "student" else (other, model)
        found.append(measured(task, *pair, tmp_path))
    assert found[1] == pytest.approx(found[0], rel=1e-6)
    assert found[0]["eval_kd"] > 0 and found[0]["eval_features"] > 0 and found[0]["eval_hidden_states"] > 0


def merged_in_place(folder: Path) -> Any:
    teacher = adapted("llama, tied", "linear layers", 2)
    teacher.merge_adapter()
    return teacher


def unloaded(folder: Path) -> Any:
    return adapted("llama, tied", "linear layers", 2).merge_and_unload()


def adapter_folder(folder: Path) -> str:
    llama(2, tie_word_embeddings=True).double().save_pretrained(folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype="auto")
    adapted("llama, tied", "linear layers", 2, base).save_pretrained(folder / "adapter")
    return str(folder / "adapter")


def loaded_by_the_auto_class(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(adapter_folder(folder), dtype="auto")


def loaded_by_peft(folder: Path) -> Any:
    return peft.AutoPeftModelForCausalLM.from_pretrained(adapter_folder(folder), dtype="auto")


@pytest.mark.parametrize(
    "form",
    [merged_in_place, unloaded, adapter_folder, loaded_by_the_auto_class, loaded_by_peft],
    ids=lambda f: f.__name__,
)
def test_a_teacher_with_an_adapter_teaches_the_same_in_every_form(form: Callable[[Path], Any], tmp_path: Path) -> None:
    found = [
        measured("causal-lm", llama(1).double(), teacher, tmp_path, teacher_init_kwargs={"dtype": "auto"})
        for teacher in (adapted("llama, tied", "linear layers", 2), form(tmp_path))
    ]
    assert found[1] == pytest.approx(found[0], rel=1e-5)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("family", ["llama, tied", "bert classifier"])
def test_gradient_checkpointing_leaves_an_adapters_gradients_as_they_are(family: str, tmp_path: Path) -> None:
    task, make, *_ = FAMILIES[family]
    steps = []
    for saving in (False, True):
        student = adapted(family, "a copy of the head")
        before = {name: each.detach().clone() for name, each in student.named_parameters() if each.requires_grad}
        args = arguments(tmp_path, losses={"ce": 0.5, "kd": 0.5}, activation_checkpointing=saving)
        DistillationTrainer(student, args, collate, examples_for(task), teacher=make(2).double()).train()
        steps.append(torch.cat([(before[name] - student.get_parameter(name)).flatten() for name in before]))
    assert steps[0].norm() > 0 and error(steps[1], steps[0]) < 1e-6


def test_an_adapters_folder_is_captured_as_its_model(tmp_path: Path) -> None:
    data, folder = examples_for("causal-lm", 4), adapter_folder(tmp_path)
    found = []
    for number, teacher in enumerate((folder, adapted("llama, tied", "linear layers", 2).merge_and_unload())):
        capture = capture_teacher(
            teacher,
            data,
            tmp_path / str(number),
            data_collator=collate,
            config={"top_k": VOCABULARY},
            show_progress=False,
        )
        args = arguments(tmp_path, losses="kd")
        trainer = DistillationTrainer(llama(1), args, collate, eval_dataset=data, teacher=capture)
        found.append(trainer.evaluate()["eval_kd"])
    assert found[0] > 0 and found[0] == pytest.approx(found[1], rel=1e-3)


def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")))


def test_a_student_made_of_its_teacher_and_adapted_is_merged_into_as_whole_a_folder(tmp_path: Path) -> None:
    teacher = llama(2, blocks=3, tie_word_embeddings=True)
    shape = {"num_hidden_layers": 2, "hidden_size": 16}
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM", init_lora_weights=False)
    folders = []
    for adapter in (None, config):
        trainer = DistillationTrainer(
            dict(shape),
            arguments(tmp_path / str(len(folders)), max_steps=1, learning_rate=0.1),
            collate,
            examples_for("causal-lm"),
            teacher=teacher,
            processing_class=tokenizer(),
            peft_config=adapter,
        )
        trainer.train()
        folders.append(tmp_path / f"saved{len(folders)}")
        if adapter is None:
            trainer.save_model(str(folders[0]))
        else:
            trainer.create_model_card()
            trainer.save_merged_model(folders[1])
    whole, merged = ({path.name for path in folder.iterdir()} for folder in folders)
    assert "initialization_report.json" in whole and "tokenizer.json" in whole
    assert whole - merged == {"training_args.bin"} and not merged - whole
    assert "distillation.json" in merged
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".partial")] == []
    model = AutoModelForCausalLM.from_pretrained(folders[1])
    assert model.config.tie_word_embeddings is False
    assert not torch.equal(model.lm_head.weight, model.get_input_embeddings().weight)


def test_the_active_adapter_of_several_is_merged_and_the_student_is_unchanged(tmp_path: Path) -> None:
    student = adapted("llama, tied", "head")
    student.add_adapter("second", peft.LoraConfig(r=3, target_modules=["v_proj"], init_lora_weights=False))
    student.double().set_adapter("second")
    student.train()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    state = torch.get_rng_state()
    save_merged(student, tmp_path / "merged")
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    assert student.training and student.active_adapter == "second"
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert merged.config.tie_word_embeddings is True
    batch = collate(examples_for("causal-lm", 4))
    with torch.no_grad():
        assert error(merged(**batch).logits, student.eval()(**batch).logits) < 1e-9


MERGEABLE = {
    "IA3": lambda: peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "LoHa": lambda: peft.LoHaConfig(r=2, target_modules=["q_proj"], init_weights=False),
    "LoKr": lambda: peft.LoKrConfig(r=2, target_modules=["q_proj"], init_weights=False),
    "OFT": lambda: peft.OFTConfig(oft_block_size=4, target_modules=["q_proj"]),
    "norms": lambda: peft.LNTuningConfig(target_modules=["input_layernorm"]),
    "tokens": lambda: peft.TrainableTokensConfig(token_indices=[1, 2], target_modules=["embed_tokens"]),
    "a parameter": lambda: peft.LoraConfig(r=2, target_parameters=["down_proj.weight"], init_lora_weights=False),
    "repeated blocks": lambda: peft.LoraConfig(
        r=2, target_modules=["q_proj"], layer_replication=[(0, 2), (0, 2)], init_lora_weights=False
    ),
}


@pytest.mark.sampled(8)
@pytest.mark.parametrize("kind", MERGEABLE)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_every_mergeable_adapter_is_merged_in_every_precision(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    student = peft.get_peft_model(llama(1, tie_word_embeddings=True), MERGEABLE[kind]()).to(dtype)
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    save_merged(student, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert merged.dtype is dtype
    batch = collate(examples_for("causal-lm", 4))
    with torch.no_grad():
        expected = student.eval()(**batch).logits.double()
        assert error(merged(**batch).logits.double(), expected) < (1e-9 if dtype is torch.float64 else 0.05)


def convolutions() -> Any:
    set_seed(1)
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    model = ResNetForImageClassification(ResNetConfig(**sizes, num_labels=CLASSES))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
    return peft.LoraConfig(r=2, target_modules=["convolution"], modules_to_save=["classifier.1"]), model


def vision() -> Any:
    return peft.LoraConfig(r=2, target_modules=["q_proj", "classifier"]), model_for("image-classification", 1)


def speech() -> Any:
    set_seed(1)
    sizes = {"d_model": 24, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
    more = {"decoder_attention_heads": 2, "encoder_ffn_dim": 20, "decoder_ffn_dim": 16, "num_mel_bins": 7}
    ends = {"max_source_positions": 10, "max_target_positions": 16, "pad_token_id": 0, "bos_token_id": 1}
    config = WhisperConfig(vocab_size=VOCABULARY, **sizes, **more, **ends, eos_token_id=2, decoder_start_token_id=2)
    return peft.LoraConfig(r=2, target_modules=["q_proj", "proj_out"]), WhisperForConditionalGeneration(config)


@pytest.mark.parametrize("make", [convolutions, vision, speech], ids=lambda make: make.__name__)
def test_models_of_images_and_speech_are_merged_and_compared_too(
    make: Callable[[], Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config, model = make()
    config.init_lora_weights = False
    student = peft.get_peft_model(model, config)
    save_merged(student, tmp_path / "merged")
    assert "not compared" not in caplog.text
    merged = type(model).from_pretrained(tmp_path / "merged")
    assert merging._logits(merged, student).allclose(merging._logits(student, student), rtol=1e-4, atol=1e-4)


def virtual_tokens(folder: Path) -> Any:
    return peft.get_peft_model(llama(1), peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))


def prompts_inside(folder: Path) -> Any:
    config = peft.AdaptionPromptConfig(adapter_len=3, adapter_layers=1, task_type="CAUSAL_LM")
    return peft.get_peft_model(llama(1), config)


def several_experts(folder: Path) -> Any:
    return peft.get_peft_model(llama(1), peft.PolyConfig(target_modules=["q_proj"], r=2, task_type="CAUSAL_LM"))


def added_inside(folder: Path) -> Any:
    student = llama(1)
    student.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"]))
    return student


def a_bias_without_a_place(folder: Path) -> Any:
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], lora_bias=True, init_lora_weights=False)
    return peft.get_peft_model(llama(1), config)


def quantised(folder: Path) -> Any:
    student = adapted("llama", "head")
    student.get_base_model().is_quantized = True
    return student


def none(folder: Path) -> Any:
    return llama(1)


def a_folder_with_an_adapter(folder: Path) -> Any:
    student = adapted("llama", "head")
    student.save_pretrained(folder / "merged")
    return student


def tokens_of_a_tied_head_with_a_bias(folder: Path) -> Any:
    """Where PEFT tracks a tied head's tokens it forgets the head's bias, which no stock model does."""
    student = adapted("bert, tied", "some tokens")
    with torch.no_grad():
        student.get_base_model().cls.predictions.bias.normal_()
    return student


UNMERGEABLE = {
    virtual_tokens: "PREFIX_TUNING adds virtual tokens",
    prompts_inside: "PEFT cannot merge ADAPTION_PROMPT",
    several_experts: "PEFT cannot merge",
    added_inside: "add_adapter.*get_peft_model",
    a_bias_without_a_place: "lora_bias",
    quantised: "quantized.*full precision",
    none: "no adapter to merge",
    a_folder_with_an_adapter: "merged has an adapter.*another folder",
    tokens_of_a_tied_head_with_a_bias: "loaded again.*nothing was written",
}


@pytest.mark.parametrize("make", UNMERGEABLE, ids=lambda make: make.__name__)
def test_what_cannot_be_merged_exactly_is_an_error_and_nothing_is_written(
    make: Callable[[Path], Any], tmp_path: Path
) -> None:
    student = make(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OptionError, match=UNMERGEABLE[make]):
        save_merged(student, tmp_path / "merged")
    assert sorted(tmp_path.rglob("*")) == before


def test_old_weights_in_the_folder_give_way_to_the_merged_ones(tmp_path: Path) -> None:
    llama(5).save_pretrained(tmp_path / "merged", max_shard_size="20KB")
    assert len(list((tmp_path / "merged").glob("*.safetensors"))) > 1
    save_merged(adapted("llama", "head"), tmp_path / "merged")
    assert [path.name for path in (tmp_path / "merged").glob("*.safetensors*")] == ["model.safetensors"]


def roberta() -> RobertaForSequenceClassification:
    set_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    return RobertaForSequenceClassification(RobertaConfig(vocab_size=VOCABULARY, num_labels=CLASSES, **sizes))


def test_the_classifier_is_found_inside_what_wraps_it() -> None:
    task = Task.SEQUENCE_CLASSIFICATION
    config = peft.LoraConfig(r=CLASSES, target_modules=["query", "classifier.dense", "pooler.dense"])
    model = peft.get_peft_model(roberta(), config)  # LoRA's own layers have as many outputs as there are classes
    assert find_classifier(model, task) is model.get_base_model().classifier.out_proj
    model = peft.get_peft_model(roberta(), peft.LoraConfig(target_modules=["query"], modules_to_save=["classifier"]))
    wrapper = model.get_base_model().classifier
    assert find_classifier(model, task) is wrapper.modules_to_save["default"].out_proj
    with model.disable_adapter():
        assert find_classifier(model, task) is wrapper.original_module.out_proj
    model = roberta()
    register_classifier(model, "classifier.out_proj")
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["query"], modules_to_save=["classifier"]))
    assert find_classifier(model, task) is model.get_base_model().classifier.modules_to_save["default"].out_proj
    model = peft.get_peft_model(roberta(), peft.LoraConfig(target_modules=["out_proj"]))
    assert find_classifier(copy.deepcopy(model), task).in_features == 32
