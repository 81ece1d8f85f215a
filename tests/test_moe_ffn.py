"""moe_ffn: a whole layer against the float64 oracle with an error budget carried through it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from moe_layers import LAYERS, Layer, build_layer, expected
from problems import Problem, build, implementation, poison

from jax_marlin.ops import ffi_targets
from jax_marlin.ops.moe_ffn import moe_ffn


@pytest.mark.parametrize("name", LAYERS)
def test_layer(name, backend):
    layer = build_layer(name, **LAYERS[name])
    out = jax.jit(moe_ffn, static_argnames="implementation")(
        layer.x, *layer.routes, *layer.stacks(),
        implementation=implementation(backend, layer.x.dtype.name),
    )  # fmt: skip
    assert out.dtype == layer.x.dtype
    oracle.assert_within(out, *expected(layer))


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "swiglu_clamped"])
@pytest.mark.parametrize("weights_on_input", [False, True])
def test_activation(activation, weights_on_input):
    """x is scaled so that gates and ups pass the clamps of swiglu on both sides."""
    layer = build_layer(activation, dtype="float32", bias=True, k=128, intermediate=128)
    x = 8 * layer.x
    z = oracle.routed_rows(x, layer.gate_up.weights, layer.gate_up.topk_ids, layer.gate_up.bias)
    assert z.max() > 7 > -7 > z.min()
    out = moe_ffn(
        x, *layer.routes, *layer.stacks(),
        activation=activation, weights_on_input=weights_on_input,
    )  # fmt: skip
    oracle.assert_within(out, *expected(layer, activation, weights_on_input=weights_on_input, x=x))


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "swiglu_clamped"])
@pytest.mark.parametrize("weights_on_input", [False, True])
@pytest.mark.parametrize("m", [1, 9])
def test_activation_in_one_call(activation, weights_on_input, m, backend):
    layer = build_layer(f"{activation}_{m}", bias=True, k=128, intermediate=128, m=m)
    x = 4 * layer.x
    out = moe_ffn(
        x, *layer.routes, *layer.stacks(), activation=activation,
        weights_on_input=weights_on_input, implementation=implementation(backend, "float16"),
    )  # fmt: skip
    oracle.assert_within(out, *expected(layer, activation, weights_on_input=weights_on_input, x=x))


@pytest.mark.parametrize("activation", ["silu", "gelu", "swiglu_clamped"])
def test_activation_of_blocks_of_256(activation, backend):
    """Gate and up are halves of a tile there, and meet in shared memory."""
    layer = build_layer(
        f"{activation}_256", bias=True, k=32, intermediate=2048, m=520, top_k=1, num_experts=1
    )
    x = 4 * layer.x
    out = moe_ffn(
        x, *layer.routes, *layer.stacks(), activation=activation, weights_on_input=True,
        implementation=implementation(backend, "float16"),
    )  # fmt: skip
    oracle.assert_within(out, *expected(layer, activation, weights_on_input=True, x=x))


def test_weights_on_input_differ_from_weights_on_output():
    layer = build_layer("llama4", dtype="float32", top_k=1, bias=True)
    on_input, on_output = (
        moe_ffn(layer.x, *layer.routes, *layer.stacks(), weights_on_input=flag)
        for flag in (True, False)
    )
    assert float(jnp.abs(on_input - on_output).min()) > 1e-5


def test_gate_and_up_as_a_pair_with_their_own_act_order(backend):
    """The pair computes what one stack of the joined columns would, had it one permutation."""
    fields = {"g_idx": "per_expert", "bias": True, "k": 96, "group_size": 32, "num_experts": 5}
    gate = build(Problem("gate", n=72, m=7, top_k=3, **fields))
    up = build(Problem("up", n=72, **fields))
    down = build_layer("pair_down").down
    assert gate.bias is not None and up.bias is not None
    joined = dataclasses.replace(
        gate,
        weights=np.concatenate([gate.weights, up.weights], axis=2),
        bias=np.concatenate([gate.bias, up.bias], axis=1),
    )
    layer = Layer(joined, down)
    out = moe_ffn(
        layer.x, *layer.routes, (gate.stack(), up.stack()), down.stack(),
        implementation=implementation(backend, "float16"),
    )  # fmt: skip
    oracle.assert_within(out, *expected(layer))


@pytest.mark.parametrize("fields", [{"m": 9}, {"m": 1, "top_k": 4, "intermediate": 96}])
@pytest.mark.parametrize("wild", [-1, 5, -(2**31), 2**31 - 1])
def test_wild_ids_of_the_device_contribute_nothing(wild, fields, backend):
    """Neither their weights (NaN) nor unused experts (NaN scales) nor unwritten rows may leak."""
    layer = build_layer("wild", **fields)
    jnp.full(2**20, jnp.nan).block_until_ready()  # what the call's own buffers may be made of
    ids = np.where(layer.gate_up.topk_ids < 2, wild, layer.gate_up.topk_ids).astype(np.int32)
    weights = jnp.where(ids == wild, jnp.nan, layer.routes[1])
    used = [e for e in range(5) if (ids == e).any()]
    gate_up, down = (poison(stack, used) for stack in layer.stacks())
    out = moe_ffn(
        layer.x, jnp.asarray(ids), weights, gate_up, down,
        implementation=implementation(backend, "float16"),
    )  # fmt: skip
    oracle.assert_within(out, *expected(layer, ids=ids))


def test_leading_axes():
    layer = build_layer("lead", m=6, dtype="float32")
    ids, weights = layer.routes
    flat = moe_ffn(layer.x, ids, weights, *layer.stacks())
    for lead in ((2, 3), (1, 6, 1)):
        x, i, w = (a.reshape(*lead, a.shape[-1]) for a in (layer.x, ids, weights))
        out = moe_ffn(x, i, w, *layer.stacks())
        assert out.shape == (*lead, 136)
        np.testing.assert_array_equal(out.reshape(6, 136), flat)
    one = moe_ffn(layer.x[4], ids[4], weights[4], *layer.stacks())
    np.testing.assert_allclose(one, flat[4], rtol=1e-5, atol=1e-5)


def test_vmap_folds_a_batch_of_tokens_into_one_layer():
    layer = build_layer("fold", m=6, dtype="float32")
    args = [a.reshape(2, 3, a.shape[-1]) for a in (layer.x, *layer.routes)]
    batched = jax.vmap(moe_ffn, in_axes=(0, 0, 0, None, None))
    out = jax.jit(batched)(*args, *layer.stacks())
    y, budget = expected(layer)
    oracle.assert_within(out.reshape(6, 136), y, budget)
    assert "while" not in str(jax.make_jaxpr(batched)(*args, *layer.stacks()))
    same_routes = jax.vmap(moe_ffn, in_axes=(0, None, None, None, None))(
        jnp.stack([layer.x, layer.x]), *layer.routes, *layer.stacks()
    )
    oracle.assert_within(same_routes[1], y, budget)


def test_vmap_over_nothing():
    layer = build_layer("vmapped_nothing", dtype="float32")
    x, ids, weights = (jnp.asarray(a)[None][:0] for a in (layer.x, *layer.routes))
    batched = jax.vmap(moe_ffn, in_axes=(0, 0, 0, None, None))
    assert batched(x, ids, weights, *layer.stacks()).shape == (0, len(layer.x), 136)


def test_vmap_over_layers():
    layers = [build_layer(f"vmapped_{i}", dtype="float32") for i in range(2)]
    stacks = [
        jax.tree.map(lambda *a: jnp.stack(a), *s)
        for s in zip(*[l.stacks() for l in layers], strict=True)
    ]
    first = layers[0]
    out = jax.vmap(moe_ffn, in_axes=(None, None, None, 0, 0))(first.x, *first.routes, *stacks)
    for i, layer in enumerate(layers):
        mixed = Layer(
            dataclasses.replace(
                layer.gate_up,
                topk_ids=first.gate_up.topk_ids,
                topk_weights=first.gate_up.topk_weights,
            ),
            layer.down,
        )
        oracle.assert_within(out[i], *expected(mixed, x=first.x))


FEW_ROUTES = {"m": 1, "top_k": 8, "num_experts": 9, "k": 512, "intermediate": 768, "n": 512}


@pytest.mark.parametrize("fields", [{"m": 37}, FEW_ROUTES])
def test_same_inputs_same_bits(fields, backend):
    layer = build_layer("bits", dtype="bfloat16", **fields)
    layer_fn, stacks = jax.jit(moe_ffn, static_argnames="implementation"), layer.stacks()
    first, *others = (
        layer_fn(layer.x, *layer.routes, *stacks, implementation=backend) for _ in range(20)
    )
    for other in others:
        np.testing.assert_array_equal(first, other)


@pytest.mark.cuda
def test_calls_that_follow_each_other_have_the_bits_of_calls_alone():
    """Kernels start before the one before them ends: none may read what that has yet to write."""
    layer = build_layer("row", dtype="bfloat16", **FEW_ROUTES)
    ids, weights = layer.routes
    calls = [(layer.x * (1 + i / 8), (ids + i) % 9, weights) for i in range(24)]

    @jax.jit
    def run(calls, stacks):
        return [moe_ffn(*call, *stacks, implementation="cuda") for call in calls]

    alone = [jax.block_until_ready(run([call], layer.stacks())[0]) for call in calls]
    for _ in range(10):
        np.testing.assert_array_equal(run(calls, layer.stacks()), alone)


def test_narrow_ids_and_half_precision_weights_are_accepted():
    layer = build_layer("narrow", dtype="float32")
    ids, weights = layer.routes
    rounded = weights.astype(jnp.bfloat16)
    layer.gate_up.topk_weights[:] = rounded.astype(jnp.float32)
    out = moe_ffn(layer.x, ids.astype(jnp.uint8), rounded, *layer.stacks())
    oracle.assert_within(out, *expected(layer))


def test_cuda_lowering_calls_align_and_two_products(monkeypatch):
    monkeypatch.setattr(ffi_targets, "cuda_unavailable_reason", lambda: None)
    monkeypatch.setattr(ffi_targets, "ensure_registered", lambda: None)
    monkeypatch.setattr(ffi_targets, "scratch_bytes", lambda *_: 128)
    layer = build_layer("lowered")
    traced = jax.jit(moe_ffn).trace(layer.x, *layer.routes, *layer.stacks())
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@jax_marlin_moe_align_block_size_v1") == 1
    assert text.count("@jax_marlin_moe_matmul_v1") == 2
