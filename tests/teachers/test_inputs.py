"""A teacher that is a copy of the student teaches it nothing new, whatever the batch's conventions are, or is an error."""

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
    ViTImageProcessor,
    default_data_collator,
)

from hf_guide import DistillationTrainer
from hf_guide.errors import HfGuideError, TeacherError, VocabularyError
from hf_guide.models.token_rows import select_token_rows
from tests.distillation.small import model_for
from tests.distillation.test_trainer import arguments

BEGIN, END, PAD, NEW, WORDS = 0, 2, 1, 3, [f"w{number}" for number in range(40)]
TOKENS = ["<s>", "<pad>", "</s>", "<new>", "<mask>", *WORDS]


def tokenizer(pad: str = "<pad>", side: str = "right", **changes: Any) -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.WordLevel({token: number for number, token in enumerate(TOKENS)}, unk_token="<new>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.normalizer = normalizers.Lowercase() if changes.pop("lower", True) else None
    raw.add_special_tokens([AddedToken(token, special=True) for token in TOKENS[:5]])
    ends = [("<s>", BEGIN), ("</s>", END)]
    template = changes.pop("template", "<s> $A </s>")
    raw.post_processor = processors.TemplateProcessing(
        single=template, pair=f"{template} $B:1 </s>:1", special_tokens=ends
    )
    own = {"bos_token": "<s>", "eos_token": "</s>", "cls_token": "<s>", "sep_token": "</s>", "mask_token": "<mask>"}
    own |= {"unk_token": "<new>", "pad_token": pad, "padding_side": side}
    return PreTrainedTokenizerFast(tokenizer_object=raw, **(own | changes))


COMMON = {"vocab_size": len(TOKENS), "pad_token_id": PAD, "bos_token_id": BEGIN, "eos_token_id": END, "num_labels": 3}
WIDTHS = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
DROPLESS = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "max_position_embeddings": 40}
LLAMA = {**WIDTHS, "num_key_value_heads": 1, "head_dim": 8}
GPT2 = {
    "n_embd": 16,
    "n_layer": 1,
    "n_head": 2,
    "n_positions": 40,
    "attn_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "resid_pdrop": 0.0,
}
OPT = {"hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "word_embed_proj_dim": 16}
OPT |= {"max_position_embeddings": 40, "dropout": 0.0, "init_std": 0.3}
BART = {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
}
BART |= {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "dropout": 0.0, "decoder_start_token_id": END, "init_std": 0.3}
BART |= {"max_position_embeddings": 40, "forced_eos_token_id": None}
T5 = {
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 1,
    "num_decoder_layers": 1,
    "num_heads": 2,
    "dropout_rate": 0.0,
}
T5 |= {"decoder_start_token_id": PAD}
KINDS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": LLAMA,
    "GPT2LMHeadModel": GPT2,
    "OPTForCausalLM": OPT,
    "BertForMaskedLM": WIDTHS | DROPLESS,
    "RobertaForMaskedLM": WIDTHS | DROPLESS,
    "T5ForConditionalGeneration": T5,
    "BartForConditionalGeneration": BART,
    "MBartForConditionalGeneration": BART,
    "LlamaForSequenceClassification": LLAMA,
    "GPT2ForSequenceClassification": GPT2,
    "BertForSequenceClassification": WIDTHS | DROPLESS,
    "RobertaForSequenceClassification": WIDTHS | DROPLESS,
    "BartForSequenceClassification": BART,
    "T5ForSequenceClassification": T5,
    "RobertaForTokenClassification": WIDTHS | DROPLESS,
    "LlamaForTokenClassification": LLAMA,
}
SHIFTED_BY_LEFT_PADDING = ("GPT2", "Bert", "Bart", "MBart")


def model(kind: str, **changes: Any) -> Any:
    cls = getattr(transformers, kind)
    torch.manual_seed(0)
    spread = {} if kind.startswith(("Bart", "MBart", "OPT", "T5")) else {"initializer_range": 0.3}
    return cls(cls.config_class(**(COMMON | KINDS[kind] | spread | changes))).eval()


def saved(original: Any, folder: Path, processor: Any) -> str:
    """Save a copy of a model in a folder of its own, with its processor."""
    original.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def examples(kind: str, tok: Any, count: int = 8) -> list[dict[str, Any]]:
    draw = np.random.default_rng(1)
    made = []
    for _ in range(count):
        words = [str(draw.choice(WORDS)) for _ in range(draw.integers(2, 9))]
        ids = tok(" ".join(words)).input_ids
        example: dict[str, Any] = {"input_ids": ids, "attention_mask": [1] * len(ids)}
        if "SequenceClass" in kind:
            example["labels"] = int(draw.integers(3))
        elif "TokenClass" in kind:
            example["labels"] = [int(draw.integers(3)) for _ in ids]
        elif "ConditionalGen" in kind:
            example["labels"] = ids[: draw.integers(2, 6)] + [END]
        else:
            example["labels"] = list(ids)
        made.append(example)
    return made


def collator(kind: str, tok: Any, student: Any = None) -> Any:
    if "SequenceClass" in kind:
        return DataCollatorWithPadding(tok)
    if "ConditionalGen" in kind:
        return DataCollatorForSeq2Seq(tok, model=student)
    return DataCollatorForTokenClassification(tok)


def trainer_of(tmp_path: Path, student: Any, teacher: Any, data: Any, collate: Any, processing_class: Any) -> Any:
    args = arguments(tmp_path / "out", losses="kd", learning_rate=0.0, max_steps=1, per_device_eval_batch_size=4)
    return DistillationTrainer(student, args, collate, data, data, processing_class=processing_class, teacher=teacher)


def assert_nothing_to_learn(trainer: Any) -> None:
    for trained in (False, True):  # Trainer aligns the student's special tokens when training begins
        if trained:
            trainer.train()
        found = trainer.evaluate()
        assert abs(found["eval_kd"]) < 1e-6 and found["eval_teacher_agreement"] == 1.0, (trained, found)
        assert math.isfinite(found["eval_ce"])


@pytest.mark.sampled(4)
@pytest.mark.parametrize("pad", ["<pad>", "<new>", pytest.param("</s>", marks=pytest.mark.slow)])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_has_nothing_to_teach_whatever_pads_and_where(kind: str, side: str, pad: str, tmp_path: Path) -> None:
    student = model(kind)
    teacher = saved(student, tmp_path / "teacher", tokenizer())
    tok = tokenizer(pad, side)  # the user's
    trainer = trainer_of(tmp_path, student, teacher, examples(kind, tok), collator(kind, tok), tok)
    if side == "left" and kind.startswith(SHIFTED_BY_LEFT_PADDING):
        with pytest.raises(
            TeacherError, match="padded on the left, and the teacher .* counts positions from the start"
        ):
            trainer.evaluate()
    elif side == "left" and kind.startswith("Roberta") and pad != "<pad>":
        with pytest.raises(TeacherError, match="padded on the left with the token [23], and the student .* token 1"):
            trainer.evaluate()
    elif pad == "</s>" and kind in ("BartForSequenceClassification", "T5ForSequenceClassification"):
        with pytest.raises(ValueError, match="same number of <eos> tokens"):  # of the student itself, as in Trainer
            trainer.evaluate()
    else:
        assert_nothing_to_learn(trainer)


@pytest.mark.parametrize("kind", ["LlamaForSequenceClassification", "GPT2ForSequenceClassification"])
def test_a_text_that_ends_in_the_teachers_padding_is_an_error(kind: str, tmp_path: Path) -> None:
    student = model(kind, pad_token_id=END)
    teacher = saved(student, tmp_path / "teacher", tokenizer("</s>"))
    tok = tokenizer("<new>")
    trainer = trainer_of(tmp_path, student, teacher, examples(kind, tok), collator(kind, tok), tok)
    with pytest.raises(TeacherError, match=r"end with the token 2, .*pad_token_id=2.*pad_token_id=3"):
        trainer.train()


@pytest.mark.parametrize("given", ["labels", "by the collator"])
@pytest.mark.parametrize("kind", ["T5ForConditionalGeneration", "BartForConditionalGeneration"])
def test_each_decoder_begins_with_its_own_token(kind: str, given: str, tmp_path: Path) -> None:
    original = model(kind)
    teacher = saved(original, tmp_path / "teacher", tokenizer())
    student = model(kind, decoder_start_token_id=NEW)
    tok, data = tokenizer(), examples(kind, tokenizer())
    collate = collator(kind, tok, student if given != "labels" else None)
    trainer = trainer_of(tmp_path, student, teacher, data, collate, tok)
    found = trainer.evaluate()
    with torch.no_grad():
        batches = [DataCollatorForSeq2Seq(tok)(copy.deepcopy(data[start : start + 4])) for start in (0, 4)]
        losses = [original(**batch).loss * (batch["labels"] != -100).sum() for batch in batches]
        items = sum(int((batch["labels"] != -100).sum()) for batch in batches)
    assert found["eval_teacher_ce"] == pytest.approx(float(sum(losses)) / items, rel=1e-5)
    assert found["eval_kd"] > 1e-4
    for example in data:
        example["decoder_input_ids"] = [9] * len(example["labels"])  # neither's
    with pytest.raises(TeacherError, match=r"decoder_start_token_id, 3, and that of the teacher .* is [12]\."):
        trainer_of(tmp_path, student, teacher, data[:1], default_data_collator, tok).evaluate()


def test_padding_that_the_teacher_has_no_row_for_is_its_own(tmp_path: Path) -> None:
    student = model("LlamaForSequenceClassification")
    teacher = saved(student, tmp_path / "teacher", tokenizer())
    tok = tokenizer()
    tok.add_special_tokens({"pad_token": "<added>"})
    student.resize_token_embeddings(len(tok), mean_resizing=False)
    data = examples("LlamaForSequenceClassification", tok)
    assert_nothing_to_learn(trainer_of(tmp_path, student, teacher, data, DataCollatorWithPadding(tok), tok))


# Tokenizers


@pytest.mark.parametrize(
    "kind", ["LlamaForCausalLM", "BertForSequenceClassification", "RobertaForTokenClassification"]
)
@pytest.mark.parametrize(
    "changes",
    [{"lower": False}, {"template": "$A </s>"}],
    ids=["case", "beginning"],
)
def test_other_tokens_of_the_same_text_are_errors(kind: str, changes: dict[str, Any], tmp_path: Path) -> None:
    student, tok = model(kind), tokenizer()
    teacher = saved(student, tmp_path / "teacher", tokenizer(**changes))
    with pytest.raises(TeacherError, match="make other tokens of the same text: of .* and, for the teacher,"):
        trainer_of(tmp_path, student, teacher, examples(kind, tok), collator(kind, tok), tok)


@pytest.mark.parametrize("low", [True, False])
def test_the_setting_that_differs_is_named(low: bool, tmp_path: Path) -> None:
    student = model("BertForSequenceClassification")
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    cased = transformers.BertTokenizer.from_pretrained(tmp_path, do_lower_case=False)
    teacher, tok = saved(student, tmp_path / "teacher", cased), cased
    if low:
        tok = transformers.BertTokenizer.from_pretrained(tmp_path, do_lower_case=True)
    data = [{"input_ids": [2, 9, 10, 3], "labels": 1}] * 2
    if low:
        with pytest.raises(TeacherError, match="do_lower_case is True there and False for the teacher"):
            trainer_of(tmp_path, student, teacher, data, DataCollatorWithPadding(tok), tok)
    else:
        assert_nothing_to_learn(trainer_of(tmp_path, student, teacher, data, DataCollatorWithPadding(tok), tok))


def test_an_end_that_the_user_adds_to_texts_is_no_other_convention(tmp_path: Path) -> None:
    student, tok = model("LlamaForCausalLM"), tokenizer()
    teacher = saved(student, tmp_path / "teacher", tokenizer(template="<s> $A"))
    data = examples("LlamaForCausalLM", tok)
    assert_nothing_to_learn(trainer_of(tmp_path, student, teacher, data, collator("LlamaForCausalLM", tok), tok))


@pytest.mark.parametrize(("tokenizer_class", "language"), [("MBartTokenizer", "ro_RO"), ("NllbTokenizer", "fra_Latn")])
def test_a_script_chooses_the_language_of_its_texts(tokenizer_class: str, language: str, tmp_path: Path) -> None:
    tok = getattr(transformers, tokenizer_class)()
    ids = {f"{name}_token_id": getattr(tok, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    student = model("MBartForConditionalGeneration", vocab_size=len(tok), **ids)
    teacher = saved(student, tmp_path / "teacher", tok)
    tok.src_lang = language
    data = [dict(tok("a")) | {"labels": [5, 6, tok.eos_token_id]}] * 8
    collate = collator("MBartForConditionalGeneration", tok, student)
    assert_nothing_to_learn(trainer_of(tmp_path, student, teacher, data, collate, tok))


def reversed_tokenizer(tokens: list[str]) -> PreTrainedTokenizerFast:
    raw = Tokenizer(
        models.WordLevel({token: number for number, token in enumerate(reversed(tokens))}, unk_token="<new>")
    )
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>")


def test_classifiers_of_other_vocabularies_are_errors(tmp_path: Path) -> None:
    student, tok = model("BertForSequenceClassification"), tokenizer()
    teacher = saved(student, tmp_path / "teacher", reversed_tokenizer([*TOKENS[:-1], "another"]))
    with pytest.raises(VocabularyError, match="token 0 is '<s>' to the student"):
        trainer_of(tmp_path, student, teacher, examples(student.__class__.__name__, tok), None, tok)


def test_a_classifier_with_the_same_tokens_in_another_order_is_read_by_its_own_ids(tmp_path: Path) -> None:
    student, tok = model("BertForSequenceClassification"), tokenizer()
    permuted = select_token_rows(student, list(range(len(TOKENS)))[::-1])
    teacher = saved(permuted, tmp_path / "teacher", reversed_tokenizer(TOKENS))
    data = examples("BertForSequenceClassification", tok)
    assert_nothing_to_learn(trainer_of(tmp_path, student, teacher, data, DataCollatorWithPadding(tok), tok))


def test_pairs_without_token_types_are_errors_where_the_teacher_has_them(tmp_path: Path) -> None:
    kind = "BertForSequenceClassification"
    student, tok = model(kind), tokenizer(model_input_names=["input_ids", "attention_mask"])
    teacher = saved(student, tmp_path / "teacher", tokenizer(model_input_names=["input_ids", "token_type_ids"]))
    single = [{"input_ids": tok("w1 w2").input_ids, "labels": 0}]
    assert (
        abs(trainer_of(tmp_path, student, teacher, single, DataCollatorWithPadding(tok), tok).evaluate()["eval_kd"])
        < 1e-6
    )
    pair = [dict(tok("w1 w2", "w3")) | {"labels": 0}]
    with pytest.raises(TeacherError, match="pairs of texts without token_type_ids"):
        trainer_of(tmp_path, student, teacher, pair, DataCollatorWithPadding(tok), tok).evaluate()
    typed = [dict(tok("w1 w2", "w3", return_token_type_ids=True)) | {"labels": 0}]
    assert (
        abs(trainer_of(tmp_path, student, teacher, typed, DataCollatorWithPadding(tok), tok).evaluate()["eval_kd"])
        < 1e-6
    )


@pytest.mark.parametrize("kind", ["GPT2LMHeadModel", "RobertaForMaskedLM", "LlamaForCausalLM"])
def test_a_text_longer_than_the_teacher_reads_is_an_error(kind: str, tmp_path: Path) -> None:
    student, tok = model(kind), tokenizer()
    short = {"n_positions": 6} if kind.startswith("GPT2") else {"max_position_embeddings": 6}
    teacher = saved(model(kind, **short), tmp_path / "teacher", tok)
    longest = 4 if kind.startswith("Roberta") else 6
    data = [{"input_ids": [9] * length, "labels": [9] * length} for length in (longest, longest + 1)]
    trainer_of(tmp_path, student, teacher, data[:1], default_data_collator, tok).evaluate()
    with pytest.raises(TeacherError, match=f"of {longest + 1} tokens, and the teacher .* reads at most {longest}"):
        trainer_of(tmp_path, student, teacher, data[1:], default_data_collator, tok).evaluate()


def test_texts_that_lie_end_to_end_are_as_long_as_each(tmp_path: Path) -> None:
    teacher = model("LlamaForCausalLM", max_position_embeddings=6)
    flat = {"input_ids": [9] * 12, "labels": [9] * 12, "position_ids": [*range(6), *range(6)]}
    trainer_of(tmp_path, model("LlamaForCausalLM"), teacher, [flat], default_data_collator, None).evaluate()
    flat["position_ids"] = [*range(7), *range(5)]
    with pytest.raises(TeacherError, match="of 7 tokens, and the teacher .* reads at most 6"):
        trainer_of(tmp_path, model("LlamaForCausalLM"), teacher, [flat], default_data_collator, None).evaluate()


def test_another_mask_is_an_error(tmp_path: Path) -> None:
    student, tok = model("BertForMaskedLM"), tokenizer(mask_token="<new>")
    teacher = saved(student, tmp_path / "teacher", tokenizer())
    with pytest.raises(TeacherError, match="masked with '<new>', and the teacher .* expects '<mask>'"):
        trainer_of(tmp_path, student, teacher, examples("BertForMaskedLM", tok), collator("BertForMaskedLM", tok), tok)


# Images

STUDENTS_OWN = {"size": {"height": 8, "width": 8}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
EXACT: list[dict[str, Any]] = [
    {},
    {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]},
    {"rescale_factor": 1 / 127.5},
    {"do_normalize": False},
    {"do_rescale": False},
    {"image_mean": 0.4, "image_std": 0.3},
]
OTHERWISE: list[tuple[dict[str, Any], str]] = [
    ({"size": {"height": 16, "width": 16}}, "size is .*8.* there and .*16.* for the teacher"),
    ({"resample": 0}, "resample is .* there and 0 for the teacher"),
    ({"do_resize": False}, "do_resize is True there and False for the teacher"),
]


def image_trainer(tmp_path: Path, changes: dict[str, Any], *, known: bool = True) -> tuple[Any, Any]:
    student = model_for("image-classification", 0)
    own, mine = ViTImageProcessor(**(STUDENTS_OWN | changes)), ViTImageProcessor(**STUDENTS_OWN)
    teacher = saved(student, tmp_path / "teacher", own)
    draw = np.random.default_rng(0)
    images = [draw.integers(0, 256, (11, 9, 3), dtype=np.uint8) for _ in range(8)]
    data = [{"pixel_values": mine(each, return_tensors="pt")["pixel_values"][0], "labels": 1} for each in images]
    trainer = trainer_of(tmp_path, student, teacher, data, default_data_collator, mine if known else None)
    with torch.no_grad():
        truth = student.eval()(**own(images, return_tensors="pt")).logits
    return trainer, truth


@pytest.mark.parametrize("changes", EXACT)
def test_pixels_reach_the_teacher_as_its_own_processor_makes_them(changes: dict[str, Any], tmp_path: Path) -> None:
    trainer, truth = image_trainer(tmp_path, changes)
    expected = torch.nn.functional.cross_entropy(truth, torch.ones(8, dtype=torch.long))
    assert trainer.evaluate()["eval_teacher_ce"] == pytest.approx(float(expected), rel=1e-4)
    if not changes:
        assert trainer.teachers[0].inputs.pixels is None
        assert_nothing_to_learn(trainer)


@pytest.mark.parametrize(("changes", "message"), OTHERWISE)
def test_pixels_that_cannot_be_converted_are_errors(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match=message):
        image_trainer(tmp_path, changes)


def test_what_is_not_known_to_agree_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    image_trainer(tmp_path, {}, known=False)
    assert "Pass processing_class, so that they are compared" in caplog.text


# Labels


def test_a_teacher_of_another_kind_of_problem_is_an_error(tmp_path: Path) -> None:
    student = model("BertForSequenceClassification", problem_type="single_label_classification")
    teacher = model("BertForSequenceClassification", problem_type="multi_label_classification")
    with pytest.raises(HfGuideError, match="single_label_classification.*multi_label_classification"):
        trainer_of(tmp_path, student, teacher, None, None, None)


def test_a_dataset_without_an_example_is_an_error(tmp_path: Path) -> None:
    args, student = arguments(tmp_path / "out"), model("LlamaForCausalLM")
    for train, evaluated in (([], None), ([1], []), ([1], {"one": [1], "other": []})):
        with pytest.raises(HfGuideError, match=r"_dataset.* is empty"):
            DistillationTrainer(student, args, None, train, evaluated, teacher=model("LlamaForCausalLM"))
