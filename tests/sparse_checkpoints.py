"""Checkpoints of any size that take no disk: files of holes, which read as zeros."""

import json
import struct
from pathlib import Path

_BYTES = {"I32": 4, "F16": 2}


def write_sparse_qwen3_moe(
    directory: Path, *, layers: int, experts: int, hidden: int, intermediate: int, vocab: int = 512
) -> Path:
    """A GPTQ Qwen3-MoE checkpoint, a shard a layer; every code and weight is zero."""
    heads, head_dim = 4, hidden // 16
    config = {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "dtype": "float16",
        "hidden_size": hidden, "intermediate_size": hidden, "moe_intermediate_size": intermediate,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": heads,
        "head_dim": head_dim, "vocab_size": vocab, "num_experts": experts,
        "num_experts_per_tok": 2, "norm_topk_prob": True, "rms_norm_eps": 1e-6,
        "rope_theta": 1e6, "hidden_act": "silu", "tie_word_embeddings": True,
        "max_position_embeddings": 4096, "attention_bias": False, "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "quantization_config": {
            "quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False,
        },
    }  # fmt: skip
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    shards = [{
        "model.embed_tokens.weight": ("F16", [vocab, hidden]),
        "model.norm.weight": ("F16", [hidden]),
    }]  # fmt: skip
    for i in range(layers):
        prefix = f"model.layers.{i}"
        width = heads * head_dim
        tensors = {
            f"{prefix}.input_layernorm.weight": ("F16", [hidden]),
            f"{prefix}.post_attention_layernorm.weight": ("F16", [hidden]),
            f"{prefix}.self_attn.q_norm.weight": ("F16", [head_dim]),
            f"{prefix}.self_attn.k_norm.weight": ("F16", [head_dim]),
            f"{prefix}.self_attn.o_proj.weight": ("F16", [hidden, width]),
            f"{prefix}.mlp.gate.weight": ("F16", [experts, hidden]),
        }
        for name in ("q_proj", "k_proj", "v_proj"):
            tensors[f"{prefix}.self_attn.{name}.weight"] = ("F16", [width, hidden])
        for e in range(experts):
            for name, k, n in [
                ("gate_proj", hidden, intermediate),
                ("up_proj", hidden, intermediate),
                ("down_proj", intermediate, hidden),
            ]:
                module = f"{prefix}.mlp.experts.{e}.{name}"
                tensors[f"{module}.qweight"] = ("I32", [k // 8, n])
                tensors[f"{module}.scales"] = ("F16", [k // 128, n])
        shards.append(tensors)
    for i, tensors in enumerate(shards):
        _write(directory / f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors", tensors)
    return directory


def _write(path: Path, tensors: dict) -> None:
    header, start = {}, 0
    for name, (dtype, shape) in tensors.items():
        size = _BYTES[dtype]
        for axis in shape:
            size *= axis
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, start + size]}
        start += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + start)
