"""Checks and times MoE layers over several devices: `python -m jax_marlin.bench.parallel`.

Each layer runs on one device and, with the same weights, over all: experts cut ("expert", tokens on
every device; "expert all_gather" and "expert all_to_all", each device's own tokens), and columns
("tensor"). A result is checked before it is timed, and the bytes of its collectives are counted.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jax_marlin.bench.check import WrongResultError, check
from jax_marlin.bench.collectives import bytes_sent
from jax_marlin.bench.floor import NOMINAL, floor_microseconds
from jax_marlin.bench.problems import Batch, Problem, Quantization
from jax_marlin.bench.shapes import Shape, select
from jax_marlin.bench.timing import microseconds
from jax_marlin.ops.moe_ffn import moe_ffn
from jax_marlin.sharding import partition_specs, shard

_AXIS = "devices"


@dataclasses.dataclass(frozen=True)
class Mode:
    """One way to spread a layer: how weights are cut, where tokens lie, what `moe_ffn` is told."""

    name: str
    kind: Any
    own_tokens: bool
    options: dict[str, str]


MODES = (
    Mode("expert", "expert", False, {"expert_axis": _AXIS}),
    *(
        Mode(f"expert {e}", "expert", True, {"expert_axis": _AXIS, "exchange": e})
        for e in ("all_gather", "all_to_all")
    ),
    Mode("tensor", ("column", "row"), False, {"tensor_axis": _AXIS}),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; 1 if some result was wrong or could not be computed."""
    parser = argparse.ArgumentParser(
        prog="python -m jax_marlin.bench.parallel", description=(__doc__ or "").split("\n\n")[1]
    )
    add = parser.add_argument
    on_cpu = jax.default_backend() == "cpu"
    add("--shapes", nargs="+", default=["tiny"] if on_cpu else ["qwen3-30b", "mixtral-8x7b"])
    add("--rows", nargs="+", type=int, default=[1, 16] if on_cpu else [1, 64, 1024, 4096])
    add("--devices", type=int, default=len(jax.devices()), help="default: all")
    add("--dtype", default="float32" if on_cpu else "bfloat16")
    add("--group-size", type=int, default=64 if on_cpu else 128)
    add("--calls", type=int, default=8, help="calls in one round (default: 8)")
    add("--runs", type=int, default=20, help="pairs of runs (default: 20)")
    add("--json", type=pathlib.Path, metavar="FILE", help="write all records")
    args = parser.parse_args(argv)
    if not 1 < args.devices <= len(jax.devices()):
        parser.error(f"--devices is {args.devices}, expected 2 to {len(jax.devices())}, all here")
    mesh = Mesh(np.array(jax.devices()[: args.devices]), (_AXIS,), axis_types=(AxisType.Auto,))
    quantization = Quantization(4, args.group_size, jnp.dtype(args.dtype))
    records: list[dict[str, Any]] = []
    print(_line("problem", "rows", "mode", "us", "one device us", "speedup", "bytes sent"))
    for shape in select(args.shapes):
        if shape.kind != "layer":
            continue
        for record in measure(shape, args.rows, mesh, quantization, args.calls, args.runs):
            records.append(record)
            print(_row(record), flush=True)
            if args.json:  # after each record, for a run that is cut off
                args.json.write_text(json.dumps(_report(args, records), indent=1) + "\n")
    return int(any(record["error"] is not None for record in records))


def measure(
    shape: Shape, rows: Sequence[int], mesh: Mesh, quantization: Quantization, calls: int, runs: int
) -> Iterator[dict[str, Any]]:
    """A record for each mode and number of rows; `error` says why one has no time."""
    problem = Problem(shape, quantization, min(rows), calls)
    batches = {count: problem.batch(count, calls) for count in rows}
    expected = {
        count: floor_microseconds(batch.touched_bytes(), shape.flops(count), NOMINAL)[0]
        for count, batch in batches.items()
    }
    alone = {
        count: microseconds(batch.operation, batch.operands, expected_us=expected[count], runs=runs)
        for count, batch in batches.items()
    }
    for mode in MODES:
        operation = placed = refused = None
        try:
            copies = [shard(tuple(s), mesh, mode.kind, gate_up=True) for s in problem.stacks]
            operation = over_devices(mesh, mode, copies[0])
            placed = {id(own[0]): cut for own, cut in zip(problem.stacks, copies, strict=True)}
        except (ValueError, jax.errors.JaxRuntimeError) as error:  # no such cut; no memory
            refused = str(error).splitlines()[0]
        for count, batch in batches.items():
            if mode.own_tokens and count % mesh.size:
                continue
            record: dict[str, Any] = {
                "problem": shape.name, "rows": count, "mode": mode.name, "devices": mesh.size,
                "us": None, "one_device_us": alone[count], "speedup": None, "bytes_sent": None,
                "deviation": None, "error": refused,
            }  # fmt: skip
            if operation is not None and placed is not None:
                try:
                    least = expected[count] / mesh.size
                    record |= _measured(shape, batch, mesh, mode, operation, placed, least, runs)
                    record["speedup"] = alone[count] / record["us"]
                except (WrongResultError, ValueError, jax.errors.JaxRuntimeError) as error:
                    record["error"] = str(error).splitlines()[0]
            yield record


def over_devices(mesh: Mesh, mode: Mode, stacks: tuple) -> Callable[..., jax.Array]:
    """`moe_ffn` of (x, ids, weights, gate_up, down) that lie as the mode says."""
    tokens = PartitionSpec(_AXIS) if mode.own_tokens else PartitionSpec()
    return jax.shard_map(
        functools.partial(moe_ffn, **mode.options),  # pyright: ignore[reportArgumentType]
        mesh=mesh,
        in_specs=(tokens, tokens, tokens, *partition_specs(stacks, mode.kind, _AXIS)),
        out_specs=tokens,
    )


def _measured(
    shape, batch: Batch, mesh, mode: Mode, operation, placed, expected_us: float, runs: int
) -> dict[str, Any]:
    tokens = PartitionSpec(_AXIS) if mode.own_tokens else PartitionSpec()
    lies = NamedSharding(mesh, tokens)
    operands = [
        (*(jax.device_put(array, lies) for array in call[:3]), *placed[id(call[3])])
        for call in batch.operands
    ]
    spread = dataclasses.replace(batch, operation=operation, operands=operands)
    deviation = check(shape, spread, seed=len(operands[0][0]))
    compiled = jax.jit(operation).lower(*operands[0]).compile()
    one = np.asarray(jax.jit(batch.operation)(*batch.operands[0]), np.float64)
    difference = np.abs(np.asarray(compiled(*operands[0]), np.float64) - one)
    rms = float(np.sqrt(np.mean(one**2)))
    epsilon = max(float(jnp.finfo(batch.operands[0][0].dtype).eps), 1e-5)
    if not (difference <= 8 * epsilon * (rms + np.abs(one))).all():  # check's bound of both
        raise WrongResultError(
            f"{shape.name}: {mode.name} is off one device's result by up to "
            f"{difference.max() / rms:.2g} of its root mean square; not timed"
        )
    return {
        "us": microseconds(operation, operands, expected_us=expected_us, runs=runs),
        "bytes_sent": bytes_sent(compiled.as_text() or ""),
        "deviation": deviation,
    }


def _report(args: argparse.Namespace, records: list[dict[str, Any]]) -> dict[str, Any]:
    conditions = {
        "devices": [device.device_kind for device in jax.devices()[: args.devices]],
        "jax": jax.__version__, "dtype": args.dtype, "bits": 4, "group_size": args.group_size,
        "method": f"{args.calls} calls one after the other in a loop inside one jitted program, "
        "weights rotated past L2; what longer runs of it take more than shorter ones (median of "
        f"{args.runs} pairs, fewer where they take long); bytes that a device sends in one call, "
        "of a ragged all-to-all the most",
    }  # fmt: skip
    return {"conditions": conditions, "records": records}


def _row(record: dict[str, Any]) -> str:
    head = (record["problem"], record["rows"], record["mode"])
    if record["error"] is not None:
        return _line(*head, "-", f"{record['one_device_us']:.1f}", "-", record["error"])
    sent = ", ".join(f"{kind} {count}" for kind, count in record["bytes_sent"].items())
    return _line(
        *head, f"{record['us']:.1f}", f"{record['one_device_us']:.1f}",
        f"{record['speedup']:.2f}", sent,
    )  # fmt: skip


def _line(problem, rows, mode, us, alone, speedup, sent) -> str:
    return f"{problem:<20}{rows:>6}  {mode:<18}{us:>10}{alone:>15}{speedup:>9}  {sent}"


if __name__ == "__main__":
    sys.exit(main())
