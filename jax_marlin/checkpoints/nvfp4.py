"""NVFP4: 16 neighbours along K share an e4m3 scale, and all of the module one float32 scale.

A linear W [K, N], G = ceil(K / 16), is stored so, e2m1 codes two in a byte, the even k in the low
nibble; by compressed-tensors (`nvfp4-pack-quantized`), whose global scale divides:

    weight_packed        uint8 [N, K / 2]
    weight_scale         e4m3 [N, G]
    weight_global_scale  float32 [1]

    W[k, n] = e2m1(codes[n, k]) * weight_scale[n, k // 16] / weight_global_scale

and by ModelOpt, whose second scale multiplies:

    weight          uint8 [N, K / 2]
    weight_scale    e4m3 [N, G]
    weight_scale_2  float32 []

    W[k, n] = e2m1(codes[n, k]) * weight_scale[n, k // 16] * weight_scale_2

Source: `compressors/nvfp4/` of vllm-project/compressed-tensors; `torch/export/quant_utils.py` of
NVIDIA/Model-Optimizer.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from jax_marlin.checkpoints.low_precision import decode_e2m1, scaled
from jax_marlin.checkpoints.module_format import SCALES, Format, Layout, Read, one_number, two_axes
from jax_marlin.checkpoints.quantize_config import ModuleQuantization
from jax_marlin.checkpoints.safetensors_header import TensorInfo

GROUP_SIZE = 16
# Scales of activations and of the KV cache: read by runtimes that quantize those.
_NOT_USED = ("input_scale", "input_global_scale", "k_scale", "v_scale")


def _format(codes: str, global_scale: str, *, divides: bool) -> Format:
    def layout(
        parts: Mapping[str, TensorInfo], quantization: ModuleQuantization, read: Read, where: str
    ) -> Layout:
        n, half = two_axes(parts[codes], codes, "(N, K / 2)", where)
        if global_scale not in parts:
            raise ValueError(f"{where} has a {codes} but no {global_scale}; is a shard missing?")
        return Layout(2 * half, n, {
            codes: (("U8",), (n, half)),
            "weight_scale": (("F8_E4M3",), (n, quantization.num_groups(2 * half))),
            "bias": (SCALES, (n,)),
            **one_number(parts, global_scale, *_NOT_USED),
        })  # fmt: skip

    def dequantize(
        parts: Mapping[str, np.ndarray], quantization: ModuleQuantization, where: str
    ) -> np.ndarray:
        scales = parts["weight_scale"].astype(np.float32)
        factor = parts[global_scale].astype(np.float32).reshape(1, 1)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            scales = scales / factor if divides else scales * factor
        return scaled(decode_e2m1(parts[codes]), scales, (1, quantization.group_size), where)

    return Format("nvfp4", codes, "weight_scale", "", layout, dequantize=dequantize)


NVFP4_PACKED = _format("weight_packed", "weight_global_scale", divides=True)
NVFP4_MODELOPT = _format("weight", "weight_scale_2", divides=False)
