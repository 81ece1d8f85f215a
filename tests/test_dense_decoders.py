"""Llama and Qwen3 against a decoder in float64 NumPy: packed and dense linears, ropes, refusals."""

import json

import decoder_oracle as oracle
import jax
import ml_dtypes
import numpy as np
import pytest
from synthetic_checkpoints import quantization, write
from synthetic_models import CONFIG, HEAD_DIM, HEADS, HIDDEN, IDS, LAYERS, Modules

from jax_marlin import models
from jax_marlin.models.loading import read_config

INNER, THETA, EPS = 96, 1e4, 1e-6
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": THETA, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": THETA, "factor": 4.0, "original_max_position_embeddings": 16,
}  # fmt: skip
PLAIN = CONFIG["rope_parameters"]
LLAMA = CONFIG | {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "intermediate_size": INNER,
}  # fmt: skip
QWEN3 = LLAMA | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}


def modules(*, packed=True, head_norms=False, bias=False, tied=False):
    made = Modules(seed=5, qkv_bias=bias)
    rng = np.random.default_rng(6)
    for i in range(LAYERS):
        prefix = f"model.layers.{i}"
        for name, k, n in [
            ("gate_proj", HIDDEN, INNER), ("up_proj", HIDDEN, INNER), ("down_proj", INNER, HIDDEN),
        ]:  # fmt: skip
            if packed:
                made.packed(f"{prefix}.mlp.{name}", k, n, bias=bias)
            else:
                made.dense(f"{prefix}.mlp.{name}", k, n)
        for name in ("q_norm", "k_norm") if head_norms else ():
            weight = rng.standard_normal(HEAD_DIM).astype(np.float16)
            made.parts[f"{prefix}.self_attn.{name}"] = {"weight": weight}
    if tied:
        del made.parts["lm_head"]
    return made


def decode(made, ids, rope=PLAIN):
    """float64 logits [seq, vocab] of one sequence."""

    def linear(x, name):
        bias = made.parts[name].get("bias")
        return x @ made.weights[name] + (0 if bias is None else bias.astype(np.float64))

    def norm(x, name):
        return oracle.rms_norm(x, made.parts[name]["weight"], EPS)

    def heads(x, layer, name):
        """[seq, HEADS, HEAD_DIM]; a head of keys or values is repeated for its queries."""
        out = linear(x, f"{layer}.self_attn.{name}_proj").reshape(len(ids), -1, HEAD_DIM)
        if f"{layer}.self_attn.{name}_norm" in made.parts:
            out = norm(out, f"{layer}.self_attn.{name}_norm")
        return np.repeat(out, HEADS // out.shape[1], axis=1)

    embedding = made.parts["model.embed_tokens"]["weight"].astype(np.float64)
    radians, factor = oracle.frequencies(HEAD_DIM, THETA, rope)
    x = embedding[ids]
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        h = norm(x, f"{layer}.input_layernorm")
        q, k, v = (heads(h, layer, name) for name in "qkv")
        for t, head in np.ndindex(len(ids), HEADS):
            q[t, head] = oracle.turned(q[t, head], t, radians, factor)
            k[t, head] = oracle.turned(k[t, head], t, radians, factor)
        out = oracle.attention(q, k, v, scale=HEAD_DIM**-0.5)
        x = x + linear(out, f"{layer}.self_attn.o_proj")
        h = norm(x, f"{layer}.post_attention_layernorm")
        gate, up = (linear(h, f"{layer}.mlp.{name}_proj") for name in ("gate", "up"))
        x = x + linear(oracle.silu(gate) * up, f"{layer}.mlp.down_proj")
    x = norm(x, "model.norm")
    return linear(x, "lm_head") if "lm_head" in made.parts else x @ embedding.T


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (LLAMA, {}),
        (LLAMA | {"rope_parameters": LLAMA3}, {}),
        (LLAMA | {"tie_word_embeddings": True}, {"tied": True, "packed": False}),
        (LLAMA | {"attention_bias": False, "mlp_bias": True}, {"bias": True}),
        (QWEN3, {"head_norms": True}),
        (QWEN3 | {"rope_parameters": YARN}, {"head_norms": True}),
        (QWEN3 | {"tie_word_embeddings": True}, {"head_norms": True, "tied": True}),
    ],
    ids=[
        "llama",
        "llama3-rope",
        "llama-tied-dense-mlp",
        "llama-bias",
        "qwen3",
        "qwen3-yarn",
        "qwen3-tied",
    ],
)
def test_logits(tmp_path, config, options):
    made = modules(**options)
    write(tmp_path, made.parts, quantization(sym=False), config=config)
    logits = np.asarray(models.load(tmp_path)(IDS))
    for row, ids in zip(logits, IDS, strict=True):
        expected = decode(made, ids, config["rope_parameters"])
        np.testing.assert_allclose(row, expected, atol=2e-5 * np.abs(expected).max())


def test_checkpoint_without_any_quantized_module(tmp_path):
    made = modules()
    dense = {
        name: {"weight": np.ascontiguousarray(made.weights[name].T, np.float32)}
        if "qweight" in parts
        else parts
        for name, parts in made.parts.items()
    }
    write(tmp_path, dense, config=LLAMA)
    logits = np.asarray(models.load(tmp_path)(IDS))[0]
    expected = decode(made, IDS[0])
    np.testing.assert_allclose(logits, expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sixteen_bits(tmp_path, dtype):
    write(tmp_path, modules().parts, quantization(sym=False), config=LLAMA)
    logits = models.load(tmp_path, dtype)(IDS)
    expected = np.stack([decode(modules(), ids) for ids in IDS])
    limit = 64 * float(ml_dtypes.finfo(dtype).eps) * np.abs(expected).max()
    np.testing.assert_allclose(logits, expected, atol=limit)


def test_generate_is_greedy_without_a_cache(tmp_path):
    config = QWEN3 | {"rope_scaling": LLAMA3, "rope_parameters": None, "rope_theta": THETA}
    write(tmp_path, modules(head_norms=True).parts, quantization(sym=False), config=config)
    model = models.load(tmp_path)
    tokens = np.asarray(models.generate(model, IDS, 4))
    logits = jax.jit(lambda model, ids: model(ids))(model, np.concatenate([IDS, tokens], axis=1))
    np.testing.assert_array_equal(tokens, np.asarray(logits)[:, 5:-1].argmax(axis=-1))


def test_old_and_new_keys_mean_the_same():
    old = LLAMA | {"rope_parameters": None, "rope_theta": THETA, "rope_scaling": LLAMA3}
    assert read_config(old) == read_config(LLAMA | {"rope_parameters": LLAMA3})


@pytest.mark.parametrize(
    ("base", "changes", "error", "message"),
    [
        (LLAMA, {"rope_parameters": LLAMA3 | {"factor": None}}, ValueError, "factor None"),
        (LLAMA, {"rope_parameters": LLAMA3 | {"factor": True}}, ValueError, "factor True"),
        (
            LLAMA, {"rope_parameters": LLAMA3 | {"low_freq_factor": 4}}, ValueError,
            "low_freq_factor 4, expected less",
        ),
        (LLAMA, {"rope_parameters": LLAMA3 | {"beta_fast": 32}}, NotImplementedError, "beta_fast"),
        (LLAMA, {"rope_parameters": YARN | {"attention_factor": -1}}, ValueError, "factor -1"),
        (LLAMA, {"rope_parameters": {"rope_type": "longrope"}}, NotImplementedError, "longrope"),
        (LLAMA, {"intermediate_size": None}, ValueError, "intermediate_size None"),
        (LLAMA, {"num_hidden_layers": 0}, ValueError, "num_hidden_layers 0"),
        (
            QWEN3, {"use_sliding_window": True, "sliding_window": 8}, NotImplementedError,
            "sliding window",
        ),
    ],
)  # fmt: skip
def test_config_refused(base, changes, error, message):
    with pytest.raises(error, match=f"^models.load: config.json .*{message}"):
        read_config(base | changes)


def test_missing_tensors_are_named(tmp_path):
    write(tmp_path, modules().parts, quantization(sym=False), config=QWEN3)
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_norm"):
        models.load(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | LLAMA | {"mlp_bias": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.gate_proj has no bias"):
        models.load(tmp_path)
