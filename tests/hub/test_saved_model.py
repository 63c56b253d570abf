"""The code of a card loads the folder's tokenizer or processor, whichever files describe it."""

from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers import PreTrainedTokenizerFast

from hf_guide.hub.metadata import DistillationRecord
from hf_guide.hub.model_card import write_model_card
from tests.small_tokenizers import byte_level_bpe


def whisper() -> list[Any]:
    config = transformers.WhisperConfig(
        vocab_size=300, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, pad_token_id=0, bos_token_id=0,
        eos_token_id=0, decoder_start_token_id=0,
    )  # fmt: skip
    return [config, transformers.WhisperFeatureExtractor(), byte_level_bpe()]


def clip() -> list[Any]:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.CLIPConfig(text_config=sizes, vision_config=sizes)
    return [config, transformers.CLIPImageProcessor(), byte_level_bpe()]


def wav2vec2() -> list[Any]:
    return [transformers.Wav2Vec2Config(hidden_size=16), transformers.Wav2Vec2FeatureExtractor()]


def vit() -> list[Any]:
    return [transformers.ViTConfig(hidden_size=16), transformers.ViTImageProcessor()]


def bert() -> list[Any]:
    return [transformers.BertConfig(hidden_size=16), byte_level_bpe()]


@pytest.mark.parametrize(
    "parts,auto_class",
    [
        (whisper, "AutoProcessor"),
        (clip, "AutoProcessor"),
        (wav2vec2, "AutoFeatureExtractor"),
        (vit, "AutoImageProcessor"),
        (bert, "AutoTokenizer"),
    ],
)
def test_the_code_of_a_card_loads_what_the_folder_has(parts: Any, auto_class: str, tmp_path: Path) -> None:
    for each in parts():
        each.save_pretrained(tmp_path)
    assert not (tmp_path / "processor_config.json").exists()
    text = write_model_card(tmp_path, record=DistillationRecord(steps=1), model_id="me/s").read_text()
    assert f'= {auto_class}.from_pretrained("me/s")' in text
    loaded = getattr(transformers, auto_class).from_pretrained(tmp_path)
    if auto_class == "AutoProcessor":
        assert isinstance(loaded.tokenizer, PreTrainedTokenizerFast)
