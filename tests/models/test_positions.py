"""The longest text that is allowed is one that the model reads, and the next longer is not."""

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import (
    CONFIG_MAPPING,
    MODEL_MAPPING,
    Gemma3Config,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
    WhisperConfig,
)

from hf_guide import InitializationConfig
from hf_guide.calibration.data import load_calibration_batches
from hf_guide.data.arguments import DataArguments
from hf_guide.data.preprocessing import resolve_lengths
from hf_guide.errors import OptionError
from hf_guide.models.positions import max_input_tokens, text_positions
from hf_guide.models.tiny_models import tiny_config
from hf_guide.teachers.checkpoint import open_teacher

AFTER_PAD = ["roberta", "xlm-roberta", "camembert", "data2vec-text", "roberta-prelayernorm", "xlm-roberta-xl", "luke"]
FROM_ZERO = [
    "bert",
    "distilbert",
    "gpt2",
    "gpt_neo",
    "electra",
    "albert",
    "gpt_bigcode",
    "openai-gpt",
    "deberta-v2",
    "ernie",
]
WITH_AN_OFFSET = ["opt", "bart", "mbart", "mpnet", "biogpt", "plbart", "mvp", "pegasus", "bigbird_pegasus"]
MORE = [
    "clip_text_model",
    "xlm",
    "fnet",
    "convbert",
    "megatron-bert",
    "splinter",
    "visual_bert",
    "layoutlm",
    "git",
    "markuplm",
]
MORE += ["mobilebert", "rembert", "roformer", "yoso", "nystromformer", "squeezebert", "blenderbot", "blenderbot-small"]
LIMIT = 40


def tiny(name: str, **changes: Any) -> Any:
    """Return a tiny config of a family, whose table of positions has about `LIMIT` rows."""
    config = CONFIG_MAPPING[name]()
    sizes = {
        "max_position_embeddings": LIMIT,
        "n_positions": LIMIT,
        "num_hidden_layers": 1,
        "encoder_layers": 1,
        "n_layers": 1,
    }
    more = {"decoder_layers": 1, "num_layers": 1, "pad_token_id": 4, "entity_vocab_size": 9}
    return tiny_config(config, **(sizes | more | changes))


def reads(config: Any, length: int, target: int = 3) -> bool:
    """Return whether a model reads a text of so many tokens."""
    kinds = MODEL_MAPPING[type(config)]
    model = (kinds[0] if isinstance(kinds, tuple) else kinds)(config).eval()
    inputs = {"input_ids": torch.full((1, length), 9)}
    inputs |= {"decoder_input_ids": torch.full((1, target), 9)} if config.is_encoder_decoder else {}
    try:
        with torch.no_grad():
            model(**inputs)
    except (IndexError, RuntimeError, ValueError):
        return False
    return True


@pytest.mark.parametrize(
    "name", [*AFTER_PAD, *FROM_ZERO, *WITH_AN_OFFSET, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)]
)
def test_a_text_of_the_maximal_length_runs_and_one_token_more_does_not(name: str) -> None:
    for pad in (1, 4) if name in AFTER_PAD else (4,):
        config = tiny(name, pad_token_id=pad)
        positions = text_positions(config)
        assert positions.max_tokens is not None
        assert positions.max_tokens == (LIMIT - pad - 1 if name in AFTER_PAD else positions.max_tokens)
        assert reads(config, positions.max_tokens) and not reads(config, positions.max_tokens + 1)
        if positions.max_target_tokens is not None:
            assert reads(config, 3, positions.max_target_tokens) and not reads(
                config, 3, positions.max_target_tokens + 1
            )


def test_a_family_that_cannot_be_run_is_recognised_by_its_padding_row() -> None:
    config = CONFIG_MAPPING["xmod"](max_position_embeddings=514, pad_token_id=3)  # needs the language to be chosen
    assert max_input_tokens(config) == 510


def test_without_position_embeddings_the_config_limits_the_length() -> None:
    assert (
        text_positions(LlamaConfig()).max_tokens is None
        and max_input_tokens(LlamaConfig(max_position_embeddings=48)) == 48
    )
    assert max_input_tokens(CONFIG_MAPPING["t5"]()) is None and max_input_tokens(None) is None
    assert max_input_tokens(WhisperConfig(), target=True) == 448
    assert max_input_tokens(GPT2Config(n_positions=33)) == 33


def test_positions_of_a_vision_tower_are_not_those_of_the_text() -> None:
    config = tiny_config(Gemma3Config(), max_position_embeddings=512)
    assert text_positions(config).max_tokens is None and max_input_tokens(config) == 512
    model = MODEL_MAPPING[Gemma3Config](config).eval()
    rows = [{"input_ids": [5] * 100}]
    batches = load_calibration_batches(
        rows, model, open_teacher(model), InitializationConfig(method="calibrated"), num_tokens=100
    )
    assert batches[0]["input_ids"].shape == (1, 100)


@pytest.mark.parametrize(
    ("name", "unshifted", "shifted"), [("roberta", [4], [9]), ("opt", [4, 9], []), ("bert", [], [4, 9])]
)
def test_the_effect_of_left_padding_is_the_models(name: str, unshifted: list[int], shifted: list[int]) -> None:
    config = tiny(name, attn_implementation="eager")
    positions = text_positions(config)
    assert positions.shifted_by_left_padding == (not unshifted)
    assert positions.required_padding_token == (4 if unshifted == [4] else None)
    torch.manual_seed(0)
    model = MODEL_MAPPING[type(config)](config).eval()
    text = torch.tensor([[11, 12, 13, 14]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1]])
    with torch.no_grad():
        alone = model(input_ids=text).last_hidden_state
        for pad in (*unshifted, *shifted):
            ids = torch.cat([torch.full((1, 2), pad), text], 1)
            padded = model(input_ids=ids, attention_mask=mask).last_hidden_state[:, 2:]
            assert torch.allclose(padded, alone, atol=1e-5) == (pad in unshifted)


def tokenizer(**changes: Any) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")), **changes)


@pytest.mark.parametrize("pad", [1, 3])
def test_a_distillation_requests_no_longer_texts_than_the_model_supports(pad: int) -> None:
    config = RobertaConfig(max_position_embeddings=514, pad_token_id=pad)
    most = 514 - pad - 1
    with pytest.raises(OptionError, match=f"max_length must be at most {most}.*found {most + 1}"):
        resolve_lengths(DataArguments(dataset_name="x", max_length=most + 1), tokenizer(), config)
    assert resolve_lengths(DataArguments(dataset_name="x", max_length=most), tokenizer(), config).max_length == most
    assert resolve_lengths(DataArguments(dataset_name="x"), tokenizer(), config).max_length == min(most, 512)
    assert (
        resolve_lengths(DataArguments(dataset_name="x"), tokenizer(), [config, GPT2Config(n_positions=40)]).max_length
        == 40
    )


def test_targets_fit_the_decoder() -> None:
    config = tiny("bart", decoder_start_token_id=2)
    assert resolve_lengths(DataArguments(dataset_name="x"), tokenizer(), config).max_target_length == LIMIT
    with pytest.raises(OptionError, match=f"max_target_length must be at most {LIMIT}.*found {LIMIT + 1}"):
        resolve_lengths(DataArguments(dataset_name="x", max_target_length=LIMIT + 1), tokenizer(), config)
