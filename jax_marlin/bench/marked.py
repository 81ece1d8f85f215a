"""Text between two markers of a Markdown file, which a benchmark writes anew."""

import pathlib
from typing import Any


def markers(name: str) -> tuple[str, str]:
    """The lines before and behind the text of one benchmark.

    >>> markers("bench")
    ('<!-- bench:begin -->', '<!-- bench:end -->')
    """
    return f"<!-- {name}:begin -->", f"<!-- {name}:end -->"


def check(path: pathlib.Path, name: str) -> None:
    """Raises ValueError if the file exists and has not one pair of the markers."""
    if path.exists():
        split(path, name)


def replace(path: pathlib.Path, name: str, text: str) -> None:
    """Replaces what stands between the markers of a file; a new file holds nothing else."""
    before, _, after = split(path, name) if path.exists() else ("", "", "\n")
    begin, end = markers(name)
    path.write_text(f"{before}{begin}\n{text}\n{end}{after}")


def split(path: pathlib.Path, name: str) -> tuple[str, str, str]:
    """What stands before, between and behind the markers.

    Raises:
        ValueError: there is not one pair of them.
    """
    text = path.read_text()
    begin, end = markers(name)
    before, found, rest = text.partition(begin)
    between, closed, after = rest.partition(end)
    if not found or not closed or begin in rest or end in after:
        raise ValueError(
            f"--markdown: {path} exists, expected one line {begin} and one line {end} after it in "
            "it; add them, or name a new file"
        )
    return before, between.strip("\n"), after


def source(conditions: dict[str, Any]) -> str:
    """The device, its driver, JAX and the day, in words."""
    driver = f", driver {conditions['driver']}" if conditions["driver"] else ""
    return f"{conditions['device']}{driver}, jax {conditions['jax']}, {conditions['date'][:10]}"
