"""The float64 NumPy oracle: what GPTQ tensors mean and what the ops compute. Imports no jax_marlin.

Written from the format description alone (b bits, P = 32 / b codes a word, G groups):

    qweight int32 [K b / 32, N]   P consecutive K in one word, the lowest bits are the lowest k
    qzeros  int32 [G, N b / 32]   P consecutive N in one word; v1 stores words of z - 1, v2 of z
    W[k, n] = scales[g, n] * (q[k, n] - z[g, n]),  g = g_idx[k], or k // group_size without g_idx

v1 words were written by subtracting 0x11111111 (4 bit) or 0x01010101 (8 bit) from whole words, so a
zero point of 0 borrows from its neighbours; only whole-word addition modulo 2**32 undoes that.
"""

import math

import numpy as np
import numpy.typing as npt

ONES = {4: 0x11111111, 8: 0x01010101}  # a one in each field of a word


def pack_rows(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes [K, N] to qweight int32 [K * bits / 32, N]."""
    per_word = 32 // bits
    words = np.zeros((codes.shape[0] // per_word, codes.shape[1]), np.uint32)
    for k in range(codes.shape[0]):
        words[k // per_word] |= codes[k].astype(np.uint32) << np.uint32(bits * (k % per_word))
    return words.view(np.int32)


def unpack_rows(qweight: np.ndarray, bits: int) -> np.ndarray:
    """qweight int32 [K * bits / 32, N] to codes int64 [K, N]."""
    per_word = 32 // bits
    words = qweight.view(np.uint32).astype(np.int64)
    codes = np.empty((words.shape[0] * per_word, words.shape[1]), np.int64)
    for place in range(per_word):
        codes[place::per_word] = (words >> (bits * place)) & (2**bits - 1)
    return codes


def pack_zeros(zero_points: np.ndarray, bits: int, checkpoint_format: str = "gptq") -> np.ndarray:
    """Zero points [G, N] to qzeros int32 [G, N * bits / 32], as the real tools write them."""
    words = np.ascontiguousarray(pack_rows(zero_points.T, bits).T).view(np.uint32)
    if checkpoint_format == "gptq":
        words = (words.astype(np.int64) - ONES[bits]) % 2**32
    return words.astype(np.uint32).view(np.int32)


def unpack_zeros(qzeros: np.ndarray, bits: int, checkpoint_format: str = "gptq") -> np.ndarray:
    """qzeros int32 [G, N * bits / 32] to zero points int64 [G, N]."""
    words = np.ascontiguousarray(qzeros).view(np.uint32).astype(np.int64)
    if checkpoint_format == "gptq":
        words = (words + ONES[bits]) % 2**32
    words = np.ascontiguousarray(words.T.astype(np.uint32))
    return unpack_rows(words.view(np.int32), bits).T


def dequantize(codes, scales, zero_points, group_of_row) -> np.ndarray:
    """float64 [K, N]; `zero_points` [G, N] or one number, `group_of_row` int [K]."""
    scales = np.asarray(scales, np.float64)[group_of_row]
    zeros = np.asarray(zero_points, np.float64)
    return scales * (np.asarray(codes, np.float64) - (zeros[group_of_row] if zeros.ndim else zeros))


def gptq_weight(
    qweight, scales, qzeros=None, g_idx=None, *, bits, group_size, checkpoint_format="gptq"
) -> np.ndarray:
    """float64 [K, N] of one GPTQ tensor set; no qzeros means symmetric."""
    codes = unpack_rows(np.asarray(qweight), bits)
    k = codes.shape[0]
    if g_idx is None:
        g_idx = np.arange(k) // (k if group_size == -1 else group_size)
    zeros = 2 ** (bits - 1)
    if qzeros is not None:
        zeros = unpack_zeros(np.asarray(qzeros), bits, checkpoint_format)
    return dequantize(codes, scales, zeros, np.asarray(g_idx))


def matmul(x, w, bias=None) -> np.ndarray:
    """x [..., K] times w [K, N], plus bias [N]; float64."""
    y = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
    return y if bias is None else y + np.asarray(bias, np.float64)


def ragged_dot(x, w, group_sizes) -> np.ndarray:
    """Rows of x [M, K] in runs of group_sizes [E] times w [E, K, N]; further rows are zero."""
    y = np.zeros((len(x), w.shape[2]))
    start = 0
    for expert, size in enumerate(group_sizes):
        rows = slice(start, start + int(size))
        y[rows] = matmul(x[rows], w[expert])
        start += int(size)
    return y


def routed_rows(x, w, topk_ids, bias=None) -> np.ndarray:
    """x [T, K], topk_ids [T, k] to [T * k, N]: row t * k + i is x[t] times expert topk_ids[t, i].

    Ids outside the experts give zero rows.
    """
    tokens, top_k = np.shape(topk_ids)
    y = np.zeros((tokens * top_k, w.shape[2]))
    for row, expert in enumerate(np.asarray(topk_ids).ravel()):
        if 0 <= expert < len(w):
            own_bias = None if bias is None else bias[expert]
            y[row] = matmul(x[row // top_k], w[expert], own_bias)
    return y


def moe_matmul(
    x, w, sorted_token_ids, expert_ids, num_tokens_past_padded, *, moe_block_size, top_k, bias=None
) -> np.ndarray:
    """The same rows from vLLM's sorted form: slot id s reads x[s // top_k] and writes out[s]."""
    num_rows = len(x) * top_k
    y = np.zeros((num_rows, w.shape[2]))
    for slot in range(int(np.ravel(num_tokens_past_padded)[0])):
        row, expert = int(sorted_token_ids[slot]), int(expert_ids[slot // moe_block_size])
        if 0 <= row < num_rows and 0 <= expert < len(w):
            own_bias = None if bias is None else bias[expert]
            y[row] = matmul(x[row // top_k], w[expert], own_bias)
    return y


def activate(gate_up, activation: str, limit: float = 7.0, alpha: float = 1.702) -> np.ndarray:
    """[R, 2 I] (first all of gate, then all of up) to [R, I]."""
    gate, up = np.split(np.asarray(gate_up, np.float64), 2, axis=-1)
    if activation == "silu":
        return gate * sigmoid(gate) * up
    if activation == "gelu":
        return gate * 0.5 * (1 + erf(gate / np.sqrt(2))) * up
    if activation == "gelu_tanh":
        return gate * 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3))) * up
    if activation == "swiglu_oai":  # gpt-oss: gate clipped above, up on both sides
        gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
        return gate * sigmoid(alpha * gate) * (up + 1)
    raise ValueError(f"oracle.activate: unknown activation {activation!r}")


def moe_ffn(
    x, topk_ids, topk_weights, gate_up, down, *, activation="silu", gate_up_bias=None,
    down_bias=None, weights_on_input=False,
) -> np.ndarray:  # fmt: skip
    """A MoE layer [T, H]; gate_up [E, H, 2 I], down [E, I, H], biases [E, 2 I] and [E, H]."""
    tokens, top_k = np.shape(topk_ids)
    ids = np.asarray(topk_ids)
    weights = np.asarray(topk_weights, np.float64).reshape(-1, 1)
    rows = np.repeat(np.asarray(x, np.float64), top_k, axis=0)
    if weights_on_input:
        rows, weights = rows * weights, np.ones_like(weights)
    hidden = routed_rows(rows, gate_up, ids.reshape(-1, 1), gate_up_bias)
    y = routed_rows(activate(hidden, activation), down, ids.reshape(-1, 1), down_bias)
    return (y * weights).reshape(tokens, top_k, -1).sum(axis=1)


def sigmoid(a: npt.ArrayLike) -> np.ndarray:
    return 0.5 * (1 + np.tanh(0.5 * np.asarray(a, np.float64)))


def erf(a: np.ndarray) -> np.ndarray:
    return np.vectorize(math.erf, otypes=[np.float64])(a)


def epsilon(dtype) -> float:
    """Half the gap above 1 of a float dtype: the largest relative error of one rounding."""
    bits = {"float16": 11, "bfloat16": 8, "float32": 24, "float64": 53}[np.dtype(dtype).name]
    return 2.0**-bits


def matmul_budget(x, w, dtype, bias=None, c: float = 2.0) -> np.ndarray:
    """Largest honest error of each element: c * eps * (|x| . |w| + |bias|) of the output dtype.

    float32 sums are as long as K, so their eps grows with sqrt(K).
    """
    magnitude = matmul(np.abs(x), np.abs(w), None if bias is None else np.abs(bias))
    eps = max(epsilon(dtype), 4 * np.sqrt(np.shape(w)[-2]) * epsilon(np.float32))
    return c * eps * magnitude


def assert_within(actual, expected, budget, what: str = "result") -> None:
    """Every element of `actual` is finite and within its own budget of `expected`."""
    actual = np.asarray(actual).astype(np.float64)
    assert actual.shape == np.shape(expected), f"{what}: {actual.shape} != {np.shape(expected)}"
    error = np.abs(actual - expected)
    wrong = ~(error <= budget)  # NaN is wrong
    if wrong.any():
        place = tuple(int(i) for i in np.argwhere(wrong)[0])
        allowed = float(np.broadcast_to(budget, wrong.shape)[place])
        raise AssertionError(
            f"{what}: {int(wrong.sum())} of {wrong.size} elements are off, the first at {place}: "
            f"{actual[place]} != {expected[place]}, budget {allowed}"
        )
