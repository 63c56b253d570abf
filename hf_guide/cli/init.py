"""`hf-guide init`: initialize a student from a teacher, and save it with its tokenizer, report and model card."""

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_guide.cli.arguments import (
    add_budget_arguments,
    add_hub_arguments,
    budget_arguments,
    hub_arguments,
    parse_key_value,
    to_flag,
)
from hf_guide.errors import OptionError
from hf_guide.tasks import Task
from hf_guide.utils.deprecation import RenamedOptions
from hf_guide.utils.escaping import escape_control_characters
from hf_guide.utils.files import atomic_folder, check_disk_space, check_output_folder
from hf_guide.validation import check_choice

if TYPE_CHECKING:
    from hf_guide.initialization.report import InitializationReport

HELP = "initialize a student from a teacher"
DESCRIPTION = "Initialize a student from a teacher; save it with its tokenizer, a model card and a report."
EXAMPLE = "hf-guide init HuggingFaceTB/SmolLM2-135M --num-parameters 23M -o student/"
USAGE = "hf-guide init TEACHER -o FOLDER [shape] [--method NAME] [--option KEY=VALUE ...]"
RENAMED_FLAGS = RenamedOptions(names={"set": "config", "calibration_dir": "calibration_cache_dir"})

SIZES = {
    "hidden_size": "width of the residual stream",
    "num_hidden_layers": "number of blocks",
    "intermediate_size": "width of the MLP",
    "num_attention_heads": "number of query heads",
    "num_key_value_heads": "number of key/value heads",
    "head_dim": "size of a head; by default the teacher's",
    "vocab_size": "number of tokens: those in use; `auto` with a budget",
}

TASKS = {"base": "AutoStudent"} | {str(task): task.auto_student_class for task in Task}
"""The classes whose `from_teacher` makes a student for each task."""

ROW_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
"""Files of rows; all others are of text."""

OLD_OPTION_FLAGS = (
    "layers later_blocks token_weights logit_gain basis pooling heads neurons experts repair repair_inputs ridge "
    "calibration_tokens calibration_length calibration_batch_size"
).split()
OLD_SWITCHES = (
    "centered energy_correction fold_norms restore_logit_scale absorb_blocks fit_table turn_values turn_queries fit_gain "
    "fit_logit_scale"
).split()
"""Flags of the previous release for options of a method, which are now `--option KEY=VALUE`."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the teacher, the output, the student's shape, the method and its data."""
    parser.usage = USAGE
    parser.add_argument("-o", "--output", type=Path, metavar="FOLDER", help="folder for the student: new or empty")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print plan, shapes, memory and time, and stop",
    )
    parser.add_argument("--task", choices=TASKS, metavar="TASK", help="by default the teacher's")
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16", "float64"],
        metavar="DTYPE",
        help="by default the teacher's",
    )
    parser.add_argument("--license", metavar="ID", help="license for the model card, such as apache-2.0")
    parser.add_argument("--no-progress", action="store_true", help="show no progress bars")
    add_shape_arguments(parser, brief=True)
    key_value: dict[str, Any] = {"action": "append", "default": [], "metavar": "KEY=VALUE"}
    method = parser.add_argument_group("method")
    method.add_argument(
        "--method", default="guide", metavar="NAME", help="guide (default), or another of `hf-guide methods`"
    )
    method.add_argument("--option", **key_value, help="option of the method (see `hf-guide methods`); may be repeated")
    method.add_argument("--seed", type=int, metavar="N", help="seed for randomly initialized weights (default: 0)")
    add_calibration_arguments(method)
    source = parser.add_argument_group("teacher")
    source.add_argument("teacher", metavar="TEACHER", help="Hub id or folder of the big model")
    source.add_argument("--gguf-file", metavar="FILE", help="GGUF file of the teacher to read")
    add_hub_arguments(source)
    for name in OLD_OPTION_FLAGS:
        parser.add_argument(to_flag(name), dest=name, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    for name in OLD_SWITCHES:
        switch: Any = argparse.BooleanOptionalAction
        parser.add_argument(to_flag(name), action=switch, default=argparse.SUPPRESS, help=argparse.SUPPRESS)


def add_shape_arguments(parser: argparse.ArgumentParser, *, brief: bool = False) -> None:
    """Add the student's sizes and its tokenizer, or the budget; `brief` as in `add_budget_arguments`."""
    shape = parser.add_argument_group("shape (by default the teacher's, or what follows from the others)")
    for name, text in SIZES.items():
        size = _number_or_auto if name == "vocab_size" else int
        shape.add_argument(to_flag(name), type=size, metavar="N", help=text)
    shape.add_argument(
        "--tokenizer", metavar="TOKENIZER", help="Hub id or folder of another tokenizer than the teacher's"
    )
    shape.add_argument(
        "--config",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="any other entry of the config; may be repeated",
    )
    add_budget_arguments(shape, brief=brief)


def _number_or_auto(text: str) -> "int | str":
    return text if text == "auto" else int(text)


def add_calibration_arguments(group: Any) -> None:
    """Add the calibration data, and the folder for resuming."""
    group.add_argument(
        "--calibration-dataset",
        metavar="F",
        nargs="+",
        type=Path,
        help="text, jsonl, csv or parquet files, or `self_generated`",
    )
    group.add_argument(
        "--calibration-cache-dir", metavar="FOLDER", type=Path, help="where calibrated saves its progress, to resume"
    )


def shape_overrides(args: argparse.Namespace) -> dict[str, Any]:
    """Return the sizes and entries of the config that are given, as keyword arguments of `from_teacher`."""
    overrides = {name: getattr(args, name) for name in SIZES if getattr(args, name) is not None}
    return add_key_values(overrides, args.config, "--config")


def run(args: argparse.Namespace) -> int:
    """Initialize the student and save it atomically, print its report, and return the exit code."""
    overrides = shape_overrides(args)
    options = _method_options(args)
    if args.output is not None:
        check_output_folder(args.output)
    if args.license:
        from hf_guide.hub.licenses import check_license

        check_license(args.license)
    if args.dry_run:
        return _dry_run(args, overrides, options)
    if args.output is None:
        raise OptionError("Set -o/--output, the folder for the student; only --dry-run needs none.")

    import torch

    from hf_guide import modeling, modeling_auto
    from hf_guide.hub.saved_model import SavedModel, check_tokenizer_files, copy_tokenizer_files
    from hf_guide.methods import InitializationConfig
    from hf_guide.utils.checksums import check_written_model

    method = InitializationConfig.parse(options)
    check_tokenizer_files(args.teacher, gguf_file=args.gguf_file, revision=args.revision, token=args.token)
    from_teacher = getattr(modeling_auto, TASKS[args.task]).from_teacher if args.task else modeling.from_teacher
    with atomic_folder(args.output, check=check_written_model) as folder:
        student: Any = from_teacher(
            args.teacher,
            method=method,
            calibration_dataset=read_calibration_dataset(args.calibration_dataset),
            calibration_cache_dir=args.calibration_cache_dir,
            dtype=getattr(torch, args.dtype) if args.dtype else None,
            tokenizer=args.tokenizer,
            gguf_file=args.gguf_file,
            show_progress=not args.no_progress,
            **hub_arguments(args),
            **budget_arguments(args),
            **overrides,
        )
        report = student.initialization_report
        check_disk_space(folder, student.get_memory_footprint())
        student.save_pretrained(folder)
        if not report.vocabulary:  # otherwise the student has its own tokenizer
            copy_tokenizer_files(args.teacher, folder, gguf_file=args.gguf_file, **hub_arguments(args))
        _write_card_and_plot(report, folder, args)
    print(escape_control_characters(report.summary()))
    if report.shape_choice:
        print(escape_control_characters(f"Shape: {report.shape_choice}"))
    sentence_class = SavedModel.read(args.output).sentence_class
    load = f"sentence_transformers.{sentence_class}" if sentence_class else f"{type(student).__name__}.from_pretrained"
    print(f"Saved in {args.output}. Load it with {load}({str(args.output)!r}).")
    return 0


def _dry_run(args: argparse.Namespace, overrides: dict[str, Any], options: dict[str, Any]) -> int:
    """Print what would be made, and what it takes, without reading weights; raise where an output's disk has no space."""
    from hf_guide import modeling, modeling_auto

    plan = modeling.plan_student(
        args.teacher,
        method=options,
        model_class=getattr(modeling_auto, TASKS[args.task]).model_class if args.task else None,
        dtype=args.dtype,
        tokenizer=args.tokenizer,
        gguf_file=args.gguf_file,
        **hub_arguments(args),
        **budget_arguments(args),
        **overrides,
    )
    print(escape_control_characters(str(plan)))
    if args.output is not None:
        check_disk_space(args.output, plan.student_bytes)
    return 0


def _method_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the method's name and options from `--method`, `--seed`, `--option` and deprecated flags."""
    from hf_guide.methods import list_methods, renamed_options_of_method

    options: dict[str, Any] = {"method": check_choice("--method", args.method, list_methods())}
    if args.seed is not None:
        options["seed"] = args.seed
    renamed = renamed_options_of_method(args.method)
    for name in (*OLD_OPTION_FLAGS, *OLD_SWITCHES):
        if name in vars(args):
            value = getattr(args, name)
            options[name] = value if isinstance(value, bool) else parse_key_value(f"{name}={value}", to_flag(name))[1]
            if name not in renamed.removed:  # otherwise an error states why it is gone
                message = f"{to_flag(name)} is deprecated; use --option {renamed.names.get(name, name)}=VALUE."
                warnings.warn(f"hf-guide init: {message}", FutureWarning, stacklevel=2)
    return add_key_values(options, args.option, "--option")


def add_key_values(values: dict[str, Any], texts: Sequence[str], flag: str) -> dict[str, Any]:
    """Return `values` with the parsed KEY=VALUE texts.

    Raises:
        OptionError: A text is not of this form, or a key is given twice.
    """
    values = dict(values)
    for text in texts:
        key, value = parse_key_value(text, flag)
        if key in values:
            raise OptionError(f"{key} is given twice: as {values[key]!r} and as {value!r}. Give it once.")
        values[key] = value
    return values


def read_calibration_dataset(paths: Sequence[Path] | None) -> Any:
    """Return the texts or rows in files; the one word `self_generated`, or its old name `teacher`, is returned as it is.

    Raises:
        OptionError: There is no such file, or as `read_rows` and `read_texts`.
    """
    if paths is not None and len(paths) == 1 and str(paths[0]) in ("self_generated", "teacher"):
        if not paths[0].exists():
            return str(paths[0])
    if not paths:
        return None
    for path in paths:
        if not path.is_file():
            raise OptionError(
                f"There is no file {path}: --calibration-dataset takes text, jsonl, csv or parquet files, or self_generated. "
                "Save a dataset of the Hub to such a file, or pass it to from_teacher in Python."
            )
    return read_rows(paths) if any(path.suffix in ROW_SUFFIXES for path in paths) else read_texts(paths)


def read_rows(paths: Sequence[Path]) -> Any:
    """Return the rows in files as a dataset.

    Raises:
        OptionError: The files are of several formats, or cannot be read.
    """
    from hf_guide.data.arguments import DataArguments
    from hf_guide.data.loading import load_splits

    suffixes = sorted({path.suffix for path in paths})
    if len(suffixes) > 1:
        raise OptionError(f"The files of --calibration-dataset must have one format; found {', '.join(suffixes)}.")
    files = [str(path) for path in paths]
    return load_splits(DataArguments(data_files=files, validation_split_percentage=0))[0]


def read_texts(paths: Sequence[Path]) -> list[str]:
    """Return the texts in text files, which are separated by empty lines.

    Raises:
        OptionError: A file is not text, or the files contain none.
    """
    texts: list[str] = []
    for path in paths:
        try:
            texts += [text for text in path.read_text(encoding="utf-8").split("\n\n") if text.strip()]
        except UnicodeDecodeError as error:
            raise OptionError(f"{path} must be a text file for --calibration-dataset: {error}.") from error
    if not texts:
        raise OptionError(f"{', '.join(map(str, paths))} must contain text for --calibration-dataset; found none.")
    return texts


def _write_card_and_plot(report: "InitializationReport", folder: Path, args: argparse.Namespace) -> None:
    from hf_guide.hub.model_card import PLOT_NAME, write_model_card
    from hf_guide.visualization import plot_explained_variance

    write_model_card(folder, report, model_id=args.output.resolve().name, license=args.license)
    if report.explained_variance and not (folder / PLOT_NAME).is_file():
        try:
            plot_explained_variance(report, folder / PLOT_NAME)
        except ImportError as error:
            print(f"No plot was drawn: {error}", file=sys.stderr)
