"""`ResumableTrainer`: a `Trainer` that can be killed at any moment and resumed, with the result of an uninterrupted run."""

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
    """A `Trainer` with atomic checkpoints, whose resumed runs log what an uninterrupted one logs.

    Incomplete checkpoints are skipped, and logged. A finished run does not train further when it is resumed.
    """

    _train_means: RunningMeans
    _partial_folder: Path | None = None
    """The folder into which a checkpoint is being written."""

    _run = ""
    """The id of this run and its resumed parts, which distinguishes them from others in the same `output_dir`."""

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
            resume_from_checkpoint: A checkpoint; True means the last complete one in `output_dir`. Incomplete ones are
                skipped; if there are no others, training starts from the beginning.
            trial, ignore_keys_for_eval: As in `Trainer`.

        Raises:
            OptionError: The named checkpoint is incomplete or damaged.
            OSError: The disk is full. Earlier checkpoints are complete, and no incomplete one is left.
        """
        checkpoint = checkpoints.select_checkpoint(
            resume_from_checkpoint, self.args.output_dir or "", self.accelerator
        )
        self._resume_checkpoint, self._is_restored = checkpoint if isinstance(checkpoint, str) else None, False
        earlier = checkpoints.read_run_id(Path(self._resume_checkpoint)) if self._resume_checkpoint else None
        self._run = earlier or secrets.token_hex(8)
        if checkpoint is None and self.args.should_save and trial is None:
            checkpoints.warn_about_earlier_run(self.args.output_dir or "")
        output = super().train(checkpoint, trial, ignore_keys_for_eval)
        return output._replace(training_loss=output.metrics.get("train_loss", output.training_loss))

    def _run_epoch(self, *args: Any, **settings: Any) -> None:
        """Run an epoch as `Trainer` does, the first with the checkpoint's sums; skip it if all steps are done."""
        if settings["epoch"] == settings["epochs_trained"]:
            self._train_means = RunningMeans()
            self._restore_progress()
        if self.state.global_step >= self.state.max_steps:
            checkpoints.logger.warning(
                "All %d steps are done: there is nothing left to train.", self.state.global_step
            )
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **settings)

    def _finalize_training(self, trial: Any, num_train_samples: int, start_time: float) -> TrainOutput:
        if not self._is_restored:  # a finished run whose last epoch is complete has no epoch left to run
            self._restore_progress()
        return super()._finalize_training(trial, num_train_samples, start_time)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as `Trainer` does; `train_loss` is the mean over all steps, including those before the run was resumed."""
        if "train_loss" in logs and self._is_restored:
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step, 1)
        super().log(logs, start_time)

    # Logged values are summed over the steps since the last log, and a checkpoint may be saved between two logs.

    def _progress(self) -> dict[str, Any]:
        return {
            "run": self._run,
            "loss": self._tr_loss.item(),
            "total_loss": self._total_loss_scalar,
            "last_logged": self._globalstep_last_logged,
            "terms": self._train_means.state(),
        }

    def _restore_progress(self) -> None:
        by_process = checkpoints.read_progress(self._resume_checkpoint) if self._resume_checkpoint else []
        if not by_process:
            return
        rank, size = self.accelerator.process_index, self.accelerator.num_processes
        self._is_restored = True
        self._total_loss_scalar = by_process[0]["total_loss"]
        self._globalstep_last_logged = by_process[0]["last_logged"]
        if len(by_process) == size:
            loss, terms = by_process[rank]["loss"], [by_process[rank]["terms"]]
        else:  # another number of processes than the checkpoint's: only the sums over all are the same
            loss = sum(each["loss"] for each in by_process) / len(by_process)
            terms = [each["terms"] for each in by_process] if rank == 0 else []
        self._tr_loss += torch.tensor(loss, dtype=self._tr_loss.dtype, device=self._tr_loss.device)
        for each in terms:
            self._train_means.add_state_dict(each, self.accelerator.device)

    # Files

    def _get_output_dir(self, trial: Any) -> str:
        """Return the folder of checkpoints; while one is being written, its temporary folder."""
        return super()._get_output_dir(trial) if self._partial_folder is None else str(self._partial_folder)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._partial_folder is None:
            super()._push_from_checkpoint(checkpoint_folder)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self._partial_folder is not None:
            super()._save(output_dir, state_dict)
            return
        folder = Path(output_dir or self.args.output_dir or "")
        with checkpoints.explain_write_errors("The student", folder), staged_update(folder) as new:
            super()._save(str(new), state_dict)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save a checkpoint as `Trainer` does, under its name once complete; only then push it, and remove older ones."""
        args, step = self.args, self.state.global_step
        run_folder = Path(self._get_output_dir(trial))
        final = run_folder / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        with checkpoints.atomic_checkpoint(
            run_folder, step, self.accelerator, self._progress(), on_each_node=args.save_on_each_node
        ) as folder:
            self._partial_folder = folder
            try:
                super()._save_checkpoint(model, trial)
                if args.should_save:
                    remove_paths_from_state(folder / final.name)
            finally:
                self._partial_folder = None
        if self.state.best_model_checkpoint == str(folder / final.name):
            self.state.best_model_checkpoint = str(final)
        if args.push_to_hub:
            self._push_from_checkpoint(str(final))
        if args.should_save:
            checkpoints.remove_old_checkpoints(run_folder, args.save_total_limit, self.state.best_model_checkpoint)


def remove_paths_from_state(folder: Path) -> None:
    """Remove the path of the best checkpoint from a folder's `trainer_state.json`, if it has one."""
    path = folder / STATE_NAME
    if not path.is_file():
        return
    state = json.loads(path.read_text(encoding="utf-8"))
    if state.get("best_model_checkpoint") is not None:
        state["best_model_checkpoint"] = None
        atomic_write_text(path, json.dumps(state, indent=2, sort_keys=True) + "\n")
