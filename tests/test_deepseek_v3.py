"""DeepSeek-V3 in FP8 blocks from a synthetic checkpoint: all logits in float64, cache, refusals."""

import math
import re

import decoder_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from float_tensors import fp8_parts, fp8_weight
from synthetic_checkpoints import write
from test_decode_program import BATCH, shape_of, traced

from jax_marlin import DenseExpertStack, models
from jax_marlin.models.decoder_layer import DenseMlp
from jax_marlin.models.deepseek_v3 import DeepseekMlp
from jax_marlin.models.layers import DenseLinear
from jax_marlin.models.loading import read_config

H, VOCAB, HEADS, NOPE, ROPE, VALUE, Q_RANK, KV_RANK = 48, 50, 3, 16, 8, 12, 40, 24
WIDE, INNER, EXPERTS, SHARED, LAYERS, BN, BK = 56, 32, 6, 2, 3, 16, 32
YARN = {
    "type": "yarn", "factor": 8, "original_max_position_embeddings": 32, "beta_fast": 32,
    "beta_slow": 1, "mscale": 0.7, "mscale_all_dim": 1.3,
}  # fmt: skip
CONFIG = {
    "model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"], "vocab_size": VOCAB,
    "torch_dtype": "float32", "hidden_size": H, "intermediate_size": WIDE, "kv_lora_rank": KV_RANK,
    "moe_intermediate_size": INNER, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS, "n_routed_experts": EXPERTS, "num_experts_per_tok": 2,
    "n_shared_experts": SHARED, "first_k_dense_replace": 1, "moe_layer_freq": 1, "n_group": 3,
    "topk_group": 2, "norm_topk_prob": True, "routed_scaling_factor": 2.5, "hidden_act": "silu",
    "scoring_func": "sigmoid", "topk_method": "noaux_tc", "q_lora_rank": Q_RANK,
    "qk_nope_head_dim": NOPE, "qk_rope_head_dim": ROPE, "v_head_dim": VALUE, "rope_theta": 10000,
    "rope_scaling": YARN, "rms_norm_eps": 1e-5, "max_position_embeddings": 256,
    "num_nextn_predict_layers": 1, "attention_bias": False, "tie_word_embeddings": False,
}  # fmt: skip
QUANTIZATION = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [BN, BK]}
IDS = np.random.default_rng(6).integers(0, VOCAB, (2, 7))


def config(**changes):
    """CONFIG with keys changed; ... removes one."""
    return {key: value for key, value in (CONFIG | changes).items() if value is not ...}


class Parts:
    """Random modules: `stored`, module -> part -> array; `weights`, module -> float64 [K, N]."""

    def __init__(self, q_rank):
        self.rng, self.stored, self.weights = np.random.default_rng(8), {}, {}
        for module in ("model.embed_tokens", "lm_head"):
            self.plain(module, H, VOCAB)
        self.norm("model.norm", H)
        for i in range(LAYERS):
            self.layer(f"model.layers.{i}", q_rank, sparse=i >= 1)
        ahead = f"model.layers.{LAYERS}"  # predicts a second token, and is not run
        self.plain(f"{ahead}.eh_proj", 2 * H, H)
        self.fp8(f"{ahead}.mlp.gate_proj", H, WIDE)

    def layer(self, layer, q_rank, *, sparse):
        self.norm(f"{layer}.input_layernorm", H)
        self.norm(f"{layer}.post_attention_layernorm", H)
        attention, queries = f"{layer}.self_attn", HEADS * (NOPE + ROPE)
        if q_rank is None:
            self.fp8(f"{attention}.q_proj", H, queries)
        else:
            self.fp8(f"{attention}.q_a_proj", H, q_rank)
            self.norm(f"{attention}.q_a_layernorm", q_rank)
            self.fp8(f"{attention}.q_b_proj", q_rank, queries)
        self.fp8(f"{attention}.kv_a_proj_with_mqa", H, KV_RANK + ROPE)
        self.norm(f"{attention}.kv_a_layernorm", KV_RANK)
        self.fp8(f"{attention}.kv_b_proj", KV_RANK, HEADS * (NOPE + VALUE))
        self.fp8(f"{attention}.o_proj", HEADS * VALUE, H)
        if not sparse:
            return self.mlp(f"{layer}.mlp", WIDE)
        self.plain(f"{layer}.mlp.gate", H, EXPERTS)
        bias = self.rng.standard_normal(EXPERTS).astype(np.float32) / 4
        self.stored[f"{layer}.mlp.gate"]["e_score_correction_bias"] = bias
        for e in range(EXPERTS):
            self.mlp(f"{layer}.mlp.experts.{e}", INNER)
        return self.mlp(f"{layer}.mlp.shared_experts", SHARED * INNER)

    def mlp(self, prefix, width):
        for name, k, n in [("gate", H, width), ("up", H, width), ("down", width, H)]:
            self.fp8(f"{prefix}.{name}_proj", k, n)

    def norm(self, module, size):
        self.stored[module] = {"weight": self.rng.uniform(0.5, 1.5, size).astype(np.float16)}

    def plain(self, module, k, n):
        weight = (self.rng.standard_normal((n, k)) / np.sqrt(k)).astype(np.float16)
        self.stored[module] = {"weight": weight}
        self.weights[module] = weight.T.astype(np.float64)

    def fp8(self, module, k, n):
        shape, seed = (-(-n // BN), -(-k // BK)), int(self.rng.integers(1 << 30))
        parts = fp8_parts(seed, k, n, shape, name="weight_scale_inv")
        parts["weight_scale_inv"] /= np.float32(5 * np.sqrt(k))
        self.stored[module] = parts
        self.weights[module] = fp8_weight(parts["weight"], parts["weight_scale_inv"], BN, BK)

    def normed(self, module, x, eps):
        return oracle.rms_norm(x, self.stored[module]["weight"], eps)


PARTS = Parts(Q_RANK)


def saved(directory, parts=PARTS, edit=lambda stored: None, **changes):
    stored = {module: dict(tensors) for module, tensors in parts.stored.items()}
    edit(stored)
    return write(directory, stored, QUANTIZATION, config=config(**changes))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return models.load(saved(tmp_path_factory.mktemp("deepseek_v3")))


def attention_in_float64(parts, layer, x, rope, neighbours):
    w, prefix = parts.weights, f"{layer}.self_attn"
    if f"{prefix}.q_proj" in w:
        q = x @ w[f"{prefix}.q_proj"]
    else:
        latent = parts.normed(f"{prefix}.q_a_layernorm", x @ w[f"{prefix}.q_a_proj"], 1e-6)
        q = latent @ w[f"{prefix}.q_b_proj"]
    q = q.reshape(len(x), HEADS, NOPE + ROPE)
    both = x @ w[f"{prefix}.kv_a_proj_with_mqa"]
    latent, shared = both[:, :KV_RANK], both[:, KV_RANK:]
    kv = parts.normed(f"{prefix}.kv_a_layernorm", latent, 1e-6) @ w[f"{prefix}.kv_b_proj"]
    kv = kv.reshape(len(x), HEADS, NOPE + VALUE)
    radians, factor = oracle.frequencies(ROPE, 10000.0, rope)
    queries, keys = np.zeros(q.shape), np.zeros(q.shape)
    for t in range(len(x)):
        key = oracle.turned(shared[t], t, radians, factor, neighbours=neighbours)
        for h in range(HEADS):
            query = oracle.turned(q[t, h, NOPE:], t, radians, factor, neighbours=neighbours)
            queries[t, h] = np.concatenate([q[t, h, :NOPE], query])
            keys[t, h] = np.concatenate([kv[t, h, :NOPE], key])
    scale = (NOPE + ROPE) ** -0.5
    if "mscale_all_dim" in rope:
        scale *= (0.1 * rope["mscale_all_dim"] * math.log(rope["factor"]) + 1) ** 2
    out = oracle.attention(queries, keys, kv[..., NOPE:], scale=scale)
    return out @ w[f"{prefix}.o_proj"]


def mlp_in_float64(parts, prefix, x):
    gate, up, down = (parts.weights[f"{prefix}.{name}_proj"] for name in ("gate", "up", "down"))
    return (oracle.silu(x @ gate) * (x @ up)) @ down


def routes_in_float64(parts, prefix, x):
    """For each token {expert: weight}: the best 2 of the best 2 of 3 groups of 2, scores + bias."""
    bias = parts.stored[f"{prefix}.gate"]["e_score_correction_bias"].astype(np.float64)
    for row in x @ parts.weights[f"{prefix}.gate"]:
        scores = 1 / (1 + np.exp(-row))
        biased = scores + bias
        groups = sorted(range(3), key=lambda g: -(biased[2 * g] + biased[2 * g + 1]))[:2]
        allowed = [e for g in groups for e in (2 * g, 2 * g + 1)]
        chosen = sorted(allowed, key=lambda e: -biased[e])[:2]
        total = sum(scores[e] for e in chosen)
        yield {e: 2.5 * scores[e] / total for e in chosen}


def sparse_in_float64(parts, prefix, x):
    out = mlp_in_float64(parts, f"{prefix}.shared_experts", x)
    for t, routes in enumerate(routes_in_float64(parts, prefix, x)):
        for e, weight in routes.items():
            out[t] += weight * mlp_in_float64(parts, f"{prefix}.experts.{e}", x[t])
    return out


def logits_in_float64(parts, ids, rope=YARN, neighbours=True):
    x = parts.stored["model.embed_tokens"]["weight"][ids].astype(np.float64)
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        normed = parts.normed(f"{layer}.input_layernorm", x, 1e-5)
        x = x + attention_in_float64(parts, layer, normed, rope, neighbours)
        normed = parts.normed(f"{layer}.post_attention_layernorm", x, 1e-5)
        x = x + (sparse_in_float64 if i else mlp_in_float64)(parts, f"{layer}.mlp", normed)
    return parts.normed("model.norm", x, 1e-5) @ parts.weights["lm_head"]


def assert_logits(model, parts, **how):
    expected = np.stack([logits_in_float64(parts, row, **how) for row in IDS])
    np.testing.assert_allclose(model(IDS), expected, atol=3e-5 * np.abs(expected).max())


def test_logits(model):
    assert isinstance(model.layers[0].mlp, DenseMlp)
    mlp = model.layers[1].mlp
    assert isinstance(mlp, DeepseekMlp) and isinstance(mlp.gate_up, DenseExpertStack)
    assert isinstance(model.layers[2].self_attn.o_proj, DenseLinear)  # FP8, dequantized
    assert_logits(model, PARTS)


def test_queries_without_a_latent_and_plain_rope_over_halves(tmp_path):
    parts = Parts(None)
    changes = {"q_lora_rank": None, "rope_scaling": None, "rope_interleave": False}
    model = models.load(saved(tmp_path, parts, **changes))
    assert_logits(model, parts, rope={}, neighbours=False)


def test_routing_of_every_token_is_the_same(model):
    x = np.random.default_rng(1).standard_normal((40, H))
    expected = sparse_in_float64(PARTS, "model.layers.1.mlp", x)
    got = model.layers[1].mlp(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(got, expected, atol=3e-5 * np.abs(expected).max())


def test_cache_holds_latents_that_all_heads_share(model):
    extend = jax.jit(lambda model, ids, cache: model.extend(ids, cache))
    full, cache = np.asarray(model(IDS)), model.empty_cache(2, capacity=9)
    assert [array.shape for array in cache.layers[0]] == [(2, 128, KV_RANK + ROPE)]
    held = sum(array.nbytes for array in jax.tree.leaves(cache.layers))
    assert held / (2 * cache.capacity) == LAYERS * (KV_RANK + ROPE) * 4  # bytes a position
    for start, stop in [(0, 4), (4, 6), (6, 7)]:
        logits, cache = extend(model, jnp.asarray(IDS[:, start:stop]), cache)
        np.testing.assert_allclose(logits, full[:, stop - 1], atol=2e-5 * np.abs(full).max())


def test_latents_are_updated_in_place(model):
    """In the decoding loop no cache is copied, nor a head's part of kv_b_proj rearranged."""
    text = traced(model).lower().compile().as_text() or ""
    heads = model.layers[0].self_attn.kv_b_proj
    for array in (model.empty_cache(BATCH, 40).layers[0][0], heads.keys, heads.values):
        made = set(re.findall(rf"= {re.escape(shape_of(array))}\S* (\S+?)\(", text))
        assert "parameter" in made
        assert not made & {"copy", "transpose", "concatenate", "broadcast", "select"}, made


def test_generate_is_greedy_without_a_cache(model):
    tokens = np.asarray(models.generate(model, IDS, 4))
    logits = np.asarray(model(np.concatenate([IDS, tokens], axis=1)))[:, IDS.shape[1] - 1 : -1]
    np.testing.assert_array_equal(tokens, logits.argmax(axis=-1))


def test_prompts_of_different_lengths_as_if_alone(model):
    prompts = [IDS[0], IDS[1, :2], IDS[1, 3:]]
    tokens = np.asarray(models.generate(model, prompts, 6))
    for prompt, row in zip(prompts, tokens, strict=True):
        np.testing.assert_array_equal(row, models.generate(model, prompt[None], 6)[0])


def test_kimi_k2_is_the_same_architecture(tmp_path, model):
    other = models.load(saved(tmp_path, model_type="kimi_k2"))
    assert other.config.model_type == "kimi_k2"
    np.testing.assert_array_equal(other(IDS), model(IDS))


def test_old_and_new_config_keys_mean_the_same():
    rope = {key: value for key, value in YARN.items() if key != "type"}
    new = {"rope_scaling": ..., "rope_theta": ..., "torch_dtype": ..., "dtype": "float32"}
    new |= {"rope_parameters": rope | {"rope_type": "yarn", "rope_theta": 10000.0}}
    new |= {"n_routed_experts": ..., "num_local_experts": EXPERTS, "head_dim": ROPE}
    assert read_config(config(**new)) == read_config(config())


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"scoring_func": "softmax"}, NotImplementedError, "scoring_func 'softmax', expected 'sig"),
        ({"topk_method": "greedy"}, NotImplementedError, "topk_method 'greedy'"),
        ({"kv_lora_rank": ...}, ValueError, "kv_lora_rank None, expected a positive integer"),
        ({"q_lora_rank": "x"}, ValueError, "q_lora_rank 'x', expected a positive integer"),
        ({"num_local_experts": 4}, ValueError, "n_routed_experts"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, NotImplementedError, "'linear'"),
    ],
)
def test_config_refused(changes, error, message):
    with pytest.raises(error, match=f"^models.load: config.json .*{message}"):
        read_config(config(**changes))


@pytest.mark.parametrize(
    ("edit", "changes", "message"),
    [
        (lambda s: s["model.layers.1.mlp.gate"].pop("e_score_correction_bias"), {},
         "no tensor model.layers.1.mlp.gate.e_score_correction_bias"),
        (lambda s: s.pop("model.layers.2.mlp.experts.4.up_proj"), {}, "missing experts .4. of 6"),
        (lambda s: s.pop("model.layers.1.mlp.shared_experts.up_proj"), {}, "shared_experts.up"),
        (lambda s: None, {"num_nextn_predict_layers": 0}, "2 modules|tensors have no place"),
        (lambda s: None, {"n_shared_experts": 1}, r"expected \(48, 32\) by config.json"),
        (lambda s: None, {"v_head_dim": 16}, r"kv_b_proj has shape \(24, 84\), expected .24, 96"),
        (lambda s: None, {"q_lora_rank": None}, "no module .*q_proj"),
    ],
)  # fmt: skip
def test_checkpoint_that_contradicts_its_config(tmp_path, edit, changes, message):
    with pytest.raises(ValueError, match=message):
        models.load(saved(tmp_path, edit=edit, **changes))
