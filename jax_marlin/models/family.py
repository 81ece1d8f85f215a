"""What a family of models is to `load`, and how it reads the layer parts that families share."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jax_marlin.models.config import DecoderConfig
from jax_marlin.models.decoder_layer import Attention, DecoderLayer, DenseMlp, SparseMlp
from jax_marlin.models.module_reader import ModuleReader


@dataclasses.dataclass(frozen=True)
class Family:
    """One architecture: its names in config.json, its config, and how a layer of it is read.

    Attributes:
        model_type: config.json's `model_type`.
        architecture: the name that must stand in config.json's `architectures`.
        read_config: config.json to a `DecoderConfig` or a class derived from it.
        read_layer: (reader, that configuration, index) to the layer.
        unused: that configuration to the prefixes of tensors that the model does not run.
    """

    model_type: str
    architecture: str
    read_config: Callable[[Mapping[str, Any]], DecoderConfig]
    read_layer: Callable[[ModuleReader, Any, int], DecoderLayer]
    unused: Callable[[Any], tuple[str, ...]] = lambda config: ()


def read_decoder_layer(
    reader: ModuleReader,
    c: DecoderConfig,
    i: int,
    read_mlp: Callable[[str], SparseMlp | DenseMlp],
    *,
    head_norms: bool = False,
    read_attention: Callable[[str], Any] | None = None,
) -> DecoderLayer:
    """Layer i of the usual names; `read_mlp(prefix)` reads what follows attention.

    `head_norms`: queries and keys are normalised, by `q_norm` and `k_norm`.
    `read_attention(prefix)` reads attention of a family's own kind.
    """
    prefix = f"model.layers.{i}"
    if read_attention is None:
        self_attn = read_plain_attention(reader, c, f"{prefix}.self_attn", head_norms)
    else:
        self_attn = read_attention(f"{prefix}.self_attn")
    return DecoderLayer(
        input_layernorm=reader.weight(f"{prefix}.input_layernorm", (c.hidden_size,)),
        self_attn=self_attn,
        post_attention_layernorm=reader.weight(
            f"{prefix}.post_attention_layernorm", (c.hidden_size,)
        ),
        mlp=read_mlp(prefix),
    )


def read_plain_attention(
    reader: ModuleReader, c: DecoderConfig, prefix: str, head_norms: bool = False
) -> Attention:
    """The linears `q_proj`, `k_proj`, `v_proj`, `o_proj` and the norms of heads under `prefix`."""
    queries, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    return Attention(
        qkv_proj=reader.side_by_side(
            {
                f"{prefix}.{name}_proj": n
                for name, n in zip("qkv", (queries, keys, keys), strict=True)
            },
            c.hidden_size,
            c.qkv_bias,
        ),
        o_proj=reader.linear(f"{prefix}.o_proj", (queries, c.hidden_size), c.o_bias),
        q_norm=reader.weight(f"{prefix}.q_norm", (c.head_dim,)) if head_norms else None,
        k_norm=reader.weight(f"{prefix}.k_norm", (c.head_dim,)) if head_norms else None,
        config=c,
    )


def read_dense_mlp(reader: ModuleReader, c: DecoderConfig, prefix: str, width: int) -> DenseMlp:
    """The linears `gate_proj`, `up_proj` [H, width], together or apart, and `down_proj`."""
    return DenseMlp(
        gate_up_proj=reader.side_by_side(
            {f"{prefix}.{name}_proj": width for name in ("gate", "up")}, c.hidden_size, c.mlp_bias
        ),
        down_proj=reader.linear(f"{prefix}.down_proj", (width, c.hidden_size), c.mlp_bias),
        config=c,
    )


def read_sparse_mlp(
    reader: ModuleReader,
    c: DecoderConfig,
    prefix: str,
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
) -> SparseMlp:
    """The router `gate` and the `experts` under `prefix`; `names` are an expert's linears."""
    shape = (c.num_experts, c.hidden_size, c.moe_intermediate_size)
    gate_up, down = reader.experts(f"{prefix}.experts", names, shape)
    router = reader.linear(f"{prefix}.gate", (c.hidden_size, c.num_experts))
    return SparseMlp(router, gate_up, down, c)
