"""JSON of a checkpoint, read strictly: an object, no key twice, errors that name the file."""

from __future__ import annotations

import json
import pathlib


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

    try:
        parsed = json.loads(text, object_pairs_hook=unique)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{where}: not valid JSON ({error}); is the file complete?") from error
    if not isinstance(parsed, dict):
        raise ValueError(f"{where}: got a JSON {type(parsed).__name__}, expected an object")
    return parsed


def read_object(path: pathlib.Path) -> dict:
    """Reads the JSON object in the file at `path`."""
    return parse_object(path.read_bytes(), f"open_checkpoint: {path}")
