"""`hf-guide distill CONFIG.yaml`: distill as a configuration file specifies. The work is in `scripts/distill.py`."""

import argparse
import gc
import sys
from pathlib import Path

HELP = "initialize, train, evaluate and save a student as a configuration file specifies"
DESCRIPTION = (
    "Train a student from a teacher or a teacher cache as a YAML or JSON file specifies; flags after it override it."
)
EXAMPLE = "hf-guide distill examples/distill_smollm2.yaml --max_steps 100"
SHOWN_METRICS = (
    *("loss", "ce", "kd", "perplexity", "accuracy", "wer", "cer", "rouge1", "chrf", "teacher_agreement"),
    *("similarity_spearman", "score_spearman"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the file, and all arguments after it, which take precedence over it."""
    parser.add_argument("config", metavar="CONFIG", type=Path, help="YAML or JSON file of options and values")
    parser.add_argument(
        "overrides",
        nargs=argparse.REMAINDER,
        metavar="--key value ...",
        help="options that override the file; `hf-guide distill CONFIG --help` lists all of them",
    )


def run(args: argparse.Namespace) -> int:
    """Distill, print the metrics and where the student is saved, and return the exit code."""
    from hf_guide.scripts.distill import distill, read_config
    from hf_guide.scripts.run_record import remove_unused_record

    config = read_config(args.config, args.overrides)
    training = config.training
    try:
        metrics = distill(config)
    except KeyboardInterrupt:
        if training.process_index == 0:
            output_dir = Path(training.output_dir or "")
            remove_unused_record(output_dir)
            print(f"hf-guide: interrupted; {describe_checkpoints(output_dir)}.", file=sys.stderr)
        return 130
    if training.process_index == 0:
        shown = {name: metrics[f"eval_{name}"] for name in SHOWN_METRICS if f"eval_{name}" in metrics}
        print(", ".join(f"{name} {value:.4g}" for name, value in shown.items()) or "Not evaluated.")
        print(f"Saved in {training.output_dir}")
    gc.collect()  # a process that leaves its group while a wrapped model still exists can hang
    training.distributed_state.destroy_process_group()
    return 0


def describe_checkpoints(output_dir: Path) -> str:
    """Return what an interrupted run left on disk, and how to continue from it."""
    from hf_guide.distillation.checkpoints import last_complete_checkpoint
    from hf_guide.scripts.run_record import has_stages

    if has_stages(output_dir):
        return (
            f"to continue from the last stage in {output_dir}, run the same command with --resume_from_checkpoint true"
        )
    checkpoint = last_complete_checkpoint(output_dir)
    if checkpoint is not None:
        return f"to continue from {checkpoint}, run the same command with --resume_from_checkpoint true"
    names = sorted(path.name for path in output_dir.iterdir()) if output_dir.is_dir() else []
    if not names:
        return "nothing was written"
    return f"no checkpoint is complete yet, so the same command starts again; {output_dir} contains {', '.join(names[:5])}"
