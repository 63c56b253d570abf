"""A classifier of classes around a student that classifies subclasses: class logits are log-sum-exps over subclasses.

This file is saved next to the weights and loads with `trust_remote_code=True` where hf_guide is not installed, so it imports
only torch and transformers.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import ImageClassifierOutput, SequenceClassifierOutput
from transformers.utils import can_return_tuple


class SubclassConfig(PreTrainedConfig):
    """The config of such a classifier: its labels are the classes.

    Args:
        student: The config, as a mapping, of the stock model inside, whose labels are the subclasses, class by class.
        num_subclasses: Subclasses of each class.
    """

    model_type = "subclass-classifier"

    def __init__(self, student: dict[str, Any] | None = None, num_subclasses: int = 1, **kwargs: Any):
        self.student = student
        self.num_subclasses = num_subclasses
        super().__init__(**kwargs)

    @property
    def student_config(self) -> PreTrainedConfig:
        """The config of the stock model inside."""
        settings = dict(self.student or {})
        return AutoConfig.for_model(settings.pop("model_type", "bert"), **settings)


class SubclassModel(PreTrainedModel):
    """The base of the classes for sequences and for images.

    Attributes:
        student: The stock model, whose logits are those of the subclasses.
    """

    config_class = SubclassConfig
    base_model_prefix = "student"
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True
    _auto: Any = AutoModelForSequenceClassification

    def __init__(self, config: SubclassConfig):
        attention = getattr(config, "_attn_implementation", None)
        super().__init__(config)
        inner = config.student_config
        if attention is not None:  # if not, the student chooses: not every family has every implementation
            inner._attn_implementation = attention
        # The dtype of this model, not the one that the student was saved with.
        self.student = self._auto.from_config(inner, dtype=torch.get_default_dtype())
        config._attn_implementation = self.student.config._attn_implementation
        outputs = self.student.config.num_labels
        if outputs != (config.num_labels or 0) * config.num_subclasses:
            raise ValueError(
                f"The config has {config.num_labels} labels; the student that it contains has {outputs} "
                f"outputs, {config.num_subclasses} for each of its classes. Leave num_labels as it was saved."
            )
        self.main_input_name = self.student.main_input_name
        self.num_labels = config.num_labels
        self.post_init()

    def class_forward(self, labels: Tensor | None, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return loss, class logits (batch, classes), hidden states and attentions."""
        num_items = inputs.pop("num_items_in_batch", None)
        arguments = {name: value for name, value in inputs.items() if value is not None}
        outputs = self.student(**arguments, return_dict=True)
        wide = outputs.logits.float() if outputs.logits.dtype.itemsize < 4 else outputs.logits
        logits = wide.unflatten(-1, (-1, self.config.num_subclasses)).logsumexp(-1)
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits, labels, reduction="mean" if num_items is None else "sum")
            loss = loss if num_items is None else loss / num_items
        return {"loss": loss, "logits": logits} | {name: outputs.get(name) for name in ("hidden_states", "attentions")}


class SubclassModelForSequenceClassification(SubclassModel):
    """A text classifier whose class logits are exactly those that the student was trained and evaluated with.

    Example:
        >>> from hf_guide import from_teacher, save_subclass_student
        >>> student = from_teacher(
        ...     "distilbert/distilbert-base-uncased-finetuned-sst-2-english",
        ...     num_subclasses=4,
        ...     num_hidden_layers=1,
        ...     show_progress=False,
        ... )
        >>> model = save_subclass_student(student, "student", "remote_code")
        >>> AutoModelForSequenceClassification.from_pretrained("student", trust_remote_code=True).num_labels
        2
    """

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **inputs: Any,
    ) -> SequenceClassifierOutput:
        """Return class logits (batch, classes), and with `labels` (batch,) their cross-entropy."""
        inputs |= {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
        }
        return SequenceClassifierOutput(**self.class_forward(labels, inputs))


class SubclassModelForImageClassification(SubclassModel):
    """An image classifier whose class logits are exactly those that the student was trained and evaluated with.

    Example:
        >>> from hf_guide import from_teacher, save_subclass_student
        >>> student = from_teacher(
        ...     "google/vit-base-patch16-224", num_subclasses=4, num_hidden_layers=1, show_progress=False
        ... )
        >>> model = save_subclass_student(student, "student", "remote_code")
        >>> AutoModelForImageClassification.from_pretrained("student", trust_remote_code=True).num_labels
        3
    """

    main_input_name = "pixel_values"
    _auto = AutoModelForImageClassification

    @can_return_tuple
    def forward(
        self, pixel_values: Tensor | None = None, labels: Tensor | None = None, **inputs: Any
    ) -> ImageClassifierOutput:
        """Return class logits (batch, classes), and with `labels` (batch,) their cross-entropy."""
        return ImageClassifierOutput(**self.class_forward(labels, inputs | {"pixel_values": pixel_values}))


@torch.no_grad()
def wrap_student(student: PreTrainedModel, model_class: type[SubclassModel], classes: list[str]) -> SubclassModel:
    """Return a model that contains the student itself, not a copy.

    Args:
        student: Its config has `num_subclasses`.
        model_class: For its task.
        classes: The names of the classes, in order.
    """
    excluded = ("_name_or_path", "auto_map", "dtype")
    settings = {name: value for name, value in student.config.to_dict().items() if name not in excluded}
    settings["architectures"] = [type(student).__name__]  # some families have several classes for one task
    config = SubclassConfig(
        student=settings,
        num_subclasses=student.config.num_subclasses,
        id2label=dict(enumerate(classes)),
        label2id={name: number for number, name in enumerate(classes)},
        pad_token_id=getattr(student.config, "pad_token_id", None),
    )
    with torch.device("meta"):
        model = model_class(config)
    model.student = student
    model.config._attn_implementation = student.config._attn_implementation
    model.config.dtype = student.dtype
    return model.train(student.training)
