"""Random pack-quantized tensor sets, and a slow decoder written from the format's description."""

import numpy as np


def pack_last_axis(signed, bits):
    """Signed numbers [A, B] to int32 [A, ceil(B / P)], first in the lowest bits, offset added."""
    per_word = 32 // bits
    padded = np.pad(signed, ((0, 0), (0, -signed.shape[1] % per_word)))
    words = np.zeros((padded.shape[0], padded.shape[1] // per_word), np.int64)
    for place in range(per_word):
        words |= (padded[:, place::per_word].astype(np.int64) + 2 ** (bits - 1)) << (bits * place)
    return words.astype(np.uint32).view(np.int32)


def signed_number(words, row, column, bits):
    """Number `column` of a row of words, sign restored by taking the offset away."""
    word = int(words[row, column * bits // 32])
    return (word >> (column * bits % 32)) % 2**bits - 2 ** (bits - 1)


def packed_weight(parts, bits, group_size):
    """float64 [K, N] of stored tensors, one number after the other."""
    n, k = (int(size) for size in parts["weight_shape"])
    scales = np.asarray(parts["weight_scale"], np.float64)
    weight = np.empty((k, n))
    for row in range(k):
        group = 0 if group_size == -1 else row // group_size
        if "weight_g_idx" in parts and parts["weight_g_idx"][row] != -1:
            group = parts["weight_g_idx"][row]
        for column in range(n):
            zero = 0
            if "weight_zero_point" in parts:  # [ceil(N / P), G]: packed down the columns
                zero = signed_number(parts["weight_zero_point"].T, group, column, bits)
            q = signed_number(parts["weight_packed"], column, row, bits)
            weight[row, column] = scales[column, group] * (q - zero)
    return weight


def packed_tensors(
    seed, k, n, *, bits=4, group_size=32, symmetric=True, act_order=False, bias=False,
    dtype=np.float16,
):  # fmt: skip
    """One random linear, stored as compressed-tensors stores it."""
    rng = np.random.default_rng(seed)
    size = k if group_size == -1 else group_size
    groups, half = -(-k // size), 2 ** (bits - 1)
    parts = {
        "weight_packed": pack_last_axis(rng.integers(-half, half, (n, k)), bits),
        "weight_scale": (rng.standard_normal((n, groups)) / half).astype(dtype),
        "weight_shape": np.array([n, k], np.int64),
    }
    if not symmetric:
        zeros = rng.integers(-half, half, (groups, n))
        parts["weight_zero_point"] = np.ascontiguousarray(pack_last_axis(zeros, bits).T)
    if act_order:
        parts["weight_g_idx"] = rng.permutation(np.arange(k) // size).astype(np.int32)
    if bias:
        parts["bias"] = rng.standard_normal(n).astype(dtype)
    return parts


def scheme(**changes):
    """The `weights` of a config group: 4 bit, symmetric, group size 32."""
    return {
        "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32,
        "actorder": None, "block_structure": None, "dynamic": False, "observer": "minmax",
        "observer_kwargs": {}, "scale_dtype": None, "zp_dtype": None,
    } | changes  # fmt: skip


def group(targets=("Linear",), *, weights=None, **changes):
    """A config group of weights alone."""
    return {
        "targets": list(targets), "weights": scheme() if weights is None else weights,
        "input_activations": None, "output_activations": None, "format": "pack-quantized",
    } | changes  # fmt: skip


def packed_config(*groups, **changes):
    """A compressed-tensors config as llm-compressor writes it."""
    return {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "version": "0.19.0",
        "config_groups": {f"group_{i}": g for i, g in enumerate(groups or [group()])},
        "ignore": ["lm_head", "re:.*mlp.gate$"], "kv_cache_scheme": None, "transform_config": {},
        "quantization_status": "compressed", "sparsity_config": {},
        "global_compression_ratio": None,
    } | changes  # fmt: skip
