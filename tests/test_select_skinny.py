"""Cut and choice of the skinny kernel: pure functions, so they are checked without a GPU."""

import itertools

import pytest

_jax_marlin = pytest.importorskip("_jax_marlin", reason="needs a CUDA build")

SHARED_OF_BLOCK = 227 * 1024
SM_COUNTS = (16, 78, 114, 132)
SHAPES = (
    (64, 2048), (192, 5000), (320, 4100), (768, 2048), (1088, 4104), (2048, 6144), (4096, 4096),
    (8192, 8192), (14336, 4096), (28672, 8192), (4096, 12288), (8192, 28672), (96, 4096),
    (4096, 256), (8192, 3072), (16384, 256), (16384, 1024), (53248, 16384),
)  # fmt: skip


def choose(rows, k, n, sm_count=132, *, has_wgmma=True, block=0, **rest):
    return _jax_marlin.select_tile(rows, block, k, n, 4, sm_count, has_wgmma, **rest)


def problems():
    for (k, n), sm_count in itertools.product(SHAPES, SM_COUNTS):
        for rows in (1, 2, 7, 8, 9, 15, 16, 17, 32, 33):
            yield rows, k, n, sm_count


def fitting_tile(rows):
    return 0 if rows <= 8 else 1 if rows <= 16 else 2


def test_teams_take_every_piece_and_warps_all_of_k():
    warps_k, all_parts = set(), set()
    table = _jax_marlin.skinny_table()
    for rows, k, n, sm_count in problems():
        if rows > table[-1]["tile_m"]:
            continue
        warps = table[fitting_tile(rows)]["warps"]
        cut = _jax_marlin.cut_skinny(fitting_tile(rows), rows, -(-k // 64), n, sm_count)
        parts = cut["parts"]
        assert cut["teams"] == cut["clusters"] * warps // cut["warps_k"]
        assert 0 <= cut["more"] < cut["teams"]
        assert cut["pieces"] * cut["teams"] + cut["more"] == -(-n // 32)
        # The first team of each block, which brings x, has work.
        assert 1 <= cut["clusters"] <= min(sm_count // parts, -(-n // 32))
        assert cut["slices"] <= parts * cut["warps_k"] and cut["warps_k"] <= warps
        assert cut["slices"] * cut["slice_tiles"] >= -(-k // 64)
        assert (cut["slices"] - 1) * cut["slice_tiles"] < -(-k // 64)  # none is empty
        assert cut["sum_rows"] * parts >= rows
        assert cut["sum_rows"] < 2 * -(-rows // parts)
        # Rows of x are 16 bytes apart from a multiple of 128, behind barriers of 8 bytes a warp.
        assert cut["x_pitch"] * 2 % 128 == 16
        assert cut["sums_at"] >= 8 * warps + cut["warps_k"] * rows * 2 * cut["x_pitch"]
        sums = min(rows, cut["sum_rows"]) * 36 * 4  # bytes of a slice of a piece
        most = cut["pieces"] + (cut["more"] > 0)
        slices = most * warps * parts
        assert cut["shared_bytes"] >= cut["sums_at"] + slices * sums
        warps_k.add(cut["warps_k"])
        all_parts.add(parts)
    assert warps_k == {1, 2, 4, 8, 16}
    assert all_parts == {1, 2, 4}


@pytest.mark.parametrize(
    "sizes", [(3, 1, 1, 1), (-1, 1, 1, 1), (0, 0, 1, 1), (0, 1, 0, 1), (0, 1, 1, 0)]
)
def test_nothing_is_not_cut(sizes):
    with pytest.raises(ValueError, match="cut_skinny"):
        _jax_marlin.cut_skinny(*sizes, 132)


def test_x_that_is_large_is_shared_by_blocks():
    def parts(rows, k, n=4096):
        return _jax_marlin.cut_skinny(fitting_tile(rows), rows, k // 64, n, 132)["parts"]

    assert parts(1, 4096) == parts(5, 4096) == 1
    assert parts(6, 4096) == parts(16, 4096) == parts(32, 4096) == 2
    assert parts(32, 8192) == 4  # half of it does not fit


def test_few_rows_of_any_weight_and_some_more_of_few_columns():
    taken = set()
    for rows, k, n, sm_count in problems():
        choice = choose(rows, k, n, sm_count)
        pieces, skinny = -(-n // 32), False
        if rows <= 32:
            tile = fitting_tile(rows)
            cut = _jax_marlin.cut_skinny(tile, rows, -(-k // 64), n, sm_count)
            few = rows <= 16 or pieces <= cut["clusters"] * cut["parts"]
            enough = rows > 8 or k <= 4096 or pieces >= 0.2 * sm_count
            fits = cut["shared_bytes"] <= SHARED_OF_BLOCK
            skinny = k % 64 == 0 and few and enough and fits
        assert (choice["kernel"] == "skinny") == skinny
        if skinny:
            taken.add(choice["tile"])
            assert choice["tile"] == fitting_tile(rows)
            assert (choice["row_blocks"], choice["split_k"], choice["scratch_bytes"]) == (1, 1, 0)
            assert choice["n_blocks"] == pieces
    assert taken == {0, 1, 2}


def test_what_is_left_to_others():
    def kernel(*sizes, **rest):
        return choose(*sizes, **rest)["kernel"]

    shape = (4096, 4096)
    assert kernel(8, *shape) == "skinny"
    assert kernel(16, *shape) == "skinny"
    assert kernel(32, *shape) == "skinny"
    assert kernel(33, *shape) != "skinny"
    assert kernel(16, 4096, 12288) == kernel(8, 8192, 28672) == "skinny"
    assert kernel(17, 4096, 4256) != "skinny"  # more pieces than multiprocessors
    assert kernel(32, 8192, 3840) == "skinny"
    assert kernel(32, 8192, 4096) != "skinny"  # than clusters of four have
    assert kernel(0, *shape) != "skinny"
    assert kernel(8, *shape, has_wgmma=False) != "skinny"  # built for sm_90 alone
    assert kernel(8, *shape, block=8) != "skinny"
    assert kernel(8, *shape, transposed=True) != "skinny"
    assert kernel(8, *shape, gated=True) != "skinny"
    assert kernel(1, 4096, 32) == "skinny"
    assert kernel(1, 8192, 512) != "skinny"  # K is better cut between blocks
    assert kernel(1, 4104, 4096) != "skinny"
    assert kernel(16, 14336, 4096) == "skinny"
    assert kernel(16, 28672, 4096) != "skinny"  # x would not fit
    assert kernel(9, 8192, 512) == kernel(1, 53248, 16384) == "skinny"
    for rows, k in ((32, 1 << 26), (16, 1 << 28), (9, 240_000_000)):  # sizes that no int holds
        assert kernel(rows, k, 64) != "skinny"
    assert kernel(1, 0, 4096) != "skinny"
    assert kernel(1, 4096, 0) != "skinny"
