"""AutoRound's own config (quant_method auto-round) over tensors packed as GPTQ or as AWQ.

Its `gptq` and `awq` exports have those formats' configs. Scales may be negative: its symmetric
scheme uses all of -8..7 and gives the scale the sign of the largest element.

Source: `auto_round/export/` of intel/auto-round; matching of `extra_config` as in
`quantization/auto_round.py` of vllm-project/vllm.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from jax_marlin.checkpoints.awq import check_awq
from jax_marlin.checkpoints.config_keys import PER_MODULE, REMEDY, check_keys
from jax_marlin.checkpoints.quantize_config import (
    ModuleQuantization,
    QuantizeConfig,
    check_rule,
    override,
)

# packing_format -> checkpoint_format; zero points of the first are stored minus one
_PACKINGS = {"auto_round:auto_gptq": "gptq", "auto_round:auto_awq": "awq"}
_READ_HERE = ("packing_format", "extra_config")
_REGEX = frozenset("*+?^$()[]{}|\\")  # a key with one of these is a regular expression
_UNQUANTIZED_BITS = 16


def parse_auto_round(raw: Mapping, where: str) -> QuantizeConfig:
    """Checks every key of an AutoRound config; errors start with `where`."""
    packing = raw.get("packing_format")
    if not isinstance(packing, str) or packing not in _PACKINGS:
        raise NotImplementedError(
            f"{where}: packing_format is {packing!r}, expected one of {', '.join(_PACKINGS)}; "
            f"{REMEDY}"
        )
    own = {key: value for key, value in raw.items() if key not in _READ_HERE}
    check_keys(own, PER_MODULE | {"quant_method"}, where)
    base = override(ModuleQuantization.start(_PACKINGS[packing]), own, where, required=True)
    config = QuantizeConfig(base, _rules(base, raw.get("extra_config") or {}, where))
    if config.checkpoint_format == "awq":
        check_awq(config, where)
    return config


def _rules(
    base: ModuleQuantization, extra_config: object, where: str
) -> tuple[tuple[str, Mapping], ...]:
    """`extra_config` as rules of a `QuantizeConfig`: exact names first, then regexes in order."""
    if not isinstance(extra_config, Mapping):
        raise ValueError(f"{where}: extra_config is {extra_config!r}, expected name -> overrides")
    exact, searched = [], []
    for key, overrides in extra_config.items():
        inside = f"{where}: extra_config {key!r}"
        if isinstance(overrides, Mapping):  # null means "as the base"
            overrides = {name: value for name, value in overrides.items() if value is not None}
            bits = overrides.get("bits")
            excluded = type(bits) is int and bits >= _UNQUANTIZED_BITS
        else:
            excluded = False
        is_regex = not _REGEX.isdisjoint(key)
        # Rules match from the left end; these regexes are searched for anywhere.
        pattern = rf"(?s:.*?)(?:{key})" if is_regex else rf"{re.escape(key)}\Z"
        pattern = f"-:{pattern}" if excluded else pattern
        check_rule(base, pattern, overrides, inside)
        (searched if is_regex else exact).append((pattern, overrides))
    return tuple(exact + searched)
