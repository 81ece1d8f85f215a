"""Which kernels a MoE layer takes: a pure function, so every promise is checked without a GPU."""

import itertools

import pytest

from jax_marlin.ops import layer_call
from jax_marlin.ops.moe_align_block_size import aligned_sizes, select_moe_block_size

_jax_marlin = pytest.importorskip("_jax_marlin", reason="needs a CUDA build")

QWEN3 = {"top_k": 8, "num_experts": 128, "hidden": 2048, "intermediate": 768, "columns": 2048}
MIXTRAL = {"top_k": 2, "num_experts": 8, "hidden": 4096, "intermediate": 14336, "columns": 4096}
TINY = {"top_k": 3, "num_experts": 40, "hidden": 96, "intermediate": 80, "columns": 67}
H100 = {"sm_count": 132, "has_wgmma": True}


def select(tokens, sizes, bits=4, **rest):
    # As many slots as tables may ever have.
    block = select_moe_block_size(tokens, sizes["top_k"], sizes["num_experts"])
    slots, _ = aligned_sizes((tokens, sizes["top_k"]), block, sizes["num_experts"])
    tables = {"slots": slots, "moe_block_size": block}
    return _jax_marlin.select_layer(tokens, bits=bits, **(sizes | tables | H100 | rest))


def choices():
    shapes = (QWEN3, QWEN3 | {"top_k": 1}, QWEN3 | {"top_k": 9}, MIXTRAL, TINY)
    for sizes, tokens, bits in itertools.product(shapes, (1, 2, 3, 5, 64), (4, 8)):
        for sm_count in (1, 78, 114, 132):
            yield tokens, sizes, bits, sm_count, select(tokens, sizes, bits, sm_count=sm_count)


def blocks(choice):
    return choice["row_blocks"] * choice["n_blocks"] * choice["split_k"]


def test_one_token_is_two_launches_that_overlap():
    choice = select(1, QWEN3)
    assert not choice["tables"] and choice["sums_routes"] and choice["down_fits_beside"]
    assert blocks(choice["down"]) == 128  # nearly all 132 multiprocessors
    assert blocks(choice["gate_up"]) == 192  # two or one of them a multiprocessor, not three


def test_few_routes_of_small_experts_are_summed_in_down():
    assert select(2, QWEN3)["sums_routes"]
    assert not select(3, QWEN3)["sums_routes"]  # 18 MB of weights
    assert not select(1, MIXTRAL)["sums_routes"]
    assert not select(64, QWEN3)["sums_routes"]  # by tables
    assert not select(1, QWEN3 | {"top_k": 9})["sums_routes"]  # more routes than warps
    assert select(1, TINY)["sums_routes"]


def test_a_sum_covers_the_columns_and_needs_no_scratch():
    columns = _jax_marlin.routes_tile()["columns"]
    sums = [c for c in choices() if c[-1]["sums_routes"]]
    assert {sizes["top_k"] for _, sizes, *_ in sums} == {1, 3, 8}
    for tokens, sizes, _, _, choice in sums:
        down = choice["down"]
        assert not choice["tables"]
        assert down["row_blocks"] == tokens and down["split_k"] == 1
        assert down["n_blocks"] * columns >= sizes["columns"] > (down["n_blocks"] - 1) * columns
        assert down["scratch_bytes"] == 0


def test_down_starts_early_where_registers_hold_it_beside_gate_up():
    most_of_down = _jax_marlin.routes_tile()["blocks_per_sm"]
    early = [c for c in choices() if c[-1]["down_fits_beside"]]
    assert {bits for _, _, bits, _, _ in early} == {4, 8}
    for _, _, bits, sm_count, choice in early:
        tile = _jax_marlin.tile_table()[choice["gate_up"]["tile"]]
        of_one = -(-blocks(choice["gate_up"]) // sm_count)
        assert choice["sums_routes"]
        assert of_one / tile["blocks_per_sm"][bits] + 1 / most_of_down[bits] <= 1


def test_many_rows_lie_in_the_order_of_slots_where_there_is_room():
    def by_slot(**changes):
        changes = {"slots": 2**14, "moe_block_size": 256, "room_for_slots": True} | changes
        choice = _jax_marlin.select_layer(4096, bits=4, **(MIXTRAL | H100 | changes))
        return choice["gate_up"]["in_boxes"], choice["down"]["in_boxes"]

    assert by_slot() == (True, True)
    assert by_slot(room_for_slots=False) == (False, False)
    assert by_slot(moe_block_size=128) == (False, False)
    assert by_slot(intermediate=1024) == (False, True)  # too few columns to repay the pass over x
    assert by_slot(down_gathers=True) == (True, False)
    # Python makes the room from as many columns on.
    least = layer_call._SORTED_X_COLUMNS // 2
    assert by_slot(intermediate=least)[0] and not by_slot(intermediate=least - 64)[0]
    assert by_slot(intermediate=14352) == (
        False,
        False,
    )  # gate's last columns share a tile with up's
    assert by_slot(has_wgmma=False) == (False, False)


def test_gate_up_is_as_alone_where_nothing_starts_early():
    for tokens, sizes, bits, sm_count, choice in choices():
        if choice["down_fits_beside"] or choice["tables"]:
            continue
        routes = tokens * sizes["top_k"]
        alone = _jax_marlin.select_tile(
            routes, 1, sizes["hidden"], 2 * sizes["intermediate"], bits, sm_count, True, True,
            routes=routes, num_experts=sizes["num_experts"],
        )  # fmt: skip
        assert choice["gate_up"] == alone


@pytest.mark.parametrize("rest", [{"down_gathers": True}, {"has_wgmma": False}])
def test_nothing_starts_early_before_a_gather_or_on_gpus_that_cannot(rest):
    choice = select(1, QWEN3, **rest)
    assert choice["sums_routes"] and not choice["down_fits_beside"]
    assert blocks(choice["gate_up"]) == 384
