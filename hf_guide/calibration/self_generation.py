"""Generate calibration text with the teacher itself, for when there is none (self-calibration, arXiv 2410.17170)."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import GenerationConfig, LogitsProcessor, PreTrainedConfig, PreTrainedModel

from hf_guide.calibration.config import SELF_GENERATED, CalibratedConfig
from hf_guide.calibration.data import max_text_length
from hf_guide.calibration.forward import calibration_mode
from hf_guide.errors import OptionError, TeacherError
from hf_guide.teachers.checkpoint import TeacherCheckpoint
from hf_guide.utils.distributed import all_reduce_sum_, rank_and_world_size
from hf_guide.utils.finite import overflow_advice

GENERATION_BATCH_SIZE = 64
_SEED_STRIDE = 1_000_003  # the second batch of one seed is not the first of the next


def generate_calibration_text(
    model: PreTrainedModel,
    teacher: TeacherCheckpoint,
    options: CalibratedConfig,
    *,
    num_tokens: int,
    student: PreTrainedConfig | None = None,
    show_progress: bool = False,
) -> Tensor:
    """Return at least `num_tokens` tokens, (rows, length), that a causal language model samples.

    Each row starts with a token drawn uniformly from the vocabulary and is continued at temperature 1; after an
    end-of-text token another text follows, as in training. The tokens depend on the seed and the machine, and not on how
    many processes share the work. The global random state is restored.

    Raises:
        OptionError: The model generates no text: an encoder, an encoder-decoder, or one without its language head.
        TeacherError: The model predicts NaN.
    """
    if not model.can_generate() or model.config.is_encoder_decoder or model.main_input_name != "input_ids":
        raise OptionError(
            f"calibration_dataset={SELF_GENERATED!r} is text that the teacher generates, and {type(model).__name__} "
            "generates none: it must be a causal language model, loaded with its head. Pass a dataset."
        )
    length = max_text_length(options.calibration_seq_length, teacher.config, student)
    ids = torch.zeros(-(-num_tokens // length), length, dtype=torch.long)
    rank, world_size = rank_and_world_size()
    batches = list(enumerate(ids.split(GENERATION_BATCH_SIZE)))[rank::world_size]
    total_steps = len(batches) * (length - 1)
    bar = tqdm(total=total_steps, desc="calibration: generating text", unit="step", disable=not show_progress)
    with bar, calibration_mode(model), _default_generation_config(model):
        for number, batch in batches:
            batch.copy_(_generate_rows(model, batch.shape, options.seed + number * _SEED_STRIDE, bar))
    all_reduce_sum_([ids])  # each process has filled its own rows, and has zeros in the others'
    return ids


class _ProgressLogitsProcessor(LogitsProcessor):
    """Leave logits as they are, advance a bar by a step, and raise where nothing can be sampled from them."""

    def __init__(self, bar: "tqdm[None]", dtype: torch.dtype):
        self.bar, self.dtype = bar, dtype

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.bar.update()
        if bool(scores.isnan().any()):
            raise TeacherError(
                f"The teacher, in {self.dtype}, predicts NaN for text that it generates itself. "
                + overflow_advice(self.dtype, "Check its weights for NaN and extreme values", "Load the teacher")
            )
        return scores


def _generate_rows(model: Any, shape: torch.Size, seed: int, bar: "tqdm[None]") -> Tensor:
    """Return rows of sampled tokens, on the CPU."""
    device = model.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        first = torch.randint(model.get_input_embeddings().num_embeddings, (shape[0], 1)).to(device)
        rows: Tensor = model.generate(
            first,
            attention_mask=torch.ones_like(first),
            max_new_tokens=shape[1] - 1,
            logits_processor=[_ProgressLogitsProcessor(bar, model.dtype)],
        )
    return rows.cpu()


@contextlib.contextmanager
def _default_generation_config(model: PreTrainedModel) -> Iterator[None]:
    """Sample from the whole distribution and to the full length, whatever the model's own generation config sets."""
    generation_config = model.generation_config
    model.generation_config = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
    try:
        yield
    finally:
        model.generation_config = generation_config
