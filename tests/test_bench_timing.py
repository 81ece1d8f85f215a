"""The benchmark's clock: no call is left out of a program, and what it times is calls alone."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_marlin.bench import timing
from jax_marlin.bench.problems import Problem, Quantization
from jax_marlin.bench.shapes import SHAPES, select
from jax_marlin.bench.timing import looped, microseconds, rounds_for

TINY = [shape.name for shape in select(["tiny"])]
CALLS, ROUNDS, REPEATS = 3, 4, jnp.int32(5)


def compiled(operation, operands):
    return looped(operation, ROUNDS).lower(REPEATS, operands).compile().as_text()


def computations(hlo: str) -> dict[str, list[str]]:
    """Name of a computation -> its lines."""
    found: dict[str, list[str]] = {}
    for line in hlo.splitlines():
        if re.match(r"(ENTRY )?%", line):
            name = line.removeprefix("ENTRY ").split()[0]
            found[name] = []
        elif line.startswith("  "):
            found[name].append(line)
    return found


def lines_of(hlo: str, name: str) -> list[str]:
    """The lines of a computation and of those that it calls, once a call."""
    lines = []
    for line in computations(hlo)[name]:
        called = re.findall(r"(?:calls|to_apply|body)=(%[\w.\-]+)", line)
        lines += [line, *(inner for other in called for inner in lines_of(hlo, other))]
    return lines


def matching(lines: list[str], pattern: str) -> list[str]:
    return [line for line in lines if re.search(pattern, line)]


def cholesky(x):  # a custom call without side effects, as ours are
    return jnp.linalg.cholesky(x, symmetrize_input=False)


@pytest.mark.parametrize(
    "operation, operands, pattern",
    [
        # The very same operands each time: nothing tells one call from another.
        (cholesky, [(4 * jnp.eye(8),)] * CALLS, r"custom_call_target=\"lapack"),
        (jnp.dot, [(jnp.ones((64, 256)), jnp.ones((256, 192)))] * CALLS, r" dot\("),
        # Nothing but the last operand differs.
        (
            lambda x, i: cholesky(x) * (1.0 + i),
            [(4 * jnp.eye(8), jnp.float32(i)) for i in range(CALLS)],
            r"custom_call_target=\"lapack",
        ),
    ],
    ids=["custom call", "dot", "same call"],
)  # fmt: skip
def test_every_call_is_in_the_innermost_loop(operation, operands, pattern):
    hlo = compiled(operation, operands)
    loops = matching(hlo.splitlines(), r" while\(")
    outer, inner = sorted(loops, key=lambda line: "known_trip_count" in line)
    assert "known_trip_count" not in outer
    assert f'"known_trip_count":{{"n":"{ROUNDS}"}}' in inner
    bodies = [re.findall(r"body=(%[\w.\-]+)", loop)[0] for loop in (outer, inner)]
    assert matching(computations(hlo)[bodies[0]], r" while\(") == [inner]
    assert len(matching(lines_of(hlo, bodies[1]), pattern)) == CALLS
    assert len(matching(hlo.splitlines(), pattern)) == CALLS  # and none before or after the loops


def test_weights_are_not_copied():
    operands = [(jnp.ones((3, 56)), jnp.full((56, 40), i)) for i in (1.0, 2.0)]
    lines = compiled(jnp.dot, operands).splitlines()
    assert matching(lines, r"f32\[56,40\]") and not matching(lines, r"= f32\[56,40\]\S* copy\(")


@pytest.mark.parametrize("name", TINY)
def test_a_program_has_all_calls_when_lowered_for_cuda(name):
    problem = Problem(SHAPES[name], Quantization(4, 64, jnp.dtype("float16")), 5, CALLS)
    batch = problem.batch(5, CALLS)
    traced = looped(batch.operation, ROUNDS).trace(REPEATS, batch.operands)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert len(re.findall(r"@jax_marlin_(?:matmul|moe_matmul|moe_ffn)_v\d", text)) == CALLS
    assert text.count("stablehlo.while") == 2


@pytest.mark.parametrize("name", ["tiny.dense", "tiny.layer"])
def test_a_program_computes_what_single_calls_do(name, backend):
    quantization = Quantization(4, 64, jnp.dtype("float32" if backend == "xla" else "float16"))
    batch = Problem(SHAPES[name], quantization, 5, CALLS).batch(5, CALLS)
    single = jax.jit(batch.operation)
    firsts = [np.asarray(single(*one), np.float64)[0, 0] for one in batch.operands]
    assert len(set(firsts)) == CALLS
    total = looped(batch.operation, ROUNDS)(REPEATS, batch.operands)
    np.testing.assert_allclose(total, int(REPEATS) * ROUNDS * np.array(firsts), rtol=1e-4)


def test_all_results_of_a_call_are_needed():
    def both(x, y):
        return {"sum": x + y, "product": x @ y}

    operands = [(jnp.full((2, 2), i), jnp.full((2, 2), 3.0)) for i in (1.0, 2.0)]
    total = looped(both, ROUNDS)(REPEATS, operands)
    assert total.tolist() == [20 * 6.0, 20 * 4.0, 20 * 12.0, 20 * 5.0]  # keys in their order


class FakeProgram:
    """A program of a clock's own: 300 us to start, 15 for a turn of the outer loop, 7 a call."""

    def __init__(self, operation, rounds):
        FakeProgram.now, self.rounds = 0.0, rounds

    def __call__(self, repeats, operands):
        turns = int(repeats)
        calls = turns * self.rounds * len(operands)
        FakeProgram.now += (300 + 15 * turns + 7 * calls) / 1e6
        return jnp.zeros(1)


def test_starts_cancel_and_turns_count_for_little(monkeypatch):
    monkeypatch.setattr(timing, "looped", FakeProgram)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: FakeProgram.now)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert microseconds(jnp.dot, [()] * 32, expected_us=5) == pytest.approx(7, rel=0.002)
    assert microseconds(jnp.dot, [()] * 4, expected_us=3000) == pytest.approx(7 + 15 / 4)


def test_rounds_fill_milliseconds_on_a_gpu(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert [rounds_for(64, 2.5), rounds_for(32, 5), rounds_for(4, 3000)] == [50, 50, 1]


def test_time_grows_with_the_work_and_calls_are_not_merged():
    def work(x):
        return jax.lax.fori_loop(0, 40, lambda _, y: jnp.sin(y @ y), x)

    x = jnp.ones((160, 160))
    one, many = (microseconds(work, [(x,)] * calls, expected_us=1, runs=5) for calls in (1, 6))
    assert many > 0.4 * one  # six merged calls would take a sixth


def test_time_is_that_of_one_call_whatever_the_rounds(monkeypatch):
    def work(x):
        return jax.lax.fori_loop(0, 20, lambda _, y: jnp.sin(y @ y), x)

    x = jnp.ones((160, 160))
    alone = microseconds(work, [(x,)], expected_us=1, runs=5)
    monkeypatch.setattr(timing, "_CPU_ROUNDS", 9)
    assert alone / 3 < microseconds(work, [(x,)], expected_us=1, runs=5) < 3 * alone
