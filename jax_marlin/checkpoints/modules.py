"""Modules of a checkpoint from its headers alone: which are quantized, and how."""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Mapping

from jax_marlin.checkpoints.formats import FORMATS
from jax_marlin.checkpoints.module_format import Read, check_layout
from jax_marlin.checkpoints.quantize_config import ModuleQuantization, QuantizeConfig
from jax_marlin.checkpoints.safetensors_header import FLOATS, TensorInfo

# gpt-oss: all experts' gate_up_proj are one module, though no dot separates it from its parts
_FUSED = re.compile(r"(?P<module>.+)_(?P<part>blocks|scales|bias)")
_MAX_SECONDS = 100  # on a processor, to sort modules; 20,000 of them take one or two
# Ends of names that other formats write; without their config they would pass for plain tensors.
_FOREIGN = (
    "weight_packed weight_scale weight_scale_inv weight_scale_2 weight_shape weight_zero_point "
    "weight_g_idx weight_global_scale"
).split()


@dataclasses.dataclass(frozen=True)
class ModuleInfo:
    """One module: all tensors whose names differ only after the last dot.

    Attributes:
        name: what the names have in common.
        kind: "gptq", "awq" or "compressed-tensors" where the weight stays packed, "mxfp4", "nvfp4"
            or "fp8" where it is dequantized at load, "dense" (a float `weight`) or "other"
            (anything else, e.g. attention sinks or a fused 3-D tensor of floats).
        shape: (K, N) of a linear, (E, K, N) of fused experts, the stored shape of a 1-D weight, ()
            for "other".
        tensors: last part of the tensor's name -> its header entry.
        quantization: bits, group size and so on of a quantized module, else None.
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
    def is_packed(self) -> bool:
        """Whether the weight stays packed in memory."""
        packed = self.quantization and FORMATS[self.quantization.checkpoint_format].canonical
        return packed is not None

    @property
    def is_dequantized(self) -> bool:
        """Whether the weight is quantized in the file and not in memory."""
        return self.quantization is not None and not self.is_packed

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return sum(info.nbytes for info in self.tensors.values())

    @property
    def nbytes_dense(self) -> int:
        """Bytes of the same module with all its floats (or dequantized weights) in bfloat16."""
        if self.quantization is not None:
            bias = self.tensors.get("bias")
            return 2 * (math.prod(self.shape) + (bias.size if bias else 0))
        return sum(t.size * 2 if t.dtype in FLOATS else t.nbytes for t in self.tensors.values())


def find_modules(
    tensors: Mapping[str, TensorInfo], config: QuantizeConfig | None, read: Read
) -> dict[str, ModuleInfo]:
    """Groups tensors into modules, ordered by name; the presence of codes decides the kind."""
    groups: dict[str, dict[str, TensorInfo]] = {}
    fused = config is not None and "mxfp4" in config.checkpoint_formats
    for name in sorted(tensors, key=_natural):
        module, _, part = name.rpartition(".")
        match = _FUSED.fullmatch(name) if fused else None
        if match and f"{match['module']}_blocks" in tensors:
            module, part = match["module"], match["part"]
        groups.setdefault(module, {})[part] = tensors[name]
    modules: dict[str, ModuleInfo] = {}
    started = time.thread_time()
    for name, parts in groups.items():
        modules[name] = _module(name, parts, config, read)
        if time.thread_time() - started > _MAX_SECONDS:
            raise ValueError(
                f"open_checkpoint: sorting {len(groups)} modules by the rules of the quantization "
                f"config took more than {_MAX_SECONDS} s; write rules with fewer repetitions"
            )
    return modules


def _natural(name: str) -> list[tuple[int, int | str]]:
    """Sort key under which layer 2 comes before layer 10."""
    return [
        (0, int(part)) if part.isdecimal() and len(part) < 20 else (1, part)  # no index is longer
        for part in name.split(".")
    ]


def _module(
    name: str, parts: dict[str, TensorInfo], config: QuantizeConfig | None, read: Read
) -> ModuleInfo:
    where = f"open_checkpoint: module {name}"
    formats = config.checkpoint_formats if config else ()
    if config is not None and any(_has_codes(parts, FORMATS[f].codes) for f in formats):
        return _quantized(name, parts, config, read)
    if config is None and "qweight" in parts:
        raise ValueError(
            f"{where} has a qweight, but there is no quantization_config in config.json and no "
            f"quantize_config.json; add one that gives bits and group_size"
        )
    weight = parts.get("weight")
    foreign = [part for part in parts if part in _FOREIGN or part.endswith("_blocks")]
    if weight is not None and weight.dtype.startswith("F") and weight.dtype not in FLOATS:
        foreign.append("weight")
    if foreign:
        raise NotImplementedError(
            f"open_checkpoint: tensor {parts[foreign[0]].name} is of a format that jax_marlin does "
            f"not load, or not of the one that the quantization config names, or a shard is "
            f"missing; it loads GPTQ, AWQ (qweight), compressed-tensors (weight_packed) and, with "
            f"a quantization config that names them, MXFP4, NVFP4 and FP8"
        )
    orphans = [part for part in ("qweight", "scales", "qzeros", "g_idx") if part in parts]
    if orphans:
        codes = FORMATS[config.checkpoint_format].codes if config else "qweight"
        raise ValueError(f"{where} has {' and '.join(orphans)} but no {codes}; is a shard missing?")
    if weight is None or weight.dtype not in FLOATS or len(weight.shape) > 2:
        return ModuleInfo(name, "other", (), parts)
    bias = parts.get("bias")
    if bias is not None and len(weight.shape) == 2 and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{where}: bias has shape {bias.shape}, expected {weight.shape[:1]} beside a weight "
            f"[N, K] of shape {weight.shape}; the checkpoint is damaged, export it again"
        )
    # A linear is stored [N, K], and everything here speaks of [K, N].
    return ModuleInfo(name, "dense", weight.shape[::-1], parts)


def _has_codes(parts: Mapping[str, TensorInfo], codes: str) -> bool:
    """Whether there are codes; a `weight` counts only where it is no plain float."""
    return codes in parts and not (codes == "weight" and parts[codes].dtype in FLOATS)


def _quantized(
    name: str, parts: dict[str, TensorInfo], config: QuantizeConfig, read: Read
) -> ModuleInfo:
    where = f"open_checkpoint: module {name}"
    quantization = config.for_module(name)
    module_format = FORMATS[quantization.checkpoint_format]
    codes, scales = module_format.codes, module_format.scales
    if not _has_codes(parts, codes):
        raise ValueError(
            f"{where} has {', '.join(parts)} but no {codes}, expected one by the quantization "
            f"config, {quantization.checkpoint_format}; is the config right?"
        )
    parts = module_format.named(parts, where)
    if scales not in parts:
        raise ValueError(f"{where} has a {codes} but no {scales}; is a shard missing?")
    layout = module_format.layout(parts, quantization, read, where)
    check_layout(layout, parts, quantization, codes, where)
    return ModuleInfo(name, module_format.kind, layout.shape, parts, quantization)
