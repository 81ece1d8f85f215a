"""Llama: every layer has one dense MLP; Llama 3.1 and later scale their rope."""

from collections.abc import Mapping
from typing import Any

from jax_marlin.models.config import DecoderConfig, decoder_fields, dense_fields
from jax_marlin.models.config_keys import flag
from jax_marlin.models.decoder_layer import DecoderLayer
from jax_marlin.models.family import Family, read_decoder_layer, read_dense_mlp
from jax_marlin.models.module_reader import ModuleReader


def _read_config(config: Mapping[str, Any]) -> DecoderConfig:
    bias = flag(config, "attention_bias", False)
    fields = decoder_fields(config) | dense_fields(config)
    return DecoderConfig(
        **fields, qkv_bias=bias, o_bias=bias, mlp_bias=flag(config, "mlp_bias", False)
    )


def _read_layer(reader: ModuleReader, c: DecoderConfig, i: int) -> DecoderLayer:
    return read_decoder_layer(
        reader, c, i, lambda prefix: read_dense_mlp(reader, c, f"{prefix}.mlp", c.intermediate_size)
    )


FAMILY = Family("llama", "LlamaForCausalLM", _read_config, _read_layer)
