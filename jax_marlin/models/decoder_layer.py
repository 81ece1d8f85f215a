"""Parts of a decoder layer; attributes are named as the checkpoint's tensors, so paths agree."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jax_marlin.models.attention import attend
from jax_marlin.models.config import DecoderConfig
from jax_marlin.models.layers import (
    Kept,
    Linear,
    SideBySide,
    linear_float32,
    rms_scale,
    scaled,
    side_by_side,
    updated,
)
from jax_marlin.ops.activations import ACTIVATIONS
from jax_marlin.ops.moe_ffn import moe_ffn
from jax_marlin.ops.moe_matmul import ExpertStack
from jax_marlin.routing import route

_static: dict[str, Any] = {"metadata": {"static": True}}


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Attention:
    """Grouped-query attention; where norms are given, heads are normalised before the rotation."""

    qkv_proj: SideBySide  # [H, (heads + 2 kv_heads) * D], q_proj, k_proj, v_proj
    o_proj: Linear  # [heads * D, H]
    q_norm: jax.Array | None  # [D]
    k_norm: jax.Array | None  # [D]
    config: DecoderConfig = dataclasses.field(**_static)

    def __call__(
        self, x: jax.Array, past: Kept | None, start: jax.Array | None
    ) -> tuple[jax.Array, Kept]:
        """x `[batch, seq, H]`, positions start and up, to the same shape; and keys, values to keep.

        `past` is one layer's part of a KVCache, or None to attend within x alone. `start` None is a
        0 known while tracing: nothing was read before.
        """
        c, (batch, seq, _) = self.config, x.shape
        positions = jnp.arange(seq, dtype=jnp.int32) + (0 if start is None else start)
        queries, keys = c.num_attention_heads, c.num_key_value_heads
        with jax.named_scope("qkv_proj"):
            heads = side_by_side(x, self.qkv_proj, lambda x, w: w(x))
        heads = heads.reshape(batch, seq, queries + 2 * keys, c.head_dim)
        q, k, v = jnp.split(heads, [queries, queries + keys], axis=2)
        if self.q_norm is not None and self.k_norm is not None:
            # One pass over all heads, the values' as well, whose result is not used.
            scale = rms_scale(heads, c.rms_norm_eps)  # [batch, seq, heads, 1]
            q = scaled(q, scale[:, :, :queries], self.q_norm)
            k = scaled(k, scale[:, :, queries : queries + keys], self.k_norm)
        q, k = c.rope(q, positions), c.rope(k, positions)
        k, v = updated(past, (jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)), start)
        attended = self.attended(q, k, v, start)
        with jax.named_scope("o_proj"):
            return self.o_proj(attended), (k, v)

    def attended(
        self, q: jax.Array, k: jax.Array, v: jax.Array, start: jax.Array | None
    ) -> jax.Array:
        """Values weighted, `[batch, seq, heads * D]`; k and v as the cache lays them out."""
        return attend(q, k, v, start)


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
        with jax.named_scope("router"):
            logits = linear_float32(x, self.gate)
            weights, ids = route(logits, c.num_experts_per_tok, renormalize=c.norm_topk_prob)
        with jax.named_scope("experts"):
            return moe_ffn(x, ids, weights, self.gate_up, self.down, activation=c.hidden_act)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class DenseMlp:
    """The MLP of a layer without experts, or one expert that every token passes."""

    gate_up_proj: SideBySide  # [H, 2 F], gate_proj, up_proj
    down_proj: Linear  # [F, H]
    config: DecoderConfig = dataclasses.field(**_static)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x `[..., H]` to the same shape; the activation in float32."""
        gate, up = jnp.split(side_by_side(x, self.gate_up_proj, linear_float32), 2, axis=-1)
        return self.down_proj(ACTIVATIONS[self.config.hidden_act](gate, up).astype(x.dtype))


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class DecoderLayer:
    """Attention, then the MLP, each normalised before and added after."""

    input_layernorm: jax.Array  # [H]
    self_attn: Any  # an Attention, or a family's own that is called as one
    post_attention_layernorm: jax.Array  # [H]
    mlp: SparseMlp | DenseMlp
