"""A projector fitted to a model and a dataset equals the one fitted to their arrays, live or captured."""

from types import SimpleNamespace

import datasets
import pytest
import torch
from torch import nn

from hf_guide import (
    Capture,
    OptionError,
    SubclassError,
    SubclassProjector,
    capture_teacher,
    fit_subclasses,
)
from hf_guide.errors import CaptureError, TaskError
from hf_guide.lelp.data import classifier_weight
from hf_guide.lelp.splitters.registry import BENCHMARK_SPLITTERS
from hf_guide.models.penultimate import find_classifier
from hf_guide.tasks import task_of
from hf_guide.teachers.forward import TeacherRunner
from tests.lelp.benchmark_modules import import_benchmark
from tests.signal_cache.tiny_teachers import Pad
from tests.tiny import KINDS, SIZES, Kind

import_benchmark("lelp_splitters")
COUNT = 90
TEXT = KINDS["bert classifier"]
CLASSIFIERS = {
    "bert": TEXT,
    "llama": Kind("LlamaForSequenceClassification", "", SIZES | {"num_labels": 3, "num_key_value_heads": 2}, {}),
    "vit": Kind("ViTForImageClassification", "", {**KINDS["vit"].config, "num_labels": 3}, {}, "images"),
}


def examples(kind: str = "bert", count: int = COUNT, *, labelled: bool = True) -> list[dict]:
    draw = torch.Generator().manual_seed(2)
    actual = []
    for number in range(count):
        if kind == "vit":
            example = {"pixel_values": torch.randn(3, 16, 16, generator=draw)}
        else:
            length = int(torch.randint(3, 12, (1,), generator=draw))
            example = {"input_ids": torch.randint(3, 96, (length,), generator=draw).tolist()}
        actual.append(example | ({"label": number % 3} if labelled else {}))
    return actual


def collator(kind: str):
    return None if kind == "vit" else Pad()


def teacher_of(kind: str = "bert"):
    teacher = CLASSIFIERS[kind].teacher()
    if kind == "llama":
        teacher.config.pad_token_id = 0
    return teacher


def teacher_arrays(teacher, dataset) -> SimpleNamespace:
    """Return a teacher's embeddings and logits, computed one example at a time, and its classifier's weight."""
    runner = TeacherRunner(teacher, task_of(teacher))
    outputs = []
    for example in dataset:
        inputs = {
            name: torch.as_tensor(value)[None] for name, value in example.items() if name.startswith(("in", "pi"))
        }
        outputs.append(runner.forward(inputs, features=True))
    return SimpleNamespace(
        embeddings=torch.cat([each.features for each in outputs]).clone(),
        logits=torch.cat([each.logits for each in outputs]).clone(),
        weight=find_classifier(teacher, task_of(teacher)).weight.detach(),
    )


def balanced(teacher, rows):
    """Return a teacher that predicts each class about as often."""
    with torch.no_grad():
        teacher.classifier.weight.mul_(20)
        teacher.classifier.bias.sub_(teacher_arrays(teacher, rows).logits.mean(0))
    return teacher


def assert_same(
    actual: SubclassProjector, expected: SubclassProjector, outputs: SimpleNamespace, tolerance=1e-4
) -> None:
    one, other = (each.transform(outputs.embeddings, outputs.logits) for each in (actual, expected))
    assert (one - other).abs().max() < tolerance


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_a_model_and_a_dataset_give_the_projector_of_their_arrays(kind):
    teacher, dataset = teacher_of(kind), examples(kind)
    teacher.train()
    actual = fit_subclasses(
        teacher, dataset, 4, data_collator=collator(kind), batch_size=7, temperature=2.0, seed=3, show_progress=False
    )
    assert teacher.training, "the teacher's mode was not restored"
    outputs = teacher_arrays(teacher.eval(), dataset)
    labels = [example["label"] for example in dataset]
    expected = SubclassProjector.fit(outputs.embeddings, labels, outputs.weight, 4, temperature=2.0, seed=3)
    assert_same(actual, expected, outputs)
    assert actual.id2label == teacher.config.id2label and actual.counts.tolist() == [30, 30, 30]
    actual.check_teacher(teacher)
    with torch.no_grad():
        next(teacher.parameters()).add_(1)
    with pytest.raises(SubclassError, match="is of another teacher"):
        actual.check_teacher(teacher)


def test_streams_and_datasets_of_the_hub_are_read_alike(tmp_path):
    teacher, rows = teacher_of(), examples()
    expected = fit_subclasses(teacher, rows, 4, data_collator=Pad(), show_progress=False)
    mapped = datasets.Dataset.from_list(rows)
    outputs = teacher_arrays(teacher, rows)

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(rows)

        def __len__(self):
            return len(rows)

    for dataset in (mapped, mapped.to_iterable_dataset(), iter(rows), Stream()):
        assert_same(fit_subclasses(teacher, dataset, 4, data_collator=Pad(), show_progress=False), expected, outputs)
    teacher.save_pretrained(tmp_path)
    assert_same(fit_subclasses(tmp_path, mapped, 4, data_collator=Pad(), show_progress=False), expected, outputs)


def test_columns_that_the_teacher_does_not_take_are_ignored():
    teacher, rows = teacher_of(), examples()
    expected = fit_subclasses(teacher, rows, 4, data_collator=Pad(), show_progress=False)
    extra_columns = [row | {"text": "words", "id": number} for number, row in enumerate(rows)]
    actual = fit_subclasses(teacher, extra_columns, 4, data_collator=Pad(), show_progress=False)
    assert torch.equal(actual.eigenvalues, expected.eigenvalues)

    def from_raw(features):
        return Pad()([{"input_ids": [int(token) for token in each["text"].split()]} for each in features])

    raw = [{"text": " ".join(map(str, row["input_ids"])), "label": row["label"]} for row in rows]
    actual = fit_subclasses(teacher, raw, 4, data_collator=from_raw, show_progress=False)
    assert torch.equal(actual.eigenvalues, expected.eigenvalues)


@pytest.mark.extended
def test_examples_without_labels_are_grouped_by_the_predicted_class():
    rows = examples(labelled=False, count=300)
    teacher = balanced(teacher_of(), rows)
    outputs = teacher_arrays(teacher, rows)
    own = outputs.logits.argmax(1)
    assert own.bincount(minlength=3).min() > 4, "the test needs a teacher that predicts each class"
    actual = fit_subclasses(teacher, rows, 3, data_collator=Pad(), show_progress=False)
    assert actual.counts.tolist() == own.bincount(minlength=3).tolist()
    some = [row | {"label": number % 3 if number % 2 else None} for number, row in enumerate(rows)]
    mixed = fit_subclasses(teacher, some, 3, data_collator=Pad(), show_progress=False)
    labels = torch.where(torch.arange(300) % 2 == 1, torch.arange(300) % 3, own)
    assert mixed.counts.tolist() == labels.bincount(minlength=3).tolist()


def test_labels_are_aligned_by_name_where_they_have_names():
    teacher = teacher_of()  # good, bad, neither
    rows = examples()
    expected = fit_subclasses(teacher, rows, 4, data_collator=Pad(), show_progress=False)
    names = ["neither", "good", "bad"]
    as_text = [row | {"label": teacher.config.id2label[row["label"]].upper()} for row in rows]
    numbered = [row | {"label": names.index(teacher.config.id2label[row["label"]])} for row in rows]
    features = datasets.Features(
        {"input_ids": datasets.List(datasets.Value("int64")), "label": datasets.ClassLabel(names=names)}
    )
    for dataset in (as_text, datasets.Dataset.from_list(numbered, features=features)):
        actual = fit_subclasses(teacher, dataset, 4, data_collator=Pad(), show_progress=False)
        assert torch.equal(actual.eigenvalues, expected.eigenvalues)
    with pytest.raises(SubclassError, match="'ugly' in 'label' is not one of the teacher's classes"):
        fit_subclasses(teacher, [rows[0] | {"label": "ugly"}], 4, data_collator=Pad(), show_progress=False)


@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_a_capture_replaces_the_teacher(kind, tmp_path):
    teacher, rows = balanced(teacher_of(kind), examples(kind)), examples(kind)
    options = {"data_collator": collator(kind), "show_progress": False}
    expected = fit_subclasses(teacher, rows, 4, **options)
    outputs, labels = teacher_arrays(teacher, rows), [row["label"] for row in rows]
    capture = capture_teacher(
        teacher, rows, tmp_path / "c", config={"save_penultimate": True, "hidden_dtype": "float32"}, **options
    )
    assert_same(fit_subclasses(teacher, rows, 4, capture=capture, **options), expected, outputs)
    alone = fit_subclasses(Capture.open(tmp_path / "c"), rows, 4, **options)
    assert alone.teacher_fingerprint == expected.teacher_fingerprint and alone.id2label == expected.id2label
    # The classifier is recovered from the data, only in the directions that occur there.
    axes = torch.linalg.svd(outputs.embeddings.double() - outputs.embeddings.double().mean(0), full_matrices=False)
    hull = axes.Vh[1e-3 * axes.S[0] < axes.S]
    inside = outputs.weight.double() @ hull.T @ hull
    assert len(hull) == (48 if kind == "bert" else 47)
    assert_same(alone, SubclassProjector.fit(outputs.embeddings, labels, inside, 4), outputs, 1e-3)
    by_name = fit_subclasses(str(tmp_path / "c"), rows[::-1], 4, **options)
    assert_same(by_name, alone, outputs)
    known = fit_subclasses(capture, rows, 4, classifier_weight=outputs.weight, **options)
    assert_same(known, expected, outputs)
    alone.check_teacher(capture)
    whole = fit_subclasses(capture, num_subclasses=2, show_progress=False)
    assert whole.counts.tolist() == outputs.logits.argmax(1).bincount(minlength=3).tolist()


def test_a_folder_caches_the_signals_so_that_the_teacher_runs_once(tmp_path):
    teacher, rows = teacher_of(), examples()
    options = {"data_collator": Pad(), "show_progress": False, "capture": tmp_path / "c"}
    first = fit_subclasses(teacher, rows, 4, **options)
    assert_same(
        first,
        fit_subclasses(teacher, rows, 4, data_collator=Pad(), show_progress=False),
        teacher_arrays(teacher, rows),
    )
    calls = []
    handle = teacher.register_forward_hook(lambda *_: calls.append(1))
    again = fit_subclasses(teacher, rows, 2, **options)
    handle.remove()
    assert len(calls) <= 2, "more runs than the one that reads the shapes"
    assert torch.equal(again.eigenvalues, first.eigenvalues)


def test_the_classifier_may_be_named_or_its_weight_passed():
    class Odd(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, hidden):
            return self.inner(hidden)

    teacher, rows = teacher_of(), examples()
    options = {"data_collator": Pad(), "show_progress": False}
    expected = fit_subclasses(teacher, rows, 4, **options)
    teacher.classifier = Odd(teacher.classifier)
    named = fit_subclasses(teacher, rows, 4, classifier="classifier.inner", **options)
    assert torch.equal(named.scores.directions, expected.scores.directions)
    weight = teacher.classifier.inner.weight
    changes = fit_subclasses(teacher, rows, 4, classifier_weight=weight, **options)
    assert torch.equal(changes.scores.directions, expected.scores.directions)
    with pytest.raises(TaskError, match="has no layer 'nothing'"):
        fit_subclasses(teacher, rows, 4, classifier="nothing", **options)
    for layer, message in (
        (teacher.bert.pooler.dense, "weight has 48 rows; the teacher has 3 classes"),
        ("dropout", "classifier is a Dropout, which has no weight"),
    ):
        with pytest.raises(SubclassError, match=message):
            fit_subclasses(teacher, rows, 4, classifier=layer, **options)
        assert find_classifier(teacher, task_of(teacher)) is teacher.classifier.inner, "a failed choice was registered"
    plain = teacher_of()
    with pytest.raises(SubclassError, match="weight has 48 rows"):
        fit_subclasses(plain, rows, 4, classifier="bert.pooler.dense", **options)
    assert find_classifier(plain, task_of(plain)) is plain.classifier
    teacher.classifier.forward = lambda hidden: teacher.classifier.inner(hidden).tanh()
    with pytest.raises(SubclassError, match="are not those of the layer"):
        fit_subclasses(teacher, rows, 4, classifier="classifier.inner", **options)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's own call
def test_an_adapter_on_the_classifier_is_part_of_its_weight():
    peft = pytest.importorskip("peft")
    teacher, rows = teacher_of(), examples()
    adapted = peft.get_peft_model(
        teacher, peft.LoraConfig(target_modules=["classifier", "query"], r=2, init_lora_weights=False)
    ).eval()
    actual = fit_subclasses(adapted, rows, 4, data_collator=Pad(), show_progress=False)
    outputs = teacher_arrays(adapted, rows)
    merged = classifier_weight(find_classifier(adapted, task_of(adapted)))
    assert (merged - outputs.weight).abs().max() > 1e-3, "the adapter does nothing"
    labels = [row["label"] for row in rows]
    assert_same(actual, SubclassProjector.fit(outputs.embeddings, labels, merged, 4), outputs)


@pytest.mark.parametrize("splitter", ["lelp", "kmeans", "labels", *BENCHMARK_SPLITTERS])
def test_every_splitter_takes_a_model(splitter):
    rows = [row | {"fine": 2 * (number % 3) + number % 2} for number, row in enumerate(examples())]
    actual = fit_subclasses(
        teacher_of(),
        rows,
        2,
        splitter=splitter,
        fine_label_column="fine",
        data_collator=Pad(),
        show_progress=False,
    )
    assert actual.splitter == splitter and actual.num_subclasses == 2


ARCHITECTURES = [
    ("BertForSequenceClassification", SIZES),
    ("RobertaForSequenceClassification", SIZES),
    (
        "DistilBertForSequenceClassification",
        {"vocab_size": 96, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4},
    ),
    ("ElectraForSequenceClassification", SIZES),
    ("DebertaV2ForSequenceClassification", SIZES),
    ("ModernBertForSequenceClassification", SIZES | {"pad_token_id": 0}),
    ("EuroBertForSequenceClassification", SIZES | {"classifier_pooling": "late", "num_key_value_heads": 2}),
    ("GPT2ForSequenceClassification", {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4}),
    ("LlamaForSequenceClassification", SIZES | {"num_key_value_heads": 2}),
    ("XLNetForSequenceClassification", {"vocab_size": 96, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48}),
    (
        "BartForSequenceClassification",
        {"vocab_size": 96, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2}
        | {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "encoder_attention_heads": 4, "decoder_attention_heads": 4},
    ),
    (
        "T5ForSequenceClassification",
        {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
        | {"decoder_start_token_id": 0},
    ),
    ("ViTForImageClassification", KINDS["vit"].config),
    ("DeiTForImageClassificationWithTeacher", KINDS["vit"].config),
    (
        "SwinForImageClassification",
        {"image_size": 32, "embed_dim": 16, "window_size": 4, "depths": [1, 1], "num_heads": [2, 2]},
    ),
    ("ResNetForImageClassification", {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}),
    ("ConvNextForImageClassification", {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2}),
    ("MobileNetV2ForImageClassification", {"depth_multiplier": 0.35}),
    (
        "LevitForImageClassificationWithTeacher",
        {"image_size": 32, "hidden_sizes": [16, 24, 32], "num_attention_heads": [2] * 3, "depths": [1] * 3}
        | {"key_dim": [8] * 3},
    ),
]


@pytest.mark.parametrize(
    ("model_class", "config"), ARCHITECTURES, ids=lambda changes: changes if isinstance(changes, str) else ""
)
def test_the_inputs_of_the_classifier_are_captured(model_class, config):
    special = {"pad_token_id": 0, "eos_token_id": 2, "bos_token_id": 1} if "Sequence" in model_class else {}
    kind = Kind(model_class, "", {**special, **config, "num_labels": 3}, {})
    teacher = kind.teacher()
    batch: dict[str, torch.Tensor]
    if special:
        ids = torch.randint(3, 90, (4, 10))
        mask = torch.ones_like(ids)
        ids[:, -1] = 2
        ids[1, 7:], ids[1, 6], mask[1, 7:] = 0, 2, 0
        batch = {"input_ids": ids, "attention_mask": mask}
    else:
        size = getattr(teacher.config, "image_size", 32)
        batch = {"pixel_values": torch.randn(4, 3, size, size)}
    task = task_of(teacher)
    signals = TeacherRunner(teacher, task).forward(batch, features=True)
    classifier = find_classifier(teacher, task)
    weight = classifier_weight(classifier)
    assert weight.shape == (3, classifier.in_features) and signals.features.shape == (4, classifier.in_features)
    residual = signals.logits.double() - signals.features.double() @ weight.T
    assert residual.std(0).max() < 1e-4 * signals.logits.std(0).max() + 1e-5, "the logits are not linear in it"


def test_invalid_input_raises_before_or_where_it_is_read(tmp_path):
    teacher, rows = teacher_of(), examples()
    options = {"data_collator": Pad(), "show_progress": False}
    without = capture_teacher(teacher, rows, tmp_path / "c", **options)
    for changes, error, message in (
        ({"capture": without}, CaptureError, "holds no embeddings"),
        ({"num_subclasses": 0}, OptionError, "num_subclasses must be a whole number"),
        ({"num_subclasses": 60}, SubclassError, "48 wide cannot hold 60 directions"),
        ({"num_subclasses": 31}, SubclassError, "has 30 examples; 31 subclasses need"),
        ({"splitter": "lepl"}, OptionError, "Did you mean 'lelp'"),
        ({"label_column": "sentiment"}, OptionError, "label_column='sentiment' is not in the dataset"),
        ({"splitter": "labels", "fine_label_column": "fine"}, OptionError, "'fine' is not in the dataset"),
        ({"splitter": "labels"}, SubclassError, "needs one fine label.*with fine_label_column="),
        (
            {
                "splitter": "labels",
                "fine_label_column": "fine",
                "dataset": [row | {"fine": 0.5} for row in rows],
            },
            SubclassError,
            "fine labels in 'fine' must be whole numbers; found 0.5",
        ),
        ({"splitter": None}, OptionError, "splitter must be one of .* found None"),
        ({"seed": "a"}, OptionError, "seed must be a whole number"),
        ({"batch_size": 0}, OptionError, "batch_size must be a whole number of at least 1; found 0"),
        ({"classifier_weight": torch.randn(48, 3)}, SubclassError, r"looks transposed: give it as \(3, 48\)"),
        (
            {"dataset": datasets.DatasetDict(train=datasets.Dataset.from_list(rows))},
            OptionError,
            r"found a DatasetDict. Pass one of its entries \['train'\]",
        ),
        (
            {"dataset": [{"text": "words", "label": 0}], "data_collator": None},
            OptionError,
            r"columns \['label', 'text'\], and the teacher takes (?!.*kwargs)",
        ),
        ({"classifier_weight": torch.randn(2, 48)}, SubclassError, "has 2 rows; the teacher has 3 classes"),
        ({"dataset": []}, OptionError, "dataset is empty"),
        ({"dataset": "rows.jsonl"}, OptionError, "must contain processed examples; found the str 'rows.jsonl'"),
        (
            {"dataset": ["a text"], "data_collator": None},
            OptionError,
            "must be mappings of columns.*the first is a str",
        ),
        ({"data_collator": None}, OptionError, "pass processing_class=tokenizer"),
        ({"dataset": None}, OptionError, "needs a dataset"),
        ({"dataset": [row | {"label": 7} for row in rows]}, SubclassError, "label of example 0 is 7"),
        ({"dataset": [row | {"label": 0.5} for row in rows]}, SubclassError, "whole numbers or names"),
        ({"teacher": KINDS["bert"].teacher()}, TaskError, "need a classifier of sequences or images"),
        ({"teacher": TEXT.teacher(num_labels=1, id2label=None, label2id=None)}, SubclassError, "single output"),
        ({"teacher": 5}, OptionError, "found a int"),
        ({"teacher": without, "capture": without}, OptionError, "The teacher is a capture"),
    ):
        with pytest.raises(error, match=message):
            fit_subclasses(**({"teacher": teacher, "dataset": rows, "num_subclasses": 4} | options | changes))
    with torch.no_grad():
        teacher.classifier.bias[1] = torch.nan
    with pytest.raises(SubclassError, match="logits of example 0"):
        fit_subclasses(teacher, examples(labelled=False), 4, classifier_weight=torch.randn(3, 48), **options)
    teacher.bert.pooler.dense.bias.data[0] = torch.nan
    with pytest.raises(SubclassError, match="embedding of example 0"):
        fit_subclasses(teacher, rows, 4, classifier_weight=torch.randn(3, 48), **options)


@pytest.mark.parametrize("kind", ["multi_label_classification", "regression"])
def test_classes_that_do_not_exclude_each_other_raise(kind, tmp_path):
    teacher, rows = teacher_of(), examples()
    plain = fit_subclasses(teacher, rows, 2, data_collator=Pad(), show_progress=False)
    teacher.config.problem_type = kind
    config = {"save_penultimate": True}
    capture = capture_teacher(
        teacher, rows, tmp_path / "capture", data_collator=Pad(), config=config, show_progress=False
    )
    for changes in (teacher, capture):
        with pytest.raises(TaskError, match=f"exclude each other.*{kind}.*single_label_classification"):
            fit_subclasses(changes, rows, 2, data_collator=Pad(), show_progress=False)
        with pytest.raises(TaskError, match=f"exclude each other.*{kind}"):
            plain.check_teacher(changes)
