"""The config of a compressed-tensors checkpoint: groups of modules, each with its own scheme.

Source: `quantization/quant_config.py`, `quant_args.py` and `quant_scheme.py` of
vllm-project/compressed-tensors. Every key is checked: one that could change the result is refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from jax_marlin.checkpoints.config_keys import warn_activations
from jax_marlin.checkpoints.float_schemes import FLOAT_FORMATS, float_scheme
from jax_marlin.checkpoints.patterns import check_regex, matches
from jax_marlin.checkpoints.quantize_config import ModuleQuantization, QuantizeConfig, override

FORMAT = "pack-quantized"
_FORMATS = (FORMAT, *FLOAT_FORMATS)
_REMEDY = "compress the model with llm-compressor as W4A16 or W8A16, format pack-quantized"
# Each key with the values under which it changes nothing; None in place of them: any value.
_TOP: dict[str, tuple | None] = {
    "config_groups": None, "format": None, "ignore": None, "quant_method": None, "version": None,
    "quantization_status": None, "global_compression_ratio": None, "sparsity_config": None,
    "kv_cache_scheme": (None, {}),
    "transform_config": (None, {}),  # rotations of weights and activations
}  # fmt: skip
_GROUP: dict[str, tuple | None] = {
    "targets": None, "weights": None, "input_activations": None, "output_activations": None,
    "format": None,
}  # fmt: skip
_WEIGHTS: dict[str, tuple | None] = {
    "num_bits": None, "symmetric": None, "strategy": None, "group_size": None, "actorder": None,
    "observer": None, "observer_kwargs": None, "scale_dtype": None, "zp_dtype": None,
    "type": None, "block_structure": None,
    "dynamic": (None, False),
}  # fmt: skip
# "weight" and "static" order only the search; "group" and "dynamic" store a weight_g_idx
_ACTORDER = {None: False, False: False, "weight": False, "static": False}
_ACTORDER |= {True: True, "group": True, "dynamic": True}


@dataclasses.dataclass(frozen=True)
class CompressedTensorsConfig(QuantizeConfig):
    """Schemes by target; `base` is the first one, and no module has it for want of another."""

    groups: tuple[tuple[str, ModuleQuantization], ...] = ()  # (target, scheme)

    @property
    def checkpoint_formats(self) -> tuple[str, ...]:
        """The formats of all schemes."""
        return tuple(dict.fromkeys(scheme.checkpoint_format for _, scheme in self.groups))

    def for_module(self, module: str) -> ModuleQuantization:
        """The scheme of a packed module: by its name, else by regex, else by class.

        A class name says nothing here, since files do not store classes: every packed module counts
        as a `Linear`. `ignore` is not asked, as a module that is packed was not ignored.

        Raises:
            ValueError: no target means the module, or targets of different schemes do.
        """
        by_name = [scheme for target, scheme in self.groups if target == module]
        by_regex = [
            scheme
            for target, scheme in self.groups
            if target.startswith("re:") and matches(target.removeprefix("re:"), module)
        ]
        by_class = [scheme for target, scheme in self.groups if _is_linear_class(target)]
        found = by_name or by_regex or by_class
        if len(set(found)) != 1:
            targets = [target for target, _ in self.groups]
            raise ValueError(
                f"open_checkpoint: module {module} is packed, and {len(set(found))} schemes of "
                f"config_groups mean it, expected one; targets are {targets}; make them exact"
            )
        return found[0]


def parse_compressed_tensors(raw: Mapping, where: str) -> QuantizeConfig:
    """Checks every key of a compressed-tensors config; errors start with `where`."""
    _check_format(raw.get("format"), where, ("mixed-precision", None))
    _check_keys(raw, _TOP, where)
    sparsity = raw.get("sparsity_config") or {"format": "dense"}
    if not isinstance(sparsity, Mapping) or sparsity.get("format") != "dense":
        raise NotImplementedError(
            f"{where}: sparsity_config is {sparsity!r}, expected none or format 'dense'; {_REMEDY}"
        )
    for pattern in _strings(raw.get("ignore") or [], f"{where}: ignore"):
        _check_regex(pattern, f"{where}: ignore")
    raw_groups = raw.get("config_groups")
    if not isinstance(raw_groups, Mapping) or not raw_groups:
        raise ValueError(f"{where}: config_groups is {raw_groups!r}, expected name -> group")
    groups, activations = [], []
    for name, group in raw_groups.items():
        inside = f"{where}: config_groups: {name}"
        if not isinstance(group, Mapping):
            raise ValueError(f"{inside} is {group!r}, expected an object")
        _check_format(group.get("format"), inside, (None,))
        _check_keys(group, _GROUP, inside)
        scheme = _scheme(
            group.get("weights"), group.get("format") or raw.get("format"), f"{inside}: weights"
        )
        for key in ("input_activations", "output_activations"):
            if _are_quantized(group.get(key), scheme, f"{inside}: {key}"):
                activations.append(f"{name}: {key}")
        for target in _strings(group.get("targets"), f"{inside}: targets"):
            _check_regex(target, f"{inside}: targets")
            groups.append((target, scheme))
    if not groups:
        raise ValueError(f"{where}: config_groups has no targets, expected one or more")
    if activations:
        warn_activations(where, f"({', '.join(activations)})")
    return CompressedTensorsConfig(groups[0][1], (), tuple(groups))


def _scheme(raw: object, stored: object, where: str) -> ModuleQuantization:
    """The scheme of one group's `weights`, whose tensors have the format `stored`."""
    if not isinstance(raw, Mapping):
        raise NotImplementedError(f"{where} is {raw!r}, expected an object; {_REMEDY}")
    _check_keys(raw, _WEIGHTS, where)
    if isinstance(stored, str) and stored in FLOAT_FORMATS:
        return float_scheme(raw, stored, where)
    _check_keys(
        {key: raw[key] for key in ("type", "block_structure") if key in raw},
        {"type": (None, "int"), "block_structure": (None,)},
        where,
    )
    group_size, strategy = raw.get("group_size"), raw.get("strategy")
    if strategy is None and group_size is not None:  # what its own reader concludes
        strategy = "channel" if group_size == -1 else "group"
    if strategy not in ("group", "channel"):
        raise NotImplementedError(
            f"{where}: strategy is {strategy!r}, expected 'group' or 'channel'; {_REMEDY}"
        )
    if strategy == "channel" and group_size not in (None, -1):
        raise ValueError(f"{where}: group_size is {group_size!r}, expected null for each channel")
    if strategy == "group" and group_size == -1:
        raise ValueError(f"{where}: group_size is -1, expected at least 1 for strategy 'group'")
    actorder = raw.get("actorder")
    if not isinstance(actorder, (str, bool, type(None))) or actorder not in _ACTORDER:
        raise NotImplementedError(
            f"{where}: actorder is {actorder!r}, expected null, 'weight', 'static' or 'group'"
        )
    plain = {
        "bits": raw.get("num_bits"),
        "group_size": -1 if strategy == "channel" else group_size,
        "sym": raw.get("symmetric", True),
        "desc_act": _ACTORDER[actorder],
    }
    return override(ModuleQuantization.start("compressed-tensors"), plain, where, required=True)


def _are_quantized(raw: object, scheme: ModuleQuantization, where: str) -> bool:
    """Whether activations are; raises where their stored scale belongs to integer weights."""
    if raw is None:
        return False
    if isinstance(raw, Mapping):
        # Weights of floats mean the same without the activations' scales, stored or not.
        if raw.get("dynamic") is True or scheme.checkpoint_format != "compressed-tensors":
            return True
    got = raw.get("dynamic", False) if isinstance(raw, Mapping) else raw
    raise NotImplementedError(
        f"{where}: dynamic is {got!r}, expected true or no quantization of activations: static "
        f"scales change the result; {_REMEDY}"
    )


def _check_format(value: object, where: str, others: tuple) -> None:
    if value not in _FORMATS and value not in others:
        raise NotImplementedError(
            f"{where}: format is {value!r}, and of compressed-tensors jax_marlin loads only "
            f"{', '.join(_FORMATS)}; {_REMEDY}"
        )


def _check_keys(raw: Mapping, known: Mapping[str, tuple | None], where: str) -> None:
    for key, value in raw.items():
        if key not in known:
            raise ValueError(
                f"{where}: unknown key {key!r} (value {value!r}), expected one of "
                f"{', '.join(known)}; remove it if it changes nothing"
            )
        neutral = known[key]
        if neutral is not None and value not in neutral:
            options = " or ".join(repr(option) for option in neutral)
            raise NotImplementedError(f"{where}: {key} is {value!r}, expected {options}; {_REMEDY}")


def _strings(value: object, where: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ValueError(f"{where} is {value!r}, expected a list of names")
    return value


def _check_regex(pattern: str, where: str) -> None:
    if pattern.startswith("re:"):
        check_regex(pattern.removeprefix("re:"), f"{where}: {pattern!r}")


def _is_linear_class(target: str) -> bool:
    """ "Linear", or the class of a runtime's own linear such as "QKVParallelLinear"."""
    return target.isidentifier() and target.endswith("Linear")
