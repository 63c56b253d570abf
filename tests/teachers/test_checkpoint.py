"""A teacher is read as `from_pretrained` reads it, bit for bit, without holding it in memory, and left as it was."""

import gc
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from hf_guide.errors import OptionError, TeacherError
from hf_guide.initialization.subclass_head import _OverriddenTensors
from hf_guide.initialization.transfer import Transfer
from hf_guide.modeling import from_teacher
from hf_guide.teachers.checkpoint import TeacherCheckpoint, open_teacher, tokenizer_length
from hf_guide.teachers.tensor_source import FileState, InMemoryTensors, OtherVocabularyTensors, SafetensorsTensors
from tests.invariants.case import Case, build
from tests.invariants.cases import CASES

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 64,
}


def llama(**changes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **changes}))


MODELS = {
    "llama tied": lambda: llama(tie_word_embeddings=True),
    "llama half": lambda: llama().bfloat16(),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64)),
    "bert": lambda: BertForMaskedLM(BertConfig(**SIZES)),
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=64)
    ),
    "bart": lambda: BartForConditionalGeneration(
        BartConfig(d_model=32, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=48, vocab_size=64)
    ),
    "vit": lambda: ViTForImageClassification(
        ViTConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=32)
    ),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=4)),
}


def assert_holds(teacher: TeacherCheckpoint, model: PreTrainedModel) -> None:
    """Every tensor of the model is there, bit for bit, under its own name or the one it is tied to."""
    expected = model.state_dict()
    assert set(teacher.weights.keys()) | teacher.tied.keys() == set(expected)
    assert not set(teacher.weights.keys()) & teacher.tied.keys()
    for name, tensor in expected.items():
        name = teacher.tied.get(name, name)
        assert teacher.weights.shape(name) == tensor.shape
        assert teacher.weights.dtype(name) == tensor.dtype
        assert torch.equal(teacher.weights.get(name), tensor)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_a_saved_model_is_read_bit_for_bit(name: str, shard: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "20KB")
    teacher = open_teacher(tmp_path)
    assert_holds(teacher, model)
    assert isinstance(teacher.weights, SafetensorsTensors)
    assert teacher.model_class is type(model) and teacher.base_model_prefix == model.base_model_prefix
    assert teacher.name == str(tmp_path) and teacher.revision is None
    assert teacher.dtype == model.dtype


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_saved_model_of_every_family_is_read_tensor_by_tensor_and_bit_for_bit(case: Case, tmp_path: Path) -> None:
    build(case, case.small).save_pretrained(tmp_path)
    model_class = getattr(transformers, case.model_class)
    teacher = open_teacher(tmp_path)
    assert isinstance(teacher.weights, SafetensorsTensors)
    assert_holds(teacher, model_class.from_pretrained(tmp_path, dtype="auto"))
    for name in teacher.weights.keys():
        if teacher.weights.shape(name):
            assert torch.equal(teacher.weights.rows(name, 0, 1), teacher.weights.get(name)[:1]), name


@pytest.mark.parametrize("name", MODELS)
def test_a_loaded_model_is_read_like_its_folder(name: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    model.save_pretrained(tmp_path)
    loaded, stored = open_teacher(model), open_teacher(tmp_path)
    assert_holds(loaded, model)
    assert set(loaded.weights.keys()) == set(stored.weights.keys()) and loaded.tied == stored.tied


def test_a_loaded_model_is_left_untouched_and_not_copied() -> None:
    model = llama(tie_word_embeddings=True).half().train()
    model.model.layers[0].mlp.requires_grad_(False)
    model.register_forward_hook(lambda *_: None)
    model.model.norm.weight.grad = torch.ones_like(model.model.norm.weight)
    bits = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    asked = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    config, hooks = model.config.to_dict(), dict(model._forward_hooks)

    teacher = open_teacher(model)
    for name in teacher.weights.keys():
        assert teacher.weights.get(name).data_ptr() == model.state_dict()[name].data_ptr()
        assert not teacher.weights.get(name).requires_grad
    teacher.config.hidden_size = 1

    assert model.training and all(module.training for module in model.modules())
    assert all(torch.equal(tensor, bits[name]) for name, tensor in model.state_dict().items())
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == asked
    assert model.config.to_dict() == config and dict(model._forward_hooks) == hooks
    assert torch.equal(model.model.norm.weight.grad, torch.ones(32, dtype=torch.half))
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_base_models_prefix_is_added_and_stripped(tmp_path: Path) -> None:
    model = BertForMaskedLM(BertConfig(**SIZES))
    model.save_pretrained(tmp_path)
    edit_config(tmp_path, architectures=["BertModel"])
    with pytest.raises(TeacherError, match=r"2 parameters are not in the checkpoint.*pooler\.dense\.bias"):
        open_teacher(tmp_path)
    body = LlamaModel(LlamaConfig(**SIZES))
    with_prefix, without = tmp_path / "with", tmp_path / "without"
    body.save_pretrained(without)
    body.save_pretrained(with_prefix)
    tensors = {f"model.{name}": tensor for name, tensor in load_file(with_prefix / "model.safetensors").items()}
    save_file({**tensors, "lm_head.weight": torch.ones(64, 32)}, with_prefix / "model.safetensors")
    for folder in (with_prefix, without):
        assert isinstance(open_teacher(folder).weights, SafetensorsTensors)
        assert_holds(open_teacher(folder), body)
    edit_config(without, architectures=["LlamaForCausalLM"], tie_word_embeddings=True)
    assert "model.norm.weight" in open_teacher(without).weights.keys()


def test_old_names_are_renamed_without_loading(tmp_path: Path) -> None:
    model = BertModel(BertConfig(**SIZES))
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in load_file(file).items()
    }
    assert any("gamma" in name for name in old)
    save_file(old, file, metadata={"format": "pt"})
    assert isinstance(open_teacher(tmp_path).weights, SafetensorsTensors)
    assert_holds(open_teacher(tmp_path), model)


def test_a_tied_tensor_is_found_under_either_name(tmp_path: Path) -> None:
    model = llama(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    table = tensors.pop("model.embed_tokens.weight")
    save_file({**tensors, "lm_head.weight": table}, file, metadata={"format": "pt"})
    teacher = open_teacher(tmp_path)
    assert teacher.tied == {"model.embed_tokens.weight": "lm_head.weight"}
    assert_holds(teacher, model)
    save_file({**tensors, "lm_head.weight": table, "model.embed_tokens.weight": table.clone()}, file, {"format": "pt"})
    assert open_teacher(tmp_path).tied == {"lm_head.weight": "model.embed_tokens.weight"}
    save_file({**tensors, "lm_head.weight": table, "model.embed_tokens.weight": table + 1}, file, {"format": "pt"})
    apart = open_teacher(tmp_path)
    assert apart.tied == {}
    assert torch.equal(apart.weights.get("model.embed_tokens.weight"), table + 1)


@pytest.mark.extended
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="resident memory is read from /proc")
def test_reading_never_holds_more_than_a_few_tensors(tmp_path: Path) -> None:
    model = llama(hidden_size=512, intermediate_size=1536, num_hidden_layers=20, num_attention_heads=8)
    model.save_pretrained(tmp_path, max_shard_size="100MB")
    size = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    largest = max(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    assert size > 80 * largest
    del model
    gc.collect()
    script = f"""
        import os
        from hf_guide.teachers.checkpoint import open_teacher

        def resident():
            pages = int(open("/proc/self/statm").read().split()[1])
            return pages * os.sysconf("SC_PAGE_SIZE")

        open_teacher({str(tmp_path)!r}).weights.get("model.norm.weight").sum()
        before = most = resident()
        teacher = open_teacher({str(tmp_path)!r})
        for name in teacher.weights.keys():
            tensor = teacher.weights.get(name)
            tensor.sum()  # touches every page
            most = max(most, resident())
        print(most - before)
    """
    grown = int(run(script).stdout)
    assert grown < 3 * largest + 8 * 2**20, f"{grown} bytes for a checkpoint of {size}, largest tensor {largest}"


def test_a_truncated_or_corrupted_shard_is_named_before_any_work(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path, max_shard_size="20KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    whole = shards[1].read_bytes()
    broken = {
        "truncated": whole[:-1],
        "header only": whole[:100],
        "empty": b"",
        "longer": whole + b"0",
        "not safetensors": b"x" * len(whole),
    }
    for content in broken.values():
        shards[1].write_bytes(content)
        with pytest.raises(TeacherError, match=f"{shards[1].name} is truncated or corrupted"):
            open_teacher(tmp_path)
    shards[1].write_bytes(whole)
    teacher = open_teacher(tmp_path)
    shards[1].write_bytes(whole[:-1])  # while in use
    with pytest.raises(TeacherError, match=f"{shards[1].name} is truncated"):
        for name in teacher.weights.keys():
            teacher.weights.get(name)
    shards[1].unlink()
    with pytest.raises(TeacherError, match=f"missing: .*{shards[1].name}"):
        open_teacher(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{")
    with pytest.raises(TeacherError, match=r"model\.safetensors\.index\.json is not a readable index"):
        open_teacher(tmp_path)


@pytest.mark.parametrize("change", ["same size", "longer", "replaced", "removed"])
def test_a_shard_that_changes_while_it_is_read_is_named(change: str, tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path, max_shard_size="20KB")
    teacher = open_teacher(tmp_path)
    teacher.weights.check_unchanged()
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    name = next(iter(load_file(shard)))
    content = shard.read_bytes()
    if change == "removed":
        shard.unlink()
    elif change == "replaced":
        (tmp_path / "new").write_bytes(content)
        os.utime(tmp_path / "new", ns=(shard.stat().st_atime_ns, shard.stat().st_mtime_ns))
        (tmp_path / "new").replace(shard)
    else:
        with shard.open("r+b") as file:
            file.write(content + (b"0" if change == "longer" else b""))
        os.utime(shard, ns=(0, shard.stat().st_mtime_ns + 1))
    found = "was removed while it was read" if change == "removed" else "has changed since it was opened"
    for read in (teacher.weights.check_unchanged, lambda: teacher.weights.get(name)):
        with pytest.raises(TeacherError, match=f"{shard.name} {found if change != 'longer' else ''}"):
            read()


@pytest.mark.parametrize(
    ("content", "found"), [("12", "from 1 to 2 bytes: a student"), ("2", "though it still has 1 bytes: a student")]
)
def test_an_error_states_how_a_file_has_changed(content: str, found: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_text("1")
    state = FileState.of(str(path))
    path.write_text(content)
    os.utime(path, ns=(0, state.modified + 1))
    with pytest.raises(TeacherError, match=f"has changed since it was opened, {found}"):
        state.check_unchanged()


def test_the_files_of_a_source_are_those_of_the_one_it_reads(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path, max_shard_size="20KB")
    weights = open_teacher(tmp_path).weights
    assert {state.file for state in weights.file_states()} == set(map(str, tmp_path.glob("*.safetensors")))
    for other in (OtherVocabularyTensors(weights, {}, 5), _OverriddenTensors(weights, {})):
        assert other.file_states() == weights.file_states()
    assert not InMemoryTensors({}).file_states()


def test_a_student_is_not_made_of_two_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llama().save_pretrained(tmp_path)
    fill = Transfer.fill_parameters

    def fill_and_touch(*args, **options):
        fill(*args, **options)
        os.utime(tmp_path / "model.safetensors")

    monkeypatch.setattr(Transfer, "fill_parameters", fill_and_touch)
    with pytest.raises(TeacherError, match="model.safetensors has changed since it was opened"):
        from_teacher(tmp_path, hidden_size=16, show_progress=False)


def test_rows_are_those_of_the_whole_tensor(tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path)
    for teacher in (open_teacher(model), open_teacher(tmp_path)):
        for name in teacher.weights.keys():
            teacher.weights.prefetch(name)
            assert torch.equal(teacher.weights.rows(name, 3, 17), teacher.weights.get(name)[3:17])


def test_a_torch_checkpoint_is_loaded_and_a_broken_one_named(tmp_path: Path) -> None:
    model = llama(tie_word_embeddings=True)
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(tmp_path)
    file = tmp_path / "pytorch_model.bin"
    torch.save(model.state_dict(), file)
    teacher = open_teacher(tmp_path)
    assert isinstance(teacher.weights, InMemoryTensors)
    assert_holds(teacher, model)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(TeacherError, match=str(tmp_path)):
        open_teacher(tmp_path)
    file.unlink()
    with pytest.raises(TeacherError, match="no file named"):
        open_teacher(tmp_path)


def test_a_checkpoint_that_is_not_its_configs_is_an_error(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    edit_config(tmp_path, intermediate_size=40)
    with pytest.raises(TeacherError, match=r"mlp.*shape \(48, 32\).*needs \(40, 32\)|mlp.*shape \(32, 48\)"):
        open_teacher(tmp_path)
    edit_config(tmp_path, intermediate_size=48, num_hidden_layers=3)
    with pytest.raises(TeacherError, match=r"9 parameters are not in the checkpoint.*model\.layers\.2\."):
        open_teacher(tmp_path)


def test_a_config_that_names_no_class_is_read_as_the_class_its_checkpoint_holds(tmp_path: Path) -> None:
    for model in (llama(), BertModel(BertConfig(**SIZES)), MODELS["t5"]()):
        for architectures in (None, ["OnlySomewhereElse"]):
            folder = tmp_path / f"{type(model).__name__}-{architectures}"
            model.save_pretrained(folder)
            edit_config(folder, architectures=architectures)
            teacher = open_teacher(folder)
            assert teacher.model_class is type(model)
            assert_holds(teacher, model)


def test_what_is_no_teacher_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match="nowhere"):
        open_teacher(tmp_path / "nowhere")
    with pytest.raises(TeacherError, match="config"):
        open_teacher(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "unheard_of"}')
    with pytest.raises(TeacherError, match="unheard_of"):
        open_teacher(tmp_path)
    with pytest.raises(OptionError, match="found int 3"):
        open_teacher(3)
    with pytest.raises(TeacherError, match="Linear"):
        open_teacher(torch.nn.Linear(2, 2))
    with torch.device("meta"):
        offloaded = llama()
    with pytest.raises(TeacherError, match="meta device.*folder"):
        open_teacher(offloaded)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's own call
def test_an_adapter_is_an_error_with_what_to_do(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(TeacherError, match="merge_and_unload"):
        open_teacher(adapted)
    adapted.save_pretrained(tmp_path)
    with pytest.raises(TeacherError, match="merge_and_unload"):
        open_teacher(tmp_path)
    inside = llama()
    inside.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(TeacherError, match="adapter"):
        open_teacher(inside)
    assert_holds(open_teacher(adapted.merge_and_unload()), llama())


REMOTE_CODE = """
    import pathlib
    from transformers import LlamaConfig, LlamaForCausalLM

    pathlib.Path({witness!r}).touch()

    class ElsewhereConfig(LlamaConfig):
        model_type = {model_type!r}

    class ElsewhereForCausalLM(LlamaForCausalLM):
        config_class = ElsewhereConfig
"""


@pytest.mark.parametrize("model_type", ["elsewhere", "llama"])
def test_remote_code_runs_only_with_permission(model_type: str, tmp_path: Path) -> None:
    folder, witness = tmp_path / "remote", tmp_path / "witness"
    model = llama()
    model.save_pretrained(folder)
    code = REMOTE_CODE.format(witness=str(witness), model_type=model_type)
    (folder / "code.py").write_text(textwrap.dedent(code))
    classes = {"AutoConfig": "code.ElsewhereConfig", "AutoModelForCausalLM": "code.ElsewhereForCausalLM"}
    edit_config(folder, model_type=model_type, auto_map=classes, architectures=["ElsewhereForCausalLM"])
    with pytest.raises(TeacherError, match="trust_remote_code=True"):
        open_teacher(folder)
    assert not witness.exists()
    teacher = open_teacher(folder, trust_remote_code=True)
    assert witness.exists()
    assert teacher.model_class.__name__ == "ElsewhereForCausalLM"
    assert isinstance(teacher.weights, SafetensorsTensors)
    assert_holds(teacher, model)


@pytest.mark.parametrize("with_gpu", [False, True])
def test_a_quantised_teacher_is_dequantised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_gpu: bool) -> None:
    # With a GPU Transformers would keep the eight bits.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: with_gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    model = llama(hidden_size=64)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    stored, expected = {}, {}
    for name, tensor in load_file(file).items():
        expected[name] = tensor
        stored[name] = tensor
        if "_proj" in name:
            scale = tensor.abs().amax() / 448
            eight = (tensor / scale).to(torch.float8_e4m3fn)
            stored[name], stored[f"{name}_scale_inv"] = eight, scale.reshape(1, 1)
            expected[name] = eight.float() * scale
    save_file(stored, file, metadata={"format": "pt"})
    edit_config(tmp_path, quantization_config={"quant_method": "fp8", "weight_block_size": [64, 64]})
    teacher = open_teacher(tmp_path)
    assert isinstance(teacher.weights, SafetensorsTensors)
    assert not hasattr(teacher.config, "quantization_config")
    for name, tensor in expected.items():
        assert torch.allclose(teacher.weights.get(name).float(), tensor, rtol=1e-2, atol=1e-6), name


def test_what_cannot_be_dequantised_is_an_error(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    edit_config(tmp_path, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(TeacherError, match=rf"{tmp_path} is quantised \(gptq\) and not loadable"):
        open_teacher(tmp_path)
    packed = llama()
    packed.model.norm.weight = torch.nn.Parameter(torch.ones(32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TeacherError, match="quantised.*folder"):
        open_teacher(packed)


def test_a_gguf_file_is_read_as_transformers_reads_it(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "small.gguf", "llama")
    for write, value in (
        (writer.add_block_count, 2),
        (writer.add_context_length, 32),
        (writer.add_embedding_length, 32),
        (writer.add_feed_forward_length, 48),
        (writer.add_head_count, 4),
        (writer.add_head_count_kv, 4),
        (writer.add_layer_norm_rms_eps, 1e-6),
        (writer.add_vocab_size, 64),
    ):
        write(value)
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name, tensor in llama().state_dict().items():
        stem, kind = name.rsplit(".", 1)
        writer.add_tensor(f"{table.get_name(stem)}.{kind}", tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    teacher = open_teacher(tmp_path, gguf_file="small.gguf")
    assert teacher.model_class is LlamaForCausalLM
    assert not hasattr(teacher.config, "quantization_config")
    assert_holds(teacher, AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="small.gguf"))
    with pytest.raises(TeacherError, match="absent.gguf|cannot be read"):
        open_teacher(tmp_path, gguf_file="absent.gguf")


def test_a_hub_id_is_found_in_the_cache_with_its_commit(tmp_path: Path) -> None:
    model, commit = llama(), "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--someone--small"
    model.save_pretrained(repository / "snapshots" / commit, max_shard_size="20KB")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    for revision in (None, "main", commit):
        teacher = open_teacher("someone/small", cache_dir=tmp_path, local_files_only=True, revision=revision)
        assert teacher.name == "someone/small" and teacher.revision == commit
        assert_holds(teacher, model)
    with pytest.raises(TeacherError, match="someone/other"):
        open_teacher("someone/other", cache_dir=tmp_path, local_files_only=True)


def test_a_subfolder_is_read(tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path / "inner")
    assert_holds(open_teacher(tmp_path, subfolder="inner"), model)


def test_the_tokenizer_gives_the_number_of_real_rows(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import PreTrainedTokenizerFast

    llama().save_pretrained(tmp_path)
    teacher = open_teacher(tmp_path)
    assert tokenizer_length(teacher) is None
    words = tokenizers.models.WordLevel({f"w{i}": i for i in range(50)}, unk_token="w0")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(words))
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer_length(teacher) == 51 < teacher.config.vocab_size
    assert tokenizer_length(open_teacher(llama())) is None


def edit_config(folder: Path, **changes) -> None:
    file = folder / "config.json"
    values = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))


def run(script: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], env=environment, check=True, capture_output=True, text=True
    )
