"""Modules of a checkpoint from its headers alone: which are quantized, and how."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from jax_marlin.checkpoints.quantize_config import ModuleQuantization, QuantizeConfig
from jax_marlin.checkpoints.safetensors_header import FLOATS, TensorInfo

_SCALES = ("F16", "BF16", "F32")  # what a stack can compute in
# Ends of names that other formats write; without their config they would pass for plain tensors.
_FOREIGN = ("weight_packed", "weight_scale", "weight_scale_inv", "weight_scale_2")


@dataclasses.dataclass(frozen=True)
class ModuleInfo:
    """One module: all tensors whose names differ only after the last dot.

    Attributes:
        name: what the names have in common.
        kind: "gptq" (it has a qweight), "dense" (a float `weight`) or "other" (anything else, e.g.
            attention sinks or a fused 3-D expert tensor).
        shape: (K, N) of a linear, the stored shape of a 1-D weight, () for "other".
        tensors: last part of the tensor's name -> its header entry.
        quantization: bits, group size and so on of a "gptq" module, else None.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    tensors: Mapping[str, TensorInfo]
    quantization: ModuleQuantization | None = None

    @property
    def bits(self) -> int | None:
        return self.quantization.bits if self.quantization else None

    @property
    def group_size(self) -> int | None:
        return self.quantization.group_size if self.quantization else None

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return sum(info.nbytes for info in self.tensors.values())

    @property
    def nbytes_dense(self) -> int:
        """Bytes of the same module with all its floats (or dequantized weights) in bfloat16."""
        total = self.shape[0] * self.shape[1] * 2 if self.kind == "gptq" else 0
        for part, info in self.tensors.items():
            if self.kind == "gptq" and part in ("qweight", "scales", "qzeros", "g_idx"):
                continue
            total += info.size * 2 if info.dtype in FLOATS else info.nbytes
        return total


def find_modules(
    tensors: Mapping[str, TensorInfo], config: QuantizeConfig | None
) -> dict[str, ModuleInfo]:
    """Groups tensors into modules, ordered by name; the presence of `qweight` decides the kind."""
    groups: dict[str, dict[str, TensorInfo]] = {}
    for name in sorted(tensors, key=_natural):
        module, _, part = name.rpartition(".")
        groups.setdefault(module, {})[part] = tensors[name]
    return {name: _module(name, parts, config) for name, parts in groups.items()}


def _natural(name: str) -> list[tuple[int, int | str]]:
    """Sort key under which layer 2 comes before layer 10."""
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in name.split(".")]


def _module(name: str, parts: dict[str, TensorInfo], config: QuantizeConfig | None) -> ModuleInfo:
    if "qweight" in parts:
        return _gptq_module(name, parts, config)
    foreign = [part for part in parts if part in _FOREIGN or part.endswith("_blocks")]
    if foreign:
        raise NotImplementedError(
            f"open_checkpoint: tensor {parts[foreign[0]].name} is of a format that jax_marlin does "
            f"not load; it loads GPTQ (qweight, scales, qzeros, g_idx)"
        )
    orphans = [part for part in ("scales", "qzeros", "g_idx") if part in parts]
    if orphans:
        raise ValueError(
            f"open_checkpoint: module {name} has {' and '.join(orphans)} but no qweight; is a "
            f"shard missing?"
        )
    weight = parts.get("weight")
    if weight is None or weight.dtype not in FLOATS or len(weight.shape) > 2:
        return ModuleInfo(name, "other", (), parts)
    # A linear is stored [N, K], and everything here speaks of [K, N].
    return ModuleInfo(name, "dense", weight.shape[::-1], parts)


def _gptq_module(
    name: str, parts: dict[str, TensorInfo], config: QuantizeConfig | None
) -> ModuleInfo:
    where = f"open_checkpoint: module {name}"
    if config is None:
        raise ValueError(
            f"{where} has a qweight, but there is no quantization_config in config.json and no "
            f"quantize_config.json; add one that gives bits and group_size"
        )
    if "scales" not in parts:
        raise ValueError(f"{where} has a qweight but no scales; is a shard missing?")
    quantization = config.for_module(name)
    bits, qweight = quantization.bits, parts["qweight"]
    if len(qweight.shape) != 2:
        raise ValueError(f"{where}: qweight has shape {qweight.shape}, expected (K * bits / 32, N)")
    rows, n = qweight.shape
    if rows == 0 or n == 0:
        raise ValueError(f"{where}: qweight has shape {qweight.shape}, expected no empty axis")
    k = rows * 32 // bits
    g_idx = parts.get("g_idx")
    if g_idx is not None and g_idx.size < k and -(-g_idx.size * bits // 32) == rows:
        k = g_idx.size  # the last word of each column is not full
    group_size = quantization.group_size if 0 < quantization.group_size < k else k
    groups = -(-k // group_size)
    if quantization.desc_act and groups > 1 and "g_idx" not in parts:
        raise ValueError(
            f"{where}: desc_act is true but there is no g_idx to say which row is of which group; "
            f"is a shard missing, or desc_act wrong?"
        )
    layouts = {
        "qweight": (("I32", "U32"), (rows, n)),
        "scales": (_SCALES, (groups, n)),
        "qzeros": (("I32", "U32"), (groups, -(-n * bits // 32))),
        "g_idx": (("I32", "I64"), (k,)),
        "bias": (_SCALES, (n,)),
    }
    for part, info in parts.items():
        if part not in layouts:
            raise ValueError(
                f"{where}: unknown tensor {info.name} beside a qweight, expected only "
                f"{', '.join(layouts)}"
            )
        dtypes, shape = layouts[part]
        if info.dtype not in dtypes:
            raise ValueError(f"{where}: {part} is {info.dtype}, expected {' or '.join(dtypes)}")
        if info.shape != shape:
            raise ValueError(
                f"{where}: {part} has shape {info.shape}, expected {shape} for K={k}, N={n}, "
                f"bits={bits}, group_size={quantization.group_size}; are bits and group_size of "
                f"the quantization config right?"
            )
    return ModuleInfo(name, "gptq", (k, n), parts, quantization)
