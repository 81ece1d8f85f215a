"""Tile choice of the wgmma kernel: a pure function, so it is checked without a GPU."""

import itertools

import pytest

_jax_marlin = pytest.importorskip("_jax_marlin", reason="needs a CUDA build")

SM_COUNTS = (1, 78, 114, 132)
ROWS = (1, 17, 32, 33, 64, 65, 128, 300, 1000, 4097, 2**20)
SHAPES = ((32, 64), (96, 72), (768, 2048), (2048, 1536), (4096, 4096), (14336, 4096), (8192, 28672))
BLOCK_SIZES = (0, 16, 17, 32, 48, 64, 96, 128, 144, 160, 256)


def problems():
    """Those with more rows to a tile than other kernels serve: 8, or 32 of dense products."""
    for (k, n), bits, block in itertools.product(SHAPES, (4, 8), BLOCK_SIZES):
        for rows in ROWS:
            if rows * n > 2**23 if block == 16 else block or rows > 32:
                yield rows, block, k, n, bits


def test_choice_covers_the_problem():
    table = _jax_marlin.wgmma_table()
    for problem, sm_count in itertools.product(problems(), SM_COUNTS):
        rows, block, _, n, _ = problem
        choice = _jax_marlin.select_tile(*problem, sm_count, True)
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
        choice = _jax_marlin.select_tile(*problem, sm_count, True)
        tile, split_k = table[choice["tile"]], choice["split_k"]
        assert split_k in (1, 2, 4, 8)
        if split_k > 1:
            blocks = choice["row_blocks"] * choice["n_blocks"] * split_k
            assert blocks <= sm_count * tile["min_blocks"]
            assert -(-problem[2] // 64) >= 4 * split_k * tile["stage_tiles"]


def test_blocks_share_neighbouring_rows_alone():
    shared = set()
    for problem, by_slot in itertools.product(problems(), (False, True)):
        choice = _jax_marlin.select_tile(*problem, 132, True, x_by_slot=by_slot)
        shared.add(choice["share_x"])
        if choice["share_x"] == 2:
            assert by_slot or problem[1] == 0  # routed rows of x are gathered one by one
            assert choice["split_k"] == 1 and choice["n_blocks"] > 1
        # Rows of the tallest tile cannot be gathered: a thread has no registers for so many.
        assert by_slot or problem[1] == 0 or not choice["in_boxes"]
    assert shared == {1, 2}


def test_tall_tiles_split_k_too():
    choice = _jax_marlin.select_tile(200, 0, 11264, 6400, 4, 132, True)  # as test_cuda_runtime.py
    assert choice["in_boxes"] and choice["split_k"] == 2 and choice["share_x"] == 1


def test_every_tile_is_reachable():
    choices = [_jax_marlin.select_tile(*p, 132, True) for p in problems()]
    assert all(choice["kernel"] == "wgmma" and choice["scratch_bytes"] == 0 for choice in choices)
    choices += [_jax_marlin.select_tile(*p, 132, True, True) for p in problems()]
    reached = {choice["tile"] for choice in choices if choice["kernel"] == "wgmma"}
    assert reached == set(range(len(_jax_marlin.wgmma_table())))


def test_gated_products_keep_gate_and_up_in_one_warpgroup():
    table = _jax_marlin.wgmma_table()
    for problem in problems():
        choice = _jax_marlin.select_tile(*problem, 132, True, True)
        # Else up would start inside the packed tile of gate's last columns.
        assert (choice["kernel"] == "wgmma") == (problem[3] % 128 == 0)
        assert choice["split_k"] == 1
        assert choice["kernel"] != "wgmma" or table[choice["tile"]]["gated"]


def test_few_rows_and_other_gpus_are_left_to_mma_sync():
    few, many = [(8, 0, 4096, 4096, 4), (4096, 8, 4096, 4096, 4)], [(64, 0, 4096, 4096, 4)]
    assert not any(_jax_marlin.select_tile(*p, 132, True)["kernel"] == "wgmma" for p in few)
    assert all(_jax_marlin.select_tile(*p, 132, True)["kernel"] == "wgmma" for p in many)
    assert not any(_jax_marlin.select_tile(*p, 132, False)["kernel"] == "wgmma" for p in few + many)
