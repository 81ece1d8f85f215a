"""Tile choice: a pure function, so every promise it makes is checked without a GPU."""

import itertools

import pytest

_jax_marlin = pytest.importorskip("_jax_marlin", reason="needs a CUDA build")

SM_COUNTS = (1, 40, 58, 108, 114, 132, 142, 148, 188)  # from small boards to the largest parts
ROWS = (1, 7, 8, 9, 16, 17, 32, 33, 64, 65, 500, 4097, 2**20)
SHAPES = ((32, 64), (96, 72), (768, 2048), (2048, 1536), (4096, 4096), (14336, 4096), (8192, 28672))
BLOCK_SIZES = (0, 1, 8, 12, 16, 32, 48, 64, 128)


def problems():
    for (k, n), bits, block in itertools.product(SHAPES, (4, 8), BLOCK_SIZES):
        for rows in ROWS:
            yield rows, block, k, n, bits


def test_choice_covers_the_problem_and_stays_in_scratch():
    table = _jax_marlin.tile_table()
    for problem, sm_count in itertools.product(problems(), SM_COUNTS):
        rows, block, k, n, bits = problem
        choice = _jax_marlin.select_tile(rows, block, k, n, bits, sm_count)
        tile = table[choice["tile"]]
        assert (
            choice["n_blocks"] * tile["columns"] >= n > (choice["n_blocks"] - 1) * tile["columns"]
        )
        if block:
            assert choice["sub_blocks"] * tile["tile_m"] >= block
            assert choice["row_blocks"] == -(-rows // block) * choice["sub_blocks"]
        else:
            assert choice["row_blocks"] == -(-rows // tile["tile_m"])
        assert 1 <= choice["split_k"] <= 8
        # Every part of K must hold at least one packed tile for each warp of K.
        assert choice["split_k"] == 1 or -(-k // 64) >= choice["split_k"] * tile["warps_k"]
        assert choice["scratch_bytes"] <= _jax_marlin.scratch_bytes(*problem), (problem, choice)


def test_every_tile_is_reachable():
    reached = {_jax_marlin.select_tile(*p, 132)["tile"] for p in problems()}
    assert reached == set(range(len(_jax_marlin.tile_table())))


def test_few_rows_take_narrow_blocks_before_they_split_k():
    choice = _jax_marlin.select_tile(1, 0, 4096, 4096, 4, 132)
    assert choice["split_k"] == 1 and choice["n_blocks"] == 128


def test_small_problems_split_k_to_fill_the_gpu():
    for rows in (1, 16, 32, 64):
        choice = _jax_marlin.select_tile(rows, 0, 4096, 1024, 4, 132)
        assert choice["split_k"] > 1
        assert 64 <= choice["n_blocks"] * choice["split_k"] <= 132


def test_large_problems_do_not_split_k():
    assert _jax_marlin.select_tile(4096, 0, 8192, 28672, 4, 132)["split_k"] == 1


def test_scratch_is_bounded_for_a_symbolic_batch():
    sizes = [_jax_marlin.scratch_bytes(2**30, block, 4096, 4096, 4) for block in (0, 8, 64)]
    assert max(sizes) < 32 * 2**20
