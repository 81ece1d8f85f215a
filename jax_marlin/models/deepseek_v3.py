"""DeepSeek-V3, R1 and Kimi-K2: latent attention, group-limited routing, experts all tokens pass."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jax_marlin.models.attention import attend
from jax_marlin.models.config import DecoderConfig, decoder_fields, expert_counts
from jax_marlin.models.config_keys import flag, layers, number, size
from jax_marlin.models.decoder_layer import DecoderLayer, DenseMlp, SparseMlp
from jax_marlin.models.family import Family, read_decoder_layer, read_dense_mlp, read_sparse_mlp
from jax_marlin.models.layers import Linear, linear_float32, rms_norm, updated
from jax_marlin.models.module_reader import ModuleReader
from jax_marlin.ops.moe_ffn import moe_ffn
from jax_marlin.routing import route

_LATENT_EPS = 1e-6  # of the norms inside attention, whatever rms_norm_eps says


@dataclasses.dataclass(frozen=True)
class DeepseekV3Config(DecoderConfig):
    """`DecoderConfig` (head_dim: of queries and keys), latent widths, routing, shared experts."""

    q_lora_rank: int | None
    kv_lora_rank: int
    qk_rope_head_dim: int
    v_head_dim: int
    rope_interleave: bool
    n_group: int
    topk_group: int
    routed_scaling_factor: float
    shared_width: int  # of all shared experts together, 0 if there are none
    skipped_layers: tuple[int, ...]  # that predict tokens further ahead

    @property
    def value_head_dim(self) -> int:
        """Features of a value head."""
        return self.v_head_dim


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class LatentAttention:
    """Queries, keys and values through narrow latents; only a part of each head is rotated.

    D = nope + rope features of a query or key head; the rope part of the keys is shared by all
    heads. The cache holds keys and values of every head, not the latents.
    """

    q_proj: Linear | None  # [H, heads * D], where there is no query latent
    q_a_proj: Linear | None  # [H, q_rank]
    q_a_layernorm: jax.Array | None  # [q_rank]
    q_b_proj: Linear | None  # [q_rank, heads * D]
    kv_a_proj_with_mqa: Linear  # [H, kv_rank + rope]
    kv_a_layernorm: jax.Array  # [kv_rank]
    kv_b_proj: Linear  # [kv_rank, heads * (nope + V)]
    o_proj: Linear  # [heads * V, H]
    config: DeepseekV3Config = dataclasses.field(metadata={"static": True})

    def __call__(
        self, x: jax.Array, past: tuple[jax.Array, jax.Array] | None, start: jax.Array | None
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """x `[batch, seq, H]` to the same shape, and keys, values to keep; as `Attention`."""
        c, (batch, seq, _) = self.config, x.shape
        heads, rope = c.num_attention_heads, c.qk_rope_head_dim
        nope = c.head_dim - rope
        positions = jnp.arange(seq, dtype=jnp.int32) + (0 if start is None else start)
        q = self._queries(x).reshape(batch, seq, heads, c.head_dim)
        latent, k_rope = jnp.split(self.kv_a_proj_with_mqa(x), [c.kv_lora_rank], axis=-1)
        kv = self.kv_b_proj(rms_norm(latent, self.kv_a_layernorm, _LATENT_EPS))
        k, v = jnp.split(kv.reshape(batch, seq, heads, nope + c.v_head_dim), [nope], axis=-1)
        k_rope = self._rotated(k_rope.reshape(batch, seq, 1, rope), positions)
        k = jnp.concatenate([k, jnp.broadcast_to(k_rope, (batch, seq, heads, rope))], axis=-1)
        q = jnp.concatenate([q[..., :nope], self._rotated(q[..., nope:], positions)], axis=-1)
        kept = updated(past, (k, v), start)
        scale = c.head_dim**-0.5 * c.rope.softmax_factor
        return self.o_proj(attend(q, *kept, start, scale=scale)), kept

    def _queries(self, x: jax.Array) -> jax.Array:
        if self.q_proj is not None:
            return self.q_proj(x)
        assert self.q_a_proj and self.q_b_proj and self.q_a_layernorm is not None  # noqa: S101
        return self.q_b_proj(rms_norm(self.q_a_proj(x), self.q_a_layernorm, _LATENT_EPS))

    def _rotated(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        """`[batch, seq, heads, rope]` turned; the result's halves are pairs, however they came."""
        c, dim = self.config, x.shape[-1]
        if c.rope_interleave:  # neighbours are a pair
            x = jnp.swapaxes(x.reshape(*x.shape[:-1], dim // 2, 2), -1, -2).reshape(x.shape)
        return c.rope(x, positions)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class DeepseekMlp(SparseMlp):
    """Experts chosen by sigmoid scores plus a bias, within the best groups; plus shared experts."""

    e_score_correction_bias: jax.Array  # float32 [E]
    shared_experts: DenseMlp | None
    config: DeepseekV3Config = dataclasses.field(metadata={"static": True})

    def __call__(self, x: jax.Array) -> jax.Array:
        """x `[..., H]` to the same shape."""
        c = self.config
        weights, ids = route(
            linear_float32(x, self.gate),
            c.num_experts_per_tok,
            scoring="sigmoid",
            renormalize=c.norm_topk_prob,
            correction_bias=self.e_score_correction_bias,
            num_groups=c.n_group,
            top_groups=c.topk_group,
            scale=c.routed_scaling_factor,
        )
        routed = moe_ffn(x, ids, weights, self.gate_up, self.down, activation=c.hidden_act)
        return routed if self.shared_experts is None else routed + self.shared_experts(x)


def _read_config(config: Mapping[str, Any]) -> DeepseekV3Config:
    for key, only in (("scoring_func", "sigmoid"), ("topk_method", "noaux_tc")):
        if config.get(key, only) != only:
            raise NotImplementedError(
                f"models.load: config.json has {key} {config[key]!r}, expected {only!r}; no other "
                "is implemented"
            )
    depth, further = (
        layers(config, "num_hidden_layers"),
        layers(config, "num_nextn_predict_layers", 0, least=0),
    )
    dense = size(config, "first_k_dense_replace", 0, least=0)
    step, inner = size(config, "moe_layer_freq", 1), size(config, "moe_intermediate_size")
    nope, rope = size(config, "qk_nope_head_dim"), size(config, "qk_rope_head_dim")
    fields = decoder_fields(config)
    fields |= {"head_dim": nope + rope, "num_key_value_heads": fields["num_attention_heads"]}
    return DeepseekV3Config(
        **fields,
        **expert_counts(config),
        intermediate_size=size(config, "intermediate_size"),
        moe_intermediate_size=inner,
        norm_topk_prob=flag(config, "norm_topk_prob", True),
        qkv_bias=flag(config, "attention_bias", False),
        o_bias=flag(config, "attention_bias", False),
        sparse_layers=tuple(i >= dense and i % step == 0 for i in range(depth)),
        q_lora_rank=None if config.get("q_lora_rank") is None else size(config, "q_lora_rank"),
        kv_lora_rank=size(config, "kv_lora_rank"),
        qk_rope_head_dim=rope,
        v_head_dim=size(config, "v_head_dim"),
        rope_interleave=flag(config, "rope_interleave", True),
        n_group=size(config, "n_group", 1),
        topk_group=size(config, "topk_group", 1),
        routed_scaling_factor=number(config, "routed_scaling_factor", 1.0),
        shared_width=size(config, "n_shared_experts", 0, least=0) * inner,
        skipped_layers=tuple(range(depth, depth + further)),
    )


def _read_layer(reader: ModuleReader, c: DeepseekV3Config, i: int) -> DecoderLayer:
    def read_mlp(prefix: str) -> SparseMlp | DenseMlp:
        prefix = f"{prefix}.mlp"
        if not c.sparse_layers[i]:
            return read_dense_mlp(reader, c, prefix, c.intermediate_size)
        routed, name = read_sparse_mlp(reader, c, prefix), "e_score_correction_bias"
        return DeepseekMlp(
            routed.gate,
            routed.gate_up,
            routed.down,
            c,
            reader.parameter(f"{prefix}.gate", name, (c.num_experts,), jnp.float32),
            read_dense_mlp(reader, c, f"{prefix}.shared_experts", c.shared_width)
            if c.shared_width
            else None,
        )

    return read_decoder_layer(
        reader, c, i, read_mlp, read_attention=lambda prefix: _read_attention(reader, c, prefix)
    )


def _read_attention(reader: ModuleReader, c: DeepseekV3Config, prefix: str) -> LatentAttention:
    heads, nope = c.num_attention_heads, c.head_dim - c.qk_rope_head_dim
    queries, latent = heads * c.head_dim, c.kv_lora_rank + c.qk_rope_head_dim
    rank, bias = c.q_lora_rank, c.qkv_bias
    whole = rank is None
    return LatentAttention(
        q_proj=reader.linear(f"{prefix}.q_proj", (c.hidden_size, queries)) if whole else None,
        q_a_proj=None
        if whole
        else reader.linear(f"{prefix}.q_a_proj", (c.hidden_size, rank), bias),
        q_a_layernorm=None if whole else reader.weight(f"{prefix}.q_a_layernorm", (rank,)),
        q_b_proj=None if whole else reader.linear(f"{prefix}.q_b_proj", (rank, queries)),
        kv_a_proj_with_mqa=reader.linear(
            f"{prefix}.kv_a_proj_with_mqa", (c.hidden_size, latent), bias
        ),
        kv_a_layernorm=reader.weight(f"{prefix}.kv_a_layernorm", (c.kv_lora_rank,)),
        kv_b_proj=reader.linear(
            f"{prefix}.kv_b_proj", (c.kv_lora_rank, heads * (nope + c.v_head_dim))
        ),
        o_proj=reader.linear(f"{prefix}.o_proj", (heads * c.v_head_dim, c.hidden_size), c.o_bias),
        config=c,
    )


def _unused(c: DeepseekV3Config) -> tuple[str, ...]:
    return tuple(f"model.layers.{i}." for i in c.skipped_layers)


FAMILY = Family("deepseek_v3", "DeepseekV3ForCausalLM", _read_config, _read_layer, _unused)
KIMI_K2 = dataclasses.replace(FAMILY, model_type="kimi_k2")  # the same architecture by its own name
