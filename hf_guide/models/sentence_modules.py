"""What makes an embedding of a text's hidden states: the pooling, dense layers and normalization of sentence-transformers.

Does: run these modules on the hidden states of a model, find those of a model's folder, and make them narrower.
Does not: read or write the files (`sentence_files.py`), or import sentence_transformers.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hf_guide.errors import ShapeError, TaskError, VocabularyError
from hf_guide.models.adapters import without_adapter
from hf_guide.models.layer_mapping import width_of_config
from hf_guide.models.token_rows import is_token_field

POOLING_MODES = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
"""The modes of pooling, in the order in which the vectors of several are concatenated where each is a switch of its own."""

TOKENS, SENTENCE = "token_embeddings", "sentence_embedding"
"""The names of a text's hidden states and of its embedding among the features that modules pass on."""

_ATTRIBUTE = "sentence_modules"


class Pooling(nn.Module):
    """Make one vector of the hidden states of a text: of each mode one, concatenated.

    Args:
        width: That of the hidden states.
        modes: Some of `POOLING_MODES`.
        include_prompt: Whether the tokens of the prompt count; if not, the batch's `prompt_length` first ones do not.
    """

    def __init__(self, width: int, modes: Sequence[str] = ("mean",), *, include_prompt: bool = True):
        super().__init__()
        self.in_features, self.modes, self.include_prompt = width, tuple(modes), include_prompt

    @property
    def out_features(self) -> int:
        """The width of the embedding."""
        return self.in_features * len(self.modes)

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        """Return the features with a `sentence_embedding`, (batch, out_features)."""
        tokens: Tensor = features[TOKENS]
        attended = features.get("attention_mask")
        if not isinstance(attended, Tensor) or attended.shape != tokens.shape[:2]:
            attended = torch.ones(tokens.shape[:2], device=tokens.device)
        attended = attended.to(tokens.device) != 0
        first = attended.int().argmax(1)
        pooled = attended
        if not self.include_prompt and features.get("prompt_length") is not None:
            positions = torch.arange(attended.shape[1], device=tokens.device)
            pooled = attended & (positions >= (first + _prompt_length(features["prompt_length"]))[:, None])
        vectors = [_pool(tokens, pooled, first, mode) for mode in self.modes]
        return features | {SENTENCE: torch.cat(vectors, -1)}


def _prompt_length(value: "Tensor | int") -> int:
    return int(value.flatten()[0]) if isinstance(value, Tensor) else int(value)


def _pool(tokens: Tensor, pooled: Tensor, first: Tensor, mode: str) -> Tensor:
    """Return (batch, width) of hidden states (batch, length, width) at the positions that `pooled` selects.

    `first` is the first attended position of each text, from which "weightedmean" counts.
    """
    rows = torch.arange(len(tokens), device=tokens.device)
    if mode == "cls":
        return tokens[rows, pooled.int().argmax(1)]
    if mode == "lasttoken":
        last = tokens.shape[1] - 1 - pooled.flip(1).int().argmax(1)
        return tokens[rows, last] * pooled.any(1, keepdim=True)
    if mode == "max":
        return tokens.masked_fill(~pooled[..., None], -torch.inf).amax(1)
    weights = pooled.to(torch.promote_types(tokens.dtype, torch.float32))
    if mode == "weightedmean":
        weights = weights * (torch.arange(1, tokens.shape[1] + 1, device=tokens.device) - first[:, None])
    total = (tokens * weights[..., None]).sum(1)
    count = weights.sum(1, keepdim=True).clamp(min=1e-9)
    return (total / (count.sqrt() if mode == "mean_sqrt_len_tokens" else count)).to(tokens.dtype)


class Dense(nn.Module):
    """A linear layer and an activation; with `residual` its input, projected where the widths differ, is added."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        activation: nn.Module | None = None,
        residual: bool = False,
        reads: str = SENTENCE,
        writes: str = SENTENCE,
    ):
        super().__init__()
        self.linear = nn.Linear(in_features, out_features, bias=bias)
        self.activation = nn.Tanh() if activation is None else activation
        self.has_residual = residual
        if residual and in_features != out_features:
            self.residual = nn.Linear(in_features, out_features, bias=False)
        self.reads, self.writes = reads, writes

    @property
    def in_features(self) -> int:
        """The width of its input."""
        return self.linear.in_features

    @property
    def out_features(self) -> int:
        """The width of its output."""
        return self.linear.out_features

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        """Return the features with the projected ones."""
        inputs = features[self.reads].to(self.linear.weight.dtype)
        outputs = self.activation(self.linear(inputs))
        if self.has_residual:
            outputs = outputs + (self.residual(inputs) if hasattr(self, "residual") else inputs)
        return features | {self.writes: outputs}


class LayerNorm(nn.Module):
    """A layer normalization of the embedding."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.in_features = self.out_features = width

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        """Return the features with the normalized embedding."""
        return features | {SENTENCE: self.norm(features[SENTENCE].to(self.norm.weight.dtype))}


class Normalize(nn.Module):
    """Scale vectors to unit length."""

    def __init__(self, reads: str = SENTENCE, writes: str = SENTENCE):
        super().__init__()
        self.reads, self.writes = reads, writes

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        """Return the features with the scaled ones."""
        return features | {self.writes: nn.functional.normalize(features[self.reads], dim=-1)}


class Dropout(nn.Module):
    """Dropout of the embedding."""

    def __init__(self, rate: float = 0.2):
        super().__init__()
        self.dropout = nn.Dropout(rate)

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        """Return the features with the embedding after dropout."""
        return features | {SENTENCE: self.dropout(features[SENTENCE])}


@dataclass
class ModuleEntry:
    """One entry of a `modules.json`.

    Attributes:
        name, path, type, kwargs: As they are there.
        config: The module's own config; None without a file.
        module: What it computes; None for the transformer and for what is carried without being run.
    """

    name: str
    path: str
    type: str
    config: dict[str, Any] | None = None
    module: nn.Module | None = None
    kwargs: Any = None


@dataclass
class SentenceFiles:
    """The settings of a sentence-transformers folder besides its modules.

    Attributes:
        model_config: `config_sentence_transformers.json`: prompts, similarity function, activation; None without the file.
        transformer_config: That of the transformer (maximal length, lower case); None without the file.
        transformer_file: The name of that file, relative to the folder.
    """

    model_config: dict[str, Any] | None = None
    transformer_config: dict[str, Any] | None = None
    transformer_file: str = "sentence_bert_config.json"


@dataclass(eq=False)
class SentenceModules:
    """All of a sentence-transformers folder but its transformer.

    Attributes:
        entries: Its modules, the transformer first.
        files: Its other settings.
        hidden_size: The width of the hidden states that the first of the others reads; None where nothing depends on it.

    Example:
        >>> modules = SentenceModules.mean_pooling(2)
        >>> hidden_states, mask = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [9.0, 9.0]]]), torch.tensor([[1, 1, 0]])
        >>> modules.embed(hidden_states, {"attention_mask": mask})
        tensor([[2., 3.]])
    """

    entries: list[ModuleEntry]
    files: SentenceFiles = field(default_factory=SentenceFiles)
    hidden_size: int | None = None

    @classmethod
    def mean_pooling(cls, width: int) -> "SentenceModules":
        """Return what sentence-transformers makes of a model without a `modules.json`: the mean over the attended tokens."""
        prefix = "sentence_transformers.models"
        return cls(
            [
                ModuleEntry("0", "", f"{prefix}.Transformer"),
                ModuleEntry(
                    "1",
                    "1_Pooling",
                    f"{prefix}.Pooling",
                    {"word_embedding_dimension": width, "pooling_mode_mean_tokens": True},
                    Pooling(width),
                ),
            ],
            hidden_size=width,
        )

    @property
    def is_cross_encoder(self) -> bool:
        """Whether the folder is a `CrossEncoder`'s: scores of pairs of texts, and no embedding."""
        return (self.files.model_config or {}).get("model_type") == "CrossEncoder"

    @property
    def layers(self) -> nn.ModuleList:
        """The modules that run after the transformer, in their order."""
        return nn.ModuleList(entry.module for entry in self.entries if entry.module is not None)

    @property
    def trainable(self) -> dict[str, nn.Module]:
        """The modules that have weights, by the path of their folder."""
        return {
            entry.path: entry.module
            for entry in self.entries
            if entry.module is not None and any(True for _ in entry.module.parameters())
        }

    @property
    def width(self) -> int | None:
        """The width of an embedding; None for a cross-encoder."""
        sizes: list[Any] = [layer.out_features for layer in self.layers if hasattr(layer, "out_features")]
        return int(sizes[-1]) if sizes else None

    def embed(self, hidden_states: Tensor, inputs: Mapping[str, Any]) -> Tensor:
        """Return the embeddings of a batch of texts, (batch, width).

        Args:
            hidden_states: Those after the model's last block, (batch, length, hidden_size).
            inputs: The model's, with its attention mask.

        Raises:
            TaskError: They are a cross-encoder's modules.
        """
        if self.width is None:
            raise TaskError("A cross-encoder computes scores of pairs of texts, not embeddings.")
        features: dict[str, Any] = {
            TOKENS: hidden_states,
            "attention_mask": inputs.get("attention_mask"),
            "prompt_length": inputs.get("prompt_length"),
        }
        for layer in self.layers:
            features = layer(features)
        embedding: Tensor = features[SENTENCE]
        return embedding

    def check_no_token_ids(self) -> None:
        """Check that no module names a token, so that they are as good for a smaller vocabulary.

        Raises:
            VocabularyError: A score is made of the logits of tokens whose ids the module's config holds.
        """
        for entry in self.entries:
            named = next(filter(is_token_field, entry.config or {}), None)
            if named is not None:
                raise VocabularyError(
                    f"The vocabulary of a teacher whose scores are the logits of single tokens cannot be reduced: {named} in "
                    f"the config of {entry.path}. Leave vocab_size at the teacher's."
                )

    def to(self, device: torch.device) -> "SentenceModules":
        """Move the weights to a device, in place; return the modules."""
        for layer in self.layers:
            layer.to(device)
        return self

    def train(self, mode: bool) -> "SentenceModules":
        """Set training or evaluation mode, in place; return the modules."""
        for layer in self.layers:
            layer.train(mode)
        return self

    def resized(self, width: int, basis: Tensor | None = None) -> "SentenceModules":
        """Return a copy for hidden states of another width.

        Pooling follows. A dense layer after it reads the new width and keeps its output: its weight is multiplied by the
        basis, or is random without one. Without a dense layer the embedding has the new width.

        Args:
            width: Of the student's hidden states.
            basis: (hidden_size, width), orthonormal columns: a hidden state x of the teacher is x basis in the student. Or
                the indices (width,) of the directions that the student has.

        Raises:
            ShapeError: A module cannot follow.
        """
        resized = copy.deepcopy(self)
        resized.hidden_size = None if self.hidden_size is None else width
        if self.hidden_size in (None, width):
            return resized
        at_tokens: int | None = width  # the widths that change, until a dense layer restores the teacher's
        at_sentence: int | None = None
        for entry in resized.entries:
            module = entry.module
            if isinstance(module, Pooling) and at_tokens is not None:
                module.in_features = at_tokens
                key = (
                    "embedding_dimension"
                    if "embedding_dimension" in (entry.config or {})
                    else "word_embedding_dimension"
                )
                entry.config = {**(entry.config or {}), key: at_tokens}
                at_sentence = module.out_features
            elif isinstance(module, Dense):
                size = at_tokens if module.reads == TOKENS else at_sentence
                if size is not None:
                    entry.module = _narrow_dense(module, entry.path, size, self.hidden_size, basis)
                    entry.config = {**(entry.config or {}), "in_features": size}
                if module.writes == TOKENS:
                    at_tokens = None
                else:
                    at_sentence = None
            elif isinstance(module, LayerNorm) and at_sentence is not None:
                raise ShapeError(
                    f"The module {entry.path} normalizes the embedding over all of its {module.in_features} directions, and "
                    f"has no counterpart at the student's {at_sentence}. Keep hidden_size={self.hidden_size}, or use a "
                    "teacher with a Dense module before it."
                )
        _limit_truncation(resized)
        return resized


def _narrow_dense(module: Dense, path: str, size: int, hidden_size: int, basis: Tensor | None) -> Dense:
    """Return a dense layer that reads `size` directions in place of one or more of the teacher's vectors of `hidden_size`."""
    if module.has_residual and size == module.out_features:
        raise ShapeError(
            f"The module {path} adds its input, projected from {module.in_features} to {module.out_features}, to its output; "
            f"from {size} it would add it without a projection. Choose another hidden_size."
        )
    narrow = Dense(
        size,
        module.out_features,
        bias=module.linear.bias is not None,
        activation=copy.deepcopy(module.activation),
        residual=module.has_residual,
        reads=module.reads,
        writes=module.writes,
    ).to(module.linear.weight.dtype)
    with torch.no_grad():
        if module.linear.bias is not None:
            narrow.linear.bias.copy_(module.linear.bias)
        if basis is None:
            return narrow
        narrow.linear.weight.copy_(_contract(module.linear.weight, hidden_size, basis))
        if module.has_residual:
            identity = torch.eye(module.out_features)
            weight = module.residual.weight if hasattr(module, "residual") else identity
            narrow.residual.weight.copy_(_contract(weight, hidden_size, basis))
    return narrow


def _contract(weight: Tensor, hidden_size: int, basis: Tensor) -> Tensor:
    """Return a weight (out, vectors * hidden_size) multiplied by a basis in each vector: (out, vectors * width)."""
    if basis.ndim == 1:
        return weight.detach().unflatten(1, (-1, hidden_size))[..., basis].flatten(1)
    parts = weight.detach().double().cpu().unflatten(1, (-1, basis.shape[0]))
    return (parts @ basis.double().cpu()).flatten(1)


def _limit_truncation(modules: SentenceModules) -> None:
    """Leave out a `truncate_dim` that is no less than the embedding's width."""
    config = modules.files.model_config
    truncated = (config or {}).get("truncate_dim")
    if config is not None and truncated is not None and modules.width is not None and truncated >= modules.width:
        modules.files.model_config = {key: value for key, value in config.items() if key != "truncate_dim"}


def attach_sentence_modules(model: Any, modules: SentenceModules) -> None:
    """Make `modules` those of a model, which `sentence_modules` returns and saving the model writes.

    They are no submodules of it: the model's own weights stay those of its stock class.
    """
    without_adapter(model).__dict__[_ATTRIBUTE] = modules


def attached_sentence_modules(model: Any) -> SentenceModules | None:
    """Return the modules that were attached to a model; None for none."""
    modules: SentenceModules | None = without_adapter(model).__dict__.get(_ATTRIBUTE)
    return modules


def find_sentence_modules(model: Any, read: Callable[[Any], SentenceModules | None]) -> SentenceModules:
    """Return a model's modules: those attached to it, those that `read` finds in its folder, or mean pooling."""
    modules = attached_sentence_modules(model)
    if modules is None:
        bare = without_adapter(model)
        width = width_of_config(bare.config)
        modules = read(bare)
        if modules is None or modules.is_cross_encoder:
            if width is None:
                raise TaskError(f"The config of {type(bare).__name__} does not name the width of its hidden states.")
            modules = SentenceModules.mean_pooling(width)
        attach_sentence_modules(model, modules)
    return modules
