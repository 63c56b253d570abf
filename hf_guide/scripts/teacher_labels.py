"""Run a teacher on raw rows of a dataset and return what it writes: transcripts, targets, completions or classes.

Does: make the inputs of a few rows, generate or take the most probable class, decode. Does not: write files (`label.py`).
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from hf_guide.data.arguments import DataArguments
from hf_guide.data.images import decode_image
from hf_guide.data.loading import check_options_of_task, check_strings, dataset_folder, default_columns
from hf_guide.data.preprocessing import resolve_lengths
from hf_guide.data.sounds import decode_sound
from hf_guide.data.speech import SpeechPreprocessor, set_language
from hf_guide.errors import OptionError, TaskError, one_paragraph
from hf_guide.models.pretrained import load_processing_class
from hf_guide.tasks import OutputKind, Task, output_kind, task_of
from hf_guide.teachers.loading import load_teacher

SUPPORTED_TASKS = (
    *(Task.SPEECH_SEQ2SEQ, Task.CTC, Task.AUDIO_CLASSIFICATION, Task.SEQ2SEQ_LM, Task.CAUSAL_LM),
    *(Task.SEQUENCE_CLASSIFICATION, Task.IMAGE_CLASSIFICATION),
)
_PROMPT_COLUMNS = ("prompt", "messages", "instruction")
_INPUT_ROLES = {"audio": "audio", "image": "image", "text": "text"}
_TARGET_ROLES = {Task.SPEECH_SEQ2SEQ: "text", Task.CTC: "text", Task.SEQ2SEQ_LM: "target"}


@dataclass(frozen=True)
class TeacherLabels:
    """Labels rows by a teacher.

    Attributes:
        model: The teacher, on its device.
        task: Its task.
        processor: Its tokenizer or processor.
        data: Columns, language, durations.
        generation_kwargs: Arguments of `generate`.
        column: The column that the teacher reads.
        target: The column that it writes.
    """

    model: PreTrainedModel
    task: Task
    processor: Any
    data: DataArguments
    generation_kwargs: Mapping[str, Any]
    column: str
    target: str

    @property
    def are_transcripts(self) -> bool:
        """Whether the labels are what is spoken."""
        return self.task in (Task.SPEECH_SEQ2SEQ, Task.CTC)

    @property
    def has_files(self) -> bool:
        """Whether the column that is read may hold paths of files."""
        return self.task.row.inputs != "text"

    def new_columns(self, example: Mapping[str, Any], label: Any) -> dict[str, Any]:
        """Return the columns that a row gets; those of the dataset with the same names are kept as references."""
        if self.task is not Task.CAUSAL_LM:
            return {self.target: label}
        prompt = example[self.column]
        if isinstance(prompt, list):
            return {"messages": [*_without_answer(prompt), {"role": "assistant", "content": label}]}
        return {"prompt": prompt, "completion": label}

    def own_label(self, example: Mapping[str, Any]) -> Any:
        """Return the label that a row of the dataset has itself; None where it has none."""
        if self.task is not Task.CAUSAL_LM:
            return example.get(self.target)
        prompt = example[self.column]
        if not isinstance(prompt, list):
            return example.get("completion")
        return prompt[-1].get("content") if len(_without_answer(prompt)) == len(prompt) - 1 else None

    @torch.no_grad()
    def __call__(self, examples: Sequence[Mapping[str, Any]], rows: Sequence[int]) -> list[Any]:
        """Return the label of each row; None where the teacher writes nothing, or the sound is too long or short.

        Raises:
            OptionError: A row cannot be read, or an argument of `generate` is not known.
        """
        values = [example[self.column] for example in examples]
        if self.task.row.inputs == "audio":
            return self._of_sounds(values, rows)
        if self.task is Task.IMAGE_CLASSIFICATION:
            images = [
                decode_image(value, row, self.column, self.data.name) for value, row in zip(values, rows, strict=True)
            ]
            return self._classes(self.processor(images, return_tensors="pt"))
        if self.task is Task.CAUSAL_LM:
            return self._completions(values, rows)
        texts = check_strings(values, rows, self.column, self.data.name)
        if self.task is Task.SEQ2SEQ_LM:
            texts = [self.data.source_prefix + text for text in texts]
        pairs = [[example[self.data.text_pair_column] for example in examples]] if self.data.text_pair_column else []
        inputs = self.processor(
            texts, *pairs, padding=True, truncation=True, max_length=self.data.max_length, return_tensors="pt"
        )
        if self.task is Task.SEQUENCE_CLASSIFICATION:
            return self._classes(inputs)
        return [text.strip() or None for text in self._decode(self._generate(inputs))]

    # Sounds

    def _of_sounds(self, values: Sequence[Any], rows: Sequence[int]) -> list[Any]:
        speech = SpeechPreprocessor(self.task, self.processor, self.data, (self.model.config,))
        rate = speech.feature_extractor.sampling_rate
        folder = dataset_folder(self.data)
        sounds = [
            decode_sound(value, rate, row=row, column=self.column, dataset=self.data.name, folder=folder)
            for value, row in zip(values, rows, strict=True)
        ]
        longest, shortest = int(speech.max_duration * rate), self.data.min_duration_in_seconds * rate
        if self.task is Task.AUDIO_CLASSIFICATION:
            sounds = [sound[:longest] for sound in sounds]
        usable = [index for index, sound in enumerate(sounds) if shortest <= len(sound) <= longest]
        labels: list[Any] = [None] * len(sounds)
        if not usable:
            return labels
        # Without a mask the padding of a batch would change what the teacher computes.
        alone = len({len(sounds[index]) for index in usable}) > 1 and not self._can_pad(speech.feature_extractor)
        for group in [[index] for index in usable] if alone else [usable]:
            inputs = self._features(speech.feature_extractor, [sounds[index] for index in group])
            for index, label in zip(group, self._of_features(inputs), strict=True):
                labels[index] = label
        return labels

    def _can_pad(self, extractor: Any) -> bool:
        windowed = getattr(extractor, "chunk_length", None) is not None or not hasattr(extractor, "do_normalize")
        return windowed or bool(extractor.return_attention_mask) or "max_length" in extractor.to_dict()

    def _features(self, extractor: Any, sounds: Sequence[Any]) -> Mapping[str, Tensor]:
        options: dict[str, Any] = {"sampling_rate": extractor.sampling_rate, "return_tensors": "pt"}
        if getattr(extractor, "chunk_length", None) is None:
            return extractor(sounds, padding=True, **options)
        return extractor(sounds, return_attention_mask=True, **options)

    def _of_features(self, inputs: Mapping[str, Tensor]) -> list[Any]:
        if self.task is Task.AUDIO_CLASSIFICATION:
            return self._classes(inputs)
        if self.task is Task.SPEECH_SEQ2SEQ:
            names = (("language", self.data.language), ("task", self.data.speech_task))
            spoken = {name: value for name, value in names if value is not None}
            return [text.strip() or None for text in self._decode(self._generate(inputs, **spoken))]
        frames = self._logits(inputs).argmax(-1)
        mask = inputs.get("attention_mask")
        if mask is not None:
            model: Any = self.model
            lengths = model._get_feat_extract_output_lengths(mask.sum(-1))
            beyond = torch.arange(frames.shape[1])[None] >= lengths[:, None].cpu()
            frames = frames.masked_fill(beyond.to(frames.device), self.model.config.pad_token_id)
        return [text.strip() or None for text in self._decode(frames)]

    # Outputs

    def _logits(self, inputs: Mapping[str, Tensor]) -> Tensor:
        outputs = self.model(**self._on_device(inputs))
        return outputs.logits

    def _classes(self, inputs: Mapping[str, Tensor]) -> list[str]:
        names = self.model.config.id2label or {}
        return [names[index] for index in self._logits(inputs).argmax(-1).tolist()]

    def _on_device(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        accepted = inspect.signature(self.model.forward).parameters
        return {
            name: value.to(self.model.device, self.model.dtype if value.is_floating_point() else None)
            for name, value in inputs.items()
            if name in accepted
        }

    def _generate(self, inputs: Mapping[str, Tensor], **more: Any) -> Tensor:
        try:
            made: Any = self.model.generate(**self._on_device(inputs), **{**more, **self.generation_kwargs})  # type: ignore[operator]
        except (ValueError, TypeError) as error:
            raise OptionError(
                f"The teacher cannot generate with {dict(self.generation_kwargs) | more}: {one_paragraph(error)}."
            ) from error
        return made if isinstance(made, Tensor) else made["sequences"]

    def _decode(self, tokens: Tensor) -> list[str]:
        return self.processor.batch_decode(tokens, skip_special_tokens=True)

    def _completions(self, prompts: Sequence[Any], rows: Sequence[int]) -> list[Any]:
        chats = [isinstance(prompt, list) for prompt in prompts]
        if any(chats) and self.processor.chat_template is None:
            raise OptionError(
                f"{self.data.name}: column {self.column!r} contains conversations, and the tokenizer has no chat_template."
            )
        texts = [
            self.processor.apply_chat_template(_without_answer(prompt), tokenize=False, add_generation_prompt=True)
            if chat
            else check_strings([prompt], [row], self.column, self.data.name)[0]
            for prompt, chat, row in zip(prompts, chats, rows, strict=True)
        ]
        labels: list[Any] = [None] * len(texts)
        for chat in (True, False):
            chosen = [index for index, each in enumerate(chats) if each is chat]
            if not chosen:
                continue
            inputs = self.processor(
                [texts[index] for index in chosen], padding=True, return_tensors="pt", add_special_tokens=not chat
            )
            made = self._decode(self._generate(inputs)[:, inputs["input_ids"].shape[1] :])
            for index, text in zip(chosen, made, strict=True):
                labels[index] = (text.strip() if chat else text) if text.strip() else None
        return labels


def load_teacher_labels(
    teacher: str,
    columns: Mapping[str, Any],
    data: DataArguments,
    generation_kwargs: Mapping[str, Any],
    device: torch.device,
    processing_class_name_or_path: str | None,
    hub_kwargs: Mapping[str, Any],
    dtype: str | None,
) -> TeacherLabels:
    """Load a teacher that labels a dataset.

    Args:
        teacher: Hub id or folder.
        columns: The dataset's features by column.
        data, generation_kwargs: As in `TeacherLabels`.
        device: Where it runs.
        processing_class_name_or_path: Its tokenizer or processor; None takes the one among its files.
        hub_kwargs: `revision`, `token` and `trust_remote_code`.
        dtype: None takes the checkpoint's.

    Raises:
        TaskError: Its outputs are no labels.
        OptionError: There is no column to read, or options that are not for its task.
        TeacherError: It cannot be loaded.
    """
    model = load_teacher(teacher, dtype=dtype, device=device, **hub_kwargs)
    task = task_of(model)
    if task not in SUPPORTED_TASKS or (
        task.has_labels and output_kind(task, model.config) is not OutputKind.CATEGORICAL
    ):
        raise TaskError(
            f"{type(model).__name__} writes no labels: its task is {task}"
            + (f" with problem_type={model.config.problem_type!r}" if task in SUPPORTED_TASKS else "")
            + f". Labels are written by teachers for {', '.join(map(str, SUPPORTED_TASKS))}."
        )
    processor = load_processing_class(
        getattr(transformers, task.processor_class),
        processing_class_name_or_path or teacher,
        **({} if processing_class_name_or_path else hub_kwargs),
    )
    check_options_of_task(task, data)
    kwargs = dict(generation_kwargs)
    if task in (Task.SEQ2SEQ_LM, Task.CAUSAL_LM):
        data = resolve_lengths(data, processor, model.config)
        kwargs.setdefault("max_new_tokens", data.max_target_length)
    elif kwargs and task is not Task.SPEECH_SEQ2SEQ:
        raise OptionError(f"generation_kwargs are for teachers that generate; the task is {task}. Leave them out.")
    if task is Task.CAUSAL_LM:
        processor.padding_side = "left"
        if processor.pad_token is None:
            processor.pad_token = processor.eos_token
    if task is Task.SPEECH_SEQ2SEQ:
        set_language(processor, data.language, data.speech_task)
    column = _input_column(columns, task, data)
    return TeacherLabels(model, task, processor, data, kwargs, column, _target_column(columns, task, data))


def _input_column(columns: Mapping[str, Any], task: Task, data: DataArguments) -> str:
    role = _INPUT_ROLES[task.row.inputs]
    requested = getattr(data, f"{role}_column")
    defaults = (*(_PROMPT_COLUMNS if task is Task.CAUSAL_LM else ()), *default_columns(task, role))
    column = requested or next((name for name in defaults if name in columns), None)
    if column is None or column not in columns:
        raise OptionError(
            f"{data.name} has no column {column or role!r}, which the teacher would read; it has {list(columns)}. Set "
            f"{role}_column to one of these."
        )
    return str(column)


def _target_column(columns: Mapping[str, Any], task: Task, data: DataArguments) -> str:
    """Return the column that a training for the task would read, whether the dataset has it or not."""
    role = _TARGET_ROLES.get(task, "label")
    requested = getattr(data, f"{role}_column") if task is not Task.CAUSAL_LM else None
    defaults = default_columns(task, role)
    return requested or next((name for name in defaults if name in columns), defaults[0])


def _without_answer(messages: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Return a conversation up to the last turn that is not the assistant's."""
    kept = list(messages)
    while kept and kept[-1].get("role") == "assistant":
        kept.pop()
    return kept


def resolved_path(value: str, data: DataArguments) -> str:
    """Return the absolute path of a file of a dataset."""
    own = dataset_folder(data)
    path = Path(value)
    return str((own / path if own is not None and not path.is_file() else path).resolve())
