"""The Rust traits' batched and routed products, with the original's defects absent."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from problems import Problem, build

import jax_marlin as jm

P = Problem("traits", m=150, k=96, n=136, group_size=32, num_experts=4, zeros="v1", top_k=2)


def dispatched(case, dispatches, out, dtype):
    """float64 loop and budget: dispatches one after the other, rows that do not exist skipped."""
    y, budget = np.array(out, np.float64), np.zeros(np.shape(out))
    for expert, i, o, m in dispatches:
        for row in range(max(m, 0)):
            if (
                0 <= expert < len(case.weights)
                and 0 <= i + row < len(case.x)
                and 0 <= o + row < len(y)
            ):
                bias = None if case.bias is None else case.bias[expert].astype(np.float64)
                args = case.x[i + row].astype(np.float64), case.weights[expert]
                y[o + row] = oracle.matmul(*args, bias)
                budget[o + row] = oracle.matmul_budget(*args, dtype, bias)
            if row > 2 * len(y):
                break
    return y, budget


DISPATCHES = {
    "distinct_in_and_out_offsets": [(2, 0, 40, 5), (0, 5, 0, 9), (1, 14, 100, 1)],
    "more_than_64_rows": [(1, 3, 0, 65), (3, 68, 65, 82)],
    "repeated_experts": [(1, 0, 0, 3), (1, 3, 3, 4), (2, 7, 7, 2), (1, 20, 30, 70)],
    "input_rows_read_twice": [(0, 10, 0, 20), (3, 10, 20, 20)],
    "m_of_zero": [(2, 0, 0, 0), (1, 4, 4, 4), (3, 149, 149, 0), (0, 0, 0, 0)],
    "all_rows_of_one_expert": [(3, 0, 0, 150)],
}


@pytest.mark.parametrize(
    "fields", [{}, {"g_idx": "per_expert", "bias": True}], ids=["plain", "act"]
)
@pytest.mark.parametrize("name", DISPATCHES)
def test_gemm_phase_batched(name, fields, backend):
    case = build(dataclasses.replace(P, **fields))
    stack, x, dispatches = case.stack(), jnp.asarray(case.x), jnp.array(DISPATCHES[name])
    got = jax.jit(lambda s, *args: s.gemm_phase_batched(*args))(stack, x, dispatches)
    expected = dispatched(case, DISPATCHES[name], np.zeros((150, 136)), case.x.dtype)
    oracle.assert_within(got, *expected)  # zero budget where no dispatch writes: exactly zero


@pytest.mark.parametrize("name", DISPATCHES)
def test_gemm_phase_batched_keeps_the_rows_of_out(name, backend):
    case = build(P)
    out = np.random.default_rng(1).normal(size=(171, 136)).astype(np.float16)
    got = case.stack().gemm_phase_batched(
        jnp.asarray(case.x), jnp.array(DISPATCHES[name]), jnp.asarray(out)
    )
    oracle.assert_within(got, *dispatched(case, DISPATCHES[name], out, out.dtype))


def test_gemm_phase_batched_of_host_dispatches_is_the_same():
    case = build(P)
    stack, x = case.stack(), jnp.asarray(case.x)
    for dispatches in DISPATCHES.values():
        np.testing.assert_array_equal(
            stack.gemm_phase_batched(x, dispatches),
            stack.gemm_phase_batched(x, jnp.array(dispatches)),
        )


def test_gemm_phase_batched_without_dispatches_or_rows():
    case = build(P)
    stack, x, out = case.stack(), jnp.asarray(case.x), jnp.ones((3, 136), jnp.float16)
    np.testing.assert_array_equal(stack.gemm_phase_batched(x, [], out), out)
    none = jnp.zeros((0, 4), jnp.int32)
    np.testing.assert_array_equal(stack.gemm_phase_batched(x, none, out), out)
    dispatches = jnp.array([[1, 0, 0, 5]])
    assert stack.gemm_phase_batched(x[:0], dispatches).shape == (0, 136)
    np.testing.assert_array_equal(stack.gemm_phase_batched(x[:0], dispatches, out), out)
    assert stack.gemm_phase_batched(x, dispatches, out[:0]).shape == (0, 136)


def test_gemm_phase_batched_overlapping_output_rows_take_the_later_dispatch(backend):
    case, dispatches = build(P), [(0, 0, 0, 30), (1, 50, 10, 30), (2, 90, 20, 5)]
    got = case.stack().gemm_phase_batched(jnp.asarray(case.x), jnp.array(dispatches))
    expected = dispatched(case, dispatches, np.zeros((150, 136)), case.x.dtype)
    oracle.assert_within(got, *expected)


INT_MIN, INT_MAX = -(2**31), 2**31 - 1


@pytest.mark.parametrize(
    "dispatch",
    [
        (4, 0, 0, 9), (-1, 0, 0, 9), (INT_MAX, 0, 0, 9), (INT_MIN, 0, 0, 9),  # no such expert
        (1, 140, 0, 20), (1, -5, 0, 9), (1, INT_MAX, 0, 9), (1, INT_MIN, 0, 9),  # input rows
        (1, 0, 145, 20), (1, 0, -5, 9), (1, 0, INT_MAX, 9), (1, 0, INT_MIN, 9),  # output rows
        (1, INT_MAX, INT_MIN, INT_MAX), (1, INT_MIN, INT_MAX, INT_MAX),
        (1, 0, 0, -3), (1, 0, 0, INT_MIN), (1, 0, 0, INT_MAX), (1, 7, 3, INT_MAX),
    ],
)  # fmt: skip
def test_gemm_phase_batched_skips_what_is_out_of_range(dispatch, backend):
    case, dispatches = build(P), [(2, 0, 60, 3), dispatch]
    out = np.full((150, 136), 3.5, np.float16)
    got = case.stack().gemm_phase_batched(
        jnp.asarray(case.x), jnp.array(dispatches), jnp.asarray(out)
    )
    oracle.assert_within(got, *dispatched(case, dispatches, out, out.dtype))


def test_gemm_phase_batched_wide_integers_do_not_wrap():
    case = build(P)
    stack, x = case.stack(), jnp.asarray(case.x)
    with jax.enable_x64(True):
        wide = jnp.array([[2**32 + 1, 0, 0, 5], [1, 2**32, 9, 5], [1, -(2**32) - 1, 20, 5]])
        assert not stack.gemm_phase_batched(x, wide).any()
    unsigned = jnp.array([[1, 2**32 - 1, 9, 5]], jnp.uint32)
    assert not stack.gemm_phase_batched(x, unsigned).any()


STACK = build(P).stack()
X = build(P).x
BATCHED_ERRORS = [
    (
        {"dispatches": [(4, 0, 0, 1)]},
        ValueError,
        r".*\(4, 0, 0, 1\) names expert 4, expected 0 .. 3",
    ),
    ({"dispatches": [(1, 140, 0, 11)]}, ValueError, r".*leaves the 150 rows of x"),
    ({"dispatches": [(1, -1, 0, 2)]}, ValueError, r".*leaves the 150 rows of x"),
    ({"dispatches": [(1, 0, 149, 2)]}, ValueError, r".*or the 150 rows of the result"),
    ({"dispatches": [(1, 0, 0, -2)]}, ValueError, r".*\(1, 0, 0, -2\) leaves"),
    ({"dispatches": [(1, 0, 5, 3), (2, 9, 7, 1)]}, ValueError, r".*\(2, 9, 7, 1\).*overlap"),
    ({"dispatches": [(1, 0, 0)]}, ValueError, r"dispatches have shape \(1, 3\), expected \(D, 4\)"),
    ({"dispatches": [(1.0, 0, 0, 1)]}, TypeError, "dispatches have dtype float64"),
    ({"out": X[:, :9]}, ValueError, r"out has shape \(150, 9\), expected \(out_rows, N\)"),
    ({"out": np.zeros((9, 136), np.float32)}, TypeError, "out has dtype float32, expected x's"),
    ({"x": X[:, :95]}, ValueError, r"x has shape \(150, 95\)"),
    ({"x": X.astype(np.float32)}, TypeError, "x has dtype float32 .*w.astype"),
]


@pytest.mark.parametrize(("changes", "error", "message"), BATCHED_ERRORS)
def test_gemm_phase_batched_errors(changes, error, message):
    with pytest.raises(error, match="^gemm_phase_batched: " + message):
        STACK.gemm_phase_batched(**({"x": X, "dispatches": [(3, 139, 149, 1)]} | changes))


@pytest.mark.parametrize("prob_m", [None, 21, 13, 0])
def test_gemm_phase_vllm(prob_m, backend):
    """Rows named are right, rows never named are zero, ids past prob_m * top_k are padding."""
    case = build(dataclasses.replace(P, m=21, routing="skips", g_idx="per_expert"))
    routing = jm.moe_align_block_size(jnp.asarray(case.topk_ids), 16, 4)
    got = jax.jit(lambda s, x, *r: s.gemm_phase_vllm(x, *r, prob_m, moe_block_size=16, top_k=2))(
        case.stack(), jnp.asarray(case.x), *routing
    )
    rows = 21 if prob_m is None else prob_m
    x, ids = case.x[:rows].astype(np.float64), case.topk_ids[:rows]
    budget = (
        oracle.routed_rows(np.abs(x), np.abs(case.weights), ids) * 2 * oracle.epsilon("float16")
    )
    oracle.assert_within(got, oracle.routed_rows(x, case.weights, ids), budget)


def test_gemm_phase_vllm_errors_do_not_abort():
    routing = jm.moe_align_block_size(jnp.zeros((150, 2), jnp.int32), 16, 4)
    call = {"moe_block_size": 16, "top_k": 2}
    assert STACK.gemm_phase_vllm(X, *routing, **call).shape == (300, 136)
    for x, ids, prob_m, message in (
        (X, routing, 151, r"prob_m is 151, expected 0 .. 150"),
        (X[:, :9], routing, None, r"x has shape \(150, 9\)"),
        (X, (routing[0], routing[1][:-1], routing[2]), None, "expert_ids has shape"),
        (X, (*routing[:2], jnp.zeros((2,), jnp.int32)), None, "num_tokens_past_padded has shape"),
    ):
        with pytest.raises(ValueError, match="^gemm_phase_vllm: " + message):
            STACK.gemm_phase_vllm(x, *ids, prob_m, **call)
