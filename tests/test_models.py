"""Model pieces against NumPy in float64; the model as a pytree; bad input."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import Primitive

from jax_marlin import models
from jax_marlin.data import bundled_checkpoint
from jax_marlin.models import attention, layers
from jax_marlin.models.attention import attend
from jax_marlin.models.decoder_layer import DenseMlp
from jax_marlin.models.loading import read_config
from jax_marlin.models.rope import Rope

CONFIG = json.loads((bundled_checkpoint() / "config.json").read_text())


def rotate_one(head: np.ndarray, position: float, theta: float) -> np.ndarray:
    """Rotary embedding of one head [D], by complex numbers."""
    half = len(head) // 2
    pairs = head[:half] + 1j * head[half:]
    turned = pairs * np.exp(1j * position * theta ** (-2 * np.arange(half) / len(head)))
    return np.concatenate([turned.real, turned.imag])


def test_rms_norm():
    rng = np.random.default_rng(1)
    x, weight = rng.normal(size=(3, 5, 24)), rng.normal(size=24)
    got = layers.rms_norm(jnp.asarray(x, jnp.float32), jnp.asarray(weight, jnp.float32), 1e-3)
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-3) * weight
    np.testing.assert_allclose(got, expected, rtol=2e-6, atol=1e-6)


def test_rms_norm_of_float16_squares_in_float32():
    x = jnp.full((2, 8), 300.0, jnp.float16)  # 300² overflows float16
    got = layers.rms_norm(x, jnp.ones(8, jnp.float16), 1e-6)
    assert got.dtype == jnp.float16 and bool((got == 1).all())


@pytest.mark.parametrize("theta", [10000.0, 1e6])
def test_rotary_embedding_at_near_and_far_positions(theta):
    positions = np.array([0, 1, 7, 4095])
    x = np.random.default_rng(2).normal(size=(2, 4, 3, 16))
    got = Rope(theta)(jnp.asarray(x, jnp.float32), jnp.asarray(positions, jnp.int32))
    expected = np.zeros_like(x)
    for b, t, h in np.ndindex(2, 4, 3):
        expected[b, t, h] = rotate_one(x[b, t, h], float(positions[t]), theta)
    # The float32 angle of position 4095 is off by up to 4095 * 2**-24 * a few.
    np.testing.assert_allclose(got, expected, atol=2e-3)
    np.testing.assert_allclose(got[:, :3], expected[:, :3], atol=2e-6)


def test_grouped_query_attention_is_causal_and_ignores_what_lies_past():
    rng = np.random.default_rng(3)
    batch, seq, capacity, heads, kv_heads, head_dim, start = 2, 3, 9, 6, 2, 8, 4
    q = rng.normal(size=(batch, seq, heads, head_dim))
    k, v = rng.normal(size=(2, batch, kv_heads, capacity, head_dim))
    expected = np.zeros((batch, seq, heads, head_dim))
    for b, t, h in np.ndindex(batch, seq, heads):
        group, seen = h // (heads // kv_heads), start + t + 1
        scores = k[b, group, :seen] @ q[b, t, h] / np.sqrt(head_dim)
        weights = np.exp(scores - scores.max())
        expected[b, t, h] = weights / weights.sum() @ v[b, group, :seen]
    k[:, :, start + seq :] = 1e30  # never written positions of a cache
    q, k, v = (jnp.asarray(a, jnp.float32) for a in (q, k, v))
    got = attend(q, k, v, jnp.int32(start))
    np.testing.assert_allclose(got, expected.reshape(batch, seq, -1), atol=2e-6)


@pytest.mark.parametrize("options", [{}, {"window": 3}, {"sinks": jnp.array([1.0, -2, 0, 3])}])
def test_attention_of_a_prompt_in_blocks(monkeypatch, options):
    q, k, v = (jax.random.normal(jax.random.key(i), (2, 11, n, 8)) for i, n in enumerate((4, 2, 2)))
    k, v = (jnp.swapaxes(a, 1, 2) for a in (k, v))
    whole = attend(q, k, v, None, **options)
    monkeypatch.setattr(attention, "_QUERIES", 4)
    np.testing.assert_allclose(attend(q, k, v, None, **options), whole, atol=1e-6)
    np.testing.assert_allclose(attend(q, k, v, jnp.int32(0), **options), whole, atol=1e-6)


def test_attention_without_cudnn_falls_back(monkeypatch):
    q, k, v = (jnp.ones((1, 128, 2, 8), jnp.bfloat16) for _ in range(3))
    k, v = (jnp.swapaxes(a, 1, 2) for a in (k, v))
    expected, tried = attend(q, k, v, None), []
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    flash = attention._flash
    monkeypatch.setattr(attention, "_flash", lambda *a, **o: (tried.append(1), flash(*a, **o))[1])
    got = jax.jit(lambda q, k, v: attend(q, k, v, None))(q, k, v)
    wide = [a.astype(jnp.float32) for a in (got, expected)]
    np.testing.assert_allclose(wide[0], wide[1], atol=0.01)
    assert tried


def test_only_the_lowered_platform_needs_cudnn(monkeypatch):
    """A program traced where the default device is a GPU still lowers for the CPU."""
    cuda_only = Primitive("cuda_only")
    cuda_only.def_abstract_eval(lambda q: q)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(
        attention, "_flash", lambda q, k, v, scale: cuda_only.bind(q).reshape(1, 128, 16)
    )
    q, k, v = (jnp.ones((1, 128, 2, 8), jnp.bfloat16) for _ in range(3))
    k, v = (jnp.swapaxes(a, 1, 2) for a in (k, v))
    out = jax.jit(lambda q, k, v: attend(q, k, v, None))(q, k, v)
    np.testing.assert_allclose(out.astype(jnp.float32), 1, atol=0.01)


@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_pytorch_tanh"])
def test_dense_mlp(name):
    rng = np.random.default_rng(4)
    gate, up, down = (rng.normal(size=s) / 4 for s in [(24, 40), (24, 40), (40, 24)])
    x = rng.normal(size=(2, 3, 24))
    _, config = read_config(CONFIG | {"hidden_act": name})
    linears = [layers.DenseLinear(jnp.asarray(w.T, jnp.float32)) for w in (gate, up, down)]
    mlp = DenseMlp((linears[0], linears[1]), linears[2], config)
    got = mlp(jnp.asarray(x, jnp.float32))
    g = x @ gate
    erf = np.vectorize(math.erf)
    activated = {
        "silu": g / (1 + np.exp(-g)),
        "gelu": g * (1 + erf(g / np.sqrt(2))) / 2,
        "gelu_pytorch_tanh": g * (1 + np.tanh(np.sqrt(2 / np.pi) * (g + 0.044715 * g**3))) / 2,
    }[name]
    np.testing.assert_allclose(got, activated * (x @ up) @ down, rtol=1e-5, atol=1e-5)


def test_dense_linear_adds_its_bias():
    w = layers.DenseLinear(jnp.ones((6, 4), jnp.bfloat16), jnp.arange(6, dtype=jnp.bfloat16))
    got = w(jnp.ones((2, 3, 4), jnp.bfloat16))
    assert got.dtype == jnp.bfloat16 and got[1, 2].tolist() == [4, 5, 6, 7, 8, 9]


@pytest.fixture(scope="module")
def model() -> models.CausalLM:
    return models.load(bundled_checkpoint(), "float32")


def test_model_is_a_pytree_that_stays_packed(model):
    rebuilt = jax.tree.map(lambda leaf: leaf, model)
    assert rebuilt.config == model.config
    in_file = (bundled_checkpoint() / "model.safetensors").stat().st_size
    # float32 copies of the dense tables (2 * 512 * 256 * 4 bytes) aside, no bigger than the file.
    assert model.nbytes < in_file + 512 * 256 * 4


def test_bad_input_ids(model):
    with pytest.raises(TypeError, match="CausalLM: input_ids have dtype float64"):
        model(np.ones((2, 3)))
    with pytest.raises(ValueError, match=r"CausalLM: input_ids have shape \(3,\)"):
        model([1, 2, 3])
    with pytest.raises(IndexError, match=r"input_ids range over -1\.\.512, expected 0\.\.511"):
        model([[0, -1], [2, 512]])


def test_ids_out_of_range_on_the_device_are_clamped(model):
    got, clamped = model(jnp.array([[3, -7, 900]])), model([[3, 0, 511]])
    np.testing.assert_array_equal(got, clamped)
