"""Tile choice: a pure function, so every promise it makes is checked without a GPU."""

import itertools

import pytest

_jax_marlin = pytest.importorskip("_jax_marlin", reason="needs a CUDA build")

SM_COUNTS = (1, 40, 58, 108, 114, 132, 142, 148, 188)  # from small boards to the largest parts
ROWS = (1, 7, 8, 9, 16, 17, 32, 33, 64, 65, 500, 4097, 2**20)
SHAPES = (
    (32, 64), (96, 72), (768, 2048), (2048, 1536), (4096, 1024), (4096, 4096), (14336, 4096),
    (8192, 28672), (8224, 64),
)  # fmt: skip
BLOCK_SIZES = (0, 1, 4, 8, 12, 16, 32, 48, 64, 128)


def problems():
    for (k, n), bits, block in itertools.product(SHAPES, (4, 8), BLOCK_SIZES):
        for rows in ROWS:
            yield rows, block, k, n, bits


@pytest.mark.parametrize("has_wgmma", [False, True], ids=["sm_80", "sm_90"])
def test_choice_covers_the_problem_and_stays_in_scratch(has_wgmma):
    tables = {
        "mma": _jax_marlin.tile_table(),
        "stream": _jax_marlin.stream_table(),
        "skinny": _jax_marlin.skinny_table(),
        "wgmma": _jax_marlin.wgmma_table(),
    }
    kernels, splits = set(), set()
    for problem, sm_count in itertools.product(problems(), SM_COUNTS):
        rows, block, k, n, bits = problem
        choice = _jax_marlin.select_tile(rows, block, k, n, bits, sm_count, has_wgmma)
        kernel = choice["kernel"]
        tile = tables[kernel][choice["tile"]]
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
        if choice["split_k"] > 1:
            warps_k = tile["warps_k"] if kernel == "mma" else tile["stage_tiles"]
            assert -(-k // 64) >= choice["split_k"] * warps_k
        assert choice["in_cluster"] == (has_wgmma and choice["split_k"] > 1)
        assert choice["scratch_bytes"] <= _jax_marlin.scratch_bytes(*problem), (problem, choice)
        assert not has_wgmma or choice["scratch_bytes"] == 0  # parts of K meet in clusters
        kernels.add(kernel)
        splits.add(choice["split_k"])
    assert kernels == ({"mma", "skinny", "stream", "wgmma"} if has_wgmma else {"mma"})
    assert splits == ({1, 2, 4, 8} if has_wgmma else set(range(1, 9)))


def test_every_tile_is_reachable():
    reached = {_jax_marlin.select_tile(*p, 132)["tile"] for p in problems()}
    assert reached == set(range(len(_jax_marlin.tile_table())))


def test_few_rows_take_narrow_blocks_before_they_split_k():
    choice = _jax_marlin.select_tile(1, 0, 4096, 4096, 4, 132)
    assert choice["split_k"] == 1 and choice["n_blocks"] == 128


def columns_of(rows, block, k, n, routes, num_experts):
    choice = _jax_marlin.select_tile(
        rows, block, k, n, 4, 132, routes=routes, num_experts=num_experts
    )
    return _jax_marlin.tile_table()[choice["tile"]]["columns"]


def test_blocks_are_as_wide_as_the_experts_that_routes_reach_allow():
    """Of 128 experts 8 routes reach 8, 128 routes 81; blocks should be two an SM or more."""
    assert columns_of(8, 1, 2048, 1536, 8, 128) == 32
    assert columns_of(1024, 8, 2048, 1536, 128, 128) == 128
    # 8 routes reach 5 of 8 experts: too few for blocks of 128 columns, enough for 64.
    assert columns_of(64, 8, 14336, 4096, 8, 8) == 64
    assert columns_of(8, 1, 2048, 7168, 8, 256) == 128  # one wave of short blocks
    assert columns_of(2, 1, 4096, 28672, 2, 8) == 64  # 3.4 of 128 columns: four or three
    assert columns_of(288, 8, 4096, 28672, 32, 8) == 64  # several waves of long blocks


def test_small_problems_split_k_to_fill_the_gpu():
    for rows in (1, 16, 32, 64):
        choice = _jax_marlin.select_tile(rows, 0, 4096, 1024, 4, 132)
        assert choice["split_k"] > 1
        assert 64 <= choice["n_blocks"] * choice["split_k"] <= 132


def test_sixteen_rows_take_narrow_blocks_where_all_run_at_once():
    choice = _jax_marlin.select_tile(16, 0, 4096, 4096, 4, 132)
    assert choice["split_k"] == 1 and choice["n_blocks"] == 128
    assert _jax_marlin.select_tile(16, 0, 8192, 8192, 4, 132)["n_blocks"] == 64


SM_80, SM_90 = {"has_wgmma": False}, {"has_wgmma": True}


def test_parts_of_k_meet_in_clusters_where_there_are_clusters():
    for rows, k, n in ((1, 4128, 1024), (9, 4128, 256), (16, 2080, 512), (5, 1440, 1024)):
        choice = _jax_marlin.select_tile(rows, 0, k, n, 4, 132, **SM_90)
        assert choice["in_cluster"] and choice["split_k"] in (2, 4, 8)
        assert choice["scratch_bytes"] == 0
        choice = _jax_marlin.select_tile(rows, 0, k, n, 4, 132, **SM_80)
        assert not choice["in_cluster"] and choice["split_k"] > 1 and choice["scratch_bytes"] > 0
    assert not _jax_marlin.select_tile(1, 0, 4128, 6144 * 2, 4, 132, **SM_90)["in_cluster"]


def test_large_problems_do_not_split_k():
    assert _jax_marlin.select_tile(4096, 0, 8192, 28672, 4, 132)["split_k"] == 1


def test_scratch_is_bounded_for_a_symbolic_batch():
    sizes = [_jax_marlin.scratch_bytes(2**30, block, 4096, 4096, 4) for block in (0, 8, 64)]
    assert max(sizes) < 32 * 2**20
