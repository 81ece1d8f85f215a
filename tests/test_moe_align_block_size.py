"""moe_align_block_size: exact equality with a loop, sizes and tails, bad ids, the CUDA lowering."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from jax_marlin.ops import ffi_targets
from jax_marlin.ops.moe_align_block_size import (
    TARGET,
    moe_align_block_size,
    select_moe_block_size,
)


def align_by_loop(topk_ids, moe_block_size, num_experts, expert_map=None):
    """What the op means: one expert after the other, ids ascending, padded to blocks."""
    flat = np.asarray(topk_ids).ravel()
    rows = len(flat)
    length = min(rows * moe_block_size, rows + num_experts * (moe_block_size - 1))
    slots, experts = [], []
    for expert in range(num_experts):
        local = expert if expert_map is None else expert_map[expert]
        mine = list(np.flatnonzero(flat == expert)) if local >= 0 else []
        mine += [rows] * (-len(mine) % moe_block_size)
        slots += mine
        experts += [local] * (len(mine) // moe_block_size)
    used = len(slots)
    slots += [rows] * (length - used)
    experts += [-1] * (-(-length // moe_block_size) - len(experts))
    return slots, experts, [used]


def assert_aligned(got, expected):
    for array, want in zip(got, expected, strict=True):
        assert array.dtype == jnp.int32
        np.testing.assert_array_equal(array, np.array(want, np.int32))


def test_the_example_of_vllm(backend):
    slots, experts, used = moe_align_block_size(
        np.array([[2, 3, 4], [1, 2, 4], [1, 3, 4], [1, 2, 3]]), 4, 5
    )
    assert slots[:16].tolist() == [3, 6, 9, 12, 0, 4, 10, 12, 1, 7, 11, 12, 2, 5, 8, 12]
    assert slots[16:].tolist() == [12] * 11
    assert experts.tolist() == [1, 2, 3, 4, -1, -1, -1]
    assert used.tolist() == [16]


SIZES = [  # T, top_k, E, moe_block_size
    (0, 3, 5, 8),
    (1, 1, 1, 1),
    (1, 2, 7, 16),  # fewer rows than experts: the short L
    (5, 3, 4, 1),
    (33, 2, 5, 12),  # a block size that is no power of two
    (65, 8, 128, 8),
    (257, 4, 3, 64),
    (19, 10, 1500, 16),  # more experts than a block has threads
    (4096, 2, 9, 32),
    (40, 10, 8192, 2),  # as many experts as the kernel counts
    (4096, 8, 128, 128),  # 32,768 routes: all that a thread block holds a bit for
    (8200, 5, 7, 64),  # more: it reads them twice
]


@pytest.mark.parametrize(("tokens", "top_k", "num_experts", "moe_block_size"), SIZES)
def test_random_ids(tokens, top_k, num_experts, moe_block_size, backend):
    rng = np.random.default_rng(tokens)
    ids = rng.integers(0, num_experts, (tokens, top_k)).astype(np.int32)
    got = moe_align_block_size(jnp.asarray(ids), moe_block_size, num_experts)
    assert_aligned(got, align_by_loop(ids, moe_block_size, num_experts))


@pytest.mark.parametrize(("tokens", "top_k", "num_experts", "moe_block_size"), SIZES)
def test_ids_of_the_device_that_name_no_expert_are_dropped(
    tokens, top_k, num_experts, moe_block_size, backend
):
    rng = np.random.default_rng(tokens + 1)
    ids = rng.integers(-2, num_experts + 3, (tokens, top_k)).astype(np.int32)
    ids.ravel()[::7] = rng.choice([-(2**31), 2**31 - 1, -1, num_experts])
    got = moe_align_block_size(jnp.asarray(ids), moe_block_size, num_experts)
    assert_aligned(got, align_by_loop(ids, moe_block_size, num_experts))


@pytest.mark.parametrize(("tokens", "top_k", "num_experts", "moe_block_size"), SIZES)
def test_expert_map(tokens, top_k, num_experts, moe_block_size, backend):
    """Order by global expert; blocks carry the local id, which may fall as the global one grows."""
    rng = np.random.default_rng(tokens + 2)
    expert_map = np.where(rng.random(num_experts) < 0.5, -1, rng.permutation(num_experts))
    ids = rng.integers(-1, num_experts, (tokens, top_k)).astype(np.int32)
    got = moe_align_block_size(ids, moe_block_size, num_experts, expert_map)
    assert_aligned(got, align_by_loop(ids, moe_block_size, num_experts, expert_map))


@pytest.mark.parametrize("expert", [0, 4, -1])
@pytest.mark.parametrize("tokens", [37, 16384, 20000])
def test_all_rows_to_one_expert_or_to_nobody(tokens, expert, backend):
    ids = np.full((tokens, 2), expert, np.int32)
    assert_aligned(moe_align_block_size(ids, 16, 5), align_by_loop(ids, 16, 5))


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint32", "int64", "uint64"])
def test_integer_dtypes(dtype):
    ids = np.array([[3, 0], [100, 3], [0, 7]], dtype)
    expected = align_by_loop(ids, 4, 300)
    assert_aligned(moe_align_block_size(ids, 4, 300), expected)
    with jax.enable_x64(True):
        assert_aligned(moe_align_block_size(jnp.asarray(ids), 4, 300), expected)


def test_wide_ids_of_the_device_do_not_wrap_into_range():
    ids = np.array([[2**32 + 1, 0], [2**31, 2**32 - 1], [-(2**32), 2]])
    with jax.enable_x64(True):
        got = moe_align_block_size(jnp.asarray(ids), 2, 3)
        unsigned = moe_align_block_size(jnp.asarray(ids[:2].astype(np.uint64)), 2, 3)
    assert_aligned(got, align_by_loop(ids, 2, 3))
    assert_aligned(unsigned, align_by_loop(ids[:2], 2, 3))


def test_jit_vmap_and_scan():
    ids = np.random.default_rng(8).integers(-1, 5, (3, 7, 2)).astype(np.int32)

    def align(ids):
        return moe_align_block_size(ids, 4, 5)

    _, scanned = jax.lax.scan(lambda carry, ids: (carry, align(ids)), 0, jnp.asarray(ids))
    for batched in (
        jax.jit(jax.vmap(align))(ids),
        jax.vmap(align, 2)(ids.transpose(1, 2, 0)),
        scanned,
    ):
        for i in range(3):
            assert_aligned([part[i] for part in batched], align_by_loop(ids[i], 4, 5))


def test_a_symbolic_number_of_tokens():
    spec = jax.ShapeDtypeStruct(export.symbolic_shape("tokens, 2"), jnp.int32)
    exported = export.export(jax.jit(lambda ids: moe_align_block_size(ids, 8, 5)))(spec)
    for tokens in (1, 3, 40):
        ids = np.random.default_rng(tokens).integers(-1, 5, (tokens, 2)).astype(np.int32)
        assert_aligned(exported.call(ids), align_by_loop(ids, 8, 5))


def lower_for_cuda(tokens: int) -> str:
    ids = jax.ShapeDtypeStruct((tokens, 3), jnp.int32)
    align = jax.jit(lambda ids: moe_align_block_size(ids, 16, 7))
    return align.trace(ids).lower(lowering_platforms=("cuda",)).as_text()


def test_cuda_lowering_is_one_custom_call(monkeypatch):
    monkeypatch.setattr(ffi_targets, "cuda_unavailable_reason", lambda: None)
    monkeypatch.setattr(ffi_targets, "ensure_registered", lambda: None)
    text = lower_for_cuda(5)
    assert text.count(f"@{TARGET}") == 1
    assert "moe_block_size = 16 : i64" in text
    assert "num_experts = 7 : i64" in text
    assert "sort" not in text
    assert "custom_call" not in lower_for_cuda(0)


def test_cuda_lowering_without_the_extension_is_the_default(monkeypatch):
    monkeypatch.setattr(ffi_targets, "cuda_unavailable_reason", lambda: "not built")
    assert TARGET not in lower_for_cuda(5)


IDS = np.array([[2, 0], [1, 2], [0, 2]], np.int32)
ERRORS = [
    (
        {"topk_ids": IDS.astype(np.float32)},
        TypeError,
        "topk_ids has dtype float32, expected an int",
    ),
    ({"topk_ids": IDS[0]}, ValueError, r"topk_ids has shape \(2,\), expected \(T, top_k\)"),
    ({"num_experts": 2}, ValueError, r"topk_ids holds 2, expected -1 \(dropped\) or 0 .. 1"),
    ({"topk_ids": IDS - 2}, ValueError, r"topk_ids holds -2, expected"),
    ({"topk_ids": (IDS + np.int64(2**40)).tolist()}, ValueError, r"topk_ids holds 1099511627778"),
    ({"moe_block_size": 0}, ValueError, "moe_block_size is 0, expected"),
    ({"num_experts": 0}, ValueError, "num_experts is 0, expected"),
    ({"expert_map": [0, 1]}, ValueError, r"expert_map has shape \(2,\), expected \(num_experts,\)"),
    ({"expert_map": [0, 1, -2]}, ValueError, r"expert_map holds -2"),
    ({"expert_map": [0.0, 1, 2]}, TypeError, "expert_map has dtype float"),
    ({"moe_block_size": 2**31}, ValueError, r".* need \d+ slots, more than int32 counts"),
]


@pytest.mark.parametrize(("changes", "error", "message"), ERRORS)
def test_errors_name_the_argument(changes, error, message):
    arguments = {"topk_ids": IDS, "moe_block_size": 4, "num_experts": 3}
    with pytest.raises(error, match="^moe_align_block_size: " + message):
        moe_align_block_size(**(arguments | changes))


def test_what_is_next_to_an_error_is_accepted():
    expected = align_by_loop(IDS, 4, 3)
    assert_aligned(moe_align_block_size(IDS.tolist(), 4, 3), expected)
    assert_aligned(moe_align_block_size(IDS, np.int64(4), 3, [0, 1, 2]), expected)
    assert_aligned(moe_align_block_size(IDS - 1, 4, 3), align_by_loop(IDS - 1, 4, 3))


@pytest.mark.parametrize(
    ("tokens", "top_k", "num_experts", "expected"),
    [
        (0, 8, 128, 4), (1, 8, 128, 4), (20, 8, 128, 4), (21, 8, 128, 8), (4, 2, 8, 4),
        (89, 8, 128, 8), (90, 8, 128, 16), (230, 8, 128, 16),
        (231, 8, 128, 32), (460, 8, 128, 32), (461, 8, 128, 64), (921, 8, 128, 64),
        (922, 8, 128, 96), (1387, 8, 128, 96), (1388, 8, 128, 128), (1874, 8, 128, 128),
        (1875, 8, 128, 144), (2119, 8, 128, 144), (2120, 8, 128, 128), (4096, 8, 128, 144),
        (4096, 2, 8, 144), (5, 2, 3, 8),
    ],
)  # fmt: skip
def test_blocks_take_what_an_average_expert_has(tokens, top_k, num_experts, expected):
    assert select_moe_block_size(tokens, top_k, num_experts) == expected


def test_more_experts_than_the_kernel_counts_take_the_default_lowering():
    ids = jax.ShapeDtypeStruct((5, 2), jnp.int32)
    function = jax.jit(lambda ids: moe_align_block_size(ids, 8, 100_000))
    text = function.trace(ids).lower(lowering_platforms=("cuda",)).as_text()
    assert "custom_call" not in text or "jax_marlin_moe_align" not in text
    slots, expert_ids, used = function(jnp.array([[99_999, 7]] * 5, jnp.int32))
    assert used.tolist() == [16] and expert_ids[:2].tolist() == [7, 99_999]
    assert slots[:5].tolist() == [1, 3, 5, 7, 9]
