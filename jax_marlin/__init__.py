"""INT4 mixture-of-experts inference inside `jax.jit`: the whole public surface on one screen."""

import importlib
from typing import TYPE_CHECKING, Any

from jax_marlin.act_order import fold_act_order
from jax_marlin.backend import backend_info, scratch_bytes
from jax_marlin.dense_stack import DenseExpertStack
from jax_marlin.gptq import load_gptq, load_gptq_stacked
from jax_marlin.linear import MarlinLinear
from jax_marlin.ops.exporting import DISABLE_JAX_EXPORT_CHECKS
from jax_marlin.ops.matmul import matmul
from jax_marlin.ops.moe_align_block_size import moe_align_block_size
from jax_marlin.ops.moe_ffn import moe_ffn
from jax_marlin.ops.moe_matmul import moe_matmul
from jax_marlin.ops.ragged_dot import ragged_dot
from jax_marlin.quant_spec import QuantSpec
from jax_marlin.quantize import quantize
from jax_marlin.routing import route
from jax_marlin.sharding import bias_on_first, partition_specs, shard
from jax_marlin.trainable import merge_trainable, split_trainable
from jax_marlin.weights import MarlinExpertStack

if TYPE_CHECKING:
    from jax_marlin import checkpoints, models

__version__ = "0.1.0"

__all__ = [
    "DISABLE_JAX_EXPORT_CHECKS",
    "DenseExpertStack",
    "MarlinExpertStack",
    "MarlinLinear",
    "QuantSpec",
    "backend_info",
    "bias_on_first",
    "checkpoints",
    "fold_act_order",
    "load_gptq",
    "load_gptq_stacked",
    "matmul",
    "merge_trainable",
    "models",
    "moe_align_block_size",
    "moe_ffn",
    "moe_matmul",
    "partition_specs",
    "quantize",
    "ragged_dot",
    "route",
    "scratch_bytes",
    "shard",
    "split_trainable",
]

_LAZY = ("checkpoints", "models")


def __getattr__(name: str) -> Any:
    """Loads the submodules that not everybody needs when they are first named."""
    if name in _LAZY:
        return importlib.import_module(f"jax_marlin.{name}")
    raise AttributeError(f"module 'jax_marlin' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
