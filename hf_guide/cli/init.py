"""`hf-guide init`: a student that starts inside its teacher, saved with everything that belongs to it."""

import argparse
import ast
import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_guide.calibration.config import SELF_GENERATED
from hf_guide.cli.teacher_arguments import add_teacher_arguments, hub_arguments, to_flag
from hf_guide.errors import OptionError
from hf_guide.hub.saved_model import check_tokenizer_files, copy_tokenizer_files
from hf_guide.tasks import Task
from hf_guide.utils.escaping import escape_control_characters
from hf_guide.utils.files import atomic_folder, check_disk_space, check_output_folder

if TYPE_CHECKING:
    from hf_guide.initialization.report import InitializationReport

HELP = "make a student that starts inside its teacher"
DESCRIPTION = (
    "Make a student of the shape you ask for and save it as a stock Transformers model, with its tokenizer, a\n"
    "model card, a report of where each parameter came from, and a plot. Sizes you do not name are the\n"
    "teacher's, or follow from those you name as the family derives them."
)
EXAMPLE = (
    "hf-guide init HuggingFaceTB/SmolLM2-135M --hidden-size 288 --num-hidden-layers 10 \\\n"
    "      --intermediate-size 768 --head-dim 32 --method guide -o student/"
)

SIZES = {
    "hidden_size": "width of the residual stream",
    "num_hidden_layers": "number of blocks",
    "intermediate_size": "width inside the MLP",
    "num_attention_heads": "number of query heads",
    "num_key_value_heads": "number of key/value heads",
    "head_dim": "size of one head",
}

TASKS = {"base": "AutoStudent"} | {str(task): task.auto_student_class for task in Task}
"""The value of --task for each class of `hf_guide` that makes a student."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give `parser` the teacher, the output, the student's shape, and the method with its options."""
    add_teacher_arguments(parser)
    parser.add_argument("-o", "--output", required=True, type=Path, help="folder for the student; new or empty")
    parser.add_argument("--task", choices=TASKS, help="the student's head; by default the one the teacher has")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16", "float64"], help="by default the teacher's"
    )
    parser.add_argument("--license", help="licence named in the model card, such as apache-2.0")
    parser.add_argument("--no-progress", action="store_true", help="show no progress bars")
    shape = parser.add_argument_group("the student's shape")
    for name, text in SIZES.items():
        shape.add_argument(to_flag(name), type=int, metavar="N", help=text)
    shape.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="any other entry of the config, as often as needed: --set tie_word_embeddings=false",
    )
    method = parser.add_argument_group("how it is made")
    method.add_argument(
        "--calibration-dataset",
        metavar="FILE",
        nargs="+",
        type=Path,
        help="text files, which --method calibrated runs through the teacher; texts part where a line is empty. The one word "
        "self_generated: text that it writes itself",
    )
    method.add_argument(
        "--calibration-cache-dir",
        metavar="DIR",
        type=Path,
        help="folder, new or of the same command, that keeps what --method calibrated has done: killed, the command goes on "
        "from there. It stays until you remove it",
    )
    method.add_argument(
        "--method",
        default="guide",
        metavar="NAME",
        help="guide, calibrated, uniform, random, or one that is registered",
    )
    method.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="an option of the method, as often as needed: --option layer_selection=[0,4,9]",
    )


def run(args: argparse.Namespace) -> int:
    """Make a student and save it, all or nothing."""
    overrides = {name: getattr(args, name) for name in SIZES if getattr(args, name) is not None}
    for text in args.set:
        key, value = parse_override(text)
        if key in overrides:
            raise OptionError(f"{key} is given twice: as {overrides[key]!r} and as {value!r}. Name it once.")
        overrides[key] = value
    from hf_guide.methods import InitializationConfig

    method = InitializationConfig(args.method, **dict(parse_override(text, "--option") for text in args.option))
    check_output_folder(args.output)
    check_tokenizer_files(args.teacher, gguf_file=args.gguf_file, revision=args.revision, token=args.token)

    import torch

    from hf_guide import modeling
    from hf_guide.utils.checksums import check_written_model

    make = getattr(modeling, TASKS[args.task]).from_teacher if args.task else modeling.from_teacher
    with atomic_folder(args.output, check=check_written_model) as folder:
        student: Any = make(
            args.teacher,
            method=method,
            calibration_dataset=_calibration_dataset(args.calibration_dataset),
            calibration_cache_dir=args.calibration_cache_dir,
            dtype=getattr(torch, args.dtype) if args.dtype else None,
            gguf_file=args.gguf_file,
            show_progress=not args.no_progress,
            **hub_arguments(args),
            **overrides,
        )
        report = student.initialization_report
        check_disk_space(folder, student.get_memory_footprint())
        _save(student, folder)
        copy_tokenizer_files(args.teacher, folder, gguf_file=args.gguf_file, **hub_arguments(args))
        _write_card_and_plot(report, folder, args)
    print(escape_control_characters(report.summary()))
    print(f"Saved in {args.output}: {type(student).__name__}.from_pretrained({str(args.output)!r}) loads it.")
    return 0


def parse_override(text: str, flag: str = "--set") -> tuple[str, Any]:
    """Split KEY=VALUE, the value read as JSON or Python where it is either, otherwise as a string."""
    key, equals, value = text.partition("=")
    if not equals or not key.isidentifier():
        raise OptionError(
            f"{flag} {text!r} is not understood; write {flag} key=value, for example --set rms_norm_eps=1e-6."
        )
    for read in (json.loads, ast.literal_eval):
        with contextlib.suppress(ValueError, SyntaxError):
            return key, read(value)
    return key, value


def _calibration_dataset(paths: Sequence[Path] | None) -> list[str] | str | None:
    if paths == [Path(SELF_GENERATED)] and not paths[0].exists():
        return SELF_GENERATED
    return read_texts(paths) if paths else None


def read_texts(paths: Sequence[Path]) -> list[str]:
    """The texts in text files, parted by empty lines.

    Raises:
        OptionError: a file that is not text, or files without any.
    """
    texts: list[str] = []
    for path in paths:
        try:
            texts += [text for text in path.read_text(encoding="utf-8").split("\n\n") if text.strip()]
        except UnicodeDecodeError as error:
            raise OptionError(f"{path} is no text file ({error}); --calibration-dataset takes text files.") from error
    if not texts:
        raise OptionError(f"{', '.join(map(str, paths))}: no text in it; --calibration-dataset takes text files.")
    return texts


def _save(student: Any, folder: Path) -> None:
    from safetensors import SafetensorError

    try:
        student.save_pretrained(folder)
    except SafetensorError as error:
        raise OSError(f"The student could not be written: {error}") from error


def _write_card_and_plot(report: "InitializationReport", folder: Path, args: argparse.Namespace) -> None:
    from hf_guide.hub.model_card import PLOT_NAME, write_model_card
    from hf_guide.visualization import plot_explained_variance

    write_model_card(folder, report, model_id=args.output.resolve().name, license=args.license)
    if report.explained_variance and not (folder / PLOT_NAME).is_file():  # the card draws it where it can
        try:
            plot_explained_variance(report, folder / PLOT_NAME)
        except ImportError as error:
            print(f"No plot was drawn: {error}", file=sys.stderr)
