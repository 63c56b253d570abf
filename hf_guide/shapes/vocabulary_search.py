"""Choose the size of a student's vocabulary within a budget: what `vocab_size="auto"` does.

Each size gets one quick start, of the shape that the rule ranks first, and is scored in bits per byte of held-out text: losses
per token do not compare tokenizers. The same text is read with every vocabulary.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from hf_guide.calibration.vocabulary import VocabularyReducer, with_vocabulary
from hf_guide.errors import OptionError, ShapeError, VocabularyError
from hf_guide.initialization.registry import InitializationMethod
from hf_guide.methods.calibrated import CalibratedMethod
from hf_guide.shapes.scoring import CalibratedScorer
from hf_guide.tasks import Task, task_of
from hf_guide.teachers.checkpoint import TeacherCheckpoint

AUTO = "auto"
SHARES = (1, 2 / 3, 1 / 2, 1 / 3, 1 / 4, 1 / 6, 1 / 8, 1 / 12, 1 / 16)
"""Of the teacher's pieces, in the order in which they are tried, until two in a row are worse than the best."""


def choose_vocab_size(
    teacher: TeacherCheckpoint,
    reducer: VocabularyReducer,
    search_of: Callable[[TeacherCheckpoint, Mapping[str, Any]], Any],
    method: InitializationMethod,
    folder_of: Callable[[int], Path | None],
    *,
    show_progress: bool = False,
) -> dict[int, float]:
    """Return bits per byte of held-out text by size of the vocabulary, the best first.

    Args:
        teacher: The opened checkpoint.
        reducer: Of its tokenizer, on the calibration texts.
        search_of: Returns the `ShapeSearch` of a teacher and overrides.
        method: The initialization method.
        folder_of: Returns the folder in which the search of a size saves its progress; None for none.
        show_progress: Whether to show a progress bar.

    Raises:
        OptionError: The method does not compare starts, or the model is not a causal language model.
        ShapeError: No vocabulary leaves a shape of the budget.
    """
    if not isinstance(method, CalibratedMethod) or task_of(teacher.model_class) is not Task.CAUSAL_LM:
        raise OptionError(
            "vocab_size='auto' compares calibrated causal language models in bits per byte: set method='calibrated' and pass "
            "texts as calibration_dataset, or state the number of tokens."
        )
    bits: dict[int, float] = {}
    error: Exception | None = None
    config, num_tokens = method.config, None
    for share in tqdm(SHARES, desc="vocabularies", disable=not show_progress):
        size = round(share * reducer.max_size)
        if list(bits.values())[-2:] and min(list(bits.values())[-2:]) > min(bits.values()):
            break
        try:
            vocabulary = reducer.reduce(size)
            search = search_of(with_vocabulary(teacher, vocabulary), {"vocab_size": size})
            candidate = search.candidates()[0]
        except (ShapeError, VocabularyError) as found:
            error = found
            continue
        if num_tokens is not None:  # of the same text
            ratio = vocabulary.facts["token_ratio"]
            config = dataclasses.replace(config, calibration_tokens=round(num_tokens * ratio))
        scorer = CalibratedScorer(
            search.setup, config, search.resolve, folder_of(size), positions_of=search.fixed_config
        )
        if num_tokens is None:
            num_tokens = scorer.num_tokens / vocabulary.facts["token_ratio"]
        bits[size] = scorer.bits_per_byte(candidate, vocabulary.tokenizer)
    if not bits:
        raise ShapeError(f"No size of the vocabulary has a student of the budget. {error}") from error
    return dict(sorted(bits.items(), key=lambda pair: (math.isnan(pair[1]), pair[1])))
