"""Unpacked weights of a checkpoint: one linear, or experts that become one DenseExpertStack."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import NamedSharding
from jax.typing import DTypeLike

from jax_marlin.checkpoints.module_format import Read
from jax_marlin.checkpoints.modules import ModuleInfo
from jax_marlin.checkpoints.placement import Leaves, place_experts
from jax_marlin.checkpoints.quantized_module import dequantized_experts, read_dense
from jax_marlin.checkpoints.workers import in_threads
from jax_marlin.dense_stack import DenseExpertStack
from jax_marlin.host_arrays import aligned_zeros
from jax_marlin.linear import compute_dtype

_WHERE = "Checkpoint.load_expert_stack"
_DTYPES = {"F16": np.float16, "BF16": ml_dtypes.bfloat16, "F32": np.float32}


def load_weight(info: ModuleInfo, read: Read, dtype: DTypeLike | None) -> jax.Array:
    """The weight [K, N] of a module that is dense or dequantized at load, without its bias."""
    if dtype is None and info.quantization is not None:
        dtype = default_dtype([info])
    return jnp.asarray(cast(read_dense(info, read), dtype, f"{info.name}.weight"))


def load_dense_stack(
    modules: Mapping[str, ModuleInfo],
    experts: Sequence[Sequence[str]],
    read: Read,
    *,
    dtype: DTypeLike | None,
    sharding: NamedSharding | None,
    on_module: Callable[[], object],
) -> DenseExpertStack:
    """Puts experts[e] = (module, ...), columns side by side, into slot e of one stack.

    Args:
        modules: all modules of the checkpoint; those named are dense or dequantized at load.
        experts: for each expert the names of its modules, left to right along N.
        read: gives a tensor as stored.
        dtype: compute dtype; None keeps that of stored floats, bfloat16 for those dequantized.
        sharding: see `Checkpoint.load_expert_stack`.
        on_module: called after each module.

    Raises:
        ValueError: experts differ in shape, or hold what is not finite in `dtype`.
    """
    first = [modules[name].shape for name in experts[0]]
    for e, names in enumerate(experts):
        shapes = [modules[name].shape for name in names]
        if shapes != first or {len(shape) for shape in shapes} != {2}:
            raise ValueError(
                f"{_WHERE}: modules of expert {e} are {', '.join(names)} of shapes {shapes}, "
                f"expected {first} as in expert 0, each (K, N); experts of one stack must be alike"
            )
    if len({shape[0] for shape in first}) != 1:
        raise ValueError(
            f"{_WHERE}: modules {', '.join(experts[0])} have shapes {first}, expected one K; load "
            f"each into a stack of its own with load_expert_stacks"
        )
    chosen = (
        default_dtype(modules[n] for names in experts for n in names) if dtype is None else dtype
    )
    chosen = compute_dtype(chosen, _WHERE)
    starts = np.cumsum([0, *(shape[1] for shape in first)]).tolist()
    with_bias = any("bias" in modules[name].tensors for names in experts for name in names)

    def build(held: range) -> Leaves:
        weight = aligned_zeros((len(held), first[0][0], starts[-1]), chosen)
        bias = aligned_zeros((len(held), starts[-1]), chosen) if with_bias else None

        def read_expert(e: int) -> None:
            i = held.index(e)
            for name, start, stop in zip(experts[e], starts[:-1], starts[1:], strict=True):
                info = modules[name]
                weight[i, :, start:stop] = cast(read_dense(info, read), chosen, f"{name}.weight")
                if bias is not None and "bias" in info.tensors:
                    bias[i, start:stop] = _read_bias(info, read, chosen)

        for e in in_threads(read_expert, held):
            for _ in experts[e]:
                on_module()
        return {"weight": weight, "bias": bias}

    return DenseExpertStack(**place_experts(sharding, len(experts), build, _WHERE))


def load_fused_stack(
    info: ModuleInfo,
    read: Read,
    *,
    dtype: DTypeLike | None,
    columns: np.ndarray | None,
    sharding: NamedSharding | None,
) -> DenseExpertStack:
    """The stack of a module that holds all experts; see `Checkpoint.load_fused_stack`."""
    where = "Checkpoint.load_fused_stack"
    if len(info.shape) != 3:
        raise ValueError(
            f"{where}: {info.name} has shape {info.shape}, expected (E, K, N); use load_linear or "
            f"load_expert_stack"
        )
    chosen = compute_dtype(default_dtype([info]) if dtype is None else dtype, where)
    order = np.arange(info.shape[-1]) if columns is None else columns

    def build(held: range) -> Leaves:
        weight = aligned_zeros((len(held), info.shape[1], len(order)), chosen)
        one_by_one = dequantized_experts(info, read, held)
        for i, (e, one) in enumerate(zip(held, one_by_one, strict=True)):
            weight[i] = cast(one[:, order], chosen, f"{info.name}, expert {e},")
        bias = None
        if "bias" in info.tensors:
            bias = _read_bias(info, read, chosen)[held.start : held.stop, order]
        return {"weight": weight, "bias": bias}

    return DenseExpertStack(**place_experts(sharding, info.shape[0], build, where))


def _read_bias(info: ModuleInfo, read: Read, dtype: DTypeLike) -> np.ndarray:
    stored = read(info.tensors["bias"].name)
    if not np.isfinite(stored).all():
        raise ValueError(
            f"Checkpoint: module {info.name}: bias has values that are not finite; the checkpoint "
            f"is damaged, download it again"
        )
    return cast(stored, dtype, info.tensors["bias"].name)


def default_dtype(infos: Iterable[ModuleInfo]) -> DTypeLike:
    """The one dtype of stored floats; bfloat16 where a module has codes, which have no such dtype.

    Raises:
        ValueError: there are two.
    """
    found = {}
    for info in infos:
        stored = "BF16" if info.quantization is not None else info.tensors["weight"].dtype
        found.setdefault(stored, info.name)
    if len(found) != 1 or not found.keys() <= _DTYPES.keys():
        got = ", ".join(f"{dtype} ({name})" for dtype, name in found.items())
        raise ValueError(f"{_WHERE}: weights are {got}, expected one dtype; pass dtype= to choose")
    return _DTYPES[next(iter(found))]


def cast(array: np.ndarray, dtype: DTypeLike | None, name: str) -> np.ndarray:
    """`array` in `dtype` (None: as it is); raises where a finite number becomes infinite."""
    if dtype is None or array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):
        converted = array.astype(dtype)
    # float16 ends at 65504, which bfloat16 weights may pass
    if converted.dtype == np.float16 and not np.isfinite(converted[np.isfinite(array)]).all():
        raise ValueError(
            f"Checkpoint: tensor {name} ({array.dtype}) overflows float16; load with dtype=bfloat16"
        )
    return converted
