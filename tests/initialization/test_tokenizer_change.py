"""Laws of another tokenizer: tokens of the teacher's keep their rows, so the same tokens are the same function."""

import json

import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, GenerationConfig, LlamaConfig, LlamaForCausalLM

from hf_guide import DistillationArguments, DistillationTrainer, InitializationReport, find_shapes, from_teacher
from hf_guide.cli.main import main
from hf_guide.errors import OptionError, TeacherError, VocabularyError
from hf_guide.models.piece_mapping import map_pieces, piece_bytes
from hf_guide.models.token_rows import attached_tokenizer
from hf_guide.models.tokenizer_reduction import tokenizer_spec
from tests.small_tokenizers import KINDS, TEXTS


def permuted(tokenizer, folder):
    """Return a tokenizer with the ids of its pieces in another order, as it loads from a folder, and the new id of each."""
    tokenizer.save_pretrained(folder)
    spec = tokenizer_spec(tokenizer)
    fixed = {token["id"] for token in spec["added_tokens"]}
    vocab = spec["model"]["vocab"]
    fixed |= {spec["model"].get("unk_id")}
    ids = range(len(vocab)) if isinstance(vocab, list) else sorted(vocab.values())
    free = [index for index in ids if index not in fixed]
    new = dict(zip(free, free[1:] + free[:1], strict=True))
    if isinstance(vocab, list):
        spec["model"]["vocab"] = [
            piece for _, piece in sorted((new.get(i, i), piece) for i, piece in enumerate(vocab))
        ]
    else:
        spec["model"]["vocab"] = {piece: new.get(index, index) for piece, index in vocab.items()}
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    for name in ("vocab.json", "merges.txt", "vocab.txt"):
        (folder / name).unlink(missing_ok=True)
    return AutoTokenizer.from_pretrained(folder), [new.get(index, index) for index in range(len(tokenizer))]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    return (*KINDS["byte-level BPE"].teacher(folder), folder)


@pytest.mark.parametrize("name", KINDS)
def test_the_same_tokens_in_another_order_are_the_same_function(name, tmp_path):
    teacher, tokenizer = KINDS[name].teacher(tmp_path / "teacher")
    other, new_ids = permuted(tokenizer, tmp_path / "other")
    student = from_teacher(tmp_path / "teacher", tokenizer=other, method="uniform", show_progress=False)
    facts = student.initialization_report.vocabulary
    assert (facts["copied"], facts["composed"], facts["fresh"]) == (len(tokenizer), 0, 0)
    student.save_pretrained(tmp_path / "student")
    loaded, saved = (
        type(student).from_pretrained(tmp_path / "student"),
        AutoTokenizer.from_pretrained(tmp_path / "student"),
    )
    assert f"{len(tokenizer)} copied, 0 composed" in InitializationReport.load(tmp_path / "student").summary()
    old, new = (each(TEXTS[5], return_tensors="pt", truncation=True, max_length=30) for each in (tokenizer, saved))
    assert not torch.equal(old["input_ids"], new["input_ids"])
    if teacher.config.is_encoder_decoder:
        old, new = ({**each, "decoder_input_ids": each["input_ids"]} for each in (old, new))
    with torch.no_grad():
        expected = teacher(**old).logits[..., : len(tokenizer)]
        logits = loaded.eval()(**new).logits[..., new_ids]
    assert torch.allclose(logits, expected, atol=1e-6 * float(expected.abs().max()))


def test_more_tokens_leave_the_logits_of_common_ones(llama):
    teacher, tokenizer, folder = llama
    larger = AutoTokenizer.from_pretrained(folder)
    larger.add_tokens(["the model", "zzz qqq"])
    larger.add_special_tokens({"mask_token": "<mask>"})
    student = from_teacher(folder, tokenizer=larger, method="uniform", show_progress=False)
    facts, count = student.initialization_report.vocabulary, len(tokenizer)
    assert facts == {"size": count + 3, "teacher_size": count, "copied": count, "composed": 2, "fresh": 1}
    ids = tokenizer(TEXTS[5], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert torch.equal(student(ids).logits[..., :count], teacher(ids).logits[..., :count])
    index = larger.get_vocab()["the model"]
    parts, texts = list(map_pieces(larger, tokenizer).parts[index]), piece_bytes(tokenizer)
    assert b"".join(texts[part] for part in parts) == b"the model"
    assert len(parts) <= len(tokenizer("the model", add_special_tokens=False)["input_ids"])
    table = teacher.get_input_embeddings().weight
    row = student.get_input_embeddings().weight[index]
    assert torch.allclose(row, table[parts].mean(0))
    assert torch.allclose(student.lm_head.weight[count + 2], teacher.lm_head.weight.mean(0), atol=1e-6)


@pytest.mark.parametrize("name", KINDS)
def test_pieces_of_other_kinds_of_tokenizers_are_matched_by_their_text(name, tmp_path, llama):
    _, own, folder = llama
    tokenizer = KINDS[name].make()
    mapping = map_pieces(tokenizer, own)
    texts, teacher_texts = piece_bytes(tokenizer), piece_bytes(own)
    for index, text in texts.items():
        assert b"".join(teacher_texts[part] for part in mapping.parts[index]) == text
    same = set(texts.values()) & set(teacher_texts.values())
    assert sum(len(mapping.parts[index]) == 1 for index in texts) >= len(same) > 50
    student = from_teacher(folder, tokenizer=tokenizer, method="uniform", show_progress=False)
    assert student.config.vocab_size == student.get_input_embeddings().weight.shape[0] == len(mapping.parts)
    assert student.config.eos_token_id in (None, tokenizer.eos_token_id)
    if tokenizer.eos_token_id is not None:
        eos, own_eos = tokenizer.eos_token_id, own.eos_token_id
        assert mapping.parts[eos] == (own_eos,) and student.config.eos_token_id == eos


def test_rows_along_another_axis_and_of_a_bias_are_composed(tmp_path):
    _, tokenizer = KINDS["WordPiece"].teacher(tmp_path)
    teacher = BertForMaskedLM.from_pretrained(tmp_path)
    with torch.no_grad():
        teacher.cls.predictions.bias.normal_()
    teacher.save_pretrained(tmp_path)
    other = KINDS["byte-level BPE"].make()
    student = from_teacher(tmp_path, tokenizer=other, method="uniform", show_progress=False)
    parts = map_pieces(other, tokenizer).parts
    index = next(index for index, each in enumerate(parts) if len(each) > 1)
    for ours, whole in ((student, teacher),):
        bias = whole.cls.predictions.bias[list(parts[index])].mean()
        assert torch.allclose(ours.cls.predictions.bias[index], bias)


def test_every_method_and_a_budget_read_the_new_tokens(llama):
    _, _, folder = llama
    tokenizer = KINDS["Llama BPE"].make()
    options = {"tokenizer": tokenizer, "show_progress": False}
    small = {"method": "calibrated", "calibration_tokens": 256, "calibration_seq_length": 32}
    student = from_teacher(folder, method=small, calibration_dataset=TEXTS, hidden_size=8, **options)
    assert attached_tokenizer(student) is tokenizer
    assert student(**tokenizer(TEXTS[0], return_tensors="pt")).logits.shape[-1] == len(tokenizer)
    shape = find_shapes(folder, num_parameters="50%", limit=1, **options)[0]
    assert from_teacher(folder, num_parameters="50%", **options).num_parameters() == shape.parameters


def test_the_command_line_saves_the_tokenizer_with_the_student(llama, tmp_path, capsys):
    other, _ = permuted(llama[1], tmp_path / "other")
    out = tmp_path / "student"
    arguments = ["init", str(llama[2]), "--tokenizer", str(tmp_path / "other"), "-o", str(out), "--no-progress"]
    assert main([*arguments, "--dry-run"]) == 0 and main(arguments) == 0
    assert "copied" in capsys.readouterr().out
    assert AutoTokenizer.from_pretrained(out).get_vocab() == other.get_vocab()


def test_the_same_tokens_can_be_distilled_and_others_are_refused(llama, tmp_path):
    teacher, tokenizer, folder = llama
    for other, message in (
        (permuted(tokenizer, tmp_path / "other")[0], None),
        (KINDS["GPT-2"].make(), "distil from a teacher with the student's"),
    ):
        student = from_teacher(folder, tokenizer=other, method="uniform", show_progress=False)
        ids = other(TEXTS[5])["input_ids"][:24]
        args = DistillationArguments(
            str(tmp_path), losses={"kd": 1.0}, use_cpu=True, report_to="none", disable_tqdm=True
        )
        options = {
            "train_dataset": [{"input_ids": ids, "labels": ids}] * 2,
            "processing_class": other,
            "teacher": str(folder),
        }
        if message is None:
            trainer = DistillationTrainer(student, args, **options)
            assert abs(trainer.evaluate(trainer.train_dataset)["eval_kd"]) < 1e-6
        else:
            with pytest.raises((TeacherError, VocabularyError), match=message):
                DistillationTrainer(student, args, **options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tokenizer": "GPT-2", "vocab_size": 400}, OptionError, "vocab_size and tokenizer are both given"),
        ({"tokenizer": "GPT-2", "eos_token_id": 3}, OptionError, "eos_token_id and tokenizer are both given"),
        ({"tokenizer": "GPT-2", "config": LlamaConfig()}, OptionError, "leave config out"),
        ({"tokenizer": 7}, OptionError, "tokenizer must be a tokenizer, or the name or folder of one; found 7"),
    ],
)
def test_what_cannot_be_another_tokenizer_is_refused(llama, options, error, message):
    options = {**options, "tokenizer": KINDS["GPT-2"].make()} if options["tokenizer"] == "GPT-2" else options
    with pytest.raises(error, match=message):
        from_teacher(llama[2], show_progress=False, **options)


def test_a_teacher_without_a_tokenizer_is_refused():
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    with pytest.raises(VocabularyError, match="has no tokenizer"):
        from_teacher(LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes)), tokenizer=KINDS["GPT-2"].make())


def test_ids_without_a_counterpart_are_noted(tmp_path):
    _, tokenizer = KINDS["WordPiece"].teacher(tmp_path)
    GenerationConfig(eos_token_id=tokenizer.mask_token_id).save_pretrained(tmp_path)
    config = BertConfig.from_pretrained(tmp_path)
    config.sep_token_id = tokenizer.sep_token_id
    config.save_pretrained(tmp_path)
    student = from_teacher(tmp_path, tokenizer=KINDS["GPT-2"].make(), method="uniform", show_progress=False)
    assert student.config.sep_token_id is None
