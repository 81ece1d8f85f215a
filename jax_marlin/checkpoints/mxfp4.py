"""MXFP4: 32 neighbours along K share a power of two; gpt-oss's fused experts, compressed-tensors.

A linear W [K, N], G = ceil(K / 32), is stored by compressed-tensors (`mxfp4-pack-quantized`) so:

    weight_packed  uint8 [N, K / 2]   e2m1, two codes in a byte, the even k in the low nibble
    weight_scale   uint8 [N, G]       e8m0

and by gpt-oss all experts of a layer in one module, `...experts.gate_up_proj` say:

    gate_up_proj_blocks  uint8 [E, N, G, 16]   the same codes, 32 k in the last axis
    gate_up_proj_scales  uint8 [E, N, G]       e8m0
    gate_up_proj_bias    float [E, N]

    W[k, n] = e2m1(codes[n, k]) * 2 ** (scale[n, k // 32] - 127)

Source: `integrations/mxfp4.py` of huggingface/transformers; `compressors/mxfp4/` of
vllm-project/compressed-tensors.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from jax_marlin.checkpoints.config_keys import check_known
from jax_marlin.checkpoints.low_precision import decode_e2m1, decode_e8m0, scaled
from jax_marlin.checkpoints.module_format import SCALES, Format, Layout, Read, one_number, two_axes
from jax_marlin.checkpoints.quantize_config import ModuleQuantization, QuantizeConfig
from jax_marlin.checkpoints.safetensors_header import TensorInfo

GROUP_SIZE = 32
_BYTES = ("U8",)
_EXPONENTS = ("U8", "F8_E8M0")
# Neither changes what the tensors mean: they say which modules are quantized, which is seen from
# the tensors, and whether transformers keeps them packed.
_KEYS = ("quant_method", "modules_to_not_convert", "dequantize")


def parse_mxfp4(raw: Mapping, where: str) -> QuantizeConfig:
    """Checks every key of gpt-oss's config; errors start with `where`."""
    check_known(raw, _KEYS, where)
    return QuantizeConfig(ModuleQuantization(4, GROUP_SIZE, True, False, "mxfp4"))


def _fused_layout(
    parts: Mapping[str, TensorInfo], quantization: ModuleQuantization, read: Read, where: str
) -> Layout:
    shape = parts["blocks"].shape
    if len(shape) != 4 or 0 in shape or shape[3] != GROUP_SIZE // 2:
        raise ValueError(
            f"{where}: blocks has shape {shape}, expected (E, N, K / 32, 16), no axis empty"
        )
    experts, n, groups, _ = shape
    tensors = {
        "blocks": (_BYTES, shape),
        "scales": (_EXPONENTS, (experts, n, groups)),
        "bias": (SCALES, (experts, n)),
    }
    return Layout(groups * GROUP_SIZE, n, tensors, experts)


def _packed_layout(
    parts: Mapping[str, TensorInfo], quantization: ModuleQuantization, read: Read, where: str
) -> Layout:
    n, half = two_axes(parts["weight_packed"], "weight_packed", "(N, K / 2)", where)
    return Layout(2 * half, n, {
        "weight_packed": (_BYTES, (n, half)),
        "weight_scale": (_EXPONENTS, (n, quantization.num_groups(2 * half))),
        "bias": (SCALES, (n,)),
        **one_number(parts, "input_scale", "input_global_scale"),  # of activations, not used
    })  # fmt: skip


def _dequantize(
    parts: Mapping[str, np.ndarray], quantization: ModuleQuantization, where: str
) -> np.ndarray:
    codes, scales = (
        (parts["blocks"], parts["scales"])
        if "blocks" in parts
        else (parts["weight_packed"], parts["weight_scale"])
    )
    values = decode_e2m1(codes.reshape(codes.shape[0], -1))
    return scaled(values, decode_e8m0(scales), (1, GROUP_SIZE), where)


MXFP4 = Format("mxfp4", "blocks", "scales", "", _fused_layout, dequantize=_dequantize)
MXFP4_PACKED = Format(
    "mxfp4", "weight_packed", "weight_scale", "", _packed_layout, dequantize=_dequantize
)
