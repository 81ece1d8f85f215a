"""AWQ checkpoints of the GEMM kind (AutoAWQ, GPTQModel, AutoRound): config, shapes, values.

A linear W [K, N] is stored so, 8 codes of 4 bit in a word, G = ceil(K / group_size):

    qweight int32 [K, N / 8]   8 neighbours along N in a word, in the order below
    qzeros  int32 [G, N / 8]   the same
    scales  float [G, N]

    W[k, n] = scales[k // group_size, n] * (q[k, n] - z[k // group_size, n])

The order is that of `words.unpack_awq`. Zero points are stored as they are, not minus one as in
GPTQ. Without zero points every one is 8.

Source: `awq/utils/packing_utils.py` and `awq/modules/linear/gemm.py` of casper-hansen/AutoAWQ.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from jax_marlin.canonical import CanonicalLinear
from jax_marlin.checkpoints.config_keys import ACTED_ON, REMEDY, check_keys
from jax_marlin.checkpoints.module_format import SCALES, WORDS, Format, Layout, Read, two_axes
from jax_marlin.checkpoints.quantize_config import (
    ModuleQuantization,
    QuantizeConfig,
    override,
    read_dynamic,
)
from jax_marlin.checkpoints.safetensors_header import TensorInfo
from jax_marlin.quant_spec import QuantSpec
from jax_marlin.words import AWQ_COLUMNS, unpack_awq

_SYMMETRIC = 8
_OLD_NAMES = {"w_bit": "bits", "q_group_size": "group_size"}  # AutoAWQ's quant_config.json
_ACTED_ON = ACTED_ON | set(_OLD_NAMES) | {"version", "zero_point"}


def parse_awq(raw: Mapping, where: str) -> QuantizeConfig:
    """Checks every key of an AWQ config; errors start with `where`."""
    check_keys(raw, _ACTED_ON, where)
    for key in ("version", "format", "checkpoint_format"):
        if raw.get(key) is not None and str(raw[key]).lower() != "gemm":
            raise NotImplementedError(
                f"{where}: {key} is {raw[key]!r}, and of AWQ jax_marlin loads only 'gemm'; {REMEDY}"
            )
    named = dict(raw)
    for old, new in _OLD_NAMES.items():
        value = named.pop(old, None)
        if value is not None and named.setdefault(new, value) != value:
            raise ValueError(
                f"{where}: {old} is {value!r} but {new} is {named[new]!r}; remove the wrong one"
            )
    zero_point = named.get("zero_point")
    if zero_point is not None:
        if not isinstance(zero_point, bool):
            raise ValueError(f"{where}: zero_point is {zero_point!r}, expected true or false")
        if named.get("sym") is zero_point:
            raise ValueError(
                f"{where}: sym and zero_point are both {zero_point}, expected opposites; remove "
                f"the wrong one"
            )
        if named.get("sym") is None:
            named["sym"] = not zero_point
    base = override(ModuleQuantization.start("awq"), named, where, required=True)
    config = QuantizeConfig(base, read_dynamic(base, raw, where))
    check_awq(config, where)
    return config


def check_awq(config: QuantizeConfig, where: str) -> None:
    """Raises for parameters that AWQ tensors cannot have, in the base or in a rule."""
    for rule, quantization in [("", config.base), *config.overridden()]:
        if quantization.bits != 4:
            raise NotImplementedError(
                f"{where}: {rule}bits is {quantization.bits}, expected 4 for AWQ; {REMEDY}"
            )
        if quantization.desc_act:
            raise NotImplementedError(
                f"{where}: {rule}desc_act is true, expected false: AWQ stores no g_idx; {REMEDY}"
            )


def _layout(
    parts: Mapping[str, TensorInfo], quantization: ModuleQuantization, read: Read, where: str
) -> Layout:
    k, words = two_axes(parts["qweight"], "qweight", "(K, N / 8)", where)
    groups, n = quantization.num_groups(k), words * AWQ_COLUMNS
    if quantization.symmetric is False and "qzeros" not in parts:
        raise ValueError(
            f"{where}: zero_point is true but there are no qzeros; is a shard missing?"
        )
    return Layout(k, n, {
        "qweight": (WORDS, (k, words)),
        "scales": (SCALES, (groups, n)),
        "qzeros": (WORDS, (groups, words)),
        "bias": (SCALES, (n,)),
    })  # fmt: skip


def _canonical(
    parts: Mapping[str, np.ndarray],
    quantization: ModuleQuantization,
    shape: tuple[int, int],
    where: str,
) -> CanonicalLinear:
    spec = QuantSpec.create(
        bits=4, group_size=quantization.group_size, k=shape[0], n=shape[1], where=where
    )
    zero_points = None
    if "qzeros" in parts:
        zero_points = unpack_awq(parts["qzeros"].view(np.uint32))
        wrong = zero_points != _SYMMETRIC
        if quantization.symmetric and wrong.any():
            group, column = (int(i) for i in np.argwhere(wrong)[0])
            raise ValueError(
                f"{where}: qzeros stores {int(zero_points[group, column])} for group {group}, "
                f"column {column}, expected {_SYMMETRIC} everywhere with zero_point false; is "
                f"zero_point of the quantization config right?"
            )
        if quantization.symmetric is not False and not wrong.any():
            zero_points = None
    canonical = CanonicalLinear(
        parts["qweight"].view(np.uint32), parts["scales"], zero_points, None, parts.get("bias"),
        bits=4, k=shape[0], awq=True,
    )  # fmt: skip
    canonical.check(spec, where)
    return canonical


AWQ = Format("awq", "qweight", "scales", "", _layout, _canonical)
