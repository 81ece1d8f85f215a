"""Reverse mode of moe_ffn against float64, with errors carried through both products."""

import dataclasses
from typing import Any

import gradient_oracle
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from moe_layers import LAYERS, ORACLE_NAMES, Layer, build_layer
from problems import Problem, build, implementation, poison

from jax_marlin.dense_stack import DenseExpertStack
from jax_marlin.ops.moe_ffn import moe_ffn


def wide(a) -> np.ndarray:
    return np.asarray(a).astype(np.float64)


def gradients(layer: Layer, stacks, g, *, x=None, ids=None, weights=None, **options):
    """Of x, topk_weights, biases of gate_up (a tuple) and bias of down, by a jitted pull-back."""
    gate_up, down = stacks
    is_pair = isinstance(gate_up, tuple)
    halves = gate_up if is_pair else (gate_up,)

    def function(x, weights, biases, down_bias):
        *new, new_down = (
            dataclasses.replace(stack, bias=bias)
            for stack, bias in zip((*halves, down), (*biases, down_bias), strict=True)
        )
        new_halves = tuple(new) if is_pair else new[0]
        own_ids = layer.routes[0] if ids is None else ids
        return moe_ffn(x, own_ids, weights, new_halves, new_down, **options)

    x = layer.x if x is None else x
    weights = layer.routes[1] if weights is None else weights
    _, pull_back = jax.vjp(function, x, weights, tuple(h.bias for h in halves), down.bias)
    return jax.jit(pull_back)(g)


def check(layer: Layer, got, g, *, activation="silu", weights_on_input=False, x=None, ids=None):
    gate_up, down = layer.gate_up, layer.down
    exact = gradient_oracle.moe_ffn(
        wide(g), gate_up.x if x is None else x, gate_up.topk_ids if ids is None else ids,
        gate_up.topk_weights, gate_up.weights, down.weights, gate_up.x.dtype,
        activation=ORACLE_NAMES.get(activation, activation), weights_on_input=weights_on_input,
        gate_up_bias=gate_up.bias, down_bias=down.bias,
    )  # fmt: skip
    d_x, d_weights, d_first, d_down = got
    assert d_x.dtype == gate_up.x.dtype and d_weights.dtype == jnp.float32
    oracle.assert_within(d_x, *exact.x, what="x")
    oracle.assert_within(d_weights, *exact.weights, what="topk_weights")
    if gate_up.bias is not None:
        d_first = np.concatenate([wide(d) for d in d_first], axis=1)
        oracle.assert_within(d_first, *exact.gate_up_bias, what="gate_up.bias")
        oracle.assert_within(d_down, *exact.down_bias, what="down.bias")


def cotangent(layer: Layer):
    shape = (len(layer.gate_up.x), layer.down.weights.shape[2])
    return jnp.asarray(np.random.default_rng(6).standard_normal(shape), layer.gate_up.x.dtype)


@pytest.mark.parametrize("name", LAYERS)
def test_layer(name, backend):
    layer = build_layer(name, **LAYERS[name])
    g, which = cotangent(layer), implementation(backend, layer.gate_up.x.dtype.name)
    check(layer, gradients(layer, layer.stacks(), g, implementation=which), g)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "swiglu_clamped"])
@pytest.mark.parametrize("weights_on_input", [False, True], ids=["on_output", "on_input"])
def test_activation(activation, weights_on_input):
    """x is scaled so that gates and ups pass the clamps of swiglu on both sides."""
    layer = build_layer(activation, dtype="float32", bias=True, k=128, intermediate=128)
    x = 8 * layer.x
    z = oracle.routed_rows(x, layer.gate_up.weights, layer.gate_up.topk_ids, layer.gate_up.bias)
    assert z.max() > 7 > -7 > z.min()
    options: Any = {"activation": activation, "weights_on_input": weights_on_input}
    g = cotangent(layer)
    check(layer, gradients(layer, layer.stacks(), g, x=x, **options), g, x=x, **options)


@pytest.mark.parametrize("weights_on_input", [False, True], ids=["on_output", "on_input"])
def test_gate_and_up_as_a_pair_with_their_own_act_order(weights_on_input, backend):
    fields = {"g_idx": "per_expert", "bias": True, "k": 96, "group_size": 32, "num_experts": 5}
    gate = build(Problem("gate", n=72, m=7, top_k=3, **fields))
    up = build(Problem("up", n=72, **fields))
    assert gate.bias is not None and up.bias is not None
    joined = dataclasses.replace(
        gate,
        weights=np.concatenate([gate.weights, up.weights], axis=2),
        bias=np.concatenate([gate.bias, up.bias], axis=1),
    )
    layer = Layer(joined, build_layer("pair_down", bias=True).down)
    stacks, g = ((gate.stack(), up.stack()), layer.down.stack()), cotangent(layer)
    options: Any = {"weights_on_input": weights_on_input}
    which = implementation(backend, "float16")
    check(layer, gradients(layer, stacks, g, implementation=which, **options), g, **options)


@pytest.mark.parametrize("wild", [-1, 5, -(2**31), 2**31 - 1])
@pytest.mark.parametrize("weights_on_input", [False, True], ids=["on_output", "on_input"])
def test_wild_ids_and_what_belongs_to_them(wild, weights_on_input, backend):
    """NaN in their weights, in unused experts and in tokens without an expert reaches nothing."""
    layer = build_layer("wild", m=9, bias=True)
    ids = np.where(layer.gate_up.topk_ids < 2, wild, layer.gate_up.topk_ids).astype(np.int32)
    ids[4] = wild
    weights = jnp.where(ids == wild, jnp.nan, layer.routes[1])
    used = [e for e in range(5) if (ids == e).any()]
    gate_up, down = (poison(stack, used) for stack in layer.stacks())
    x = layer.x.at[4].set(jnp.nan)
    g = cotangent(layer)
    got = gradients(
        layer, (gate_up, down), g, x=x, ids=jnp.asarray(ids), weights=weights,
        weights_on_input=weights_on_input, implementation=implementation(backend, "float16"),
    )  # fmt: skip
    check(layer, got, g, ids=ids, weights_on_input=weights_on_input)
    assert not got[0][4].any() and not got[1][4].any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("weights_on_input", [False, True], ids=["on_output", "on_input"])
@pytest.mark.parametrize("which", ["both", "gate_up", "down"])
def test_dense_stacks(which, weights_on_input, dtype):
    """Alone or beside a packed one; weights of dense experts have gradients, as in plain JAX."""
    layer = build_layer("dense", dtype=dtype, bias=True, m=11, routing="skips")
    stacks = []
    for name, packed in zip(("gate_up", "down"), layer.stacks(), strict=True):
        case = getattr(layer, name)
        dense = DenseExpertStack(jnp.asarray(case.weights, dtype), packed.bias)
        stacks.append(packed if which not in (name, "both") else dense)
        case = dataclasses.replace(case, weights=wide(stacks[-1].dequantize(jnp.float32)))
        setattr(layer, name, case)
    g, options = cotangent(layer), {"weights_on_input": weights_on_input}
    check(layer, gradients(layer, tuple(stacks), g, **options), g, **options)


@pytest.mark.parametrize("weights_on_input", [False, True], ids=["on_output", "on_input"])
def test_weights_of_dense_stacks(weights_on_input):
    """Against jax.grad of the layer written out densely in float32."""
    layer = build_layer("dense_weights", dtype="float32", bias=True, m=11, routing="skips")
    stacks = layer.dense_stacks()
    ids, weights = layer.routes
    g = cotangent(layer)

    def plain(gate_up, down):
        def product(rows, stack, e):
            y = jnp.einsum("k,kn->n", rows, stack.weight[e], precision="highest")
            return y, stack.bias[e]

        def slot(x, e, w):
            w_in, w_out = (w, 1.0) if weights_on_input else (1.0, w)
            y, bias = product(x, gate_up, e)
            gate, up = jnp.split(w_in * y + bias, 2)
            y, bias = product(jax.nn.silu(gate) * up, down, e)
            return jnp.where((e >= 0) & (e < 5), w_out * (y + bias), 0.0)

        slots = jax.vmap(jax.vmap(slot, (None, 0, 0)))(layer.x, ids, weights)
        return (slots.sum(axis=1) * g).sum()

    def ours(gate_up, down):
        out = moe_ffn(layer.x, ids, weights, gate_up, down, weights_on_input=weights_on_input)
        return (out * g).sum()

    got, expected = (jax.jit(jax.grad(f, (0, 1)))(*stacks) for f in (ours, plain))
    for actual, exact in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
        np.testing.assert_allclose(actual, exact, rtol=2e-5, atol=2e-5 * np.abs(exact).max())


def test_router_learns_through_route():
    """topk_weights' gradient reaches the router's logits as it does in a dense float32 layer."""
    import jax_marlin as jm

    layer = build_layer("router", dtype="float32", m=6)
    stacks = layer.stacks()
    dense = tuple(DenseExpertStack(stack.dequantize(), stack.bias) for stack in stacks)
    logits = jnp.asarray(np.random.default_rng(8).standard_normal((6, 5)), jnp.float32)

    def loss(logits, stacks):
        weights, ids = jm.route(logits, 2)
        return (moe_ffn(layer.x, ids, weights, *stacks) ** 2).sum()

    packed, exact = (jax.grad(loss)(logits, s) for s in (stacks, dense))
    assert float(jnp.abs(exact).max()) > 1e-4
    np.testing.assert_allclose(packed, exact, rtol=1e-4, atol=1e-5 * float(jnp.abs(exact).max()))
