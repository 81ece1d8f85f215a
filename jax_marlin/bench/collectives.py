"""Collectives of a compiled program and the bytes that they move, read from its HLO text."""

import math
import re
from typing import NamedTuple

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2, "s32": 4, "u32": 4}
_BYTES |= {"f32": 4, "s64": 8, "u64": 8, "f64": 8}
_CALL = re.compile(
    r"= (?P<type>\(.*?\)|\S+) (?P<kind>ragged-all-to-all|all-to-all|all-gather|all-reduce"
    r"|reduce-scatter|collective-permute|collective-broadcast)(?P<start>-start)?\("
)
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")


class Collective(NamedTuple):
    """One collective of a program.

    Attributes:
        kind: "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all",
            "collective-permute" or "collective-broadcast".
        dtype: HLO's name of the (first) result's element type.
        shape: of the first result on one device.
        devices: of one group.
        bytes_sent: what a device sends, at least, by the best known algorithm; of a ragged
            all-to-all, the most that it may send.
        dtypes: of all results: compilers join collectives of one kind.
    """

    kind: str
    dtype: str
    shape: tuple[int, ...]
    devices: int
    bytes_sent: int
    dtypes: tuple[str, ...]


def collectives_of(hlo: str) -> list[Collective]:
    """The collectives of a compiled program.

    Args:
        hlo: `jax.jit(f).lower(...).compile().as_text()`.

    Raises:
        ValueError: groups of devices written in a way that is not known here.

    >>> [c] = collectives_of("%r = f32[8,64]{1,0} all-reduce(%x), replica_groups={{0,1},{2,3}}")
    >>> c.kind, c.devices, c.bytes_sent
    ('all-reduce', 2, 2048)
    """
    found = []
    for line in hlo.splitlines():
        call = _CALL.search(line)
        if call is None:
            continue
        arrays = [
            (dtype, tuple(int(d) for d in dims.split(",") if d))
            for dtype, dims in _ARRAY.findall(call["type"])
        ]
        if call["start"] and call["kind"] == "all-gather":  # (operands, results)
            arrays = arrays[len(arrays) // 2 :]
        if call["start"] and call["kind"] == "collective-permute":  # (operand, result, ...)
            arrays = arrays[1:2]
        devices = _devices(line)
        size = sum(_BYTES.get(dtype, 1) * math.prod(shape) for dtype, shape in arrays)
        sent = _bytes_sent(call["kind"], size, devices)
        dtypes = tuple(dtype for dtype, _ in arrays)
        found.append(Collective(call["kind"], *arrays[0], devices, sent, dtypes))
    return found


def bytes_sent(hlo: str) -> dict[str, int]:
    """Bytes that a device sends in one run of a program, by kind of collective."""
    total: dict[str, int] = {}
    for collective in collectives_of(hlo):
        total[collective.kind] = total.get(collective.kind, 0) + collective.bytes_sent
    return total


def _bytes_sent(kind: str, result: int, devices: int) -> int:
    if kind == "all-reduce":
        return 2 * result * (devices - 1) // devices
    if kind == "reduce-scatter":
        return result * (devices - 1)
    if kind.startswith("collective"):
        return result
    return result * (devices - 1) // devices


def _devices(line: str) -> int:
    """Of one group: {{0,1},{2,3}}, [groups,devices]<=[all] or mesh['a'=2,'b'=4] {'b'}.

    Between a mesh and its axes may stand the order of its devices, device_ids=([2,4]T(1,0)).
    """
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", line)
    if listed:
        return listed[1].count(",") + 1
    iota = re.search(r"replica_groups=\[\d+,(\d+)\]", line)
    if iota:
        return int(iota[1])
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\([^{]*)? ?\{([^}]*)\}", line)
    if mesh:
        sizes = {name: int(size) for name, size in re.findall(r"'([^']*)'=(\d+)", mesh[1])}
        # A part of an axis, 'a':(2)4, names its own size.
        axes = re.findall(r"'([^']*)'(?::\(\d+\)(\d+))?", mesh[2])
        return math.prod(int(part) if part else sizes[name] for name, part in axes)
    if "source_target_pairs" in line:
        return 2
    raise ValueError(f"collectives_of: cannot read the groups of devices in {line.strip()!r}")
