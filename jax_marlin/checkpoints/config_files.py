"""The quantization config of a checkpoint: found in its files, which must not disagree."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping

from jax_marlin.checkpoints import json_file
from jax_marlin.checkpoints.formats import parse_config
from jax_marlin.checkpoints.quantize_config import QuantizeConfig

# GPTQModel's and AutoGPTQ's, AutoRound's, AutoAWQ's, ModelOpt's
_OTHER_FILES = (
    "quantize_config.json", "quantization_config.json", "quant_config.json", "hf_quant_config.json",
)  # fmt: skip


def read_quantize_config(directory: pathlib.Path, config: Mapping) -> QuantizeConfig | None:
    """Reads config.json's `quantization_config` and the older files beside it; None without any.

    Args:
        directory: the checkpoint.
        config: its config.json.

    Raises:
        ValueError: a key is unknown or has no valid value, or two files disagree on what changes
            the result.
        NotImplementedError: a method, format or width that does not load.
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
        (name, parse_config(raw, f"open_checkpoint: {directory / name}")) for name, raw in found
    ]
    for name, other in parsed[1:]:
        _check_agreement(directory, *parsed[0], name, other)
    return parsed[0][1] if parsed else None


def _check_agreement(
    directory: pathlib.Path, name: str, a: QuantizeConfig, other_name: str, b: QuantizeConfig
) -> None:
    """Raises if two files give different values for what changes the result."""
    fields, other_fields = (
        # rules are a tuple: their order counts
        dataclasses.asdict(config.base)
        | {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name != "base"}
        for config in (a, b)
    )
    if None in (a.base.symmetric, b.base.symmetric):
        del fields["symmetric"]  # one of them does not say
    for key, value in fields.items():
        if value != other_fields.get(key):
            raise ValueError(
                f"open_checkpoint: {directory}: {key} is {value!r} in {name} but "
                f"{other_fields.get(key)!r} in {other_name}; remove the file that is wrong"
            )
