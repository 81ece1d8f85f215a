"""Direct placement: parts of a stack go straight to their devices, and nothing else is read."""

import os
import socket
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent
WRITE = """
import sys, pathlib, jax, numpy as np
sys.path.insert(0, {tests!r})
from jax.sharding import NamedSharding, PartitionSpec as P
from synthetic_checkpoints import gptq_tensors, quantization, write
from test_load_expert_stack import expert_names, write_experts
import jax_marlin as jm
from jax_marlin.checkpoints import open_checkpoint
from jax_marlin.checkpoints.shards import Shards

def assert_equal(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected), (got.spec, expected.spec)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected)):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), strict=True)
"""


def run(code: str, *, devices: int = 8, **variables: str) -> str:
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags} | variables
    done = subprocess.run(
        [sys.executable, "-c", WRITE.format(tests=str(TESTS)) + code],
        env=environment, capture_output=True, text=True, cwd=TESTS.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


OPTIONS = [
    {},
    {"bits": 8, "group_size": 64},
    {"symmetric": False, "bias": True},
    {"group_size": -1},
]


def test_any_split_holds_what_one_device_holds(tmp_path):
    run(f"""
root = pathlib.Path({str(tmp_path)!r})
mesh = jax.make_mesh((2, 2, 2), ("a", "b", "c"))
for i, options in enumerate({OPTIONS!r}):
    path, _ = write_experts(root / str(i), num_experts=4, k=256, n=192, **options)
    experts = expert_names(4, "gate_proj", "up_proj")
    with open_checkpoint(path) as checkpoint:
        whole = checkpoint.load_expert_stack(experts)
        for axes in [P("a"), P(("a", "b")), P(None, "b"), P("c", "b"), P("a", None, "c"),
                     P("a", "b", "c"), P()]:
            stack = checkpoint.load_expert_stack(experts, sharding=NamedSharding(mesh, axes))
            assert_equal(stack, whole)
            assert stack.qweight.sharding.is_equivalent_to(NamedSharding(mesh, axes), 4), axes
            assert len(stack.scales.sharding.device_set) == 8
""")


def test_act_order_and_optional_leaves(tmp_path):
    run(f"""
root = pathlib.Path({str(tmp_path)!r})
mesh = jax.make_mesh((2, 4), ("a", "b"))
modules = {{
    f"e.{{e}}": gptq_tensors(e, 256, 128, act_order=e != 1, bias=e == 2)[0] for e in range(4)
}}
experts = list(modules)
with open_checkpoint(write(root, modules, quantization(desc_act=True))) as checkpoint:
    whole = checkpoint.load_expert_stack(experts)
    for axes in (P("b"), P("a", None)):
        stack = checkpoint.load_expert_stack(experts, sharding=NamedSharding(mesh, axes))
        assert_equal(stack, whole)
    for axes, message in [
        (P(None, None, "a"), "splits K, and e.0 gathers its input in act-order"),
        (P(("a", "b")), "splits 4 experts into 8 parts"),
        (P(None, "b"), "splits N = 128 into 4 parts"),
        (P(None, None, None, "a"), "at most three axes"),
    ]:
        try:
            checkpoint.load_expert_stack(experts, sharding=NamedSharding(mesh, axes))
        except ValueError as error:
            assert message in str(error), error
        else:
            raise AssertionError(message)
    try:
        checkpoint.load_expert_stack(experts, sharding=jax.devices()[0])
    except TypeError as error:
        assert "expected a jax.sharding.NamedSharding" in str(error)
""")


def test_a_split_that_cuts_a_group_is_refused(tmp_path):
    run(f"""
mesh = jax.make_mesh((4,), ("a",), devices=jax.devices()[:4])
path, _ = write_experts(pathlib.Path({str(tmp_path)!r}), num_experts=4, k=256, group_size=128)
with open_checkpoint(path) as checkpoint:
    try:
        sharding = NamedSharding(mesh, P(None, None, "a"))
        checkpoint.load_expert_stack(expert_names(4, "gate_proj"), sharding=sharding)
    except ValueError as error:
        assert "splits K = 256 into 4 parts" in str(error) and "groups of 128" in str(error)
    else:
        raise AssertionError
""")


MODEL = """
from jax_marlin.data import bundled_checkpoint
mesh = jax.sharding.Mesh(jax.devices(), ("expert",))
whole = jm.models.load(bundled_checkpoint(), "float32")
model = jm.models.load(bundled_checkpoint(), "float32", sharding=NamedSharding(mesh, P("expert")))
assert jax.tree.structure(model) == jax.tree.structure(whole)
stack = model.layers[0].mlp.down
assert {shard.data.shape[0] for shard in stack.qweight.addressable_shards} == {1}
assert model.embed_tokens.sharding.is_fully_replicated
ids = np.array([[3, 1, 4, 1, 5]])
logits = jax.jit(lambda model, ids: model(ids))
np.testing.assert_allclose(logits(model, ids), logits(whole, ids), atol=2e-4)
"""


def test_a_model_shared_by_devices_computes_the_same():
    run(MODEL)


def test_each_device_has_its_part_of_the_cache(tmp_path):
    run(f"""
root = pathlib.Path({str(tmp_path)!r})
mesh = jax.sharding.Mesh(jax.devices(), ("a",))
path, _ = write_experts(root / "checkpoint", num_experts=8)
with open_checkpoint(path) as checkpoint:
    experts = expert_names(8, "gate_proj", "up_proj")
    whole = checkpoint.load_expert_stack(experts)
    checkpoint.keep_packed(root / "cache")
    for _ in range(2):
        stack = checkpoint.load_expert_stack(experts, sharding=NamedSharding(mesh, P("a")))
        assert_equal(stack, whole)
        Shards.read = lambda self, name: 1 / 0
    assert len(list((root / "cache").rglob("*.safetensors"))) == 8
""")


def test_of_experts_in_act_order_two_orders_are_read_beforehand(tmp_path):
    """As many as say that they differ: which leaves there are must not depend on the process."""
    run(f"""
root = pathlib.Path({str(tmp_path)!r})
mesh = jax.sharding.Mesh(jax.devices(), ("a",))
path, _ = write_experts(root / "checkpoint", num_experts=8, n=128, act_order=True)
with open_checkpoint(path) as checkpoint:
    experts = expert_names(8, "gate_proj", "up_proj")
    whole = checkpoint.load_expert_stack(experts)
    checkpoint.keep_packed(root / "cache")
    read, names = Shards.read, []
    Shards.read = lambda self, name: (names.append(name), read(self, name))[1]
    for count in (8 * 2 * 4 + 2, 2):
        stack = checkpoint.load_expert_stack(experts, sharding=NamedSharding(mesh, P("a")))
        assert_equal(stack, whole)
        assert len(names) == count, names
        names.clear()
""")


def test_a_config_that_hides_act_order_is_refused(tmp_path):
    run(f"""
mesh = jax.sharding.Mesh(jax.devices()[:2], ("a",))
modules = {{f"e.{{e}}": gptq_tensors(e, 256, 128, act_order=e == 1)[0] for e in range(2)}}
with open_checkpoint(write(pathlib.Path({str(tmp_path)!r}), modules, quantization())) as checkpoint:
    assert checkpoint.load_expert_stack(list(modules)).perm is not None
    try:
        checkpoint.load_expert_stack(list(modules), sharding=NamedSharding(mesh, P("a")))
    except ValueError as error:
        assert "module e.1" in str(error) and "set desc_act true" in str(error), error
    else:
        raise AssertionError
""")


TWO_PROCESSES = """
import os
rank = int(os.environ["RANK"])
jax.distributed.initialize(os.environ["COORDINATOR"], num_processes=2, process_id=rank)
read, own = [], Shards.read
def counted(self, name):
    array = own(self, name)
    read.append((name, array.nbytes))
    return array
Shards.read = counted
mesh = jax.sharding.Mesh(jax.devices(), ("expert",))
from jax_marlin.data import bundled_checkpoint
with open_checkpoint(bundled_checkpoint()) as checkpoint:
    names = [f"model.layers.0.mlp.experts.{e}.down_proj" for e in range(8)]
    stack = checkpoint.load_expert_stack(names, sharding=NamedSharding(mesh, P("expert")))
    mine = range(4 * rank, 4 * rank + 4)
    assert sorted(name for name, _ in read) == sorted(
        f"{names[e]}.{part}" for e in mine for part in ("qweight", "scales", "qzeros", "g_idx"))
    assert sum(nbytes for _, nbytes in read) == sum(
        checkpoint.modules[names[e]].nbytes for e in mine)
    whole = checkpoint.load_expert_stack(names)
assert stack.qweight.shape == whole.qweight.shape
assert jax.tree.structure(stack) == jax.tree.structure(whole)
for shard in stack.qweight.addressable_shards:
    np.testing.assert_array_equal(shard.data, np.asarray(whole.qweight)[shard.index])
model = jm.models.load(bundled_checkpoint(), "float32", sharding=NamedSharding(mesh, P("expert")))
assert not model.layers[0].mlp.down.qweight.is_fully_addressable
assert model.embed_tokens.is_fully_addressable == False
ids = np.array([[3, 1, 4, 1, 5]])
logits = jax.jit(lambda model, ids: model(ids), out_shardings=NamedSharding(mesh, P()))(model, ids)
expected = jm.models.load(bundled_checkpoint(), "float32")(ids)
np.testing.assert_allclose(logits.addressable_data(0), expected, atol=2e-4)
print("same", rank)
"""


def test_of_two_processes_each_reads_its_own_experts():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    code = WRITE.format(tests=str(TESTS)) + TWO_PROCESSES
    flags = "--xla_force_host_platform_device_count=2"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env=os.environ
            | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
            | {"RANK": str(rank), "COORDINATOR": address},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=TESTS.parent,
        )
        for rank in range(2)
    ]  # fmt: skip
    ends = [process.communicate() for process in processes]
    for rank, (process, (out, error)) in enumerate(zip(processes, ends, strict=True)):
        assert process.returncode == 0 and f"same {rank}" in out, error[-3000:]
