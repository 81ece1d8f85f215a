"""JSON of a checkpoint, read strictly: an object, no key twice, errors that name the file."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterable

# Past any checkpoint; Python itself fails somewhere beyond, on printing a value for instance.
_MAX_DIGITS = 1000
_MAX_DEPTH = 100


def parse_object(text: str | bytes, where: str) -> dict:
    """Parses `text` as one JSON object; `where` names its origin in errors."""

    def unique(pairs: list[tuple[str, object]]) -> dict:
        found = dict(pairs)
        if len(found) != len(pairs):
            keys = [key for key, _ in pairs]
            twice = sorted({key for key in keys if keys.count(key) > 1})
            raise ValueError(
                f"{where}: duplicate keys {twice}; which one is right? Export it again"
            )
        return found

    def integer(digits: str) -> int:
        if len(digits) > _MAX_DIGITS:
            raise ValueError(
                f"{where}: a number has {len(digits)} digits, expected at most {_MAX_DIGITS}; the "
                f"file is damaged, download it again"
            )
        return int(digits)

    try:
        parsed = json.loads(text, object_pairs_hook=unique, parse_int=integer)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{where}: not valid JSON ({error}); is the file complete?") from error
    if not isinstance(parsed, dict):
        raise ValueError(f"{where}: got a JSON {type(parsed).__name__}, expected an object")
    level: list[object] = [parsed]
    for _ in range(_MAX_DEPTH):
        level = [item for value in level for item in _items(value)]
        if not level:
            return parsed
    raise ValueError(
        f"{where}: values are nested more than {_MAX_DEPTH} deep, expected fewer; the file is "
        f"damaged, download it again"
    )


def _items(value: object) -> Iterable[object]:
    """What an object or a list holds."""
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def read_object(path: pathlib.Path) -> dict:
    """Reads the JSON object in the file at `path`."""
    return parse_object(path.read_bytes(), f"open_checkpoint: {path}")
