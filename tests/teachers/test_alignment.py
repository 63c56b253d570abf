"""Vocabularies and labels are shared only where both models mean the same by them."""

from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, models
from transformers import BertConfig, PreTrainedTokenizerFast

from hf_guide.errors import VocabularyError
from hf_guide.teachers.alignment import align_labels, shared_vocabulary_size

WORDS = ["<unk>", "the", "cat", "sat", "on", "a", "mat"]


def tokenizer(words: list[str] = WORDS, **special: str) -> PreTrainedTokenizerFast:
    model = models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), unk_token="<unk>", **special)


def test_the_same_tokens_and_sizes_share_everything():
    assert shared_vocabulary_size(tokenizer(), tokenizer(), 8, 8) == 8


def test_equal_sizes_without_tokenizers_are_taken_at_their_word():
    assert shared_vocabulary_size(None, None, 8, 8) == 8
    assert shared_vocabulary_size(tokenizer(), None, 8, 8) == 8


@pytest.mark.parametrize(
    ("student", "teacher", "missing"),
    [
        (None, None, "neither tokenizer is known"),
        (tokenizer(), None, "the teacher's tokenizer is not known"),
        (None, tokenizer(), "the student's tokenizer is not known"),
    ],
)
def test_different_sizes_without_tokenizers_are_errors(student, teacher, missing):
    with pytest.raises(VocabularyError, match=f"8 classes and the teacher's 16, and {missing}.*processing_class"):
        shared_vocabulary_size(student, teacher, 8, 16)


@pytest.mark.parametrize("sizes", [(8, 16), (16, 8), (7, 16)])
def test_padded_vocabularies_are_cut_to_the_real_tokens(sizes):
    assert shared_vocabulary_size(tokenizer(), tokenizer(), *sizes) == len(WORDS)


def test_a_model_that_lacks_the_last_tokens_shares_those_it_has():
    assert shared_vocabulary_size(tokenizer(pad_token="<pad>"), tokenizer(pad_token="<pad>"), 8, 7) == 7


@pytest.mark.parametrize("sizes", [(8, 8), (8, 16)])
def test_another_token_is_named_with_both_sizes(sizes):
    other = [*WORDS[:2], "dog", *WORDS[3:]]
    with pytest.raises(
        VocabularyError,
        match=f"{sizes[0]} classes and the teacher's {sizes[1]}.*token 2 is 'cat' to the student and 'dog'",
    ):
        shared_vocabulary_size(tokenizer(), tokenizer(other), *sizes)


@pytest.mark.parametrize("sizes", [(8, 8), (8, 16)])
def test_a_special_token_that_one_side_added_is_left_out(sizes):
    padded = tokenizer(pad_token="<pad>")
    assert len(padded) == len(WORDS) + 1
    assert shared_vocabulary_size(padded, tokenizer(), *sizes) == len(WORDS)
    assert shared_vocabulary_size(tokenizer(), padded, *sizes) == len(WORDS)


def test_a_word_that_only_one_side_has_is_an_error():
    longer = tokenizer([*WORDS, "hat"])
    with pytest.raises(
        VocabularyError, match="token 7, 'hat' to the teacher, is none of the student's, which has 7 tokens"
    ):
        shared_vocabulary_size(tokenizer(), longer, 8, 8)
    with pytest.raises(VocabularyError, match="token 7, 'hat' to the student, is none of the teacher's"):
        shared_vocabulary_size(longer, tokenizer(), 8, 16)


def test_a_processor_is_asked_for_its_tokenizer():
    other = [*WORDS[:2], "dog", *WORDS[3:]]
    processor = SimpleNamespace(tokenizer=tokenizer(other))
    with pytest.raises(VocabularyError, match="'dog' to the student"):
        shared_vocabulary_size(processor, tokenizer(), 8, 8)
    assert shared_vocabulary_size(SimpleNamespace(), tokenizer(), 8, 8) == 8


def config(*labels: str) -> BertConfig:
    names = dict(enumerate(labels))
    return BertConfig(id2label=names, label2id={name: number for number, name in names.items()})


def test_the_same_labels_need_no_order():
    assert align_labels(config("good", "bad"), config("good", "bad")) is None


def test_labels_are_aligned_by_name():
    student, teacher = config("good", "bad", "neither"), config("neither", "good", "bad")
    order = align_labels(student, teacher)
    assert order == [1, 2, 0]
    assert [teacher.id2label[label] for label in order] == list(student.id2label.values())


def test_labels_that_nobody_named_are_taken_as_they_stand():
    assert align_labels(BertConfig(num_labels=3), config("a", "b", "c")) is None
    assert align_labels(config("a", "b", "c"), BertConfig(num_labels=3)) is None
    assert align_labels(BertConfig(num_labels=3), BertConfig(num_labels=3)) is None


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        (
            config("good", "bad"),
            config("good", "bad", "neither"),
            r"\[good, bad\].*\[good, bad, neither\]: 2 against 3",
        ),
        (BertConfig(num_labels=2), config("a", "b", "c"), "2 against 3"),
        (config("good", "bad"), config("good", "awful"), r"\[good, bad\] and the teacher's \[good, awful\]"),
        (config("LABEL_1", "LABEL_0"), config("good", "bad"), "aligned by name"),
        (config("a", "a", "b"), config("b", "a", "a"), "each once"),
    ],
)
def test_labels_that_differ_are_errors_with_both_lists(student, teacher, message):
    with pytest.raises(VocabularyError, match=message):
        align_labels(student, teacher)


def test_many_labels_are_shown_in_part():
    with pytest.raises(VocabularyError, match="980 more"):
        align_labels(BertConfig(num_labels=1000), BertConfig(num_labels=999))
