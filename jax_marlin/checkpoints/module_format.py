"""What a tensor format must give so that its modules can be found, checked and read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from jax_marlin.canonical import CanonicalLinear
from jax_marlin.checkpoints.quantize_config import ModuleQuantization
from jax_marlin.checkpoints.safetensors_header import TensorInfo

Read = Callable[[str], np.ndarray]  # full tensor name -> its array as stored
WORDS = ("I32", "U32")  # dtypes that hold packed codes
SCALES = ("F16", "BF16", "F32")  # what a stack can compute in
INDICES = ("I32", "I64")


@dataclasses.dataclass(frozen=True)
class Layout:
    """Sizes of one module and, for each tensor it may have, the dtypes and the one right shape."""

    k: int
    n: int
    tensors: Mapping[str, tuple[tuple[str, ...], tuple[int, ...]]]
    experts: int | None = None  # E where one module holds E weights [K, N]

    @property
    def shape(self) -> tuple[int, ...]:
        """(K, N), or (E, K, N)."""
        return (*(() if self.experts is None else (self.experts,)), self.k, self.n)


@dataclasses.dataclass(frozen=True)
class Format:
    """One way to store a quantized linear; `formats.py` lists them all.

    Attributes:
        kind: its name, as `ModuleInfo.kind` gives it.
        codes: last part of the name of the tensor that every quantized module has.
        scales, g_idx: the same of the scales, and of the group of each row ("" where the format has
            none).
        layout: (header entries by last part, quantization, read, where) -> `Layout`; it reads no
            tensor but one that states a shape.
        canonical: (arrays by last part, quantization, (K, N), where) -> `CanonicalLinear`; None
            where no kernel reads the codes packed.
        dequantize: (arrays of one weight by last part, quantization, where) -> float32 [K, N]; what
            there is in place of `canonical`.
        aliases: other last parts of names -> those used here.
    """

    kind: str
    codes: str
    scales: str
    g_idx: str
    layout: Callable[[Mapping[str, TensorInfo], ModuleQuantization, Read, str], Layout]
    canonical: (
        Callable[
            [Mapping[str, np.ndarray], ModuleQuantization, tuple[int, int], str], CanonicalLinear
        ]
        | None
    ) = None
    dequantize: Callable[[Mapping[str, np.ndarray], ModuleQuantization, str], np.ndarray] | None = (
        None
    )
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def named(self, parts: Mapping[str, TensorInfo], where: str) -> dict[str, TensorInfo]:
        """`parts` under this format's names."""
        renamed = {self.aliases.get(part, part): info for part, info in parts.items()}
        if len(renamed) < len(parts):
            both = [part for part in parts if part in self.aliases]
            raise ValueError(
                f"{where} has {both[0]} and {self.aliases[both[0]]}, expected one of them; which "
                f"is right? Export the checkpoint again"
            )
        return renamed


def one_number(
    parts: Mapping[str, TensorInfo], *names: str
) -> dict[str, tuple[tuple[str, ...], tuple[int, ...]]]:
    """Entries of a `Layout` for tensors of one number each, stored as [1] or []."""
    shapes = {name: parts[name].shape if name in parts else () for name in names}
    return {name: (SCALES, shape if shape == () else (1,)) for name, shape in shapes.items()}


def two_axes(info: TensorInfo, part: str, axes: str, where: str) -> tuple[int, int]:
    """The shape of the codes, which must have two axes, neither empty."""
    if len(info.shape) != 2:
        raise ValueError(f"{where}: {part} has shape {info.shape}, expected {axes}")
    if 0 in info.shape:
        raise ValueError(f"{where}: {part} has shape {info.shape}, expected no empty axis")
    return info.shape[0], info.shape[1]


def check_layout(
    layout: Layout,
    parts: Mapping[str, TensorInfo],
    quantization: ModuleQuantization,
    codes: str,
    where: str,
) -> None:
    """Raises unless every tensor of a module is known and has its dtype and shape."""
    for part, info in parts.items():
        if part not in layout.tensors:
            raise ValueError(
                f"{where}: unknown tensor {info.name} beside a {codes}, expected only "
                f"{', '.join(layout.tensors)}"
            )
        dtypes, shape = layout.tensors[part]
        if info.dtype not in dtypes:
            raise ValueError(f"{where}: {part} is {info.dtype}, expected {' or '.join(dtypes)}")
        if info.shape != shape:
            raise ValueError(
                f"{where}: {part} has shape {info.shape}, expected {shape} for K={layout.k}, "
                f"N={layout.n}, bits={quantization.bits}, group_size={quantization.group_size}; "
                f"are bits and group_size of the quantization config right?"
            )
