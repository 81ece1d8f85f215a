"""The benchmark under a time limit: what comes first, what is left out, and that it is named."""

import dataclasses
import math

import jax.numpy as jnp
import pytest

from jax_marlin.bench import measure, schedule
from jax_marlin.bench.floor import Ceilings
from jax_marlin.bench.problems import Quantization
from jax_marlin.bench.schedule import Case, all_cases, listed, measure_all
from jax_marlin.bench.shapes import SHAPES

OPTIONS = measure.Options(Quantization(4, 64, jnp.dtype("float32")), 2, 1, baseline=False)
CEILINGS = Ceilings(1e11, 1e12)
SHAPE_NAMES = ["tiny.dense", "tiny.gate_up", "tiny.layer"]


class Clock:
    """Seconds that pass only when a case is measured: `first` for a shape's first, `other` else."""

    def __init__(self, monkeypatch, first: dict[str, float], other: float):
        self.now, self.closed, self.first, self.other = 1000.0, [], first, other
        monkeypatch.setattr(schedule, "measure", self.measure)
        monkeypatch.setattr(schedule.time, "monotonic", lambda: self.now)

    def measure(self, shape, rows, ceilings, options):
        try:
            for count in rows:
                self.now += self.first[shape.name] if count == rows[0] else self.other
                yield {"problem": shape.name, "routing": None, "rows": count}
        finally:
            self.closed.append(shape.name)

    def run(self, seconds: float) -> list[str]:
        shapes = [SHAPES[name] for name in SHAPE_NAMES]
        records = measure_all(shapes, [1, 2, 3, 4], CEILINGS, OPTIONS, self.now + seconds)
        return [f"{Case.of(r).problem} {r['rows']}" for r in records]


def test_all_is_measured_without_a_limit(monkeypatch):
    clock = Clock(monkeypatch, dict.fromkeys(SHAPE_NAMES, 5.0), 1.0)
    assert clock.run(math.inf) == [f"{name} {n}" for name in SHAPE_NAMES for n in (1, 2, 3, 4)]
    assert clock.closed == SHAPE_NAMES


@pytest.mark.parametrize("seconds", range(0, 30))
def test_the_limit_holds_where_cases_take_as_long_as_those_before(monkeypatch, seconds):
    clock = Clock(monkeypatch, dict.fromkeys(SHAPE_NAMES, 4.0), 2.0)
    measured = clock.run(seconds)
    # Only the very first case can be late: nothing is known before it.
    assert clock.now <= 1000 + max(seconds, 4)
    assert len(measured) >= min(12, (seconds - 6) // 2 // 2)
    assert sorted(clock.closed) == sorted({name.split()[0] for name in measured})


def test_each_shape_has_its_share_and_what_others_leave(monkeypatch):
    slow_one = {"tiny.dense": 1.0, "tiny.gate_up": 9.0, "tiny.layer": 1.0}
    assert Clock(monkeypatch, slow_one, 1.0).run(16) == [
        *(f"tiny.dense {n}" for n in (1, 2, 3, 4)),  # 4 of 16 seconds
        "tiny.gate_up 1",  # 9 of the 6 seconds that are its share
        # 3 left: not enough for a first case as long as the longest.
    ]


def test_rows_of_the_table_come_first(monkeypatch):
    monkeypatch.setattr(measure, "check", lambda *_, **__: 0.0)
    monkeypatch.setattr(measure, "microseconds", lambda *_, **__: 3.0)
    records = measure.measure(SHAPES["tiny.dense"], [1, 4, 16, 32], CEILINGS, OPTIONS)
    assert [r["rows"] for r in records] == [1, 16, 4, 32]


def test_cases_are_listed_by_problem_and_routing():
    options = dataclasses.replace(OPTIONS, routings=("zipf", "uniform"))
    cases = all_cases([SHAPES["tiny.down"], SHAPES["tiny.dense"]], [4, 8], options)
    assert cases[1:3] == [Case("tiny.down", "zipf", 8), Case("tiny.down", "uniform", 4)]
    assert listed(cases[2:]) == "tiny.down uniform 4 8; tiny.dense 4 8"


def test_nothing_left_out_is_none():
    assert listed([]) is None
