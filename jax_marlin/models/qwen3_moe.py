"""Qwen3-MoE: query and key heads are normalised; layers may be sparse or dense."""

from collections.abc import Mapping
from typing import Any

from jax_marlin.models.config import DecoderConfig, decoder_fields, qwen_moe_fields
from jax_marlin.models.config_keys import flag
from jax_marlin.models.decoder_layer import DecoderLayer, DenseMlp, SparseMlp
from jax_marlin.models.family import Family, read_decoder_layer, read_dense_mlp, read_sparse_mlp
from jax_marlin.models.module_reader import ModuleReader


def _read_config(config: Mapping[str, Any]) -> DecoderConfig:
    bias = flag(config, "attention_bias", False)
    fields = decoder_fields(config) | qwen_moe_fields(config)
    return DecoderConfig(**fields, qkv_bias=bias, o_bias=bias)


def _read_layer(reader: ModuleReader, c: DecoderConfig, i: int) -> DecoderLayer:
    def read_mlp(prefix: str) -> SparseMlp | DenseMlp:
        if c.sparse_layers[i]:
            return read_sparse_mlp(reader, c, f"{prefix}.mlp")
        return read_dense_mlp(reader, c, f"{prefix}.mlp", c.intermediate_size)

    return read_decoder_layer(reader, c, i, read_mlp, head_norms=True)


FAMILY = Family("qwen3_moe", "Qwen3MoeForCausalLM", _read_config, _read_layer)
