"""Self-generated calibration text is sampled from the teacher's distribution, reproducibly; the teacher is unchanged."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from hf_guide import InitializationReport, OptionError, from_teacher
from hf_guide.calibration import collection
from hf_guide.calibration.self_generation import generate_calibration_text
from hf_guide.cli.main import main
from hf_guide.errors import TeacherError
from hf_guide.methods import InitializationConfig
from hf_guide.teachers.checkpoint import open_teacher
from tests.tiny import KINDS, same_bits

SMALLER = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "head_dim": 12}


@pytest.fixture
def teacher() -> Any:
    return KINDS["llama"].teacher()


def student_of(teacher: Any, dataset: Any = "self_generated", folder: Path | None = None, **method: Any) -> Any:
    method = {"method": "calibrated", "calibration_tokens": 512, "calibration_seq_length": 32, **method}
    return from_teacher(
        teacher,
        method=method,
        calibration_dataset=dataset,
        calibration_cache_dir=folder,
        show_progress=False,
        **SMALLER,
    )


def generate(teacher: Any, **options: Any) -> torch.Tensor:
    chosen = InitializationConfig(method="calibrated", **{"calibration_seq_length": 32, **options})
    return generate_calibration_text(teacher, open_teacher(teacher), chosen, num_tokens=500)


@pytest.mark.parametrize("name", ["llama", "llama tied", "gpt2", "gemma3", "mixtral"])
def test_causal_models_generate(name: str) -> None:
    ids = generate(KINDS[name].teacher())
    assert ids.shape == (16, 32) and ids.dtype == torch.long and ids.unique(dim=0).shape[0] == 16


def test_tokens_are_sampled_from_the_teachers_distribution(teacher: Any) -> None:
    """Of tokens drawn from a model, the mean loss is its mean entropy, and they take no notice of its generation config."""
    with torch.no_grad():
        for parameter in teacher.lm_head.parameters():
            parameter.mul_(20.0)  # predicts something
    teacher.generation_config = GenerationConfig(do_sample=True, temperature=0.1, max_new_tokens=3, eos_token_id=5)
    ids = generate(teacher)
    assert ids.shape == (16, 32)
    with torch.no_grad():
        logs = teacher(input_ids=ids).logits[:, :-1].log_softmax(-1)
    loss = -logs.gather(-1, ids[:, 1:, None]).squeeze(-1)
    entropy = -(logs.exp() * logs).sum(-1)
    assert entropy.mean() < 0.8 * math.log(logs.shape[-1])
    assert (loss - entropy).mean().abs() < 4 * (loss - entropy).std() / math.sqrt(loss.numel())


def test_the_same_text_is_generated_again_and_nothing_else_changes(teacher: Any) -> None:
    before, config, state = copy.deepcopy(teacher), teacher.generation_config, torch.get_rng_state()
    teacher.train()
    first = generate(teacher)
    assert torch.equal(first, generate(teacher)) and not torch.equal(first, generate(teacher, seed=1))
    assert torch.equal(torch.get_rng_state(), state)
    assert teacher.training and teacher.generation_config is config and same_bits(teacher, before)


def test_a_student_is_that_of_the_text_that_was_generate(teacher: Any) -> None:
    student = student_of(teacher)
    ids = generate(teacher, calibration_tokens=512)
    assert same_bits(student, student_of(teacher, [{"input_ids": rows} for rows in ids.split(8)]))
    assert student.initialization_report.calibration["self_generated"] is True
    assert "512 tokens that the teacher generated" in student.initialization_report.summary()


def test_generated_text_is_saved_and_loaded(teacher: Any, tmp_path: Path, monkeypatch: Any) -> None:
    first = student_of(teacher, folder=tmp_path)
    assert (tmp_path / "generated_text.safetensors").exists()
    monkeypatch.setattr(collection, "generate_calibration_text", lambda *_, **__: pytest.fail("generated again"))
    assert same_bits(first, student_of(teacher, folder=tmp_path))
    with pytest.raises(OptionError, match="other settings"):
        student_of(teacher, folder=tmp_path, calibration_tokens=256)


@pytest.mark.parametrize("name", ["bert", "t5", "vit"])
def test_models_that_generate_no_text_are_an_error(name: str) -> None:
    with pytest.raises(OptionError, match="must be a causal language model"):
        from_teacher(
            KINDS[name].teacher(), method="calibrated", calibration_dataset="self_generated", show_progress=False
        )


@pytest.mark.parametrize(
    ("dtype", "advice"),
    [
        (torch.float32, "Check its weights for NaN"),
        (torch.bfloat16, "Check its weights for NaN"),
        (torch.float16, "Load the teacher with dtype='bfloat16' or 'float32'"),
    ],
)
def test_a_teacher_that_predicts_nan_is_an_error(dtype: torch.dtype, advice: str, teacher: Any) -> None:
    teacher.to(dtype)
    with torch.no_grad():
        teacher.lm_head.weight[5] = torch.nan
    with pytest.raises(TeacherError, match=f"in {dtype}, predicts NaN for text that it generates itself. {advice}"):
        generate(teacher)


def test_other_strings_are_an_error(teacher: Any) -> None:
    with pytest.raises(
        OptionError, match="'self_generated', for text that the teacher generates itself; found 'wikitext'"
    ):
        student_of(teacher, "wikitext")
    with pytest.raises(
        OptionError, match="or 'self_generated', for text that the teacher generates itself; or choose"
    ):
        student_of(teacher, None)


def test_the_command_line_lets_the_teacher_generate(teacher: Any, tmp_path: Path) -> None:
    teacher.save_pretrained(tmp_path / "teacher")
    sizes = [word for name, size in SMALLER.items() for word in (f"--{name.replace('_', '-')}", str(size))]
    options = ["--method", "calibrated", "--option", "calibration_tokens=256", "--option", "calibration_seq_length=32"]
    command = ["init", str(tmp_path / "teacher"), "-o", str(tmp_path / "out"), *sizes, *options]
    assert main([*command, "--calibration-dataset", "self_generated"]) == 0
    assert InitializationReport.load(tmp_path / "out").calibration["self_generated"] is True
