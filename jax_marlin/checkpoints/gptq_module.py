"""One quantized module of a checkpoint, read into its canonical form."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from jax_marlin.canonical import CanonicalLinear
from jax_marlin.checkpoints.modules import ModuleInfo, ModuleQuantization
from jax_marlin.gptq import gptq_to_canonical
from jax_marlin.quant_spec import QuantSpec

Read = Callable[[str], np.ndarray]  # full tensor name -> its array as stored


def read_canonical(info: ModuleInfo, read: Read, checkpoint_format: str) -> CanonicalLinear:
    """Reads a quantized module; the tensors as stored are dropped once converted."""
    quantization = quantization_of(info)
    parts = {part: read(tensor.name) for part, tensor in info.tensors.items()}
    return gptq_to_canonical(
        parts["qweight"],
        parts["scales"],
        parts.get("qzeros"),
        parts.get("g_idx"),
        parts.get("bias"),
        bits=quantization.bits,
        group_size=quantization.group_size,
        k=info.shape[0],
        n=info.shape[1],
        symmetric=quantization.symmetric,
        checkpoint_format=checkpoint_format,
        where=f"Checkpoint: module {info.name}",
    )


def spec_of(info: ModuleInfo) -> QuantSpec:
    """The QuantSpec of a quantized module."""
    quantization = quantization_of(info)
    return QuantSpec.create(
        bits=quantization.bits,
        group_size=quantization.group_size,
        k=info.shape[0],
        n=info.shape[1],
        where=f"Checkpoint: module {info.name}",
    )


def group_index(info: ModuleInfo, read: Read) -> np.ndarray:
    """g_idx [K] of a quantized module; the plain one where the checkpoint leaves it out."""
    if "g_idx" in info.tensors:
        return read(info.tensors["g_idx"].name)
    return np.arange(info.shape[0]) // spec_of(info).group_size


def quantization_of(info: ModuleInfo) -> ModuleQuantization:
    """The module's parameters, or an error that names it."""
    if info.quantization is None:
        raise ValueError(f"Checkpoint: module {info.name} is not quantized, expected a qweight")
    return info.quantization
