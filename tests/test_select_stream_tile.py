"""Tile choice of the streaming kernel: a pure function, so it is checked without a GPU."""

import itertools

import pytest

_jax_marlin = pytest.importorskip("_jax_marlin", reason="needs a CUDA build")

SM_COUNTS = (78, 114, 132)
SHAPES = (
    (768, 2048), (1408, 2048), (2048, 1536), (2880, 5760), (4096, 28672), (14336, 4096),
    (7168, 4096), (8192, 28672), (96, 4096), (4096, 4104),
)  # fmt: skip


def choose(rows, block, k, n, bits=4, sm_count=132, **rest):
    return _jax_marlin.select_tile(rows, block, k, n, bits, sm_count, True, **rest)


def choices():
    """(problem, choice) of few rows to a tile."""
    for (k, n), bits, block, sm_count in itertools.product(SHAPES, (4, 8), (0, 1, 5, 8), SM_COUNTS):
        for rows in (1, 8, 64, 512, 4096):
            problem = (rows, block, k, n, bits, sm_count)
            yield problem, choose(*problem)


def test_choice_covers_the_problem_with_whole_k_and_no_scratch():
    table, streamed = _jax_marlin.stream_table(), set()
    for (rows, block, _, n, _, _), choice in choices():
        if choice["kernel"] != "stream":
            continue
        tile = table[choice["tile"]]
        assert (choice["split_k"], choice["sub_blocks"], choice["scratch_bytes"]) == (1, 1, 0)
        assert tile["tile_m"] >= block
        assert choice["row_blocks"] == -(-rows // block)
        assert choice["n_blocks"] == -(-n // tile["columns"])
        streamed.add(choice["tile"])
    assert streamed == set(range(len(table)))


def test_weights_enough_for_every_multiprocessor():
    for (rows, block, k, n, _, sm_count), choice in choices():
        pieces = (-(-rows // block) if block else 1) * -(-n // 128) / sm_count
        least = 43 if k // 64 >= 20 else 70
        enough = pieces >= 0.7 and pieces * (k // 64) >= least
        streams = enough and k % 64 == 0 and block > 0
        assert (choice["kernel"] == "stream") == streams


def test_routes_that_miss_experts_have_no_pieces():
    few = choose(1024, 8, 768, 2048, routes=32, num_experts=128)  # 28 experts of 128
    many = choose(1024, 8, 768, 2048, routes=128, num_experts=128)
    assert few["kernel"] != "stream" and many["kernel"] == "stream"


def test_blocks_that_end_together():
    """Stages of 6 K tiles: K of 12 fills them, or three blocks an SM take all pieces at once."""
    assert choose(1024, 8, 768, 2048, routes=128, num_experts=128)["tile"] == 1
    assert choose(1024, 8, 2048, 1536, routes=32, num_experts=128)["tile"] == 1
    assert choose(1024, 8, 2048, 1536, routes=128, num_experts=128)["tile"] == 0


def test_what_is_left_to_others():
    def kernel(*sizes, **rest):
        return _jax_marlin.select_tile(*sizes, **rest)["kernel"]

    large = {"k": 8192, "n": 28672, "bits": 4, "sm_count": 132}
    assert kernel(8, 8, **large, has_wgmma=True) == "stream"
    assert kernel(8, 8, **large) != "stream"  # no bulk copies
    assert kernel(8, 0, **large, has_wgmma=True) != "stream"
    assert kernel(90, 9, **large, has_wgmma=True) != "stream"
    assert kernel(8, 8, **large, has_wgmma=True, transposed=True) != "stream"
    off = large | {"n": 28672 + 64}  # gate ends inside a column tile
    assert kernel(8, 8, **off, has_wgmma=True, gated=True) != "stream"
    assert kernel(8, 8, **off, has_wgmma=True) == "stream"


def test_gate_up_leaves_room_for_a_down_that_starts_beside_it():
    """Two tokens of Qwen3: alone gate_up would stream, and fill every multiprocessor."""
    assert choose(16, 1, 2048, 1536, gated=True)["kernel"] == "stream"
    layer = _jax_marlin.select_layer(
        2, top_k=8, num_experts=128, hidden=2048, intermediate=768, columns=2048, bits=4,
        sm_count=132, has_wgmma=True,
    )  # fmt: skip
    assert layer["down_fits_beside"] and layer["gate_up"]["kernel"] == "mma"
