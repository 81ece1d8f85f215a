"""One quantized module of a checkpoint, of whatever format: its canonical form, or its weight."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from jax_marlin.canonical import CanonicalLinear
from jax_marlin.checkpoints.formats import FORMATS
from jax_marlin.checkpoints.gptq import GPTQ
from jax_marlin.checkpoints.module_format import Format, Read
from jax_marlin.checkpoints.modules import ModuleInfo
from jax_marlin.checkpoints.quantize_config import ModuleQuantization
from jax_marlin.checkpoints.safetensors_header import TensorInfo
from jax_marlin.quant_spec import QuantSpec


def read_canonical(info: ModuleInfo, read: Read) -> CanonicalLinear:
    """Reads a quantized module; the tensors as stored are dropped once converted."""
    module_format, quantization = _format_of(info)
    if module_format.canonical is None:
        raise ValueError(
            f"Checkpoint: module {info.name} is dequantized at load, expected one that stays packed"
        )
    arrays = {part: read(tensor.name) for part, tensor in info.tensors.items()}
    shape = (info.shape[0], info.shape[1])
    return module_format.canonical(arrays, quantization, shape, f"Checkpoint: module {info.name}")


def read_dense(info: ModuleInfo, read: Read) -> np.ndarray:
    """The weight [K, N] of a dense module as stored, or of one dequantized at load in float32."""
    if info.quantization is None:
        return read(info.tensors["weight"].name).T
    if len(info.shape) != 2:
        raise ValueError(
            f"Checkpoint: module {info.name} holds experts of shape {info.shape}, expected one "
            f"linear (K, N); use load_fused_stack"
        )
    return next(dequantized_experts(info, read))


def dequantized_experts(
    info: ModuleInfo, read: Read, experts: range | None = None
) -> Iterator[np.ndarray]:
    """float32 [K, N] of each expert of a fused module, or of some; or of another's one weight."""
    module_format, quantization = _format_of(info)
    if module_format.dequantize is None:
        raise ValueError(f"Checkpoint: module {info.name} stays packed, expected a dequantized one")
    arrays = {part: read(tensor.name) for part, tensor in info.tensors.items()}
    where = f"Checkpoint: module {info.name}"
    if len(info.shape) == 2:
        yield module_format.dequantize(arrays, quantization, where)
        return
    for e in range(info.shape[0]) if experts is None else experts:
        one = {part: array[e] for part, array in arrays.items()}
        yield module_format.dequantize(one, quantization, f"{where}, expert {e}")


def spec_of(info: ModuleInfo) -> QuantSpec:
    """The QuantSpec of a quantized module."""
    _, quantization = _format_of(info)
    return QuantSpec.create(
        bits=quantization.bits,
        group_size=quantization.group_size,
        k=info.shape[0],
        n=info.shape[1],
        where=f"Checkpoint: module {info.name}",
    )


def scales_of(info: ModuleInfo) -> TensorInfo:
    """The header entry of a quantized module's scales."""
    return info.tensors[_format_of(info)[0].scales]


def may_have_zero_points(info: ModuleInfo) -> bool:
    """Whether a packed module may be asymmetric, by its header and config."""
    stored = "qzeros" in info.tensors or "weight_zero_point" in info.tensors
    return stored and info.quantization is not None and info.quantization.symmetric is not True


def may_reorder_rows(info: ModuleInfo) -> bool:
    """Whether a packed module may be in act-order, by its header and config.

    GPTQ modules always have a g_idx, compressed-tensors' only where it says something.
    """
    module_format, quantization = _format_of(info)
    stored = module_format.g_idx in info.tensors
    return stored and (quantization.desc_act or module_format.g_idx != GPTQ.g_idx)


def group_index(info: ModuleInfo, read: Read) -> np.ndarray:
    """The group [K] of each row; the plain one where the checkpoint leaves it out."""
    part = _format_of(info)[0].g_idx
    if part in info.tensors:
        g_idx = read(info.tensors[part].name)
        if not (g_idx == -1).all():  # compressed-tensors' way to say "not used"
            return g_idx
    return np.arange(info.shape[0]) // spec_of(info).group_size


def _format_of(info: ModuleInfo) -> tuple[Format, ModuleQuantization]:
    if info.quantization is None:
        raise ValueError(
            f"Checkpoint: module {info.name} is not quantized, expected a quantized one"
        )
    return FORMATS[info.quantization.checkpoint_format], info.quantization
