"""The command `jax-marlin bench`: checks and times the operations on this machine's device."""

import argparse
import importlib.util
import math
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from jax_marlin.bench import humming, markdown, marked, report
from jax_marlin.bench.measure import Options
from jax_marlin.bench.options import add_ceilings, add_files, ceilings_of, positive
from jax_marlin.bench.problems import Quantization
from jax_marlin.bench.routings import ROUTINGS
from jax_marlin.bench.schedule import Case, all_cases, listed, measure_all
from jax_marlin.bench.shapes import SHAPES, select
from jax_marlin.linear import compute_dtype

_GPU_SETS = ("qwen3-30b", "dense", "mixtral-8x7b", "deepseek-v3")  # what is soonest done first
_GPU_ROWS = (1, 4, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
_CPU_SETS, _CPU_ROWS = ("tiny",), (1, 16)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: the command's options; None takes the shell's.

    Returns:
        0; or 1 if some result was wrong or could not be computed, with the reason on stderr.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: pip install matplotlib")
    try:
        return _run(args)
    except (ValueError, TypeError, NotImplementedError, OSError) as error:
        print(f"jax-marlin bench: error: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jax-marlin bench",
        description="Checks each operation's result, then times it against the floor of this "
        "device's memory and tensor cores, against XLA on unquantized weights, and against "
        "Humming (humming-kernels and torch) on 4-bit ones where that is installed.",
        epilog=f"problems: {', '.join(SHAPES)}; a set's name (before the dot) means all its parts. "
        "Memory: JAX takes three quarters of the GPU's memory when it starts, and torch, in which "
        "Humming works, gets what is left; set XLA_PYTHON_CLIENT_PREALLOCATE=false so that both "
        "take what they need (deepseek-v3: up to 15 GB for Humming, 45 GB for XLA). A peer that "
        "does not fit is left out of a record, and ours is timed all the same.",
    )
    add = parser.add_argument
    add("--shapes", nargs="+", metavar="NAME", help="default: all but tiny; tiny on a CPU")
    add("--rows", nargs="+", type=positive, metavar="N", help="tokens (default: 1 to 4096)")
    add(
        "--routing", nargs="+", choices=ROUTINGS, default=["uniform"], metavar="NAME",
        help="how tokens choose experts; " + "; ".join(f"{n}: {d}" for n, d in ROUTINGS.items())
        + " (default: uniform)",
    )  # fmt: skip
    add("--dtype", help="float16, bfloat16 or float32 (default: bfloat16; float32 on a CPU)")
    add("--bits", type=int, choices=(4, 8), default=4, help="default: 4")
    add("--group-size", type=int, default=128, metavar="N", help="-1: one group (default: 128)")
    add("--calls", type=positive, metavar="N", help="calls in one round (default: 64 to 4)")
    add("--runs", type=positive, default=20, metavar="N", help="pairs of runs (default: 20)")
    add_ceilings(parser)
    add("--no-baseline", dest="baseline", action="store_false", help="do not time XLA")
    add("--no-peers", dest="peers", action="store_false", help="do not time Humming")
    add(
        "--max-seconds", type=positive, metavar="N",
        help="of the whole run: each problem has an equal share of what is left, its rows come in "
        "the order 1, 16, 64, then the others; what does not fit is named (default: no limit)",
    )  # fmt: skip
    add_files(parser, markdown.NAME)
    add("--plot", type=pathlib.Path, metavar="FILE", help="draw time and floor (matplotlib)")
    return parser


def _run(args: argparse.Namespace) -> int:
    deadline = time.monotonic() + (args.max_seconds or math.inf)
    on_cpu = jax.default_backend() == "cpu"
    shapes = select(args.shapes or (_CPU_SETS if on_cpu else _GPU_SETS))
    rows = sorted(set(args.rows or (_CPU_ROWS if on_cpu else _GPU_ROWS)))
    dtype = compute_dtype(_dtype(args.dtype, on_cpu), "bench")
    quantization = Quantization(args.bits, args.group_size, dtype)
    no_humming = humming.why_not(quantization) if args.peers else "not asked for"
    routings = tuple(dict.fromkeys(args.routing))
    options = Options(
        quantization, args.calls, args.runs, args.baseline, no_humming is None, routings
    )
    if args.markdown:  # now, not after minutes
        if "uniform" not in routings:
            raise ValueError(
                f"--markdown: the table shows uniform routing, got --routing {' '.join(routings)}; "
                "add uniform, or use --json"
            )
        marked.check(args.markdown, markdown.NAME)
    ceilings, given = ceilings_of(args, dtype)
    conditions = report.conditions(options, ceilings, given=given)
    conditions["humming"] = humming.version() if no_humming is None else no_humming
    records: list[dict[str, Any]] = []
    cases = all_cases(shapes, rows, options)
    conditions["not_measured"] = listed(cases)
    try:
        with tqdm(total=len(cases), unit="case") as bar:
            for record in measure_all(shapes, rows, ceilings, options, deadline):
                bar.set_description(record["problem"])
                bar.update()
                records.append(record)
                records.sort(key=lambda record: cases.index(Case.of(record)))
                left = [case for case in cases if case not in map(Case.of, records)]
                conditions["not_measured"] = listed(left)
                if args.json:  # after each case, for a run that is cut off
                    report.save_json(args.json, conditions, records)
    finally:  # an interrupted run keeps what it has
        if args.plot and records:
            report.save_plot(args.plot, conditions, records)
        if args.markdown and records:
            markdown.save(args.markdown, conditions, records)
        print(report.table(conditions, records), flush=True)
    errors = sum(record["error"] is not None for record in records)
    if errors:
        print(f"jax-marlin bench: error: {errors} of {len(records)} cases failed", file=sys.stderr)
    return 1 if errors else 0


def _dtype(name: str | None, on_cpu: bool) -> np.dtype:
    name = name or ("float32" if on_cpu else "bfloat16")
    return jax.numpy.dtype(name)


if __name__ == "__main__":
    sys.exit(main())
