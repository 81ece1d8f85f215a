"""Writes small GPTQ checkpoints of any shape, and says which weights they mean."""

import json
import struct

import numpy as np
import oracle
import safetensors.numpy

MODULE = "model.layers.0.proj"


def gptq_tensors(
    seed,
    k,
    n,
    *,
    bits=4,
    group_size=32,
    symmetric=True,
    checkpoint_format="gptq",
    act_order=False,
    bias=False,
    scale_dtype=np.float16,
):
    """One random linear: (tensors by last part of the name, its weight float64 [K, N])."""
    rng = np.random.default_rng(seed)
    size = k if group_size == -1 else group_size
    groups = -(-k // size)
    codes = rng.integers(0, 2**bits, (k, n))
    zeros = np.full((groups, n), 2 ** (bits - 1))
    if not symmetric:
        zeros = rng.integers(0, 2**bits, (groups, n))  # 0 too: v1 words then borrow
    scales = (rng.standard_normal((groups, n)) / 2**bits).astype(scale_dtype)
    g_idx = np.arange(k) // size
    if act_order:
        g_idx = rng.permutation(g_idx)
    tensors = {
        "qweight": oracle.pack_rows(codes, bits),
        "qzeros": oracle.pack_zeros(zeros, bits, checkpoint_format),
        "scales": scales,
        "g_idx": g_idx.astype(np.int32),
    }
    if bias:
        tensors["bias"] = rng.standard_normal(n).astype(scale_dtype)
    return tensors, oracle.dequantize(codes, scales, zeros, g_idx)


def linear(**changes):
    """Tensors of a linear of K = 64, N = 96; parts are replaced, or left out where None."""
    parts = gptq_tensors(1, 64, 96)[0] | changes
    return {part: array for part, array in parts.items() if array is not None}


def quantization(**overrides):
    """A GPTQ quantization config of 4 bit and group size 32."""
    return {
        "quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False,
        "checkpoint_format": "gptq", "pack_dtype": "int32", "meta": {"damp_percent": 0.05},
    } | overrides  # fmt: skip


def flat(modules):
    """{module: {part: array}} to {"module.part": array}."""
    return {f"{m}.{part}": array for m, parts in modules.items() for part, array in parts.items()}


def write(directory, modules, quantization_config=None, *, shards=1, config=None):
    """Writes config.json and the tensors, in `shards` files with an index if several."""
    directory.mkdir(parents=True, exist_ok=True)
    config = {"model_type": "synthetic"} | (config or {})
    if quantization_config is not None:
        config["quantization_config"] = quantization_config
    write_json(directory / "config.json", config)
    tensors = flat(modules)
    if shards == 1:
        safetensors.numpy.save_file(tensors, directory / "model.safetensors")
        return directory
    weight_map = {}
    for shard in range(shards):
        name = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(tensors.items())[shard::shards])
        safetensors.numpy.save_file(part, directory / name)
        weight_map |= dict.fromkeys(part, name)
    write_json(directory / "model.safetensors.index.json", {"weight_map": weight_map})
    return directory


def write_json(path, value):
    path.write_text(json.dumps(value))


def edit_header(path, change):
    """Rewrites a safetensors file's header: `change(header)` edits the parsed JSON in place."""
    raw = path.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + size])
    change(header)
    write_raw(path, json.dumps(header).encode(), raw[8 + size :])


def write_raw(path, header, data=b""):
    """A safetensors file of these header bytes and this data."""
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
