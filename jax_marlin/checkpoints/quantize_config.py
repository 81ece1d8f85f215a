"""A quantization config: its base, its rules, what they say of each module; GPTQ's reader."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from jax_marlin.checkpoints.config_keys import ACTED_ON, PER_MODULE, REMEDY, check_keys
from jax_marlin.checkpoints.patterns import check_regex, matches

_FORMATS = ("gptq", "gptq_v2")


@dataclasses.dataclass(frozen=True)
class ModuleQuantization:
    """The parameters of one module's tensors."""

    bits: int
    group_size: int  # as written: -1 is one group for all of K
    symmetric: bool | None  # None: not said, so zero points are taken as stored
    desc_act: bool
    checkpoint_format: str = "gptq"  # "gptq" stores zero points minus one, "gptq_v2" as they are
    block_n: int = 1  # neighbours along N that share a scale; -1: all of N

    @classmethod
    def start(cls, checkpoint_format: str) -> ModuleQuantization:
        """What `override` starts from; bits and group_size are then required."""
        return cls(4, -1, None, False, checkpoint_format)

    def num_groups(self, k: int) -> int:
        """Groups along K; a group_size of -1, or past K, is one group."""
        return -(-k // self.group_size) if 0 < self.group_size < k else 1


@dataclasses.dataclass(frozen=True)
class QuantizeConfig:
    """A quantization config: `base` for every module, `dynamic` for those its patterns match.

    >>> config = QuantizeConfig.parse(
    ...     {"bits": 4, "group_size": 128, "dynamic": {"lm_head": {"bits": 8}}}, where="example"
    ... )
    >>> config.for_module("lm_head").bits, config.for_module("model.layers.0.mlp.up_proj").bits
    (8, 4)
    """

    base: ModuleQuantization
    dynamic: tuple[tuple[str, Mapping], ...] = ()  # (pattern, overrides), in the file's order

    @property
    def checkpoint_format(self) -> str:
        """The format of the tensors: a key of `formats.FORMATS`."""
        return self.base.checkpoint_format

    @property
    def checkpoint_formats(self) -> tuple[str, ...]:
        """Formats that modules may have; more than one in a compressed-tensors checkpoint."""
        return (self.checkpoint_format,)

    @classmethod
    def parse(cls, raw: Mapping, where: str) -> QuantizeConfig:
        """Reads a GPTQ config and checks every key of it; errors start with `where`."""
        check_keys(raw, ACTED_ON, where)
        start = ModuleQuantization.start(_checkpoint_format(raw, where))
        base = override(start, raw, where, required=True)
        return cls(base, read_dynamic(base, raw, where))

    def overridden(self) -> list[tuple[str, ModuleQuantization]]:
        """What each rule that quantizes says: (its name for messages, the parameters)."""
        return [
            (f"dynamic rule {pattern!r}: ", override(self.base, overrides, pattern))
            for pattern, overrides in self.dynamic
            if not pattern.startswith("-:")
        ]

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
            if pattern == module or matches(pattern, module):
                return override(self.base, overrides, f"dynamic rule {pattern!r}")
        return self.base


def read_dynamic(
    base: ModuleQuantization, raw: Mapping, where: str
) -> tuple[tuple[str, Mapping], ...]:
    """The rules under the key `dynamic`, each checked, in the file's order."""
    dynamic = raw.get("dynamic") or {}
    if not isinstance(dynamic, Mapping):
        raise ValueError(f"{where}: dynamic is {dynamic!r}, expected pattern -> overrides")
    for pattern, overrides in dynamic.items():
        check_rule(base, pattern, overrides, f"{where}: dynamic rule {pattern!r}")
    return tuple(dynamic.items())


def check_rule(base: ModuleQuantization, pattern: str, overrides: object, where: str) -> None:
    """Raises unless `pattern` is a regular expression and `overrides` holds valid keys."""
    check_regex(pattern.removeprefix("-:").removeprefix("+:"), where)
    if not isinstance(overrides, Mapping):
        raise ValueError(f"{where}: overrides are {overrides!r}, expected an object")
    if not pattern.startswith("-:"):
        check_keys(overrides, PER_MODULE, where)
        override(base, overrides, where)


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


def override(
    base: ModuleQuantization, raw: Mapping, where: str, *, required: bool = False
) -> ModuleQuantization:
    """`base` with the keys that `raw` gives, each checked; `required`: bits and group_size too."""
    for key in ("bits", "group_size") if required else ():
        if raw.get(key) is None:
            raise ValueError(f"{where}: {key} is not given; add what the quantizer was run with")
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
    return dataclasses.replace(
        base, bits=bits, group_size=group_size, symmetric=symmetric, desc_act=bool(desc_act)
    )
