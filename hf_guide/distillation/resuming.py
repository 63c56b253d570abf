"""`ResumableTrainer`: a `Trainer` that is killed at any moment and resumed, and ends as if it had never been."""

import json
import secrets
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from hf_guide.distillation import checkpoints
from hf_guide.distillation.checkpoints import STATE_NAME
from hf_guide.distillation.metrics import RunningMeans
from hf_guide.utils.files import atomic_write_text, staged_update


class ResumableTrainer(Trainer):
    """A `Trainer` whose checkpoints are whole or not there, and whose resumed runs log what an uninterrupted one logs.

    Unfinished checkpoints are skipped, and the log says so. A run that is finished trains no further when it is resumed.
    """

    _train_means: RunningMeans
    _unfinished: Path | None = None
    """Where a checkpoint is being written."""

    _run = ""
    """What tells this run, its resumed parts included, from others in the same `output_dir`."""

    _resume_checkpoint: str | None = None
    _is_restored = False

    def train(
        self,
        resume_from_checkpoint: "str | bool | None" = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train as `Trainer` does.

        Args:
            resume_from_checkpoint: a checkpoint; True is the last whole one in `output_dir`. Unfinished ones are skipped;
                where there are no others, training begins anew.
            trial, ignore_keys_for_eval: as `Trainer`'s.

        Raises:
            OptionError: a named checkpoint is unfinished or damaged.
            OSError: the disk is full. The checkpoints before are whole, and no unfinished one is left.
        """
        chosen = checkpoints.select_checkpoint(resume_from_checkpoint, self.args.output_dir or "", self.accelerator)
        self._resume_checkpoint, self._is_restored = chosen if isinstance(chosen, str) else None, False
        earlier = checkpoints.read_run_id(Path(self._resume_checkpoint)) if self._resume_checkpoint else None
        self._run = earlier or secrets.token_hex(8)
        if chosen is None and self.args.should_save and trial is None:
            checkpoints.warn_about_earlier_run(self.args.output_dir or "")
        output = super().train(chosen, trial, ignore_keys_for_eval)
        return output._replace(training_loss=output.metrics.get("train_loss", output.training_loss))

    def _run_epoch(self, *args: Any, **settings: Any) -> None:
        """Run an epoch as `Trainer` does, the first with the sums of the checkpoint; none once all steps are done."""
        if settings["epoch"] == settings["epochs_trained"]:
            self._train_means = RunningMeans()
            self._restore_progress()
        if self.state.global_step >= self.state.max_steps:
            checkpoints.logger.warning("All %d steps are done: nothing is left to train.", self.state.global_step)
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **settings)

    def _finalize_training(self, trial: Any, num_train_samples: int, start_time: float) -> TrainOutput:
        if not self._is_restored:  # a finished run whose last epoch is whole has no epoch left to run
            self._restore_progress()
        return super()._finalize_training(trial, num_train_samples, start_time)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as `Trainer` does; `train_loss` is the mean over all steps, also those before the run was resumed."""
        if "train_loss" in logs and self._is_restored:
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step, 1)
        super().log(logs, start_time)

    # What is logged is summed up over the steps since the last log, and a checkpoint may stand between two logs.

    def _progress(self) -> dict[str, Any]:
        return {
            "run": self._run,
            "loss": self._tr_loss.item(),
            "total_loss": self._total_loss_scalar,
            "last_logged": self._globalstep_last_logged,
            "terms": self._train_means.state(),
        }

    def _restore_progress(self) -> None:
        everyone = checkpoints.read_progress(self._resume_checkpoint) if self._resume_checkpoint else []
        if not everyone:
            return
        rank, size = self.accelerator.process_index, self.accelerator.num_processes
        self._is_restored = True
        self._total_loss_scalar = everyone[0]["total_loss"]
        self._globalstep_last_logged = everyone[0]["last_logged"]
        if len(everyone) == size:
            loss, terms = everyone[rank]["loss"], [everyone[rank]["terms"]]
        else:  # other processes than the checkpoint's: what they sum up to is the same
            loss = sum(each["loss"] for each in everyone) / len(everyone)
            terms = [each["terms"] for each in everyone] if rank == 0 else []
        self._tr_loss += torch.tensor(loss, dtype=self._tr_loss.dtype, device=self._tr_loss.device)
        for each in terms:
            self._train_means.add_state_dict(each, self.accelerator.device)

    # Files

    def _get_output_dir(self, trial: Any) -> str:
        """Return where checkpoints go: while one is written, the folder in which it is unfinished."""
        return super()._get_output_dir(trial) if self._unfinished is None else str(self._unfinished)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._unfinished is None:
            super()._push_from_checkpoint(checkpoint_folder)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self._unfinished is not None:
            super()._save(output_dir, state_dict)
            return
        folder = Path(output_dir or self.args.output_dir or "")
        with checkpoints.explain_write_errors("The student", folder), staged_update(folder) as new:
            super()._save(str(new), state_dict)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save a checkpoint as `Trainer` does, under its name once it is whole; only then push it, and remove older ones."""
        args, step = self.args, self.state.global_step
        run_folder = Path(self._get_output_dir(trial))
        final = run_folder / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        with checkpoints.atomic_checkpoint(
            run_folder, step, self.accelerator, self._progress(), on_each_node=args.save_on_each_node
        ) as folder:
            self._unfinished = folder
            try:
                super()._save_checkpoint(model, trial)
                if args.should_save:
                    remove_paths_from_state(folder / final.name)
            finally:
                self._unfinished = None
        if self.state.best_model_checkpoint == str(folder / final.name):
            self.state.best_model_checkpoint = str(final)
        if args.push_to_hub:
            self._push_from_checkpoint(str(final))
        if args.should_save:
            checkpoints.remove_old_checkpoints(run_folder, args.save_total_limit, self.state.best_model_checkpoint)


def remove_paths_from_state(folder: Path) -> None:
    """Take the path of the best checkpoint out of a folder's `trainer_state.json`, where there is one."""
    path = folder / STATE_NAME
    if not path.is_file():
        return
    state = json.loads(path.read_text(encoding="utf-8"))
    if state.get("best_model_checkpoint") is not None:
        state["best_model_checkpoint"] = None
        atomic_write_text(path, json.dumps(state, indent=2, sort_keys=True) + "\n")
