"""`hf-guide capture`: run the teacher once over what a student will learn from.

This module is light, so that `hf-guide --help` answers at once.
"""

import argparse
import dataclasses
import sys
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_guide.cli.teacher_arguments import hub_arguments
from hf_guide.data.arguments import DataArguments
from hf_guide.errors import OptionError
from hf_guide.signal_cache.config import RENAMED_OPTIONS, CaptureConfig
from hf_guide.utils.escaping import escape_control_characters
from hf_guide.validation import did_you_mean

if typing.TYPE_CHECKING:
    from accelerate import PartialState

    from hf_guide.signal_cache.reader import Capture

HELP = "run the teacher once over a dataset, and keep what it says on disk"
DESCRIPTION = (
    "Run a teacher once over what a student will learn from, and write what it says in Arrow files: a student is then\n"
    "trained without it, shuffled and over as many epochs as you like. Killed, the same command goes on where it was."
)
EXAMPLE = (
    "hf-guide capture HuggingFaceTB/SmolLM2-135M -o capture/ \\\n"
    "      --dataset Salesforce/wikitext --dataset-config-name wikitext-2-raw-v1"
)

_LIST_FIELDS = {"temperatures": float, "hidden_layers": int, "ignored_inputs": str}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give `parser` the teacher, the output, and one flag for each field of `DataOptions` and `CaptureConfig`."""
    parser.add_argument("teacher", metavar="TEACHER", nargs="?", help="the teacher: a Hub id or a folder")
    parser.add_argument(
        "-o", "--output", required=True, type=Path, help="folder for the capture: new, empty, or one to go on with"
    )
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="the YAML or JSON file of `hf-guide distill`: its teacher, its data and what its objective "
        "needs are taken; flags come before it",
    )
    parser.add_argument(
        "--processor",
        metavar="NAME",
        help="tokenizer or image processor: a Hub id or a folder; by default the teacher's",
    )
    parser.add_argument("--train-only", action="store_true", help="leave out the split to evaluate on")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="of the teacher; by default the checkpoint's"
    )
    parser.add_argument("--revision", help="branch, tag or commit of the teacher on the Hub")
    parser.add_argument("--token", help="token for a private or gated teacher")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that the teacher brings along")
    parser.add_argument("--num-workers", type=int, default=0, metavar="N", help="processes that prepare batches")
    parser.add_argument("--no-progress", action="store_true", help="show no progress bars")
    _add_fields(parser.add_argument_group("what is kept"), CaptureConfig, skip=("remove_unused_columns",))
    _add_fields(parser.add_argument_group("what is learned from"), DataArguments)


def run(args: argparse.Namespace) -> int:
    """Capture with the flags of `add_arguments`; return 0 when done, 130 after Ctrl-C."""
    given = _read_config(args.config) if args.config else {}
    teacher = args.teacher or given.get("teacher")
    if not teacher:
        raise OptionError("No teacher is given: name one, or a --config file that does.")
    config = CaptureConfig(**_capture_options_from_config(given, args) | _explicit_flags(args, CaptureConfig))
    fields = {field.name for field in dataclasses.fields(DataArguments)}
    data = DataArguments(
        **{name: value for name, value in given.items() if name in fields} | _explicit_flags(args, DataArguments)
    )

    from hf_guide.signal_cache.manifest import cache_folder
    from hf_guide.signal_cache.writer import distributed_state

    cache_folder(args.output).check()
    state = distributed_state()
    try:
        made = _capture(args, teacher, args.processor or given.get("processor_name_or_path"), config, data, state)
    except KeyboardInterrupt:
        print("hf-guide: interrupted; the same command goes on from here.", file=sys.stderr)
        return 130
    if state.is_main_process:
        print(escape_control_characters(made.summary()))
        print(f"Train from it with `capture: {args.output}` in place of a teacher; no teacher runs then.")
    if state.num_processes > 1:
        state.destroy_process_group()
    return 0


def _capture(
    args: argparse.Namespace,
    teacher: str,
    processor: str | None,
    config: CaptureConfig,
    data: DataArguments,
    state: "PartialState",
) -> "Capture":
    import transformers
    from datasets import concatenate_datasets
    from transformers.utils import logging

    from hf_guide.data.loading import load_splits
    from hf_guide.data.preprocessing import preprocess
    from hf_guide.models.pretrained import load_config, load_processing_class
    from hf_guide.signal_cache.writer import capture_teacher
    from hf_guide.teachers.loading import task_of_checkpoint
    from hf_guide.utils.distributed import report_missing_ranks

    if args.no_progress:
        logging.disable_progress_bar()
    source = hub_arguments(args)
    task = task_of_checkpoint(teacher, **source)
    load = getattr(transformers, task.processor_class)
    processing_class = load_processing_class(load, processor or teacher, **({} if processor else source))
    with report_missing_ranks(), state.local_main_process_first():  # the others find what it prepared
        train, held_out = load_splits(data)
        prepared = preprocess(
            task,
            train,
            None if args.train_only else held_out,
            processing_class,
            data,
            mask_once=True,
            config=load_config(teacher, {"revision": args.revision, "token": args.token}, args.trust_remote_code),
        )
    splits = [split for split in (prepared.train, prepared.eval) if split is not None]
    return capture_teacher(
        teacher,
        _ConcatenatedDatasets(splits) if prepared.keep_columns else concatenate_datasets(splits),
        args.output,
        processing_class=processing_class,
        data_collator=prepared.collator,
        config=dataclasses.replace(config, remove_unused_columns=not prepared.keep_columns),
        dtype=args.dtype,
        dataloader_num_workers=args.num_workers,
        show_progress=not args.no_progress,
        **source,
    )


class _ConcatenatedDatasets:
    """Several datasets as one, each with the transform that it has: `concatenate_datasets` would lose it."""

    def __init__(self, datasets: list[Any]):
        self._datasets = datasets

    def __len__(self) -> int:
        return sum(map(len, self._datasets))

    def __getitem__(self, number: int) -> Any:
        for dataset in self._datasets:
            if number < len(dataset):
                return dataset[number]
            number -= len(dataset)
        raise IndexError(number)


def _read_config(path: Path) -> dict[str, Any]:
    """Return the entries of a file for `hf-guide distill`; one that it would not know is refused."""
    import yaml

    from hf_guide.data.arguments import ModelArguments
    from hf_guide.distillation.arguments import RENAMED_ARGUMENTS, DistillationArguments

    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise OptionError(f"{path} is neither YAML nor JSON: {error}") from error
    if not isinstance(found, Mapping):
        raise OptionError(f"{path} holds {type(found).__name__}; a mapping of options was expected.")
    found = RENAMED_ARGUMENTS.translate(found, str(path))
    known = [
        field.name
        for kind in (ModelArguments, DataArguments, DistillationArguments)
        for field in dataclasses.fields(kind)
    ]
    for name in found:
        if name not in known:
            raise OptionError(
                f"{path} has {name!r}, which is no option of a distillation.{did_you_mean(str(name), known)}"
            )
    return dict(found)


def _capture_options_from_config(given: Mapping[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Return what a distillation's file asks of a capture: its temperature, and what its objective looks at."""
    found: dict[str, Any] = {}
    if "temperature" in given:
        found["temperatures"] = [given["temperature"]]
    if "losses" in given:
        from hf_guide.distillation.losses.registry import parse_losses

        losses = parse_losses(given["losses"])
        found["save_penultimate"] = "features" in losses
        if "hidden_states" in losses and args.hidden_layers is None:
            layers = given.get("layer_mapping")
            if not isinstance(layers, Mapping):
                raise OptionError(
                    "The losses have 'hidden_states', but the file does not specify which of the teacher's layers: give layer_mapping "
                    "there, or --hidden-layers."
                )
            found["hidden_layers"] = sorted({int(layer) for layer in layers.values()})
    return found


def _add_fields(group: Any, kind: type[Any], *, skip: tuple[str, ...] = ()) -> None:
    types = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if field.name in skip:
            continue
        flag, options = "--" + field.name.replace("_", "-"), {"default": None, "help": field.metadata["help"]}
        if types[field.name] is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif field.name in _LIST_FIELDS:
            options |= {"nargs": "+", "type": _LIST_FIELDS[field.name], "metavar": "X"}
        else:
            parts = [
                part for part in (typing.get_args(types[field.name]) or (types[field.name],)) if part is not type(None)
            ]
            options["type"] = parts[0] if parts[0] in (int, float) else str
            options["metavar"] = "N" if parts[0] in (int, float) else "X"
        group.add_argument(flag, **options)
        for old in (old for old, new in RENAMED_OPTIONS.names.items() if kind is CaptureConfig and new == field.name):
            options["help"] = argparse.SUPPRESS  # its value is passed on under the old name, which warns
            group.add_argument("--" + old.replace("_", "-"), **options)


def _explicit_flags(args: argparse.Namespace, kind: type[Any]) -> dict[str, Any]:
    names = [field.name for field in dataclasses.fields(kind)]
    names += RENAMED_OPTIONS.names if kind is CaptureConfig else ()
    values = {name: getattr(args, name, None) for name in names}
    return {name: value for name, value in values.items() if value is not None}
