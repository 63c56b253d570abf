"""The features of an analysis: the embeddings are the inputs of the classifier, also where it is applied token by token."""

import pytest
import torch

from hf_guide.errors import OptionError, SubclassError, TaskError
from hf_guide.lelp.analysis.features import collect_features
from tests.lelp.test_fitting import CLASSIFIERS, collator, examples, teacher_of
from tests.signal_cache.tiny_teachers import Pad
from tests.tiny import SIZES, Kind

LATE = Kind(
    "EuroBertForSequenceClassification",
    "",
    SIZES | {"classifier_pooling": "late", "num_key_value_heads": 2, "num_labels": 3, "pad_token_id": 0},
    {},
)


def stacked(rows):
    return {
        "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
        "labels": torch.tensor([row["label"] for row in rows]),
    }


@pytest.mark.parametrize("kind", [*CLASSIFIERS, "late"])
def test_logits_are_linear_in_the_embeddings(kind):
    """Texts of unequal length, padded: also where logits are averaged over the places of a text (EuroBERT)."""
    teacher = LATE.teacher() if kind == "late" else teacher_of(kind)
    rows = examples(kind, 20)
    features = collect_features(teacher, rows, collator(kind) or stacked, batch_size=8, show_progress=False)
    residual = features.logits.double() - features.embeddings.double() @ features.classifier_weight.T
    assert features.embeddings.shape == (20, features.classifier_weight.shape[1])
    assert residual.std(0).max() < 1e-5 * features.logits.std(0).max() + 1e-6


def test_examples_without_labels_have_the_predicted_class():
    teacher, rows = teacher_of(), examples(count=12)
    labels = [-1, -100, 0, 1] * 3
    given = [row | {"label": label} for row, label in zip(rows, labels, strict=True)]

    def collate(some):
        return {**Pad()(some), "labels": torch.tensor([each["label"] for each in some])}

    features = collect_features(teacher, given, collate, batch_size=5, show_progress=False)
    own = features.logits.argmax(1).tolist()
    expected = [predicted if label < 0 else label for predicted, label in zip(own, labels, strict=True)]
    assert features.labels.tolist() == expected
    given[7]["label"] = 3
    with pytest.raises(SubclassError, match="label of example 7 is 3; the teacher has the classes 0 to 2"):
        collect_features(teacher, given, collate, batch_size=5, show_progress=False)
    with pytest.raises(OptionError, match="batch_size must be a whole number"):
        collect_features(teacher, given, collate, batch_size=0, show_progress=False)


def test_a_multi_label_teacher_raises():
    teacher = teacher_of()
    teacher.config.problem_type = "multi_label_classification"
    with pytest.raises(TaskError, match="exclude each other.*multi_label_classification"):
        collect_features(teacher, examples(), Pad(), show_progress=False)
