"""Prints, saves and plots the records of a run, always with the conditions they hold under."""

import datetime
import importlib.metadata
import json
import pathlib
import re
from collections.abc import Collection, Iterable
from typing import Any

import jax

from jax_marlin.backend import backend_info
from jax_marlin.bench.floor import Ceilings
from jax_marlin.bench.measure import Options
from jax_marlin.bench.problems import Quantization

_DRIVER = pathlib.Path("/proc/driver/nvidia/version")  # Linux; JAX does not know the driver

_NAME, _NUMBER = 18, 8  # widths of columns, at least, whose cells are not known yet

# column -> (heading, format)
_COLUMNS = {
    "problem": ("problem", "{}"),
    "rows": ("rows", "{}"),
    "routing": ("routing", "{}"),
    "us": ("us", "{:.1f}"),
    "floor_us": ("floor us", "{:.1f}"),
    "bound": ("bound by", "{}"),
    "share_of_floor": ("of floor", "{:.0%}"),
    "gb_per_s": ("GB/s", "{:.3g}"),
    "tflops": ("TFLOP/s", "{:.3g}"),
    "xla_us": ("XLA us", "{:.1f}"),
    "humming_us": ("Humming us", "{:.1f}"),
    "best_peer_us": ("best peer us", "{:.1f}"),
    "of_best_peer": ("of best peer", "{:.0%}"),
}


def conditions(options: Options, ceilings: Ceilings, *, given: Collection[str]) -> dict[str, Any]:
    """What the times of operations depend on; see `floor_of` for the arguments."""
    return {
        **environment(options.quantization),
        **floor_of(ceilings, given=given),
        "method": "calls one after the other in a loop inside one jitted program, weights and "
        "routings rotated past L2; what longer runs of it take more than shorter ones, so no start "
        f"of a program (ours and XLA's; median of {options.runs} pairs of runs, fewer where they "
        "take long); Humming: as many calls in a CUDA graph, replayed without a pause between two "
        "events, no host time either; moe: aligned before; layer: aligned inside; floor: packed "
        "weights read once, or the flops; of best peer: its time over ours",
    }


def environment(quantization: Quantization) -> dict[str, Any]:
    """The device, the versions and the weights' format."""
    from jax_marlin import __version__

    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "driver": _driver() if device.platform == "gpu" else None,
        "cuda_kernels": backend_info().why_not or "available",
        "jax": jax.__version__,
        "jaxlib": importlib.metadata.version("jaxlib"),
        "jax_marlin": __version__,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "dtype": str(quantization.dtype),
        "bits": quantization.bits,
        "group_size": quantization.group_size,
    }


def floor_of(ceilings: Ceilings, *, given: Collection[str]) -> dict[str, Any]:
    """The ceilings that floors follow from.

    Args:
        ceilings: of the device.
        given: those ("bandwidth", "flops") that were not measured in this run.
    """
    return {
        "floor_gb_per_s": round(ceilings.bandwidth / 1e9, 3),
        "floor_tflops": round(ceilings.flops / 1e12, 4),
        "floor_from": ", ".join(
            f"{'given' if name in given else 'measured'} {name}" for name in ("bandwidth", "flops")
        ),
    }


def _driver() -> str | None:
    try:
        found = re.search(r"\b\d+\.\d+(\.\d+)?\b", _DRIVER.read_text())
    except OSError:
        return None
    return found and found.group()


def table(conditions: dict[str, Any], records: list[dict[str, Any]]) -> str:
    """The conditions, then a line for each record, then what went wrong."""
    errors = [f"{_title(r)} rows {r['rows']}: {r['error']}" for r in records if r["error"]]
    errors += sorted({
        f"{_title(r)}: Humming: {r['humming_error']}" for r in records if r["humming_error"]
    })  # fmt: skip
    return "\n".join([aligned(conditions, records, _COLUMNS), *errors])


def aligned(
    conditions: dict[str, Any], records: list[dict[str, Any]], columns: dict[str, tuple[str, str]]
) -> str:
    """The conditions, then a line for each record.

    Args:
        conditions: what the times depend on.
        records: with a value, or None, for each column.
        columns: key of a record -> (heading, format).
    """
    rows = [[heading for heading, _ in columns.values()], *(cells(r, columns) for r in records)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
    return "\n".join([*header(conditions), *(line(row, widths) for row in rows)])


def streamed(
    conditions: dict[str, Any],
    records: Iterable[dict[str, Any]],
    columns: dict[str, tuple[str, str]],
    json_file: pathlib.Path | None,
) -> list[dict[str, Any]]:
    """Prints as `aligned` does, and saves, each record as soon as it comes, and returns them all.

    A run that is cut off keeps what it has.
    """
    headings = [heading for heading, _ in columns.values()]
    widths = [max(_NUMBER if i else _NAME, len(h)) for i, h in enumerate(headings)]
    print(*header(conditions), line(headings, widths), sep="\n", flush=True)
    done: list[dict[str, Any]] = []
    for record in records:
        print(line(cells(record, columns), widths), flush=True)
        done.append(record)
        if json_file:
            save_json(json_file, conditions, done)
    return done


def header(conditions: dict[str, Any]) -> list[str]:
    """A line for each condition, and an empty one."""
    return [*(f"{name:<20}{'-' if v is None else v}" for name, v in conditions.items()), ""]


def cells(record: dict[str, Any], columns: dict[str, tuple[str, str]]) -> list[str]:
    """A record's values as text; `columns` as in `aligned`."""
    return [
        "-" if record[name] is None else text.format(record[name])
        for name, (_, text) in columns.items()
    ]


def line(cells: list[str], widths: list[int]) -> str:
    """The first cell to the left, the others to the right."""
    return "  ".join([cells[0].ljust(widths[0]), *map(str.rjust, cells[1:], widths[1:])])


def save_json(
    path: pathlib.Path, conditions: dict[str, Any], records: list[dict[str, Any]]
) -> None:
    """Writes {"conditions": {...}, "records": [...]}."""
    path.write_text(json.dumps({"conditions": conditions, "records": records}, indent=1) + "\n")


def save_plot(
    path: pathlib.Path, conditions: dict[str, Any], records: list[dict[str, Any]]
) -> None:
    """Draws time and floor against rows, a panel for each problem and routing; needs matplotlib."""
    from matplotlib.figure import Figure  # optional, and slow to import

    titles = list(dict.fromkeys(map(_title, records)))
    columns = min(4, len(titles))
    lines = -(-len(titles) // columns)
    figure = Figure(figsize=(4 * columns, 3.2 * lines + 0.6), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).ravel()
    for panel in panels[len(titles) :]:
        panel.set_visible(False)
    for panel, title in zip(panels, titles, strict=False):
        own = [record for record in records if _title(record) == title]
        for name, label, style in (
            ("us", "jax_marlin", "C0o-"),
            ("xla_us", f"XLA {conditions['dtype']}", "C1s-"),
            ("humming_us", "Humming", "C2^-"),
            ("floor_us", "floor", "k--"),
        ):
            points = [(r["rows"], r[name]) for r in own if r[name] is not None]
            if points:
                panel.plot(*zip(*points, strict=True), style, label=label, markersize=4)
        panel.set(xscale="log", yscale="log", title=title, xlabel="rows", ylabel="time [µs]")
        panel.set_xticks(rows := [r["rows"] for r in own], labels=map(str, rows))
        panel.minorticks_off()
        panel.legend(fontsize="small")
    figure.suptitle(
        f"{conditions['device']}, {conditions['bits']} bit, group size {conditions['group_size']}, "
        f"{conditions['dtype']}"
    )
    figure.savefig(path, dpi=150)


def _title(record: dict[str, Any]) -> str:
    """The problem, and its routing where that is none of a table's usual ones."""
    usual = record["routing"] in (None, "uniform")
    return record["problem"] if usual else f"{record['problem']}, {record['routing']}"
