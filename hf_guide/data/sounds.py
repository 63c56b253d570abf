"""Decode the sounds of a dataset: files, bytes, arrays or what `datasets.Audio` decodes, as mono float32 at one rate.

Does: read PCM files by itself, anything else by torchcodec or soundfile where one is installed; mix channels, resample.
Does not: extract features (`speech.py`).
"""

import importlib.util
import io
import wave
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hf_guide.errors import OptionError


class SoundError(ValueError):
    """A sound cannot be read; the message is a clause that follows the name of the sound."""


def decode_sound(
    value: Any, sampling_rate: int, *, row: int, column: str, dataset: str, folder: Path | None = None
) -> np.ndarray:
    """Decode a sound of a dataset.

    Args:
        value: A path; a mapping with "path" or "bytes", as `datasets.Audio(decode=False)` returns it, or with "array" and
            "sampling_rate"; or a decoder of torchcodec, as `datasets.Audio()` returns it.
        sampling_rate: The rate that is returned.
        row, column, dataset: Index of the row and names, for the error.
        folder: Where relative paths begin, if not in the working directory.

    Returns:
        The sound, (samples,), float32, the mean of its channels.

    Raises:
        OptionError: It cannot be read or resampled, or has no samples; names the row, and the package that is needed.
    """
    try:
        sound, rate = _samples_and_rate(value, folder)
        if not sound.size:
            raise SoundError("is empty. Remove the row")
        if sound.ndim > 1:
            sound = sound.mean(0 if sound.shape[0] < sound.shape[1] else 1)
        if not np.isfinite(sound).all():
            raise SoundError("has samples that are not finite. Replace or remove it")
        return _resample(sound.astype(np.float32, copy=False), rate, sampling_rate)
    except SoundError as error:
        path = value.get("path") if isinstance(value, Mapping) else value
        name = f"the sound {Path(path).name}" if isinstance(path, str) and path else "its sound"
        raise OptionError(f"{dataset}: {name} in row {row}, column {column!r}, {error}.") from error


def _samples_and_rate(value: Any, folder: Path | None) -> tuple[np.ndarray, int]:
    if isinstance(value, str):
        return _read_file(value, folder)
    if isinstance(value, Mapping) and value.get("array") is not None:
        rate = value.get("sampling_rate")
        if not isinstance(rate, int) or rate < 1:
            raise SoundError(
                f"is an array with sampling_rate={rate!r}. It must be a whole number of samples per second"
            )
        return np.asarray(value["array"]), rate
    if isinstance(value, Mapping) and value.get("bytes") is not None:
        return _read_bytes(value["bytes"])
    if isinstance(value, Mapping) and isinstance(value.get("path"), str):
        return _read_file(value["path"], folder)
    if hasattr(value, "get_all_samples"):
        samples = value.get_all_samples()
        return samples.data.cpu().numpy(), int(samples.sample_rate)
    raise SoundError(
        f"is {'None' if value is None else f'of type {type(value).__name__}'}. It must be a path, bytes, or an array with its "
        "sampling_rate"
    )


def _read_file(path: str, folder: Path | None) -> tuple[np.ndarray, int]:
    found = Path(path)
    if not found.is_absolute() and not found.is_file() and folder is not None:
        found = folder / path
    try:
        return _read_bytes(found.read_bytes())
    except OSError as error:
        raise SoundError(
            f"cannot be read: {error.strerror}. Relative paths begin in the working directory or the dataset's"
        ) from error


def _read_bytes(content: bytes) -> tuple[np.ndarray, int]:
    try:
        return _read_pcm(content)
    except (wave.Error, EOFError) as error:
        if importlib.util.find_spec("torchcodec") is not None:
            return _read_with_torchcodec(content)
        if importlib.util.find_spec("soundfile") is not None:
            return _read_with_soundfile(content)
        raise SoundError(
            f"is not a WAV file of whole numbers ({error or 'it ends too early'}), and other formats need torchcodec or "
            "soundfile: install one of them"
        ) from error


def _read_pcm(content: bytes) -> tuple[np.ndarray, int]:
    """Read a WAV file of 8, 16, 24 or 32 bit; float32, (channels, samples), within -1 and 1."""
    with wave.open(io.BytesIO(content)) as file:
        width, channels, rate = file.getsampwidth(), file.getnchannels(), file.getframerate()
        frames = np.frombuffer(file.readframes(file.getnframes()), dtype=np.uint8)
    frames = frames[: len(frames) // (width * channels) * width * channels].reshape(-1, width)
    if width == 1:
        samples = (frames[:, 0].astype(np.float32) - 128) / 128
    else:  # the sign is in the highest byte: fill the lowest of 32 bits with zeros
        padded = np.zeros((len(frames), 4), dtype=np.uint8)
        padded[:, 4 - width :] = frames
        samples = (padded.view("<i4")[:, 0] / np.float64(2**31)).astype(np.float32)
    return samples.reshape(-1, channels).T, rate


def _read_with_torchcodec(content: bytes) -> tuple[np.ndarray, int]:
    from torchcodec.decoders import AudioDecoder

    try:
        samples = AudioDecoder(content).get_all_samples()
    except (RuntimeError, ValueError) as error:
        raise SoundError(f"cannot be decoded by torchcodec: {error}. Replace or remove it") from error
    return samples.data.numpy(), int(samples.sample_rate)


def _read_with_soundfile(content: bytes) -> tuple[np.ndarray, int]:
    import soundfile

    try:
        samples, rate = soundfile.read(io.BytesIO(content), dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, TypeError) as error:
        raise SoundError(f"cannot be decoded by soundfile: {error}. Replace or remove it") from error
    return samples.T, int(rate)


def _resample(sound: np.ndarray, rate: int, sampling_rate: int) -> np.ndarray:
    if rate == sampling_rate:
        return sound
    try:
        from scipy.signal import resample_poly
    except ImportError as error:
        raise SoundError(
            f"has a sampling rate of {rate}, and the model expects {sampling_rate}: install scipy, by which it is resampled"
        ) from error
    common = int(np.gcd(rate, sampling_rate))
    return resample_poly(sound, sampling_rate // common, rate // common).astype(np.float32)
