"""`hf-guide`: the command line. Nothing heavy is imported before it is needed, so that --help answers at once."""

import argparse
import ast
import contextlib
import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_guide.errors import HfGuideError, OptionError
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

COMPANIONS = [
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "bpe.codes",
    "normalizer.json", "chat_template*", "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
]  # fmt: skip
"""Files of a tokenizer or processor, which a student shares with its teacher bit by bit."""

PLOT_NAME = "variance_explained.png"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 1 an error said in one message, 2 wrong usage, 130 interrupted."""
    args = build_parser().parse_args(argv)
    try:
        return args.run(args)
    except (HfGuideError, OSError, ImportError) as error:
        print(f"hf-guide: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, OptionError) else 1
    except KeyboardInterrupt:
        print("hf-guide: interrupted; nothing was left behind.", file=sys.stderr)
        return 130


def build_parser() -> argparse.ArgumentParser:
    from hf_guide import quickstart

    parser = argparse.ArgumentParser(
        prog="hf-guide",
        description="Make a small Transformers model out of a big one.",
        epilog="Start with:  hf-guide inspect TEACHER\nthen:        hf-guide init TEACHER --hidden-size 288 -o student/",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    init = _add_command(
        commands,
        "init",
        "make a student that starts inside its teacher",
        "Make a student of the shape you ask for and save it as a stock Transformers model, with its tokenizer, a model card, "
        "a report of where each parameter came from, and a plot. Sizes you do not name are the teacher's, or follow from those "
        "you name as the family derives them.",
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
        help="any other entry of the config, as often as needed: --set tie_word_embeddings=false --set rms_norm_eps=1e-6",
    )
    _add_options(init.add_argument_group("how it is made"))
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

    quick = _add_command(
        commands,
        "quickstart",
        "the whole way on a real model: initialise, distil, compare, save",
        "Make random, uniform and guide students of one teacher, train each on the same tokens, and compare them.",
        "hf-guide quickstart",
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
            dtype=getattr(torch, args.dtype) if args.dtype else None,
            gguf_file=args.gguf_file,
            show_progress=not args.no_progress,
            **_source(args),
            **overrides,
        )
        report = student.initialization_report
        check_space(folder, student.get_memory_footprint())
        _save(student, folder)
        copy_companions(args, folder)
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
    from hf_guide.plots import plot_explained_variance, text_plot

    teacher = open_teacher(args.teacher, gguf_file=args.gguf_file, **_source(args))
    layout = layout_for(teacher.config)
    curves = variance_curves(teacher, layout)
    size = count_parameters(teacher, layout, {})
    print(f"{teacher.name}: {teacher.model_class.__name__}, {format_count(size or 0)} parameters")
    for axis, curve in curves.items():
        print(f"\nShare of the tables' variance along {axis!r} against the width kept\n\n{text_plot(curve)}\n")
        if axis != "embed":
            continue
        print("share  reached at  suggested student                               keeps   parameters  half the blocks")
        for found in suggest_widths(teacher, layout, curve):
            sizes = " ".join(f"{_flag(name)} {value}" for name, value in found.overrides.items())
            half = format_count(found.parameters_half) if found.parameters_half else "-"
            print(
                f"{found.share:5.0%}  {found.needed:10}  {sizes:46}  {found.kept:5.1%}  {format_count(found.parameters):>11}  {half:>15}"
            )
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


def check_output(output: Path) -> None:
    """Refuse an output that is there and is not an empty folder."""
    if output.exists() and not output.is_dir():
        raise FileExistsError(f"The output {output} is a file; name a folder that is new or empty.")
    if output.is_dir() and any(output.iterdir()):
        raise FileExistsError(f"The output folder {output} is not empty; name a new one, or empty it first.")


def check_space(folder: Path, needed: int) -> None:
    """Refuse to begin a write that the disk has no room for."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"The student takes {needed / 2**20:.1f} MiB, but {folder.parent} has only {free / 2**20:.1f} MiB free. "
            "Free some space or choose another disk."
        )


@contextlib.contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """Give a folder to write into that becomes `output` when all went well, and vanishes when anything did not."""
    output = output.resolve()
    home = next(parent for parent in output.parents if parent.exists())
    folder = home / f".{output.name}.{os.getpid()}.partial"
    folder.mkdir()
    try:
        yield folder
        check_output(output)
        output.parent.mkdir(parents=True, exist_ok=True)
        if output.exists():
            output.rmdir()
        folder.rename(output)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def copy_companions(args: argparse.Namespace, folder: Path) -> None:
    """Put the teacher's tokenizer and processor beside the student: its own files, or those a GGUF file describes."""
    if args.gguf_file:
        from transformers import AutoTokenizer

        AutoTokenizer.from_pretrained(args.teacher, gguf_file=args.gguf_file, **_source(args)).save_pretrained(folder)
        return
    source = Path(args.teacher)
    if not source.is_dir():
        from huggingface_hub import snapshot_download

        source = Path(
            snapshot_download(args.teacher, revision=args.revision, token=args.token, allow_patterns=COMPANIONS)
        )
    for pattern in COMPANIONS:
        for file in source.glob(pattern):
            if file.is_file() and not (folder / file.name).exists():
                shutil.copyfile(file, folder / file.name)


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
    if report.explained_variance:
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
    parsers: dict[str, Any] = {"layers": parse_layers, "token_weights": parse_numbers}
    for field in dataclasses.fields(InitializationConfig):
        text = f"{field.metadata['help']} (default: {field.default})".replace("%", "%%")
        if isinstance(field.default, bool):
            group.add_argument(_flag(field.name), action=argparse.BooleanOptionalAction, default=None, help=text)
        else:
            read = parsers.get(field.name, str if field.default is None else type(field.default))
            group.add_argument(_flag(field.name), type=read, default=None, help=text)


if __name__ == "__main__":
    sys.exit(main())
