"""The quantization_config of a GPTQ checkpoint: what most modules share, and rules for the rest."""

from __future__ import annotations

import collections
import re
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

_KEYS = ("bits", "group_size", "sym")


class Parameters(NamedTuple):
    """What a reader must know of one module."""

    bits: int
    group_size: int
    symmetric: bool
    k: int


def quantization_config(
    parameters: Mapping[str, Parameters],
    dense: Collection[str],
    desc_act: bool,
    checkpoint_format: str,
) -> dict[str, Any]:
    """The dictionary for config.json.

    Args:
        parameters: of each quantized module; at least one.
        dense: the linears that are not quantized; rules of the form `-:` say so to readers that do
            not look at the tensors.
        desc_act: whether any module has rows in act-order.
        checkpoint_format: `"gptq"` or `"gptq_v2"`.

    >>> bits = [4, 8, 4]
    >>> modules = {f"layers.{i}.down": Parameters(bits[i], 64, True, 768) for i in range(3)}
    >>> config = quantization_config(modules, ["layers.0.gate"], False, "gptq")
    >>> config["bits"], list(config["dynamic"])
    (4, ['+:^layers\\\\.1\\\\.down$', '-:^layers\\\\.\\\\d+\\\\.gate$'])
    """
    from jax_marlin import __version__

    written = _as_written(parameters)
    counts = collections.Counter(written.values())
    base = counts.most_common(1)[0][0]
    dynamic: dict[str, dict[str, Any]] = {}
    for odd in counts:
        if odd != base:
            names = [name for name, own in written.items() if own == odd]
            rest = [name for name, own in written.items() if own != odd]
            rule: dict[str, Any] = dict(zip(_KEYS, odd, strict=True))
            dynamic |= {f"+:{pattern}": rule for pattern in _patterns(names, rest)}
    dynamic |= {f"-:{pattern}": {} for pattern in _patterns(dense, parameters)}
    return {
        "quant_method": "gptq",
        **dict(zip(_KEYS, base, strict=True)),
        "desc_act": desc_act,
        "checkpoint_format": checkpoint_format,
        "pack_dtype": "int32",
        "lm_head": "lm_head" in parameters,
        "dynamic": dynamic,
        "meta": {"quantizer": [f"jax_marlin:{__version__}"]},
    }


def _as_written(parameters: Mapping[str, Parameters]) -> dict[str, tuple[int, int, bool]]:
    """Values of `_KEYS` for each module.

    One group for all of K is written -1, unless that is also the size of the others' groups.
    """
    sizes = [p.group_size for p in parameters.values() if p.group_size < p.k]
    common = collections.Counter(sizes).most_common(1)[0][0] if sizes else -1

    def size(p: Parameters) -> int:
        return p.group_size if p.group_size < p.k or p.group_size == common else -1

    return {name: (p.bits, size(p), p.symmetric) for name, p in parameters.items()}


def _patterns(names: Collection[str], others: Collection[str]) -> list[str]:
    """Regular expressions that hit `names`, of any number as long as that hits none of `others`."""
    hits_others: dict[str, bool] = {}
    patterns: dict[str, None] = {}  # a set that keeps its order
    for name in names:
        exact = f"^{re.escape(name)}$"
        general = re.sub(r"\d+", r"\\d+", exact)
        if general not in hits_others:
            hits_others[general] = any(re.match(general, other) for other in others)
        patterns[exact if hits_others[general] else general] = None
    return list(patterns)
