"""gpt-oss from a synthetic checkpoint: all logits in float64, cache, window, keys, refusals."""

import decoder_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from float_tensors import fused_mxfp4_parts, mxfp4_weight
from synthetic_checkpoints import write

from jax_marlin import DenseExpertStack, models
from jax_marlin.models.decoder_layer import SparseMlp
from jax_marlin.models.gpt_oss import GptOssConfig
from jax_marlin.models.loading import read_config
from jax_marlin.models.rope import Rope

H, INNER, EXPERTS, VOCAB, HEADS, KV_HEADS, D, WINDOW = 64, 32, 5, 50, 6, 2, 16, 4
ROPE = {
    "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32, "beta_fast": 32.0,
    "beta_slow": 1.0, "truncate": False,
}  # fmt: skip
CONFIG = {
    "model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"], "dtype": "float32",
    "vocab_size": VOCAB, "hidden_size": H, "intermediate_size": INNER, "head_dim": D,
    "num_hidden_layers": 3, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
    "num_local_experts": EXPERTS, "num_experts_per_tok": 2, "max_position_embeddings": 256,
    "sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]
    + ["sliding_attention"], "rms_norm_eps": 1e-5, "swiglu_limit": 7.0, "hidden_act": "silu",
    "rope_parameters": ROPE | {"rope_theta": 150000.0}, "attention_bias": True,
}  # fmt: skip
QUANTIZATION = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
IDS = np.random.default_rng(5).integers(0, VOCAB, (2, 11))


def config(**changes):
    """CONFIG with keys changed; ... removes one."""
    return {key: value for key, value in (CONFIG | changes).items() if value is not ...}


def make_parts():
    """module -> part -> array as stored."""
    rng = np.random.default_rng(3)

    def linear(k, n, bias=True):
        parts = {"weight": (rng.standard_normal((n, k)) / np.sqrt(k)).astype(np.float16)}
        return parts | ({"bias": rng.standard_normal(n).astype(np.float16)} if bias else {})

    def norm():
        return {"weight": rng.uniform(0.5, 1.5, H).astype(np.float16)}

    parts = {"model.embed_tokens": linear(H, VOCAB, False), "lm_head": linear(H, VOCAB, False)}
    parts["model.norm"] = norm()
    for i in range(CONFIG["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        parts |= {f"{layer}.{name}": norm() for name in
                  ("input_layernorm", "post_attention_layernorm")}  # fmt: skip
        for name, k, n in [("q", H, HEADS * D), ("k", H, KV_HEADS * D), ("v", H, KV_HEADS * D),
                           ("o", HEADS * D, H)]:  # fmt: skip
            parts[f"{layer}.self_attn.{name}_proj"] = linear(k, n)
        parts[f"{layer}.self_attn"] = {"sinks": rng.standard_normal(HEADS).astype(np.float16) * 2}
        parts[f"{layer}.mlp.router"] = linear(H, EXPERTS)
        parts[f"{layer}.mlp.experts"] = {
            f"{name}_{part}": array
            for name, k, n in [("gate_up_proj", H, 2 * INNER), ("down_proj", INNER, H)]
            for part, array in fused_mxfp4_parts(10 * i + k, EXPERTS, k, n).items()
        }
    return parts


PARTS = make_parts()


def saved(directory, edit=lambda parts: None, **changes):
    parts = {module: dict(tensors) for module, tensors in PARTS.items()}
    edit(parts)
    return write(directory, parts, QUANTIZATION, config=config(**changes))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return models.load(saved(tmp_path_factory.mktemp("gpt_oss")))


def apply(module, x):
    parts = PARTS[module]
    return x @ parts["weight"].T.astype(np.float64) + parts.get("bias", np.zeros(1)).astype(float)


def expert_weights(layer, name, e):
    stored = PARTS[f"{layer}.mlp.experts"]
    blocks = stored[f"{name}_blocks"][e]
    weight = mxfp4_weight(blocks.reshape(len(blocks), -1), stored[f"{name}_scales"][e])
    return weight, stored[f"{name}_bias"][e].astype(np.float64)


def mlp_in_float64(layer, x):
    out = np.zeros_like(x)
    for t, logits in enumerate(apply(f"{layer}.mlp.router", x)):
        chosen = np.argsort(-logits)[:2]
        shares = np.exp(logits[chosen] - logits[chosen].max())
        for e, share in zip(chosen, shares / shares.sum(), strict=True):
            (gate_up, bias), (down, down_bias) = (
                expert_weights(layer, name, e) for name in ("gate_up_proj", "down_proj")
            )
            both = x[t] @ gate_up + bias
            gate, up = np.minimum(both[0::2], 7), np.clip(both[1::2], -7, 7)
            hidden = gate / (1 + np.exp(-1.702 * gate)) * (up + 1)
            out[t] += share * (hidden @ down + down_bias)
    return out


def attention_in_float64(layer, x, window):
    radians, factor = oracle.frequencies(D, 150000.0, ROPE)
    q, k, v = (apply(f"{layer}.self_attn.{name}_proj", x).reshape(len(x), -1, D) for name in "qkv")
    q, k = (
        np.array([[oracle.turned(head, t, radians, factor) for head in heads]
                  for t, heads in enumerate(part)]) for part in (q, k)
    )  # fmt: skip
    k, v = (np.repeat(part, HEADS // KV_HEADS, axis=1) for part in (k, v))
    sinks = PARTS[f"{layer}.self_attn"]["sinks"]
    out = oracle.attention(q, k, v, scale=D**-0.5, window=window, sinks=sinks)
    return apply(f"{layer}.self_attn.o_proj", out)


def logits_in_float64(ids):
    x = PARTS["model.embed_tokens"]["weight"][ids].astype(np.float64)
    for i in range(CONFIG["num_hidden_layers"]):
        layer, window = f"model.layers.{i}", WINDOW if i % 2 == 0 else None
        normed = oracle.rms_norm(x, PARTS[f"{layer}.input_layernorm"]["weight"], 1e-5)
        x = x + attention_in_float64(layer, normed, window)
        normed = oracle.rms_norm(x, PARTS[f"{layer}.post_attention_layernorm"]["weight"], 1e-5)
        x = x + mlp_in_float64(layer, normed)
    return apply("lm_head", oracle.rms_norm(x, PARTS["model.norm"]["weight"], 1e-5))


def test_logits_of_more_positions_than_the_window(model):
    assert isinstance(model.layers[0].mlp.gate_up, DenseExpertStack)
    assert [layer.self_attn.window for layer in model.layers] == [WINDOW, None, WINDOW]
    expected = np.stack([logits_in_float64(row) for row in IDS])
    np.testing.assert_allclose(model(IDS), expected, atol=2e-5 * np.abs(expected).max())


def test_window_reaches_into_the_cache(model):
    extend = jax.jit(lambda model, ids, cache: model.extend(ids, cache))
    full, cache = np.asarray(model(IDS)), model.empty_cache(2, capacity=13)
    for start, stop in [(0, 3), (3, 9), (9, 10), (10, 11)]:
        logits, cache = extend(model, jnp.asarray(IDS[:, start:stop]), cache)
        np.testing.assert_allclose(logits, full[:, stop - 1], atol=2e-5 * np.abs(full).max())


def test_generate_is_greedy_without_a_cache(model):
    tokens = np.asarray(models.generate(model, IDS, 5))
    logits = np.asarray(model(np.concatenate([IDS, tokens], axis=1)))[:, IDS.shape[1] - 1 : -1]
    np.testing.assert_array_equal(tokens, logits.argmax(axis=-1))


def test_prompts_of_different_lengths_as_if_alone(model):
    prompts = [IDS[0], IDS[1, :2], IDS[1, 3:]]  # windows end at different places
    tokens = np.asarray(models.generate(model, prompts, 6))
    for prompt, row in zip(prompts, tokens, strict=True):
        np.testing.assert_array_equal(row, models.generate(model, prompt[None], 6)[0])


def test_bfloat16_runs_under_jit(tmp_path):
    model = models.load(saved(tmp_path), "bfloat16")
    logits = jax.jit(lambda model, ids: model(ids))(model, jnp.asarray(IDS))
    assert isinstance(model.layers[0].mlp, SparseMlp)
    assert model.layers[0].mlp.down.dtype == jnp.bfloat16
    expected = logits_in_float64(IDS[0])[0]  # one position: no routing differs by rounding
    assert np.abs(logits[0, 0] - expected).max() < 0.05 * np.abs(expected).max()


def test_old_and_new_config_keys_mean_the_same():
    old = {"rope_parameters": ..., "rope_theta": 150000, "rope_scaling": ROPE}
    assert read_config(config(**old)) == read_config(config())
    assert read_config(config(layer_types=..., num_hidden_layers=3)) == read_config(config())
    assert read_config(config(num_local_experts=..., num_experts=EXPERTS)) == read_config(config())
    default = read_config(config(sliding_window=...))[1]
    assert isinstance(default, GptOssConfig) and default.windows == (128, None, 128)
    plain = read_config(config(rope_parameters=..., rope_scaling=None))[1]
    assert plain.rope == Rope(150000.0)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"swiglu_limit": 10.0}, NotImplementedError, "swiglu_limit 10.0, expected 7.0"),
        ({"swiglu_alpha": 1.0}, NotImplementedError, "swiglu_alpha 1.0, expected 1.702"),
        ({"hidden_act": "gelu"}, NotImplementedError, "hidden_act 'gelu', expected 'silu'"),
        ({"layer_types": ["full_attention"]}, ValueError, "layer_types .*expected 3 of"),
        ({"layer_types": ["chunked_attention"] * 3}, ValueError, "layer_types .*chunked"),
        ({"sliding_window": 0}, ValueError, "sliding_window 0, expected a positive integer"),
        ({"rope_parameters": {"rope_type": "linear"}}, NotImplementedError, "linear.*yarn"),
        ({"rope_parameters": ROPE | {"zap": 1}}, NotImplementedError, "'zap': 1.*only the keys"),
        ({"rope_parameters": ROPE | {"factor": "4"}}, ValueError, "factor '4' .*yarn"),
        ({"rope_parameters": ROPE | {"factor": None}}, ValueError, "factor None .*yarn"),
        ({"num_experts_per_tok": 6}, ValueError, "num_experts_per_tok 6, expected at most"),
    ],
)
def test_config_refused(changes, error, message):
    with pytest.raises(error, match=f"^models.load: config.json .*{message}"):
        read_config(config(**changes))


def drop(module, part):
    return lambda parts: parts[module].pop(part)


@pytest.mark.parametrize(
    ("edit", "changes", "message"),
    [
        (drop("model.layers.1.self_attn", "sinks"), {}, "no tensor .*1.self_attn.sinks"),
        (drop("model.layers.1.mlp.router", "bias"), {}, "mlp.router has no bias"),
        (drop("model.layers.0.mlp.experts", "down_proj_bias"), {}, "down_proj has no bias"),
        (drop("model.layers.0.mlp.experts", "down_proj_scales"), {}, "blocks but no scales"),
        (drop("model.layers.0.mlp.experts", "down_proj_blocks"), {},
         "no module .*0.mlp.experts.down_proj, expected all experts in .*_blocks and _scales"),
        (lambda parts: None, {"intermediate_size": 64}, r"\(5, 64, 64\), expected \(5, 64, 128\)"),
        (lambda parts: None, {"num_local_experts": 4}, r"expected \(4, 64, 64\)|expected \(64, 4"),
        (lambda parts: parts["model.layers.2.mlp"].update(x=np.ones(3)), {}, "no place in gpt_oss"),
    ],
)  # fmt: skip
def test_checkpoint_that_contradicts_its_config(tmp_path, edit, changes, message):
    def edited(parts):
        parts["model.layers.2.mlp"] = {}
        edit(parts)

    with pytest.raises(ValueError, match=message):
        models.load(saved(tmp_path, edited, **changes))
