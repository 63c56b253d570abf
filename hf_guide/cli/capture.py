"""`hf-guide capture`: write a teacher cache. The work is in `scripts/capture.py`."""

import argparse
import sys
from pathlib import Path

from hf_guide.cli.arguments import add_dataset_run_arguments, add_fields, explicit_fields, hub_arguments
from hf_guide.data.arguments import DataArguments
from hf_guide.errors import OptionError
from hf_guide.signal_cache.config import CaptureConfig
from hf_guide.utils.deprecation import RenamedOptions, renamed_options_of
from hf_guide.utils.escaping import escape_control_characters

HELP = "run the teacher once over a dataset, and save its outputs"
DESCRIPTION = (
    "Run a teacher once over a dataset and save its outputs in Arrow files. Students are then trained without the teacher,\n"
    "shuffled and for any number of epochs. If the command is killed, running it again continues where it stopped."
)
EXAMPLE = (
    "hf-guide capture HuggingFaceTB/SmolLM2-135M -o teacher_cache/ \\\n"
    "      --dataset-name Salesforce/wikitext --dataset-config-name wikitext-2-raw-v1"
)
_OWN_RENAMED = {"processor": "processing_class_name_or_path", "num_workers": "dataloader_num_workers"}
_FIELDS = renamed_options_of(DataArguments, CaptureConfig)
RENAMED_FLAGS = RenamedOptions(
    names={**_FIELDS.names, **_OWN_RENAMED}, removed=_FIELDS.removed, conversions=_FIELDS.conversions
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the teacher, the output, and a flag for each field of `DataArguments` and `CaptureConfig`."""
    parser.add_argument("teacher", metavar="TEACHER", nargs="?", help="Hub id or folder of the teacher")
    add_dataset_run_arguments(parser, folder="the cache")
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="configuration file of `hf-guide distill`: its teacher and data are used, and what its losses need is saved; "
        "flags take precedence",
    )
    parser.add_argument(
        "--dataloader-num-workers", type=int, default=0, metavar="N", help="processes that prepare batches"
    )
    list_types = {"temperatures": float, "hidden_layers": int, "ignored_inputs": str}
    add_fields(
        parser.add_argument_group("outputs to save"),
        CaptureConfig,
        list_types=list_types,
        skip=("remove_unused_columns",),
    )
    add_fields(parser.add_argument_group("dataset"), DataArguments, list_types={})


def run(args: argparse.Namespace) -> int:
    """Write the cache; return 0 when done, 130 after Ctrl-C."""
    import dataclasses

    from transformers.utils import logging

    from hf_guide.scripts.capture import capture_dataset, capture_options_from_config
    from hf_guide.scripts.config_file import read_options
    from hf_guide.scripts.distill import DATACLASSES
    from hf_guide.signal_cache.manifest import signal_cache_folder
    from hf_guide.signal_cache.writer import distributed_state

    options = read_options(args.config, DATACLASSES) if args.config else {}
    teacher = args.teacher or options.get("teacher")
    if not teacher:
        raise OptionError("No teacher is given: pass one, or a --config file that contains one.")
    required = capture_options_from_config(options, needs_hidden_layers=args.hidden_layers is None)
    config = CaptureConfig(**required | explicit_fields(args, CaptureConfig))
    data_fields = {field.name for field in dataclasses.fields(DataArguments)}
    data_options = {name: value for name, value in options.items() if name in data_fields}
    data = DataArguments(**data_options | explicit_fields(args, DataArguments))
    signal_cache_folder(args.output).check()
    state = distributed_state()
    if args.no_progress:
        logging.disable_progress_bar()
    try:
        cache = capture_dataset(
            teacher,
            args.output,
            data,
            config,
            state,
            processing_class_name_or_path=args.processing_class_name_or_path
            or options.get("processing_class_name_or_path"),
            train_only=args.train_only,
            hub_kwargs=hub_arguments(args),
            dtype=args.dtype,
            dataloader_num_workers=args.dataloader_num_workers,
            show_progress=not args.no_progress,
        )
    except KeyboardInterrupt:
        print("hf-guide: interrupted; run the same command again to continue.", file=sys.stderr)
        return 130
    if state.is_main_process:
        print(escape_control_characters(cache.summary()))
        print(f"To train from it without a teacher, set `teacher_cache: {args.output}` instead of a teacher.")
    if state.num_processes > 1:
        state.destroy_process_group()
    return 0
