"""Times what a call costs beside its work: `python -m jax_marlin.bench.overhead`.

The problems are so small that a call takes as long as its handler and its launches. Calls run in
chains, each on the result of the one before, outside command buffers; two lengths of a chain
differ by calls alone, without the program's own start. A kernel of XLA's own is timed beside them.
With `--command-buffers` no handler runs, and what is left is the device's time for the launches.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_marlin.bench import marked, report
from jax_marlin.bench.options import add_files, check_markers, disable_command_buffers, positive
from jax_marlin.bench.problems import Quantization, random_key, random_stack
from jax_marlin.ops.matmul import matmul
from jax_marlin.ops.moe_align_block_size import moe_align_block_size
from jax_marlin.ops.moe_ffn import moe_ffn
from jax_marlin.ops.moe_matmul import moe_matmul
from jax_marlin.ops.ragged_dot import ragged_dot
from jax_marlin.quant_spec import QuantSpec

_EXPERTS, _ROWS, _BLOCK = 4, 4, 8
_WARM_UP = 3
_DTYPE, _GROUP_SIZE = jnp.dtype(jnp.float16), 32
_COLUMNS = {"operation": ("operation", "{}"), "us": ("us a call", "{:.2f}")}
NAME = "overhead"  # of its markers


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command, before anything else of JAX in its process."""
    parser = argparse.ArgumentParser(
        prog="python -m jax_marlin.bench.overhead", description=(__doc__ or "").split("\n\n")[1]
    )
    add = parser.add_argument
    add("--calls", nargs=2, type=positive, default=(16, 144), metavar="N", help="two lengths")
    add("--runs", type=positive, default=200, metavar="N", help="of each, whose median counts")
    add("--command-buffers", action="store_true", help="keep them, as XLA has them by default")
    add_files(parser, NAME)
    args = parser.parse_args(argv)
    short, long = sorted(args.calls)
    if short == long:
        parser.error(f"--calls is {short} {long}, expected two different lengths")
    check_markers(parser, args.markdown, NAME)
    if not args.command_buffers:
        disable_command_buffers()
    conditions = report.environment(Quantization(4, _GROUP_SIZE, _DTYPE)) | {
        "command_buffers": args.command_buffers,
        "method": f"chains of {short} and of {long} calls, each on the result of the one before; "
        f"what the longer takes more, median of {args.runs} runs of each",
    }
    records = report.streamed(conditions, _measured(short, long, args.runs), _COLUMNS, args.json)
    if args.markdown:
        marked.replace(args.markdown, NAME, table(conditions, records))
    return 0


def _measured(short: int, long: int, runs: int) -> Iterator[dict[str, Any]]:
    """A record for each operation."""
    for name, (operation, operands) in operations().items():
        us = [_microseconds(chain(name, operation, n), operands, runs) for n in (short, long)]
        yield {"operation": name, "us": (us[1] - us[0]) / (long - short)}


def table(conditions: dict[str, Any], records: list[dict[str, Any]]) -> str:
    """Markdown: a line of conditions, a column for each operation."""
    names = ["a kernel of XLA's" if r["operation"] == "xla_kernel" else f"`{r['operation']}`"
             for r in records]  # fmt: skip
    where = "in" if conditions["command_buffers"] else "outside"
    return "\n".join([
        f"{marked.source(conditions)}: µs a call {where} command buffers, of problems so small "
        "that a call takes as long as its handler and its launches.",
        "",
        f"| {' | '.join(names)} |",
        f"|{' ---: |' * len(names)}",
        f"| {' | '.join(format(r['us'], '.1f') for r in records)} |",
    ])  # fmt: skip


def operations() -> dict[str, tuple[Callable[..., jax.Array], tuple[Any, ...]]]:
    """name -> (one call, its operands); its result can take the place of the first operand."""
    specs = (QuantSpec.create(bits=4, group_size=_GROUP_SIZE, k=k, n=128) for k in (128, 64))
    wide, narrow = (random_stack(random_key(s.k), _EXPERTS, s, _DTYPE) for s in specs)
    x, ones = jnp.ones((_ROWS, 128), _DTYPE), jnp.ones((_ROWS, 1))
    ids = jnp.asarray(np.random.default_rng(0).permutation(_EXPERTS)[:, None], jnp.int32)
    routing = moe_align_block_size(ids, _BLOCK, _EXPERTS)

    def ragged(x, stack):  # sizes that follow x, or they would be worked out once for all calls
        sizes = jnp.where(jnp.isnan(x[0, 0]), 0, jnp.ones(_EXPERTS, jnp.int32))
        return ragged_dot(x, stack, sizes)

    return {
        "xla_kernel": (lambda x: jax.lax.optimization_barrier(x * x.dtype.type(0.5)), (x,)),
        "matmul": (lambda x, stack: matmul(x, stack[1]), (x, wide)),
        "moe_matmul": (
            lambda *args: moe_matmul(*args, moe_block_size=_BLOCK, top_k=1), (x, wide, *routing)
        ),
        "ragged_dot": (ragged, (x, wide)),
        "moe_ffn": (moe_ffn, (x, ids, ones, wide, narrow)),
        # In blocks of one slot the sorted rows are a permutation, and so as good as ids.
        "moe_align_block_size": (
            lambda ids: moe_align_block_size(ids, 1, _EXPERTS)[0][:, None], (ids,)
        ),
    }  # fmt: skip


def chain(name: str, operation: Callable[..., jax.Array], calls: int) -> Callable[..., jax.Array]:
    """A program `chain_<name>` of `calls` calls of `operation`, each on the last one's result."""

    def program(x, *others):
        for _ in range(calls):
            x = operation(x, *others)
        return x

    program.__name__ = f"chain_{name}"
    return jax.jit(program)


def _microseconds(program: Callable[..., jax.Array], operands: tuple[Any, ...], runs: int) -> float:
    """The median time of a program, from its start to its result."""
    samples = []
    for _ in range(_WARM_UP + runs):
        started = time.perf_counter()
        jax.block_until_ready(program(*operands))
        samples.append(time.perf_counter() - started)
    return statistics.median(samples[_WARM_UP:]) * 1e6


if __name__ == "__main__":
    sys.exit(main())
