"""Decoder pieces in float64 NumPy, one head and one position at a time, from their descriptions."""

import math

import numpy as np


def rms_norm(x, weight, eps):
    x = np.asarray(x, np.float64)
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * np.asarray(weight, np.float64)


def silu(x):
    return x / (1 + np.exp(-x))


def frequencies(dim, theta, rope):
    """(radians a position for each pair, factor on cosines and sines) of a rope dictionary."""
    plain = np.array([theta ** (-2 * i / dim) for i in range(dim // 2)])
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return plain, 1.0
    factor, context = rope["factor"], rope["original_max_position_embeddings"]
    if kind == "llama3":
        limits = rope["low_freq_factor"], rope["high_freq_factor"]
        return np.array([llama3_frequency(f, factor, context, *limits) for f in plain]), 1.0

    def pair_with(turns):  # whose wavelength fits `turns` times into the original context
        return dim * math.log(context / (2 * math.pi * turns)) / (2 * math.log(theta))

    low, high = pair_with(rope.get("beta_fast", 32)), pair_with(rope.get("beta_slow", 1))
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    out = []
    for i, frequency in enumerate(plain):
        share = min(max((i - low) / (high - low), 0), 1)  # of the slowed-down frequency
        out.append(share * frequency / factor + (1 - share) * frequency)

    def temperature(mscale):
        return 0.1 * mscale * math.log(factor) + 1

    if "attention_factor" in rope:
        return np.array(out), rope["attention_factor"]
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return np.array(out), temperature(rope["mscale"]) / temperature(rope["mscale_all_dim"])
    return np.array(out), temperature(1)


def llama3_frequency(frequency, factor, context, low, high):
    wavelength = 2 * math.pi / frequency
    if wavelength > context / low:
        return frequency / factor
    if wavelength > context / high:
        mix = (context / wavelength - low) / (high - low)
        return (1 - mix) * frequency / factor + mix * frequency
    return frequency


def turned(head, position, radians, factor, *, neighbours=False):
    """One head's features as complex pairs turned; pairs are neighbours, or halves apart."""
    half = len(head) // 2
    pairs = head[0::2] + 1j * head[1::2] if neighbours else head[:half] + 1j * head[half:]
    pairs = pairs * factor * np.exp(1j * position * radians)
    return np.concatenate([pairs.real, pairs.imag])


def attention(q, k, v, *, scale, window=None, sinks=None):
    """q, k [T, heads, D], v [T, heads, V] to [T, heads * V]; causal."""
    tokens, heads, _ = q.shape
    out = np.zeros((tokens, heads, v.shape[2]))
    for t in range(tokens):
        first = 0 if window is None else max(0, t - window + 1)
        for h in range(heads):
            scores = np.array([scale * q[t, h] @ k[s, h] for s in range(first, t + 1)])
            weights = np.exp(scores)
            total = weights.sum() + (0 if sinks is None else np.exp(float(sinks[h])))
            out[t, h] = (weights / total) @ v[first : t + 1, h]
    return out.reshape(tokens, -1)
