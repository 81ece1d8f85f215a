"""Options that the benchmarks' commands share."""

import argparse
import os
import pathlib

from jax.typing import DTypeLike

from jax_marlin.bench import marked
from jax_marlin.bench.floor import Ceilings, measure_bandwidth, measure_flops


def positive(text: str) -> int:
    """An option's value as an integer from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 on")
    return int(text)


def check_markers(parser: argparse.ArgumentParser, path: pathlib.Path | None, name: str) -> None:
    """Ends the command now, not after minutes, if `--markdown` names a file without the markers."""
    try:
        if path:
            marked.check(path, name)
    except ValueError as error:
        parser.error(str(error))


def disable_command_buffers() -> None:
    """Handlers then run at each call. To be called before JAX first looks for a device."""
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_enable_command_buffer=".strip()


def add_files(parser: argparse.ArgumentParser, name: str) -> None:
    """Adds `--json` and `--markdown`; `name` is of the benchmark's markers."""
    add = parser.add_argument
    add("--json", type=pathlib.Path, metavar="FILE", help="write all records")
    begin, end = marked.markers(name)
    add(
        "--markdown", type=pathlib.Path, metavar="FILE",
        help=f"write a table between the lines {begin} and {end} of FILE, or a new FILE",
    )  # fmt: skip


def add_ceilings(parser: argparse.ArgumentParser) -> None:
    """Adds `--bandwidth` and `--tflops`."""
    add = parser.add_argument
    add("--bandwidth", type=float, metavar="GB/S", help="of the floor (default: measured)")
    add("--tflops", type=float, metavar="N", help="of the floor (default: measured)")


def ceilings_of(args: argparse.Namespace, dtype: DTypeLike) -> tuple[Ceilings, list[str]]:
    """The device's ceilings, given or measured, and which of them ("bandwidth", "flops") are given.

    Raises:
        ValueError: a given one is not positive.
    """
    options = {"bandwidth": args.bandwidth, "tflops": args.tflops}
    for option, value in options.items():
        if value is not None and not value > 0:
            raise ValueError(f"--{option} is {value}, expected a positive number")
    ceilings = Ceilings(
        measure_bandwidth() if args.bandwidth is None else args.bandwidth * 1e9,
        measure_flops(dtype) if args.tflops is None else args.tflops * 1e12,
    )
    given = [option.replace("tflops", "flops") for option, v in options.items() if v is not None]
    return ceilings, given
