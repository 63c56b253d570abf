"""Compare the processor or tokenizer that makes the batches with the teacher's own.

If their settings differ at all, both process the same images, sound or texts, and their outputs are compared.
"""

import copy
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoProcessor, AutoTokenizer, ProcessorMixin

from hf_guide.errors import TeacherError
from hf_guide.models.adapters import forward_parameters, without_adapter
from hf_guide.models.pretrained import find_tokenizer
from hf_guide.models.token_rows import attached_tokenizer
from hf_guide.tasks import Task
from hf_guide.teachers.alignment import shared_vocabulary_size

logger = logging.getLogger(__name__)

_HUB_KWARGS = ("revision", "token", "cache_dir", "local_files_only", "subfolder", "trust_remote_code")
_NOT_FOUND_ERRORS = (OSError, ValueError, ImportError, KeyError)
_PROCESSING_ERRORS = (ValueError, TypeError, RuntimeError, KeyError, AttributeError, IndexError)
_MAX_GREY_LEVELS = 2.0
"""How many of 256 levels of grey two backends of one image processor may differ by: they round when they resize."""

_IRRELEVANT_SETTINGS = (
    "image_processor_type",
    "feature_extractor_type",
    "processor_class",
    "auto_map",
    "name_or_path",
)
_PROBE_TEXTS = (
    "The quick Brown fox, déjà-vu: 12345 × 3.14!",
    " leading and  double  spaces\tand\nlines ",
    "HELLO World iPhone ÄÖÜ ß ﬁ ① naïve Ｆｕｌｌ",
    "def f(x):\n    return x['key'] != 0  # comment",
    "我们今天 привет мир مرحبا こんにちは 🙂",
    "can't won't it's e-mail@example.com https://example.com/a_b?c=d",
)
_SIZE_SETTINGS = ("do_resize", "size", "size_divisor", "do_center_crop", "crop_size", "do_pad", "pad_size")
"""Which settings of an image processor state how large its images become."""
_SAMPLED_TOKENS = 64
_WAVE_EPS = 1e-7
"""What feature extractors of waveforms add to a variance."""
_BACKEND_PARTS = ("normalizer", "pre_tokenizer", "post_processor", "model")


@dataclass(frozen=True)
class PixelConversion:
    """Converts pixels from one normalisation to another: `pixels * scale + shift`, channel by channel."""

    scale: tuple[float, ...]
    shift: tuple[float, ...]

    def apply(self, pixels: Tensor) -> Tensor:
        """Return pixels (..., channels, height, width) in the other normalisation."""
        dtype = torch.promote_types(pixels.dtype, torch.float32)
        scale, shift = (
            torch.tensor(each, dtype=dtype, device=pixels.device).view(-1, 1, 1) for each in (self.scale, self.shift)
        )
        return (pixels.to(dtype) * scale + shift).to(pixels.dtype)


@dataclass(frozen=True)
class SoundConversion:
    """Converts waveforms or spectrograms from one normalisation to another.

    Attributes:
        name: The input: "input_values" or "input_features".
        scale, shift: The converted input is `values * scale + shift`.
        normalizes: Each waveform is scaled to mean 0 and variance 1, as the teacher's feature extractor does.
        drops_mask: The teacher was trained without an attention mask over waveforms, so it gets none.
    """

    name: str
    scale: float = 1.0
    shift: float = 0.0
    normalizes: bool = False
    drops_mask: bool = False

    def apply(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Return a batch with its sounds converted.

        Raises:
            TeacherError: The sounds are padded, or may be, and there is no attention mask that states where.
        """
        converted = dict(inputs)
        values = converted[self.name]
        mask = converted.get("attention_mask")
        if self.normalizes:
            if not isinstance(mask, Tensor):
                raise TeacherError(
                    "The teacher expects each waveform normalised to mean 0 and variance 1 without its padding, and the "
                    "batch has no attention_mask. Set return_attention_mask=True in the feature extractor."
                )
            real = mask.to(values.dtype)
            count = real.sum(-1, keepdim=True).clamp(min=1)
            centered = values - (values * real).sum(-1, keepdim=True) / count
            variance = (centered.square() * real).sum(-1, keepdim=True) / count
            converted[self.name] = centered / (variance + _WAVE_EPS).sqrt() * real
        elif (self.scale, self.shift) != (1.0, 0.0):
            converted[self.name] = values * self.scale + self.shift
        if self.drops_mask:
            converted.pop("attention_mask", None)
        return converted


@dataclass(frozen=True)
class InputConversion:
    """What must be converted between the conventions of two processors.

    Attributes:
        pixels: Converts pixels to the teacher's normalisation; None where it is the same.
        sounds: Converts sounds to the teacher's normalisation; None where it is the same.
        pair_separator: As in `TeacherInputs`.
    """

    pixels: PixelConversion | None = None
    sounds: SoundConversion | None = None
    pair_separator: int | None = None


def check_processors(
    teacher: Any,
    task: Task,
    name: str,
    processing_class: Any,
    *,
    student: Any = None,
    init_kwargs: Mapping[str, Any] | None = None,
) -> InputConversion:
    """Compare the processor of the batches with the one among a teacher's files.

    Args:
        teacher: The model.
        task: The model's.
        name: The teacher's, for errors.
        processing_class: What makes the batches; if None, the processor among the student's files.
        student: The student, or None.
        init_kwargs: `from_pretrained`'s.

    Raises:
        VocabularyError: The tokenizers have other tokens.
        TeacherError: They differ in a way that cannot be converted exactly; the settings and both values are named.
    """
    hub = {key: value for key, value in (init_kwargs or {}).items() if key in _HUB_KWARGS}
    pixels = None
    if task.row.inputs in ("image", "image-text") or teacher.main_input_name == "pixel_values":
        images = _sub_processor(processing_class, "image_processor", "image_mean", "do_rescale", "do_resize")
        compare = _compare_image_tokens if _has_image_tokens(teacher) else _compare_images
        if any(output.items in ("pixel", "query") for output in task.row.outputs):
            compare = _compare_images_of_any_size
        pixels = _compare(images, teacher, name, student, hub, AutoImageProcessor, compare)
        if "input_ids" not in forward_parameters(teacher):
            return InputConversion(pixels)
        _check_processor_settings(processing_class, teacher, name, hub)
    sounds = None
    if teacher.main_input_name in ("input_features", "input_values"):
        extractor = _sub_processor(processing_class, "feature_extractor", "sampling_rate")
        sounds = _compare(extractor, teacher, name, student, hub, AutoFeatureExtractor, _compare_sounds)
    tokenizer = batch_tokenizer(processing_class, student)
    if tokenizer is None or not teacher.config._name_or_path:
        return InputConversion(pixels, sounds)
    safe = {key: value for key, value in hub.items() if key != "trust_remote_code"}
    teacher_processor = attached_tokenizer(teacher) or find_tokenizer(teacher.config._name_or_path, **safe)
    if (
        teacher_processor is not None
        and attached_tokenizer(teacher) is None
        and task is Task.TOKEN_CLASSIFICATION
        and getattr(tokenizer, "add_prefix_space", None)
    ):
        teacher_processor = _load_processor(
            AutoTokenizer, teacher, safe | {"add_prefix_space": True}
        )  # its words are separate
    if teacher_processor is None:
        return InputConversion(pixels, sounds)
    # Vocabularies of language models may be shared in part, which `build_live_teachers` finds out.
    if student is None or not task.is_language_model:
        sizes = num_token_rows(student or teacher) or len(tokenizer), num_token_rows(teacher) or len(teacher_processor)
        shared_vocabulary_size(tokenizer, teacher_processor, *sizes)
    if task is Task.CTC:  # the texts are no inputs: what the outputs mean was compared
        return InputConversion(pixels, sounds)
    for language in ("src_lang", "tgt_lang"):  # what the data is in, not what either model was published with
        if getattr(tokenizer, language, None) and hasattr(teacher_processor, language):
            setattr(teacher_processor, language, getattr(tokenizer, language))
    _compare_tokenizers(tokenizer, teacher_processor, name, task)
    templates = [getattr(each, "chat_template", None) for each in (tokenizer, teacher_processor)]
    if None not in templates and templates[0] != templates[1]:
        _warn_of_chat_templates(name)
    return InputConversion(pixels, sounds, _pair_separator(tokenizer, teacher_processor))


def _warn_of_chat_templates(name: str) -> None:
    logger.warning(
        "The tokenizer of the batches and that of the teacher %s have different chat templates. Conversations must be "
        "rendered with the teacher's, or it reads another format than it was trained on.",
        name,
    )


def batch_tokenizer(processing_class: Any, student: Any = None) -> Any:
    """Return the tokenizer of the batches: the processor's, else the student's, attached or among its files, else None.

    Scripts for speech pass the feature extractor alone as `processing_class`.
    """
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    if hasattr(tokenizer, "get_vocab"):
        return tokenizer
    name = getattr(student.config, "_name_or_path", "") if student is not None else ""
    return attached_tokenizer(student) or (find_tokenizer(name) if name else None)


def num_token_rows(model: Any) -> int | None:
    """Return the number of rows of a model's input embeddings; None where it has none."""
    try:
        embeddings = without_adapter(model).get_input_embeddings()
    except NotImplementedError:  # models of characters hash them
        return None
    rows = getattr(embeddings, "num_embeddings", None)
    return rows if isinstance(rows, int) else None


def _sub_processor(processing_class: Any, attribute: str, *signs: str) -> Any:
    part = getattr(processing_class, attribute, None)
    if part is not None:
        return part
    return processing_class if any(hasattr(processing_class, sign) for sign in signs) else None


def _load_processor(auto: Any, model: Any, hub: Mapping[str, Any]) -> Any:
    """Return the processor among a model's files, or None where there is none."""
    name = getattr(model.config, "_name_or_path", "")
    try:
        return auto.from_pretrained(name, **hub) if name else None
    except _NOT_FOUND_ERRORS:
        return None


def _compare(
    batch_processor: Any, teacher: Any, name: str, student: Any, hub: Mapping[str, Any], auto: Any, compare: Any
) -> Any:
    teacher_processor = _load_processor(auto, teacher, hub)
    if teacher_processor is None:
        return None
    if batch_processor is None and student is not None:
        batch_processor = _load_processor(auto, student, {})
    if batch_processor is None:
        logger.warning(
            "The processor of the batches is not known, and the teacher %s expects what its %s makes. Pass "
            "processing_class, so that they are compared.",
            name,
            type(teacher_processor).__name__,
        )
        return None
    return compare(batch_processor, teacher_processor, name)


def _differences(batch_processor: Any, teacher_processor: Any) -> dict[str, tuple[Any, Any]]:
    """Return the settings in which two processors differ, with the values of both."""
    settings = [
        {
            key: value
            for key, value in each.to_dict().items()
            if key not in _IRRELEVANT_SETTINGS and not key.startswith("_")
        }
        for each in (batch_processor, teacher_processor)
    ]
    plain = [{key: _to_plain(value) for key, value in each.items()} for each in settings]
    return {
        key: (plain[0].get(key), plain[1].get(key))
        for key in sorted(plain[0].keys() | plain[1].keys())
        if plain[0].get(key) != plain[1].get(key)
    }


def _to_plain(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Mapping):
        return {key: _to_plain(each) for key, each in value.items() if each is not None}
    if isinstance(value, (list, tuple)):
        return [_to_plain(each) for each in value]
    if hasattr(value, "to_dict") or hasattr(value, "__dataclass_fields__"):
        return {key: _to_plain(each) for key, each in vars(value).items() if each is not None}
    return int(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _base_class_name(processor: Any) -> str:
    return type(processor).__name__.removesuffix("Fast").removesuffix("Pil")


def _mismatch_error(
    batch_processor: Any, teacher_processor: Any, name: str, differing: Mapping[str, tuple[Any, Any]]
) -> TeacherError:
    shown = "; ".join(
        f"{key} is {one!r} there and {other!r} for the teacher" for key, (one, other) in differing.items()
    )
    return TeacherError(
        f"The batches are made by a {type(batch_processor).__name__}, and the teacher {name} expects what its own "
        f"{type(teacher_processor).__name__} makes, which differs: {shown or 'they process differently'}. Process the "
        "data with the teacher's, or distil from a teacher with the student's."
    )


# Images


def _compare_images(batch_processor: Any, teacher_processor: Any, name: str) -> PixelConversion | None:
    differing = _differences(batch_processor, teacher_processor)
    if not differing and _base_class_name(batch_processor) == _base_class_name(teacher_processor):
        return None
    try:
        one, other = _pixel_normalization(batch_processor), _pixel_normalization(teacher_processor)
        scale = other[0] / one[0]
        shift = other[1] - one[1] * scale
        image_pairs = [
            (
                _process_image(batch_processor, image).double() * scale + shift,
                _process_image(teacher_processor, image).double(),
            )
            for image in _probe_images()
        ]
    except _PROCESSING_ERRORS:
        raise _mismatch_error(batch_processor, teacher_processor, name, differing) from None
    level = other[0].abs()
    for converted, expected in image_pairs:
        if converted.shape != expected.shape or bool(((converted - expected).abs() > _MAX_GREY_LEVELS * level).any()):
            raise _mismatch_error(batch_processor, teacher_processor, name, differing)
    if torch.allclose(scale, torch.ones_like(scale), rtol=0, atol=1e-12) and not bool(shift.any()):
        return None
    logger.info("Pixels are converted to the normalisation of the teacher %s: %s.", name, differing)
    return PixelConversion(tuple(scale.flatten().tolist()), tuple(shift.flatten().tolist()))


def _compare_images_of_any_size(batch_processor: Any, teacher_processor: Any, name: str) -> PixelConversion | None:
    """Compare image processors of models that label pixels or find objects, for which a script chooses the size."""
    resized, changed = copy.deepcopy(teacher_processor), []
    for key in _SIZE_SETTINGS:
        if hasattr(batch_processor, key) and hasattr(resized, key):
            chosen, stated = getattr(batch_processor, key), getattr(resized, key)
            if _to_plain(chosen) != _to_plain(stated):
                changed.append(f"{key} is {_to_plain(chosen)!r}, {_to_plain(stated)!r} in the teacher's files")
                setattr(resized, key, chosen)
    conversion = _compare_images(batch_processor, resized, name)
    if changed:
        logger.warning("The teacher %s is fed images of another size: %s.", name, "; ".join(changed))
    return conversion


def _has_image_tokens(model: Any) -> bool:
    """Return whether a model's text has tokens that stand for images."""
    known = forward_parameters(model)
    names = ("image_token_id", "image_token_index")
    return {"input_ids", "pixel_values"} <= set(known) and any(hasattr(model.config, name) for name in names)


def _compare_image_tokens(batch_processor: Any, teacher_processor: Any, name: str) -> None:
    """Compare the image processors of vision-language models, whose pixels are padded and cut up, so never converted."""
    if _compare_images(batch_processor, teacher_processor, name) is not None:
        differing = _differences(batch_processor, teacher_processor)
        raise _mismatch_error(batch_processor, teacher_processor, name, differing)


def _check_processor_settings(processing_class: Any, teacher: Any, name: str, hub: Mapping[str, Any]) -> None:
    """Check that two processors of images and texts have the same settings, of which the tokens of an image follow.

    Raises:
        TeacherError: They have not; both values are named.
    """
    if not isinstance(processing_class, ProcessorMixin):
        return
    teacher_processor = _load_processor(AutoProcessor, teacher, hub)
    if not isinstance(teacher_processor, ProcessorMixin):
        return
    settings = [
        {key: value for key, value in each.to_dict().items() if isinstance(value, (bool, int, float, str))}
        for each in (processing_class, teacher_processor)
    ]
    differing = {
        key: (settings[0].get(key), settings[1].get(key))
        for key in sorted(settings[0].keys() | settings[1].keys())
        if settings[0].get(key) != settings[1].get(key) and key not in (*_IRRELEVANT_SETTINGS, "chat_template")
    }
    if differing:
        raise _mismatch_error(processing_class, teacher_processor, name, differing)
    if processing_class.chat_template != teacher_processor.chat_template:
        _warn_of_chat_templates(name)


def _pixel_normalization(processor: Any) -> tuple[Tensor, Tensor]:
    """Return the scale and the shift that a processor applies to grey levels, (channels, 1, 1) each."""
    rescale = float(processor.rescale_factor) if getattr(processor, "do_rescale", False) else 1.0
    if not getattr(processor, "do_normalize", False):
        return torch.full((1, 1, 1), rescale, dtype=torch.float64), torch.zeros(1, 1, 1, dtype=torch.float64)
    mean, std = (
        torch.as_tensor(np.asarray(value, dtype=np.float64)).reshape(-1, 1, 1)
        for value in (processor.image_mean, processor.image_std)
    )
    return rescale / std, -mean / std


def _probe_images() -> Iterator[np.ndarray]:
    draw = np.random.default_rng(0)
    for height, width in ((48, 64), (75, 40)):
        yield draw.integers(0, 256, (height, width, 3), dtype=np.uint8)


def _process_image(processor: Any, image: np.ndarray) -> Tensor:
    return processor(image, return_tensors="pt")["pixel_values"]


# Sound


def _compare_sounds(batch_processor: Any, teacher_processor: Any, name: str) -> SoundConversion | None:
    differing = _differences(batch_processor, teacher_processor)
    if not differing and _base_class_name(batch_processor) == _base_class_name(teacher_processor):
        return None
    mismatch = _mismatch_error(batch_processor, teacher_processor, name, differing)
    if "sampling_rate" in differing:
        raise mismatch
    try:
        batch, expected = (_process_sounds(each) for each in (batch_processor, teacher_processor))
    except _PROCESSING_ERRORS:
        raise mismatch from None
    key = next(iter(batch[0]))
    if any(key not in each for each in expected):
        raise mismatch
    pairs = [(one[key], other[key]) for one, other in zip(batch, expected, strict=True)]
    if any(one.shape != other.shape for one, other in pairs):
        raise mismatch
    drops_mask = _compare_masks(batch, expected, name)
    conversion = _sound_conversion(key, pairs)
    if conversion is None:
        raise mismatch
    if drops_mask:
        conversion = replace(conversion, drops_mask=True)
    if conversion == SoundConversion(key):
        return None
    logger.info("Sounds are converted to the normalisation of the teacher %s: %s.", name, differing)
    return conversion


def _process_sounds(processor: Any) -> list[dict[str, Tensor]]:
    """Return what a feature extractor makes of two sounds of unlike length and loudness, with its attention mask."""
    draw = np.random.default_rng(0)
    rate = int(processor.sampling_rate)
    waves = [
        (draw.standard_normal(rate // part) * level + level).astype(np.float32)
        for part, level in ((1, 0.1), (2, 0.03))
    ]
    return [dict(processor([wave], sampling_rate=rate, return_tensors="pt").items()) for wave in waves]


def _compare_masks(batch: list[dict[str, Tensor]], expected: list[dict[str, Tensor]], name: str) -> bool:
    """Return whether the teacher must get no attention mask, which the batches have.

    Raises:
        TeacherError: It must get one, and the batches have none.
    """
    masked = ["attention_mask" in each[0] for each in (batch, expected)]
    values = next(iter(expected[0].values())), next(iter(expected[1].values()))
    if masked[0] == masked[1] or values[0].shape == values[1].shape:  # windows of one length are not masked
        return False
    if masked[1]:
        raise TeacherError(
            f"The teacher {name} expects an attention_mask over padded sounds, and the batches have none: "
            "return_attention_mask is False there. Set it to True in the feature extractor: both models then get the mask."
        )
    return True


def _sound_conversion(key: str, pairs: list[tuple[Tensor, Tensor]]) -> SoundConversion | None:
    """Return what makes the second of each pair of the first; None where nothing known does."""
    one, other = (torch.cat([pair[side].double().flatten() for pair in pairs]) for side in (0, 1))
    if torch.allclose(one, other, rtol=1e-4, atol=1e-4):
        return SoundConversion(key)
    ones = torch.stack([one, torch.ones_like(one)], dim=1)
    scale, shift = torch.linalg.lstsq(ones, other[:, None]).solution.flatten().tolist()
    affine = SoundConversion(key, scale=scale, shift=shift)
    normalizing = SoundConversion(key, normalizes=True)
    for conversion in (affine, normalizing) if pairs[0][0].ndim == 2 else (affine,):
        made = [
            conversion.apply({key: before.double(), "attention_mask": torch.ones(before.shape[:2])})[key]
            for before, _ in pairs
        ]
        if all(
            torch.allclose(each, after.double(), rtol=1e-4, atol=1e-4)
            for each, (_, after) in zip(made, pairs, strict=True)
        ):
            return conversion
    return None


# Texts


def _compare_tokenizers(batch_processor: Any, teacher_processor: Any, name: str, task: Task) -> None:
    if (
        task is Task.MASKED_LM
        and teacher_processor.mask_token is not None
        and batch_processor.mask_token != teacher_processor.mask_token
    ):
        raise TeacherError(
            f"The batches are masked with {batch_processor.mask_token!r}, and the teacher {name} expects "
            f"{teacher_processor.mask_token!r}. Set the "
            "tokenizer's mask_token to the teacher's."
        )
    parts = [_backend_settings(each) for each in (batch_processor, teacher_processor)]
    differing = {
        key: (parts[0].get(key), parts[1].get(key)) for key in _BACKEND_PARTS if parts[0].get(key) != parts[1].get(key)
    }
    if parts[0] and parts[1] and not differing:
        return
    for text in [*_PROBE_TEXTS, *_vocabulary_texts(teacher_processor)]:
        token_lists = [_tokenize(each, text, task) for each in (batch_processor, teacher_processor)]
        if token_lists[0] != token_lists[1]:
            raise TeacherError(
                f"The tokenizer of the batches and that of the teacher {name} make other tokens of the same text: of "
                f"{text[:24]!r}... {_format_tokens(batch_processor, token_lists[0])} and, for the teacher, "
                f"{_format_tokens(teacher_processor, token_lists[1])}. "
                f"{_explain_settings(batch_processor, teacher_processor, differing)}Tokenise with the teacher's, or "
                "distil from a teacher with the student's."
            )


def _vocabulary_texts(tokenizer: Any) -> list[str]:
    """Return texts of a sample of a tokenizer's own tokens, in several letter cases."""
    vocabulary = sorted(set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens))
    sample = vocabulary[:: max(1, len(vocabulary) // _SAMPLED_TOKENS)]
    text = " ".join(tokenizer.convert_tokens_to_string([token]).strip() for token in sample)
    return [text, text.upper(), text.title(), f"  {text}"]


def _backend_settings(tokenizer: Any) -> dict[str, Any]:
    """Return the settings of a fast tokenizer, without the vocabulary (`alignment` compares it); empty for a slow one."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return {}
    described = json.loads(backend.to_str())
    parts = {key: described.get(key) for key in _BACKEND_PARTS}
    if isinstance(parts["model"], dict):
        parts["model"] = {key: value for key, value in parts["model"].items() if key != "vocab"}
    return parts


def _tokenize(tokenizer: Any, text: str, task: Task) -> Any:
    """Return the tokens of a text, and the special tokens before and after it.

    For causal language models the tokens after a text are not compared: the data decides where texts end. For speech only
    the text's own are: those before it name the language and the task of the data.
    """
    try:
        bare = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        whole = tokenizer(text, verbose=False)["input_ids"]
    except Exception as error:  # noqa: BLE001  # tokenizers raises no narrower class
        return str(error)
    at = next((start for start in range(len(whole) - len(bare) + 1) if whole[start : start + len(bare)] == bare), None)
    if at is None:
        return bare, whole, []
    if task is Task.SPEECH_SEQ2SEQ:
        return bare, [], []
    return bare, whole[:at], [] if task is Task.CAUSAL_LM else whole[at + len(bare) :]


def _format_tokens(tokenizer: Any, tokens: Any) -> str:
    if isinstance(tokens, str):
        return f"nothing ({tokens})"
    bare, before, after = tokens
    ids = [*before, *bare, *after] if before != bare else bare
    return str(tokenizer.convert_ids_to_tokens(ids[:8]))


def _explain_settings(batch_processor: Any, teacher_processor: Any, differing: Mapping[str, Any]) -> str:
    options = (
        "do_lower_case",
        "do_basic_tokenize",
        "strip_accents",
        "add_prefix_space",
        "add_bos_token",
        "add_eos_token",
    )
    clauses = [
        f"{option} is {values[0]!r} there and {values[1]!r} for the teacher"
        for option in options
        if len(
            set(
                values := [
                    getattr(each, option, each.init_kwargs.get(option))
                    for each in (batch_processor, teacher_processor)
                ]
            )
        )
        > 1
    ]
    clauses += [f"their {key} differs" for key in differing] if not clauses else []
    return f"Their settings: {'; '.join(clauses)}. " if clauses else ""


def _pair_separator(batch_processor: Any, teacher_processor: Any) -> int | None:
    """Return the token between two texts, where the teacher's tokenizer makes token types and the batches' does not."""
    types = (
        teacher_processor("a", "b", verbose=False).get("token_type_ids")
        if _has_token_types(teacher_processor)
        else None
    )
    return (
        teacher_processor.sep_token_id
        if types is not None and any(_flatten(types)) and not _has_token_types(batch_processor)
        else None
    )


def _has_token_types(tokenizer: Any) -> bool:
    return "token_type_ids" in getattr(tokenizer, "model_input_names", ())


def _flatten(values: Sequence[Any]) -> list[int]:
    return [each for value in values for each in (value if isinstance(value, list) else [value])]
