"""A tiny model, examples of unequal size and a collator for every row of the task table, on which its laws are tested."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel, set_seed

from hf_guide.tasks import Task
from tests.distillation.small import CLASSES, VOCABULARY, _bert_config, model_for
from tests.distillation.small import collate as collate_text
from tests.distillation.small import examples_for as text_examples

Examples = list[dict[str, Any]]


@dataclass(frozen=True)
class TaskCase:
    """What a law needs of one task.

    Attributes:
        task: Its row.
        build: Returns a model of random weights from a seed and a width.
        examples: Returns so many examples.
        collate: Makes a batch of them.
        losses: The terms that are distilled.
        batch_coupled: Whether the model's own loss depends on which examples are in a batch together, so that a step is
            another one when its batch is split up.
        padding_counts: Whether the model's own loss depends on padding: its softmax has the padded positions, too.
        has_own_loss: Whether the model has a loss.
        refused_by_cache: What a capture's error matches, where the outputs cannot be cached.
        reference_dtype: Of the plain formula; XLNet makes its position embeddings in float32, and EoMT
            masks its attention where logits of masks are below zero, which rounding decides for some.
        label_shift: How many positions before its label the logits of a token are.
    """

    task: Task
    build: Callable[[int, int], PreTrainedModel]
    examples: Callable[[int], Examples]
    collate: Callable[[Examples], dict[str, Any]]
    losses: tuple[str, ...] = ("kd", "hidden_states")
    batch_coupled: bool = False
    padding_counts: bool = False
    has_own_loss: bool = True
    refused_by_cache: str | None = None
    label_shift: int = 0
    reference_dtype: torch.dtype = torch.float64

    @property
    def compares_examples(self) -> bool:
        """Whether its outputs compare the examples of a batch with each other."""
        return self.task.row.outputs[0].items == "row"


def mixed_losses(case: TaskCase, *, invariant: bool = False) -> dict[str, float]:
    """Return losses of every term of a task, and its own unless that is to be `invariant` to how a batch is split up."""
    weights = {name: 1.0 for name in case.losses}
    varies = not case.has_own_loss or (invariant and (case.batch_coupled or case.padding_counts))
    return weights if varies else weights | {"ce": 0.5}


def seeded(build: Callable[[int], PreTrainedModel]) -> Callable[[int, int], PreTrainedModel]:
    """Return a builder that sets the seed, spreads the weights, and leaves out dropout."""

    def make(seed: int, width: int = 16) -> PreTrainedModel:
        set_seed(seed)
        model = build(width)
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "position" not in name:
                torch.nn.init.normal_(parameter, std=0.3)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            if isinstance(
                module, torch.nn.BatchNorm2d
            ):  # frozen: with a batch's own statistics no copy is the teacher
                module.eval()
                module.train = lambda mode=True, module=module: module  # type: ignore[method-assign]
        return model

    return make


def pad(rows: Sequence[Any], value: float = 0) -> Tensor:
    """Return rows of unequal length as one tensor, padded on the right."""
    return torch.nn.utils.rnn.pad_sequence(
        [torch.as_tensor(row) for row in rows], batch_first=True, padding_value=value
    )


def stack(examples: Examples) -> dict[str, Any]:
    return {name: torch.stack([torch.as_tensor(each[name]) for each in examples]) for name in examples[0]}


def text_case(task: Task) -> TaskCase:
    return TaskCase(
        task,
        lambda seed, width=16: model_for(str(task), seed, width=width),
        lambda count: text_examples(str(task), count),
        collate_text,
        ("kd", "hidden_states", "features"),
        label_shift=int(task is Task.CAUSAL_LM),
    )


def xlnet(width: int) -> PreTrainedModel:
    config = transformers.XLNetConfig(
        vocab_size=VOCABULARY, d_model=width, n_layer=2, n_head=2, d_inner=32, dropout=0.0, pad_token_id=0
    )
    return transformers.XLNetLMHeadModel(config)


def collate_permuted(examples: Examples) -> dict[str, Any]:
    """Return texts of which two tokens each are predicted, in an order of their own, as `run_plm` does."""
    batch = {"input_ids": pad([each["input_ids"] for each in examples])}
    rows, length = batch["input_ids"].shape
    hidden = torch.zeros(rows, length, dtype=torch.bool)
    hidden[:, 1:3] = True
    # The second of the two is predicted first: it does not see the first, which sees it.
    batch["perm_mask"] = (hidden[:, None, :] & ~torch.eye(length, dtype=torch.bool)).float()
    batch["perm_mask"][:, 1, 2] = 0
    batch["perm_mask"][:, 1, 1] = batch["perm_mask"][:, 2, 2] = 1
    batch["target_mapping"] = torch.eye(length).expand(rows, -1, -1).contiguous()
    return batch | {"labels": batch["input_ids"].masked_fill(~hidden, -100)}


# Speech


def whisper(width: int) -> PreTrainedModel:
    sizes = {
        f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in (("layers", 2), ("ffn_dim", 32))
    }
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = transformers.WhisperConfig(
        vocab_size=VOCABULARY, d_model=width, num_mel_bins=4, max_source_positions=6, max_target_positions=32, dropout=0.0,
        **sizes, **ids, **heads,
    )  # fmt: skip
    return transformers.WhisperForConditionalGeneration(config)


def spoken_texts(count: int) -> Examples:
    draw, noise = random.Random(0), torch.Generator().manual_seed(0)
    return [
        {
            "input_features": torch.randn(4, 12, generator=noise),
            "labels": [draw.randint(3, VOCABULARY - 1) for _ in range(draw.randint(2, 7))],
        }
        for _ in range(count)
    ]


def collate_spoken(examples: Examples) -> dict[str, Any]:
    return {
        "input_features": torch.stack([each["input_features"] for each in examples]),
        "labels": pad([each["labels"] for each in examples], -100),
    }


def wav2vec2(model_class: type[PreTrainedModel], width: int, **changes: Any) -> PreTrainedModel:
    config = transformers.Wav2Vec2Config(
        vocab_size=12, hidden_size=width, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        conv_dim=(8, 8), conv_stride=(4, 2), conv_kernel=(4, 2), num_feat_extract_layers=2, feat_extract_norm="layer",
        do_stable_layer_norm=True, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, mask_time_prob=0.0,
        layerdrop=0.0, hidden_dropout=0.0, attention_dropout=0.0, feat_proj_dropout=0.0, final_dropout=0.0,
        classifier_proj_size=8, pad_token_id=0, num_labels=CLASSES, **changes,
    )  # fmt: skip
    return model_class(config)


def sounds(count: int, *, texts: bool) -> Examples:
    draw, noise = random.Random(0), torch.Generator().manual_seed(0)
    found = []
    for _ in range(count):
        samples = torch.randn(draw.randint(80, 160), generator=noise)
        text = [draw.randint(1, 11) for _ in range(draw.randint(2, 4))]
        found.append({"input_values": samples, "labels": text if texts else draw.randrange(CLASSES)})
    return found


def collate_sounds(examples: Examples) -> dict[str, Any]:
    values = [each["input_values"] for each in examples]
    labels = [each["labels"] for each in examples]
    return {
        "input_values": pad(values),
        "attention_mask": pad([torch.ones(len(each), dtype=torch.long) for each in values]),
        "labels": pad(labels, -100) if isinstance(labels[0], list) else torch.tensor(labels),
    }


# Questions


def questions(count: int) -> Examples:
    draw = random.Random(0)
    found = []
    for number in range(count):
        ids = [draw.randint(1, VOCABULARY - 1) for _ in range(draw.randint(4, 12))]
        start = draw.randrange(len(ids))
        # The answer of every fifth question is beyond the text, which a model's own loss ignores.
        span = (10_000, 10_000) if number % 5 == 4 else (start, draw.randrange(start, len(ids)))
        found.append(
            {"input_ids": ids, "attention_mask": [1] * len(ids), "start_positions": span[0], "end_positions": span[1]}
        )
    return found


def collate_questions(examples: Examples) -> dict[str, Any]:
    names = ("start_positions", "end_positions")
    return {name: pad([each[name] for each in examples]) for name in ("input_ids", "attention_mask")} | {
        name: torch.tensor([each[name] for each in examples]) for name in names
    }


def span_bert(width: int) -> PreTrainedModel:
    config = _bert_config(width, 2)
    config.num_labels = 2
    return transformers.BertForQuestionAnswering(config)


def xlnet_questions(width: int) -> PreTrainedModel:
    config = transformers.XLNetConfig(
        vocab_size=VOCABULARY, d_model=width, n_layer=2, n_head=2, d_inner=32, dropout=0.0, start_n_top=2, end_n_top=2
    )
    return transformers.XLNetForQuestionAnswering(config)


def answered_questions(count: int) -> Examples:
    return [each for each in questions(2 * count) if each["start_positions"] < 100][:count]


def choices(count: int) -> Examples:
    draw = random.Random(0)
    return [
        {
            "input_ids": [[draw.randint(1, VOCABULARY - 1) for _ in range(draw.randint(3, 9))] for _ in range(3)],
            "labels": draw.randrange(3),
        }
        for _ in range(count)
    ]


def collate_choices(examples: Examples) -> dict[str, Any]:
    rows = [row for each in examples for row in each["input_ids"]]
    shape = (len(examples), 3, -1)
    return {
        "input_ids": pad(rows).view(shape),
        "attention_mask": pad([[1] * len(row) for row in rows]).view(shape),
        "labels": torch.tensor([each["labels"] for each in examples]),
    }


# Images

IMAGE = 16


def images(count: int, **labels: Callable[[random.Random], Any]) -> Examples:
    draw, noise = random.Random(0), torch.Generator().manual_seed(0)
    return [
        {"pixel_values": torch.randn(3, IMAGE, IMAGE, generator=noise)}
        | {name: make(draw) for name, make in labels.items()}
        for _ in range(count)
    ]


def vision_sizes(width: int) -> dict[str, Any]:
    return {
        "hidden_size": width, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
        "image_size": IMAGE, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    }  # fmt: skip


def segformer(width: int) -> PreTrainedModel:
    config = transformers.SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[1, 1], hidden_sizes=[width, width], patch_sizes=[7, 3],
        strides=[4, 2], num_attention_heads=[2, 2], mlp_ratios=[2, 2], decoder_hidden_size=16, num_labels=CLASSES,
        hidden_dropout_prob=0.0, drop_path_rate=0.0, classifier_dropout_prob=0.0, semantic_loss_ignore_index=255,
    )  # fmt: skip
    return transformers.SegformerForSemanticSegmentation(config)


def draw_segmentation(draw: random.Random) -> Tensor:
    labels = torch.tensor([draw.randrange(CLASSES) for _ in range(IMAGE * IMAGE)]).view(IMAGE, IMAGE)
    labels[: draw.randrange(8)] = 255
    return labels


def yolos(width: int) -> PreTrainedModel:
    config = transformers.YolosConfig(
        **vision_sizes(width) | {"image_size": [IMAGE, IMAGE]},
        patch_size=8,
        num_detection_tokens=5,
        num_labels=CLASSES,
    )
    return transformers.YolosForObjectDetection(config)


def draw_objects(draw: random.Random) -> dict[str, Tensor]:
    count = draw.randint(1, 3)
    boxes = [[0.5, 0.5, draw.uniform(0.1, 0.9), draw.uniform(0.1, 0.9)] for _ in range(count)]
    return {
        "class_labels": torch.tensor([draw.randrange(CLASSES) for _ in range(count)]),
        "boxes": torch.tensor(boxes),
    }


def collate_objects(examples: Examples) -> dict[str, Any]:
    return stack([{"pixel_values": each["pixel_values"]} for each in examples]) | {
        "labels": [each["labels"] for each in examples]
    }


def eomt(width: int) -> PreTrainedModel:
    config = transformers.EomtConfig(
        **vision_sizes(width), patch_size=8, num_upscale_blocks=1, num_blocks=1, num_queries=4, num_labels=CLASSES,
        mlp_ratio=2, train_num_points=16, drop_path_rate=0.0, layerscale_value=1.0,
    )  # fmt: skip
    return transformers.EomtForUniversalSegmentation(config)


def collate_instances(examples: Examples) -> dict[str, Any]:
    """Return images whose objects are the classes of a segmentation."""
    classes = [[number for number in each["labels"].unique().tolist() if number != 255] for each in examples]
    return stack([{"pixel_values": each["pixel_values"]} for each in examples]) | {
        "class_labels": [torch.tensor(each) for each in classes],
        "mask_labels": [
            torch.stack([(each["labels"] == number).float() for number in numbers])
            for each, numbers in zip(examples, classes, strict=True)
        ],
    }


def masked_vit(width: int) -> PreTrainedModel:
    return transformers.ViTForMaskedImageModeling(
        transformers.ViTConfig(**vision_sizes(width), patch_size=4, encoder_stride=4)
    )


def draw_patches(draw: random.Random) -> Tensor:
    masked = draw.sample(range(16), draw.randint(4, 12))
    return torch.tensor([number in masked for number in range(16)])


def draw_noise(draw: random.Random) -> Tensor:
    return torch.tensor([draw.random() for _ in range(16)])


def mae(width: int) -> PreTrainedModel:
    config = transformers.ViTMAEConfig(
        **vision_sizes(width), patch_size=4, decoder_hidden_size=16, decoder_num_hidden_layers=1, mask_ratio=0.5,
        decoder_num_attention_heads=2, decoder_intermediate_size=32,
    )  # fmt: skip
    return transformers.ViTMAEForPreTraining(config)


# Images and texts


def clip(width: int, family: str = "CLIP") -> PreTrainedModel:
    config_class = getattr(transformers, f"{family}Config")
    text = {
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 16,
        "eos_token_id": 2,
        "bos_token_id": 1,
        "pad_token_id": 0,
    }
    shared = {"hidden_size": width, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    image = shared | {"image_size": IMAGE, "patch_size": 8}
    more = {"projection_dim": 8} if family == "CLIP" else {}
    text |= shared | ({"projection_size": width} if family == "Siglip" else {})
    return getattr(transformers, f"{family}Model")(config_class(text_config=text, vision_config=image, **more))


def captioned_images(count: int) -> Examples:
    draw = random.Random(0)
    return [each | {"input_ids": [draw.randint(3, VOCABULARY - 1) for _ in range(4)] + [2]} for each in images(count)]


IMAGE_TOKEN = VOCABULARY - 1


def llava(width: int) -> PreTrainedModel:
    shared = {"hidden_size": width, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**shared, image_size=IMAGE, patch_size=8, projection_dim=8),
        text_config=transformers.LlamaConfig(
            **shared, vocab_size=VOCABULARY, pad_token_id=0, max_position_embeddings=32
        ),
        image_token_index=IMAGE_TOKEN,
        vision_feature_layer=-1,
    )
    return transformers.LlavaForConditionalGeneration(config)


def described_images(count: int) -> Examples:
    draw = random.Random(0)
    found = []
    for each in images(count):
        text = [draw.randint(1, VOCABULARY - 2) for _ in range(draw.randint(3, 9))]
        found.append(each | {"input_ids": [IMAGE_TOKEN] * 4 + text, "labels": [-100] * 5 + text[1:]})
    return found


def collate_described(examples: Examples) -> dict[str, Any]:
    return {
        "input_ids": pad([each["input_ids"] for each in examples]),
        "attention_mask": pad([[1] * len(each["input_ids"]) for each in examples]),
        "labels": pad([each["labels"] for each in examples], -100),
        "pixel_values": torch.stack([each["pixel_values"] for each in examples]),
    }


def image_captioner(width: int) -> PreTrainedModel:
    encoder = transformers.ViTConfig(**vision_sizes(width), patch_size=8)
    decoder = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=width, n_layer=2, n_head=2, n_positions=32, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, add_cross_attention=True, is_decoder=True,
    )  # fmt: skip
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    return transformers.VisionEncoderDecoderModel(config)


def captions(count: int) -> Examples:
    draw = random.Random(0)
    return [each | {"labels": [draw.randint(3, 50) for _ in range(draw.randint(3, 9))]} for each in images(count)]


def collate_captions(examples: Examples) -> dict[str, Any]:
    return {
        "pixel_values": torch.stack([each["pixel_values"] for each in examples]),
        "labels": pad([each["labels"] for each in examples], -100),
    }


def embedder(width: int) -> PreTrainedModel:
    return transformers.BertModel(_bert_config(width, 2))


def plain_texts(count: int) -> Examples:
    return [{"input_ids": each["input_ids"], "attention_mask": each["attention_mask"]} for each in questions(count)]


def collate_plain(examples: Examples) -> dict[str, Any]:
    return {name: pad([each[name] for each in examples]) for name in examples[0]}


VECTORS = ("kd", "hidden_states", "features")
ROW_BY_BATCH = "compare each example with all others"

CASES: Mapping[str, TaskCase] = {
    **{str(task): text_case(task) for task in (Task.SEQ2SEQ_LM, Task.CAUSAL_LM, Task.MASKED_LM)},
    **{str(task): text_case(task) for task in (Task.SEQUENCE_CLASSIFICATION, Task.TOKEN_CLASSIFICATION)},
    "image-classification": text_case(Task.IMAGE_CLASSIFICATION),
    # Without an attention mask padding would be read, so that the texts have one length.
    "permutation-lm": TaskCase(
        Task.CAUSAL_LM,
        seeded(xlnet),
        lambda count: [{"input_ids": [(7 * number + 3 * at) % 50 + 1 for at in range(6)]} for number in range(count)],
        collate_permuted,
        ("kd",),
        refused_by_cache="perm_mask",
        reference_dtype=torch.float32,
    ),
    "speech-seq2seq": TaskCase(Task.SPEECH_SEQ2SEQ, seeded(whisper), spoken_texts, collate_spoken, VECTORS),
    "ctc": TaskCase(
        Task.CTC,
        seeded(lambda width: wav2vec2(transformers.Wav2Vec2ForCTC, width, ctc_loss_reduction="mean")),
        lambda count: sounds(count, texts=True),
        collate_sounds,
        VECTORS,
    ),
    "audio-classification": TaskCase(
        Task.AUDIO_CLASSIFICATION,
        seeded(lambda width: wav2vec2(transformers.Wav2Vec2ForSequenceClassification, width)),
        lambda count: sounds(count, texts=False),
        collate_sounds,
        VECTORS,
    ),
    "question-answering": TaskCase(
        Task.QUESTION_ANSWERING,
        seeded(span_bert),
        questions,
        collate_questions,
        padding_counts=True,
    ),
    "beam-search-question-answering": TaskCase(
        Task.QUESTION_ANSWERING,
        seeded(xlnet_questions),
        answered_questions,
        collate_questions,
        padding_counts=True,
    ),
    "multiple-choice": TaskCase(
        Task.MULTIPLE_CHOICE,
        seeded(lambda width: transformers.BertForMultipleChoice(_bert_config(width, 2))),
        choices,
        collate_choices,
    ),
    "semantic-segmentation": TaskCase(
        Task.SEMANTIC_SEGMENTATION,
        seeded(segformer),
        lambda count: images(count, labels=draw_segmentation),
        stack,
        ("kd",),
    ),
    "object-detection": TaskCase(
        Task.OBJECT_DETECTION,
        seeded(yolos),
        lambda count: images(count, labels=draw_objects),
        collate_objects,
        ("kd", "boxes", "hidden_states"),
        batch_coupled=True,
    ),
    "instance-segmentation": TaskCase(
        Task.INSTANCE_SEGMENTATION,
        seeded(eomt),
        lambda count: images(count, labels=draw_segmentation),
        collate_instances,
        ("kd",),
        batch_coupled=True,
        reference_dtype=torch.float32,
    ),
    "zero-shot-image-classification": TaskCase(
        Task.ZERO_SHOT_IMAGE_CLASSIFICATION,
        seeded(clip),
        captioned_images,
        stack,
        ("kd",),
        batch_coupled=True,
        refused_by_cache=ROW_BY_BATCH,
    ),
    "siglip": TaskCase(
        Task.ZERO_SHOT_IMAGE_CLASSIFICATION,
        seeded(lambda width: clip(width, "Siglip")),
        captioned_images,
        stack,
        ("kd",),
        batch_coupled=True,
        refused_by_cache=ROW_BY_BATCH,
    ),
    "image-text-to-text": TaskCase(
        Task.IMAGE_TEXT_TO_TEXT,
        seeded(llava),
        described_images,
        collate_described,
        ("kd", "hidden_states"),
        label_shift=1,
    ),
    "vision-encoder-decoder": TaskCase(
        Task.IMAGE_TEXT_TO_TEXT, seeded(image_captioner), captions, collate_captions, ("kd", "features")
    ),
    "masked-image-modeling": TaskCase(
        Task.MASKED_IMAGE_MODELING,
        seeded(masked_vit),
        lambda count: images(count, bool_masked_pos=draw_patches),
        stack,
        refused_by_cache="masked, at random",
    ),
    "image-pretraining": TaskCase(
        Task.IMAGE_PRETRAINING,
        seeded(mae),
        lambda count: images(count, noise=draw_noise),
        stack,
        ("kd",),
        refused_by_cache="masked, at random",
    ),
    "feature-extraction": TaskCase(
        Task.FEATURE_EXTRACTION,
        seeded(embedder),
        plain_texts,
        collate_plain,
        ("features", "hidden_states"),
        has_own_loss=False,
    ),
}
"""At least one case for each row of the task table."""
