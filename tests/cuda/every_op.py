"""Calls every op with a kernel once on a small problem: what compute-sanitizer watches."""

import dataclasses
import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np

import jax_marlin as jm


# Families of kernels: each dtype, width and kind of zero points is compiled for itself.
FAMILIES = list(itertools.product(("float16", "bfloat16"), (4, 8), ("symmetric", "asymmetric")))
# One row count for each tile of the kernel's table, and one past the largest.
ROWS = (1, 9, 17, 33, 67)


def main(dtype: str, bits: int, zero_points: str) -> None:
    rng = np.random.default_rng(5)
    # Sanitized, each small program of XLA takes a second: weights and inputs are made on the host.
    with jax.default_device(jax.devices("cpu")[0]):
        options = {"bits": bits, "symmetric": zero_points == "symmetric", "dtype": dtype}
        gate_up = jm.quantize(rng.normal(size=(3, 96, 144)) / 10, group_size=32, **options)
        down = jm.quantize(rng.normal(size=(3, 72, 96)) / 10, group_size=-1, **options)
        wide = jm.quantize(rng.normal(size=(3, 96, 256)) / 10, group_size=32, **options)
        narrow = jm.quantize(rng.normal(size=(3, 128, 96)) / 10, group_size=-1, **options)
        long = jm.quantize(rng.normal(size=(2048, 64)) / 10, group_size=128, **options)
    # Act-order of each expert's own: the gather kernel.
    perm = np.stack([rng.permutation(96).astype(np.int32) for _ in range(3)])
    on_gpu = jax.device_put((gate_up, down, wide, narrow, long, perm), jax.devices()[0])
    gate_up, down, wide, narrow, long, perm = on_gpu
    permuted = dataclasses.replace(gate_up, perm=perm)

    @jax.jit
    def run(x, topk_weights, topk_ids, counts):
        routing = jm.moe_align_block_size(topk_ids, 16, 3)
        routed = {"moe_block_size": 16, "top_k": 2}
        return (
            # I = 72 is composed of single ops, I = 128 is one call, gated by mma.sync or wgmma.
            jm.moe_ffn(x, topk_ids, topk_weights, gate_up, down),
            jm.moe_ffn(x, topk_ids, topk_weights, wide, narrow, implementation="cuda"),
            jm.moe_matmul(x, permuted, *routing, **routed),
            jm.matmul(x, gate_up[2], implementation="cuda"),
            jm.ragged_dot(x, gate_up, counts),
        )

    for rows in ROWS:
        x = jnp.asarray(rng.normal(size=(rows, 96)).astype(dtype))
        topk_ids = rng.integers(0, 3, (rows, 2)).astype(np.int32)
        topk_weights = np.full((rows, 2), 0.5, np.float32)
        for result in run(x, topk_weights, topk_ids, np.array([0, rows - 1, 0], np.int32)):
            assert np.isfinite(np.asarray(result).astype(np.float32)).all()
        print(f"{rows} rows ran", flush=True)
    # Split K with its scratch: few columns, long K.
    jax.block_until_ready(long(jnp.ones((5, 2048), dtype)))
    print("every op ran")


if __name__ == "__main__":
    main(*FAMILIES[int(sys.argv[1])])
