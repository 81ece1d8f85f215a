"""Qwen2-MoE: beside the routed experts one that every token passes, scaled by a sigmoid gate."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jax_marlin.models.config import DecoderConfig, decoder_fields, qwen_moe_fields
from jax_marlin.models.config_keys import flag, size
from jax_marlin.models.decoder_layer import DecoderLayer, DenseMlp, SparseMlp
from jax_marlin.models.family import Family, read_decoder_layer, read_dense_mlp, read_sparse_mlp
from jax_marlin.models.layers import Linear, linear_float32
from jax_marlin.models.module_reader import ModuleReader


@dataclasses.dataclass(frozen=True)
class Qwen2MoeConfig(DecoderConfig):
    """`DecoderConfig` and the width of the shared expert (0 where no layer is sparse)."""

    shared_expert_intermediate_size: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class SharedExpertMlp(SparseMlp):
    """A mixture of experts, plus an expert that is not routed."""

    shared_expert: DenseMlp
    shared_expert_gate: Linear  # [H, 1]

    def __call__(self, x: jax.Array) -> jax.Array:
        """x `[..., H]` to the same shape; the gate and the sum in float32."""
        share = jax.nn.sigmoid(linear_float32(x, self.shared_expert_gate))  # [..., 1]
        shared = share * self.shared_expert(x).astype(jnp.float32)
        return (super().__call__(x).astype(jnp.float32) + shared).astype(x.dtype)


def _read_config(config: Mapping[str, Any]) -> Qwen2MoeConfig:
    fields = decoder_fields(config) | qwen_moe_fields(config)
    sparse = any(fields["sparse_layers"])
    return Qwen2MoeConfig(
        **fields,
        qkv_bias=flag(config, "qkv_bias", True),  # a key younger than the first checkpoints
        o_bias=False,
        shared_expert_intermediate_size=(
            size(config, "shared_expert_intermediate_size") if sparse else 0
        ),
    )


def _read_layer(reader: ModuleReader, c: Qwen2MoeConfig, i: int) -> DecoderLayer:
    def read_mlp(prefix: str) -> SparseMlp | DenseMlp:
        prefix = f"{prefix}.mlp"
        if not c.sparse_layers[i]:
            return read_dense_mlp(reader, c, prefix, c.intermediate_size)
        routed, width = read_sparse_mlp(reader, c, prefix), c.shared_expert_intermediate_size
        return SharedExpertMlp(
            routed.gate,
            routed.gate_up,
            routed.down,
            c,
            shared_expert=read_dense_mlp(reader, c, f"{prefix}.shared_expert", width),
            shared_expert_gate=reader.linear(f"{prefix}.shared_expert_gate", (c.hidden_size, 1)),
        )

    return read_decoder_layer(reader, c, i, read_mlp)


FAMILY = Family("qwen2_moe", "Qwen2MoeForCausalLM", _read_config, _read_layer)
