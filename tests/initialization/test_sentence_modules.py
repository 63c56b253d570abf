"""A student of a sentence-transformers folder is such a folder, with the teacher's pooling, dense layers and prompts."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModel, AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from hf_guide import AutoStudentForMaskedLM, from_teacher
from hf_guide.cli.main import main
from hf_guide.errors import ShapeError, TeacherError
from hf_guide.models.sentence_files import embed, modules_of_model
from hf_guide.models.sentence_modules import attached_sentence_modules
from tests.sentence_folder import (
    NEW,
    TEXTS,
    batch,
    bert,
    dense,
    pooling,
    sentence_folder,
    teacher_folder,
    tokenizer,
    write_json,
)
from tests.tiny import run_python

CHAIN = (pooling("cls", "mean"), dense(64, 24), ("Normalize", None))
SETTINGS = {
    "prompts": {"query": "w1 w2"},
    "default_prompt_name": "query",
    "similarity_fn_name": "dot",
    "truncate_dim": 20,
}


def embedded(model: PreTrainedModel) -> torch.Tensor:
    """Return a model's embeddings of the texts."""
    with torch.no_grad():
        return embed(model, model(**batch(TEXTS)).last_hidden_state, batch(TEXTS))


def saved(student: PreTrainedModel, folder: Path) -> Path:
    """Save a student with its tokenizer."""
    student.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return teacher_folder(tmp_path_factory.mktemp("teacher"), *CHAIN, **SETTINGS)


@pytest.mark.parametrize("loaded", [False, True], ids=["folder", "model"])
def test_a_student_of_the_teachers_shape_embeds_as_the_teacher(teacher: Path, loaded: bool, tmp_path: Path) -> None:
    model = AutoModel.from_pretrained(teacher)
    student = from_teacher(model if loaded else teacher, show_progress=False)
    folder = saved(student, tmp_path / "student")
    for name in (
        "modules.json",
        "sentence_bert_config.json",
        "config_sentence_transformers.json",
        "1_Pooling/config.json",
    ):
        assert json.loads((folder / name).read_text()) == json.loads((teacher / name).read_text())
    torch.testing.assert_close(embedded(AutoModel.from_pretrained(folder)), embedded(model), atol=1e-6, rtol=0)


def test_sentence_transformers_loads_the_student_with_the_same_embeddings(teacher: Path, tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers")
    same = saved(from_teacher(teacher, show_progress=False), tmp_path / "same")
    narrow = from_teacher(teacher, hidden_size=16, num_hidden_layers=2, show_progress=False)
    expected = torch.nn.functional.normalize(embedded(narrow), dim=-1)
    torch.save({"teacher": embedded(AutoModel.from_pretrained(teacher)), "narrow": expected}, tmp_path / "expected.pt")
    saved(narrow, tmp_path / "narrow")
    run_python(
        """
        import sys, torch
        from sentence_transformers import SentenceTransformer
        texts, expected = sys.argv[4:], torch.load(sys.argv[3])
        for folder, name in ((sys.argv[1], "teacher"), (sys.argv[2], "narrow")):
            model = SentenceTransformer(folder, device="cpu")
            assert model.prompts["query"] == "w1 w2" and model.default_prompt_name == "query"
            assert model.similarity_fn_name == "dot" and model.truncate_dim == 20 and model.max_seq_length == 30
            found = torch.from_numpy(model.encode(texts, prompt="", truncate_dim=24))
            torch.testing.assert_close(found, expected[name], atol=1e-6, rtol=0)
        """,
        same,
        tmp_path / "narrow",
        tmp_path / "expected.pt",
        *TEXTS,
    )


@pytest.mark.parametrize("method", ["guide", "uniform", "random"])
def test_a_dense_layer_keeps_the_width_of_the_embedding(teacher: Path, method: str) -> None:
    student = from_teacher(teacher, method=method, hidden_size=16, show_progress=False)
    modules = modules_of_model(student)
    assert modules.hidden_size == 16 and modules.width == 24 and embedded(student).shape == (4, 24)
    report, weight = student.initialization_report, "2_Dense.linear.weight"
    assert not report.bases
    assert any(
        weight in text for text in (report.randomly_initialized if method == "random" else report.approximations)
    )
    bias = modules.trainable["2_Dense"].state_dict()["linear.bias"]
    of_teacher = modules_of_model(AutoModel.from_pretrained(teacher)).trainable["2_Dense"].state_dict()["linear.bias"]
    assert torch.equal(bias, of_teacher)


def test_the_dense_layer_is_narrowed_by_the_basis_of_the_residual_stream(teacher: Path) -> None:
    """With indices as basis ("uniform"), the columns are those that the word embeddings kept."""
    student = from_teacher(teacher, method="uniform", hidden_size=16, show_progress=False)
    model = AutoModel.from_pretrained(teacher)
    table, of_student = model.get_input_embeddings().weight, student.get_input_embeddings().weight
    kept = [int((table == column[:, None]).all(0).nonzero()) for column in of_student.T]
    narrow, weight = (
        modules_of_model(each).trainable["2_Dense"].state_dict()["linear.weight"] for each in (student, model)
    )
    assert torch.equal(narrow, weight.unflatten(1, (2, 32))[..., kept].flatten(1))


def test_without_a_dense_layer_the_report_names_the_narrower_embedding(tmp_path: Path) -> None:
    student = from_teacher(teacher_folder(tmp_path, pooling()), hidden_size=16, show_progress=False)
    assert any("embedding is narrower, 32 -> 16" in note for note in student.initialization_report.notes)
    assert embedded(student).shape == (4, 16)


def test_fewer_positions_limit_the_length_of_texts(teacher: Path) -> None:
    student = from_teacher(teacher, max_position_embeddings=20, show_progress=False)
    modules = attached_sentence_modules(student)
    assert modules is not None and modules.files.transformer_config == {"max_seq_length": 20, "do_lower_case": False}


def test_a_student_with_a_head_has_no_embedding_modules(teacher: Path, tmp_path: Path) -> None:
    student = AutoStudentForMaskedLM.from_teacher(teacher, show_progress=False)
    assert attached_sentence_modules(student) is None
    student.save_pretrained(tmp_path)
    assert not (tmp_path / "modules.json").exists()


def test_a_module_that_cannot_be_carried_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    folder = teacher_folder(tmp_path, ("my_code.MyPooling", {}))
    (folder / "my_code.py").write_text("raise SystemExit('it was run')")
    with pytest.raises(TeacherError, match=r"'my_code.MyPooling', whose Python code .* is not run"):
        from_teacher(folder, trust_remote_code=True, show_progress=False)
    normed = sentence_folder(folder, pooling(), ("LayerNorm", {"dimension": 32}))
    with pytest.raises(ShapeError, match="2_LayerNorm"):
        from_teacher(normed, hidden_size=16, show_progress=False)
    wider = sentence_folder(folder, pooling(width=48))
    with pytest.raises(TeacherError, match="hidden states of width 48, and its transformer's have 32"):
        from_teacher(wider, show_progress=False)


# Cross-encoders


def cross_encoder(folder: Path) -> Path:
    """Write a cross-encoder's folder, with an activation of its own."""
    bert(labels=1).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    sentence_folder(folder, model_type="CrossEncoder", activation_fn="torch.nn.modules.linear.Identity")
    write_json(folder / "modules.json", [{"idx": 0, "name": "0", "path": "", "type": f"{NEW}.Transformer"}])
    modality = {"text": {"method": "forward", "method_output_name": "logits"}}
    config = {
        "transformer_task": "sequence-classification",
        "modality_config": modality,
        "module_output_name": "scores",
    }
    write_json(folder / "sentence_bert_config.json", config)
    return folder


def test_a_cross_encoder_is_one_again(tmp_path: Path) -> None:
    teacher = cross_encoder(tmp_path / "teacher")
    student = from_teacher(teacher, show_progress=False)
    folder = saved(student, tmp_path / "student")
    for name in ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"):
        assert json.loads((folder / name).read_text()) == json.loads((teacher / name).read_text())
    pairs = batch([("w1 w2", "w3"), ("w4", "w5 w6")])
    with torch.no_grad():
        scores, expected = (
            AutoModelForSequenceClassification.from_pretrained(each)(**pairs).logits for each in (folder, teacher)
        )
    torch.testing.assert_close(scores, expected, atol=1e-6, rtol=0)
    sentence_transformers = pytest.importorskip("sentence_transformers")
    encoder = sentence_transformers.CrossEncoder(str(folder), device="cpu")
    assert isinstance(encoder.activation_fn, torch.nn.Identity)
    found = torch.from_numpy(encoder.predict([("w1 w2", "w3"), ("w4", "w5 w6")]))
    torch.testing.assert_close(found, expected[:, 0], atol=1e-6, rtol=0)


def test_the_activation_in_the_config_of_an_earlier_cross_encoder_is_kept(tmp_path: Path) -> None:
    model = bert(labels=1)
    model.config.sentence_transformers = {"activation_fn": "torch.nn.modules.linear.Identity", "version": "5.0.0"}
    model.config.sbert_ce_default_activation_function = "torch.nn.modules.linear.Identity"
    model.save_pretrained(tmp_path / "teacher")
    saved(from_teacher(tmp_path / "teacher", hidden_size=16, show_progress=False), tmp_path / "student")
    config = json.loads((tmp_path / "student" / "config.json").read_text())
    assert config["sentence_transformers"]["activation_fn"] == "torch.nn.modules.linear.Identity"
    assert config["sbert_ce_default_activation_function"] == "torch.nn.modules.linear.Identity"


def test_a_score_of_the_logits_of_tokens_is_carried(tmp_path: Path) -> None:
    sizes = {"vocab_size": 96, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2)).save_pretrained(tmp_path / "teacher")
    score = ("LogitScore", {"true_token_id": 90, "false_token_id": 20})
    sentence_folder(tmp_path / "teacher", score, model_type="CrossEncoder")
    student = from_teacher(tmp_path / "teacher", hidden_size=8, show_progress=False)
    student.save_pretrained(tmp_path / "student")
    assert json.loads((tmp_path / "student" / "1_LogitScore" / "config.json").read_text()) == score[1]


# The command line and the card


def test_the_command_line_makes_a_folder_that_sentence_transformers_loads(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "student"
    assert main(["init", str(teacher), "--hidden-size", "16", "--no-progress", "-o", str(output)]) == 0
    assert f"sentence_transformers.SentenceTransformer('{output}')" in capsys.readouterr().out
    assert {"modules.json", "1_Pooling", "2_Dense", "tokenizer.json"} <= {path.name for path in output.iterdir()}
    card = ModelCard.load(output / "README.md")
    metadata = card.data.to_dict()
    assert metadata["library_name"] == "sentence-transformers" and metadata["pipeline_tag"] == "sentence-similarity"
    assert {"sentence-transformers", "feature-extraction", "hf_guide"} <= set(card.data.tags or [])
    snippet = card.text.split("```python\n")[1].split("```")[0]
    assert snippet == (
        "from sentence_transformers import SentenceTransformer\n\n"
        'model = SentenceTransformer("student")\nembeddings = model.encode(["a text", "another text"])\n'
    )
    pytest.importorskip("sentence_transformers")
    run_python("import os, sys; os.chdir(sys.argv[1])\n" + snippet + "\nassert embeddings.shape == (2, 20)", tmp_path)


def test_the_card_of_a_cross_encoder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher: Any = cross_encoder(tmp_path / "teacher")
    assert main(["init", str(teacher), "--no-progress", "-o", str(tmp_path / "student")]) == 0
    card = ModelCard.load(tmp_path / "student" / "README.md")
    assert card.data.pipeline_tag == "text-ranking" and "cross-encoder" in (card.data.tags or [])
    assert 'model = CrossEncoder("student")\nscores = model.predict([' in card.text
    assert "CrossEncoder" in capsys.readouterr().out
