"""Keys of a config.json, each read as the type that it must have; null counts as left out."""

from collections.abc import Mapping
from typing import Any

_MAX_SIZE = 2**31 - 1  # indices on the device are int32
_MAX_LAYERS = 10_000  # far past any model; a damaged number must not ask for all memory


def size(config: Mapping[str, Any], key: str, default: int | None = None, *, least: int = 1) -> int:
    """A key that must be an integer, at least `least`; it must be there without a default."""
    value = default if config.get(key) is None else config[key]
    if type(value) is not int or not least <= value <= _MAX_SIZE:  # bool is an int to isinstance
        kind = "a positive integer" if least == 1 else f"an integer of at least {least}"
        raise _error(config, key, f"{kind} (at most {_MAX_SIZE})")
    return value


def layers(
    config: Mapping[str, Any], key: str, default: int | None = None, *, least: int = 1
) -> int:
    """A key that must be a number of layers."""
    value = size(config, key, default, least=least)
    if value > _MAX_LAYERS:
        raise _error(config, key, f"at most {_MAX_LAYERS} layers")
    return value


def number(
    config: Mapping[str, Any], key: str, default: float | None = None, of: str = ""
) -> float:
    """A key that must be a positive number that float32 holds; `of` tells errors where it lies."""
    value = default if config.get(key) is None else config[key]
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not 0 < value < 2.0**127  # compared as it came: some integers are too long for a float
    ):
        raise _error(config, key, "a positive number", of)
    return float(value)


def flag(config: Mapping[str, Any], key: str, default: bool) -> bool:
    """A key that must be true or false; null is false, so it is refused where true is meant."""
    value = config.get(key, default)
    if value is None and not default:
        return False
    if not isinstance(value, bool):
        raise _error(config, key, "true or false")
    return value


def names(config: Mapping[str, Any], key: str) -> list[str] | None:
    """A key that must be a list of strings, or None."""
    value = config.get(key)
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise _error(config, key, "a list of names")
    return value


def indices(config: Mapping[str, Any], key: str) -> list[int]:
    """A key that must be a list of integers; empty where it is left out."""
    value = [] if config.get(key) is None else config[key]
    if not isinstance(value, list) or not all(type(item) is int for item in value):
        raise _error(config, key, "a list of integers")
    return value


def section(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """A key that must be an object; empty where it is left out."""
    value = {} if config.get(key) is None else config[key]
    if not isinstance(value, Mapping):
        raise _error(config, key, "an object")
    return value


def _error(config: Mapping[str, Any], key: str, expected: str, of: str = "") -> ValueError:
    return ValueError(
        f"models.load: config.json has {key} {config.get(key)!r}{of}, expected {expected}"
    )
