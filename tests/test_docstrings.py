"""Every public docstring has an example, and every example in a docstring runs and prints what it shows.

Examples name models of the Hub. Here those ids are folders of small random models of the same width, in the working directory,
where Transformers looks first. Examples may use `dataset` (text, label), `tokenized_dataset` and `tokenizer`.
"""

import doctest
import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers

import hf_guide
from hf_guide.distillation.losses.registry import _LOSSES
from hf_guide.initialization.config import CONFIG_CLASSES
from hf_guide.initialization.registry import _METHOD_CLASSES
from hf_guide.layouts.registry import _LAYOUTS, registered_layouts
from hf_guide.lelp.splitters.registry import _SPLITTERS
from tests.trust.artefacts import make_tokenizer

BERT = {"hidden_size": 768, "num_hidden_layers": 2, "num_attention_heads": 12, "intermediate_size": 3072}
DISTILBERT = transformers.DistilBertConfig(vocab_size=96, n_layers=3, max_position_embeddings=64, num_labels=2)
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
SMALL_IMAGES = {**SMALL, "image_size": 32, "patch_size": 8}
SMALL_TEXT = {**SMALL, "vocab_size": 96}
SWIN = transformers.SwinConfig(
    image_size=64, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], out_indices=[1, 2, 3, 4]
)
DETECTION = {"d_model": 16, "decoder_ffn_dim": 32, "decoder_attention_heads": 4, "num_queries": 4}
MASKS = {"fpn_feature_size": 32, "mask_feature_size": 32, "num_queries": 4, "num_labels": 3}
SOUNDS = transformers.Wav2Vec2Config(
    **SMALL, vocab_size=32, conv_dim=[8, 8], conv_kernel=[10, 3], conv_stride=[5, 2], num_conv_pos_embeddings=8
)
MODELS = {
    "HuggingFaceTB/SmolLM2-135M": (
        transformers.LlamaForCausalLM,
        transformers.LlamaConfig(
            vocab_size=96,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=4,
            num_attention_heads=9,
            num_key_value_heads=3,
            max_position_embeddings=128,
            tie_word_embeddings=True,
        ),
    ),
    "distilbert/distilbert-base-uncased": (transformers.DistilBertForMaskedLM, DISTILBERT),
    "distilbert/distilbert-base-uncased-finetuned-sst-2-english": (
        transformers.DistilBertForSequenceClassification,
        DISTILBERT,
    ),
    "dslim/bert-base-NER": (
        transformers.BertForTokenClassification,
        transformers.BertConfig(vocab_size=96, num_labels=3, **BERT),
    ),
    "google-t5/t5-small": (
        transformers.T5ForConditionalGeneration,
        transformers.T5Config(vocab_size=96, num_layers=2, decoder_start_token_id=0),
    ),
    "google/vit-base-patch16-224": (
        transformers.ViTForImageClassification,
        transformers.ViTConfig(image_size=32, num_labels=3, **BERT),
    ),
    "distilbert/distilbert-base-cased-distilled-squad": (transformers.DistilBertForQuestionAnswering, DISTILBERT),
    "facebook/vit-mae-base": (
        transformers.ViTMAEForPreTraining,
        transformers.ViTMAEConfig(
            decoder_hidden_size=16, decoder_num_attention_heads=4, decoder_num_hidden_layers=2, **SMALL_IMAGES
        ),
    ),
    "nvidia/segformer-b0-finetuned-ade-512-512": (
        transformers.SegformerForSemanticSegmentation,
        transformers.SegformerConfig(hidden_sizes=[8, 8, 16, 16], decoder_hidden_size=16, num_labels=3),
    ),
    "facebook/maskformer-swin-tiny-ade": (
        transformers.MaskFormerForInstanceSegmentation,
        transformers.MaskFormerConfig(
            backbone_config=SWIN, decoder_config=transformers.DetrConfig(decoder_layers=3, **DETECTION), **MASKS
        ),
    ),
    "facebook/mask2former-swin-tiny-coco-instance": (
        transformers.Mask2FormerForUniversalSegmentation,
        transformers.Mask2FormerConfig(
            backbone_config=SWIN,
            hidden_dim=32,
            feature_size=32,
            encoder_layers=1,
            decoder_layers=4,
            num_attention_heads=4,
            **MASKS,
        ),
    ),
    "facebook/detr-resnet-50": (
        transformers.DetrForObjectDetection,
        transformers.DetrConfig(
            backbone_config=transformers.ResNetConfig(
                embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], out_features=["stage2"]
            ),
            encoder_layers=1,
            decoder_layers=3,
            encoder_ffn_dim=32,
            encoder_attention_heads=4,
            **DETECTION,
        ),
    ),
    "google-bert/bert-base-uncased": (transformers.BertForMaskedLM, transformers.BertConfig(**SMALL_TEXT)),
    "openai/clip-vit-base-patch32": (
        transformers.CLIPModel,
        transformers.CLIPConfig(text_config=SMALL_TEXT, vision_config=SMALL_IMAGES, projection_dim=16),
    ),
    "HuggingFaceTB/SmolVLM-256M-Instruct": (
        transformers.Idefics3ForConditionalGeneration,
        transformers.Idefics3Config(
            text_config=transformers.LlamaConfig(pad_token_id=0, **SMALL_TEXT), vision_config=SMALL_IMAGES
        ),
    ),
    "superb/wav2vec2-base-superb-ks": (transformers.Wav2Vec2ForSequenceClassification, SOUNDS),
    "facebook/wav2vec2-base-960h": (transformers.Wav2Vec2ForCTC, SOUNDS),
    "openai/whisper-tiny": (
        transformers.WhisperForConditionalGeneration,
        transformers.WhisperConfig(
            vocab_size=96,
            d_model=16,
            encoder_layers=1,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            pad_token_id=0,
            decoder_start_token_id=1,
        ),
    ),
}

MODULES = [
    module.name
    for module in pkgutil.walk_packages(hf_guide.__path__, "hf_guide.")
    if not module.name.startswith("hf_guide.metrics.") and not module.name.endswith(".__main__")
]
PUBLIC = [
    name
    for name in hf_guide.__all__
    if not name.startswith("__")
    and not (inspect.isclass(getattr(hf_guide, name)) and issubclass(getattr(hf_guide, name), Exception))
    and not (getattr(hf_guide, name).__doc__ or "").startswith("Deprecated")
]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder in which the ids of the examples are folders of small models with tokenizers."""
    root = tmp_path_factory.mktemp("hub")
    torch.manual_seed(0)
    for name, (model_class, config) in MODELS.items():
        model_class(config).save_pretrained(root / name)
        make_tokenizer().save_pretrained(root / name)
    return root


@pytest.fixture(scope="module")
def names(hub: Path) -> dict[str, Any]:
    """Return what an example may use without making it: `dataset`, `tokenized_dataset` and `tokenizer`."""
    words = torch.randint(0, 93, (64, 24), generator=torch.Generator().manual_seed(0))
    texts = [" ".join(f"w{word}" for word in row) for row in words.tolist()]
    tokenizer = make_tokenizer()
    encoded = tokenizer(texts)
    return {
        "dataset": datasets.Dataset.from_dict({"text": texts, "label": [number % 2 for number in range(len(texts))]}),
        "tokenized_dataset": datasets.Dataset.from_dict(
            {name: encoded[name] for name in ("input_ids", "attention_mask")}
        ),
        "tokenizer": tokenizer,
    }


@pytest.fixture
def restored_registries() -> Iterator[None]:
    """Remove the layouts, losses, splitters and methods that an example registers."""
    registered_layouts()
    importlib.import_module("hf_guide.lelp.loss")  # which registers when it is first imported
    importlib.import_module("hf_guide.methods")
    tables: list[dict[str, Any]] = [_LAYOUTS, _LOSSES, _SPLITTERS, CONFIG_CLASSES, _METHOD_CLASSES]
    before = [dict(table) for table in tables]
    yield
    for table, entries in zip(tables, before, strict=True):
        table.clear()
        table.update(entries)


@pytest.mark.usefixtures("restored_registries")
@pytest.mark.parametrize("name", MODULES)
def test_examples_print_what_they_show(
    name: str, hub: Path, names: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for entry in hub.iterdir():
        (tmp_path / entry.name).symlink_to(entry)
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(name)
    failed, _ = doctest.testmod(module, extraglobs=names, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert not failed


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_has_an_example(name: str) -> None:
    documented = getattr(hf_guide, name)
    assert re.search(r"^\s*>>> ", documented.__doc__ or "", re.MULTILINE), (
        f"the docstring of {name} has no example (>>>)"
    )


def test_no_example_is_skipped() -> None:
    root = Path(hf_guide.__file__).parent
    skipped = [
        str(path.relative_to(root))
        for path in root.rglob("*.py")
        if "doctest: +SKIP" in path.read_text(encoding="utf-8")
    ]
    assert not skipped
