"""Parts of a decoder layer; attributes are named as the checkpoint's tensors, so paths agree."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jax_marlin.models.config import DecoderConfig
from jax_marlin.models.layers import Linear, attend, linear_float32, rms_norm, updated
from jax_marlin.ops.activations import ACTIVATIONS
from jax_marlin.ops.moe_ffn import moe_ffn
from jax_marlin.ops.moe_matmul import ExpertStack
from jax_marlin.routing import route

_static: dict[str, Any] = {"metadata": {"static": True}}


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Attention:
    """Grouped-query attention; where norms are given, heads are normalised before the rotation."""

    q_proj: Linear  # [H, heads * D]
    k_proj: Linear  # [H, kv_heads * D]
    v_proj: Linear  # [H, kv_heads * D]
    o_proj: Linear  # [heads * D, H]
    q_norm: jax.Array | None  # [D]
    k_norm: jax.Array | None  # [D]
    config: DecoderConfig = dataclasses.field(**_static)

    def __call__(
        self, x: jax.Array, past: tuple[jax.Array, jax.Array] | None, start: jax.Array
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """x `[batch, seq, H]`, positions start and up, to the same shape; and keys, values to keep.

        `past` is one layer's part of a KVCache, or None to attend within x alone (start 0).
        """
        c, (batch, seq, _) = self.config, x.shape
        positions = start + jnp.arange(seq, dtype=jnp.int32)
        q = self.q_proj(x).reshape(batch, seq, c.num_attention_heads, c.head_dim)
        k = self.k_proj(x).reshape(batch, seq, c.num_key_value_heads, c.head_dim)
        v = self.v_proj(x).reshape(batch, seq, c.num_key_value_heads, c.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q = rms_norm(q, self.q_norm, c.rms_norm_eps)
            k = rms_norm(k, self.k_norm, c.rms_norm_eps)
        q, k = c.rope(q, positions), c.rope(k, positions)
        k, v = updated(past, (k, v), start)
        return self.o_proj(self.attended(q, k, v, positions)), (k, v)

    def attended(self, q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array) -> jax.Array:
        """Values weighted, `[batch, seq, heads * D]`."""
        return attend(q, k, v, positions)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class SparseMlp:
    """A mixture of experts: the router's top_k experts of each token, weighted and summed."""

    gate: Linear  # [H, E], the router
    gate_up: ExpertStack | tuple[ExpertStack, ExpertStack]  # [E, H, 2 I], or a pair
    down: ExpertStack  # [E, I, H]
    config: DecoderConfig = dataclasses.field(**_static)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x `[..., H]` to the same shape."""
        c = self.config
        logits = linear_float32(x, self.gate)
        weights, ids = route(logits, c.num_experts_per_tok, renormalize=c.norm_topk_prob)
        return moe_ffn(x, ids, weights, self.gate_up, self.down, activation=c.hidden_act)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class DenseMlp:
    """The MLP of a layer without experts, or one expert that every token passes."""

    gate_proj: Linear  # [H, F]
    up_proj: Linear  # [H, F]
    down_proj: Linear  # [F, H]
    config: DecoderConfig = dataclasses.field(**_static)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x `[..., H]` to the same shape; the activation in float32."""
        gate, up = (linear_float32(x, w) for w in (self.gate_proj, self.up_proj))
        return self.down_proj(ACTIVATIONS[self.config.hidden_act](gate, up).astype(x.dtype))


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class DecoderLayer:
    """Attention, then the MLP, each normalised before and added after."""

    input_layernorm: jax.Array  # [H]
    self_attn: Any  # an Attention, or a family's own that is called as one
    post_attention_layernorm: jax.Array  # [H]
    mlp: SparseMlp | DenseMlp
