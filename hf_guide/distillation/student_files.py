"""`StudentFilesTrainer`: what a trainer saves and publishes of a student: weights, model card, record, merged adapter.

Files never contain the teacher, a local path or a token.
"""

import dataclasses
import logging
import os
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy

from hf_guide.distillation.arguments import DistillationArguments, redacted_training_args
from hf_guide.distillation.merging import save_merged
from hf_guide.distillation.objective import is_sharded
from hf_guide.distillation.resuming import remove_paths_from_state
from hf_guide.distillation.step_checks import StepCheckedTrainer
from hf_guide.distillation.student_init import attach_saved_report, find_earlier_trainings
from hf_guide.distillation.training_record import build_training_record
from hf_guide.errors import OptionError
from hf_guide.hub.metadata import CARD_NAME, DistillationRecord, save_record
from hf_guide.hub.model_card import remove_local_paths, write_model_card
from hf_guide.hub.push import attach_record, fetch_card, with_weights_of
from hf_guide.hub.saved_model import is_saved_in, saved_weights_fingerprint
from hf_guide.initialization.report import REPORT_NAME, TrainingSummary
from hf_guide.models.code_references import clean_saved_folder
from hf_guide.models.sentence_files import write_sentence_modules
from hf_guide.models.sentence_modules import attached_sentence_modules
from hf_guide.models.token_rows import attached_tokenizer
from hf_guide.utils.finite import check_weights_finite

logger = logging.getLogger(__name__)


class FormerRecordCallback(TrainerCallback):
    """When a training begins, count the student's last one among the earlier ones: its record is not that of new weights."""

    def __init__(self, trainer: "StudentFilesTrainer"):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Detach the record of a training that this one does not resume."""
        student: Any = self.trainer.unwrapped_student
        record = getattr(student, "distillation_record", None)
        if record is None:
            return
        if state.global_step == 0:
            self.trainer.earlier_trainings = record.trainings
        attach_record(student, None)


class StudentFilesTrainer(StepCheckedTrainer):
    """A `Trainer` that saves and publishes a student as a stock model, with its card and the record of its training."""

    args: DistillationArguments
    _hub_target: dict[str, Any]
    _seen_cards: set[bytes]
    earlier_trainings: list[TrainingSummary]

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Return a new student, with the initialization report that is saved next to its weights."""
        student = super().call_model_init(trial)
        attach_saved_report(student, token=self.args.hub_token)
        self.earlier_trainings = find_earlier_trainings(student, token=self.args.hub_token)
        return student

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self.args.should_save:
            check_weights_finite(self.unwrapped_student if state_dict is None else state_dict)
        # DeepSpeed saves a model without tensors where it cannot gather them.
        has_weights = state_dict is None or bool(state_dict)  # saving empties it
        with redacted_training_args(self):
            super()._save(output_dir, state_dict)
        folder = Path(output_dir or self.args.output_dir or "")
        if self.args.should_save:
            tokenizer = attached_tokenizer(self.unwrapped_student)
            if tokenizer is not None and self.processing_class is None:  # otherwise `Trainer` has saved the same one
                tokenizer.save_pretrained(folder)
            self._save_sentence_modules(folder)
            clean_saved_folder(folder)
            remove_local_paths(folder)
            is_checkpoint = folder.name.startswith(f"{PREFIX_CHECKPOINT_DIR}-")
            if is_checkpoint and self.distillation_objective.projections is not None:
                self.distillation_objective.projections.save(folder)  # resuming needs them; published files do not
            if not is_checkpoint:
                self._save_record(folder, has_weights)

    def _save_record(self, folder: Path, has_weights: bool) -> None:
        """Write the record of the training into a folder of the student, with the fingerprint of the weights it has there."""
        record = self.present_record()
        if record is None:
            return
        record = with_weights_of(record, folder) if has_weights else record
        save_record(folder, record)
        if not self.is_in_train:  # otherwise the next steps change the weights
            attach_record(self.unwrapped_student, record)

    def present_record(self) -> DistillationRecord | None:
        """Return the record of the student's trainings so far, on the data that its card names; None without any."""
        attached: DistillationRecord | None = getattr(self.unwrapped_student, "distillation_record", None)
        if attached is not None and self.state.global_step == 0:
            return attached
        record = build_training_record(self)
        if attached is not None:
            record.datasets, record.evaluated_on = attached.datasets, attached.evaluated_on
            record.languages = attached.languages
        return record if record.trainings else None

    def _weights_in(self, folder: Path) -> str | None:
        """Return the fingerprint of the student's present weights, if they were saved since they were last changed."""
        student = self.unwrapped_student
        attached: DistillationRecord | None = getattr(student, "distillation_record", None)
        if self.is_in_train:
            return None
        if attached is not None and attached.weights is not None:
            return attached.weights
        is_current = not is_sharded(self.accelerator) and is_saved_in(student, folder)
        return saved_weights_fingerprint(folder) if is_current else None

    def _save_sentence_modules(self, folder: Path) -> None:
        """Write the modules by which the student's hidden states become embeddings, or a cross-encoder's settings."""
        modules = attached_sentence_modules(self.unwrapped_student)
        if modules is not None:
            write_sentence_modules(modules, folder)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        is_busy = self.push_in_progress is not None and not self.push_in_progress.is_done()
        is_pushed = self.args.hub_strategy != HubStrategy.END and (self.args.hub_always_push or not is_busy)
        if self.is_world_process_zero() and is_pushed and not self._draw_card_of(Path(checkpoint_folder)):
            return
        remove_paths_from_state(Path(checkpoint_folder))
        with redacted_training_args(self):
            super()._push_from_checkpoint(checkpoint_folder)

    def _draw_card_of(self, checkpoint: Path) -> bool:
        """Put the card, the record and the report of a checkpoint into `output_dir`, which is pushed with its weights.

        Those that are there may be of a former run.

        Returns:
            Whether it can be pushed: not over a card on the Hub that cannot be read now, which a later push will keep.
        """
        folder, report = Path(self.args.output_dir or ""), checkpoint / REPORT_NAME
        repo_id: Any = self.hub_model_id  # known where anything is pushed
        try:
            fetch_card(repo_id, folder, seen=self._seen_cards, **self._hub_target)
        except OSError as error:
            logger.warning("%s is not pushed, for the model card on the Hub cannot be read: %s", checkpoint, error)
            return False
        if report.is_file():
            shutil.copyfile(report, folder / REPORT_NAME)
        else:
            (folder / REPORT_NAME).unlink(missing_ok=True)
        record = with_weights_of(build_training_record(self), checkpoint)
        save_record(folder, record)
        card = write_model_card(folder, record=record, model_id=repo_id, saved_in=checkpoint)
        self._seen_cards.add(card.read_bytes())
        return True

    def save_state(self) -> None:
        """Save `trainer_state.json` into `output_dir` as `Trainer` does, without the path of the best checkpoint."""
        super().save_state()
        if self.args.should_save:
            remove_paths_from_state(Path(self.args.output_dir or ""))

    def _load_callback_state(self) -> None:
        """Find the best checkpoint of a resumed run by its step: the saved state does not have its path."""
        super()._load_callback_state()
        best = Path(self.args.output_dir or "") / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
        if self.state.best_model_checkpoint is None and self.state.best_global_step and best.is_dir():
            self.state.best_model_checkpoint = str(best)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.distillation_objective.projections is not None:
            self.distillation_objective.projections.load(Path(resume_from_checkpoint))

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> CommitInfo:
        """Push as `Trainer` does; the existing card of the target revision is kept, outside of our section.

        Text that was written on the Hub since the last push is kept, and so is text in the `README.md` of `output_dir` unless
        the Hub's has changed too: then it is in `_README.local.md`, which is not pushed.
        """
        self._hub_target = {"token": token or self.args.hub_token, "revision": revision or self.args.hub_revision}
        commit = super().push_to_hub(commit_message, blocking, token, revision, private, **kwargs)
        card = Path(self.args.output_dir or "") / CARD_NAME
        if self.is_world_process_zero() and card.is_file():
            self._seen_cards.add(card.read_bytes())
        return commit

    def create_model_card(
        self,
        language: str | list[str] | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
        dataset_name: str | None = None,
    ) -> None:
        """Write the student's model card into `output_dir`, and the record of the training that it is made from.

        The arguments are those of `Trainer`, and `dataset_name`, the one of TRL's trainers. Teacher, task and results are
        known, so `finetuned_from` and `tasks` have no effect; `dataset_tags` and `dataset_name` are Hub ids, `dataset` and
        `dataset_args` are names for people. An existing card keeps the text that a person wrote.
        """
        if not self.is_world_process_zero():
            return
        folder = Path(self.args.output_dir or "")
        if self.hub_model_id is not None:
            fetch_card(self.hub_model_id, folder, seen=self._seen_cards, **self._hub_target)
        names = _as_list(dataset) or _as_list(dataset_args)
        record = build_training_record(
            self,
            datasets=[*_as_list(dataset_tags), *_as_list(dataset_name)],
            evaluated_on=names,
            languages=_as_list(language),
        )
        record.weights = self._weights_in(folder)
        save_record(folder, record)
        attach_record(self.unwrapped_student, record)
        # An adapter's folder has no report; the file's own has no path to the teacher's card.
        has_report = (folder / REPORT_NAME).is_file()
        write_model_card(
            folder,
            getattr(self.unwrapped_student, "initialization_report", None) if has_report else None,
            model_id=self.hub_model_id or model_name,
            license=license,
            language=language,
            tags=_as_list(tags) or None,
        )

    def save_merged_model(self, output_dir: str | os.PathLike[str]) -> None:
        """Save the student with its adapter merged: a stock model that `from_pretrained` loads.

        The files are loaded again and compared with the student. Tied embeddings of which the adapter changed only one are
        written as two tensors.

        Raises:
            OptionError: The student has no adapter, or one that cannot be merged; or its weights are sharded.
        """
        student = self.unwrapped_student
        if is_sharded(self.accelerator):
            raise OptionError(
                "The student's weights are sharded over processes and cannot be merged here. Save the adapter with "
                "save_model, and merge it in one process: PeftModel.from_pretrained(base, folder).merge_and_unload()."
            )
        if not self.args.should_save:
            return
        tokenizer = self.processing_class or getattr(self.data_collator, "tokenizer", None)
        record = self.present_record()

        def add_files(folder: Path) -> None:
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
            if record is not None:
                save_record(folder, with_weights_of(dataclasses.replace(record, weights=None), folder))
            self._save_sentence_modules(folder)
            clean_saved_folder(folder)

        save_merged(student, Path(output_dir), add_files=add_files)


def _as_list(names: "str | list[str] | None") -> list[str]:
    return [names] if isinstance(names, str) else list(names or [])
