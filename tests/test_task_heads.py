"""Heads: carried by the names of their labels, new where the teacher has none; for every task's Auto class."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from hf_guide import (
    AutoStudent,
    AutoStudentForImageClassification,
    AutoStudentForMaskedLM,
    AutoStudentForMultipleChoice,
    AutoStudentForObjectDetection,
    AutoStudentForSeq2SeqLM,
    AutoStudentForSequenceClassification,
    AutoStudentForTokenClassification,
    from_teacher,
)

LABELS = {0: "cat", 1: "dog", 2: "fish"}
TEXT = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
TEXT |= {"max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
IMAGE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 12, "patch_size": 4}
SEQ2SEQ = {"vocab_size": 60, "d_model": 32, "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 1}
T5 = SEQ2SEQ | {"d_kv": 8, "d_ff": 48, "num_layers": 3, "num_heads": 4}
BART = SEQ2SEQ | {"encoder_layers": 3, "decoder_layers": 3, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
MODERN = TEXT | {"cls_token_id": 1, "sep_token_id": 2}

SENTENCES = [
    ("BertForSequenceClassification", TEXT),
    ("RobertaForSequenceClassification", TEXT),
    (
        "DistilBertForSequenceClassification",
        {"vocab_size": 60, "dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 48},
    ),
    ("AlbertForSequenceClassification", TEXT | {"embedding_size": 16}),
    ("ModernBertForSequenceClassification", MODERN),
    ("LlamaForSequenceClassification", TEXT),
    ("GPT2ForSequenceClassification", {"vocab_size": 60, "n_embd": 32, "n_layer": 3, "n_head": 4, "pad_token_id": 0}),
    ("T5ForSequenceClassification", T5),
    ("BartForSequenceClassification", BART),
]
TOKENS = [
    ("BertForTokenClassification", TEXT),
    ("RobertaForTokenClassification", TEXT),
    ("DebertaV2ForTokenClassification", TEXT | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}),
    ("ModernBertForTokenClassification", MODERN),
    ("LlamaForTokenClassification", TEXT),
    ("T5ForTokenClassification", T5),
]
IMAGES = [
    ("ViTForImageClassification", IMAGE),
    ("DeiTForImageClassification", IMAGE),
    ("Dinov2ForImageClassification", IMAGE),
    ("BeitForImageClassification", IMAGE),
]
AUTO = {
    "ForSequenceClassification": AutoStudentForSequenceClassification,
    "ForTokenClassification": AutoStudentForTokenClassification,
    "ForImageClassification": AutoStudentForImageClassification,
}
EVERY = pytest.mark.parametrize(
    ("name", "config"), [*SENTENCES, *TOKENS, *IMAGES], ids=lambda value: value if isinstance(value, str) else ""
)


def build(name: str, config: dict[str, Any], seed: int = 0) -> PreTrainedModel:
    """Return a model whose parameters are all away from their defaults."""
    model_class = getattr(transformers, name)
    model = model_class(model_class.config_class(**config)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def save(name: str, config: dict[str, Any], folder: Path) -> PreTrainedModel:
    """Save a classifier of cats, dogs and fish, and return it."""
    model = build(name, config | {"id2label": LABELS})
    model.save_pretrained(folder)
    return model


def student_of(folder: Path, name: str, **options: Any) -> PreTrainedModel:
    auto = next(auto for task, auto in AUTO.items() if name.endswith(task))
    return auto.from_teacher(str(folder), show_progress=False, **options)


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    if "pixel_values" in model.main_input_name:
        return model(torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(1))).logits
    tokens = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(1))
    tokens[:, -1] = 2  # the end, where T5 and BART look for what to classify
    generates = model.config.is_encoder_decoder and model.can_generate()
    return model(input_ids=tokens, **({"decoder_input_ids": tokens[:, :5]} if generates else {})).logits


def new_in(student: PreTrainedModel) -> set[str]:
    return {name.partition(".")[0] for name in student.initialization_report.randomly_initialized}


@EVERY
def test_a_head_is_carried_where_the_labels_agree(name: str, config: dict[str, Any], tmp_path: Path) -> None:
    teacher = save(name, config, tmp_path)
    student = student_of(tmp_path, name)
    assert new_in(student) == set()
    assert student.config.id2label == LABELS
    torch.testing.assert_close(logits(student), logits(teacher))


@pytest.mark.sampled(12)
@EVERY
@pytest.mark.parametrize("places", [[2, 0, 1], [2, 1]], ids=str)
def test_a_head_follows_the_names_of_its_labels(
    name: str, config: dict[str, Any], places: list[int], tmp_path: Path
) -> None:
    teacher = save(name, config, tmp_path)
    labels = {new: LABELS[old] for new, old in enumerate(places)}
    student = student_of(tmp_path, name, id2label=labels)
    assert new_in(student) == set()
    assert student.config.id2label == labels
    torch.testing.assert_close(logits(student), logits(teacher)[..., places])


@pytest.mark.sampled(6)
@EVERY
@pytest.mark.parametrize("changed", [{"id2label": {0: "cat", 1: "dog", 2: "bird"}}, {"num_labels": 5}], ids=str)
def test_a_head_for_other_labels_is_new(
    name: str, config: dict[str, Any], changed: dict[str, Any], tmp_path: Path
) -> None:
    teacher = save(name, config, tmp_path)
    student = student_of(tmp_path, name, **changed)
    new = student.initialization_report.randomly_initialized
    held = teacher.state_dict()
    assert new and all(held[key].shape[0] == 3 for key in new), "only what the labels stand for is new"
    for key, value in student.state_dict().items():
        assert key in new or torch.equal(value, held[key]), key
    assert logits(student).shape[-1] == student.config.num_labels
    again = student_of(tmp_path, name, **changed)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in student.state_dict().items())


@pytest.mark.sampled(4)
@EVERY
def test_a_narrower_student_with_its_head_loads_as_the_stock_class(
    name: str, config: dict[str, Any], tmp_path: Path
) -> None:
    save(name, config, tmp_path / "teacher")
    student = student_of(tmp_path / "teacher", name, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    assert new_in(student) == set()
    student.save_pretrained(tmp_path / "student")
    loaded, report = getattr(transformers, name).from_pretrained(tmp_path / "student", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(logits(loaded), logits(student))


BARE = [
    ("BertModel", TEXT, "BertForSequenceClassification", {"classifier"}),
    ("BertForMaskedLM", TEXT, "BertForSequenceClassification", {"bert", "classifier"}),  # its pooler too
    ("BertForMaskedLM", TEXT, "BertForTokenClassification", {"classifier"}),
    ("RobertaModel", TEXT, "RobertaForSequenceClassification", {"classifier"}),
    ("RobertaForMaskedLM", TEXT, "RobertaForTokenClassification", {"classifier"}),
    ("DebertaV2ForMaskedLM", TEXT, "DebertaV2ForSequenceClassification", {"pooler", "classifier"}),
    ("ModernBertForMaskedLM", MODERN, "ModernBertForSequenceClassification", {"classifier"}),
    ("LlamaForCausalLM", TEXT, "LlamaForSequenceClassification", {"score"}),
    ("T5ForConditionalGeneration", T5, "T5ForSequenceClassification", {"classification_head"}),
    ("T5EncoderModel", T5, "T5ForTokenClassification", {"classifier"}),
    ("BartForConditionalGeneration", BART, "BartForSequenceClassification", {"classification_head"}),
    ("ViTModel", IMAGE, "ViTForImageClassification", {"classifier"}),
    ("ViTForMaskedImageModeling", IMAGE, "ViTForImageClassification", {"classifier"}),
    ("Dinov2Model", IMAGE, "Dinov2ForImageClassification", {"classifier"}),
]


@pytest.mark.parametrize(
    ("teacher_name", "config", "name", "new"), BARE, ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_teacher_without_the_head_gives_all_but_the_head(
    teacher_name: str, config: dict[str, Any], name: str, new: set[str], tmp_path: Path
) -> None:
    teacher = build(teacher_name, config)
    teacher.save_pretrained(tmp_path)
    student = student_of(tmp_path, name, num_labels=5)
    assert type(student).__name__ == name
    assert new_in(student) == new
    assert all(
        ".layer" not in key and ".block" not in key for key in student.initialization_report.randomly_initialized
    )
    assert logits(student).shape[-1] == 5
    body = teacher.base_model.state_dict()
    for key, value in student.base_model.state_dict().items():
        assert torch.equal(value, body[key]) if key in body else "pooler" in key, key


def test_a_head_that_read_something_else_is_new(tmp_path: Path) -> None:
    save("BertForSequenceClassification", TEXT, tmp_path)
    student = student_of(tmp_path, "BertForTokenClassification")
    assert new_in(student) == {"classifier"}, "a head upon pooled sentences is none upon tokens"


DETECTORS = [
    ("YolosForObjectDetection", IMAGE | {"image_size": [12, 12], "num_detection_tokens": 3}),
    (
        "DetrForObjectDetection",
        {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "num_queries": 3}
        | {"decoder_attention_heads": 4, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
        | {"backbone_config": {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1]}},
    ),
]


@pytest.mark.parametrize(("name", "config"), DETECTORS, ids=lambda value: value if isinstance(value, str) else "")
def test_a_detectors_head_keeps_its_row_for_no_object(name: str, config: dict[str, Any], tmp_path: Path) -> None:
    teacher = save(name, config, tmp_path)
    student = AutoStudentForObjectDetection.from_teacher(
        str(tmp_path), id2label={0: "fish", 1: "cat"}, show_progress=False
    )
    assert new_in(student) == set()
    images = {"pixel_values": torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(1))}
    with torch.no_grad():
        torch.testing.assert_close(student(**images).logits, teacher(**images).logits[..., [2, 0, 3]])
    more = AutoStudentForObjectDetection.from_teacher(str(tmp_path), num_labels=5, show_progress=False)
    assert new_in(more) == {"class_labels_classifier"}
    with torch.no_grad():
        assert more(**images).logits.shape[-1] == 6
        torch.testing.assert_close(more(**images).pred_boxes, teacher(**images).pred_boxes)


def test_a_head_with_rows_for_something_else_than_labels_is_new(tmp_path: Path) -> None:
    save("BertForSequenceClassification", TEXT, tmp_path)
    student = AutoStudentForMultipleChoice.from_teacher(str(tmp_path), hidden_size=16, show_progress=False)
    assert new_in(student) == {"classifier"} and student.classifier.weight.shape == (1, 16)


def test_a_classifier_gives_its_body(tmp_path: Path) -> None:
    teacher = save("BertForSequenceClassification", TEXT, tmp_path)
    student = AutoStudent.from_teacher(str(tmp_path), show_progress=False)
    assert type(student).__name__ == "BertModel" and new_in(student) == set()
    body = teacher.base_model.state_dict()
    assert all(torch.equal(value, body[key]) for key, value in student.state_dict().items())
    masked = AutoStudentForMaskedLM.from_teacher(str(tmp_path), show_progress=False)
    assert new_in(masked) == {"cls"}


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("BertForMaskedLM", TEXT),
        ("RobertaForMaskedLM", TEXT),
        ("ElectraForMaskedLM", TEXT | {"embedding_size": 8}),
        ("DebertaV2ForMaskedLM", TEXT | {"legacy": False}),
        ("ModernBertForMaskedLM", MODERN),
    ],
)
def test_a_masked_language_model_keeps_its_head_and_its_ties(
    name: str, config: dict[str, Any], tmp_path: Path
) -> None:
    teacher = build(name, config)
    teacher.save_pretrained(tmp_path / "teacher")
    student = AutoStudentForMaskedLM.from_teacher(str(tmp_path / "teacher"), show_progress=False)
    assert new_in(student) == set()
    torch.testing.assert_close(logits(student), logits(teacher))
    smaller = AutoStudentForMaskedLM.from_teacher(
        str(tmp_path / "teacher"), hidden_size=16, num_attention_heads=2, show_progress=False
    )
    assert new_in(smaller) == set()
    assert smaller.num_parameters() == type(smaller)(smaller.config).num_parameters()
    smaller.save_pretrained(tmp_path / "student")
    assert torch.equal(logits(type(smaller).from_pretrained(tmp_path / "student")), logits(smaller))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("name", "config"),
    [("T5ForConditionalGeneration", T5), ("MT5ForConditionalGeneration", T5), ("BartForConditionalGeneration", BART)],
)
def test_an_encoder_decoder_keeps_its_head(name: str, config: dict[str, Any], tied: bool, tmp_path: Path) -> None:
    teacher = build(name, config | {"tie_word_embeddings": tied})
    if not tied:  # T5 and mT5 configs are always tied, whatever their checkpoints hold
        teacher.lm_head.weight = torch.nn.Parameter(torch.randn(60, 32, generator=torch.Generator().manual_seed(2)))
        teacher.all_tied_weights_keys.pop("lm_head.weight", None)
    teacher.save_pretrained(tmp_path / "teacher")
    student = AutoStudentForSeq2SeqLM.from_teacher(str(tmp_path / "teacher"), show_progress=False)
    assert new_in(student) == set()
    torch.testing.assert_close(logits(student), logits(teacher))
    smaller = AutoStudentForSeq2SeqLM.from_teacher(str(tmp_path / "teacher"), d_model=16, show_progress=False)
    shared = smaller.get_input_embeddings().weight
    assert (smaller.lm_head.weight is shared) == tied
    smaller.save_pretrained(tmp_path / "student")
    loaded = type(smaller).from_pretrained(tmp_path / "student")
    assert torch.equal(logits(loaded), logits(smaller))
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == tied


@pytest.mark.parametrize(
    "method", ["uniform", {"subsequent_layers": "uniform"}, {"subsequent_layers": "random"}], ids=str
)
def test_a_speech_model_starts_by_every_method(method: Any, tmp_path: Path) -> None:
    sizes = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    config = SEQ2SEQ | {"num_mel_bins": 7, "max_source_positions": 10, "bos_token_id": 1} | sizes
    build("WhisperForConditionalGeneration", config).save_pretrained(tmp_path)
    student = from_teacher(str(tmp_path), d_model=16, method=method, show_progress=False)
    sounds = torch.randn(2, 7, 20, generator=torch.Generator().manual_seed(1))
    outputs = student(input_features=sounds, decoder_input_ids=torch.tensor([[1, 5, 9], [1, 7, 8]])).logits
    assert torch.isfinite(outputs).all()
    assert bool(new_in(student)) == (method == {"subsequent_layers": "random"})
