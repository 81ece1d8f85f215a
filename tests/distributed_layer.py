"""One of two processes of a MoE layer whose experts lie in both: `distributed_layer.py PORT ID`.

Each process makes only its own experts' leaves: where a loader reads them from a file, the callback
of `make_array_from_callback` says which slices.
"""

import sys

import jax

jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"127.0.0.1:{sys.argv[1]}", 2, int(sys.argv[2]))

import numpy as np  # noqa: E402  (after the processes have met)
import oracle  # noqa: E402
from jax.sharding import AxisType, NamedSharding, PartitionSpec  # noqa: E402
from meshes import case, collectives_of  # noqa: E402
from moe_layers import Layer, expected  # noqa: E402

import jax_marlin as jm  # noqa: E402

mesh = jax.make_mesh((4,), ("expert",), axis_types=(AxisType.Auto,))
assert (jax.process_count(), jax.local_device_count(), len(mesh.devices)) == (2, 2, 4)
fields = {"zeros": "v1", "bias": True, "g_idx": "per_expert", "routing": "skips", "m": 12}
down = case("two_processes_down", **(fields | {"k": 128, "n": 192}))
layer = Layer(case("two_processes", **fields), down)
asked: set[int] = set()


def placed(leaf, spec):
    def read(index):
        asked.update(range(*index[0].indices(leaf.shape[0])))
        return np.asarray(leaf[index])

    return jax.make_array_from_callback(leaf.shape, NamedSharding(mesh, spec), read)


host = jax.tree.map(np.asarray, layer.stacks())
specs = jm.partition_specs(host, "expert", "expert")
stacks = jax.tree.map(placed, host, specs)
assert asked == {2 * jax.process_index(), 2 * jax.process_index() + 1}

own, whole = PartitionSpec("expert"), PartitionSpec()
result, budget = expected(layer)


def check(out):
    for shard in out.addressable_shards:
        oracle.assert_within(shard.data, result[shard.index], budget[shard.index])


for exchange in ("all_gather", "all_to_all"):
    function = jax.shard_map(
        lambda *a, exchange=exchange: jm.moe_ffn(*a, expert_axis="expert", exchange=exchange),
        mesh=mesh, in_specs=(own, own, own, *specs), out_specs=own,
    )  # fmt: skip
    tokens = [placed(np.asarray(a), own) for a in (layer.x, *layer.routes)]
    check(jax.jit(function)(*tokens, *stacks))

tokens = [placed(np.asarray(a), whole) for a in (layer.x, *layer.routes)]
compiled = jax.jit(jm.moe_ffn).lower(*tokens, *stacks).compile()  # partitioned automatically
check(compiled(*tokens, *stacks))
assert [c.kind for c in collectives_of(compiled.as_text() or "")] == ["all-reduce"]
print("process", jax.process_index(), "agrees")
