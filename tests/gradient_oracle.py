"""Gradients in float64 NumPy, each with the sum of magnitudes that bounds its error.

Imports no jax_marlin. A `Gradient` is a value and what remains of it when every factor is replaced
by its absolute value: rounding of relative size eps in the factors moves it by c * eps of that.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import oracle


class Gradient(NamedTuple):
    """A float64 value and the error that it may have."""

    value: np.ndarray
    budget: np.ndarray


class Routed(NamedTuple):
    """What `routed` returns: of x `[T, K]`, the weights `[T, top_k]` and the bias `[E, N]`."""

    x: Gradient
    weights: Gradient
    bias: Gradient


def routed(
    g, x, w, ids, dtype, *, weights=None, bias=None, weights_before_bias=False,
    g_error: npt.ArrayLike = 0.0, x_error: npt.ArrayLike = 0.0, c=4.0,
) -> Routed:  # fmt: skip
    """Of y[r] = weights[r] * (x[t] @ w[e] + bias[e]), given g of y `[T, top_k, N]`.

    Ids outside the experts have y = 0. `g_error` and `x_error` are errors that g and x came with.
    """
    (tokens, top_k), (experts, k, n) = np.shape(ids), np.shape(w)
    g, x = np.asarray(g, np.float64).reshape(tokens, top_k, n), np.asarray(x, np.float64)
    g_error, x_error = np.broadcast_to(g_error, g.shape), np.broadcast_to(x_error, x.shape)
    eps = max(oracle.epsilon(dtype), 4 * np.sqrt(n) * oracle.epsilon(np.float32))
    d_x, d_weights, d_bias = (
        (np.zeros(shape), np.zeros(shape)) for shape in ((tokens, k), (tokens, top_k), (experts, n))
    )
    for (t, i), e in np.ndenumerate(np.asarray(ids)):
        if not 0 <= e < experts:
            continue
        weight = 1.0 if weights is None else float(weights[t, i])
        own_bias = np.zeros(n) if bias is None else np.asarray(bias[e], np.float64)
        u = w[e] @ g[t, i]
        u_error = np.abs(w[e]) @ (g_error[t, i] + c * eps * np.abs(g[t, i]))
        d_x[0][t] += weight * u
        d_x[1][t] += abs(weight) * u_error
        after = 0.0 if weights_before_bias else 1.0
        d_weights[0][t, i] = x[t] @ u + after * (g[t, i] @ own_bias)
        d_weights[1][t, i] = (
            np.abs(x[t]) @ (u_error + eps * np.abs(u)) + x_error[t] @ (np.abs(u) + u_error)
            + after * np.abs(own_bias) @ (g_error[t, i] + c * eps * np.abs(g[t, i]))
        )  # fmt: skip
        scale = 1.0 if weights_before_bias else weight
        d_bias[0][e] += scale * g[t, i]
        d_bias[1][e] += abs(scale) * (g_error[t, i] + c * eps * np.abs(g[t, i]))
    return Routed(
        Gradient(d_x[0], d_x[1] + oracle.epsilon(dtype) * np.abs(d_x[0])),
        Gradient(*d_weights),
        Gradient(d_bias[0], d_bias[1] + oracle.epsilon(dtype) * np.abs(d_bias[0])),
    )


def gate_slope(gate, activation: str) -> tuple[np.ndarray, np.ndarray]:
    """The gate's factor and its derivative, both float64, of the oracle's activations."""
    gate = np.asarray(gate, np.float64)
    if activation == "silu":
        s = oracle.sigmoid(gate)
        return gate * s, s * (1 + gate * (1 - s))
    if activation == "gelu":
        cdf = 0.5 * (1 + oracle.erf(gate / np.sqrt(2)))
        return gate * cdf, cdf + gate * np.exp(-gate * gate / 2) / np.sqrt(2 * np.pi)
    if activation == "gelu_tanh":
        inner = np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)
        slope = np.sqrt(2 / np.pi) * (1 + 3 * 0.044715 * gate**2)
        t = np.tanh(inner)
        return 0.5 * gate * (1 + t), 0.5 * (1 + t) + 0.5 * gate * (1 - t * t) * slope
    if activation == "swiglu_oai":
        inside, low = gate < 7, np.minimum(gate, 7)
        s = oracle.sigmoid(1.702 * low)
        return low * s, inside * s * (1 + 1.702 * low * (1 - s))
    raise ValueError(f"gradient_oracle: unknown activation {activation!r}")


class LayerGradients(NamedTuple):
    """Of x, the router weights and the biases of gate_up and down."""

    x: Gradient
    weights: Gradient
    gate_up_bias: Gradient
    down_bias: Gradient


def moe_ffn(
    g, x, ids, weights, gate_up, down, dtype, *, activation="silu", gate_up_bias=None,
    down_bias=None, weights_on_input=False,
) -> LayerGradients:  # fmt: skip
    """Of `oracle.moe_ffn`, given g of its result `[T, N]`; errors are carried from step to step."""
    ids, x = np.asarray(ids), np.asarray(x, np.float64)
    tokens, top_k = ids.shape
    on_input = np.asarray(weights, np.float64).reshape(-1, 1) if weights_on_input else 1.0
    rows = np.repeat(x, top_k, axis=0) * on_input
    flat = ids.reshape(-1, 1)
    z = oracle.routed_rows(rows, gate_up, flat, gate_up_bias)
    z_error = 2 * max(oracle.epsilon(dtype), 4 * np.sqrt(x.shape[1]) * 2.0**-24) * (
        oracle.routed_rows(np.abs(rows), np.abs(gate_up), flat,
                           None if gate_up_bias is None else np.abs(gate_up_bias))
    )  # fmt: skip
    gate, up = np.split(z, 2, axis=1)
    gate_error, up_error = np.split(z_error, 2, axis=1)
    factor, slope = gate_slope(gate, activation)
    up_factor, up_inside = up, 1.0
    if activation == "swiglu_oai":
        up_factor, up_inside = np.clip(up, -7, 7) + 1, np.abs(up) < 7
    hidden = factor * up_factor
    # Slopes stay below 1.2 and curvatures below 1 for every activation here.
    hidden_error = (
        1.2 * gate_error * np.abs(up_factor) + (np.abs(factor) + 1.2 * gate_error) * up_error
        + oracle.epsilon(dtype) * np.abs(hidden)
    )  # fmt: skip

    g_rows = np.repeat(np.asarray(g, np.float64), top_k, axis=0)[:, None, :]
    last = None if weights_on_input else np.asarray(weights, np.float64).reshape(-1, 1)
    second = routed(
        g_rows, hidden, down, flat, dtype, weights=last, bias=down_bias, x_error=hidden_error
    )
    d_hidden, d_error = second.x
    d_gate, d_up = d_hidden * slope * up_factor, d_hidden * factor * up_inside
    d_gate_error = (
        d_error * np.abs(slope * up_factor)
        + (np.abs(d_hidden) + d_error)
        * (gate_error * (np.abs(up_factor) + up_error) + 1.2 * up_error)
    )  # fmt: skip
    d_up_error = d_error * np.abs(factor) + (np.abs(d_hidden) + d_error) * 1.2 * gate_error
    d_z, d_z_error = (
        np.concatenate(parts, axis=1).reshape(tokens, top_k, z.shape[1])
        for parts in ([d_gate, d_up], [d_gate_error, d_up_error])
    )
    first = routed(
        d_z, x, gate_up, ids, dtype, weights=weights if weights_on_input else None,
        bias=gate_up_bias, weights_before_bias=True, g_error=d_z_error,
    )  # fmt: skip
    d_weights = first.weights if weights_on_input else second.weights
    return LayerGradients(
        first.x, Gradient(*(a.reshape(ids.shape) for a in d_weights)), first.bias, second.bias
    )
