"""Unquantized expert stacks through the ops: the float64 oracle, routing, jit, vmap, and errors."""

import dataclasses

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from moe_layers import build_layer, expected

import jax_marlin as jm

E, H, INNER, TOKENS, TOP_K = 5, 48, 40, 9, 3
DTYPES = ["float32", "float16", "bfloat16"]


def arrays(seed, *shape, dtype="float32"):
    values = np.random.default_rng(seed).standard_normal(shape) / shape[-2 if len(shape) > 2 else 0]
    return jnp.asarray(values, dtype)


def stack(seed, k, n, dtype="float32", *, bias=True):
    weight = np.random.default_rng(seed).standard_normal((E, k, n)) / np.sqrt(k)
    return jm.DenseExpertStack(
        jnp.asarray(weight, dtype),
        jnp.asarray(np.random.default_rng(seed + 1).standard_normal((E, n)), dtype)
        if bias
        else None,
    )


def wide(a):
    return np.asarray(a.astype(jnp.float32)).astype(np.float64)


def routes():
    """Ids with repeats, one below and one past the experts; expert 3 gets nothing."""
    rng = np.random.default_rng(7)
    ids = rng.choice([0, 1, 2, 4], (TOKENS, TOP_K)).astype(np.int32)
    ids[2, 1], ids[5, 0] = -1, E + 3
    return jnp.asarray(ids), jnp.asarray(rng.uniform(0.1, 1, (TOKENS, TOP_K)), jnp.float32)


def dense_layer(name, **fields):
    """A layer of problems' weights rounded to their dtype: its cases, and its two dense stacks."""
    layer, stacks = build_layer(name, bias=True, **fields), []
    for which in ("gate_up", "down"):
        case = getattr(layer, which)
        dense = jm.DenseExpertStack(jnp.asarray(case.weights, case.x.dtype), jnp.asarray(case.bias))
        setattr(layer, which, dataclasses.replace(case, weights=wide(dense.weight)))
        stacks.append(dense)
    return layer, stacks


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pair", [False, True], ids=["gate_up", "gate_and_up"])
@pytest.mark.parametrize("weights_on_input", [False, True], ids=["on_output", "on_input"])
def test_moe_ffn(dtype, pair, weights_on_input):
    layer, (gate_up, down) = dense_layer("dense", dtype=dtype, m=23, routing="skips")
    given = gate_up
    if pair:
        given = tuple(
            jax.tree.map(lambda leaf, part=part: leaf[..., part], gate_up)
            for part in (slice(72), slice(72, None))
        )
    run = jax.jit(
        lambda *a: jm.moe_ffn(*a, activation="swiglu_clamped", weights_on_input=weights_on_input)
    )
    got = run(layer.x, *layer.routes, given, down)
    assert got.dtype == dtype
    oracle.assert_within(got, *expected(layer, "swiglu_clamped", weights_on_input=weights_on_input))


def test_ids_outside_the_experts_contribute_nothing():
    x, gate_up, down = arrays(0, TOKENS, H), stack(1, H, 2 * INNER), stack(3, INNER, H)
    for outside in (-1, E, 2**31 - 1):
        ids = jnp.full((TOKENS, TOP_K), outside, jnp.int32)
        out = jm.moe_ffn(x, ids, jnp.ones((TOKENS, TOP_K)), gate_up, down)
        np.testing.assert_array_equal(out, 0.0)


def test_no_tokens():
    out = jm.moe_ffn(
        jnp.zeros((0, H)), jnp.zeros((0, 2), jnp.int32), jnp.zeros((0, 2)),
        stack(1, H, 2 * INNER), stack(3, INNER, H),
    )  # fmt: skip
    assert out.shape == (0, H)


def test_same_as_packed_experts_of_the_same_weights():
    x, (ids, weights) = arrays(0, TOKENS, 64), routes()
    packed = [jm.quantize(stack(s, *kn).weight, group_size=32) for s, kn in
              [(1, (64, 192)), (2, (96, 64))]]  # fmt: skip
    dense = [jm.DenseExpertStack(p.dequantize()) for p in packed]
    same = jm.moe_ffn(x, ids, weights, *packed)
    mixed = jm.moe_ffn(x, ids, weights, packed[0], dense[1])
    np.testing.assert_allclose(jm.moe_ffn(x, ids, weights, *dense), same, atol=1e-6)
    np.testing.assert_allclose(mixed, same, atol=1e-6)


def test_unused_experts_are_not_read():
    """NaN in an expert without rows must not reach the result."""
    x, (ids, weights) = arrays(0, TOKENS, H), routes()
    gate_up, down = stack(1, H, 2 * INNER), stack(3, INNER, H)
    poisoned = jax.tree.map(lambda leaf: leaf.at[3].set(jnp.nan), (gate_up, down))
    np.testing.assert_array_equal(
        jm.moe_ffn(x, ids, weights, *poisoned), jm.moe_ffn(x, ids, weights, gate_up, down)
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_ragged_dot(dtype):
    x, w = arrays(0, 11, H, dtype=dtype) * 8, stack(1, H, 72, dtype)
    sizes = jnp.array([3, 0, 4, 1, 1])
    got = jax.jit(jm.ragged_dot)(x, w, sizes)
    rows = np.repeat([0, 2, 3, 4, -1], [3, 4, 1, 1, 2])[:, None]
    weights, biases = wide(w.weight), wide(w.bias)
    exact = oracle.routed_rows(wide(x), weights, rows, biases)
    budget = [
        oracle.matmul_budget(wide(x), weight, x.dtype, bias)
        for weight, bias in zip(weights, biases, strict=True)
    ]
    budget = np.stack([budget[e][i] for i, e in enumerate(rows[:, 0])])
    oracle.assert_within(got, exact, budget)
    assert not np.asarray(got, np.float32)[9:].any()
    assert jm.ragged_dot(x, w, sizes, preferred_element_type=jnp.float32).dtype == jnp.float32
    shifted = jm.ragged_dot(x, w, jnp.array([2, 3]), group_offset=1)
    np.testing.assert_array_equal(
        shifted[2:5], jm.ragged_dot(x[2:5], w, jnp.array([3, 0, 0, 0, 0]))
    )


def test_vmap_and_scan_over_layers():
    x, (ids, weights) = jnp.stack([arrays(s, TOKENS, H) for s in (0, 5)]), routes()
    layers = [(stack(s, H, 2 * INNER), stack(s + 2, INNER, H)) for s in (1, 5)]
    one = jax.vmap(lambda x: jm.moe_ffn(x, ids, weights, *layers[0]))(x)
    np.testing.assert_allclose(one[1], jm.moe_ffn(x[1], ids, weights, *layers[0]), atol=1e-6)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    both = jax.vmap(lambda x, layer: jm.moe_ffn(x, ids, weights, *layer))(x, stacked)
    np.testing.assert_allclose(both[1], jm.moe_ffn(x[1], ids, weights, *layers[1]), atol=1e-6)
    out, _ = jax.lax.scan(
        lambda x, layer: (x + jm.moe_ffn(x, ids, weights, *layer), None), x[0], stacked
    )
    first = x[0] + jm.moe_ffn(x[0], ids, weights, *layers[0])
    np.testing.assert_allclose(out, first + jm.moe_ffn(first, ids, weights, *layers[1]), atol=1e-5)


def test_pytree_properties():
    w = stack(1, H, 72, "bfloat16")
    assert (w.num_experts, w.k, w.n_per_expert, w.shape, w.ndim, len(w)) == (
        5,
        48,
        72,
        (5, 48, 72),
        3,
        5,
    )
    assert w.nbytes == 2 * 5 * (48 * 72 + 72)
    assert repr(w) == "DenseExpertStack(E=5, K=48, N=72, bfloat16, bias)"
    one = jax.tree.map(lambda leaf: leaf[2], w)
    assert one.is_single and one.shape == (48, 72) and not w.is_single and one.num_experts == 1
    assert repr(one) == "DenseExpertStack(K=48, N=72, bfloat16, bias)"
    assert w.astype(jnp.float32).dtype == w.dequantize(jnp.float32).dtype == jnp.float32
    assert "DenseExpertStack" in repr(jax.tree.structure(w).unflatten([None, None]))
    with pytest.raises(TypeError, match=r"DenseExpertStack\.astype: dtype is int8"):
        w.astype(jnp.int8)


X, IDS, WEIGHTS = jnp.ones((TOKENS, H)), jnp.zeros((TOKENS, 1), jnp.int32), jnp.ones((TOKENS, 1))
GATE_UP, DOWN = stack(1, H, 2 * INNER), stack(3, INNER, H)
ONE = jax.tree.map(lambda leaf: leaf[0], DOWN)
WRONG = jm.DenseExpertStack(DOWN.weight, jnp.zeros((E, 3)))


@pytest.mark.parametrize(
    ("x", "down", "options", "error", "message"),
    [
        (X, DOWN, {"implementation": "cuda"}, NotImplementedError, "moe_ffn: .*DenseExpertStack"),
        (X.astype(jnp.bfloat16), DOWN, {}, TypeError, "x has dtype bfloat16"),
        (X, DOWN.astype(jnp.float16), {}, TypeError, "gate_up computes in float32 and down in"),
        (X, ONE, {}, ValueError, r"weight has shape \(40, 48\), expected 3 axes \(E, K, N\)"),
        (X, WRONG, {}, ValueError, r"bias has shape \(5, 3\), expected \(E, N\) = \(5, 48\)"),
        (X, stack(3, H, H), {}, ValueError, r"gate_up has shape \(5, 48, 80\), expected"),
    ],
)
def test_bad_calls_of_moe_ffn(x, down, options, error, message):
    with pytest.raises(error, match=message):
        jm.moe_ffn(x, IDS, WEIGHTS, GATE_UP, down, **options)


def test_symbolic_number_of_tokens_and_lowering_for_cuda():
    layer = jax.jit(lambda x, ids, weights: jm.moe_ffn(x, ids, weights, GATE_UP, DOWN))
    (tokens,) = jax.export.symbolic_shape("tokens")
    shapes = [((tokens, H), jnp.float32), ((tokens, 1), jnp.int32), ((tokens, 1), jnp.float32)]
    exported = jax.export.export(layer)(*(jax.ShapeDtypeStruct(*shape) for shape in shapes))
    assert exported.out_avals[0].shape == (tokens, H)
    text = layer.trace(X, IDS, WEIGHTS).lower(lowering_platforms=("cuda",)).as_text()
    assert "jax_marlin_moe_matmul" not in text  # no kernel reads these weights


def test_bad_calls_of_the_other_ops():
    with pytest.raises(NotImplementedError, match=r"ragged_dot: implementation='cuda'.*quantize"):
        jm.ragged_dot(X, GATE_UP, [TOKENS, 0, 0, 0, 0], implementation="cuda")
    with pytest.raises(TypeError, match="ragged_dot: stack is DenseExpertStack, expected a Marlin"):
        jm.ragged_dot(X, ONE, [TOKENS])
    with pytest.raises(ValueError, match=r"expected \[T, 48\]|expected \[\.\.\., 48\]"):
        jm.ragged_dot(X[:, 1:], GATE_UP, [TOKENS, 0, 0, 0, 0])
