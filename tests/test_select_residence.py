"""Whether shared memory holds all of x: a pure function, checked without a GPU."""

import pytest

_jax_marlin = pytest.importorskip("_jax_marlin", reason="needs a CUDA build")

SHARED_OF_SM, RESERVED = 228 * 1024, 1024
WIDE = 2  # 8 rows by 128 columns, four blocks a multiprocessor


def residence(tile=WIDE, rows=1024, moe_block_size=8, k=2048, n=1536, **rest):
    return _jax_marlin.select_residence(tile, rows, moe_block_size, k, n, **rest)


def test_rows_of_experts_stay():
    assert residence()["rows"] == 8
    assert residence(moe_block_size=5)["rows"] == 5
    assert residence(gated=True)["rows"] == 8
    assert residence(rows=8, moe_block_size=1)["rows"] == 1  # each route a block
    assert residence(k=96, n=72, group_size=96)["rows"] == 8
    assert residence(bits=8)["rows"] == 8


def test_what_a_ring_serves_instead():
    assert residence(routed=False)["rows"] == 0
    assert residence(has_wgmma=False)["rows"] == 0
    assert residence(k=2049, group_size=2049)["rows"] == 0  # no runs of 16 bytes
    assert residence(gated=True, n=2 * 104)["rows"] == 0  # gate ends inside a column tile
    assert residence(k=7168)["rows"] == 0  # 8 rows of three blocks
    assert residence(k=7168, rows=8, moe_block_size=1)["rows"] == 1


def test_three_blocks_of_four_are_enough_in_several_waves():
    assert residence(k=4096)["rows"] == 8
    assert residence(k=4096, rows=320, n=1536)["rows"] == 0  # 480 blocks run at once, on 132
    assert residence(k=4096, rows=320, n=1536, sm_count=80)["rows"] == 8


def test_blocks_that_share_a_multiprocessor_fit():
    table, stayed = _jax_marlin.tile_table(), 0
    for tile, row in enumerate(table):
        for k in (64, 768, 2048, 4096, 7168, 14336):
            for bits in (4, 8):
                choice = residence(tile, 4096, row["tile_m"], k, 4096, bits=bits)
                assert choice["rows"] == 0 or row["tile_m"] <= 16
                if choice["rows"]:
                    stayed += 1
                    together = row["blocks_per_sm"][bits]
                    together = max(together - 1, min(together, 2))  # and a few words each
                    assert together * (choice["bytes"] + RESERVED) < SHARED_OF_SM
    assert stayed > 20
