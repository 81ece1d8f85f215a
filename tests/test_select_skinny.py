"""Cut and choice of the skinny kernel: pure functions, so they are checked without a GPU."""

import itertools
import math

import pytest

_jax_marlin = pytest.importorskip("_jax_marlin", reason="needs a CUDA build")

SHARED_OF_BLOCK = 227 * 1024
SM_COUNTS = (78, 114, 132)
SHAPES = (
    (64, 2048), (192, 5000), (320, 4100), (768, 2048), (1088, 4104), (2048, 6144), (4096, 4096),
    (8192, 8192), (14336, 4096), (28672, 8192), (4096, 12288), (8192, 28672), (96, 4096),
    (4096, 256),
)  # fmt: skip


def choose(rows, k, n, sm_count=132, *, has_wgmma=True, block=0, **rest):
    return _jax_marlin.select_tile(rows, block, k, n, 4, sm_count, has_wgmma, **rest)


def problems():
    for (k, n), sm_count in itertools.product(SHAPES, SM_COUNTS):
        for rows in (1, 2, 7, 8, 9, 15, 16, 17):
            yield rows, k, n, sm_count


def test_teams_take_every_piece_and_warps_all_of_k():
    warps_k = set()
    table = _jax_marlin.skinny_table()
    for tile, (rows, k, n, sm_count) in itertools.product(range(len(table)), problems()):
        cut = _jax_marlin.cut_skinny(tile, rows, -(-k // 64), n, sm_count)
        assert 0 <= cut["more"] < cut["teams"]
        assert cut["pieces"] * cut["teams"] + cut["more"] == -(-n // 32)
        assert 1 <= cut["blocks"] <= sm_count
        assert cut["slices"] <= cut["warps_k"] <= table[tile]["warps"]
        assert cut["slices"] * cut["slice_tiles"] >= -(-k // 64)
        assert (cut["slices"] - 1) * cut["slice_tiles"] < -(-k // 64)  # none is empty
        warps_k.add(cut["warps_k"])
    assert warps_k == {1, 2, 4, 8, 16}


def test_products_that_a_gpu_reads_in_microseconds():
    taken = set()
    for rows, k, n, sm_count in problems():
        choice = choose(rows, k, n, sm_count)
        pieces = -(-n // 32) / sm_count
        tile = 0 if rows <= 8 else 1
        cut = _jax_marlin.cut_skinny(tile, rows, k // 64, n, sm_count)
        fits = k % 64 == 0 and cut["shared_bytes"] <= SHARED_OF_BLOCK
        few = 0.45 <= pieces and pieces * (k // 64) <= 440
        even = tile == 0 or math.ceil(pieces) <= 1.1 * pieces
        assert (choice["kernel"] == "skinny") == (rows <= 16 and few and even and fits)
        if choice["kernel"] == "skinny":
            taken.add(choice["tile"])
            assert choice["tile"] == tile
            assert (choice["row_blocks"], choice["split_k"], choice["scratch_bytes"]) == (1, 1, 0)
            assert choice["n_blocks"] == -(-n // 32)
    assert taken == {0, 1}


def test_what_is_left_to_others():
    def kernel(*sizes, **rest):
        return choose(*sizes, **rest)["kernel"]

    shape = (4096, 4096)
    assert kernel(8, *shape) == "skinny"
    assert kernel(16, *shape) == "skinny"
    assert kernel(17, *shape) != "skinny"
    assert kernel(16, 4096, 5120) != "skinny"  # some blocks would have twice the pieces of others
    assert kernel(0, *shape) != "skinny"
    assert kernel(8, *shape, has_wgmma=False) != "skinny"  # built for sm_90 alone
    assert kernel(8, *shape, block=8) != "skinny"
    assert kernel(8, *shape, transposed=True) != "skinny"
    assert kernel(1, 4096, 1024) != "skinny"  # K is better cut between blocks
    assert kernel(1, 4104, 4096) != "skinny"
    assert kernel(8, 8192, 28672) == "stream"
    assert kernel(7, 14336, 4096) == "skinny"
    assert kernel(8, 14336, 4096) != "skinny"  # x would not fit
    assert kernel(1, 32768, 2048) != "skinny"  # the index of a group is exact below
    assert kernel(1, 32704, 2048) == "skinny"
    assert kernel(1, 0, 4096) != "skinny"
