"""The Rust traits' methods, one by one under their own names, with the original's defects absent."""

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


def test_load_gptq(backend):
    """g_idx is honoured on every backend, K = group_size is one group, and the bias is fused."""
    for k, group_size, g_idx in ((96, 96, "none"), (96, 32, "shared"), (128, 64, "shared")):
        p = dataclasses.replace(P, k=k, group_size=group_size, g_idx=g_idx, bias=True, m=7)
        case = build(p)
        tensors = {
            name.removesuffix("s") if name == "qweights" else name: (
                a if name == "g_idx" or not isinstance(a, np.ndarray) else a[1]
            )
            for name, a in case.tensors.items()
        }
        w = jm.load_gptq(**tensors)
        bias = case.bias[1].astype(np.float64)
        got = jax.jit(lambda w, x: w(x))(w, jnp.asarray(case.x))
        x = case.x.astype(np.float64)
        budget = oracle.matmul_budget(x, case.weights[1], case.x.dtype, bias)
        oracle.assert_within(got, oracle.matmul(x, case.weights[1], bias), budget)


def test_load_gptq_error_names_argument_got_and_expected():
    case = build(P)
    with pytest.raises(ValueError, match=r"^load_gptq: scales has shape \(2, 136\), expected.*3"):
        jm.load_gptq(
            case.tensors["qweights"][0], case.tensors["scales"][0][:2], bits=4, group_size=32
        )


@pytest.mark.parametrize("g_idx", ["none", "shared", "per_expert"])
def test_load_gptq_stacked(g_idx):
    """Act-order stacks and zero points that differ in every column are right."""
    case = build(dataclasses.replace(P, g_idx=g_idx, dtype="float32"))
    np.testing.assert_allclose(case.stack().dequantize(), case.weights, rtol=1e-6, atol=1e-7)


def test_load_gptq_stacked_packs_each_expert_alone():
    tensors = build(P).tensors
    stack = jm.load_gptq_stacked(**tensors)
    for e in range(P.num_experts):
        alone = jm.load_gptq(
            tensors["qweights"][e], tensors["scales"][e], tensors["qzeros"][e], group_size=32
        )
        for name in ("qweight", "scales", "zero_points"):
            np.testing.assert_array_equal(getattr(stack, name)[e], getattr(alone.stack, name)[0])


def test_pregrow_marlin_gather_scratch_is_answered_by_scratch_bytes():
    """Nothing to grow: the number is a function of static shapes."""
    stack = build(dataclasses.replace(P, g_idx="per_expert")).stack()
    small, large = (jm.scratch_bytes(m, stack, top_k=2) for m in (8, 4096))
    if jm.backend_info().extension:
        assert large >= small + 4088 * 2 * 96 * 2  # each routed row in its expert's order
    else:
        assert small == large == 0
    assert jm.scratch_bytes(8, stack[1]) >= 0


def test_n_per_expert_k_and_num_experts_under_tracing():
    stack, seen = build(P).stack(), []

    @jax.jit
    def accessors(stack):
        seen.append((stack.num_experts, stack.k, stack.n_per_expert, stack.shape, stack.dtype))
        return jnp.zeros((stack.num_experts, stack.k + stack.n_per_expert))

    assert accessors(stack).shape == (4, 96 + 136)
    assert seen == [(4, 96, 136, (4, 96, 136), np.dtype(np.float16))]
    assert jax.eval_shape(lambda s: s, stack).num_experts == 4


def test_as_any_is_isinstance_and_tree_leaves():
    stack = build(P).stack()
    assert isinstance(stack, jm.MarlinExpertStack)
    assert isinstance(stack[2], jm.MarlinLinear)
    assert {leaf.shape[0] for leaf in jax.tree.leaves(stack)} == {4}


def test_zero_workspace_returns_the_stack():
    stack = build(P).stack()
    assert stack.zero_workspace() is stack
    leaves = jax.jit(lambda s: s.zero_workspace())(stack)
    jax.tree.map(np.testing.assert_array_equal, leaves, stack)


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


def columns(e: int, start: int) -> int:
    return e * 136 + start


@pytest.mark.parametrize(
    ("e", "start", "width"), [(0, 0, 136), (2, 0, 64), (1, 64, 64), (3, 64, 72), (3, 128, 8)]
)
def test_make_expert_linear(e, start, width, backend):
    """Whole experts and any tiles of one, at the first, a middle and the last expert."""
    case = build(dataclasses.replace(P, g_idx="per_expert", bias=True, m=9))
    w = case.stack().make_expert_linear(columns(e, start), width)
    assert w.shape == (96, width)
    part = slice(start, start + width)
    x, weight = case.x.astype(np.float64), case.weights[e][:, part]
    bias = case.bias[e, part].astype(np.float64)
    expected = oracle.matmul(x, weight, bias)
    oracle.assert_within(
        w(jnp.asarray(case.x)), expected, oracle.matmul_budget(x, weight, "float16", bias)
    )


def test_make_expert_linear_with_a_bias_of_its_own():
    case = build(dataclasses.replace(P, bias=True, m=5))
    bias = np.linspace(-3, 3, 72).astype(np.float16)
    w = case.stack().make_expert_linear(columns(1, 64), 72, bias)
    x, weight = case.x.astype(np.float64), case.weights[1][:, 64:]
    expected = oracle.matmul(x, weight, bias.astype(np.float64))
    budget = oracle.matmul_budget(x, weight, "float16", bias.astype(np.float64))
    oracle.assert_within(w(jnp.asarray(case.x)), expected, budget)


def test_make_expert_linear_copies_no_weights_under_jit():
    """The packed leaves go from the argument into the primitive, untouched by any other op."""
    stack = build(dataclasses.replace(P, m=5)).stack()

    def use(stack, x):
        return stack.make_expert_linear(columns(2, 64), 64)(x)

    x = jnp.zeros((5, 96), jnp.float16)
    jaxpr = jax.make_jaxpr(use)(stack, x).jaxpr
    packed = {var for var in jaxpr.invars if var.aval.dtype == jnp.uint32}
    users = [
        e.primitive.name for e in jaxpr.eqns if packed & {v for v in e.invars if v in jaxpr.invars}
    ]
    assert users == ["jax_marlin_matmul_v1"]


LINEAR_ERRORS = [
    ((544, 64), ValueError, "expert_offset is 544, expected 0 .. 543"),
    ((-136, 136), ValueError, "expert_offset is -136, expected"),
    ((columns(1, 0), 272), ValueError, "expert_n is 272 .*cannot span two"),
    (
        (columns(1, 64), 128),
        ValueError,
        "expert_n is 128 from column 64 of expert 1, expected 1 .. 72",
    ),
    ((0, 0), ValueError, "expert_n is 0"),
    ((32, 64), ValueError, r"columns \[32, 96\) of expert 0 do not fall on tiles"),
    ((0, 72), ValueError, r"columns \[0, 72\) of expert 0 do not fall on tiles"),
    ((0.0, 64), TypeError, "expert_offset is 0.0, expected a static integer"),
    (
        (0, 64, np.zeros(136, np.float16)),
        ValueError,
        r"bias has shape \(136,\), expected .*\(64,\)",
    ),
    ((0, 64, np.zeros(64, np.float32)), TypeError, "bias has dtype float32, expected float16"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), LINEAR_ERRORS)
def test_make_expert_linear_errors(arguments, error, message):
    with pytest.raises(error, match="^make_expert_linear: " + message):
        STACK.make_expert_linear(*arguments)


def test_make_expert_linear_refuses_traced_offsets():
    with pytest.raises(TypeError, match="make_expert_linear: expert_offset is .*static integer"):
        jax.jit(lambda offset: STACK.make_expert_linear(offset, 64).expert)(136)


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
    for arguments, message in (
        ((X, *routing, 151), r"prob_m is 151, expected 0 .. 150"),
        ((X[:, :9], *routing), r"x has shape \(150, 9\)"),
        ((X, routing[0], routing[1][:-1], routing[2]), "expert_ids has shape"),
        ((X, *routing[:2], jnp.zeros((2,), jnp.int32)), "num_tokens_past_padded has shape"),
    ):
        with pytest.raises(ValueError, match="^gemm_phase_vllm: " + message):
            STACK.gemm_phase_vllm(*arguments, **call)
