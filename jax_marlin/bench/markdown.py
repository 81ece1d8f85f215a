"""Writes the records of a run as a Markdown table between two markers of a file."""

import pathlib
from typing import Any

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
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
    driver = f", driver {conditions['driver']}" if conditions["driver"] else ""
    return "\n".join([
        f"{conditions['device']}{driver}, jax {conditions['jax']}, {conditions['date'][:10]}: "
        f"{conditions['bits']} bit, group size {conditions['group_size']}, {conditions['dtype']}, "
        "through `jax.jit`.",
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


def check_markers(path: pathlib.Path) -> None:
    """Raises ValueError if the file exists and has not one pair of markers."""
    if path.exists():
        _split(path)


def save(path: pathlib.Path, conditions: dict[str, Any], records: list[dict[str, Any]]) -> None:
    """Replaces what stands between the markers of a file; a new file holds nothing else."""
    before, after = _split(path) if path.exists() else ("", "\n")
    path.write_text(f"{before}{BEGIN}\n{table(conditions, records)}\n{END}{after}")


def _split(path: pathlib.Path) -> tuple[str, str]:
    text = path.read_text()
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in after:
        raise ValueError(
            f"--markdown: {path} exists, expected one line {BEGIN} and one line {END} after it in "
            "it; add them, or name a new file"
        )
    return before, after


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
