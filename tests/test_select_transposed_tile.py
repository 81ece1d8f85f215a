"""Tile choice of x W^T: each tile is reached, covers its problem, and stays in its scratch."""

import itertools

import pytest

_jax_marlin = pytest.importorskip("_jax_marlin", reason="needs a CUDA build")

SHAPES = ((64, 32), (72, 96), (2048, 768), (1536, 2048), (4096, 4096), (28672, 8192))  # N, K


@pytest.mark.parametrize("has_wgmma", [False, True])
def test_choice_covers_the_problem_and_stays_in_scratch(has_wgmma):
    table, reached = _jax_marlin.transposed_table(), set()
    for (n, k), block, rows, sm_count in itertools.product(
        SHAPES, (4, 8, 16, 32, 128, 256), (1, 8, 65, 4097), (1, 58, 108, 132, 188)
    ):
        choice = _jax_marlin.select_tile(rows, block, n, k, 4, sm_count, has_wgmma, transposed=True)
        tile = table[choice["tile"]]
        reached.add(choice["tile"])
        assert choice["kernel"] == "mma"
        assert 0 <= choice["n_blocks"] * tile["columns"] - k < tile["columns"]
        assert choice["sub_blocks"] * tile["tile_m"] >= block
        assert choice["row_blocks"] == -(-rows // block) * choice["sub_blocks"]
        assert choice["in_cluster"] == (has_wgmma and choice["split_k"] > 1)
        assert choice["split_k"] == 1 or -(-n // 64) >= choice["split_k"] * tile["warps_k"]
        most = _jax_marlin.scratch_bytes(rows, block, n, k, 4, transposed=True)
        assert choice["scratch_bytes"] <= most
    assert reached == set(table)


def test_few_rows_split_a_long_sum_to_fill_the_gpu():
    for rows, block in ((8, 8), (16, 16), (32, 32), (64, 64)):
        choice = _jax_marlin.select_tile(rows, block, 4096, 4096, 4, 132, True, transposed=True)
        assert choice["row_blocks"] * choice["n_blocks"] * choice["split_k"] == 128
