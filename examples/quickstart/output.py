"""What both quickstarts share: command line, output folder, table, and the check of the student in a fresh process."""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser

from hf_guide.errors import HfGuideError
from hf_guide.utils import files

RESULTS_NAME = "quickstart.json"


def check_output_dir(folder: Path) -> None:
    """Check that a folder is new, empty, or contains an earlier quickstart, which is replaced.

    Raises:
        FileExistsError: It is a file, or contains something else.
    """
    if not (folder / RESULTS_NAME).is_file():
        files.check_output_folder(folder)


def format_table(lines: Sequence[Sequence[str]]) -> str:
    """Return rows of cells, the header first, as text: the first column left-aligned, the others right-aligned."""
    first, *others = (max(map(len, column)) for column in zip(*lines, strict=True))
    return "\n".join("  ".join([line[0].ljust(first), *map(str.rjust, line[1:], others)]) for line in lines)


def run_in_fresh_process(request: dict[str, Any]) -> dict[str, Any]:
    """Run `check_stock.py` on a request, in a process that never imports hf_guide, and return its answer.

    Raises:
        RuntimeError: The process fails.
    """
    script = Path(__file__).with_name("check_stock.py")
    done = subprocess.run(
        [sys.executable, "-I", script], input=json.dumps(request), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"The student in {request['folder']} does not load in a fresh process:\n{done.stderr}")
    return dict(json.loads(done.stdout))


def run_script(run: Callable[[Any], object], arguments: type[Any], argv: Sequence[str] | None) -> int:
    """Parse `argv` into the dataclass `arguments` and call `run` with it; print an error as one line.

    Returns:
        The exit code: 0, 1 after an error, 130 if interrupted.
    """
    try:
        (args,) = HfArgumentParser(arguments).parse_args_into_dataclasses(None if argv is None else list(argv))
        run(args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (HfGuideError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
