"""Times the backward pass against the forward one: `python -m jax_marlin.bench.backward`.

For a matrix product, gradients of x; for a whole MoE layer, of x and the router's weights. They are
compared with those of the same weights in float32, then timed in one pass with the result.
"""

import argparse
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_marlin.bench import report
from jax_marlin.bench.check import WrongResultError
from jax_marlin.bench.floor import NOMINAL, floor_microseconds
from jax_marlin.bench.options import positive
from jax_marlin.bench.problems import Batch, Problem, Quantization
from jax_marlin.bench.shapes import Shape, select
from jax_marlin.bench.timing import microseconds
from jax_marlin.linear import compute_dtype
from jax_marlin.weights import MarlinExpertStack

_COLUMNS = {
    "problem": ("problem", "{}"),
    "rows": ("rows", "{}"),
    "forward_us": ("forward us", "{:.1f}"),
    "both_us": ("forward + backward us", "{:.1f}"),
    "ratio": ("ratio", "{:.2f}"),
    "deviation": ("deviation", "{:.2g}"),
    "error": ("error", "{}"),
}
_CALLS = 8  # in a round


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; 1 if some gradient was wrong or could not be computed."""
    parser = argparse.ArgumentParser(
        prog="python -m jax_marlin.bench.backward", description=(__doc__ or "").split("\n\n")[1]
    )
    add = parser.add_argument
    on_cpu = jax.default_backend() == "cpu"
    shapes = ["tiny.dense", "tiny.layer"] if on_cpu else ["dense.4096x4096", "qwen3-30b.layer"]
    add("--shapes", nargs="+", default=shapes, metavar="NAME", help="dense products and layers")
    add("--rows", nargs="+", type=positive, default=[1, 16] if on_cpu else [1, 16, 256, 4096])
    add("--dtype", default="float32" if on_cpu else "bfloat16")
    add("--group-size", type=int, default=64 if on_cpu else 128)
    add("--runs", type=positive, default=20, help="pairs of runs (default: 20)")
    add("--json", type=pathlib.Path, metavar="FILE", help="write all records")
    args = parser.parse_args(argv)
    chosen = [shape for shape in select(args.shapes) if shape.kind != "moe"]
    quantization = Quantization(4, args.group_size, compute_dtype(args.dtype, "bench.backward"))
    conditions = report.environment(quantization) | {
        "method": "calls one after the other in a loop inside one jitted program, weights rotated; "
        f"what longer runs of it take more than shorter ones, median of {args.runs} pairs or fewer",
    }
    rows = sorted(args.rows)
    measured = (r for shape in chosen for r in measure(shape, rows, quantization, args.runs))
    records = report.streamed(conditions, measured, _COLUMNS, args.json)
    return int(any(record["error"] is not None for record in records))


def measure(
    shape: Shape, rows: Sequence[int], quantization: Quantization, runs: int
) -> Iterator[dict[str, Any]]:
    """A record for each number of rows; `error` says why one has no times.

    Args:
        shape: of a dense product or a layer.
        rows: tokens.
        quantization: of the weights.
        runs: of which the median counts.
    """
    problem = Problem(shape, quantization, min(rows), _CALLS)
    for count in rows:
        batch = problem.batch(count, _CALLS)
        record = {"problem": shape.name, "rows": count, **dict.fromkeys(list(_COLUMNS)[2:])}
        least, _ = floor_microseconds(batch.touched_bytes(), shape.flops(count), NOMINAL)
        both = with_gradients(shape, batch)
        try:
            record["deviation"] = _check(shape, batch, both)
            record["forward_us"] = microseconds(
                batch.operation, batch.operands, expected_us=least, runs=runs
            )
            # Gradients in plain JAX may take a hundred times as long; of what the host sees of
            # one call, its own part is not nine tenths.
            least = max(record["forward_us"], _host_microseconds(both, batch) / 10)
            record["both_us"] = microseconds(both, batch.operands, expected_us=least, runs=runs)
            record["ratio"] = record["both_us"] / record["forward_us"]
        except (WrongResultError, jax.errors.JaxRuntimeError) as error:
            record["error"] = str(error).splitlines()[0]
        yield record


def with_gradients(shape: Shape, batch: Batch) -> Callable[..., tuple[jax.Array, ...]]:
    """A call of the batch that also returns gradients, with its own result as the cotangent.

    Returns:
        A function of a call's operands to (result, gradient of x, and of topk_weights for a layer).
    """
    wanted: tuple[int, ...] = (0, 2) if shape.kind == "layer" else (0,)  # x, topk_weights

    def call(*operands):
        def of(*chosen):
            own: dict[int, jax.Array] = dict(zip(wanted, chosen, strict=True))
            return batch.operation(*(own.get(i, operand) for i, operand in enumerate(operands)))

        result, pull_back = jax.vjp(of, *(operands[i] for i in wanted))
        return result, *pull_back(result)

    return call


def _check(shape: Shape, batch: Batch, both: Callable[..., tuple[jax.Array, ...]]) -> float:
    """The largest deviation of the first call from float32, in root mean squares of an array."""
    got = jax.jit(both)(*batch.operands[0])
    dtype = got[0].dtype
    wide = jax.jit(both)(*map(_float32, batch.operands[0]))
    largest = 0.0
    for array, exact in zip(got, wide, strict=True):
        exact = np.asarray(exact, np.float64)
        rms = float(np.sqrt(np.mean(exact**2)))
        error = np.abs(np.asarray(array, np.float64) - exact)
        # Roundings of the result, which is the cotangent, of the hidden units and of the gradient.
        if not (error <= 8 * max(float(jnp.finfo(dtype).eps), 1e-5) * (rms + np.abs(exact))).all():
            raise WrongResultError(
                f"{shape.name}: gradients are off by up to {error.max() / rms:.2g} of their root "
                "mean square; not timed"
            )
        largest = max(largest, float(error.max()) / rms)
    return largest


def _host_microseconds(both: Callable[..., tuple[jax.Array, ...]], batch: Batch) -> float:
    """Of one call that is compiled already, from its dispatch to its end."""
    started = time.perf_counter()
    jax.block_until_ready(jax.jit(both)(*batch.operands[0]))
    return (time.perf_counter() - started) * 1e6


def _float32(operand: jax.Array | MarlinExpertStack) -> jax.Array | MarlinExpertStack:
    """The same weights or activations in plain JAX's dtype; ids as they are."""
    return operand.astype(jnp.float32) if jnp.issubdtype(operand.dtype, jnp.floating) else operand


if __name__ == "__main__":
    sys.exit(main())
