"""The one list of problems that every op and every backend must solve, and how to build one."""

import dataclasses
import zlib

import jax.numpy as jnp
import ml_dtypes  # noqa: F401  (names the NumPy dtype "bfloat16")
import numpy as np
import oracle

from jax_marlin.gptq import load_gptq_stacked
from jax_marlin.weights import MarlinExpertStack


@dataclasses.dataclass(frozen=True)
class Problem:
    """One small MoE layer's worth of GPTQ tensors; dense tests take one expert of it."""

    name: str  # what it stresses
    m: int = 5  # tokens
    k: int = 128
    n: int = 192
    dtype: str = "float16"
    bits: int = 4
    group_size: int = 64
    zeros: str = "symmetric"  # or "v1" (with zero points 0, whose words borrow), or "v2"
    g_idx: str = "none"  # or "shared", or "per_expert"
    bias: bool = False
    num_experts: int = 3
    top_k: int = 2
    moe_block_size: int = 8
    routing: str = "random"  # or "one_expert", "few_experts", "skips", "nobody"
    exact: bool = False  # float32 holds weights, products and sums as they are

    def __str__(self) -> str:
        return self.name


def _rows(bits: int) -> list[Problem]:
    """Every number of rows around the 8-wide token tiles and past the largest of them."""
    dtype = "float16" if bits == 4 else "bfloat16"
    return [
        Problem(f"{m}_rows_{bits}bit", m=m, bits=bits, dtype=dtype)
        for m in (0, 1, 3, 7, 8, 9, 17, 33, 64, 65, 130)
    ]


PROBLEMS = [
    *_rows(4),
    *_rows(8),
    # Dtypes, widths and zero points.
    Problem("float32_symmetric", dtype="float32"),
    Problem("float32_8bit_v1_zeros", dtype="float32", bits=8, zeros="v1"),
    Problem("float16_v1_zeros_that_borrow", zeros="v1"),
    Problem("float16_8bit_v1_zeros_that_borrow", bits=8, zeros="v1"),
    Problem("float16_v2_zeros", zeros="v2"),
    Problem("bfloat16_v1_zeros", dtype="bfloat16", zeros="v1"),
    Problem("bfloat16_8bit_v2_zeros", dtype="bfloat16", bits=8, zeros="v2"),
    # Group sizes.
    Problem("group_32", group_size=32, m=9),
    Problem("group_32_v1_zeros_8bit", group_size=32, bits=8, zeros="v1", m=9),
    Problem("group_128", group_size=128, k=256),
    Problem("group_128_is_all_of_k", group_size=128, k=128, m=7),
    Problem("channelwise", group_size=-1, m=3),
    Problem("channelwise_k_200_bfloat16", group_size=-1, k=200, n=64, dtype="bfloat16", m=17),
    Problem("last_group_is_short", group_size=128, k=192, zeros="v1"),
    # K and N off the 64 x 64 tile.
    Problem("k_96_n_72_group_32", k=96, n=72, group_size=32, m=9),
    Problem("k_96_n_72_8bit_v2_zeros", k=96, n=72, group_size=32, bits=8, zeros="v2", m=9),
    Problem("k_32_below_one_tile", k=32, n=40, group_size=32, zeros="v1"),
    Problem("k_120_rows_unaligned", k=120, n=136, group_size=-1, m=11),
    Problem("float32_k_96_n_72", dtype="float32", k=96, n=72, group_size=32, bias=True),
    # Act-order.
    Problem("g_idx_shared", g_idx="shared", m=9),
    Problem("g_idx_per_expert", g_idx="per_expert", m=9),
    Problem("g_idx_per_expert_k_96_bfloat16", g_idx="per_expert", k=96, n=72, group_size=32,
            dtype="bfloat16", m=17),
    Problem("g_idx_per_expert_8bit_v1_zeros", g_idx="per_expert", bits=8, zeros="v1", k=192, m=33),
    Problem("g_idx_shared_float32", g_idx="shared", dtype="float32", zeros="v2"),
    # Bias.
    Problem("bias_n_off_the_tile", bias=True, n=200, m=9),
    Problem("bias_bfloat16_v1_zeros_g_idx", bias=True, dtype="bfloat16", zeros="v1",
            g_idx="per_expert", m=9),
    # Routing.
    Problem("all_rows_to_one_expert", routing="one_expert", top_k=1, m=37),
    Problem("most_experts_empty", routing="few_experts", num_experts=11, m=19),
    Problem("skipped_experts", routing="skips", num_experts=5, top_k=3, m=23),
    Problem("no_token_has_an_expert", routing="nobody", m=6),
    Problem("blocks_of_16", moe_block_size=16, m=21, top_k=3, num_experts=5),
    Problem("blocks_of_64_v1_zeros", moe_block_size=64, m=70, zeros="v1", num_experts=4),
    Problem("blocks_of_12", moe_block_size=12, m=21, num_experts=4),
    # Long K, so that kernels may split it.
    Problem("long_k_bfloat16", dtype="bfloat16", k=1024, n=320, group_size=128, m=4),
    Problem("parts_of_k_begin_inside_groups", dtype="bfloat16", k=1344, n=72, group_size=128,
            zeros="v1"),
    Problem("x_longer_than_shared_memory", dtype="bfloat16", k=14848, n=320, group_size=128, m=19,
            moe_block_size=8, num_experts=2),
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Case:
    """Arrays of a problem: what goes in, and the float64 weights that it means."""

    x: np.ndarray  # dtype[M, K]
    tensors: dict  # arguments of load_gptq_stacked
    weights: np.ndarray  # float64[E, K, N]
    bias: np.ndarray | None  # dtype[E, N]
    topk_ids: np.ndarray  # int32[M, top_k], some outside the experts
    topk_weights: np.ndarray  # float32[M, top_k]

    def stack(self) -> MarlinExpertStack:
        return load_gptq_stacked(**self.tensors)


def build(p: Problem) -> Case:
    """The same arrays for the same name, on every machine."""
    rng = np.random.default_rng(zlib.crc32(p.name.encode()))
    group_size = p.k if p.group_size == -1 else p.group_size
    num_groups = -(-p.k // group_size)
    codes = rng.integers(0, 2**p.bits, (p.num_experts, p.k, p.n))
    scales = rng.uniform(0.01, 0.05, (p.num_experts, num_groups, p.n))
    if p.exact:
        scales = rng.choice([0.5, 1.0], scales.shape)
    scales = (scales * rng.choice([-1.0, 1.0], scales.shape)).astype(p.dtype)
    version = "gptq_v2" if p.zeros == "v2" else "gptq"
    qzeros = None
    if p.zeros != "symmetric":
        zero_points = rng.integers(0, 2**p.bits, scales.shape)
        zero_points[..., ::5] = 0
        qzeros = np.stack([oracle.pack_zeros(z, p.bits, version) for z in zero_points])
    g_idx = None
    if p.g_idx != "none":
        rows = np.arange(p.k, dtype=np.int32) // group_size
        g_idx = np.stack([rng.permutation(rows) for _ in range(p.num_experts)])
        g_idx = g_idx[0] if p.g_idx == "shared" else g_idx
    qweights = np.stack([oracle.pack_rows(c, p.bits) for c in codes])
    weights = np.stack(
        [
            oracle.gptq_weight(
                qweights[e],
                scales[e],
                None if qzeros is None else qzeros[e],
                g_idx[e] if p.g_idx == "per_expert" and g_idx is not None else g_idx,
                bits=p.bits,
                group_size=p.group_size,
                checkpoint_format=version,
            )
            for e in range(p.num_experts)
        ]
    )

    def values(*shape: int) -> np.ndarray:
        numbers = rng.integers(-2, 3, shape) if p.exact else rng.normal(size=shape)
        return numbers.astype(p.dtype)

    bias = values(p.num_experts, p.n) if p.bias else None
    tensors = {
        "qweights": qweights, "scales": scales, "qzeros": qzeros, "g_idx": g_idx, "bias": bias,
        "bits": p.bits, "group_size": p.group_size, "checkpoint_format": version,
    }  # fmt: skip
    x = values(p.m, p.k)
    topk_weights = rng.uniform(0.1, 1.0, (p.m, p.top_k)).astype(np.float32)
    return Case(x, tensors, weights, bias, _route(p, rng), topk_weights)


def _route(p: Problem, rng) -> np.ndarray:
    """int32[M, top_k]: experts of each token."""
    shape = (p.m, p.top_k)
    if p.routing == "one_expert":
        ids = np.full(shape, p.num_experts - 1)
    elif p.routing == "few_experts":
        ids = rng.choice([1, p.num_experts - 2], shape)
    elif p.routing == "nobody":
        ids = np.full(shape, -1)
    else:
        scores = rng.random((p.m, p.num_experts))
        ids = np.argsort(scores, axis=1)[:, : p.top_k]
    if p.routing == "skips":  # single slots, and all slots of every fourth token
        ids = np.where(rng.random(shape) < 0.3, -1, ids)
        ids[::4] = -1
        ids[1::4, 0] = p.num_experts
    return ids.astype(np.int32)


def align(topk_ids: np.ndarray, moe_block_size: int, num_experts: int):
    """NumPy routing: each expert's rows padded to blocks; rows of no expert in skipped blocks.

    Slots past `num_tokens_past_padded` name real rows and a real expert: reading them is an error
    that shows, since row 0 would be computed with another expert or twice.
    """
    flat = topk_ids.ravel()
    slots, expert_ids = [], []
    for expert in [-1, num_experts, *range(num_experts)]:
        rows = np.flatnonzero(flat == expert)
        blocks = -(-len(rows) // moe_block_size)
        slots += [*rows, *[len(flat)] * (blocks * moe_block_size - len(rows))]
        expert_ids += [expert] * blocks
    used = len(slots)
    slots += [0] * (2 * moe_block_size - 1)  # the last block is cut short
    expert_ids += [0, 1]
    return tuple(np.array(ids, np.int32) for ids in (slots, expert_ids, [used]))


def poison(stack: MarlinExpertStack, used_experts) -> MarlinExpertStack:
    """The stack with NaN scales in every expert that must not be read."""
    unused = np.setdiff1d(np.arange(stack.num_experts), used_experts)
    scales = stack.scales.at[jnp.asarray(unused)].set(jnp.nan)
    return dataclasses.replace(stack, scales=scales)


def implementation(backend: str, dtype: str) -> str | None:
    """What to ask for: the kernels by name, except for float32, which has none."""
    return None if dtype == "float32" else backend
