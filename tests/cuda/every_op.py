"""Calls every op with a kernel once on a small problem: what compute-sanitizer watches."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np

import jax_marlin as jm

# One row count for each height of a tile up to 64, and one past it.
ROWS = (1, 9, 17, 33, 67)


def main(tool: str, dtype: str, bits: int, zero_points: str) -> None:
    """One family of kernels: each dtype, width and kind of zero points is compiled for itself."""
    rng = np.random.default_rng(5)
    # Sanitized, each small program of XLA takes a second: weights and inputs are made on the host.
    with jax.default_device(jax.devices("cpu")[0]):
        options = {"bits": bits, "symmetric": zero_points == "symmetric", "dtype": dtype}
        gate_up = jm.quantize(rng.normal(size=(3, 96, 144)) / 10, group_size=32, **options)
        down = jm.quantize(rng.normal(size=(3, 72, 96)) / 10, group_size=-1, **options)
        wide = jm.quantize(rng.normal(size=(3, 96, 256)) / 10, group_size=32, **options)
        narrow = jm.quantize(rng.normal(size=(3, 128, 96)) / 10, group_size=-1, **options)
        one, flat = (
            jm.quantize(rng.normal(size=(1, *size)) / 10, group_size=-1, **options)
            for size in ((96, 256), (128, 72))
        )
        tall, deep, broad = (
            jm.quantize(rng.normal(size=(1, *size)) / 10, group_size=-1, **options)
            for size in ((96, 4096), (2048, 72), (96, 16904))
        )
        square = tuple(
            jm.quantize(rng.normal(size=(1, 1280, n)) / 40, group_size=-1, **options)
            for n in (2560, 1280)
        )
        pair = jm.quantize(rng.normal(size=(2, 8256, 136)) / 90, group_size=32, **options)
        long = jm.quantize(rng.normal(size=(2080, 64)) / 10, group_size=-1, **options)
    # Act-order of each expert's own: the gather kernel.
    perm = np.stack([rng.permutation(96).astype(np.int32) for _ in range(3)])
    stacks = (gate_up, down, wide, narrow, one, flat, tall, deep, broad, square, pair, long, perm)
    on_gpu = jax.device_put(stacks, jax.devices()[0])
    gate_up, down, wide, narrow, one, flat, tall, deep, broad, square, pair, long, perm = on_gpu
    permuted = dataclasses.replace(gate_up, perm=perm)

    def routed(x, topk_weights, topk_ids, counts):
        routing = jm.moe_align_block_size(topk_ids, 16, 3)
        return jm.moe_matmul(x, permuted, *routing, moe_block_size=16, top_k=2)

    operations = {
        # I = 72 is composed of single ops, I = 128 is one call.
        "moe_ffn of ops": lambda x, w, ids, counts: jm.moe_ffn(x, ids, w, gate_up, down),
        "moe_ffn": lambda x, w, ids, counts: jm.moe_ffn(x, ids, w, wide, narrow),
        "moe_matmul": routed,
        "matmul": lambda x, w, ids, counts: jm.matmul(x, gate_up[2], implementation="cuda"),
        "ragged_dot": lambda x, w, ids, counts: jm.ragged_dot(x, gate_up, counts),
        "gradient of ragged_dot": lambda x, w, ids, counts: jax.grad(
            lambda x: jm.ragged_dot(x, gate_up, counts).astype(jnp.float32).sum()
        )(x),
    }
    for name, operation in operations.items():
        for rows in ROWS:
            x = rng.normal(size=(rows, 96)).astype(dtype)
            topk_ids = rng.integers(0, 3, (rows, 2)).astype(np.int32)
            topk_weights = np.full((rows, 2), 0.5, np.float32)
            counts = np.array([0, rows - 1, 0], np.int32)
            result = jax.jit(operation)(x, topk_weights, topk_ids, counts)
            assert np.isfinite(np.asarray(result).astype(np.float32)).all()
            print(f"{name} of {rows} rows ran", flush=True)
    # Blocks of 96, 128 and 144 rows; then of 256 with x and hidden in the order of slots, which two
    # blocks share, and parts of K that meet in a cluster. There racecheck reports every slot of a
    # ring that is filled again, for it does not follow arrivals from another block.
    layers = [(80, 3, (wide, narrow)), (300, 3, (wide, narrow)), (530, 1, (one, flat))]
    if tool != "racecheck":
        layers.append((530, 1, (tall, deep)))
    for rows, experts, layer in layers:
        x = jnp.asarray(rng.normal(size=(rows, 96)), dtype)
        topk_ids = jnp.asarray(rng.integers(0, experts, (rows, experts)), jnp.int32)
        result = jax.jit(jm.moe_ffn)(x, topk_ids, jnp.full(topk_ids.shape, 0.5), *layer)
        assert np.isfinite(np.asarray(result).astype(np.float32)).all()
    # Blocks of 16 rows, of which there are enough to fill the GPU.
    x, ids = jnp.asarray(rng.normal(size=(20, 96)), dtype), jnp.zeros((20, 1), jnp.int32)
    routing = jm.moe_align_block_size(ids, 16, 1)
    result = jax.jit(
        lambda x, *routing: jm.moe_matmul(x, broad, *routing, moe_block_size=16, top_k=1)
    )(x, *routing)
    assert np.isfinite(np.asarray(result).astype(np.float32)).all()
    # Blocks of 8 rows, enough of them for blocks that stay and stream all operands.
    ids = jnp.zeros((1600, 1), jnp.int32)
    x, routing = jnp.ones((1600, 2048), dtype), jm.moe_align_block_size(ids, 8, 1)
    result = jax.jit(
        lambda x, *routing: jm.moe_matmul(x, deep, *routing, moe_block_size=8, top_k=1)
    )(x, *routing)
    assert np.isfinite(np.asarray(result).astype(np.float32)).all()
    # Both products of a layer, the second one's weights before its x is there.
    x, ids = jnp.ones((1, 1280), dtype), jnp.zeros((1, 36), jnp.int32)
    result = jax.jit(jm.moe_ffn)(x, ids, jnp.full(ids.shape, 0.5), *square)
    assert np.isfinite(np.asarray(result).astype(np.float32)).all()
    # Few rows of a weight, by warps that have a slice of K each; of 30 rows, in clusters.
    for rows in (3, 16, 30):
        jax.block_until_ready(jm.matmul(jnp.ones((rows, 1280), dtype), square[0][0]))
    for rows in (9, 32):  # of a slice of the last of two; clusters of two, and of four
        x = jnp.ones((rows, 8256), dtype)
        jax.block_until_ready(jm.matmul(x, pair.make_expert_linear(136 + 64, 72)))
    # Split K: few columns, long K. Its parts meet in a cluster, or in scratch where there is none.
    jax.block_until_ready(long(jnp.ones((5, 2080), dtype)))
    print("every op ran")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4])
