"""Times what loading costs the host: `python -m jax_marlin.bench.packing`.

A checkpoint of random experts is written to a temporary folder and loaded, with all of loading's
checks, and weights of every expert are compared with what the words of the file mean. Then loading
is timed, from a file that the system holds in memory, and packing alone, of words in memory into
memory that is in use. Both run in as many threads as loading has. GB are 10**9 bytes of packed
codes; that scales are loaded, too, costs time and counts for nothing.
"""

import argparse
import contextlib
import math
import pathlib
import platform
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_marlin import native_repack
from jax_marlin.bench import marked, report, synthetic_experts
from jax_marlin.bench.check import WrongResultError
from jax_marlin.bench.options import add_files, check_markers, positive
from jax_marlin.bench.problems import Quantization
from jax_marlin.checkpoints import open_checkpoint
from jax_marlin.checkpoints.checkpoint import Checkpoint
from jax_marlin.checkpoints.expert_stack import experts_at_once
from jax_marlin.checkpoints.workers import in_threads, thread_count
from jax_marlin.pack_canonical import pack_canonical
from jax_marlin.weights import MarlinExpertStack

NAME = "packing"  # of its markers
_BYTES = 100e6  # of a checkpoint's packed codes, at least
_PACKERS = {"extension": "extension", "numpy": "NumPy"}  # and their names
_COLUMNS = {
    "format": ("format", "{}"),
    "k": ("K", "{}"),
    "n": ("N", "{}"),
    "experts": ("experts", "{}"),
    "packer": ("packer", "{}"),
    "packed_gb_per_s": ("packed GB/s", "{:.2f}"),
    "loaded_gb_per_s": ("loaded GB/s", "{:.2f}"),
}
_CPU = pathlib.Path("/proc/cpuinfo")  # Linux


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        prog="python -m jax_marlin.bench.packing", description=(__doc__ or "").split("\n\n")[1]
    )
    add = parser.add_argument
    sizes = [(2048, 768), (4096, 14336)]  # of Qwen3-30B-A3B and of Mixtral
    add("--sizes", nargs="+", type=_size, default=sizes, metavar="KxN", help="of an expert")
    add("--experts", type=positive, metavar="N", help="default: 100 MB, as many for each thread")
    add("--formats", nargs="+", choices=synthetic_experts.FORMATS,
        default=synthetic_experts.FORMATS)  # fmt: skip
    add("--group-size", type=positive, default=128, metavar="N", help="default: 128")
    add("--runs", type=positive, default=7, metavar="N", help="whose median counts (default: 7)")
    add("--directory", type=pathlib.Path, help="where the temporary folder is made")
    add_files(parser, NAME)
    args = parser.parse_args(argv)
    for k, n in args.sizes:
        if k % args.group_size or k % 8 or n % 8:
            parser.error(
                f"--sizes has {k}x{n}, expected K a multiple of 8 and of --group-size "
                f"{args.group_size}, and N of 8"
            )
    check_markers(parser, args.markdown, NAME)
    conditions = report.environment(Quantization(4, args.group_size, jnp.dtype(jnp.float16))) | {
        "device": f"{thread_count()} threads of {_processor()}",
        "driver": None,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "method": f"median of {args.runs} runs; 10**9 bytes of packed codes a second",
    }
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        measured = (
            record
            for k, n in args.sizes
            for form in args.formats
            for record in measure(
                form, args.experts or _experts(k, n), k, n, args.group_size, args.runs,
                args.directory,
            )
        )  # fmt: skip
        records = report.streamed(conditions, measured, _COLUMNS, args.json)
    if args.markdown:
        marked.replace(args.markdown, NAME, table(conditions, records))
    return 0


def measure(
    form: str, experts: int, k: int, n: int, group_size: int, runs: int,
    directory: pathlib.Path | None = None,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """A record for each packer that there is.

    Raises:
        WrongResultError: a weight is not what the file says, or packing in memory and loading
            disagree.
    """
    with tempfile.TemporaryDirectory(dir=directory) as folder:
        path = pathlib.Path(folder)
        names = synthetic_experts.write(path, form, experts, k, n, group_size)
        checkpoint = open_checkpoint(path)
        for packer in _PACKERS if native_repack.extension() else ("numpy",):
            with _packing_by(packer):
                stack: Any = checkpoint.load_expert_stack(names)
                synthetic_experts.check(form, checkpoint, names, stack)
                packed = _seconds(_packing(checkpoint, names, stack), runs)
                loaded = _seconds(lambda: checkpoint.load_expert_stack(names), runs)
            size = stack.qweight.nbytes
            yield {
                "format": form, "k": k, "n": n, "experts": experts, "packer": packer,
                "packed_gb_per_s": size / packed / 1e9, "loaded_gb_per_s": size / loaded / 1e9,
            }  # fmt: skip


def table(conditions: dict[str, Any], records: list[dict[str, Any]]) -> str:
    """Markdown: a line of conditions, a row for each size and format."""
    packers = [p for p in _PACKERS if any(r["packer"] == p for r in records)]
    heads = [f"{_PACKERS[p]}: packed | loaded" for p in packers]
    rows: dict[str, dict[str, str]] = {}
    for r in records:
        cells = f"{r['packed_gb_per_s']:.2f} | {r['loaded_gb_per_s']:.2f}"
        rows.setdefault(f"{r['k']} × {r['n']}, {r['format']}", {})[r["packer"]] = cells
    return "\n".join([
        f"{marked.source(conditions)}, NumPy {conditions['numpy']}: GB of packed 4-bit codes a "
        f"second, group size {conditions['group_size']}, packed in memory, and loaded from a file "
        "in the system's cache with all checks.",
        "",
        f"| experts | {' | '.join(heads)} |",
        f"| --- |{' ---: |' * 2 * len(packers)}",
        *(f"| {row} | {' | '.join(cells[p] for p in packers)} |" for row, cells in rows.items()),
    ])  # fmt: skip


def _packing(
    checkpoint: Checkpoint, names: list[str], stack: MarlinExpertStack
) -> Callable[[], None]:
    """What packs all experts anew, as loading does, into memory of its own."""
    weights: list[Any] = [checkpoint.linear(name) for name in names]
    spec = stack.spec
    together = experts_at_once(spec.k * spec.n // spec.pack_factor, len(names))
    turns = [range(i, min(i + together, len(names))) for i in range(0, len(names), together)]
    out = np.empty(stack.qweight.shape, np.uint32)

    def pack(some: range) -> None:
        pack_canonical([weights[e] for e in some], spec, out[some.start : some.stop])

    def all_of_them() -> None:
        for _ in in_threads(pack, turns):
            pass

    all_of_them()
    if not np.array_equal(out, stack.qweight):
        raise WrongResultError("words packed in memory differ from loaded ones; not timed")
    return all_of_them


def _seconds(work: Callable[[], object], runs: int) -> float:
    """The median time."""
    samples = []
    for _ in range(runs):
        started = time.perf_counter()
        result = jax.block_until_ready(work())
        samples.append(time.perf_counter() - started)
        del result  # what took its memory back would be timed, too
    return statistics.median(samples)


@contextlib.contextmanager
def _packing_by(packer: str) -> Iterator[None]:
    """NumPy in place of the extension, if that is asked for."""
    found = native_repack.extension
    try:
        if packer == "numpy":
            native_repack.extension = lambda: None
        yield
    finally:
        native_repack.extension = found


def _experts(k: int, n: int) -> int:
    """As many for each thread, so that none waits for another."""
    threads = thread_count()
    return math.ceil(_BYTES / (k * n / 2) / threads) * threads


def _processor() -> str:
    try:
        found = re.search(r"model name\s*: (.*)", _CPU.read_text())
    except OSError:
        found = None
    return found[1] if found else platform.machine()


def _size(text: str) -> tuple[int, int]:
    k, _, n = text.partition("x")
    return positive(k), positive(n)


if __name__ == "__main__":
    sys.exit(main())
