"""A call that the device refuses is a Python error with its reason, and the next call works."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_marlin.bench import overhead
from jax_marlin.bench.problems import random_key, random_stack
from jax_marlin.ops import ffi_targets
from jax_marlin.ops.matmul import matmul
from jax_marlin.quant_spec import QuantSpec

# op of `overhead.operations` -> (index of the operand that is cut, what its handler says)
CUT = {
    "matmul": (1, "jax_marlin_matmul_v1: qweight is "),
    "moe_matmul": (1, "jax_marlin_moe_matmul_v1: qweight is "),
    "moe_ffn": (3, "jax_marlin_moe_ffn_v1: "),
    "moe_align_block_size": (0, "jax_marlin_moe_align_block_size_v1: "),
}


def test_memory_that_runs_out_is_an_error_and_comes_back(backend):
    """2 TiB on a GPU; on a CPU, whose system may promise more than it has, 512 TiB."""
    rows = {"cuda": 2**22, "xla": 2**30}[backend]
    spec = QuantSpec.create(bits=4, group_size=32, k=32, n=2**17)
    stack = random_stack(random_key(0), 2, spec, np.dtype("float16"))
    row = jnp.ones((1, 32), jnp.float16)

    def product(row, stack, rows):
        x = jnp.broadcast_to(row, (rows, 32))
        return matmul(x, stack[1], preferred_element_type=jnp.float32, implementation=backend)

    function = jax.jit(product, static_argnums=2)
    expected = np.asarray(function(row, stack, 3))
    assert np.abs(expected).max() > 0.1
    for _ in range(3):
        with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
            jax.block_until_ready(function(row, stack, rows))
        assert np.array_equal(np.asarray(function(row, stack, 3)), expected)


def cut_operand(monkeypatch, index: int) -> None:
    """Every call of a handler gets one operand without its last column, behind Python's checks."""
    ffi_call = jax.ffi.ffi_call

    def ffi_call_of_cut(target, results):
        call = ffi_call(target, results)

        def with_cut(*operands, **attributes):
            cut = [a[..., :-1] if i == index else a for i, a in enumerate(operands)]
            return call(*cut, **attributes)

        return with_cut

    monkeypatch.setattr(jax.ffi, "ffi_call", ffi_call_of_cut)


@pytest.mark.parametrize("op", CUT)
def test_an_operand_is_cut_on_its_way_to_the_handler(op, monkeypatch):
    if ffi_targets.cuda_unavailable_reason() is not None:
        pytest.skip("the CUDA extension is not built")
    operation, operands = overhead.operations()[op]
    target = CUT[op][1].split(":")[0]

    def calls() -> list[str]:
        traced = overhead.chain(op, operation, 2).trace(*operands)
        lines = traced.lower(lowering_platforms=("cuda",)).as_text().splitlines()
        types = [line.partition("} : ")[2] for line in lines if f"custom_call @{target}(" in line]
        assert len(types) == 2 and all(types)
        return types

    whole = calls()
    cut_operand(monkeypatch, CUT[op][0])
    for before, after in zip(whole, calls(), strict=True):
        before, after = (text.partition(" -> ")[0].split(", ") for text in (before, after))
        differing = [i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b]
        assert differing == [CUT[op][0]]


@pytest.mark.cuda
@pytest.mark.parametrize("calls", [1, 6])  # six are captured before they run
@pytest.mark.parametrize("op", CUT)
def test_what_a_handler_refuses_is_a_python_error_with_its_name(op, calls, monkeypatch):
    index, message = CUT[op]
    operation, operands = overhead.operations()[op]
    expected = np.asarray(overhead.chain(op, operation, calls)(*operands))
    with monkeypatch.context() as patch:
        cut_operand(patch, index)
        with pytest.raises(jax.errors.JaxRuntimeError, match=message):
            jax.block_until_ready(overhead.chain(op, operation, calls)(*operands))
    again = np.asarray(overhead.chain(op, operation, calls)(*operands))
    assert np.array_equal(again, expected, equal_nan=True)
