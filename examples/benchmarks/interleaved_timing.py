"""Interleaved timing of processes: each arm is a fresh process, and only one of them runs at a time.

Does: steps of the arms alternate (A B A B ...), so that what else the machine does falls on all alike; what counts is the
processor time of a step, and the median over the rounds of its ratio to the other arm's. An arm's memory is the most that
was resident from `StepGate.ready` on, above what was resident then.
Does not: define a step. An arm is a function that calls `StepGate.ready` once, `StepGate.end` after each step, and returns
its mean loss, so that a reader sees that the arms compute the same thing.
"""

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from peak_memory import peak_memory

FORGET_PEAK = Path("/proc/self/clear_refs")


class StepGate:
    """The measured process's side: waits for permission to run a step and reports its cost."""

    def __init__(self) -> None:
        # Libraries print to standard output, so messages to the parent use a copy of it.
        self._channel = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)
        self._baseline = 0

    def ready(self) -> None:
        """Report that libraries and models are loaded, and wait for the first step."""
        if FORGET_PEAK.exists():
            FORGET_PEAK.write_text("5", encoding="ascii")
        self._baseline = peak_memory()
        self._send({})
        self._wait()

    def end(self) -> None:
        """Report the cost of the step, and wait for the next one."""
        self._send({"cpu": time.process_time() - self._cpu, "wall": time.perf_counter() - self._wall})
        self._wait()

    def finish(self, loss: float, version: str) -> None:
        """Report loss, memory and version at the end."""
        self._send({"loss": loss, "memory": peak_memory() - self._baseline, "version": version})

    def _send(self, results: dict[str, Any]) -> None:
        self._channel.write(json.dumps(results) + "\n")

    def _wait(self) -> None:
        if not sys.stdin.readline():
            raise SystemExit("The parent process has ended.")
        self._wall, self._cpu = time.perf_counter(), time.process_time()


@dataclass
class ArmResult:
    """What one arm came to: seconds a step, bytes, mean loss."""

    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    memory: int = 0
    loss: float = 0.0
    version: str = ""


Arm = Callable[[StepGate, argparse.Namespace], tuple[float, str]]


def add_timing_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what every benchmark of this kind takes."""
    parser.add_argument(
        "--rounds", type=int, default=7, help="steps of each arm that count, after a first that does not"
    )
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    parser.add_argument("--settings", default="{}", help=argparse.SUPPRESS)


def run_arm(arms: Mapping[str, Arm], args: argparse.Namespace) -> int:
    """Be the arm that `--arm` names."""
    gate = StepGate()
    loss, version = arms[args.arm](gate, argparse.Namespace(**json.loads(args.settings)))
    gate.finish(loss, version)
    return 0


def measure(script: str, names: Sequence[str], args: argparse.Namespace) -> dict[str, ArmResult]:
    """Run a step of each arm in turn, `args.rounds` rounds after one warm-up, and return each arm's results."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
    }
    settings = json.dumps({key: value for key, value in vars(args).items() if key not in ("arm", "settings")})
    results = {name: ArmResult() for name in names}
    with ExitStack() as stack:
        running: dict[str, tuple[subprocess.Popen[str], IO[bytes]]] = {}
        for name in names:
            errors = stack.enter_context(tempfile.TemporaryFile())
            command = [sys.executable, script, "--arm", name, "--settings", settings]
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
            )
            stack.callback(process.kill)
            running[name] = (process, errors)
            _receive(name, *running[name])
        for number in range(args.rounds + 1):
            for name in names:
                message = _run_step(name, *running[name])
                if number:
                    results[name].cpu.append(message["cpu"])
                    results[name].wall.append(message["wall"])
        for name in names:
            message = _run_step(name, *running[name])
            results[name].memory, results[name].loss, results[name].version = (
                message["memory"],
                message["loss"],
                message["version"],
            )
    return results


def _run_step(name: str, process: "subprocess.Popen[str]", errors: IO[bytes]) -> dict[str, Any]:
    assert process.stdin is not None
    process.stdin.write("go\n")
    process.stdin.flush()
    return _receive(name, process, errors)


def _receive(name: str, process: "subprocess.Popen[str]", errors: IO[bytes]) -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        process.wait()
        errors.seek(0)
        raise RuntimeError(f"The arm {name} failed:\n{errors.read().decode(errors='replace')[-4000:]}")
    return dict(json.loads(line))


def print_header(libraries: Sequence[str]) -> None:
    """Print the command, the machine and the versions of what runs."""
    from importlib.metadata import version

    print(f"command: python {' '.join(sys.argv)}")
    versions = ", ".join(f"{name} {version(name)}" for name in libraries)
    print(
        f"machine: {os.cpu_count()} CPUs, {platform.machine()}, python {platform.python_version()}, {versions}; one thread, "
        f"load {os.getloadavg()[0]:.2f}"
    )


def print_table(
    title: str, results: Mapping[str, ArmResult], targets: Mapping[str, tuple[float | None, float | None]]
) -> None:
    """Print each arm, and the first's ratio to each of the others: of time and of memory, with their targets."""
    ours, first = next(iter(results.items()))
    print(f"\n{title}")
    print(f"{'arm':<36} {'cpu s/step':>11} {'wall s/step':>12} {'peak MiB':>9} {'mean loss':>12}")
    for name, one in results.items():
        print(
            f"{name + ' (' + one.version + ')':<36} {statistics.median(one.cpu):11.3f} {statistics.median(one.wall):12.3f} "
            f"{one.memory / 2**20:9.0f} {one.loss:12.7f}"
        )
    for name, one in results.items():
        if name == ours:
            continue
        of_cpu, of_wall = (
            sorted(a / b for a, b in zip(ours_seconds, other_seconds, strict=True))
            for ours_seconds, other_seconds in ((first.cpu, one.cpu), (first.wall, one.wall))
        )
        low, high = _interval(of_cpu)
        most, most_memory = targets.get(name, (None, None))
        memory = first.memory / one.memory
        print(
            f"{ours} / {name}: cpu time {statistics.median(of_cpu):.3f} (95 % of {low:.3f} to {high:.3f}; "
            f"{_judged(statistics.median(of_cpu), most, low, high)}), wall time {statistics.median(of_wall):.3f}, peak "
            f"memory {memory:.3f} ({_judged(memory, most_memory)}), loss differs by {abs(first.loss / one.loss - 1):.1e}",
            flush=True,
        )


def _interval(ratios: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % interval of the median by order statistics; the whole range if there are few rounds."""
    half = len(ratios) / 2
    reach = 0.98 * len(ratios) ** 0.5
    return ratios[max(0, math.floor(half - reach))], ratios[min(len(ratios), math.ceil(half + reach) + 1) - 1]


def _judged(ratio: float, most: float | None, low: float | None = None, high: float | None = None) -> str:
    if most is None:
        return "no target"
    near = low is not None and high is not None and low <= most <= high
    return f"target {most:g} {'met' if ratio <= most else 'MISSED'}{', within noise' if near else ''}"
