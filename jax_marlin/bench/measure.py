"""Measures one problem at each number of rows: check, time, compare with the floor and peers."""

import dataclasses
import math
from collections.abc import Generator, Sequence
from typing import Any

import jax

from jax_marlin.bench import humming
from jax_marlin.bench.baselines import Baseline
from jax_marlin.bench.check import WrongResultError, check
from jax_marlin.bench.floor import Ceilings, floor_microseconds
from jax_marlin.bench.markdown import ROWS
from jax_marlin.bench.problems import Batch, Problem, Quantization
from jax_marlin.bench.routings import touched_experts
from jax_marlin.bench.shapes import Shape
from jax_marlin.bench.timing import microseconds

# What a round of calls takes by the floor, where calls suffice: beside it, the few microseconds
# between one round and the next count for little.
_ROUND_MICROSECONDS = 1000
_CALLS = (4, 64)  # fewest, most
_PEERS = ("xla", "humming")


@dataclasses.dataclass(frozen=True)
class Options:
    """How a run measures.

    Attributes:
        quantization: of all weights.
        calls: calls in one round of a program's loop; None: see `calls_for`.
        runs: runs of a program, of which the median counts.
        baseline: time XLA, too.
        humming: time Humming, too, where it has such an operation.
        routings: each is measured, names in `ROUTINGS`.
    """

    quantization: Quantization
    calls: int | None
    runs: int
    baseline: bool
    humming: bool = False
    routings: tuple[str, ...] = ("uniform",)

    def routings_of(self, shape: Shape) -> tuple[str | None, ...]:
        """The routings of a shape: a dense product has none, and is measured once."""
        return (None,) if shape.kind == "dense" else self.routings

    def calls_for(
        self, shape: Shape, rows: int, ceilings: Ceilings, routing: str | None = "uniform"
    ) -> int:
        """Calls in a round for `rows` tokens: fewer where they are long."""
        if self.calls is not None:
            return self.calls
        if jax.default_backend() == "cpu":
            return _CALLS[0]
        weights = touched_experts(shape, rows, routing) * shape.expert_weights
        num_bytes = weights * self.quantization.bits / 8
        floor_us, _ = floor_microseconds(num_bytes, shape.flops(rows), ceilings)
        return min(max(_CALLS[0], math.ceil(_ROUND_MICROSECONDS / floor_us)), _CALLS[1])


def measure(
    shape: Shape, rows: Sequence[int], ceilings: Ceilings, options: Options
) -> Generator[dict[str, Any], None, None]:
    """Yields a record (see `_record`) for each number of rows and routing.

    The numbers of rows that a table shows come first, then the others, fewest first, so that a run
    that is ended early has measured what is asked for most. A wrong result is not timed: its record
    has an `error` and no times. What the device refuses (too little memory, say) is an `error`,
    too, in place of the times that it prevented. What is wrong with Humming is text,
    `humming_error`.
    """
    routings = options.routings_of(shape)
    in_order = sorted(rows, key=lambda count: (count not in ROWS, count))
    cases = [(routing, count) for count in in_order for routing in routings]
    calls_for = {(r, count): options.calls_for(shape, count, ceilings, r) for r, count in cases}
    calls = max(calls_for.values())
    problem = Problem(shape, options.quantization, min(rows), calls, routings)
    baseline = peer = peer_error = None
    if options.humming and shape.kind != "layer":
        peer, peer_error = humming.attempt(
            humming.Humming, shape, options.quantization, problem.copies, rows
        )
    if options.baseline:
        baseline = Baseline(shape, options.quantization.dtype, min(rows), calls, routings)
    try:
        for routing, count in cases:
            batch = problem.batch(count, calls_for[routing, count], routing)
            record = _record(shape, count, routing, batch, ceilings)
            record["humming_error"] = peer_error
            try:
                record["deviation"] = check(shape, batch, seed=count)
                record |= _times(record, batch, options.runs)
                if baseline is not None:
                    record["xla_us"] = baseline.microseconds(batch, options.runs)
                if peer is not None:
                    record |= _humming_times(peer, record, batch, options.runs)
                record |= _best_peer(record)
            except (WrongResultError, jax.errors.JaxRuntimeError) as error:
                record["error"] = str(error)
            yield record
    finally:
        if peer is not None:
            peer.close()


def _record(
    shape: Shape, rows: int, routing: str | None, batch: Batch, ceilings: Ceilings
) -> dict[str, Any]:
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
        "routing": routing,  # None: a dense product
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
        "humming_us": None,  # by its fastest way of calling it
        "humming_mode": None,
        "humming_error": None,
        "best_peer": None,
        "best_peer_us": None,
        "of_best_peer": None,  # its time / ours: above one, we are faster
        "deviation": None,  # largest sampled one, in units of the result's root mean square
        "error": None,
    }


def _times(record: dict[str, Any], batch: Batch, runs: int) -> dict[str, float]:
    expected = record["floor_us"]
    us = microseconds(batch.operation, batch.operands, expected_us=expected, runs=runs)
    return {
        "us": us,
        "share_of_floor": record["floor_us"] / us,
        "gb_per_s": record["packed_bytes"] / us / 1e3,
        "tflops": record["flops"] / us / 1e6,
    }


def _humming_times(
    peer: humming.Humming, record: dict[str, Any], batch: Batch, runs: int
) -> dict[str, Any]:
    times, error = humming.attempt(peer.microseconds, batch, record["floor_us"], runs)
    if error is not None:
        return {"humming_error": error}
    mode = min(times, key=times.get)
    return {"humming_us": times[mode], "humming_mode": mode}


def _best_peer(record: dict[str, Any]) -> dict[str, Any]:
    times = {peer: us for peer in _PEERS if (us := record[f"{peer}_us"]) is not None}
    if not times:
        return {}
    best = min(times, key=times.__getitem__)
    return {
        "best_peer": best,
        "best_peer_us": times[best],
        "of_best_peer": times[best] / record["us"],
    }
