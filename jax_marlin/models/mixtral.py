"""Mixtral: every layer is sparse, its tensors named in any of the ways that writers have used."""

from collections.abc import Mapping
from typing import Any

from jax_marlin.models.config import DecoderConfig, decoder_fields, expert_counts
from jax_marlin.models.config_keys import layers, size
from jax_marlin.models.decoder_layer import DecoderLayer, SparseMlp
from jax_marlin.models.family import Family, read_decoder_layer, read_sparse_mlp
from jax_marlin.models.module_reader import ModuleReader

# Combined freely: block_sparse_moe with w1, w3, w2 (the hub, AutoGPTQ, AutoAWQ) or with gate_proj
# (llm-compressor), mlp with gate_proj (GPTQModel 7) or with w1.
_BLOCKS = ("block_sparse_moe", "mlp")
_EXPERT_LINEARS = (("w1", "w3", "w2"), ("gate_proj", "up_proj", "down_proj"))


def _read_config(config: Mapping[str, Any]) -> DecoderConfig:
    fields = decoder_fields(config, rms_norm_eps=1e-5, rope_theta=1e6)
    # Unlike in the Qwen families, the key alone switches it on; one as long as the context is none.
    window, context = config.get("sliding_window"), fields["max_position_embeddings"]
    if window is not None and not (isinstance(window, int) and window >= context):
        raise NotImplementedError(
            f"models.load: config.json has sliding_window {window!r}, expected null or at least "
            f"max_position_embeddings, {context}; sliding window attention is not implemented"
        )
    return DecoderConfig(
        **fields,
        **expert_counts(config),
        intermediate_size=0,
        moe_intermediate_size=size(config, "intermediate_size"),
        norm_topk_prob=True,
        qkv_bias=False,
        o_bias=False,
        sparse_layers=(True,) * layers(config, "num_hidden_layers"),
    )


def _read_layer(reader: ModuleReader, c: DecoderConfig, i: int) -> DecoderLayer:
    def read_mlp(prefix: str) -> SparseMlp:
        block = next((name for name in _BLOCKS if reader.has(f"{prefix}.{name}.gate")), None)
        if block is None:
            raise ValueError(
                f"models.load: {prefix} has no router, expected "
                f"{' or '.join(f'{prefix}.{name}.gate.weight' for name in _BLOCKS)}"
            )
        first = f"{prefix}.{block}.experts.0"
        for names in _EXPERT_LINEARS:
            if reader.has(f"{first}.{names[0]}"):
                return read_sparse_mlp(reader, c, f"{prefix}.{block}", names)
        raise ValueError(
            f"models.load: {first} is not there, expected linears named "
            f"{' or '.join(', '.join(names) for names in _EXPERT_LINEARS)}"
        )

    return read_decoder_layer(reader, c, i, read_mlp)


FAMILY = Family("mixtral", "MixtralForCausalLM", _read_config, _read_layer)
