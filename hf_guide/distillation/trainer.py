"""The trainers of this package: `DistillationMixin` in front of Transformers' `Trainer` and `Seq2SeqTrainer`."""

from typing import Any

from torch import nn
from transformers import Seq2SeqTrainer, Trainer

from hf_guide.distillation.arguments import DistillationArguments, Seq2SeqDistillationArguments
from hf_guide.distillation.mixin import DistillationMixin


class DistillationTrainer(DistillationMixin, Trainer):
    """A `Trainer` whose student learns from a teacher as well as from labels.

    All of `Trainer` works as usual: collators, callbacks, metrics, `compute_loss_func`, label smoothing,
    `resume_from_checkpoint`, `hyperparameter_search` with `model_init`, reporting. Every loss is logged, raw and weighted;
    evaluation always reports the task loss (`eval_ce`), the perplexity of language models, and the share of items for which
    student and teacher predict the same class (`eval_teacher_agreement`).

    A language model's losses are computed in chunks of tokens, so that neither its own logits nor the teacher's ever exist
    all at once, except where something needs them: `compute_metrics`, label smoothing, `compute_loss_func`,
    `torch_compile`, `compute_loss(..., return_outputs=True)` of a derived class, or a head that is not a plain linear layer.

    Any other trainer class becomes a distillation by `DistillationMixin`.

    Args:
        model: The student; or a config, or a mapping of arguments of `from_teacher`, to initialize it from the teacher.
        teacher: A Hub id, a folder, a model, several of these, or a `Capture`; `args.teacher` and `args.teacher_cache` do
            the same.
        teacher_model: Alias of `teacher`, its name in TRL.
        peft_config: Wraps the student in an adapter.
        processing_class: As in `Trainer`; it is compared with the teacher's. Pixels that the teacher expects normalized in
            another way are converted; the size of images that are segmented or searched for objects, and the language of
            texts, are the data's choice; any other difference is an error.
        others: As in `Trainer`.

    Raises:
        OptionError: A loss needs a teacher and there is none, or options contradict each other.
        TaskError: A teacher of another task, or losses that are not for this one.
        VocabularyError: Vocabularies or labels that do not agree.
        TeacherError: A teacher that cannot be loaded, or expects other inputs than the batches.
        CaptureError: A signal cache that is truncated, of another teacher or another tokenizer.

    Example:
        >>> import tempfile
        >>> from hf_guide import DistillationArguments
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"vocab_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 32}
        >>> teacher = LlamaForCausalLM(LlamaConfig(hidden_size=32, **sizes))
        >>> student = LlamaForCausalLM(LlamaConfig(hidden_size=16, **sizes))
        >>> examples = [{"input_ids": [1, 5, 7, 2], "labels": [1, 5, 7, 2]}] * 8
        >>> args = DistillationArguments(
        ...     tempfile.mkdtemp(), losses={"ce": 0.5, "kd": 0.5}, max_steps=1, use_cpu=True, report_to="none",
        ...     disable_tqdm=True
        ... )
        >>> trainer = DistillationTrainer(student, args, train_dataset=examples, teacher=teacher)
        >>> trainer.train().global_step
        {'train_runtime': ...}
        1
    """


class Seq2SeqDistillationTrainer(DistillationMixin, Seq2SeqTrainer):  # type: ignore[misc]  # gen_kwargs
    """A `Seq2SeqTrainer` whose student learns from a teacher as well as from labels.

    With `predict_with_generate`, `evaluate` and `predict` report the metrics of the generated texts and, on the labels, every
    loss (`eval_ce`, `eval_kd`) and the agreement with the teacher. They cost the generation and one forward pass of student
    and teacher.

    Args:
        model, args, teacher, ...: As in `DistillationTrainer`; `args` are `Seq2SeqDistillationArguments`.

    Raises:
        OptionError: The arguments are not those of `Seq2SeqTrainer`; and the errors of `DistillationTrainer`.

    Example:
        >>> import tempfile
        >>> from transformers import T5Config, T5ForConditionalGeneration
        >>> from hf_guide import Seq2SeqDistillationArguments
        >>> sizes = {"vocab_size": 32, "d_kv": 8, "d_ff": 32, "num_heads": 2, "decoder_start_token_id": 0}
        >>> teacher = T5ForConditionalGeneration(T5Config(d_model=32, num_layers=2, **sizes))
        >>> student = T5ForConditionalGeneration(T5Config(d_model=16, num_layers=1, **sizes))
        >>> examples = [{"input_ids": [5, 7, 1], "labels": [6, 8, 1]}] * 4
        >>> args = Seq2SeqDistillationArguments(
        ...     tempfile.mkdtemp(), predict_with_generate=True, generation_max_length=8, max_steps=1, use_cpu=True,
        ...     report_to="none", disable_tqdm=True
        ... )
        >>> def exact_match(prediction):
        ...     labels = prediction.label_ids[:, :3]
        ...     return {"exact_match": float((prediction.predictions[:, 1:4] == labels).all(1).mean())}
        >>> trainer = Seq2SeqDistillationTrainer(
        ...     student, args, train_dataset=examples, eval_dataset=examples, teacher=teacher, compute_metrics=exact_match
        ... )
        >>> trainer.train().global_step
        {'train_runtime': ...}
        1
        >>> metrics = trainer.evaluate()
        {'eval_loss': ..., 'eval_exact_match': ..., 'eval_kd': ...}
        >>> sorted(metrics.keys() & {"eval_exact_match", "eval_ce", "eval_kd", "eval_teacher_agreement"})
        ['eval_ce', 'eval_exact_match', 'eval_kd', 'eval_teacher_agreement']
    """

    arguments_class: type[DistillationArguments] = Seq2SeqDistillationArguments

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Return a new student, with `args.generation_config`, which `Seq2SeqTrainer` sets in the first one alone."""
        student: Any = super().call_model_init(trial)
        generation_config = getattr(self.args, "generation_config", None)
        if generation_config is not None:
            student.generation_config = self.load_generation_config(generation_config)
        return student  # type: ignore[no-any-return]
