"""An image teacher of another library distills into a text student by arrays alone, over pairs of images and texts."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.neural_network import MLPClassifier

from hf_guide import DistillationTrainer, SubclassProjector
from hf_guide.distillation.subclass_logits import TARGETS_KEY
from tests.distillation.small import collate
from tests.distillation.test_trainer import arguments
from tests.lelp.test_loss import by_hand, gradient_of, student_of

COUNT, CLASSES, SUBCLASSES, TAU = 400, 5, 3, 2.0


def taught_pairs() -> tuple[list[dict[str, Any]], torch.Tensor]:
    """Return texts, each of a picture of a digit, and what a network that saw only the picture makes of them: (N, C * S).

    A digit's class is its value modulo 5, so that each class hides two digits; a text spells the digit among noise.
    """
    actual = load_digits()
    images, digits = actual.data[:COUNT] / 16, actual.target[:COUNT]
    classes = digits % CLASSES
    teacher = MLPClassifier((24,), random_state=0, max_iter=400, tol=1e-3).fit(images, classes)
    embeddings = np.maximum(images @ teacher.coefs_[0] + teacher.intercepts_[0], 0)
    logits = embeddings @ teacher.coefs_[1] + teacher.intercepts_[1]
    assert (logits.argmax(1) == classes).mean() > 0.95
    projector = SubclassProjector.fit(embeddings, classes, teacher.coefs_[1].T, SUBCLASSES, temperature=TAU)
    targets = projector.transform(embeddings, logits).flatten(1)
    marginals = targets.view(COUNT, CLASSES, SUBCLASSES).sum(-1)
    torch.testing.assert_close(marginals, (torch.from_numpy(logits) / TAU).softmax(-1), rtol=0, atol=1e-12)
    draw = np.random.default_rng(0)
    texts = [[int(digit) + 3, *draw.integers(20, 60, draw.integers(2, 6)).tolist()] for digit in digits]
    rows = [
        {"input_ids": text, "attention_mask": [1] * len(text), "labels": int(label), TARGETS_KEY: target.float()}
        for text, label, target in zip(texts, classes, targets, strict=True)
    ]
    return rows, targets


def test_the_first_gradient_is_that_of_the_image_teachers_subclasses(tmp_path: Path) -> None:
    rows, _ = taught_pairs()
    student = student_of("sequence-classification", SUBCLASSES)

    def unified(logits: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return -(TAU**2) * (batch[TARGETS_KEY] * (logits / TAU).log_softmax(-1)).sum(-1).mean()

    expected = by_hand(student, rows[:8], unified)
    actual = gradient_of(student, tmp_path, rows[:8], losses="lelp", temperature=TAU)
    assert (actual - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.extended
def test_a_text_student_learns_what_only_the_images_show(tmp_path: Path) -> None:
    rows, targets = taught_pairs()
    learned, held_out = rows[:300], rows[300:]
    unlabelled = [{name: value for name, value in row.items() if name != "labels"} for row in learned]
    args = arguments(
        tmp_path,
        losses="lelp",
        temperature=TAU,
        max_steps=150,
        per_device_train_batch_size=32,
        optim="adamw_torch",
        learning_rate=3e-3,
        logging_steps=10,
    )
    trainer = DistillationTrainer(student_of("sequence-classification", SUBCLASSES), args, collate, unlabelled)
    trainer.train()
    losses = [entry["lelp"] for entry in trainer.state.log_history if "lelp" in entry]
    assert losses[-1] < losses[0]
    predictions = trainer.predict(held_out).predictions
    truth = [row["labels"] for row in held_out]
    assert predictions.shape == (100, CLASSES)
    assert (predictions.argmax(-1) == truth).mean() > 0.9  # a fifth is chance, and no label was ever shown
