"""`hf-guide distill CONFIG.yaml`: a distillation, all of it said by one file.

This module is light, so that `hf-guide --help` answers at once; the work is in `scripts/distill.py`.
"""

import argparse
import gc
import sys
from pathlib import Path

HELP = "make, train, evaluate and save a student, as one file says"
DESCRIPTION = (
    "Train a student from a teacher, or from a capture, as a YAML or JSON file says; flags after it override it."
)
EXAMPLE = "hf-guide distill examples/distill_smollm2.yaml --max_steps 100"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give `parser` the file, and all words after it, which count over the file."""
    parser.add_argument("config", metavar="CONFIG", type=Path, help="a YAML or JSON file of options and their values")
    parser.add_argument(
        "overrides",
        nargs=argparse.REMAINDER,
        metavar="--key value ...",
        help="options that count over the file's; `hf-guide distill CONFIG --help` lists every one",
    )


def run(args: argparse.Namespace) -> int:
    """Distil with the flags of `add_arguments`, say where the student is, and return the exit code."""
    from hf_guide.scripts.distill_config import read_config

    settings = read_config(args.config, args.overrides)

    from hf_guide.scripts.distill import distill

    try:
        metrics = distill(settings)
    except KeyboardInterrupt:
        if settings.training.process_index == 0:
            print(
                f"hf-guide: interrupted; {describe_checkpoints(Path(settings.training.output_dir or ''))}.",
                file=sys.stderr,
            )
        return 130
    if settings.training.process_index == 0:
        told = {name.removeprefix("eval_"): value for name, value in metrics.items() if name.startswith("eval_")}
        shown = ("loss", "ce", "kd", "perplexity", "accuracy", "teacher_agreement")
        print(", ".join(f"{name} {told[name]:.4g}" for name in shown if name in told) or "Not evaluated.")
        print(f"Saved in {settings.training.output_dir}")
    gc.collect()  # a process that leaves its group while a wrapped model is still there can hang
    settings.training.distributed_state.destroy_process_group()
    return 0


def describe_checkpoints(output_dir: Path) -> str:
    """Return what an interrupted run has left on the disk, and how to go on from there."""
    from hf_guide.distillation.checkpoints import last_complete_checkpoint

    whole = last_complete_checkpoint(output_dir)
    if whole is not None:
        return f"the same command with --resume_from_checkpoint true goes on from {whole}"
    names = sorted(path.name for path in output_dir.iterdir()) if output_dir.is_dir() else []
    if not names:
        return "nothing was left behind"
    return (
        f"no checkpoint is whole yet, so that the same command begins anew; {output_dir} holds {', '.join(names[:5])}"
    )
