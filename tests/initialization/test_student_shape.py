"""A student has its teacher's tokens: padded sizes of one tokenizer may differ, other vocabularies are an error."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hf_guide import ShapeError, from_teacher
from tests.tiny import KINDS, logits, same_bits

REAL = 90
"""Tokens of the tokenizer; the teacher's table has 96 rows."""


@pytest.fixture(scope="module", params=["llama", "llama tied", "bert"])
def teacher(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("teacher")
    KINDS[request.param].teacher().save_pretrained(folder)
    save_tokenizer(folder)
    return folder, request.param


def save_tokenizer(folder: Path) -> None:
    core = Tokenizer(models.WordLevel({f"w{i}": i for i in range(REAL - 1)}, unk_token="w0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    assert len(tokenizer) == REAL
    tokenizer.save_pretrained(folder)


def table(model: PreTrainedModel) -> torch.Tensor:
    return model.get_input_embeddings().weight.detach()


@pytest.mark.sampled(3)
@pytest.mark.parametrize("rows", [REAL, 93, 128])
def test_padded_rows_may_differ(teacher: tuple[Path, str], rows: int) -> None:
    folder, name = teacher
    kind = KINDS[name]
    same = from_teacher(folder, show_progress=False)
    student = from_teacher(folder, vocab_size=rows, show_progress=False)
    kept = min(rows, 96)
    assert table(student).shape[0] == student.config.vocab_size == rows
    assert torch.equal(table(student)[:kept], table(same)[:kept])
    assert not table(student)[kept:].any()
    assert student.get_output_embeddings().weight.shape[0] == rows
    found, expected = (logits(model, kind)[..., :REAL] for model in (student, same))
    torch.testing.assert_close(found, expected)
    smaller = from_teacher(folder, vocab_size=rows, show_progress=False, **kind.smaller)
    narrow = from_teacher(folder, show_progress=False, **kind.smaller)
    torch.testing.assert_close(table(smaller)[:kept], table(narrow)[:kept])


@pytest.mark.parametrize("rows", [REAL - 1, 1])
@pytest.mark.parametrize("method", ["guide", "uniform", "random"])
def test_rows_of_real_tokens_cannot_be_dropped(teacher: tuple[Path, str], rows: int, method: str) -> None:
    with pytest.raises(ShapeError, match=rf"vocabulary has {rows} rows, the teacher's 96 .*has {REAL} tokens.*Leave"):
        from_teacher(teacher[0], vocab_size=rows, method=method, show_progress=False)


@pytest.mark.parametrize("rows", [64, 128])
def test_without_a_tokenizer_no_row_is_known_to_be_padding(rows: int, tmp_path: Path) -> None:
    model = KINDS["llama"].teacher()
    model.save_pretrained(tmp_path)
    for teacher in (tmp_path, model):
        with pytest.raises(ShapeError, match=f"has {rows} rows, the teacher's 96 .*no tokenizer.*vocab_size at 96"):
            from_teacher(teacher, vocab_size=rows, show_progress=False)


def test_the_tokenizer_is_read_from_the_teachers_source(tmp_path: Path) -> None:
    """In a subfolder, in the cache of a Hub id, and next to the weights of a loaded teacher."""
    kind, commit = KINDS["llama"], "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--someone--small"
    snapshot = repository / "snapshots" / commit
    kind.teacher().save_pretrained(snapshot)
    save_tokenizer(snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    expected = from_teacher(snapshot, vocab_size=92, show_progress=False)
    by_id = from_teacher(
        "someone/small", cache_dir=tmp_path, local_files_only=True, vocab_size=92, show_progress=False
    )
    in_subfolder = from_teacher(repository / "snapshots", subfolder=commit, vocab_size=92, show_progress=False)
    loaded = from_teacher(type(expected).from_pretrained(snapshot), vocab_size=92, show_progress=False)
    for student in (by_id, in_subfolder, loaded):
        assert same_bits(student, expected)
    assert by_id.initialization_report.revision == commit
