"""The Rust traits' loaders, accessors and column views, each under its own name."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jaxprs import users_of_packed
from problems import Problem, build

import jax_marlin as jm

P = Problem("traits", m=150, k=96, n=136, group_size=32, num_experts=4, zeros="v1", top_k=2)


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
        assert case.bias is not None
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


STACK = build(P).stack()


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
    assert case.bias is not None
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
    assert users_of_packed(use, stack, x) == ["jax_marlin_matmul_v1"]


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
    with pytest.raises(TypeError, match=r"make_expert_linear: expert_offset is .*static integer"):
        jax.jit(lambda offset: STACK.make_expert_linear(offset, 64).expert)(136)
