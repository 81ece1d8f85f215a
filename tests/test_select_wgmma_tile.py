"""Tile choice of the wgmma kernel: a pure function, so it is checked without a GPU."""

import itertools

import pytest

_jax_marlin = pytest.importorskip("_jax_marlin", reason="needs a CUDA build")

SM_COUNTS = (1, 78, 114, 132)
ROWS = (1, 17, 32, 33, 64, 65, 128, 300, 1000, 4097, 2**20)
SHAPES = ((32, 64), (96, 72), (768, 2048), (2048, 1536), (4096, 4096), (14336, 4096), (8192, 28672))
BLOCK_SIZES = (0, 17, 32, 48, 64, 128, 160, 256)


def problems():
    for (k, n), bits, block in itertools.product(SHAPES, (4, 8), BLOCK_SIZES):
        for rows in ROWS:
            yield rows, block, k, n, bits


def test_choice_covers_the_problem():
    table = _jax_marlin.wgmma_table()
    for problem, sm_count in itertools.product(problems(), SM_COUNTS):
        rows, block, _, n, _ = problem
        choice = _jax_marlin.select_wgmma_tile(*problem, sm_count)
        tile = table[choice["tile"]]
        assert choice["n_blocks"] * tile["columns"] >= n
        if block:
            assert choice["sub_blocks"] * tile["tile_m"] >= block
            assert choice["row_blocks"] == -(-rows // block) * choice["sub_blocks"]
        else:
            assert choice["row_blocks"] == -(-rows // tile["tile_m"])


def test_parts_of_k_run_together_and_hold_work():
    table = _jax_marlin.wgmma_table()
    for problem, sm_count in itertools.product(problems(), SM_COUNTS):
        choice = _jax_marlin.select_wgmma_tile(*problem, sm_count)
        tile, split_k = table[choice["tile"]], choice["split_k"]
        assert split_k in (1, 2, 4, 8)
        if split_k > 1:
            blocks = choice["row_blocks"] * choice["n_blocks"] * split_k
            assert blocks <= sm_count * tile["min_blocks"]
            assert -(-problem[2] // 64) >= 4 * split_k * tile["stage_tiles"]


def test_every_tile_is_reachable():
    reached = {_jax_marlin.select_wgmma_tile(*p, 132)["tile"] for p in problems()}
    assert reached == set(range(len(_jax_marlin.wgmma_table())))


def test_few_rows_are_left_to_mma_sync():
    assert not _jax_marlin.select_wgmma_tile(8, 0, 4096, 4096, 4, 132)["preferred"]
    assert not _jax_marlin.select_wgmma_tile(4096, 8, 4096, 4096, 4, 132)["preferred"]
    assert _jax_marlin.select_wgmma_tile(64, 0, 4096, 4096, 4, 132)["preferred"]
    assert _jax_marlin.select_wgmma_tile(4096, 64, 4096, 4096, 4, 132)["preferred"]
