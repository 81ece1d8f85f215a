"""Measures one problem at each number of rows: check, time, compare with the floor and XLA."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from jax_marlin.bench.baselines import Baseline
from jax_marlin.bench.check import WrongResultError, check
from jax_marlin.bench.floor import Ceilings, floor_microseconds
from jax_marlin.bench.problems import Batch, Problem, Quantization
from jax_marlin.bench.shapes import Shape
from jax_marlin.bench.timing import microseconds


@dataclasses.dataclass(frozen=True)
class Options:
    """How a run measures.

    Attributes:
        quantization: of all weights.
        calls: calls in one program; None: see `calls_for`.
        runs: runs of a program, of which the median counts.
        baseline: time XLA, too.
    """

    quantization: Quantization
    calls: int | None
    runs: int
    baseline: bool

    def calls_for(self, rows: int) -> int:
        """Calls in the program for `rows` tokens: fewer where results are large and calls long."""
        if self.calls is not None:
            return self.calls
        if jax.default_backend() == "cpu":
            return 4
        return 32 if rows <= 64 else 16 if rows <= 256 else 8


def measure(
    shape: Shape, rows: Sequence[int], ceilings: Ceilings, options: Options
) -> Iterator[dict[str, Any]]:
    """Yields a record (see `_record`) for each number of rows.

    A wrong result is not timed: its record has an `error` and no times. What the device refuses
    (too little memory, say) is an `error`, too, in place of the times that it prevented.
    """
    calls = max(map(options.calls_for, rows))
    problem = Problem(shape, options.quantization, min(rows), calls)
    baseline = None
    if options.baseline:
        baseline = Baseline(shape, options.quantization.dtype, min(rows), calls)
    for count in rows:
        batch = problem.batch(count, options.calls_for(count))
        record = _record(shape, count, batch, ceilings)
        try:
            record["deviation"] = check(shape, batch, seed=count)
            record |= _times(
                record, microseconds(batch.operation, batch.operands, runs=options.runs)
            )
            if baseline is not None:
                record["xla_us"] = baseline.microseconds(batch, options.runs)
        except (WrongResultError, jax.errors.JaxRuntimeError) as error:
            record["error"] = str(error)
        yield record


def _record(shape: Shape, rows: int, batch: Batch, ceilings: Ceilings) -> dict[str, Any]:
    """What is known before a measurement; times in microseconds, None where there is none."""
    num_bytes, flops = batch.touched_bytes(), shape.flops(rows)
    floor_us, bound = floor_microseconds(num_bytes, flops, ceilings)
    return {
        "problem": shape.name,
        "kind": shape.kind,
        "k": shape.k,
        "n": shape.n,
        "experts": shape.experts,
        "top_k": shape.top_k,
        "rows": rows,
        "calls": len(batch.operands),
        "packed_bytes": num_bytes,  # that one call reads
        "flops": flops,
        "floor_us": floor_us,
        "bound": bound,
        "us": None,
        "share_of_floor": None,  # floor / time
        "gb_per_s": None,
        "tflops": None,
        "xla_us": None,  # unquantized
        "deviation": None,  # largest sampled one, in units of the result's root mean square
        "error": None,
    }


def _times(record: dict[str, Any], us: float) -> dict[str, float]:
    return {
        "us": us,
        "share_of_floor": record["floor_us"] / us,
        "gb_per_s": record["packed_bytes"] / us / 1e3,
        "tflops": record["flops"] / us / 1e6,
    }
