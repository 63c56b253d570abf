"""Laws of a teacher whose batches have a smaller vocabulary: it reads its own tokens, and scores pieces by their sums."""

import math
from difflib import SequenceMatcher

import pytest
import torch

from hf_guide.calibration.vocabulary import VocabularyReducer
from hf_guide.errors import TeacherError
from hf_guide.models.lm_head import find_lm_head
from hf_guide.models.piece_mapping import piece_bytes
from hf_guide.models.piece_ranking import replacements
from hf_guide.models.tokenizer_reduction import tokenizer_spec
from hf_guide.tasks import Task
from hf_guide.teachers.forward import LiveTeacher, TeacherRunner
from hf_guide.teachers.inputs import build_teacher_inputs
from hf_guide.teachers.retokenization import Retokenizer, attached_retokenizer
from hf_guide.teachers.signals import TeacherSignal
from hf_guide.teachers.vocabulary import with_vocabulary_of
from tests.small_tokenizers import KINDS, TEXTS

CAUSAL = [name for name, kind in KINDS.items() if kind.bytes]
TEXT = max(TEXTS, key=len)


@pytest.fixture(scope="module", params=CAUSAL)
def case(request, tmp_path_factory):
    """Return a float64 teacher, its tokenizer, and the tokenizer of half of its removable pieces."""
    folder = tmp_path_factory.mktemp("teacher")
    teacher, tokenizer = KINDS[request.param].teacher(folder)
    reducer = VocabularyReducer(tokenizer, TEXTS[::2])
    vocabulary = reducer.reduce((reducer.min_size + reducer.max_size) // 2)
    return teacher.double(), tokenizer, vocabulary.tokenizer, vocabulary.kept_ids


def encode(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def live(teacher, reduced, *, head=True):
    small = with_vocabulary_of(teacher, reduced)
    inputs = build_teacher_inputs(small, Task.CAUSAL_LM, reduced)
    return LiveTeacher(small, Task.CAUSAL_LM, inputs=inputs, head=find_lm_head(small) if head else None)


def signals(teacher, batch):
    mask = torch.ones_like(batch["input_ids"], dtype=torch.bool)
    found = teacher.forward(batch, mask, {TeacherSignal.LOGITS})
    return found.target(slice(None)).logits.log_softmax(-1).view(*mask.shape, -1)


def test_the_teacher_reads_the_tokens_that_it_would_make_of_the_text(case):
    teacher, tokenizer, reduced, kept = case
    joined = attached_retokenizer(with_vocabulary_of(teacher, reduced))
    differ = total = 0
    for text in TEXTS:
        pieces, expected = encode(reduced, text), encode(tokenizer, text)
        read = joined.retokenize({"input_ids": torch.tensor([pieces])}).inputs["input_ids"][0].tolist()
        assert tokenizer.decode(read) == tokenizer.decode(expected)
        same = SequenceMatcher(None, read, expected, autojunk=False).get_matching_blocks()
        differ, total = differ + len(expected) - sum(each.size for each in same), total + len(expected)
    # The first token of a text is never joined. A Unigram model chooses its pieces of a whole word at once.
    limit = 0.3 if tokenizer_spec(tokenizer)["model"]["type"] == "Unigram" else 0.01
    assert total > 1000 and differ / total < limit


def test_a_removed_piece_is_replaced_as_its_tokenizer_encodes_it(case):
    _, tokenizer, reduced, kept = case
    parts = replacements(tokenizer_spec(tokenizer), kept)
    texts = piece_bytes(tokenizer)
    assert 0.98 * (len(tokenizer) - len(kept)) < len(parts) <= len(tokenizer) - len(kept)
    for old, pieces in parts.items():
        assert set(pieces) <= set(kept)
        assert b"".join(texts[piece] for piece in pieces) == texts[old]


@pytest.mark.sampled(5)
@pytest.mark.parametrize("head", [True, False])
def test_the_distribution_is_that_of_its_definition(case, head):
    teacher, tokenizer, reduced, kept = case
    new = {old: index for index, old in enumerate(kept)}
    replaced = {
        old: [new[part] for part in parts] for old, parts in replacements(tokenizer_spec(tokenizer), kept).items()
    }
    encoded = {**{old: [index] for old, index in new.items()}, **replaced}
    pieces = encode(reduced, TEXT)[:80]
    logits = signals(live(teacher, reduced, head=head), {"input_ids": torch.tensor([pieces])})[0]
    read = attached_retokenizer(with_vocabulary_of(teacher, reduced)).retokenize({"input_ids": torch.tensor([pieces])})
    tokens = read.inputs["input_ids"][0].tolist()
    assert len(tokens) < len(pieces) or tokenizer_spec(tokenizer)["model"]["type"] == "Unigram"
    with torch.no_grad():
        p = teacher(torch.tensor([tokens])).logits[0].softmax(-1)
    at = 0
    for number, token in enumerate(tokens):
        for known, piece in enumerate(encoded[token]):
            assert pieces[at] == piece
            if number:  # of the first token there is no distribution
                q = torch.zeros(len(kept), dtype=torch.float64)
                for old, parts in encoded.items():
                    if len(parts) > known and parts[:known] == encoded[token][:known]:
                        q[parts[known]] += p[number - 1, old]
                assert torch.allclose(logits[at - 1].exp(), q / q.sum(), atol=1e-12)
            at += 1


def test_no_text_is_less_likely_than_to_the_whole_teacher(case):
    teacher, tokenizer, reduced, _ = case
    pieces = torch.tensor([encode(reduced, TEXT)[:40]])
    small = live(teacher, reduced)
    logits = signals(small, {"input_ids": pieces})
    tokens = small.inputs.retokenizer.retokenize({"input_ids": pieces}).inputs["input_ids"]
    with torch.no_grad():
        whole = teacher(tokens).logits.log_softmax(-1)
    scores = [
        each[:, :-1].gather(-1, ids[:, 1:, None]).sum().item() for each, ids in ((logits, pieces), (whole, tokens))
    ]
    assert scores[0] >= scores[1]


def test_padding_and_packed_texts_change_nothing(case):
    teacher, _, reduced, _ = case
    small = live(teacher, reduced)
    rows = [encode(reduced, text)[:length] for text, length in ((TEXT, 30), (TEXTS[5], 20))]
    alone = [signals(small, {"input_ids": torch.tensor([row])})[0] for row in rows]
    for left in (False, True):
        padded = torch.zeros(2, 30, dtype=torch.long)
        mask = torch.zeros_like(padded)
        for index, row in enumerate(rows):
            chosen = slice(30 - len(row), 30) if left else slice(len(row))
            padded[index, chosen], mask[index, chosen] = torch.tensor(row), 1
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        batch = {"input_ids": padded, "attention_mask": mask} | ({"position_ids": positions} if left else {})
        found = signals(small, batch)
        for index, expected in enumerate(alone):
            assert torch.allclose(found[index][mask[index].bool()], expected, atol=1e-9)
    packed = small.inputs.retokenizer.retokenize(
        {
            "input_ids": torch.tensor([rows[0] + rows[1]]),
            "position_ids": torch.tensor([[*range(30), *range(len(rows[1]))]]),
        }
    )
    separate = [small.inputs.retokenizer.retokenize({"input_ids": torch.tensor([row])}) for row in rows]
    assert packed.inputs["input_ids"][0].tolist() == [
        token for each in separate for token in each.inputs["input_ids"][0].tolist()
    ]
    assert packed.inputs["position_ids"][0].tolist() == [
        at for each in separate for at in range(each.inputs["input_ids"].shape[1])
    ]


def test_a_capture_stores_the_same_distribution(case):
    teacher, _, reduced, _ = case
    pieces = torch.tensor([encode(reduced, TEXT)[:30]])
    small = with_vocabulary_of(teacher, reduced)
    outputs = TeacherRunner(small, Task.CAUSAL_LM, reduced).forward({"input_ids": pieces}, hidden_states=True)
    rows, positions = torch.zeros(30, dtype=torch.long), torch.arange(30)
    expected = signals(live(teacher, reduced), {"input_ids": pieces})[0]
    assert outputs.classes == expected.shape[-1]
    assert torch.allclose(outputs.logits_at(rows, positions).log_softmax(-1), expected, atol=1e-9)
    assert all(each.shape[:2] == pieces.shape for each in outputs.hidden_states)


def test_within_a_token_only_tokens_that_go_on_count():
    both = Retokenizer(kept_ids=[0, 1, 2], replacements={3: (0, 1), 4: (0, 1, 2), 5: (0, 2)}, size=6)
    batch = both.retokenize({"input_ids": torch.tensor([[1, 0, 1, 2, 0, 2]])})
    assert batch.inputs["input_ids"].tolist() == [[1, 4, 5]] and batch.positions.tolist() == [[0, 0, 0, 1, 1, 2]]
    p = torch.tensor([0.1, 0.1, 0.1, 0.2, 0.3, 0.2])
    q = both.merge(p.log().expand(6, 6), batch.states[0]).exp()
    assert torch.allclose(q[0], torch.tensor([0.8, 0.1, 0.1]))
    assert torch.allclose(q[1] / q[1].sum(), torch.tensor([0.0, 0.5, 0.2]) / 0.7, atol=1e-6)
    assert torch.allclose(q[2] / q[2].sum(), torch.tensor([0.0, 0.0, 1.0]), atol=1e-6)
    assert math.isfinite(q.log().min())


def test_other_inputs_for_each_token_are_refused():
    both = Retokenizer(kept_ids=[0, 1], replacements={2: (0, 1)}, size=3)
    ids = torch.tensor([[0, 1]])
    with pytest.raises(TeacherError, match="token_type_ids"):
        both.retokenize({"input_ids": ids, "token_type_ids": ids})
    with pytest.raises(TeacherError, match="attention_mask"):
        both.retokenize({"input_ids": ids, "attention_mask": torch.ones(1, 2, 2)})
