"""How fast the basis of a large embedding table is, against scikit-learn's full PCA and against the work it must do.

    python examples/benchmarks/basis_fit.py
    python examples/benchmarks/basis_fit.py --rows 32768 --width 1024 --size 512      # a quick look

All arms run in one process on one table, alternating, so that other load affects all of them alike.
What it does not do: compare across machines. The ratios are the result; the seconds are only for this machine.
"""

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from hf_guide.initialization.basis import CHUNK_ROWS, ResidualBasis, fit_basis, second_moment

Result = TypeVar("Result")
CLOCK = time.perf_counter


def decaying_table(rows: int, width: int, seed: int) -> Tensor:
    """A (rows, width) float32 table with singular values falling as 1 / sqrt(rank), in a random orthonormal frame."""
    generator = torch.Generator().manual_seed(seed)
    frame = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
    scales = torch.arange(1, width + 1).pow(-0.5)
    return (torch.randn(rows, width, generator=generator) * scales) @ frame.T + 0.01


def timed(work: Callable[[], Result]) -> tuple[Result, float]:
    start = CLOCK()
    result = work()
    return result, CLOCK() - start


def our_basis(table: Tensor, size: int) -> ResidualBasis:
    return fit_basis(second_moment([table], table.shape[1], centered=True), size)


def subspace_distance(one: Tensor, other: Tensor) -> float:
    """The sine of the largest angle between the column spaces of two (width, size) matrices, computed in float64."""
    one, other = torch.linalg.qr(one.double()).Q, torch.linalg.qr(other.double()).Q
    return torch.linalg.matrix_norm(one - other @ (other.T @ one), ord=2).item()


def matmul_seconds(rows: int, width: int) -> float:
    """What 2 V d^2 cost as plain float64 products of the chunk's shape, at the rate measured now."""
    chunk = torch.randn(CHUNK_ROWS, width, dtype=torch.float64)
    out = torch.zeros(width, width, dtype=torch.float64)
    repeats = max(5, round(2e10 / (2 * CHUNK_ROWS * width**2)))  # clocks of processor time may be coarse
    _, seconds = timed(lambda: [out.addmm_(chunk.T, chunk) for _ in range(repeats)])
    return seconds / repeats * rows / CHUNK_ROWS


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=128256, help="V, tokens in the table")
    parser.add_argument("--width", type=int, default=2048, help="d, width of the residual stream")
    parser.add_argument("--size", type=int, default=1024, help="number of directions")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of the quick arms; the median is reported")
    parser.add_argument(
        "--dtypes",
        nargs="+",
        choices=["float32", "float64"],
        default=["float32", "float64"],
        help="what scikit-learn computes in: the table's float32, and float64, as ours does",
    )
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="count processor time, on a machine that others use too; only fair with one thread (OMP_NUM_THREADS=1)",
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    import numpy  # only here, as initialization_cost.py, which shares the tables and the products, does without
    import sklearn
    from sklearn.decomposition import PCA

    if args.cpu_time:
        global CLOCK
        CLOCK = time.process_time

    print(f"command: python {' '.join(sys.argv)}")
    print(
        f"machine: {os.cpu_count()} CPUs, {platform.machine()}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads, scikit-learn {sklearn.__version__}, "
        f"numpy {numpy.__version__}, load {os.getloadavg()[0]:.2f}"
    )
    table = decaying_table(args.rows, args.width, args.seed)
    print(f"table: {args.rows} x {args.width} float32, {args.size} directions kept\n", flush=True)

    ours, products, eigen, sklearn_seconds = [], [], [], {}
    bases = {}
    for dtype in (None, *args.dtypes):
        for _ in range(args.rounds):
            basis, seconds = timed(partial(our_basis, table, args.size))
            ours.append(seconds)
            products.append(matmul_seconds(args.rows, args.width))
            eigen.append(timed(partial(torch.linalg.eigh, second_moment([table[:4096]], args.width)))[1])
        print(f"ours: median {statistics.median(ours):.2f} s of {len(ours)} rounds", flush=True)
        if dtype is not None:
            data = table.numpy().astype(dtype, copy=False)
            pca, sklearn_seconds[dtype] = timed(partial(PCA(args.size, svd_solver="full").fit, data))
            bases[dtype] = torch.from_numpy(pca.components_).T
            print(f"scikit-learn on {dtype}: {sklearn_seconds[dtype]:.2f} s", flush=True)

    our_time, floor = statistics.median(ours), statistics.median(products) + statistics.median(eigen)
    print(f"\nfloor: 2 V d^2 in float64 {statistics.median(products):.2f} s")
    print(f"       + one eigendecomposition {statistics.median(eigen):.2f} s")
    print(f"ours against that floor: {our_time / floor:.2f} times (target: at most 2)")
    for dtype, seconds in sklearn_seconds.items():
        print(
            f"scikit-learn's full PCA on {dtype}: {seconds / our_time:.1f} times as long as ours (target: at least 10)"
        )
        angle = subspace_distance(basis.matrix, bases[dtype])
        print(f"  largest angle between the two subspaces: {angle:.1e} (target: 1e-6)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
