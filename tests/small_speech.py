"""Small speech models with their processors, and sounds: tones, whose pitch is the label, and whose sequence is the text."""

import json
import wave
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    ASTConfig,
    ASTFeatureExtractor,
    ASTForAudioClassification,
    GenerationConfig,
    HubertConfig,
    HubertForCTC,
    PreTrainedModel,
    Wav2Vec2Config,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    Wav2Vec2ForSequenceClassification,
    Wav2Vec2Processor,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

RATE = 16_000
PITCHES = {"low": 300.0, "middle": 700.0, "high": 1500.0}
SPECIAL = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|zh|>", "<|de|>", "<|translate|>", "<|transcribe|>"]
SPECIAL += ["<|startoflm|>", "<|startofprev|>", "<|nospeech|>", "<|notimestamps|>"]
TIMESTAMPS = [f"<|{number * 0.02:.2f}|>" for number in range(51)]


def tone(*names: str, seconds: float = 0.2, rate: int = RATE, seed: int = 0) -> np.ndarray:
    """Return a tone for each name, with a little noise; float32, (samples,)."""
    times = np.arange(int(seconds * rate)) / rate
    sound = np.concatenate([0.5 * np.sin(2 * np.pi * PITCHES[name] * times) for name in names])
    return (sound + 0.01 * np.random.default_rng(seed).standard_normal(len(sound))).astype(np.float32)


def write_wav(path: Path, sound: np.ndarray, rate: int = RATE, channels: int = 1, width: int = 2) -> str:
    """Write a PCM file of as many equal channels; return its path."""
    scaled = np.round(np.clip(sound, -1, 1) * (2 ** (8 * width - 1) - 1)).astype(np.int64)
    if width == 1:
        frames = (scaled + 128).astype("<u1").tobytes()
    else:
        packed = scaled.astype("<i8").view("<u1").reshape(-1, 8)[:, :width]
        frames = packed.tobytes()
    if channels > 1:
        frames = b"".join(frames[at : at + width] * channels for at in range(0, len(frames), width))
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(frames)
    return str(path)


def write_dataset(folder: Path, count: int = 12, **columns: Any) -> Path:
    """Write WAV files of one or two tones, and a JSON file with their paths, texts and labels; return the file."""
    folder.mkdir(parents=True, exist_ok=True)
    names, rows = list(PITCHES), []
    for index in range(count):
        texts = [names[index % 3]] if index % 2 else [names[index % 3], names[(index // 2) % 3]]
        path = write_wav(folder / f"{index}.wav", tone(*texts, seconds=0.15 + 0.02 * (index % 4), seed=index))
        rows.append({"audio": path, "text": " ".join(texts), "label": texts[0], **columns})
    file = folder / "data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def whisper_processor(*, mel_bins: int = 16, language: str | None = None) -> WhisperProcessor:
    """Return a processor of windows of one second, whose text tokens are bytes."""
    vocabulary = {character: number for number, character in enumerate(bytes_to_unicode().values())}
    tokenizer = WhisperTokenizer(vocab={**vocabulary, SPECIAL[0]: len(vocabulary)}, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL[1:], "pad_token": SPECIAL[0]})
    tokenizer.add_tokens(TIMESTAMPS)
    # Again, for the tokens exist only now.
    tokenizer.set_prefix_tokens(language=language, task=None if language is None else "transcribe")
    return WhisperProcessor(WhisperFeatureExtractor(feature_size=mel_bins, chunk_length=1), tokenizer)


def whisper(processor: WhisperProcessor, *, spread: float = 0.1, **changes: Any) -> PreTrainedModel:
    """Return a seeded Whisper of four blocks on each side, with a generation config as the published ones have."""
    tokenizer = processor.tokenizer
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in (*SPECIAL, *TIMESTAMPS)}
    sizes = {"d_model": 48, "encoder_layers": 4, "decoder_layers": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    sizes |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_source_positions": 50}
    sizes |= {"max_target_positions": 40, "num_mel_bins": processor.feature_extractor.feature_size}
    end, start = ids["<|endoftext|>"], ids["<|startoftranscript|>"]
    special = {"pad_token_id": end, "bos_token_id": end, "eos_token_id": end, "decoder_start_token_id": start}
    torch.manual_seed(0)
    drops = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
    config = WhisperConfig(vocab_size=len(tokenizer), **{**sizes, **special, **drops, **changes})
    model = _spread(WhisperForConditionalGeneration(config), spread)
    model.generation_config = GenerationConfig(
        **special,
        max_length=config.max_target_positions,
        is_multilingual=True,
        lang_to_id={"<|en|>": ids["<|en|>"], "<|de|>": ids["<|de|>"]},
        task_to_id={"transcribe": ids["<|transcribe|>"], "translate": ids["<|translate|>"]},
        no_timestamps_token_id=ids["<|notimestamps|>"],
        prev_sot_token_id=ids["<|startofprev|>"],
        max_initial_timestamp_index=20,
        suppress_tokens=[ids["<|startoflm|>"], ids["<|startofprev|>"], ids["<|nospeech|>"]],
        begin_suppress_tokens=[32, end],
        alignment_heads=[[0, 1], [2, 3], [3, 0], [3, 2]],
        return_timestamps=False,
    )
    return model


def ctc_processor(folder: Path, letters: str = "abcdeghilmow ", **changes: Any) -> Wav2Vec2Processor:
    """Return a processor whose tokens are letters; `changes` are the feature extractor's."""
    folder.mkdir(parents=True, exist_ok=True)
    tokens = ["<pad>", "<s>", "</s>", "<unk>", *("|" if letter == " " else letter for letter in letters)]
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    return Wav2Vec2Processor(Wav2Vec2FeatureExtractor(**changes), Wav2Vec2CTCTokenizer(str(folder / "vocab.json")))


ENCODER = {"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
CONVOLUTIONS = {"conv_dim": (16, 16, 16), "conv_kernel": (10, 8, 8), "conv_stride": (5, 8, 8)}
CONVOLUTIONS |= {"num_feat_extract_layers": 3, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4}
DROPLESS = {"hidden_dropout": 0.0, "activation_dropout": 0.0, "attention_dropout": 0.0, "feat_proj_dropout": 0.0}
DROPLESS |= {"final_dropout": 0.0, "layerdrop": 0.0, "apply_spec_augment": False}
LABELS = {"id2label": dict(enumerate(PITCHES)), "label2id": {name: number for number, name in enumerate(PITCHES)}}


def ctc_model(processor: Wav2Vec2Processor, *, hubert: bool = False, **changes: Any) -> PreTrainedModel:
    """Return a seeded wav2vec 2.0 or HuBERT that transcribes."""
    torch.manual_seed(0)
    config_class, model_class = (HubertConfig, HubertForCTC) if hubert else (Wav2Vec2Config, Wav2Vec2ForCTC)
    sizes = {"vocab_size": len(processor.tokenizer), "pad_token_id": 0, "ctc_loss_reduction": "mean"}
    config = config_class(**{**ENCODER, **CONVOLUTIONS, **DROPLESS, **sizes, **changes})
    return _spread(model_class(config), 0.05)


def sound_classifier(**changes: Any) -> PreTrainedModel:
    """Return a seeded wav2vec 2.0 that names the pitch of a sound."""
    torch.manual_seed(0)
    config = Wav2Vec2Config(**{**ENCODER, **CONVOLUTIONS, **DROPLESS, **LABELS, "classifier_proj_size": 24, **changes})
    return _spread(Wav2Vec2ForSequenceClassification(config), 0.05)


def spectrogram_classifier(**changes: Any) -> tuple[PreTrainedModel, ASTFeatureExtractor]:
    """Return a seeded audio spectrogram transformer that names the pitch of a sound, and its feature extractor."""
    torch.manual_seed(0)
    drops = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = ASTConfig(
        **{**ENCODER, **drops, **LABELS, "max_length": 32, "num_mel_bins": 16, "patch_size": 8, **changes}
    )
    extractor = ASTFeatureExtractor(num_mel_bins=config.num_mel_bins, max_length=config.max_length)
    return _spread(ASTForAudioClassification(config), 0.1), extractor


@torch.no_grad()
def _spread(model: PreTrainedModel, by: float) -> PreTrainedModel:
    """Move every parameter away from its default."""
    for parameter in model.parameters():
        parameter.add_(by * torch.randn_like(parameter))
    return model.eval()
