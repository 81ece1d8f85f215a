"""The header of one safetensors file: parsed and checked before any byte of data is trusted.

A file is `N` (8 bytes, little endian), `N` bytes of JSON, then the data. The JSON maps the name of
each tensor to a dtype, a shape and `data_offsets` [start, stop), in bytes from where the data
starts. The data must be covered exactly once: no gap, no overlap, nothing past the end. A download
that was cut short fails the last rule.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
import struct

from jax_marlin.checkpoints import json_file

# Bits of one element, for every dtype that the safetensors format names.
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
}  # fmt: skip
FLOATS = ("F16", "BF16", "F32", "F64")
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit

_MAX_AXES = 32  # that every NumPy holds
_MAX_ELEMENTS = 2**56  # NumPy counts their bytes in int64, also of shapes with an empty axis


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """What a header says of one tensor; `start` and `stop` are bytes from the file's beginning."""

    name: str
    dtype: str  # the format's spelling: "I32", "F16", "BF16", ...
    shape: tuple[int, ...]
    start: int
    stop: int
    path: pathlib.Path

    @property
    def nbytes(self) -> int:
        return self.stop - self.start

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def read_header(path: pathlib.Path) -> dict[str, TensorInfo]:
    """Reads and checks the header of the safetensors file at `path`; touches no tensor data.

    Raises:
        ValueError: the file is truncated or its header contradicts itself; the message names the
            file and the tensor.
    """
    where = f"open_checkpoint: {path}"
    file_bytes = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise ValueError(
                f"{where}: {file_bytes} bytes are too few for a safetensors file; download it again"
            )
        (header_bytes,) = struct.unpack("<Q", prefix)
        most = min(file_bytes - 8, _MAX_HEADER_BYTES)
        if header_bytes > most:
            raise ValueError(
                f"{where}: header length is {header_bytes}, expected at most {most} in a file of "
                f"{file_bytes} bytes; truncated, or not a safetensors file"
            )
        entries = json_file.parse_object(file.read(header_bytes), f"{where}: header")
    entries.pop("__metadata__", None)
    infos = {name: _tensor_info(name, entry, path) for name, entry in entries.items()}
    _check_coverage(infos, file_bytes - 8 - header_bytes, where)
    first = 8 + header_bytes
    return {
        name: dataclasses.replace(info, start=first + info.start, stop=first + info.stop)
        for name, info in infos.items()
    }


def _tensor_info(name: str, entry: object, path: pathlib.Path) -> TensorInfo:
    where = f"open_checkpoint: {path}: tensor {name}"
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise ValueError(
            f"{where}: header entry is {entry!r}, expected dtype, shape and data_offsets"
        )
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise ValueError(f"{where}: dtype is {dtype!r}, expected one of {', '.join(_BITS)}")
    for key, value in (("shape", shape), ("data_offsets", offsets)):
        # bool is an int to Python, and `true` is no size
        if not isinstance(value, list) or not all(type(x) is int and x >= 0 for x in value):
            raise ValueError(f"{where}: {key} is {value!r}, expected a list of integers >= 0")
    if len(shape) > _MAX_AXES or math.prod(max(x, 1) for x in shape) > _MAX_ELEMENTS:
        raise ValueError(
            f"{where}: shape is {shape}, expected at most {_MAX_AXES} axes and {_MAX_ELEMENTS} "
            f"elements, empty axes not counted; the header is damaged, download the file again"
        )
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(
            f"{where}: data_offsets is {offsets}, expected [start, stop] with start <= stop"
        )
    info = TensorInfo(name, dtype, tuple(shape), offsets[0], offsets[1], path)
    expected = info.size * _BITS[dtype] // 8
    if info.nbytes != expected:
        raise ValueError(
            f"{where}: data_offsets {offsets} hold {info.nbytes} bytes, expected {expected} for "
            f"{dtype} of shape {info.shape}; the header contradicts itself, export it again"
        )
    return info


def _check_coverage(infos: dict[str, TensorInfo], data_bytes: int, where: str) -> None:
    for info in infos.values():
        if info.stop > data_bytes:
            raise ValueError(
                f"{where}: tensor {info.name} ends at byte {info.stop} of the data, expected at "
                f"most {data_bytes}, which is all; the file is truncated, download it again"
            )
    end = 0
    for info in sorted(infos.values(), key=lambda info: (info.start, info.stop)):
        if info.start != end:
            fault = "overlaps the tensor before it" if info.start < end else "leaves a gap"
            raise ValueError(
                f"{where}: tensor {info.name} starts at byte {info.start}, expected {end}; it "
                f"{fault}, export it again"
            )
        end = info.stop
    if end != data_bytes:
        raise ValueError(
            f"{where}: {data_bytes - end} bytes of data belong to no tensor, expected none; the "
            f"header is incomplete, export it again"
        )
