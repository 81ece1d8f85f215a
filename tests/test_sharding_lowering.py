"""Programs of several devices lowered for CUDA without a GPU, and exported."""

import extension_stand_in
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from meshes import P, case, cpu_mesh

import jax_marlin as jm
from jax_marlin.ops import ffi_targets

MESH = cpu_mesh()
OWN = P(("data", "expert"))
TARGET = "jax_marlin_moe_ffn_v1"


@pytest.fixture(autouse=True)
def extension(monkeypatch):
    if ffi_targets.cuda_unavailable_reason() is not None:
        extension_stand_in.install(monkeypatch, extension_stand_in.stand_in())


def layer(**options):
    """(function of leaves, leaves, specs) of a layer over the expert axis, in shard_map."""
    gate_up, down = (case(f"lowered_{n}", k=n, dtype="bfloat16").stack() for n in (256, 128))
    x, ids, weights = jnp.ones((8, 256), jnp.bfloat16), jnp.zeros((8, 2), int), jnp.ones((8, 2))
    arguments = (x, ids, weights, gate_up, down)
    leaves, tree = jax.tree.flatten(arguments)
    specs = (OWN, OWN, OWN, *jm.partition_specs((gate_up, down), "expert", "expert"))

    def function(mesh):
        mapped = jax.shard_map(
            lambda *a: jm.moe_ffn(*a, expert_axis="expert", **options),
            mesh=mesh, in_specs=specs, out_specs=OWN,
        )  # fmt: skip
        return jax.jit(lambda *leaves: mapped(*jax.tree.unflatten(tree, leaves)))

    return function, leaves, jax.tree.leaves(specs)


def test_shard_map_lowers_to_the_kernel_and_ragged_collectives():
    for exchange, ragged in (("all_gather", False), ("all_to_all", True)):
        function, leaves, _ = layer(exchange=exchange)
        text = function(MESH).trace(*leaves).lower(lowering_platforms=("cuda",)).as_text()
        assert text.count(f"@{TARGET}(") == 1
        assert ("ragged_all_to_all" in text) == ragged


def test_shard_map_lowers_for_a_mesh_that_is_not_there():
    function, leaves, specs = layer()
    mesh = MESH.abstract_mesh
    abstract = [
        jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))
        for leaf, spec in zip(leaves, specs, strict=True)
    ]
    text = function(mesh).trace(*abstract).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count(f"@{TARGET}(") == 1


def test_export_of_shard_map_for_both_platforms():
    function, leaves, _ = layer()
    exported = jax.export.export(
        function(MESH),
        platforms=["cpu", "cuda"],
        disabled_checks=[jax.export.DisabledSafetyCheck.custom_call(TARGET)],
    )(*leaves)
    exported = jax.export.deserialize(exported.serialize())
    assert exported.nr_devices == 8 and TARGET in exported.mlir_module()
    placed = [jax.device_put(leaf, NamedSharding(MESH, P())) for leaf in leaves]
    np.testing.assert_array_equal(exported.call(*placed), function(MESH)(*leaves))


def test_an_automatic_mesh_leaves_the_kernel_to_the_partitioner():
    """What a device then runs is lowered as in shard_map; one device's program is not touched."""
    stack = case("lowered_automatic", dtype="bfloat16").stack()
    x = jnp.ones((8, 256), jnp.bfloat16)
    lower = lambda x, s: (  # noqa: E731
        jax.jit(lambda x, s: jm.matmul(x, s[1]))
        .trace(x, s).lower(lowering_platforms=("cuda",)).as_text()
    )  # fmt: skip
    one = lower(x, stack)
    assert "jax_marlin_matmul_v1" in one and "CustomSPMDPartitioning" not in one
    several = lower(x, jm.shard(stack, MESH, "column", "tensor"))
    assert several.count("@CustomSPMDPartitioning") == 1
