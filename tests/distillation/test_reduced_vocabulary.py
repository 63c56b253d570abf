"""A student with some of its teacher's tokens is distilled from the teacher's distribution over these tokens."""

import logging

import pytest
import torch
from transformers import AutoTokenizer, BertForSequenceClassification, LlamaForCausalLM

from hf_guide import Capture, DistillationArguments, DistillationTrainer, capture_teacher, from_teacher
from hf_guide.calibration.vocabulary import VocabularyReducer
from hf_guide.errors import CaptureError, OptionError, VocabularyError
from hf_guide.models.token_rows import attached_tokenizer
from hf_guide.teachers.retokenization import attached_retokenizer
from hf_guide.teachers.vocabulary import kept_token_ids, with_vocabulary_of
from tests.small_tokenizers import KINDS, TEXTS

TEXT = TEXTS[5]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    KINDS["byte-level BPE"].teacher(folder)
    return folder


@pytest.fixture
def student(folder):
    """Return the teacher with half of its removable pieces: the same function on text of the others."""
    return from_teacher(folder, vocab_size=450, calibration_dataset=TEXTS[::3], method="uniform", show_progress=False)


def make_trainer(student, tmp_path, **options):
    tokenizer = options.pop("tokenizer", None) or attached_tokenizer(student)
    rows = [{"input_ids": ids, "labels": ids} for ids in [tokenizer(TEXT)["input_ids"][:24]] * 4]
    losses = options.pop("losses", {"kd": 1.0})
    args = DistillationArguments(
        str(tmp_path / "out"),
        losses=losses,
        max_steps=1,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_steps=1,
    )
    return DistillationTrainer(student, args, train_dataset=rows, **{"processing_class": tokenizer, **options})


def test_the_loss_of_the_teacher_is_that_of_its_own_tokens_summed_by_the_next_piece(folder, student, tmp_path):
    trainer = make_trainer(student, tmp_path, teacher=str(folder))
    found = trainer.evaluate(trainer.train_dataset)
    teacher = LlamaForCausalLM.from_pretrained(folder).eval()
    both = attached_retokenizer(with_vocabulary_of(teacher, attached_tokenizer(student)))
    ids = torch.tensor([trainer.train_dataset[0]["input_ids"]])
    read = both.retokenize({"input_ids": ids})
    with torch.no_grad():
        logits = both.merge(read.select(teacher(read.inputs["input_ids"]).logits), read.states)[0, :-1]
        own = student(ids).logits[0, :-1].log_softmax(-1)
    expected = torch.nn.functional.cross_entropy(logits, ids[0, 1:]).item()
    divergence = torch.nn.functional.kl_div(own, logits.log_softmax(-1), log_target=True, reduction="batchmean")
    assert found["eval_teacher_ce"] == pytest.approx(expected, rel=1e-4)
    assert found["eval_kd"] == pytest.approx(divergence.item(), rel=1e-4)


def test_the_weights_of_the_teacher_are_shared_and_it_is_not_modified(folder, student):
    teacher = LlamaForCausalLM.from_pretrained(folder).eval()
    whole, own = AutoTokenizer.from_pretrained(folder), attached_tokenizer(student)
    small = with_vocabulary_of(teacher, own)
    assert small.model.layers[0].mlp.up_proj.weight is teacher.model.layers[0].mlp.up_proj.weight
    assert attached_retokenizer(small) is not None and attached_retokenizer(teacher) is None
    assert attached_tokenizer(teacher) is None and teacher.config.vocab_size > 700
    assert with_vocabulary_of(teacher, whole) is teacher and with_vocabulary_of(teacher, None) is teacher


def test_a_masked_language_model_is_fed_its_own_ids_of_the_students_tokens(tmp_path):
    teacher, whole = KINDS["WordPiece"].teacher(tmp_path)
    options = {"vocab_size": 400, "calibration_dataset": TEXTS[::3], "method": "uniform", "show_progress": False}
    student = from_teacher(tmp_path, **options)
    own = attached_tokenizer(student)
    cut, kept = with_vocabulary_of(teacher, own), kept_token_ids(own, whole)
    ids = torch.tensor([own(TEXT)["input_ids"]])
    with torch.no_grad():
        expected = teacher(torch.tensor(kept)[ids]).logits[..., kept]
        assert torch.equal(cut(ids).logits, expected) and torch.allclose(student(ids).logits, expected, atol=1e-5)


def test_checkpoints_have_the_students_tokenizer(folder, student, tmp_path):
    expected = attached_tokenizer(student).get_vocab()
    trainer = make_trainer(student, tmp_path, teacher=str(folder), losses={"ce": 0.5, "kd": 0.5})
    trainer.train()
    bare = make_trainer(student, tmp_path / "bare", processing_class=None, losses={"ce": 1.0})
    bare.save_model()
    for saved in (tmp_path / "out" / "checkpoint-1", tmp_path / "bare" / "out"):
        assert AutoTokenizer.from_pretrained(saved).get_vocab() == expected


def test_a_cache_of_the_students_tokens_is_the_live_teachers_distribution(folder, student, tmp_path):
    tokenizer = attached_tokenizer(student)
    trainer = make_trainer(student, tmp_path, teacher=str(folder))
    cache = capture_teacher(
        folder,
        trainer.train_dataset,
        tmp_path / "cache",
        processing_class=tokenizer,
        config={"top_k": 450},
        show_progress=False,
    )
    assert cache.manifest.classes == 450
    cached = make_trainer(student, tmp_path, teacher=cache)
    divergences = [each.evaluate(each.train_dataset)["eval_kd"] for each in (trainer, cached)]
    assert divergences[0] > 0.1 and divergences[1] == pytest.approx(divergences[0], abs=1e-3)
    with pytest.raises(CaptureError, match="another tokenizer"):
        Capture.open(tmp_path / "cache", processing_class=AutoTokenizer.from_pretrained(folder))


def test_a_classifier_reads_its_teachers_ids(tmp_path):
    folder = tmp_path / "bert"
    _, tokenizer = KINDS["WordPiece"].teacher(folder)
    torch.manual_seed(0)
    BertForSequenceClassification.from_pretrained(folder).save_pretrained(folder)
    student = from_teacher(
        folder, vocab_size=400, calibration_dataset=TEXTS[::3], method="uniform", show_progress=False
    )
    own = attached_tokenizer(student)
    rows = [dict(own(TEXT)) | {"labels": 1}] * 2
    args = DistillationArguments(str(tmp_path), losses={"kd": 1.0}, use_cpu=True, report_to="none", disable_tqdm=True)
    trainer = DistillationTrainer(student, args, train_dataset=rows, teacher=str(folder), processing_class=own)
    assert abs(trainer.evaluate(rows)["eval_kd"]) < 1e-6


def test_another_tokenizer_than_the_students_is_refused(folder, student, tmp_path):
    with pytest.raises(VocabularyError, match="The student has a vocabulary of 450 tokens"):
        make_trainer(student, tmp_path, tokenizer=AutoTokenizer.from_pretrained(folder), teacher=str(folder))
    with pytest.raises(OptionError, match="tokenized already"):
        make_trainer(
            {"vocab_size": 450, "calibration_dataset": TEXTS},
            tmp_path,
            tokenizer=AutoTokenizer.from_pretrained(folder),
            teacher=str(folder),
        )


def test_a_teacher_that_cannot_be_cut_is_refused(tmp_path):
    teacher, tokenizer = KINDS["WordPiece"].teacher(tmp_path)
    vocabulary = VocabularyReducer(tokenizer, TEXTS[::3]).reduce(400)
    reduced, removed = vocabulary.tokenizer, max(set(range(len(tokenizer))) - set(vocabulary.kept_ids))
    teacher.config.eos_token_id = removed
    with pytest.raises(VocabularyError, match=f"eos_token_id is {removed}"):
        with_vocabulary_of(teacher, reduced)
    teacher.is_quantized = True
    with pytest.raises(VocabularyError, match="is quantized"):
        with_vocabulary_of(teacher, reduced)


def test_it_is_logged_that_rows_of_the_teacher_are_used(folder, student, caplog):
    with caplog.at_level(logging.INFO, "hf_guide"):
        with_vocabulary_of(LlamaForCausalLM.from_pretrained(folder), attached_tokenizer(student))
    assert "The batches have 450 of the tokens of the teacher" in caplog.text
