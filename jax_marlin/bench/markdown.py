"""Writes the records of a run as a Markdown table between two markers of a file."""

import pathlib
from typing import Any

from jax_marlin.bench import marked

NAME = "bench"
BEGIN, END = marked.markers(NAME)
ROWS = (1, 16, 64)  # the columns, where they were measured
_PEERS = {"xla": "XLA", "humming": "Humming"}


def table(conditions: dict[str, Any], records: list[dict[str, Any]]) -> str:
    """A line of conditions, a row for each problem, and what the numbers mean.

    Args:
        conditions: see `report.conditions`.
        records: see `measure`; those of other routings than the uniform one are left out.

    Returns:
        Lines without the markers. Columns are 1, 16 and 64 tokens, or the first three numbers of
        rows if none of those was measured.
    """
    records = [record for record in records if record["routing"] in (None, "uniform")]
    measured = sorted({record["rows"] for record in records})
    columns = [rows for rows in ROWS if rows in measured] or measured[:3]
    cells = {(record["problem"], record["rows"]): _cell(record) for record in records}
    sizes = {record["problem"]: _size(record) for record in records}
    heads = [f"{rows} token{'s' if rows > 1 else ''}" for rows in columns]
    peers = f"XLA's product with {conditions['dtype']} weights"
    if any(record["humming_us"] is not None for record in records):
        peers += f", or Humming ({conditions['humming']})"
    return "\n".join([
        f"{marked.source(conditions)}: {conditions['bits']} bit, group size "
        f"{conditions['group_size']}, {conditions['dtype']}, through `jax.jit`.",
        "",
        f"| problem | {' | '.join(heads)} |",
        f"| --- |{' ---: |' * len(columns)}",
        *(
            f"| {problem}, {size} | "
            + " | ".join(cells.get((problem, rows), "–") for rows in columns)
            + " |"
            for problem, size in sizes.items()
        ),
        "",
        "Time of one call, its share of the floor (packed weights read once at "
        f"{conditions['floor_gb_per_s']:.0f} GB/s, or the arithmetic at "
        f"{conditions['floor_tflops']:.4g} TFLOP/s), and the best peer: {peers}.",
    ])  # fmt: skip


def save(path: pathlib.Path, conditions: dict[str, Any], records: list[dict[str, Any]]) -> None:
    """Writes the table between the markers of a file, or to a new one."""
    marked.replace(path, NAME, table(conditions, records))


def _size(record: dict[str, Any]) -> str:
    text = f"{record['k']} × {record['n']}"
    if record["kind"] == "dense":
        return text
    return f"{text}, {record['top_k']} of {record['experts']} experts"


def _cell(record: dict[str, Any]) -> str:
    if record["us"] is None:
        return "–"
    text = f"{record['us']:.1f} µs, {record['share_of_floor'] * 100:.0f} %"
    if record["best_peer"] is not None:
        text += f"; {_PEERS[record['best_peer']]} {record['best_peer_us']:.1f} µs"
    return text
