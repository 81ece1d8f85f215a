"""All formats that load: the one list to extend, by config reader and by tensor format."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from jax_marlin.checkpoints.auto_round import parse_auto_round
from jax_marlin.checkpoints.awq import AWQ, parse_awq
from jax_marlin.checkpoints.compressed_tensors import COMPRESSED_TENSORS
from jax_marlin.checkpoints.compressed_tensors_config import parse_compressed_tensors
from jax_marlin.checkpoints.config_keys import REMEDY
from jax_marlin.checkpoints.fp8 import FP8, parse_fp8
from jax_marlin.checkpoints.gptq import GPTQ
from jax_marlin.checkpoints.modelopt import parse_modelopt
from jax_marlin.checkpoints.module_format import Format
from jax_marlin.checkpoints.mxfp4 import MXFP4, MXFP4_PACKED, parse_mxfp4
from jax_marlin.checkpoints.nvfp4 import NVFP4_MODELOPT, NVFP4_PACKED
from jax_marlin.checkpoints.quantize_config import QuantizeConfig

# quant_method -> what reads its config; errors start with the second argument
PARSERS: Mapping[str, Callable[[Mapping, str], QuantizeConfig]] = {
    "gptq": QuantizeConfig.parse,
    "awq": parse_awq,
    "auto-round": parse_auto_round,
    "compressed-tensors": parse_compressed_tensors,
    "mxfp4": parse_mxfp4,
    "fp8": parse_fp8,
    "modelopt": parse_modelopt,
}
# ModuleQuantization.checkpoint_format -> how the module's tensors are stored
FORMATS: Mapping[str, Format] = {
    "gptq": GPTQ,
    "gptq_v2": GPTQ,
    "awq": AWQ,
    "compressed-tensors": COMPRESSED_TENSORS,
    "mxfp4": MXFP4,
    "mxfp4-pack-quantized": MXFP4_PACKED,
    "nvfp4": NVFP4_MODELOPT,
    "nvfp4-pack-quantized": NVFP4_PACKED,
    "fp8": FP8,
}
_AWQ_ONLY = ("w_bit", "q_group_size", "zero_point")  # AutoAWQ's own file names no method


def parse_config(raw: Mapping, where: str) -> QuantizeConfig:
    """Reads one quantization config of any known method; errors start with `where`.

    Raises:
        NotImplementedError: a method that does not load.
        ValueError: two methods are named, or a key has no valid value.
    """
    methods = []
    for key in ("quant_method", "method"):
        method = raw.get(key)
        if method is None:
            continue
        if not isinstance(method, str) or method not in PARSERS:
            raise NotImplementedError(
                f"{where}: {key} is {method!r}, and jax_marlin loads only {', '.join(PARSERS)}; "
                f"{REMEDY}"
            )
        methods.append(method)
    if len(set(methods)) > 1:
        raise ValueError(f"{where}: quant_method and method disagree, {methods}; remove one")
    if not methods:  # written before the key existed
        if isinstance(raw.get("quantization"), Mapping):  # ModelOpt's own file
            return parse_modelopt(raw, where)
        methods = ["awq" if any(key in raw for key in _AWQ_ONLY) else "gptq"]
    return PARSERS[methods[0]](raw, where)
