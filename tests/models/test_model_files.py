"""A student gets every file that its teacher's tokenizer reads."""

import fnmatch
import json
from pathlib import Path

import pytest
import sentencepiece
import torch
import transformers
from transformers import AutoTokenizer, MarianConfig, MarianMTModel, PreTrainedTokenizerBase

from hf_guide.cli import main as cli
from hf_guide.errors import TeacherError
from hf_guide.hub.saved_model import copy_tokenizer_files
from hf_guide.models.model_files import PROCESSOR_FILES
from hf_guide.models.pretrained import load_processing_class
from tests.small_tokenizers import TEXTS
from tests.tiny import KINDS
from tests.trust.artefacts import make_tokenizer


def test_every_file_that_a_tokenizer_of_transformers_reads_is_copied() -> None:
    named: dict[str, str] = {}
    for name in filter(lambda name: "Tokenizer" in name, dir(transformers)):
        tokenizer_class = getattr(transformers, name)
        if isinstance(tokenizer_class, type) and issubclass(tokenizer_class, PreTrainedTokenizerBase):
            named |= dict.fromkeys(tokenizer_class.vocab_files_names.values(), name)
    assert len(named) > 20, "the classes name their files"
    missed = {
        file: name
        for file, name in named.items()
        if not any(fnmatch.fnmatchcase(file, pattern) for pattern in PROCESSOR_FILES)
    }
    assert not missed


@pytest.fixture
def marian(tmp_path: Path) -> Path:
    """A Marian teacher, whose tokenizer reads two SentencePiece models and a vocabulary."""
    folder = tmp_path / "teacher"
    folder.mkdir()
    pieces: dict[str, None] = {}
    for side, lines in (("source", TEXTS[::2]), ("target", TEXTS[1::2])):
        with (folder / f"{side}.spm").open("wb") as file:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(lines), model_writer=file, vocab_size=120, hard_vocab_limit=False, minloglevel=2
            )
        model = sentencepiece.SentencePieceProcessor(model_file=str(folder / f"{side}.spm"))
        pieces |= dict.fromkeys(model.id_to_piece(number) for number in range(model.get_piece_size()))
    vocabulary = {piece: number for number, piece in enumerate([*pieces, "<pad>"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "MarianTokenizer"}))
    torch.manual_seed(0)
    config = MarianConfig(
        vocab_size=len(vocabulary),
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_position_embeddings=32,
        pad_token_id=vocabulary["<pad>"],
        decoder_start_token_id=vocabulary["<pad>"],
        eos_token_id=vocabulary["</s>"],
        forced_eos_token_id=vocabulary["</s>"],
    )
    MarianMTModel(config).save_pretrained(folder)
    return folder


def test_the_student_of_a_marian_teacher_has_its_whole_tokenizer(marian: Path, tmp_path: Path) -> None:
    output = tmp_path / "student"
    arguments = ["init", str(marian), "-o", str(output), "--config", "encoder_layers=1", "--no-progress"]
    assert cli.main(arguments) == 0
    teacher, student = AutoTokenizer.from_pretrained(marian), AutoTokenizer.from_pretrained(output)
    assert student(TEXTS[:4])["input_ids"] == teacher(TEXTS[:4])["input_ids"]
    assert student(text_target=TEXTS[:4])["input_ids"] == teacher(text_target=TEXTS[:4])["input_ids"]


def test_a_student_has_the_named_chat_templates_of_its_teacher(tmp_path: Path) -> None:
    teacher, output = tmp_path / "teacher", tmp_path / "student"
    KINDS["llama"].teacher().save_pretrained(teacher)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    tokenizer.save_pretrained(teacher)
    assert cli.main(["init", str(teacher), "-o", str(output), "--hidden-size", "24", "--no-progress"]) == 0
    assert AutoTokenizer.from_pretrained(output).chat_template == tokenizer.chat_template


def test_a_named_chat_template_of_another_folder_is_neither_copied_nor_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    teacher, student = tmp_path / "teacher", tmp_path / "student"
    for folder in (teacher, student, tmp_path / "private"):
        folder.mkdir()
    (tmp_path / "private" / "tool_use.jinja").write_text("my private text")
    (teacher / "additional_chat_templates").symlink_to(tmp_path / "private")
    copy_tokenizer_files(str(teacher), student)
    assert not list(student.iterdir()) and "outside of its folder: not copied" in caplog.text
    make_tokenizer().save_pretrained(teacher)
    with pytest.raises(TeacherError, match="tool_use.jinja is a link to .*outside of its folder"):
        load_processing_class(AutoTokenizer, teacher)
