"""Random quantized weights for tests, what they decode to, and stacks built from them."""

import numpy as np
import oracle
from jax.typing import DTypeLike

from jax_marlin.canonical import CanonicalLinear
from jax_marlin.quant_spec import QuantSpec
from jax_marlin.stack_builder import StackBuilder
from jax_marlin.weights import MarlinExpertStack

SPEC = QuantSpec.create(bits=4, group_size=32, k=96, n=192)


def random_linear(
    seed: int, spec: QuantSpec = SPEC, *, asymmetric=False, act_order=False, bias=False
) -> CanonicalLinear:
    rng = np.random.default_rng(seed)
    groups = (spec.num_groups, spec.n)
    return CanonicalLinear.from_codes(
        codes=rng.integers(0, 2**spec.bits, (spec.k, spec.n), dtype=np.uint8),
        scales=rng.standard_normal(groups).astype(np.float32),  # of both signs
        zero_points=rng.integers(0, 2**spec.bits, groups, dtype=np.uint8) if asymmetric else None,
        perm=rng.permutation(spec.k).astype(np.int32) if act_order else None,
        bias=rng.standard_normal(spec.n).astype(np.float32) if bias else None,
        bits=spec.bits,
    )


def dense(linear: CanonicalLinear, spec: QuantSpec = SPEC) -> np.ndarray:
    """float64 [K, N], rows in the original order."""
    zeros = 2 ** (spec.bits - 1) if linear.zero_points is None else linear.zero_points
    rows = oracle.dequantize(
        linear.codes, linear.scales, zeros, np.arange(spec.k) // spec.group_size
    )
    out = np.empty_like(rows)
    out[slice(None) if linear.perm is None else linear.perm] = rows
    return out


def build(
    linears: list[CanonicalLinear], spec: QuantSpec = SPEC, dtype: DTypeLike = np.float32
) -> MarlinExpertStack:
    builder = StackBuilder(len(linears), spec, dtype)
    for e, linear in enumerate(linears):
        builder.set_expert(e, linear)
    return builder.finish()


def assert_dense(stack, linears: list[CanonicalLinear], spec: QuantSpec = SPEC) -> None:
    expected = np.stack([dense(linear, spec) for linear in linears])
    oracle.assert_within(stack.dequantize(), expected, 2.0**-22 * np.abs(expected))
