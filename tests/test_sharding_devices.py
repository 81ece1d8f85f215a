"""Programs compiled for several devices, of a host's CPU or its GPUs: what each runs, what travels.

The ops are partitioned by `jit`, and by hand where tokens travel to their experts.
"""

import re

import jax
import numpy as np
import oracle
import pytest
from jax.sharding import AxisType, Mesh
from jaxprs import packed_results
from meshes import P, case, collectives, kinds, put
from moe_layers import Layer, expected
from operations import OPS, PRIMITIVES

import jax_marlin as jm

# kind of the stack, of down beside it in a layer, axes of x, what adds up a product and a layer
CUTS = {
    "expert": ("expert", "expert", ("data",), ["all-reduce"], ["all-reduce"]),
    "column": ("column", "row", ("data",), [], ["all-reduce"]),
    "row": ("row", "row", ("data", "model"), ["all-reduce"], []),
}
FORMS = {
    "bfloat16": {"dtype": "bfloat16", "zeros": "v1"},
    "float16_bias": {"dtype": "float16", "bias": True},
}


@pytest.fixture(params=[2, 8])
def mesh(request: pytest.FixtureRequest, backend: str) -> Mesh:
    """Axes "data" and "model", the second of 2 devices or 4; on GPUs, of as many as there are."""
    found = jax.local_devices(backend={"xla": "cpu"}.get(backend, backend))
    if len(found) < request.param:
        pytest.skip(f"{request.param} devices are needed, there is {len(found)}")
    devices = np.array(found[: request.param]).reshape(-1, min(request.param, 4))
    return Mesh(devices, ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def layer_of(form: str) -> Layer:
    fields = FORMS[form]
    return Layer(case(f"{form}_gate_up", n=512, **fields), case(f"{form}_down", **fields))


def exact(op: str, layer: Layer):
    """float64 result and budget of each element, of one of `OPS`."""
    if op == "moe_ffn":
        return expected(layer)
    problem = layer.gate_up
    ids = {"matmul": np.full((8, 1), 2), "moe_matmul": problem.topk_ids}.get(op)
    ids = np.array([[0], [0], [2], [3], [3], [-1], [-1], [-1]]) if ids is None else ids
    factors = problem.topk_weights.reshape(-1, 1) if op == "moe_matmul" else 1.0
    bias, dtype = problem.bias, problem.x.dtype
    x, bias = problem.x.astype(float), None if bias is None else bias.astype(float)
    rows = oracle.routed_rows(x, problem.weights, ids, bias) * factors
    magnitude = oracle.routed_rows(
        np.abs(x), np.abs(problem.weights), ids, None if bias is None else np.abs(bias)
    )
    eps = max(oracle.epsilon(dtype), 4 * 16 * oracle.epsilon(np.float32))  # as matmul_budget
    return rows, 2 * eps * magnitude * factors


def check_program(mesh: Mesh, op: str, compiled, stacks, sums: list[str]) -> None:
    """Every device runs the kernel on what it holds, and nothing travels but `sums`."""
    text = compiled.as_text()
    assert f"num_partitions={mesh.size}" in text.splitlines()[0]
    called = set(re.findall(r'custom_call_target="(jax_marlin_\w+)"', text))
    on_gpu = mesh.devices.flat[0].platform != "cpu"
    assert (PRIMITIVES[op][0] in called) == on_gpu
    found = collectives(compiled)
    # A GPU's compiler may join collectives of one kind, those of token ids, too.
    assert {*kinds(found)} == {*sums} and len(found) <= len(sums)
    assert "u32" not in {dtype for c in found for dtype in c.dtypes}
    for stack in stacks:
        assert not packed_results(compiled, stack.qweight.shape)
        held = {s.device: s.data.nbytes for s in stack.qweight.addressable_shards}
        assert held == dict.fromkeys(mesh.devices.flat, stack.qweight.nbytes // mesh.shape["model"])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "op, kind",  # a layer's gate_up is cut by experts or columns
    [(op, kind) for op in OPS for kind in CUTS if (op, kind) != ("moe_ffn", "row")],
)
def test_partitioned_by_jit(mesh, op, kind, form):
    of_stack, of_down, of_x, sums, layer_sums = CUTS[kind]
    layer = layer_of(form)
    gate_up, down = layer.stacks()
    gate_up = jm.shard(gate_up, mesh, of_stack, "model", gate_up=op == "moe_ffn")
    down = jm.shard(down, mesh, of_down, "model")
    tokens = put(mesh, layer.x, *of_x), *(put(mesh, a, "data") for a in layer.routes)
    arguments = (*tokens, gate_up, down)
    compiled = jax.jit(OPS[op]).lower(*arguments).compile()
    stacks = arguments[3:] if op == "moe_ffn" else (gate_up,)
    check_program(mesh, op, compiled, stacks, layer_sums if op == "moe_ffn" else sums)
    out = compiled(*arguments)
    assert {shard.device for shard in out.addressable_shards} == {*mesh.devices.flat}
    # The result in float32, each part twice in an all-reduce: neither scales nor tokens fit beside.
    assert sum(c.bytes_sent for c in collectives(compiled)) <= 2 * 4 * out.size
    assert_right(mesh, out, op, layer)


@pytest.mark.parametrize("form", FORMS)
def test_tokens_travel_to_their_experts_by_hand(mesh, form):
    """The documented gathers: of x and of the router weights, and of no weight."""
    layer = layer_of(form)
    stacks = jm.shard(layer.stacks(), mesh, "expert", "model")
    own = P(("data", "model"))
    function = jax.shard_map(
        lambda *a: jm.moe_ffn(*a, expert_axis="model", exchange="all_gather"), mesh=mesh,
        in_specs=(own, own, own, *jm.partition_specs(stacks, "expert", "model")), out_specs=own,
    )  # fmt: skip
    arguments = (*(put(mesh, a, ("data", "model")) for a in (layer.x, *layer.routes)), *stacks)
    compiled = jax.jit(function).lower(*arguments).compile()
    check_program(mesh, "moe_ffn", compiled, stacks, ["all-gather", "all-gather", "reduce-scatter"])
    tokens = layer.x.nbytes + 8 * layer.gate_up.topk_weights.size  # x, ids and weights
    gathers = [c for c in collectives(compiled) if c.kind == "all-gather"]
    assert sum(c.bytes_sent for c in gathers) < tokens
    assert_right(mesh, compiled(*arguments), "moe_ffn", layer)


def assert_right(mesh: Mesh, out, op: str, layer: Layer) -> None:
    """Within the budget of the exact result, as one device's is, and so within two of that."""
    result, budget = exact(op, layer)
    device = mesh.devices.flat[0]
    alone = jax.device_put((layer.x, *layer.routes, *layer.stacks()), device)
    one = jax.jit(OPS[op])(*alone)
    assert one.devices() == {device}
    oracle.assert_within(one, result, budget)
    oracle.assert_within(out, result, budget)
    oracle.assert_within(out, np.asarray(one).astype(float), 2 * budget)
