"""Laws of a smaller vocabulary: on text of kept pieces student and teacher are the same function; every text still encodes."""

import math
import random

import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

from hf_guide import InitializationReport, find_shapes, from_teacher
from hf_guide.calibration.vocabulary import VocabularyReducer
from hf_guide.errors import OptionError, ShapeError, VocabularyError
from hf_guide.models.piece_ranking import rank_pieces
from hf_guide.models.token_rows import attached_tokenizer, select_token_rows, translate_token_ids
from hf_guide.models.tokenizer_reduction import reduce_tokenizer, tokenizer_spec
from hf_guide.shapes.scoring import CalibratedScorer
from tests.sentence_folder import sentence_folder
from tests.small_tokenizers import KINDS, TEXTS
from tests.tiny import KINDS as TINY_KINDS
from tests.tiny import run_python, same_bits

CHOSEN = TEXTS[::2]
FRAGMENTS = [
    " ".join(words[start : start + 2]) for words in map(str.split, TEXTS) for start in range(0, len(words), 2)
]


@pytest.fixture(scope="module", params=KINDS)
def case(request, tmp_path_factory):
    """Return a kind, its teacher with tokenizer and folder, and a student with half of the removable pieces, loaded again."""
    kind, folder = KINDS[request.param], tmp_path_factory.mktemp("teacher")
    teacher, tokenizer = kind.teacher(folder)
    reducer = VocabularyReducer(tokenizer, CHOSEN)
    size = (reducer.min_size + reducer.max_size) // 2
    student = from_teacher(folder, vocab_size=size, method="uniform", calibration_dataset=CHOSEN, show_progress=False)
    saved = tmp_path_factory.mktemp("student")
    student.save_pretrained(saved)
    return (
        kind,
        teacher,
        tokenizer,
        type(student).from_pretrained(saved).eval(),
        AutoTokenizer.from_pretrained(saved),
        saved,
    )


def pieces(tokenizer, text):
    return tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])


def random_texts(count=60):
    draw = random.Random(0)
    letters = [chr(code) for code in (*range(32, 127), *range(0xC0, 0x180), 0x4E2D, 0x6587, 0x1F642, 0x0301, 0x200B)]
    words = " ".join(TEXTS).split()
    return ["".join(draw.choices(letters, k=30)) for _ in range(count)] + [
        " ".join(draw.choices(words, k=8)) for _ in range(count)
    ]


@pytest.mark.sampled(4)
def test_student_computes_the_teachers_logits_on_kept_pieces(case):
    _, teacher, tokenizer, student, reduced, _ = case
    kept = [tokenizer.get_vocab()[token] for token, _ in sorted(reduced.get_vocab().items(), key=lambda pair: pair[1])]
    checked = 0
    for text in FRAGMENTS:
        if checked > 100 or not set(tokenizer(text)["input_ids"]) <= set(kept):
            continue
        assert pieces(reduced, text) == pieces(tokenizer, text)
        checked += 1
        if checked > 6:
            continue
        inputs = [each(text, return_tensors="pt", truncation=True, max_length=30) for each in (tokenizer, reduced)]
        if teacher.config.is_encoder_decoder:
            inputs = [{**each, "decoder_input_ids": each["input_ids"]} for each in inputs]
        with torch.no_grad():
            expected, logits = teacher(**inputs[0]).logits[..., kept], student(**inputs[1]).logits
        assert torch.allclose(logits, expected, atol=1e-6 * float(expected.abs().max()))
    assert checked > 6


def test_vocabulary_is_smaller_and_states_what_it_costs(case):
    _, teacher, tokenizer, student, reduced, saved = case
    facts = InitializationReport.load(saved).vocabulary
    assert student.config.vocab_size == len(reduced) == facts["size"] < len(tokenizer) == facts["teacher_size"]
    assert facts["held_out"] and 0.5 < facts["share_kept"] < 1 < facts["token_ratio"] < 2
    assert (
        f"Vocabulary: {len(reduced)} of the teacher's {len(tokenizer)}" in InitializationReport.load(saved).summary()
    )
    assert type(reduced) is type(tokenizer)
    assert InitializationReport.load(saved).teacher_parameters == teacher.num_parameters()


def test_special_tokens_and_settings_are_kept(case):
    _, teacher, tokenizer, student, reduced, _ = case
    assert reduced.all_special_tokens == tokenizer.all_special_tokens
    assert reduced.get_added_vocab().keys() == tokenizer.get_added_vocab().keys()
    assert reduced.chat_template == tokenizer.chat_template
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": "a file"}]
        texts = [each.apply_chat_template(messages, tokenize=False) for each in (tokenizer, reduced)]
        assert texts[0] == texts[1] and pieces(reduced, texts[0])[1] == "<|user|>"
    for name in ("bos", "eos", "pad", "decoder_start", "mask"):
        configs = [(teacher.config, student.config)]
        configs += [(teacher.generation_config, student.generation_config)] if teacher.can_generate() else []
        for old, new in configs:
            index = getattr(old, f"{name}_token_id", None)
            expected = None if index is None else tokenizer.convert_ids_to_tokens(index)
            found = getattr(new, f"{name}_token_id", None)
            assert (None if found is None else reduced.convert_ids_to_tokens(found)) == expected
    specs = [tokenizer_spec(each) for each in (tokenizer, reduced)]
    assert [spec["truncation"] for spec in specs][0] == specs[1]["truncation"]


def test_every_text_still_encodes(case):
    kind, _, tokenizer, _, reduced, _ = case
    for text in random_texts():
        old, new = (each(text, add_special_tokens=False)["input_ids"] for each in (tokenizer, reduced))
        if kind.bytes:
            assert reduced.decode(new) == tokenizer.decode(old)
        unknown = tokenizer.unk_token_id
        if unknown is not None and unknown not in old:
            assert reduced.unk_token_id not in new


WRITTEN = [
    *(
        "hello world",
        " a space before",
        "   three",
        "two  spaces   three ",
        "ends in spaces  ",
        " ",
        "   ",
        "a\nb\n\nc",
        "\ta\t b",
    ),
    *(
        "a file \N{SLIGHTLY SMILING FACE}\N{WOMAN}\u200d\N{WOMAN} 5 \N{EURO SIGN}",
        "e\u0301te\u0301 a\u0308",
        "日本 語 中文",
    ),
    *("don't . stop , it 's", "x_y __z__ ▁ ▁▁a", "## a ##b <0x41>"),
]
WITHOUT_SPACES = {"a word": ["the"], "words": ["thestudent", "teacher"], "Chinese": ["学生模型", "教師"]}


@pytest.mark.sampled(12)
@pytest.mark.parametrize("chosen", ["text", *WITHOUT_SPACES])
@pytest.mark.parametrize("name", KINDS)
def test_every_text_decodes_as_with_all_pieces(name, chosen, tmp_path):
    KINDS[name].make().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    reducer = VocabularyReducer(tokenizer, WITHOUT_SPACES.get(chosen, CHOSEN))
    for size in (reducer.min_size, (reducer.min_size + reducer.max_size) // 2):
        reduced = reducer.reduce(size).tokenizer
        for text in WRITTEN:
            ids = [each(text, add_special_tokens=False)["input_ids"] for each in (tokenizer, reduced)]
            assert reduced.decode(ids[1]) == tokenizer.decode(ids[0]), (size, text)


BYTE_PIECES = {f"<0x{byte:02X}>": byte for byte in range(256)}
REPLACE = {"type": "Replace", "pattern": {"String": "_"}, "content": " "}
FALLBACK = {"type": "ByteFallback"}


@pytest.mark.parametrize(
    ("parts", "kept"),
    [
        ([FALLBACK], set()),
        ([REPLACE, FALLBACK], {"_"}),
        ([FALLBACK, {"type": "Fuse"}, REPLACE], set()),  # it maps the character of joined bytes, too
        ([{**REPLACE, "pattern": {"Regex": "[_é]"}}, FALLBACK], {"_", "é"}),
        ([FALLBACK, {"type": "Metaspace", "replacement": "_", "prepend_scheme": "never", "split": True}], set()),
        ([REPLACE], {"_", "é", "b"}),  # bytes are not joined
    ],
    ids=["nothing", "a replacement", "a later replacement", "an expression", "Metaspace", "no bytes"],
)
@pytest.mark.parametrize("kind", ["BPE", "Unigram"])
def test_characters_that_the_decoder_maps_before_it_joins_bytes_are_kept(kind, parts, kept):
    pieces = [*BYTE_PIECES, "<unk>", "_", "é", "b", "_b"]
    model = {"type": kind, "byte_fallback": True, "vocab": {piece: index for index, piece in enumerate(pieces)}}
    model |= {"merges": [["_", "b"]], "unk_token": "<unk>"}
    if kind == "Unigram":
        scores = [-9.0 if piece == "<unk>" else -1.0 for piece in pieces]
        model = {**model, "unk_id": 256, "vocab": [list(each) for each in zip(pieces, scores, strict=True)]}
    ranking = rank_pieces({"model": model, "decoder": {"type": "Sequence", "decoders": parts}}, {})
    assert {pieces[index] for index in ranking.required} == {*BYTE_PIECES, "<unk>", *kept}


def test_every_kept_piece_of_merges_is_reached(case):
    _, _, tokenizer, _, reduced, _ = case
    spec, whole = tokenizer_spec(reduced), tokenizer_spec(tokenizer)
    if spec["model"]["type"] != "BPE":
        return
    results = [{"".join(merge) for merge in each["model"]["merges"]} for each in (whole, spec)]
    assert results[1] == results[0] & spec["model"]["vocab"].keys()


@pytest.mark.slow
def test_student_loads_in_a_fresh_process_that_does_not_have_the_package(tmp_path):
    folder, saved = tmp_path / "teacher", tmp_path / "student"
    KINDS["Gemma BPE"].teacher(folder)
    student = from_teacher(folder, vocab_size=500, calibration_dataset=CHOSEN, show_progress=False)
    student.save_pretrained(saved)
    ids = attached_tokenizer(student)(TEXTS[3])["input_ids"]
    found = run_python(
        """
        import sys
        from transformers import AutoModelForCausalLM, AutoTokenizer
        sys.modules["hf_guide"] = None
        tokenizer, model = AutoTokenizer.from_pretrained(sys.argv[1]), AutoModelForCausalLM.from_pretrained(sys.argv[1])
        print(tokenizer(sys.argv[2])["input_ids"], model.config.vocab_size, type(tokenizer).__name__)
        """,
        saved,
        TEXTS[3],
    )
    assert found.strip() == f"{ids} 500 GemmaTokenizer"


# Methods, and what is refused


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    return (*KINDS["byte-level BPE"].teacher(folder), folder)


@pytest.mark.parametrize("method", ["guide", "calibrated", "random"])
def test_every_method_makes_a_student_with_fewer_pieces(llama, method):
    teacher, _, folder = llama
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "vocab_size": 400}
    source = teacher if method == "guide" else folder
    rows = [{"text": text} for text in CHOSEN]
    student = from_teacher(source, **sizes, method=method, calibration_dataset=rows, show_progress=False)
    tokenizer = attached_tokenizer(student)
    assert student.config.vocab_size == len(tokenizer) == 400 == student.initialization_report.vocabulary["size"]
    assert student(**tokenizer(TEXTS[0], return_tensors="pt")).logits.shape[-1] == 400
    assert teacher.config.vocab_size > 700  # untouched


SMALL_DATA = {"calibration_tokens": 256, "calibration_seq_length": 32, "calibration_batch_size": 2}


@pytest.mark.parametrize("method", ["guide", {"method": "calibrated", **SMALL_DATA}])
def test_a_budget_is_spent_on_the_sizes_besides_the_vocabulary(llama, method):
    options = {"method": method, "vocab_size": 400, "calibration_dataset": CHOSEN, "show_progress": False}
    shape = find_shapes(llama[2], num_parameters="50%", limit=2, **options)[0]
    student = from_teacher(llama[2], **options, **shape.overrides)
    target = 0.5 * llama[0].num_parameters()
    assert student.num_parameters() == shape.parameters and abs(shape.parameters - target) <= 0.02 * target
    assert student.config.vocab_size == len(attached_tokenizer(student)) == 400
    if method == "guide":
        chosen = from_teacher(llama[2], num_parameters="50%", **options)
        assert same_bits(chosen, student) and shape.describe() in chosen.initialization_report.shape_choice


def test_the_vocabulary_with_the_fewest_bits_per_byte_is_taken(llama, monkeypatch, tmp_path):
    tried = {}

    def bits(scorer, candidate, tokenizer):
        text = [tokenizer.decode(row["input_ids"][0]) for row in scorer.held_out]
        tried[len(tokenizer)] = measured(scorer, candidate, tokenizer), text, scorer.num_tokens
        return abs(len(tokenizer) - 460)

    measured = CalibratedScorer.bits_per_byte
    monkeypatch.setattr(CalibratedScorer, "bits_per_byte", bits)
    method = {"method": "calibrated", **SMALL_DATA}
    options = {"method": method, "num_parameters": "50%", "calibration_dataset": CHOSEN, "show_progress": False}
    student = from_teacher(llama[2], vocab_size="auto", calibration_cache_dir=tmp_path, **options)
    assert list(tried) == [702, 468, 351] and 0 < tried[468][0] < 20  # the smallest left is worse than 468, too
    assert tried[702][2] == 256 < tried[468][2] < tried[351][2]
    assert student.config.vocab_size == len(attached_tokenizer(student)) == 468
    assert abs(student.num_parameters() / llama[0].num_parameters() - 0.5) < 0.01
    assert "vocab_size=468" in student.initialization_report.shape_choice


@pytest.mark.sampled(1)
@pytest.mark.parametrize("size", [702, 706, "auto"], ids=["no padded rows", "fewer of them", "auto"])
def test_a_search_takes_a_size_that_differs_in_padded_rows_alone(llama, monkeypatch, size):
    teacher, tokenizer, folder = llama
    assert teacher.config.vocab_size == 710 and len(tokenizer) == 702
    # The largest vocabulary is the best, which leaves out padded rows alone.
    monkeypatch.setattr(CalibratedScorer, "bits_per_byte", lambda scorer, candidate, tokenizer: -len(tokenizer))
    monkeypatch.setitem(find_shapes.__kwdefaults__, "limit", 2)
    data = {"method": {"method": "calibrated", **SMALL_DATA}, "calibration_dataset": CHOSEN}
    student = from_teacher(folder, vocab_size=size, num_parameters="50%", show_progress=False, **data)
    assert student.config.vocab_size == (702 if size == "auto" else size)
    assert abs(student.num_parameters() / teacher.num_parameters() - 0.5) < 0.01
    assert attached_tokenizer(student) is None and not student.initialization_report.vocabulary


def test_bits_per_byte_are_the_loss_of_the_text_by_its_bytes(llama, monkeypatch):
    scorer = CalibratedScorer.__new__(CalibratedScorer)
    scorer.held_out = [{"input_ids": torch.tensor([llama[1]("a family é", add_special_tokens=False)["input_ids"]])}]
    monkeypatch.setattr(scorer, "_losses", lambda candidate, quick: [math.log(2)])
    ids = scorer.held_out[0]["input_ids"][0, 1:]
    assert scorer.bits_per_byte(None, llama[1]) == pytest.approx(len(ids) / len(llama[1].decode(ids).encode()))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("length", [0, 5])
def test_bits_per_byte_do_not_depend_on_padding(llama, monkeypatch, side, length):
    scorer = CalibratedScorer.__new__(CalibratedScorer)
    monkeypatch.setattr(scorer, "_losses", lambda candidate, quick: [math.log(2)])
    encoded = [llama[1](text, add_special_tokens=False)["input_ids"] for text in ("a family é", "the model of a file")]
    scorer.held_out = [{"input_ids": torch.tensor([ids])} for ids in encoded]
    expected = scorer.bits_per_byte(None, llama[1])
    longest = length + max(map(len, encoded))
    scorer.held_out = []
    for ids in encoded:
        missing, ones = longest - len(ids), [1] * len(ids)
        padding = [llama[1].pad_token_id] * missing
        both = [ids + padding, ones + [0] * missing] if side == "right" else [padding + ids, [0] * missing + ones]
        row = dict(zip(("input_ids", "attention_mask"), (torch.tensor([each]) for each in both), strict=True))
        scorer.held_out.append(row)
    assert scorer.bits_per_byte(None, llama[1]) == expected


def test_calibrated_fits_a_loaded_teacher_on_the_tokens_of_the_smaller_vocabulary(llama):
    teacher, _, folder = llama
    options = {"vocab_size": 400, "method": "calibrated", "calibration_dataset": CHOSEN, "show_progress": False}
    students = [from_teacher(source, **options) for source in (teacher, folder)]
    assert torch.equal(students[0].lm_head.weight, students[1].lm_head.weight)
    same = select_token_rows(teacher, _kept(llama[1], attached_tokenizer(students[0])))
    ids = attached_tokenizer(students[0])(TEXTS[1], return_tensors="pt")["input_ids"]
    assert torch.allclose(students[0](ids).logits, same(ids).logits, atol=1e-4)


def _kept(tokenizer, reduced):
    ids = tokenizer.get_vocab()
    return [ids[token] for token, _ in sorted(reduced.get_vocab().items(), key=lambda pair: pair[1])]


def test_conversations_choose_pieces_by_the_text_that_is_trained_on(llama):
    rows = [{"messages": [{"role": "user", "content": text}]} for text in CHOSEN]
    student = from_teacher(llama[2], vocab_size=400, calibration_dataset=rows, show_progress=False)
    assert student.initialization_report.vocabulary["share_kept"] > 0.6


def test_config_with_the_teachers_token_ids_is_translated(llama):
    teacher, tokenizer, folder = llama
    config = LlamaConfig(**{**teacher.config.to_dict(), "vocab_size": 400, "eos_token_id": tokenizer.vocab["<|end|>"]})
    student = from_teacher(folder, config, calibration_dataset=CHOSEN, show_progress=False)
    reduced = attached_tokenizer(student)
    assert reduced.convert_ids_to_tokens(student.config.eos_token_id) == "<|end|>"
    assert config.vocab_size == 400 and config.eos_token_id == tokenizer.vocab["<|end|>"]  # untouched


def test_a_score_made_of_the_logits_of_named_tokens_is_refused(tmp_path):
    KINDS["byte-level BPE"].teacher(tmp_path)
    sentence_folder(tmp_path, ("LogitScore", {"true_token_id": 90, "false_token_id": 20}), model_type="CrossEncoder")
    with pytest.raises(VocabularyError, match="true_token_id"):
        from_teacher(tmp_path, vocab_size=400, method="uniform", calibration_dataset=TEXTS, show_progress=False)


def test_padded_rows_alone_need_no_choice(llama):
    teacher, tokenizer, folder = llama
    student = from_teacher(folder, vocab_size=len(tokenizer), show_progress=False)
    assert attached_tokenizer(student) is None and not student.initialization_report.vocabulary


@pytest.mark.parametrize(
    ("dataset", "overrides", "error", "message"),
    [
        (None, {"vocab_size": 400}, ShapeError, "pass texts as calibration_dataset"),
        (CHOSEN, {"vocab_size": 100}, VocabularyError, r"vocab_size must be from 26\d .* to 702"),
        ([{"input_ids": [5, 6]}], {"vocab_size": 400}, OptionError, "not tokenized yet"),
        ("self_generated", {"vocab_size": 400}, OptionError, "found 'self_generated'"),
        (iter(CHOSEN), {"vocab_size": 400}, OptionError, "which is read once"),
        ({"train": CHOSEN}, {"vocab_size": 400}, OptionError, "found a dict"),
        (None, {"vocab_size": "auto", "num_parameters": "50%"}, OptionError, "must be a list of texts .* found None"),
        (7, {"vocab_size": "auto", "num_parameters": "50%"}, OptionError, "must be a list of texts .* found a int"),
        (CHOSEN, {"vocab_size": "auto"}, OptionError, "is chosen with the shape"),
        (CHOSEN, {"vocab_size": "auto", "num_parameters": "50%"}, OptionError, "set method='calibrated'"),
        (CHOSEN, {"vocab_size": 400, "eos_token_id": 3}, OptionError, "eos_token_id and vocab_size"),
        (["", ""], {"vocab_size": 400}, OptionError, "not one token"),
        (CHOSEN, {}, OptionError, "uses no data"),
        (None, {"vocab_size": 400, "num_parameters": "50%"}, ShapeError, "pass texts as calibration_dataset"),
    ],
    ids=[
        "no text",
        "too small",
        "tokenized",
        "self-generated",
        "iterator",
        "splits",
        "auto without text",
        "auto with a number",
        "auto",
        "auto by a rule",
        "special token",
        "empty",
        "no vocabulary",
        "budget",
    ],
)
def test_what_cannot_choose_a_vocabulary_is_refused(llama, dataset, overrides, error, message):
    with pytest.raises(error, match=message):
        from_teacher(llama[2], calibration_dataset=dataset, show_progress=False, **overrides)


@pytest.mark.parametrize("options", [{}, {"num_parameters": "50%"}], ids=["sizes", "budget"])
@pytest.mark.parametrize(
    ("size", "error", "message"),
    [
        (80, VocabularyError, "has no tokenizer, of which a vocabulary could be reduced: leave vocab_size out"),
        (97, OptionError, "uses no data: it would only choose a vocab_size below the teacher's; leave it out"),
    ],
)
def test_a_size_that_no_text_can_choose_is_refused_by_its_reason(size, error, message, options):
    teacher = TINY_KINDS["llama"].teacher()
    options = {"method": "guide", "show_progress": False, **options}
    with pytest.raises(error, match=message):
        from_teacher(teacher, vocab_size=size, calibration_dataset=CHOSEN, **options)


@pytest.mark.parametrize("size", [400.0, "400", True, "Auto"])
@pytest.mark.parametrize("options", [{}, {"num_parameters": "50%"}], ids=["sizes", "budget"])
def test_a_size_of_another_type_is_refused_by_its_name(llama, size, options):
    options = {"method": "guide", "show_progress": False, **options}
    for dataset in (CHOSEN, None):
        with pytest.raises(OptionError, match=f"vocab_size must be a whole number, .* found {size!r} "):
            from_teacher(llama[2], vocab_size=size, calibration_dataset=dataset, **options)


def test_tokenizers_of_other_kinds_are_refused():
    with pytest.raises(VocabularyError, match="must be a fast tokenizer"):
        tokenizer_spec(object())
    with pytest.raises(VocabularyError, match="'WordLevel'; a vocabulary can be reduced of BPE, Unigram, WordPiece"):
        rank_pieces({"model": {"type": "WordLevel", "vocab": {}}}, {})
    tokenizer = KINDS["WordPiece"].make()
    with pytest.raises(VocabularyError, match=r"'\[CLS\]' left out"):
        reduce_tokenizer(tokenizer, [*range(2), *range(3, 200)])


def test_a_slow_tokenizer_is_refused_by_from_teacher(llama, monkeypatch):
    monkeypatch.setattr(PreTrainedTokenizerFast, "is_fast", False)
    with pytest.raises(VocabularyError, match="cannot be changed: it must be a fast tokenizer"):
        from_teacher(llama[2], vocab_size=400, calibration_dataset=CHOSEN, show_progress=False)


# Parts


def test_larger_vocabularies_contain_smaller_ones_and_cover_more():
    reducer = VocabularyReducer(KINDS["Llama BPE"].make(), CHOSEN)
    sizes = (reducer.min_size, 350, 450, reducer.max_size)
    kept = [set(reducer.ranking.kept_ids(size)) for size in sizes]
    assert all(small < large for small, large in zip(kept, kept[1:], strict=False))
    ratios = [reducer.measure(size)["token_ratio"] for size in sizes]
    assert ratios == sorted(ratios, reverse=True) and ratios[-1] == 1.0


def test_pieces_that_a_text_uses_outlast_those_that_it_does_not():
    tokenizer = KINDS["byte-level BPE"].make()
    used = set(tokenizer("the family of the model", add_special_tokens=False)["input_ids"])
    reducer = VocabularyReducer(tokenizer, ["the family of the model"] * 3)
    assert used <= set(reducer.ranking.kept_ids(reducer.min_size + 25))


def test_generation_config_is_translated():
    config = GenerationConfig(
        eos_token_id=[2, 7],
        suppress_tokens=[3, 5],
        bad_words_ids=[[2, 3], [7]],
        pad_token_id=-1,
        forced_bos_token_id=7,
    )
    notes = translate_token_ids(config, {2: 0, 3: 1, 7: 2})
    assert (config.eos_token_id, config.suppress_tokens, config.bad_words_ids) == ([0, 2], [1], [[0, 1], [2]])
    assert (config.pad_token_id, config.forced_bos_token_id) == (-1, 2)
    assert notes == ["suppress_tokens names tokens that the smaller vocabulary does not have: they are left out."]
    with pytest.raises(VocabularyError, match="eos_token_id is 0"):
        translate_token_ids(config, {1: 0, 2: 1})
    with pytest.raises(VocabularyError, match="sequence_bias"):
        translate_token_ids(GenerationConfig(sequence_bias=[[[2], 1.0]]), {2: 0})
