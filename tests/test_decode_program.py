"""The compiled decoding loop: what it copies, and how many calls it makes."""

import dataclasses
import re

import extension_stand_in
import jax
import jax.numpy as jnp
import pytest

from jax_marlin.bench.problems import Quantization
from jax_marlin.bench.random_model import random_model
from jax_marlin.models.decoding import Decoded, decode, prefill
from jax_marlin.models.sampling import Sampling
from jax_marlin.ops import ffi_targets

LAYERS = 2  # of the tiny model
BATCH, NEW_TOKENS = 2, 5
NO_STOPS = jnp.zeros((0,), jnp.int32)


def model_of(dtype):
    return random_model("tiny", Quantization(4, 32, jnp.dtype(dtype)))


def traced(model):
    """The loop, traced."""
    cache = model.empty_cache(BATCH, 40)
    tokens = jnp.zeros((BATCH, NEW_TOKENS), jnp.int32)
    start = Decoded(cache, tokens, jnp.int32(1), jnp.zeros((BATCH,), jnp.bool_))
    return decode.trace(model, start, Sampling(), NO_STOPS, jnp.int32(4))


def shape_of(array):
    names = {"float32": "f32", "uint32": "u32"}
    return f"{names[array.dtype.name]}[{','.join(map(str, array.shape))}]"


@pytest.fixture(scope="module")
def compiled():
    """(model, HLO of the compiled loop) on this machine."""
    model = model_of("float32")
    return model, traced(model).lower().compile().as_text()


def test_no_packed_leaf_is_copied(compiled):
    model, text = compiled
    packed = {shape_of(a) for a in jax.tree.leaves(model) if a.dtype == jnp.uint32}
    assert len(packed) == 4  # qkv, o, gate_up, down
    for shape in packed:
        made = re.findall(rf"= {re.escape(shape)}\S* (\S+?)\(", text)
        assert set(made) <= {"parameter", "get-tuple-element"}, f"{shape} is made by {made}"


def test_cache_is_updated_in_place(compiled):
    model, text = compiled
    shape = shape_of(model.empty_cache(BATCH, 40).layers[0][0])
    made = re.findall(rf"= {re.escape(shape)}\S* (\S+?)\(", text)
    assert "parameter" in made
    moved = {"copy", "transpose", "concatenate", "broadcast", "select"}
    assert not moved & set(made), made
    # Every layer's keys and values are given back in the buffers in which they came.
    aliased = re.search(r"input_output_alias=\{(.*?)\}, entry", text)
    assert aliased and aliased[1].count("alias)") >= 2 * LAYERS


@pytest.mark.parametrize("of", ["decode", "prefill"])
def test_calls_of_a_layer(monkeypatch, of):
    """qkv and o, each one product, and one call for the experts; no packed leaf is rearranged."""
    if ffi_targets.cuda_unavailable_reason() is not None:
        extension_stand_in.install(monkeypatch, extension_stand_in.stand_in())
    model = model_of("bfloat16")
    if of == "decode":
        trace = traced(model)
    else:
        ids, cache = jnp.zeros((BATCH, 7), jnp.int32), model.empty_cache(BATCH, 40)
        trace = prefill.trace(model, ids, None, cache, Sampling(), NO_STOPS, NEW_TOKENS)
    text = trace.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@jax_marlin_matmul_v1(") == 2 * LAYERS
    assert text.count("@jax_marlin_moe_ffn_v1(") == LAYERS
    moved = r"stablehlo\.(slice|dynamic_slice|gather|transpose|concatenate)\b.*xui32>"
    assert not re.search(moved, text)


def test_linears_packed_differently_stay_apart():
    model = model_of("float32")
    layer = model.layers[0]
    qkv = layer.self_attn.qkv_proj
    apart = dataclasses.replace(
        layer.self_attn, qkv_proj=(qkv[:, :256], qkv[:, 256:384], qkv[:, 384:])
    )
    x = jax.random.normal(jax.random.key(0), (2, 3, 128))
    together, _ = layer.self_attn(x, None, None)
    assert jnp.abs(apart(x, None, None)[0] - together).max() < 1e-5
