"""The config of a ModelOpt checkpoint, NVFP4 or FP8 weights.

Source: `torch/export/` of NVIDIA/Model-Optimizer. hf_quant_config.json holds
{"producer": ..., "quantization": {"quant_algo": "NVFP4", "group_size": 16, ...}}; newer exports
repeat the inner object in config.json under quant_method modelopt.
"""

from __future__ import annotations

from collections.abc import Mapping

from jax_marlin.checkpoints import nvfp4
from jax_marlin.checkpoints.config_keys import check_known, warn_activations
from jax_marlin.checkpoints.fp8 import fp8_scheme
from jax_marlin.checkpoints.quantize_config import ModuleQuantization, QuantizeConfig

# Beside quant_algo and group_size: which modules are quantized (seen from the tensors), how the
# scales were found, and how the runtime may keep its KV cache.
_KEYS = (
    "quant_method", "quant_algo", "group_size", "exclude_modules", "ignore", "producer",
    "kv_cache_quant_algo", "kv_cache_scheme", "config_groups", "quantization", "has_zero_point",
    "pre_quant_scale", "quantized_layers",
)  # fmt: skip
# quant_algo -> (bn, bk), see fp8.py
_FP8_BLOCKS = {
    "FP8": (-1, -1),
    "FP8_PER_CHANNEL_PER_TOKEN": (1, -1),
    "FP8_PB_WO": (128, 128),
}


def parse_modelopt(raw: Mapping, where: str) -> QuantizeConfig:
    """Checks every key of a ModelOpt config; errors start with `where`."""
    check_known(raw, _KEYS, where)
    inner = raw.get("quantization")
    if isinstance(inner, Mapping):
        return parse_modelopt(inner, f"{where}: quantization")
    if raw.get("pre_quant_scale"):
        raise NotImplementedError(
            f"{where}: pre_quant_scale is true, expected false (no AWQ scale)"
        )
    algorithm = str(raw.get("quant_algo")).upper()
    if algorithm == "NVFP4":
        size = raw.get("group_size") or nvfp4.GROUP_SIZE
        if size != nvfp4.GROUP_SIZE:
            raise NotImplementedError(
                f"{where}: group_size is {size!r}, expected {nvfp4.GROUP_SIZE} for NVFP4"
            )
        scheme = ModuleQuantization(4, size, True, False, "nvfp4")
    elif algorithm in _FP8_BLOCKS:
        scheme = fp8_scheme(_FP8_BLOCKS[algorithm])
    else:
        raise NotImplementedError(
            f"{where}: quant_algo is {raw.get('quant_algo')!r}, expected NVFP4, "
            f"{', '.join(_FP8_BLOCKS)}; other kinds of ModelOpt checkpoints are not read"
        )
    if algorithm != "FP8_PB_WO":  # weights only
        warn_activations(where, f"(quant_algo {algorithm})")
    return QuantizeConfig(scheme)
