"""gate|up columns over devices: paired so that each has its part of both, or refused by name."""

import dataclasses
from typing import Any

import jax
import numpy as np
import oracle
import pytest
from jax.sharding import AxisType
from meshes import P, case, cpu_mesh, put
from moe_layers import Layer, expected

import jax_marlin as jm
from jax_marlin.sharding import pair_gate_up

MESHES = {"automatic": cpu_mesh(), "explicit": cpu_mesh(AxisType.Explicit)}
KINDS = ("column", "row")
FORMS = {  # stacks of a layer, options of moe_ffn
    "packed": (lambda layer: layer.stacks(), {}),
    "composed": (lambda layer: layer.stacks(), {"implementation": "xla"}),
    "dense": (lambda layer: layer.dense_stacks(), {}),
}


def layer_of(name: str) -> Layer:
    return Layer(case(f"{name}_gate_up", bias=True), case(f"{name}_down", k=128, bias=True))


def tokens_of(layer: Layer, mesh) -> Any:
    return [put(mesh, a, "data") for a in (layer.x, *layer.routes)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", MESHES)
def test_columns_that_jit_cuts_without_pairs_are_refused(name, form):
    layer, mesh = layer_of("unpaired"), MESHES[name]
    stacks, options = FORMS[form][0](layer), FORMS[form][1]
    function, tokens = jax.jit(lambda *a: jm.moe_ffn(*a, **options)), tokens_of(layer, mesh)
    with pytest.raises(
        ValueError if name == "explicit" else jax.errors.JaxRuntimeError,
        match=r"moe_ffn.*gate_up.* cannot be cut over tensor here: gate_up's columns are not "
        r"paired, .* place gate_up by jax_marlin.shard\(..., gate_up=True\), or pass the pair",
    ):
        function(*tokens, *jm.shard(stacks, mesh, KINDS, "tensor"))
    paired = jm.shard(stacks, mesh, KINDS, "tensor", gate_up=True)
    oracle.assert_within(function(*tokens, *paired), *expected(layer))


def test_pairs_for_fewer_devices_are_told():
    layer, mesh = Layer(case("fewer_gate_up", n=512), case("fewer_down")), MESHES["explicit"]
    gate_up, down = layer.stacks()
    gate_up = jm.shard(pair_gate_up(gate_up, 2), mesh, "expert", "expert")
    down = jm.shard(down, mesh, "row", ("data", "tensor"))
    x, ids, weights = (put(mesh, a) for a in (layer.x, *layer.routes))
    with pytest.raises(ValueError, match=r"down.qweight .*columns are paired for 2 devices, and"):
        jm.moe_ffn(x, ids, weights, gate_up, down)


@pytest.mark.parametrize("form", ["packed", "dense"])
@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
def test_paired_columns_of_down_are_refused(mesh, form):
    layer = layer_of("paired_down")
    stacks = jm.shard(FORMS[form][0](layer), mesh, "column", "tensor", gate_up=True)
    with pytest.raises(ValueError, match=r"moe_ffn: down's columns are paired .* leave out gate"):
        jm.moe_ffn(*tokens_of(layer, mesh), *stacks)


@pytest.mark.parametrize("form", ["packed", "dense"])
def test_paired_columns_of_gate_and_up_that_are_two_stacks_are_refused(form):
    """Hidden rows would stand in another order than down's; in shard_map, too."""
    gate, up = case("two_gate", bias=True), case("two_up", bias=True)
    assert gate.bias is not None and up.bias is not None
    joined = dataclasses.replace(
        gate, weights=np.concatenate([gate.weights, up.weights], axis=2),
        bias=np.concatenate([gate.bias, up.bias], axis=1),
    )  # fmt: skip
    layer, mesh = Layer(joined, case("two_down", bias=True)), MESHES["automatic"]
    gate_and_down, up_and_down = (FORMS[form][0](Layer(half, layer.down)) for half in (gate, up))
    stacks = ((gate_and_down[0], up_and_down[0]), gate_and_down[1])

    def by_hand(*arguments):
        specs = *[P("data")] * 3, *jm.partition_specs(arguments[3:], KINDS, "tensor")
        layer = lambda *a: jm.moe_ffn(*a, tensor_axis="tensor")  # noqa: E731
        return jax.shard_map(layer, mesh=mesh, in_specs=specs, out_specs=P("data"))(*arguments)

    for function in (jm.moe_ffn, by_hand):
        paired = jm.shard(stacks, mesh, KINDS, "tensor", gate_up=True)
        with pytest.raises(ValueError, match=r"moe_ffn: gate's columns are paired .* two stacks"):
            function(*tokens_of(layer, mesh), *paired)
        out = jax.jit(function)(*tokens_of(layer, mesh), *jm.shard(stacks, mesh, KINDS, "tensor"))
        oracle.assert_within(out, *expected(layer))
