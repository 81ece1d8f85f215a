"""FP8 weights (e4m3) with a scale for each output channel, block, group, or for the whole module.

A linear W [K, N] is stored so, the scale under one of two names, which always multiplies:

    weight                            e4m3 [N, K]
    weight_scale or weight_scale_inv  float [ceil(N / bn), ceil(K / bk)]

    W[k, n] = weight[n, k] * scale[n // bn, k // bk]

with blocks of bn x bk: 128 x 128 (DeepSeek's own files; ModelOpt's scale has axes of 1 between),
1 x K for a channel (the scale may be [N]), 1 x group_size, or N x K (the scale may be [1] or []).

Source: `quantizers/quantizer_finegrained_fp8.py` of huggingface/transformers;
`compressors/naive_quantized/` of vllm-project/compressed-tensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from jax_marlin.checkpoints.config_keys import check_known, warn_activations
from jax_marlin.checkpoints.low_precision import scaled
from jax_marlin.checkpoints.module_format import SCALES, Format, Layout, Read, one_number, two_axes
from jax_marlin.checkpoints.quantize_config import ModuleQuantization, QuantizeConfig
from jax_marlin.checkpoints.safetensors_header import TensorInfo

_NOT_USED = ("input_scale", "output_scale", "k_scale", "v_scale")
_KEYS = (
    "quant_method", "fmt", "weight_block_size", "activation_scheme", "modules_to_not_convert",
    "ignored_layers", "scale_fmt", "dequantize",
)  # fmt: skip


def parse_fp8(raw: Mapping, where: str) -> QuantizeConfig:
    """Checks every key of a config of method fp8; errors start with `where`."""
    check_known(raw, _KEYS, where)
    if raw.get("fmt") not in (None, "e4m3", "float8_e4m3fn"):
        raise NotImplementedError(f"{where}: fmt is {raw['fmt']!r}, expected 'e4m3'")
    if raw.get("activation_scheme") is not None:
        warn_activations(where, f"(activation_scheme {raw['activation_scheme']!r})")
    block = raw.get("weight_block_size")
    if block is None:
        return QuantizeConfig(fp8_scheme((-1, -1)))
    return QuantizeConfig(fp8_scheme(block_sizes(block, f"{where}: weight_block_size")))


def fp8_scheme(block: tuple[int, int]) -> ModuleQuantization:
    """FP8 with one scale for each bn x bk weights; -1 is all of that axis."""
    return ModuleQuantization(8, block[1], True, False, "fp8", block[0])


def block_sizes(value: object, where: str) -> tuple[int, int]:
    """(bn, bk) out of a config's [bn, bk] or "bnxbk"."""
    if isinstance(value, str) and re.fullmatch(r"\d+x\d+", value):
        value = [int(size) for size in value.split("x")]
    if isinstance(value, list) and len(value) == 2:
        if all(type(size) is int and size > 0 for size in value):
            return value[0], value[1]
    raise ValueError(f"{where} is {value!r}, expected two sizes [N, K] of at least 1")


def _block(quantization: ModuleQuantization, n: int, k: int) -> tuple[int, int]:
    """(bn, bk) with -1 filled in."""
    bn, bk = quantization.block_n, quantization.group_size
    return (n if bn == -1 else bn), (k if bk == -1 else bk)


def _layout(
    parts: Mapping[str, TensorInfo], quantization: ModuleQuantization, read: Read, where: str
) -> Layout:
    n, k = two_axes(parts["weight"], "weight", "(N, K)", where)
    bn, bk = _block(quantization, n, k)
    scale = (-(-n // bn), -(-k // bk))
    stored = parts["weight_scale"].shape
    if stored in _other_shapes(*scale):
        scale = stored
    return Layout(k, n, {
        "weight": (("F8_E4M3",), (n, k)),
        "weight_scale": (SCALES, scale),
        "bias": (SCALES, (n,)),
        **one_number(parts, *_NOT_USED),
    })  # fmt: skip


def _other_shapes(rows: int, columns: int) -> list[tuple[int, ...]]:
    """How [rows, columns] scales are stored too: without axes of 1, or with one in each block."""
    shapes: list[tuple[int, ...]] = [(rows, 1, columns, 1)]
    if columns == 1:
        shapes.append((rows,))
    return [*shapes, ()] if rows == columns == 1 else shapes


def _dequantize(
    parts: Mapping[str, np.ndarray], quantization: ModuleQuantization, where: str
) -> np.ndarray:
    weight = parts["weight"].astype(np.float32)
    bn, bk = _block(quantization, *weight.shape)
    rows, columns = -(-weight.shape[0] // bn), -(-weight.shape[1] // bk)
    scales = parts["weight_scale"].astype(np.float32).reshape(rows, columns)
    return scaled(weight, scales, (bn, bk), where)


FP8 = Format(
    "fp8", "weight", "weight_scale", "", _layout, dequantize=_dequantize,
    aliases={"weight_scale_inv": "weight_scale"},
)  # fmt: skip
