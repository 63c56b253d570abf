"""`hf-guide label`: write pseudo-labels. The work is in `scripts/label.py`."""

import argparse
import sys

from hf_guide.cli.arguments import add_dataset_run_arguments, add_fields, explicit_fields, hub_arguments
from hf_guide.data.arguments import DataArguments
from hf_guide.scripts.label_config import LabelConfig
from hf_guide.utils.escaping import escape_control_characters

HELP = "write a dataset whose transcripts, targets or classes are the teacher's"
DESCRIPTION = (
    "Write a copy of a dataset in which a teacher's transcripts, targets, completions or classes replace the dataset's own,\n"
    "which are kept as reference_...; `hf-guide distill` trains on it (sequence-level distillation). Rows of the evaluation\n"
    "split keep their own. If the command is killed, running it again continues where it stopped."
)
EXAMPLE = (
    "hf-guide label openai/whisper-small -o labeled/ --dataset-name google/fleurs --dataset-config-name de_de \\\n"
    "      --language german --speech-task transcribe --text-column transcription --max-wer 0.2"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the teacher, the output, and a flag for each field of `DataArguments` and `LabelConfig`."""
    parser.add_argument("teacher", metavar="TEACHER", help="Hub id or folder of the teacher")
    add_dataset_run_arguments(parser, folder="the labeled dataset")
    add_fields(parser.add_argument_group("labels"), LabelConfig, list_types={})
    add_fields(parser.add_argument_group("dataset"), DataArguments, list_types={})


def run(args: argparse.Namespace) -> int:
    """Write the labeled dataset; return 0 when done, 130 after Ctrl-C."""
    from datasets.utils.logging import disable_progress_bar
    from transformers.utils import logging

    from hf_guide.scripts.label import label_dataset, label_folder
    from hf_guide.signal_cache.writer import distributed_state

    config = LabelConfig(**explicit_fields(args, LabelConfig))
    data = DataArguments(**explicit_fields(args, DataArguments))
    label_folder(args.output).check()
    state = distributed_state()
    if args.no_progress:
        logging.disable_progress_bar()
        disable_progress_bar()
    try:
        result = label_dataset(
            args.teacher,
            args.output,
            data,
            config,
            state,
            processing_class_name_or_path=args.processing_class_name_or_path,
            train_only=args.train_only,
            hub_kwargs=hub_arguments(args),
            dtype=args.dtype,
            show_progress=not args.no_progress,
        )
    except KeyboardInterrupt:
        print("hf-guide: interrupted; run the same command again to continue.", file=sys.stderr)
        return 130
    if state.is_main_process:
        counts = ", ".join(f"{result.labeled[name]} of {rows} rows of {name}" for name, rows in result.rows.items())
        print(escape_control_characters(f"Labeled {counts}, in {args.output}."))
        print(f"To train on them, set `dataset_name: {args.output}` in the file of `hf-guide distill`.")
    if state.num_processes > 1:
        state.destroy_process_group()
    return 0
