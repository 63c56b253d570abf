"""`hf-guide`: the command line. Nothing heavy is imported before it is needed, so that --help answers at once."""

import argparse
import ast
import contextlib
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_guide.errors import HfGuideError, OptionError
from hf_guide.folders import check_output, check_space, copy_companions, new_folder
from hf_guide.initialization.options import InitializationConfig

if TYPE_CHECKING:
    from hf_guide.initialization.report import InitializationReport

SIZES = {
    "hidden_size": "width of the residual stream",
    "num_hidden_layers": "number of blocks",
    "intermediate_size": "width inside the MLP",
    "num_attention_heads": "number of query heads",
    "num_key_value_heads": "number of key/value heads",
    "head_dim": "size of one head",
}

TASKS = {
    "base": "AutoStudent",
    "causal-lm": "AutoStudentForCausalLM",
    "masked-lm": "AutoStudentForMaskedLM",
    "seq2seq-lm": "AutoStudentForSeq2SeqLM",
    "sequence-classification": "AutoStudentForSequenceClassification",
    "token-classification": "AutoStudentForTokenClassification",
    "image-classification": "AutoStudentForImageClassification",
}

PLOT_NAME = "variance_explained.png"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return 0 when done, 1 after an error, 2 after wrong usage, 130 after Ctrl-C."""
    args = build_parser().parse_args(argv)
    try:
        return args.run(args)
    except (HfGuideError, OSError, ImportError) as error:
        print(f"hf-guide: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, OptionError) else 1
    except KeyboardInterrupt:
        kept = getattr(args, "calibration_dir", None)
        left = f"the same command goes on from {kept}" if kept else "nothing was left behind"
        print(f"hf-guide: interrupted; {left}.", file=sys.stderr)
        return 130


def build_parser() -> argparse.ArgumentParser:
    from hf_guide import card_command, distill_command, quickstart, subclasses_command
    from hf_guide.capture import command as capture_command

    parser = argparse.ArgumentParser(
        prog="hf-guide",
        description="Make a small Transformers model out of a big one.",
        epilog="first:  hf-guide inspect TEACHER\nthen:   hf-guide init TEACHER --hidden-size 288 -o student/\n"
        "        hf-guide distill CONFIG.yaml",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    init = _add_command(
        commands,
        "init",
        "make a student that starts inside its teacher",
        "Make a student of the shape you ask for and save it as a stock Transformers model, with its tokenizer, a\n"
        "model card, a report of where each parameter came from, and a plot. Sizes you do not name are the\n"
        "teacher's, or follow from those you name as the family derives them.",
        "hf-guide init HuggingFaceTB/SmolLM2-135M --hidden-size 288 --num-hidden-layers 10 \\\n"
        "      --intermediate-size 768 --head-dim 32 --method guide -o student/",
    )
    _add_teacher_arguments(init)
    init.add_argument("-o", "--output", required=True, type=Path, help="folder for the student; new or empty")
    init.add_argument("--task", choices=TASKS, help="the student's head; by default the one the teacher has")
    init.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16", "float64"], help="by default the teacher's"
    )
    init.add_argument("--license", help="licence named in the model card, such as apache-2.0")
    init.add_argument("--no-progress", action="store_true", help="show no progress bars")
    shape = init.add_argument_group("the student's shape")
    for name, text in SIZES.items():
        shape.add_argument(_flag(name), type=int, metavar="N", help=text)
    shape.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="any other entry of the config, as often as needed: --set tie_word_embeddings=false",
    )
    method = init.add_argument_group("how it is made")
    method.add_argument(
        "--calibration-dataset",
        metavar="FILE",
        nargs="+",
        type=Path,
        help="text files, which --method calibrated runs through the teacher; texts part where a line is empty",
    )
    method.add_argument(
        "--calibration-dir",
        metavar="DIR",
        type=Path,
        help="folder, new or of the same command, that keeps what --method calibrated has done: killed, the command goes on "
        "from there. It stays until you remove it",
    )
    _add_options(method)
    init.set_defaults(run=run_init)

    inspect = _add_command(
        commands,
        "inspect",
        "see how much each width keeps, before choosing one",
        "Show how much of the embedding table's variance each width keeps, and suggest widths that suit the heads.",
        "hf-guide inspect HuggingFaceTB/SmolLM2-135M --plot curve.png",
    )
    _add_teacher_arguments(inspect)
    inspect.add_argument(
        "--plot", type=Path, metavar="FILE", help="also draw the curve into this file (.png, .pdf, .svg)"
    )
    inspect.set_defaults(run=run_inspect)

    families = _add_command(
        commands,
        "families",
        "list the supported families, and how exactly each is carried over",
        "List the supported families. Others are derived where that is certain, and refused where it is not.",
        "hf-guide families llama",
    )
    families.add_argument("word", nargs="?", default="", help="show only families with this in their name")
    families.set_defaults(run=run_families)

    capture = _add_command(
        commands,
        "capture",
        "run the teacher once over a dataset, and keep what it says on disk",
        "Run a teacher once over what a student will learn from, and write what it says in Arrow files: a student is then\n"
        "trained without it, shuffled and over as many epochs as you like. Killed, the same command goes on where it was.",
        "hf-guide capture HuggingFaceTB/SmolLM2-135M -o capture/ \\\n"
        "      --dataset Salesforce/wikitext --dataset-config-name wikitext-2-raw-v1",
    )
    capture_command.add_arguments(capture)
    capture.set_defaults(run=capture_command.run)

    distil = _add_command(
        commands,
        "distill",
        "make, train, evaluate and save a student, as one file says",
        "Train a student from a teacher, or from a capture, as a YAML or JSON file says; flags after it override it.",
        "hf-guide distill examples/distill_smollm2.yaml --max_steps 100",
    )
    distill_command.add_arguments(distil)
    distil.set_defaults(run=distill_command.run)

    card = _add_command(
        commands,
        "card",
        "draw a student's model card again",
        "Draw our part of a student's README.md again, from what its folder tells. The rest of the card stays as it is.",
        "hf-guide card student/ --license apache-2.0",
    )
    card_command.add_arguments(card)
    card.set_defaults(run=card_command.run)

    subclasses = _add_command(
        commands,
        "subclasses",
        "see a projector's pseudo-subclasses, and whether they are likely to help",
        "Run the teacher over a dataset and write one page: each class's subspace coloured by subclass, the nearest\n"
        "examples of each subclass, sizes, variance, what they know of finer labels, and a forecast: tiny students are\n"
        "trained with and without subclasses, so that you need not train a real one to learn that they do not help.",
        subclasses_command.EXAMPLE,
    )
    subclasses_command.add_arguments(subclasses)
    subclasses.set_defaults(run=subclasses_command.run)

    quick = _add_command(
        commands,
        "quickstart",
        "the whole way on a real model: initialise, distil, compare, save",
        "Make random, uniform, guide and calibrated students of one teacher, train each on the same tokens, and compare\n"
        "them; or, with --task lelp, teach three like students of a classifier by hard labels, by KD and by\n"
        "pseudo-subclasses.",
        "hf-guide quickstart --task lelp",
    )
    quickstart.add_arguments(quick)
    quick.set_defaults(run=quickstart.run)
    return parser


def run_init(args: argparse.Namespace) -> int:
    """Make a student and save it, all or nothing."""
    overrides = {name: getattr(args, name) for name in SIZES if getattr(args, name) is not None}
    for text in args.set:
        key, value = parse_override(text)
        if key in overrides:
            raise OptionError(f"{key} is given twice: as {overrides[key]!r} and as {value!r}. Name it once.")
        overrides[key] = value
    chosen = {field.name: getattr(args, field.name) for field in dataclasses.fields(InitializationConfig)}
    method = InitializationConfig(**{name: value for name, value in chosen.items() if value is not None})
    check_output(args.output)

    import torch

    from hf_guide import students

    make = getattr(students, TASKS[args.task]).from_teacher if args.task else students.from_teacher
    with new_folder(args.output) as folder:
        student: Any = make(
            args.teacher,
            method=method,
            calibration_dataset=read_texts(args.calibration_dataset) if args.calibration_dataset else None,
            calibration_dir=args.calibration_dir,
            dtype=getattr(torch, args.dtype) if args.dtype else None,
            gguf_file=args.gguf_file,
            show_progress=not args.no_progress,
            **_source(args),
            **overrides,
        )
        report = student.initialization_report
        check_space(folder, student.get_memory_footprint())
        _save(student, folder)
        copy_companions(args.teacher, folder, gguf_file=args.gguf_file, **_source(args))
        _describe(report, folder, args)
    print(report.summary())
    print(f"Saved in {args.output}: {type(student).__name__}.from_pretrained({str(args.output)!r}) loads it.")
    return 0


def run_inspect(args: argparse.Namespace) -> int:
    """Print the variance curve, the widths that reach its landmarks, and suggestions."""
    from hf_guide.initialization.derive import layout_for
    from hf_guide.initialization.report import format_count
    from hf_guide.initialization.weights import open_teacher
    from hf_guide.inspection import count_parameters, suggest_widths, variance_curves
    from hf_guide.plots import LANDMARKS, plot_explained_variance, text_plot, width_reaching

    teacher = open_teacher(args.teacher, gguf_file=args.gguf_file, **_source(args))
    layout = layout_for(teacher.config, teacher.model_class)
    curves = variance_curves(teacher, layout)
    parameters = count_parameters(teacher, layout, {}) or 0
    print(f"{teacher.name}: {teacher.model_class.__name__}, {format_count(parameters)} parameters")
    for axis, curve in curves.items():
        print(f"\nShare of the tables' variance along {axis!r} against the width kept\n\n{text_plot(curve)}\n")
        if axis != "embed":
            continue
        print(
            f"{'share':>5}  {'reached at':>10}  {'suggested student':46}  {'keeps':>5}  {'size':>8}  half the blocks"
        )
        suggestions = {found.share: found for found in suggest_widths(teacher, layout, curve)}
        for share in LANDMARKS:
            line = f"{share:5.0%}  {width_reaching(curve, share):10}  "
            if share in suggestions:
                found = suggestions[share]
                sizes = " ".join(f"{_flag(name)} {value}" for name, value in found.overrides.items())
                size, half = (format_count(n) if n else "-" for n in (found.parameters, found.parameters_half))
                line += f"{sizes:46}  {found.kept:5.1%}  {size:>8}  {half:>15}"
            else:
                line += "no smaller width that suits"
            print(line)
    if args.plot:
        plot_explained_variance(curves, args.plot)
        print(f"\nDrawn in {args.plot}")
    return 0


def run_families(args: argparse.Namespace) -> int:
    """Print one line a family."""
    from hf_guide.initialization.layouts import registered_layouts

    layouts = {family: layout for family, layout in sorted(registered_layouts().items()) if args.word in family}
    if not layouts:
        raise OptionError(f"No supported family has {args.word!r} in its name; `hf-guide families` lists all.")
    longest = max(map(len, layouts))
    for family, layout in layouts.items():
        print(f"{family:{longest}}  {layout.exactness}")
    return 0


def parse_override(text: str) -> tuple[str, Any]:
    """Split KEY=VALUE, the value read as JSON or Python where it is either, otherwise as a string."""
    key, equals, value = text.partition("=")
    if not equals or not key.isidentifier():
        raise OptionError(
            f"--set {text!r} is not understood; write --set key=value, for example --set rms_norm_eps=1e-6."
        )
    for read in (json.loads, ast.literal_eval):
        with contextlib.suppress(ValueError, SyntaxError):
            return key, read(value)
    return key, value


def parse_layers(text: str) -> str | list[int]:
    """`even` or `first`, or numbers such as `0,4,9`."""
    return [int(number) for number in text.split(",")] if text[:1].isdigit() else text


def parse_numbers(path: str) -> list[float]:
    """The numbers in a text file, separated by white space."""
    try:
        return [float(word) for word in Path(path).read_text(encoding="utf-8").split()]
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"expected a text file of numbers, one a token: {error}") from error


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


def _describe(report: "InitializationReport", folder: Path, args: argparse.Namespace) -> None:
    from hf_guide.hub import write_model_card
    from hf_guide.plots import plot_explained_variance

    write_model_card(folder, report, model_id=args.output.resolve().name, license=args.license)
    if report.explained_variance and not (folder / PLOT_NAME).is_file():  # the card draws it where it can
        try:
            plot_explained_variance(report, folder / PLOT_NAME)
        except ImportError as error:
            print(f"No plot was drawn: {error}", file=sys.stderr)


def _source(args: argparse.Namespace) -> dict[str, Any]:
    return {"revision": args.revision, "token": args.token, "trust_remote_code": args.trust_remote_code}


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _add_command(commands: Any, name: str, line: str, description: str, example: str) -> argparse.ArgumentParser:
    return commands.add_parser(
        name,
        help=line,
        description=description,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _add_teacher_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("teacher", metavar="TEACHER", help="the big model: a Hub id or a folder")
    parser.add_argument("--gguf-file", metavar="FILE", help="read this GGUF file of the teacher")
    parser.add_argument("--revision", help="branch, tag or commit of the teacher on the Hub")
    parser.add_argument("--token", help="access token for the Hub; by default the one you are logged in with")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the teacher")


def _add_options(group: argparse._ArgumentGroup) -> None:
    """One flag for each field of InitializationConfig. What is not given stays None and takes the field's default."""
    parsers: dict[str, Any] = {"layers": parse_layers, "token_weights": parse_numbers, "ridge": float}
    for field in dataclasses.fields(InitializationConfig):
        text = f"{field.metadata['help']} (default: {field.default})".replace("%", "%%")
        if isinstance(field.default, bool):
            group.add_argument(_flag(field.name), action=argparse.BooleanOptionalAction, default=None, help=text)
        else:
            read = parsers.get(field.name, str if field.default is None else type(field.default))
            group.add_argument(_flag(field.name), type=read, default=None, help=text)


if __name__ == "__main__":
    sys.exit(main())
