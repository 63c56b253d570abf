"""Time and memory of an initialization: the basis, and a whole transfer, by vocabulary and width.

    python examples/benchmarks/initialization_cost.py --output initialization_cost.jsonl
    python examples/benchmarks/initialization_cost.py --vocabularies 32768 --widths 512 1024    # a quick look
    python examples/benchmarks/initialization_cost.py --output initialization_cost.jsonl --table

Each measurement has a process of its own and one thread. Reported are the median processor time over the rounds and
the peak resident
memory less what there was once the libraries were imported (and, for the directions, a part of the table read).
*Directions*: the second moment of a bfloat16 table of so many rows, streamed, and its eigenvectors. *Transfer*:
`from_teacher(folder, method="guide")`, a tied bfloat16 Llama of two blocks on disk to half its width. Next to them the
bounds, from the same process: 2 V d^2 float64 operations as plain products and one eigendecomposition; for the transfer
V d^2 more as float32 products, which the projection of the table takes; in memory the student and three of the teacher's
largest tensors. One JSON line a measurement is appended to --output; one that is there already is not made again. What
would take more than --gigabytes by that bound, or took more than --minutes, is skipped, and the table shows it.
"""

import argparse
import json
import math
import os
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import repeat
from pathlib import Path
from statistics import median
from typing import Any

import basis_fit
import torch
import transformers
from basis_fit import Result
from larger_than_memory import in_fresh_process, shapes_of, write_llama
from peak_memory import peak_memory
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[2]))

from examples.common.results import append_row, read_rows
from hf_guide.initialization.basis import fit_basis, second_moment
from hf_guide.modeling import from_teacher

ROWS = 16384  # of the table are different; the rest repeats them, which costs as much
CODE = "import sys; import initialization_cost; initialization_cost.measure(*sys.argv[1:])"
MIB = 2**20


def teacher_config(vocabulary: int, width: int) -> LlamaConfig:
    """Return the shape of a teacher."""
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=max(2, width // 64),
        num_key_value_heads=max(2, width // 256),
        tie_word_embeddings=True,
        dtype="bfloat16",
    )


def student_sizes(width: int) -> dict[str, int]:
    """Return what the student's config changes."""
    config = teacher_config(8, width)
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    return {name: getattr(config, name) // 2 for name in names}


def measure(what: str, folder: str, vocabulary: str, width: str, rounds: str, minutes: str) -> None:
    """Measure in a process of its own, and print the result as JSON."""
    limit = math.ceil(float(minutes) * 60)
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 10))
    torch.set_num_threads(1)
    basis_fit.CLOCK = time.process_time
    work = {"basis": directions, "transfer": transfer}[what]
    print(json.dumps(work(Path(folder), int(vocabulary), int(width), int(rounds))))


def directions(folder: Path, vocabulary: int, width: int, rounds: int) -> dict[str, Any]:
    """Return the cost of the directions of a table, whose first rows are in `folder`, and its bounds, in seconds and bytes."""
    part = load_file(folder / "rows.safetensors")["rows"]
    part.sum()  # read from the disk
    before, measurements = peak_memory(), Counted()
    for _ in range(rounds):
        moment = measurements.timed("moment", lambda: second_moment(repeat(part, vocabulary // len(part)), width))
        measurements.timed("fit", lambda moment=moment: fit_basis(moment, width // 2))
        measurements.setdefault("peak_bytes", peak_memory() - before)
        measurements.setdefault("products", []).append(basis_fit.matmul_seconds(vocabulary, width))
        measurements.timed("eigen", lambda moment=moment: torch.linalg.eigh(moment))
    return measurements


def transfer(folder: Path, vocabulary: int, width: int, rounds: int) -> dict[str, Any]:
    """Return the cost of a transfer from a checkpoint in `folder`, in seconds and bytes, and the student's bytes."""
    import hf_guide.initialization.transfer  # noqa: F401  # imported lazily, and belongs to the libraries

    assert LlamaForCausalLM  # so does its module
    before, measurements = peak_memory(), Counted()
    rows, repeats = 2048, max(3, round(2e10 / (2048 * width**2)))
    for _ in range(rounds):
        student = measurements.timed(
            "seconds", lambda: from_teacher(folder, show_progress=False, **student_sizes(width))
        )
        measurements.setdefault("peak_bytes", peak_memory() - before)
        measurements["student_bytes"] = sum(tensor.nbytes for tensor in student.parameters())
        table, matrix = torch.randn(rows, width), torch.randn(width, width // 2)
        measurements.timed("projection", lambda pair=(table, matrix): [pair[0] @ pair[1] for _ in range(repeats)])
        measurements["projection"][-1] *= vocabulary / rows / repeats
    return measurements


class Counted(dict[str, Any]):
    """What was measured, by name."""

    def timed(self, name: str, work: Callable[[], Result]) -> Result:
        """Add the seconds that some work took to those of a name; return what it made."""
        result, seconds = basis_fit.timed(work)
        self.setdefault(name, []).append(seconds)
        return result


def memory_bound(vocabulary: int, width: int) -> int:
    """Return the bytes of the student and three of the teacher's largest tensors."""
    largest = max(shape.numel() for part in shapes_of(teacher_config(vocabulary, width)) for shape in part.values())
    config = LlamaConfig.from_dict(teacher_config(vocabulary, width).to_dict() | student_sizes(width))
    in_block, outside = (sum(map(torch.Size.numel, part.values())) for part in shapes_of(config))
    return 2 * (config.num_hidden_layers * in_block + outside + 3 * largest)


def run(args: argparse.Namespace) -> None:
    """Make every measurement that is not there yet, small ones first."""
    points = [(vocabulary, width) for width in args.widths for vocabulary in args.vocabularies]
    for vocabulary, width in sorted(points, key=lambda point: point[0] * point[1] ** 2):
        for what in ("basis", "transfer"):
            key = {"measurement": what, "vocabulary": vocabulary, "width": width}
            if any(key.items() <= row.items() for row in read_rows(args.output)):
                continue
            row = key | {"bound_bytes": memory_bound(vocabulary, width)}
            if what == "transfer" and row["bound_bytes"] > args.gigabytes * 1e9:
                row["left_out"] = f"more than {args.gigabytes:g} GB"
            else:
                rounds = 1 if vocabulary * width**2 > args.once_above else args.rounds
                row |= measured(what, vocabulary, width, rounds, args.minutes)
            print(row, flush=True)
            row |= {"torch": torch.__version__, "transformers": transformers.__version__}
            row |= {"machine": f"{os.cpu_count()} CPUs, {platform.machine()}, one thread"}
            append_row(args.output, row)


def measured(what: str, vocabulary: int, width: int, rounds: int, minutes: float) -> dict[str, Any]:
    """Return one measurement, or why it is left out."""
    with tempfile.TemporaryDirectory(prefix="start-cost-") as scratch:
        if what == "transfer":
            write_llama(Path(scratch), teacher_config(vocabulary, width))
        else:
            rows = basis_fit.decaying_table(min(ROWS, vocabulary), width, 0).bfloat16()
            save_file({"rows": rows}, Path(scratch) / "rows.safetensors")
            del rows
        try:
            return in_fresh_process(CODE, what, scratch, *map(str, (vocabulary, width, rounds, minutes)))
        except TimeoutError:
            return {"left_out": f"more than {minutes:g} minutes"}


def table(rows: list[dict[str, Any]]) -> str:
    """Return medians over rounds, a line for each vocabulary and width: seconds, MiB, and their ratios to the bounds."""
    lines = [
        f"{'':>17} {'directions':>42}   {'transfer':>58}",
        f"{'vocabulary':>10} {'width':>6} {'turns':>5} {'moment, s':>9} {'fit, s':>7} {'bound, s':>8} {'ratio':>5} "
        f"{'MiB':>6} {'d x d':>5}   {'seconds':>8} {'bound, s':>8} {'ratio':>5} {'MiB':>7} {'bound, MiB':>10} {'ratio':>5}",
    ]
    measurements = {(row["measurement"], row["vocabulary"], row["width"]): row for row in rows}
    for vocabulary, width in dict.fromkeys((row["vocabulary"], row["width"]) for row in rows):
        first, second = (measurements.get((what, vocabulary, width), {}) for what in ("basis", "transfer"))
        line, floor = f"{vocabulary:>10} {width:>6} ", math.nan
        if "moment" in first:
            moment, fit, products, eigen = (median(first[name]) for name in ("moment", "fit", "products", "eigen"))
            floor = products + eigen
            line += f"{len(first['moment']):>5} {moment:>9.2f} {fit:>7.2f} {floor:>8.2f} {ratio(moment + fit, floor):>5.2f} "
            line += f"{first['peak_bytes'] / MIB:>6.0f} {first['peak_bytes'] / (8 * width**2):>5.1f}"
        else:
            line += f"{first.get('left_out', 'not measured'):>51}"
        if "seconds" in second:
            seconds, bound = median(second["seconds"]), floor + median(second["projection"])
            line += (
                f"   {seconds:>8.2f} {bound:>8.2f} {ratio(seconds, bound):>5.2f} {second['peak_bytes'] / MIB:>7.0f} "
            )
            line += f"{second['bound_bytes'] / MIB:>10.0f} {ratio(second['peak_bytes'], second['bound_bytes']):>5.2f}"
        else:
            line += f"   {second.get('left_out', 'not measured'):>48}"
        lines.append(line)
    return "\n".join(lines)


def ratio(one: float, other: float) -> float:
    """Return one divided by the other, infinity where the clock was too coarse to see the other."""
    return one / other if other else math.inf


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("initialization_cost.jsonl"))
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[32768, 65536, 131072, 262144])
    parser.add_argument("--widths", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192])
    parser.add_argument("--rounds", type=int, default=3, help="of the small ones, of which the median counts")
    parser.add_argument("--once-above", type=float, default=3e11, help="V d^2 from which there is one round only")
    parser.add_argument("--gigabytes", type=float, default=10.0)
    parser.add_argument("--minutes", type=float, default=15.0, help="of processor time, for one measurement")
    parser.add_argument("--table", action="store_true", help="print the table of what is there, and stop")
    args = parser.parse_args(words)
    if not args.table:
        print(f"command: python {' '.join(sys.argv)}")
        run(args)
    print(table(read_rows(args.output)))


if __name__ == "__main__":
    main()
