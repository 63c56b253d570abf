"""Teachers that are not whole in one place, or not in one piece: offloaded to disk by a `device_map`, and quantised."""

import accelerate
import pytest
import torch
from transformers import LlamaForCausalLM

from hf_guide import DistillationArguments, DistillationTrainer, capture_teacher, from_teacher
from tests.distillation.small import VOCABULARY, collate, examples_for, llama
from tests.tiny import same_bits

ON_DISK = {
    "model.embed_tokens": "cpu",
    "model.rotary_emb": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.layers.2": "disk",
    "model.norm": "cpu",
}
EVERYTHING = {"ce": 0.4, "kd": 0.4, "hidden_states": 0.1, "features": 0.1}


@pytest.fixture
def folder(tmp_path):
    llama(1, width=64, blocks=3).save_pretrained(tmp_path / "teacher")
    return str(tmp_path / "teacher")


def quantised(include_head: bool):
    torchao = pytest.importorskip("torchao.quantization", reason="pip install --constraint constraints.txt torchao")
    from transformers import TorchAoConfig

    return TorchAoConfig(torchao.Int8WeightOnlyConfig(), include_input_output_embeddings=include_head)


def train(tmp_path, teacher, losses=EVERYTHING, **teacher_init_kwargs):
    """Train a small student for three steps; return every loss and gradient norm that was logged, (3, losses)."""
    trainer = DistillationTrainer(
        llama(2),
        DistillationArguments(
            str(tmp_path / "out"),
            losses=losses,
            teacher_init_kwargs=teacher_init_kwargs or None,
            max_steps=3,
            per_device_train_batch_size=4,
            logging_steps=1,
            learning_rate=1e-2,
            report_to="none",
            disable_tqdm=True,
            save_strategy="no",
            seed=0,
        ),
        data_collator=collate,
        train_dataset=examples_for("causal-lm"),
        teacher=teacher,
    )
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "kd" in entry]
    assert len(logged) == 3
    return torch.tensor([[entry[name] for name in (*losses, "grad_norm")] for entry in logged])


@pytest.mark.parametrize("head", ["disk", "cpu"])  # with a GPU the student and the targets are elsewhere
def test_a_teacher_that_is_offloaded_to_disk_teaches_as_one_in_memory(tmp_path, folder, head):
    whole = train(tmp_path, folder)
    place = ON_DISK | {"lm_head": head}
    spread = train(tmp_path, folder, device_map=place, offload_folder=str(tmp_path / "offload"))
    assert (tmp_path / "offload").is_dir(), "some of it was indeed on the disk"
    tolerance = 1e-3 if torch.cuda.is_available() else 0
    torch.testing.assert_close(spread, whole, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("include_head", [False, True])
def test_a_quantised_teacher_teaches_nearly_the_same(tmp_path, folder, include_head):
    whole = train(tmp_path, folder)
    packed = train(tmp_path, folder, quantization_config=quantised(include_head))
    assert not torch.equal(packed, whole), "it was indeed quantised"
    torch.testing.assert_close(packed, whole, rtol=0.03, atol=1e-4)


def test_the_outputs_of_a_quantised_teacher_can_be_captured(tmp_path, folder):
    teacher = LlamaForCausalLM.from_pretrained(folder, quantization_config=quantised(True))
    capture = capture_teacher(
        teacher,
        examples_for("causal-lm"),
        tmp_path / "capture",
        data_collator=collate,
        config={"top_k": VOCABULARY},
        show_progress=False,
    )
    objective = {"ce": 0.5, "kd": 0.5}
    live = train(tmp_path, folder, objective, quantization_config=quantised(True))
    torch.testing.assert_close(train(tmp_path, capture, objective), live, rtol=5e-3, atol=0)  # kept in float16


def test_a_student_is_made_from_a_checkpoint_that_is_quantised(tmp_path, folder):
    packed = LlamaForCausalLM.from_pretrained(folder, quantization_config=quantised(False))
    packed.save_pretrained(tmp_path / "packed")
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "show_progress": False}
    made, stock = from_teacher(str(tmp_path / "packed"), **shape), from_teacher(folder, **shape)
    assert made.config.to_dict().get("quantization_config") is None
    for name, tensor in stock.state_dict().items():
        found = made.state_dict()[name]
        assert type(found) is torch.Tensor and found.dtype == tensor.dtype
        assert (found - tensor).norm() <= 0.02 * tensor.norm(), name


def spread(way, folder, tmp_path):
    """Return the teacher of a folder, loaded and offloaded as accelerate does it."""
    if way == "device_map":
        place = ON_DISK | {"lm_head": "disk"}
        return LlamaForCausalLM.from_pretrained(folder, device_map=place, offload_folder=str(tmp_path / "offload"))
    model = LlamaForCausalLM.from_pretrained(folder)
    if way == "cpu_offload":
        return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    return accelerate.disk_offload(model, str(tmp_path / "offload"), execution_device=torch.device("cpu"))


WAYS = ["device_map", "cpu_offload", "disk_offload"]


@pytest.mark.parametrize("way", WAYS[1:])
def test_a_loaded_teacher_that_is_offloaded_teaches_as_one_in_memory(tmp_path, folder, way):
    teacher = spread(way, folder, tmp_path)
    assert all(weight.is_meta for weight in teacher.parameters())
    losses = {"ce": 0.5, "kd": 0.5}
    tolerance = 1e-3 if torch.cuda.is_available() else 0
    torch.testing.assert_close(
        train(tmp_path, teacher, losses), train(tmp_path, folder, losses), rtol=tolerance, atol=tolerance
    )


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("way", "method"),
    [
        pytest.param(way, method, marks=pytest.mark.slow if method == "calibrated" and way != "device_map" else ())
        for way in WAYS
        for method in ["random", "uniform", "guide", "calibrated"]
    ],
)
def test_a_student_is_made_from_a_model_that_is_offloaded(tmp_path, folder, way, method):
    teacher = spread(way, folder, tmp_path)
    assert any(weight.is_meta for weight in teacher.parameters())
    rows = torch.randint(3, VOCABULARY, (8, 4, 12), generator=torch.Generator().manual_seed(0))
    data = {"calibration_dataset": [{"input_ids": each} for each in rows]} if method == "calibrated" else {}
    made, *expected = (
        from_teacher(each, method=method, hidden_size=32, num_hidden_layers=2, show_progress=False, **data)
        for each in (teacher, folder, LlamaForCausalLM.from_pretrained(folder))
    )
    assert all(same_bits(made, student) for student in expected)
    assert any(weight.is_meta for weight in teacher.parameters()), "the teacher is as it was"
