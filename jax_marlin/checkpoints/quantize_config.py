"""A checkpoint's GPTQ config: read from one or more files, checked, and asked for each module."""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Mapping

from jax_marlin.checkpoints import json_file
from jax_marlin.checkpoints.config_keys import ACTED_ON, PER_MODULE, REMEDY, check_keys

_FORMATS = ("gptq", "gptq_v2")
_OTHER_FILES = ("quantize_config.json", "quantization_config.json")


@dataclasses.dataclass(frozen=True)
class ModuleQuantization:
    """The parameters of one module's GPTQ tensors."""

    bits: int
    group_size: int  # as written: -1 is one group for all of K
    symmetric: bool | None  # None: not said, so zero points are taken as stored
    desc_act: bool


@dataclasses.dataclass(frozen=True)
class QuantizeConfig:
    """A GPTQ quantization config: `base` for every module, `dynamic` for those its patterns match.

    >>> config = QuantizeConfig.parse(
    ...     {"bits": 4, "group_size": 128, "dynamic": {"lm_head": {"bits": 8}}}, where="example"
    ... )
    >>> config.for_module("lm_head").bits, config.for_module("model.layers.0.mlp.up_proj").bits
    (8, 4)
    """

    checkpoint_format: str  # "gptq" stores zero points minus one, "gptq_v2" as they are
    base: ModuleQuantization
    dynamic: tuple[tuple[str, Mapping], ...] = ()  # (pattern, overrides), in the file's order

    @classmethod
    def parse(cls, raw: Mapping, where: str) -> QuantizeConfig:
        """Checks every key of `raw`; errors start with `where`."""
        for key in ("quant_method", "method"):
            if raw.get(key) not in (None, "gptq"):
                raise NotImplementedError(
                    f"{where}: {key} is {raw[key]!r}, and jax_marlin loads only 'gptq'; {REMEDY}"
                )
        check_keys(raw, ACTED_ON, where)
        for key in ("bits", "group_size"):
            if raw.get(key) is None:
                raise ValueError(
                    f"{where}: {key} is not given; add what the quantizer was run with"
                )
        # bits and group_size of this start never survive
        start = ModuleQuantization(bits=4, group_size=-1, symmetric=None, desc_act=False)
        base = _override(start, raw, where)
        dynamic = raw.get("dynamic") or {}
        if not isinstance(dynamic, Mapping):
            raise ValueError(f"{where}: dynamic is {dynamic!r}, expected pattern -> overrides")
        for pattern, overrides in dynamic.items():
            _check_rule(base, pattern, overrides, f"{where}: dynamic rule {pattern!r}")
        return cls(_checkpoint_format(raw, where), base, tuple(dynamic.items()))

    def for_module(self, module: str) -> ModuleQuantization:
        """Parameters of a quantized module: `base`, changed by the first rule that matches.

        Patterns match from the left end of the full name and need not reach its right end, as in
        GPTQModel and vLLM (`re.match`). A rule that starts with `-:` says "not quantized". Only
        modules that have a qweight are asked about, so where such a rule matches it was too broad
        (auto-round's `mlp.gate.*` also hits `mlp.gate_proj`), and it is skipped.
        """
        for pattern, overrides in self.dynamic:
            if pattern.startswith("-:"):
                continue
            pattern = pattern.removeprefix("+:")
            if pattern == module or re.match(pattern, module):
                return _override(self.base, overrides, f"dynamic rule {pattern!r}")
        return self.base


def read_quantize_config(directory: pathlib.Path, config: Mapping) -> QuantizeConfig | None:
    """Reads config.json's `quantization_config` and the older files beside it; None without any.

    Args:
        directory: the checkpoint.
        config: its config.json.

    Raises:
        ValueError: a key is unknown or has no valid value, or two files disagree on what changes
            the result.
        NotImplementedError: a format, method or width that is not GPTQ of 4 or 8 bit.
    """
    found: list[tuple[str, Mapping]] = []
    inside = config.get("quantization_config")
    if inside is not None:
        if not isinstance(inside, Mapping):
            raise ValueError(
                f"open_checkpoint: {directory / 'config.json'}: quantization_config is {inside!r}, "
                f"expected an object"
            )
        found.append(("config.json", inside))
    for name in _OTHER_FILES:
        if (directory / name).is_file():
            found.append((name, json_file.read_object(directory / name)))
    parsed = [
        (name, QuantizeConfig.parse(raw, f"open_checkpoint: {directory / name}"))
        for name, raw in found
    ]
    for name, other in parsed[1:]:
        _check_agreement(directory, *parsed[0], name, other)
    return parsed[0][1] if parsed else None


def _check_agreement(
    directory: pathlib.Path, name: str, a: QuantizeConfig, other_name: str, b: QuantizeConfig
) -> None:
    """Raises if two files give different values for what changes the result."""
    fields, other_fields = (
        {
            "checkpoint_format": config.checkpoint_format,
            **dataclasses.asdict(config.base),
            "dynamic": config.dynamic,  # a tuple: the order of rules counts
        }
        for config in (a, b)
    )
    if None in (a.base.symmetric, b.base.symmetric):
        del fields["symmetric"]  # one of them does not say
    for key, value in fields.items():
        if value != other_fields[key]:
            raise ValueError(
                f"open_checkpoint: {directory}: {key} is {value!r} in {name} but "
                f"{other_fields[key]!r} in {other_name}; remove the file that is wrong"
            )


def _check_rule(base: ModuleQuantization, pattern: str, overrides: object, where: str) -> None:
    try:
        re.compile(pattern.removeprefix("-:").removeprefix("+:"))
    except re.error as error:
        raise ValueError(f"{where}: not a regular expression: {error}; correct it") from error
    if not isinstance(overrides, Mapping):
        raise ValueError(f"{where}: overrides are {overrides!r}, expected an object")
    if not pattern.startswith("-:"):
        check_keys(overrides, PER_MODULE, where)
        _override(base, overrides, where)


def _checkpoint_format(raw: Mapping, where: str) -> str:
    given = {key: raw[key] for key in ("checkpoint_format", "format") if raw.get(key) is not None}
    for key, value in given.items():
        if value not in _FORMATS:
            raise NotImplementedError(
                f"{where}: {key} is {value!r}, expected one of {_FORMATS}; {REMEDY}"
            )
    formats = list(given.values())
    if formats and formats[0] != formats[-1]:
        raise ValueError(f"{where}: checkpoint_format and format disagree, {given}; remove one")
    return formats[0] if formats else "gptq"  # neither key: written before v2 existed


def _override(base: ModuleQuantization, raw: Mapping, where: str) -> ModuleQuantization:
    """`base` with the keys that `raw` gives, each checked."""
    bits, group_size = raw.get("bits", base.bits), raw.get("group_size", base.group_size)
    if type(bits) is not int or not 2 <= bits <= 8:
        raise ValueError(f"{where}: bits is {bits!r}, expected 4 or 8")
    if bits not in (4, 8):
        raise NotImplementedError(f"{where}: bits is {bits}, expected 4 or 8; {REMEDY}")
    if type(group_size) is not int or (group_size < 1 and group_size != -1):
        raise ValueError(f"{where}: group_size is {group_size!r}, expected -1 or at least 1")
    symmetric = base.symmetric if raw.get("sym") is None else raw["sym"]
    desc_act = base.desc_act if raw.get("desc_act") is None else raw["desc_act"]
    for key, value in (("sym", symmetric), ("desc_act", desc_act)):
        if value is not None and not isinstance(value, bool):
            raise ValueError(f"{where}: {key} is {value!r}, expected true or false")
    return ModuleQuantization(bits, group_size, symmetric, bool(desc_act))
