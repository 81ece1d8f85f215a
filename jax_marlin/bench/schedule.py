"""The cases of a run: in which order they are measured and listed, and where a time limit ends."""

import time
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

from jax_marlin.bench.floor import Ceilings
from jax_marlin.bench.measure import Options, measure
from jax_marlin.bench.shapes import Shape


class Case(NamedTuple):
    """What one record is about; `routing` is None for a dense product."""

    problem: str
    routing: str | None
    rows: int

    @classmethod
    def of(cls, record: dict[str, Any]) -> "Case":
        """The case of a record of `measure`."""
        return cls(*(record[field] for field in cls._fields))


def all_cases(shapes: Sequence[Shape], rows: Sequence[int], options: Options) -> list[Case]:
    """Every case of a run, in the order in which reports list them."""
    return [
        Case(shape.name, routing, count)
        for shape in shapes
        for routing in options.routings_of(shape)
        for count in rows
    ]


def measure_all(
    shapes: Sequence[Shape],
    rows: Sequence[int],
    ceilings: Ceilings,
    options: Options,
    deadline: float,
) -> Iterator[dict[str, Any]]:
    """Yields records of all shapes until `deadline`, of `time.monotonic`.

    Each shape has an equal share of the time that is left when it begins, past which none of its
    cases begins. Nor does one that would end after the deadline by taking as long as the one before
    it, or, being the first of a shape, as long as the longest first one: that makes weights, too.
    """
    longest = 0.0
    for index, shape in enumerate(shapes):
        began = time.monotonic()
        until = began + (deadline - began) / (len(shapes) - index)
        if began + longest > deadline:
            continue
        records = measure(shape, rows, ceilings, options)
        for count, record in enumerate(records):
            yield record
            now = time.monotonic()
            took, began = now - began, now
            if count == 0:
                longest = max(longest, took)
            if now >= until or now + took > deadline:
                break
        records.close()


def listed(cases: Collection[Case]) -> str | None:
    """Cases in one line, the rows of a problem together; None if there are none.

    >>> listed([Case("a.down", "uniform", 4), Case("a.down", "uniform", 8), Case("b", None, 1)])
    'a.down uniform 4 8; b 1'
    """
    rows: dict[str, list[str]] = {}
    for case in cases:
        name = case.problem if case.routing is None else f"{case.problem} {case.routing}"
        rows.setdefault(name, []).append(str(case.rows))
    return "; ".join(" ".join([name, *counts]) for name, counts in rows.items()) or None
