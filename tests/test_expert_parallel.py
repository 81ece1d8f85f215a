"""moe_ffn over devices that hold some of the experts, some of the columns, or both."""

import jax
import numpy as np
import oracle
import pytest
from meshes import P, case, cpu_mesh, kinds, run
from moe_layers import Layer, expected

import jax_marlin as jm
from jax_marlin.ops.token_exchange import select_exchange

MESH = cpu_mesh()
OWN = P(("data", "expert"))  # each device's own tokens


def layer_of(name, **fields):
    down = fields | {"k": 128, "n": 192}
    return Layer(case(f"{name}_gate_up", **fields), case(f"{name}_down", **down))


def parallel(layer, kind, axis, tokens, stacks=None, **options):
    """(result, collectives) of the layer; `tokens` is the spec of x, ids and weights."""
    stacks = layer.stacks() if stacks is None else stacks
    stacks = jm.shard(stacks, MESH, kind, axis, gate_up=True)
    function = jax.shard_map(
        lambda *arguments: jm.moe_ffn(*arguments, **options),
        mesh=MESH,
        in_specs=(tokens, tokens, tokens, *jm.partition_specs(stacks, kind, axis)),
        out_specs=tokens,
    )
    return run(function, layer.x, *layer.routes, *stacks)


VARIANTS = {
    "symmetric": {},
    "v1_zeros_bias_skips": {"zeros": "v1", "bias": True, "routing": "skips", "m": 24},
    "act_order": {"g_idx": "per_expert", "zeros": "v2", "bias": True},
    "shared_act_order_bfloat16": {"g_idx": "shared", "dtype": "bfloat16"},
    "all_to_one_expert": {"routing": "one_expert", "m": 16},
    "nobody": {"routing": "nobody"},
    "top_3_of_4": {"top_k": 3, "m": 12},
}


@pytest.mark.parametrize("exchange", ["all_gather", "all_to_all"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_own_tokens(variant, exchange):
    layer = layer_of(variant, **VARIANTS[variant])
    out, found = parallel(
        layer, "expert", "expert", OWN, expert_axis="expert", exchange=exchange
    )  # fmt: skip
    oracle.assert_within(out, *expected(layer))
    if exchange == "all_gather":  # x and weights there, one sum back
        assert sorted(kinds(found)) == ["all-gather", "all-gather", "reduce-scatter"]
    else:  # x and weights there, rows back
        assert kinds(found) == ["all-to-all"] * 3


@pytest.mark.parametrize("variant", ["v1_zeros_bias_skips", "act_order"])
def test_the_same_tokens_everywhere(variant):
    layer = layer_of(variant, **VARIANTS[variant])
    out, found = parallel(layer, "expert", "expert", P("data"), expert_axis="expert")
    oracle.assert_within(out, *expected(layer))
    assert kinds(found) == ["all-reduce"]


@pytest.mark.parametrize("variant", ["v1_zeros_bias_skips", "symmetric"])
def test_columns_and_rows(variant):
    layer = layer_of(variant, **VARIANTS[variant])
    out, found = parallel(layer, ("column", "row"), "tensor", P("data"), tensor_axis="tensor")
    oracle.assert_within(out, *expected(layer))
    assert kinds(found) == ["all-reduce"]


def test_dense_stacks():
    layer = layer_of("dense", bias=True)
    stacks = layer.dense_stacks()
    for kind, axis, options in (
        ("expert", "expert", {"expert_axis": "expert"}),
        (("column", "row"), "tensor", {"tensor_axis": "tensor"}),
    ):
        out, found = parallel(layer, kind, axis, P("data"), stacks, **options)
        oracle.assert_within(out, *expected(layer))
        assert kinds(found) == ["all-reduce"]


@pytest.mark.parametrize("tokens", [P("data"), OWN])
def test_experts_and_columns_at_once(tokens):
    layer = layer_of("both", zeros="v1", bias=True)
    (gate_up, down), axes = layer.stacks(), {"expert_axis": "expert", "tensor_axis": "tensor"}
    paired = jm.shard(gate_up, MESH, "column", "tensor", gate_up=True)
    both = [
        jax.tree.map(
            lambda e, t: P("expert", *t[1:]), *map(jm.partition_specs, (s, s), kinds, axis)
        )
        for s, kinds, axis in (
            (paired, ("expert", "column"), ("expert", "tensor")),
            (down, ("expert", "row"), ("expert", "tensor")),
        )
    ]
    function = jax.shard_map(
        lambda *arguments: jm.moe_ffn(*arguments, **axes),
        mesh=MESH, in_specs=(tokens,) * 3 + tuple(both), out_specs=tokens,
    )  # fmt: skip
    out, found = run(function, layer.x, *layer.routes, paired, down)
    oracle.assert_within(out, *expected(layer))
    assert len([k for k in kinds(found) if k in ("all-reduce", "reduce-scatter")]) <= 2


def test_leading_axes_and_same_bits():
    layer = layer_of("lead", dtype="bfloat16")
    stacks = jm.shard(layer.stacks(), MESH, "expert", "expert")
    specs = jm.partition_specs(stacks, "expert", "expert")
    results = []
    for lead in ((8,), (4, 2)):
        arrays = [a.reshape(*lead, a.shape[-1]) for a in (layer.x, *layer.routes)]
        function = jax.shard_map(
            lambda *a: jm.moe_ffn(*a, expert_axis="expert"),
            mesh=MESH, in_specs=(OWN, OWN, OWN, *specs), out_specs=OWN,
        )  # fmt: skip
        results += [np.asarray(jax.jit(function)(*arrays, *stacks)).reshape(8, -1)] * 2
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


def test_the_exchange_is_chosen_by_static_shapes():
    assert select_exchange(64, 2, 8) == "all_gather"  # few tokens: fewer collectives
    assert select_exchange(4096, 8, 2) == "all_gather"  # nearly all go everywhere
    assert select_exchange(4096, 2, 8) == "all_gather"  # a quarter, by a slower collective
    assert select_exchange(4096, 2, 64) == "all_to_all"


ERRORS = [
    (
        "expert",
        "expert",
        P("tensor"),
        {"tensor_axis": "tensor"},
        "gate_up is the same on all of ten",
    ),
    ("expert", "expert", P(), {"expert_axis": "data"}, "gate_up is the same on all of expert_axis"),
    ("expert", "expert", P(), {"expert_axis": "expert", "exchange": "mail"}, "exchange is 'mail'"),
    (
        ("column", "row"),
        "tensor",
        P("tensor"),
        {"tensor_axis": "tensor"},
        "x varies over tensor_ax",
    ),
]


@pytest.mark.parametrize("kind, axis, tokens, options, message", ERRORS)
def test_errors(kind, axis, tokens, options, message):
    with pytest.raises(ValueError, match=f"moe_ffn: {message}"):
        parallel(layer_of("errors"), kind, axis, tokens, **options)


def test_without_varying_axis_checks_nothing_is_known_and_it_says_so():
    layer = layer_of("unchecked")
    stacks = jm.shard(layer.stacks(), MESH, "expert", "expert")
    function = jax.shard_map(
        lambda *a: jm.moe_ffn(*a, expert_axis="expert"),
        mesh=MESH, in_specs=(OWN, OWN, OWN, *jm.partition_specs(stacks, "expert", "expert")),
        out_specs=OWN, check_vma=False,
    )  # fmt: skip
    with pytest.raises(ValueError, match="varying-axis checks"):
        function(layer.x, *layer.routes, *stacks)
