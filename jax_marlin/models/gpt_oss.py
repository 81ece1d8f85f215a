"""gpt-oss: attention with sinks, a sliding window in some layers, YaRN; experts in MXFP4."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from jax_marlin.models.attention import attend
from jax_marlin.models.config import DecoderConfig, decoder_fields, expert_counts
from jax_marlin.models.config_keys import flag, layers, names, size
from jax_marlin.models.decoder_layer import Attention, DecoderLayer, SparseMlp
from jax_marlin.models.family import Family, read_decoder_layer, read_plain_attention
from jax_marlin.models.module_reader import ModuleReader

_LAYER_TYPES = ("sliding_attention", "full_attention")


@dataclasses.dataclass(frozen=True)
class GptOssConfig(DecoderConfig):
    """`DecoderConfig`, and for each layer how far back it sees (None: all)."""

    windows: tuple[int | None, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class SinkAttention(Attention):
    """Grouped-query attention in which each head may also attend to nothing, by a learnt score."""

    sinks: jax.Array  # [heads]
    config: GptOssConfig = dataclasses.field(metadata={"static": True})
    window: int | None = dataclasses.field(metadata={"static": True})

    def attended(
        self, q: jax.Array, k: jax.Array, v: jax.Array, start: jax.Array | None
    ) -> jax.Array:
        """Values weighted, `[batch, seq, heads * head_dim]`."""
        return attend(q, k, v, start, window=self.window, sinks=self.sinks)


def _read_config(config: Mapping[str, Any]) -> GptOssConfig:
    fields = decoder_fields(config, rms_norm_eps=1e-5, rope_theta=150000.0)
    for key, only in (("swiglu_limit", 7.0), ("swiglu_alpha", 1.702)):
        if config.get(key, only) != only:
            raise NotImplementedError(
                f"models.load: config.json has {key} {config[key]!r}, expected {only}; no other "
                "clamped SwiGLU is implemented"
            )
    if fields["hidden_act"] != "silu":
        raise NotImplementedError(
            f"models.load: config.json has hidden_act {config['hidden_act']!r}, expected 'silu'"
        )
    depth, bias = layers(config, "num_hidden_layers"), flag(config, "attention_bias", True)
    kinds = names(config, "layer_types") or [_LAYER_TYPES[i % 2] for i in range(depth)]
    if len(kinds) != depth or not set(kinds) <= set(_LAYER_TYPES):
        raise ValueError(
            f"models.load: config.json has layer_types {kinds}, expected {depth} of "
            f"{' or '.join(_LAYER_TYPES)}"
        )
    window = size(config, "sliding_window", 128)
    return GptOssConfig(
        **(fields | {"hidden_act": "swiglu_clamped"}),
        **expert_counts(config),
        intermediate_size=0,
        moe_intermediate_size=size(config, "intermediate_size"),
        norm_topk_prob=True,  # a softmax over the chosen logits
        qkv_bias=bias,
        o_bias=bias,
        sparse_layers=(True,) * depth,
        windows=tuple(window if kind == "sliding_attention" else None for kind in kinds),
    )


def _read_layer(reader: ModuleReader, c: GptOssConfig, i: int) -> DecoderLayer:
    def read_sinks(prefix: str) -> SinkAttention:
        plain = read_plain_attention(reader, c, prefix)
        parts = {f.name: getattr(plain, f.name) for f in dataclasses.fields(plain)}
        sinks = reader.parameter(prefix, "sinks", (c.num_attention_heads,))
        return SinkAttention(**parts, sinks=sinks, window=c.windows[i])

    def read_mlp(prefix: str) -> SparseMlp:
        prefix, experts = f"{prefix}.mlp", c.num_experts
        outer, inner = c.hidden_size, c.moe_intermediate_size
        return SparseMlp(
            gate=reader.linear(f"{prefix}.router", (outer, experts), needs_bias=True),
            gate_up=reader.fused_experts(
                f"{prefix}.experts.gate_up_proj", (experts, outer, 2 * inner), in_turn=True
            ),
            down=reader.fused_experts(f"{prefix}.experts.down_proj", (experts, inner, outer)),
            config=c,
        )

    return read_decoder_layer(reader, c, i, read_mlp, read_attention=read_sinks)


FAMILY = Family("gpt_oss", "GptOssForCausalLM", _read_config, _read_layer)
