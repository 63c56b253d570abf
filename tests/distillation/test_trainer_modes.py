"""The trainer with what Accelerate, torch and PEFT can do to a student on one process."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainingArguments

from hf_guide import DistillationTrainer, OptionError, capture_teacher
from tests.distillation.small import collate, examples_for, llama, model_for
from tests.distillation.test_trainer import arguments, gradient

ROOT = Path(__file__).resolve().parents[2]


def trained(folder: Path, student: Any = None, teacher: Any = None, **changes: Any) -> DistillationTrainer:
    plain: dict[str, Any] = {"losses": {"ce": 0.5, "kd": 0.5}, "max_steps": 3, "learning_rate": 0.1}
    peft_config = changes.pop("peft_config", None)
    trainer = DistillationTrainer(
        student or llama(1),
        arguments(folder, **(plain | changes)),
        collate,
        examples_for("causal-lm"),
        examples_for("causal-lm", 6, seed=9),
        teacher=teacher or llama(2, width=48),
        peft_config=peft_config,
    )
    trainer.train()
    return trainer


def test_bfloat16_is_near_float32(tmp_path: Path) -> None:
    exact = gradient("causal-lm", tmp_path, {"ce": 0.5, "kd": 0.5})
    rounded = gradient("causal-lm", tmp_path, {"ce": 0.5, "kd": 0.5}, bf16=True)
    assert 0 < (exact - rounded).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("task", ["causal-lm", "sequence-classification"])
def test_float16_autocast_with_a_scaled_loss_is_near_float32(task: str, tmp_path: Path) -> None:
    """Accelerate refuses float16 on the CPU, so what it does on a GPU is done by hand around the trainer's own loss."""
    student = model_for(task, 1)
    trainer = DistillationTrainer(
        student,
        arguments(tmp_path, losses={"ce": 0.5, "kd": 0.5}, temperature=2.0),
        collate,
        examples_for(task),
        teacher=model_for(task, 2, width=48),
    )
    batch = collate(examples_for(task))
    found = []
    for half in (False, True):
        student.zero_grad()
        scale = 2.0**12 if half else 1.0
        with torch.autocast("cpu", torch.float16, enabled=half):
            loss = trainer.compute_loss(student.train(), dict(batch))
        (scale * loss).backward()
        grads = [each.grad.flatten() / scale for each in student.parameters() if each.grad is not None]
        found.append(torch.cat(grads))
    exact, rounded = found
    assert 0 < (exact - rounded).norm() < 0.01 * exact.norm()


def test_a_half_precision_teacher_teaches_a_float32_student(tmp_path: Path) -> None:
    trainer = trained(tmp_path, teacher=llama(2, width=48).bfloat16())
    assert trainer.teachers[0].bare.dtype == torch.bfloat16
    assert next(trainer.model.parameters()).dtype == torch.float32
    assert trainer.state.log_history[-2]["loss"] < trainer.state.log_history[0]["loss"]


def test_gradient_checkpointing_leaves_gradients_as_they_are(tmp_path: Path) -> None:
    plain = gradient("causal-lm", tmp_path, {"ce": 0.5, "kd": 0.5})
    # As Transformers names it today, and as it did in the oldest that is supported.
    kind = "activation" if hasattr(TrainingArguments, "activation_checkpointing") else "gradient"
    saved = gradient("causal-lm", tmp_path, {"ce": 0.5, "kd": 0.5}, **{f"{kind}_checkpointing": True})
    assert (plain - saved).norm() < 1e-5 * plain.norm()


def test_a_run_that_reports_overflow_has_the_same_gradient(tmp_path: Path) -> None:
    plain = gradient("causal-lm", tmp_path, {"ce": 0.5, "kd": 0.5})
    debugged = gradient("causal-lm", tmp_path, {"ce": 0.5, "kd": 0.5}, debug="underflow_overflow")
    assert (plain - debugged).norm() < 1e-5 * plain.norm()


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")  # torch's own, while it compiles
@pytest.mark.slow
def test_a_compiled_student_has_the_same_gradient(tmp_path: Path) -> None:
    plain = gradient("causal-lm", tmp_path, {"ce": 0.5, "kd": 0.5})
    compiled = gradient("causal-lm", tmp_path, {"ce": 0.5, "kd": 0.5}, torch_compile=True)
    assert (plain - compiled).norm() < 1e-4 * plain.norm()


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")
@pytest.mark.slow
def test_a_teacher_that_compiled_itself_teaches_the_same(tmp_path: Path) -> None:
    teacher, losses = llama(2), []
    for _ in range(2):
        trainer = DistillationTrainer(
            llama(1),
            arguments(tmp_path, losses="kd"),
            collate,
            eval_dataset=examples_for("causal-lm"),
            teacher=teacher,
        )
        losses.append(trainer.evaluate()["eval_kd"])
        teacher.compile()
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's own call
@pytest.mark.parametrize("wrapped", ["by the trainer", "already"])
def test_an_adapter_alone_is_trained_saved_and_merged(wrapped: str, tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights="gaussian")
    student = llama(1)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    if wrapped == "already":
        trainer = trained(tmp_path, student=get_peft_model(student, config))
    else:
        trainer = trained(tmp_path, student=student, peft_config=config)
    assert trainer.distillation_objective.head is not None
    trainer.save_model(str(tmp_path / "adapter"))
    assert {path.name for path in (tmp_path / "adapter").glob("*.safetensors")} == {"adapter_model.safetensors"}
    trainer.save_merged_model(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    changed = {name for name, value in merged.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all("q_proj" in name or "v_proj" in name for name in changed)
    adapted = PeftModel.from_pretrained(llama(1), tmp_path / "adapter")
    batch = collate(examples_for("causal-lm", 4))
    with torch.no_grad():
        for other in (merged, adapted):
            torch.testing.assert_close(
                other.eval()(**batch).logits, trainer.model.eval()(**batch).logits, atol=1e-5, rtol=1e-4
            )


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "task", ["causal-lm", "masked-lm", "seq2seq-lm", "sequence-classification", "token-classification"]
)
def test_a_captured_run_equals_a_live_one(task: str, tmp_path: Path) -> None:
    objective: dict[str, float] = {"ce": 0.3, "kd": 0.7, "hidden_states": 0.1, "features": 0.1}
    teacher, examples = model_for(task, 2, width=48, blocks=2), examples_for(task)
    config = {
        "top_k": 61,
        "log_prob_dtype": "float32",
        "hidden_dtype": "float32",
        "hidden_layers": [1, 2],
        "save_penultimate": True,
    }
    capture = capture_teacher(
        teacher, examples, tmp_path / "capture", data_collator=collate, config=config, show_progress=False
    )
    curves = []
    for source in (teacher, capture):
        args = arguments(tmp_path, losses=objective, max_steps=6, learning_rate=0.01, temperature=2.0)
        trainer = DistillationTrainer(model_for(task, 1), args, collate, examples, teacher=source)
        trainer.train()
        curves.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(curves[0]) == 6 and curves[0][-1] != curves[0][0]
    assert curves[1] == pytest.approx(curves[0], rel=1e-5)


def test_evaluation_without_captured_examples_still_reports_the_task(tmp_path: Path) -> None:
    capture = capture_teacher(
        llama(2),
        examples_for("causal-lm"),
        tmp_path / "c",
        data_collator=collate,
        show_progress=False,
        config={"top_k": 8},
    )
    trainer = trained(tmp_path, teacher=capture)
    metrics = trainer.evaluate()
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(metrics["eval_ce"]))
    assert metrics["eval_loss"] == pytest.approx(metrics["eval_ce"])
    assert "eval_kd" not in metrics and "eval_teacher_agreement" not in metrics
    assert "eval_kd" in trainer.evaluate(examples_for("causal-lm", 4))


KILLED = """
import json, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from tests.distillation.test_trainer import arguments
from tests.distillation.small import collate, examples_for, llama
from hf_guide import DistillationTrainer
folder = Path(sys.argv[1])
changes = {{"losses": {{"ce": 0.5, "kd": 0.5}}, "max_steps": 40, "learning_rate": 0.01, "optim": "adamw_torch"}}
args = arguments(folder, save_strategy="steps", save_steps=4, **changes)
data, teacher = examples_for("causal-lm", 40), llama(2, width=48)
trainer = DistillationTrainer(llama(1, attention_dropout=0.1), args, collate, data, teacher=teacher)
trainer.train(resume_from_checkpoint=len(sys.argv) > 2)
(folder / "curve.json").write_text(json.dumps([entry["loss"] for entry in trainer.state.log_history if "loss" in entry]))
"""


@pytest.mark.slow  # test_resuming.py holds the same at a random moment
def test_killed_in_mid_run_and_resumed_the_curve_is_the_same(tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(KILLED.format(root=str(ROOT)))
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, script, whole], check=True, env=environment, capture_output=True)
    process = subprocess.Popen(
        [sys.executable, script, broken], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    for _ in range(2400):
        if (broken / "checkpoint-8" / "trainer_state.json").exists() or process.poll() is not None:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (broken / "curve.json").exists(), "it came to its end before it was killed"
    done = subprocess.run(
        [sys.executable, script, broken, "resume"], check=False, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    curves = [json.loads((folder / "curve.json").read_text()) for folder in (whole, broken)]
    assert len(curves[0]) == 40 and curves[1] == curves[0]


def test_hyperparameter_search_makes_a_new_student_for_each_trial(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    trainer = DistillationTrainer(
        model_init=lambda: llama(1),
        args=arguments(tmp_path, losses="kd", max_steps=2),
        data_collator=collate,
        train_dataset=examples_for("causal-lm"),
        eval_dataset=examples_for("causal-lm", 4),
        teacher=llama(2),
    )
    best = trainer.hyperparameter_search(
        n_trials=2, backend="optuna", compute_objective=lambda metrics: metrics["eval_kd"]
    )
    assert best.objective > 0


def test_nothing_of_the_student_is_changed_by_training_but_its_weights(tmp_path: Path) -> None:
    student = llama(1)
    attributes = set(vars(student)) | set(vars(student.lm_head))
    trained(tmp_path, student=student)
    assert "forward" not in vars(student) and "forward" not in vars(student.lm_head)
    assert set(vars(student)) | set(vars(student.lm_head)) <= attributes | {
        "is_loaded_in_8bit",
        "_is_accelerate_prepared",
    }


def test_an_adapter_is_needed_to_merge_one(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="no adapter"):
        trained(tmp_path).save_merged_model(tmp_path / "merged")
