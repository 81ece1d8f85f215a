"""What `jax.export` must be told: our custom calls keep their meaning, names carry versions, and
how weights that are arguments are written down."""

import dataclasses
import json
import operator
from typing import Any

import jax.export

from jax_marlin.dense_stack import DenseExpertStack
from jax_marlin.linear import MarlinLinear
from jax_marlin.ops import (
    layer_call,
    matmul,
    moe_align_block_size,
    moe_matmul,
    transposed_product,
)
from jax_marlin.quant_spec import QuantSpec
from jax_marlin.weights import MarlinExpertStack

# A target `jax_marlin_<op>_v<n>` never changes: other operands or attributes get another n.
TARGETS = (
    matmul.TARGET,
    moe_matmul.TARGET,
    moe_align_block_size.TARGET,
    layer_call.TARGET,
    transposed_product.TARGET,
)

DISABLE_JAX_EXPORT_CHECKS = tuple(
    jax.export.DisabledSafetyCheck.custom_call(target) for target in TARGETS
)


def _write_static(values: tuple[Any, ...]) -> bytes:
    """The static fields of a weight; a QuantSpec is a mapping, columns are a list."""
    return json.dumps(
        [dataclasses.asdict(v) if isinstance(v, QuantSpec) else v for v in values],
        default=operator.index,  # of NumPy
    ).encode()


def _read_static(written: bytes | bytearray) -> tuple[Any, ...]:
    read = {dict: lambda v: QuantSpec(**v), list: tuple}
    return tuple(read.get(type(v), lambda v: v)(v) for v in json.loads(written))


for _weight in (MarlinExpertStack, MarlinLinear, DenseExpertStack):
    jax.export.register_pytree_node_serialization(
        _weight,
        serialized_name=f"jax_marlin.{_weight.__name__}",
        serialize_auxdata=_write_static,
        deserialize_auxdata=_read_static,
    )
