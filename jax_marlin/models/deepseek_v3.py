"""DeepSeek-V3, R1 and Kimi-K2: latent attention, group-limited routing, experts all tokens pass."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jax_marlin.models.config import decoder_fields, expert_counts
from jax_marlin.models.config_keys import flag, layers, number, size
from jax_marlin.models.decoder_layer import DecoderLayer, DenseMlp, SparseMlp
from jax_marlin.models.family import Family, read_decoder_layer, read_dense_mlp, read_sparse_mlp
from jax_marlin.models.latent_attention import (
    LatentConfig,
    latent_fields,
    read_latent_attention,
)
from jax_marlin.models.layers import linear_float32
from jax_marlin.models.module_reader import ModuleReader
from jax_marlin.ops.moe_ffn import moe_ffn
from jax_marlin.routing import route


@dataclasses.dataclass(frozen=True)
class DeepseekV3Config(LatentConfig):
    """`LatentConfig`, routing, shared experts."""

    n_group: int
    topk_group: int
    routed_scaling_factor: float
    shared_width: int  # of all shared experts together, 0 if there are none
    skipped_layers: tuple[int, ...]  # that predict tokens further ahead


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
        with jax.named_scope("router"):
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
        with jax.named_scope("experts"):
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
    fields = decoder_fields(config)
    fields |= latent_fields(config, fields["num_attention_heads"])
    return DeepseekV3Config(
        **fields,
        **expert_counts(config),
        intermediate_size=size(config, "intermediate_size"),
        moe_intermediate_size=inner,
        norm_topk_prob=flag(config, "norm_topk_prob", True),
        qkv_bias=flag(config, "attention_bias", False),
        o_bias=flag(config, "attention_bias", False),
        sparse_layers=tuple(i >= dense and i % step == 0 for i in range(depth)),
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
        reader,
        c,
        i,
        read_mlp,
        read_attention=lambda prefix: read_latent_attention(reader, c, prefix),
    )


def _unused(c: DeepseekV3Config) -> tuple[str, ...]:
    return tuple(f"model.layers.{i}." for i in c.skipped_layers)


FAMILY = Family("deepseek_v3", "DeepseekV3ForCausalLM", _read_config, _read_layer, _unused)
KIMI_K2 = dataclasses.replace(FAMILY, model_type="kimi_k2")  # the same architecture by its own name
