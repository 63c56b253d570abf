"""The modules of a sentence-transformers folder compute what it defines, and one that a student cannot have is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel

from hf_guide.errors import ShapeError, TaskError, TeacherError
from hf_guide.models.sentence_files import (
    embed,
    load_module_weights,
    modules_of_model,
    read_sentence_modules,
    write_sentence_modules,
)
from hf_guide.models.sentence_modules import POOLING_MODES, SentenceModules, attach_sentence_modules
from tests.sentence_folder import (
    NEW,
    OLD,
    TEXTS,
    batch,
    bert,
    dense,
    pooling,
    sentence_folder,
    teacher_folder,
    write_json,
)

HIDDEN = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(0))
RIGHT = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]])


def reference(mode: str, hidden: torch.Tensor, prompt: int = 0) -> torch.Tensor:
    """Return what a mode makes of the attended hidden states of one text, (length, width), by its definition in float64."""
    weights = torch.arange(1, len(hidden) + 1, dtype=torch.float64)[prompt:]
    hidden = hidden.double()[prompt:]
    return {
        "cls": hidden[0],
        "max": hidden.max(0).values,
        "mean": hidden.mean(0),
        "mean_sqrt_len_tokens": hidden.sum(0) / len(hidden) ** 0.5,
        "weightedmean": (hidden * weights[:, None]).sum(0) / weights.sum(),
        "lasttoken": hidden[-1],
    }[mode]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("mode", POOLING_MODES)
def test_pooling_is_its_definition_on_the_attended_tokens(tmp_path: Path, mode: str, side: str) -> None:
    modules = read_sentence_modules(sentence_folder(tmp_path, pooling(mode)))
    mask = RIGHT if side == "right" else RIGHT.flip(1)
    expected = torch.stack([reference(mode, row[keep.bool()]) for row, keep in zip(HIDDEN, mask, strict=True)])
    assert modules is not None
    torch.testing.assert_close(modules.embed(HIDDEN, {"attention_mask": mask}), expected.float())


@pytest.mark.parametrize("mode", POOLING_MODES)
def test_a_prompt_counts_unless_it_is_excluded(tmp_path: Path, mode: str) -> None:
    text = {"attention_mask": torch.ones(3, 5), "prompt_length": torch.tensor([2])}
    for include, prompt in ((True, 0), (False, 2)):
        modules = read_sentence_modules(
            sentence_folder(tmp_path / str(include), pooling(mode, include_prompt=include))
        )
        assert modules is not None
        expected = torch.stack([reference(mode, row, prompt) for row in HIDDEN])
        torch.testing.assert_close(modules.embed(HIDDEN, text), expected.float())


def test_several_modes_are_concatenated_in_their_order(tmp_path: Path) -> None:
    switches = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}
    for number, (entry, order) in enumerate(
        [(("Pooling", switches), ("cls", "mean")), (pooling("mean", "cls"), ("mean", "cls"))]
    ):
        modules = read_sentence_modules(sentence_folder(tmp_path / str(number), entry))
        assert modules is not None and modules.width == 64
        expected = torch.stack([torch.cat([reference(mode, row) for mode in order]) for row in HIDDEN])
        torch.testing.assert_close(modules.embed(HIDDEN, {}), expected.float())


def test_dense_layer_norm_dropout_and_normalize_follow(tmp_path: Path) -> None:
    config = {"bias": False, "activation_function": "torch.nn.modules.activation.GELU", "use_residual": True}
    chain = [pooling(), dense(32, 8, **config), ("LayerNorm", {"dimension": 8}), ("Dropout", {"dropout": 0.5})]
    modules = read_sentence_modules(sentence_folder(tmp_path, *chain, ("Normalize", None)))
    assert modules is not None
    weights = {path: module.state_dict() for path, module in modules.trainable.items()}
    linear, residual = (weights["2_Dense"][f"{name}.weight"].double() for name in ("linear", "residual"))
    pooled = HIDDEN.double().mean(1)
    mixed = torch.nn.functional.gelu(pooled @ linear.T) + pooled @ residual.T
    centred = mixed - mixed.mean(-1, keepdim=True)
    norm = {name: tensor.double() for name, tensor in weights["3_LayerNorm"].items()}
    scaled = (
        centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm["norm.weight"] + norm["norm.bias"]
    )
    expected = scaled / scaled.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(modules.train(False).embed(HIDDEN, {}), expected.float())
    assert not torch.equal(modules.train(True).embed(HIDDEN, {}), expected.float())  # dropout


def test_a_dense_layer_of_the_tokens_comes_before_the_pooling(tmp_path: Path) -> None:
    first = dense(32, 8, module_input_name="token_embeddings", module_output_name="token_embeddings")
    modules = read_sentence_modules(sentence_folder(tmp_path, first, pooling("max", width=8)))
    assert modules is not None and modules.hidden_size == 32 and modules.width == 8
    narrow = modules.resized(16, torch.eye(32)[:, :16])
    assert narrow.embed(HIDDEN[..., :16], {}).shape == (3, 8)
    assert narrow.entries[2].config == {"embedding_dimension": 8, "pooling_mode": ["max"]}


@pytest.mark.parametrize(
    "basis", [torch.linalg.qr(torch.randn(32, 12))[0], torch.arange(0, 24, 2)], ids=["matrix", "indices"]
)
def test_a_dense_layer_follows_the_basis_and_keeps_its_output(tmp_path: Path, basis: torch.Tensor) -> None:
    modules = read_sentence_modules(sentence_folder(tmp_path, pooling("cls", "mean"), dense(64, 20), dense(20, 6)))
    assert modules is not None
    narrow = modules.resized(12, basis)
    inside = HIDDEN @ basis @ basis.T if basis.ndim == 2 else HIDDEN * (torch.arange(32)[:, None] == basis).any(1)
    student = HIDDEN @ basis if basis.ndim == 2 else HIDDEN[..., basis]
    torch.testing.assert_close(narrow.embed(student, {}), modules.embed(inside, {}))
    assert [(entry.config or {}).get("in_features") for entry in narrow.entries] == [None, None, 24, 20]
    assert narrow.width == modules.width == 6


def test_without_a_dense_layer_the_embedding_is_narrower(tmp_path: Path) -> None:
    modules = read_sentence_modules(
        sentence_folder(tmp_path, pooling("max", "mean"), ("Normalize", None), truncate_dim=40)
    )
    assert modules is not None
    assert modules.resized(16).width == 32
    assert modules.resized(16).files.model_config == {}, "a truncation to more than there is would be an error"
    assert modules.resized(24).files.model_config == {"truncate_dim": 40}


def test_a_layer_norm_of_the_pooled_states_has_no_narrower_counterpart(tmp_path: Path) -> None:
    modules = read_sentence_modules(sentence_folder(tmp_path, pooling(), ("LayerNorm", {"dimension": 32})))
    assert modules is not None and modules.resized(32).width == 32
    with pytest.raises(ShapeError, match="2_LayerNorm normalizes .* Keep hidden_size=32"):
        modules.resized(16, torch.eye(32)[:, :16])


def test_a_residual_that_needs_no_projection_any_more_is_refused(tmp_path: Path) -> None:
    modules = read_sentence_modules(sentence_folder(tmp_path, pooling(), dense(32, 16, use_residual=True)))
    assert modules is not None
    with pytest.raises(ShapeError, match="without a projection"):
        modules.resized(16, torch.eye(32)[:, :16])
    same = read_sentence_modules(sentence_folder(tmp_path / "same", pooling(), dense(32, 32, use_residual=True)))
    assert same is not None
    basis = torch.linalg.qr(torch.randn(32, 16))[0]
    narrow = same.resized(16, basis)
    torch.testing.assert_close(narrow.embed(HIDDEN @ basis, {}), same.embed(HIDDEN @ basis @ basis.T, {}))


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    chain = [pooling("cls", include_prompt=False), dense(32, 8), ("LayerNorm", {"dimension": 8}), ("Normalize", None)]
    folder = sentence_folder(tmp_path / "teacher", *chain, prompts={"query": "w1 "}, similarity_fn_name="dot")
    modules = read_sentence_modules(folder)
    assert modules is not None
    write_sentence_modules(modules, tmp_path / "copy")
    again = read_sentence_modules(tmp_path / "copy")
    assert again is not None
    assert torch.equal(again.embed(HIDDEN, {}), modules.embed(HIDDEN, {}))
    for name in (
        "modules.json",
        "sentence_bert_config.json",
        "config_sentence_transformers.json",
        "2_Dense/config.json",
    ):
        assert json.loads((tmp_path / "copy" / name).read_text()) == json.loads((folder / name).read_text())
    for module in again.trainable.values():
        torch.nn.init.zeros_(next(module.parameters()))
    load_module_weights(again, tmp_path / "copy")
    assert torch.equal(again.embed(HIDDEN, {}), modules.embed(HIDDEN, {}))


def test_the_modules_of_a_model_are_those_of_its_folder_or_the_mean(tmp_path: Path) -> None:
    inputs = batch(TEXTS)
    model = AutoModel.from_pretrained(teacher_folder(tmp_path / "cls", pooling("cls"), ("Normalize", None)))
    with torch.no_grad():
        hidden = model(**inputs).last_hidden_state
    torch.testing.assert_close(embed(model, hidden, inputs), torch.nn.functional.normalize(hidden[:, 0], dim=-1))
    plain = bert()
    mask = inputs["attention_mask"][..., None]
    torch.testing.assert_close(embed(plain, hidden, inputs), (hidden * mask).sum(1) / mask.sum(1))
    attach_sentence_modules(plain, modules_of_model(model))
    assert torch.equal(embed(plain, hidden, inputs), embed(model, hidden, inputs))
    assert plain.state_dict().keys() == bert().state_dict().keys()


def test_a_hub_id_whose_modules_are_not_known_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model = bert()
    model.config._name_or_path = "someone/unreachable-encoder"
    with pytest.raises(TeacherError, match=r"has a modules.json, .* is not known: .* Download the whole repository"):
        modules_of_model(model)


def test_a_cross_encoder_has_no_embedding(tmp_path: Path) -> None:
    modules = read_sentence_modules(sentence_folder(tmp_path, model_type="CrossEncoder"))
    assert modules is not None and modules.is_cross_encoder and modules.width is None
    with pytest.raises(TaskError, match="scores of pairs"):
        modules.embed(HIDDEN, {})


CUSTOM = ("my_code.MyPooling", {})
REFUSED: dict[str, tuple[list[Any], str]] = {
    "custom code": ([CUSTOM], r"'my_code.MyPooling', whose Python code is not .* it is not run"),
    "remote class": ([("other--repo.modeling.Pool", {})], "is not run"),
    "unsupported": ([(f"{OLD}.WordWeights", {})], "WordWeights, which cannot be carried over"),
    "router": ([(f"{NEW}.Router", {})], "Router, which cannot be carried over"),
    "no config": ([("Pooling", None)], r"1_Pooling/config.json of .* is missing"),
    "no width": ([("Pooling", {"pooling_mode": "mean"})], "word_embedding_dimension .* must be a positive integer"),
    "mode": ([pooling("median")], r"pooling_mode in .* must be one or more of .*'mean'.*; found \['median'\]"),
    "typo": ([pooling(pooling_modes="max")], "unknown entry 'pooling_modes'.*Did you mean 'pooling_mode'"),
    "width": ([pooling(width=16), dense(32, 8)], "2_Dense of .* reads 32 directions, and is passed 16"),
    "activation": (
        [pooling(), dense(32, 8, activation_function="os.system")],
        "must be a class of torch.nn; found 'os.system'",
    ),
    "own activation": ([pooling(), dense(32, 8, activation_function="mine.Tanh")], "must be a class of torch.nn"),
    "no pooling": ([("Normalize", {"module_input_name": "token_embeddings"})], "a vector per token"),
    "order": ([("Normalize", {})], "reads sentence_embedding, which no module before it writes"),
    "feature": (
        [pooling(), dense(32, 8, module_input_name="pooler")],
        "must be 'token_embeddings' or 'sentence_embedding'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_module_that_a_student_cannot_have_is_refused(tmp_path: Path, case: str) -> None:
    modules, message = REFUSED[case]
    with pytest.raises(TeacherError, match=message):
        read_sentence_modules(sentence_folder(tmp_path, *modules))


def test_damaged_files_are_named(tmp_path: Path) -> None:
    folder = sentence_folder(tmp_path / "a", pooling(), dense(32, 8))
    (folder / "2_Dense" / "model.safetensors").unlink()
    with pytest.raises(TeacherError, match="weights of the module 2_Dense .* are missing"):
        read_sentence_modules(folder)
    folder = sentence_folder(tmp_path / "b", pooling(), dense(32, 8))
    write_json(folder / "2_Dense" / "config.json", {"in_features": 32, "out_features": 9})
    with pytest.raises(TeacherError, match=r"weights of the module 2_Dense .* must be .*\(9, 32\)"):
        read_sentence_modules(folder)
    for text, message in (
        ("{", "cannot be read"),
        ("{}", "must be a JSON list"),
        ('["x"]', "must have a name"),
        ("[]", "no module"),
    ):
        (folder / "modules.json").write_text(text)
        with pytest.raises(TeacherError, match=message):
            read_sentence_modules(folder)
    for path, message in (("../x", "outside of its own"), ("/etc", "outside"), ("0_Transformer", "early layout")):
        write_json(folder / "modules.json", [{"idx": 0, "name": "0", "path": path, "type": f"{OLD}.Transformer"}])
        with pytest.raises(TeacherError, match=message):
            read_sentence_modules(folder)


def test_links_out_of_the_folder_are_refused(tmp_path: Path) -> None:
    folder = sentence_folder(tmp_path / "a", pooling())
    outside = tmp_path / "outside.json"
    outside.write_text((folder / "1_Pooling" / "config.json").read_text())
    (folder / "1_Pooling" / "config.json").unlink()
    (folder / "1_Pooling" / "config.json").symlink_to(outside)
    with pytest.raises(TeacherError, match="outside of its folder"):
        read_sentence_modules(folder)


@pytest.mark.parametrize(
    ("settings", "transformer", "message"),
    [
        ({"model_type": "SparseEncoder"}, {}, "holds a SparseEncoder"),
        ({"model_type": "MultiVectorEncoder"}, {}, "holds a MultiVectorEncoder"),
        ({}, {"query_length": 32}, "a vector per token"),
        ({}, {"tokenizer_name_or_path": "other"}, "names a tokenizer elsewhere, 'other'"),
        ({}, {"modality_config": {"image": {"method": "forward"}}}, "must read texts"),
    ],
)
def test_settings_of_another_kind_of_model_are_refused(
    tmp_path: Path, settings: Any, transformer: Any, message: str
) -> None:
    folder = sentence_folder(tmp_path, pooling(), **settings)
    write_json(folder / "sentence_bert_config.json", transformer)
    with pytest.raises(TeacherError, match=message):
        read_sentence_modules(folder)


def test_a_folder_cannot_allow_its_own_code(tmp_path: Path) -> None:
    folder = sentence_folder(tmp_path, pooling())
    write_json(
        folder / "sentence_bert_config.json", {"model_args": {"trust_remote_code": True, "add_pooling_layer": False}}
    )
    modules = read_sentence_modules(folder)
    assert modules is not None and modules.files.transformer_config == {"model_args": {"add_pooling_layer": False}}


def test_mean_pooling_is_what_a_folder_without_modules_is_saved_with(tmp_path: Path) -> None:
    write_sentence_modules(SentenceModules.mean_pooling(32), tmp_path)
    modules = read_sentence_modules(tmp_path)
    assert modules is not None
    torch.testing.assert_close(modules.embed(HIDDEN, {}), HIDDEN.mean(1))
