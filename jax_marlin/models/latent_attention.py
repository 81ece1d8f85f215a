"""DeepSeek's latent attention: keys and values of all heads come from one narrow latent.

Of a position the cache keeps the latent c, normalised, and the rotated key that all heads share:
kv_rank + rope numbers, for DeepSeek-V3 576 in place of 128 heads x 320. With a head's two halves of
kv_b_proj, K `[nope, rank]` and V `[rank, V]`, its keys are K c and its values c V, so

    score  = q . (K c) + q_rope . k_rope = (q K) . c + q_rope . k_rope
    output = sum of weight * (c V)       = (sum of weight * c) V

The right sides are the absorbed form: one key and value head, the latents as they lie in the cache,
which all query heads share. The left sides are the expanded form.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jax_marlin.models.attention import attend
from jax_marlin.models.config import DecoderConfig
from jax_marlin.models.config_keys import flag, size
from jax_marlin.models.layers import Kept, Linear, exact, rms_norm, updated
from jax_marlin.models.module_reader import ModuleReader

_LATENT_EPS = 1e-6  # of the norms inside attention, whatever rms_norm_eps says


@dataclasses.dataclass(frozen=True)
class LatentConfig(DecoderConfig):
    """`DecoderConfig` (head_dim: of queries and keys, nope + rope) and the widths of latents."""

    q_lora_rank: int | None
    kv_lora_rank: int
    qk_rope_head_dim: int
    v_head_dim: int
    rope_interleave: bool

    @property
    def value_head_dim(self) -> int:
        """Features of a value head."""
        return self.v_head_dim

    @property
    def cached(self) -> tuple[tuple[int, ...], ...]:
        """One array without an axis of heads: the latent and the rotated key that they share."""
        return ((self.kv_lora_rank + self.qk_rope_head_dim,),)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class HeadsOfLatent:
    """kv_b_proj taken apart by heads, dense in the compute dtype also where it is stored packed."""

    keys: jax.Array  # [heads, nope, kv_rank]
    values: jax.Array  # [heads, kv_rank, V]


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class LatentAttention:
    """Queries, keys and values through narrow latents; only a part of each head is rotated.

    D = nope + rope features of a query or key head; the rope part of the keys is shared by all
    heads. The cache holds latents: kv_rank + rope numbers a position.
    """

    q_proj: Linear | None  # [H, heads * D], where there is no query latent
    q_a_proj: Linear | None  # [H, q_rank]
    q_a_layernorm: jax.Array | None  # [q_rank]
    q_b_proj: Linear | None  # [q_rank, heads * D]
    kv_a_proj_with_mqa: Linear  # [H, kv_rank + rope]
    kv_a_layernorm: jax.Array  # [kv_rank]
    kv_b_proj: HeadsOfLatent
    o_proj: Linear  # [heads * V, H]
    config: LatentConfig = dataclasses.field(metadata={"static": True})

    def __call__(
        self, x: jax.Array, past: Kept | None, start: jax.Array | None
    ) -> tuple[jax.Array, Kept]:
        """x `[batch, seq, H]` to the same shape, and latents to keep; as `Attention`."""
        c, (batch, seq, _) = self.config, x.shape
        nope = c.head_dim - c.qk_rope_head_dim
        positions = jnp.arange(seq, dtype=jnp.int32) + (0 if start is None else start)
        with jax.named_scope("qkv_proj"):
            q, kv = self._queries(x), self.kv_a_proj_with_mqa(x)
        q = q.reshape(batch, seq, c.num_attention_heads, c.head_dim)
        q, q_rope = q[..., :nope], self._rotated(q[..., nope:], positions)
        latent, k_rope = jnp.split(kv, [c.kv_lora_rank], axis=-1)
        latent = rms_norm(latent, self.kv_a_layernorm, _LATENT_EPS)
        k_rope = self._rotated(k_rope[:, :, None], positions)[:, :, 0]
        kept = updated(past, (jnp.concatenate([latent, k_rope], axis=-1),), start)
        # A prompt by itself is expanded: of a pair of positions a head then multiplies D + V
        # numbers (320), and 2 rank + rope (1,088) if it is absorbed; each position is expanded
        # once. With a cache all positions read before would be, at every step.
        if past is None:
            heads = self._expanded(q, q_rope, latent, k_rope)
        else:
            heads = self._absorbed(q, q_rope, kept[0], start)
        with jax.named_scope("o_proj"):
            return self.o_proj(heads), kept

    def _expanded(
        self, q: jax.Array, q_rope: jax.Array, latent: jax.Array, k_rope: jax.Array
    ) -> jax.Array:
        """Values weighted, `[batch, seq, heads * V]`, from keys and values of every head."""
        k = _product("bsr,hnr->bhsn", latent, self.kv_b_proj.keys)
        v = _product("bsr,hrv->bhsv", latent, self.kv_b_proj.values)
        k_rope = jnp.broadcast_to(k_rope[:, None], (*k.shape[:3], k_rope.shape[-1]))
        q = jnp.concatenate([q, q_rope], axis=-1)
        return attend(q, jnp.concatenate([k, k_rope], axis=-1), v, None, scale=self._scale)

    def _absorbed(
        self, q: jax.Array, q_rope: jax.Array, latents: jax.Array, start: jax.Array | None
    ) -> jax.Array:
        """The same from the cache, `[batch, capacity, kv_rank + rope]`."""
        q = _product("bshn,hnr->bshr", q, self.kv_b_proj.keys)
        q = jnp.concatenate([q, q_rope], axis=-1)
        latents = latents[:, None]  # one head
        # The rotated keys are summed along with the latents, and dropped: the cache is not sliced.
        summed = attend(q, latents, latents, start, scale=self._scale)
        summed = summed.reshape(q.shape)[..., : self.config.kv_lora_rank]
        heads = _product("bshr,hrv->bshv", summed, self.kv_b_proj.values)
        return heads.reshape(*heads.shape[:2], -1)

    @property
    def _scale(self) -> float:
        return self.config.head_dim**-0.5 * self.config.rope.softmax_factor

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


def latent_fields(config: Mapping[str, Any], heads: int) -> dict[str, Any]:
    """The fields of `LatentConfig` about heads and latents, of `heads` attention heads."""
    nope, rope = size(config, "qk_nope_head_dim"), size(config, "qk_rope_head_dim")
    return {
        "head_dim": nope + rope,
        "num_key_value_heads": heads,
        "q_lora_rank": None if config.get("q_lora_rank") is None else size(config, "q_lora_rank"),
        "kv_lora_rank": size(config, "kv_lora_rank"),
        "qk_rope_head_dim": rope,
        "v_head_dim": size(config, "v_head_dim"),
        "rope_interleave": flag(config, "rope_interleave", True),
    }


def read_latent_attention(reader: ModuleReader, c: LatentConfig, prefix: str) -> LatentAttention:
    """The attention whose modules are `{prefix}.q_a_proj` and so on."""
    heads, nope = c.num_attention_heads, c.head_dim - c.qk_rope_head_dim
    queries, latent = heads * c.head_dim, c.kv_lora_rank + c.qk_rope_head_dim
    rank, bias = c.q_lora_rank, c.qkv_bias
    whole = rank is None

    def by_heads(weight: jax.Array) -> HeadsOfLatent:
        """From `[kv_rank, heads * (nope + V)]`."""
        weight = weight.reshape(c.kv_lora_rank, heads, nope + c.v_head_dim)
        keys, values = weight[..., :nope], weight[..., nope:]
        return HeadsOfLatent(keys.transpose(1, 2, 0), values.transpose(1, 0, 2))

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
        kv_b_proj=reader.dequantized(
            f"{prefix}.kv_b_proj", (c.kv_lora_rank, heads * (nope + c.v_head_dim)), by_heads
        ),
        o_proj=reader.linear(f"{prefix}.o_proj", (heads * c.v_head_dim, c.hidden_size), c.o_bias),
        config=c,
    )


def _product(subscripts: str, x: jax.Array, weight: jax.Array) -> jax.Array:
    """Summed in float32, returned in x's dtype."""

    def summed(x: jax.Array, weight: jax.Array) -> jax.Array:
        return jnp.einsum(
            subscripts, x, weight, precision=exact(x.dtype), preferred_element_type=jnp.float32
        )

    def summed_wide(x: jax.Array, weight: jax.Array) -> jax.Array:
        return summed(x.astype(jnp.float32), weight.astype(jnp.float32))

    # XLA's CPU takes 16-bit products with float32 sums in some orders of axes only.
    return jax.lax.platform_dependent(x, weight, cpu=summed_wide, default=summed).astype(x.dtype)
