"""The safetensors files of a checkpoint: which file holds a tensor, and reading that one tensor."""

from __future__ import annotations

import pathlib
import re
from typing import Any

import ml_dtypes
import numpy as np

from jax_marlin.checkpoints import json_file
from jax_marlin.checkpoints.safetensors_header import TensorInfo, read_header

_DTYPES = {
    "BOOL": np.bool_, "U8": np.uint8, "I8": np.int8, "U16": np.uint16, "I16": np.int16,
    "U32": np.uint32, "I32": np.int32, "U64": np.uint64, "I64": np.int64,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu, "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
    "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
    "F16": np.float16, "BF16": ml_dtypes.bfloat16, "F32": np.float32, "F64": np.float64,
    "C64": np.complex64,
}  # fmt: skip
_MOST_AT_ONCE = 2**30  # bytes that every system reads in one call
_NUMBERED = re.compile(r"(?P<stem>.+)-(?P<part>\d{5})-of-(?P<total>\d{5})\.safetensors")
_MAX_NAME_BYTES = 255  # of a file system


class Shards:
    """Tensors by name over all files; headers are read at once, data only in `read`.

    Data is read, not mapped: pages of a mapped file count as memory of the process until the system
    wants them back, and a peak that grows with the file cannot be told from a leak.
    """

    def __init__(self, directory: pathlib.Path) -> None:
        weight_map, paths = _find_files(directory)
        self.paths = tuple(paths)
        self.tensors: dict[str, TensorInfo] = {}
        for path in paths:
            for name, info in read_header(path).items():
                if name in self.tensors:
                    raise ValueError(
                        f"open_checkpoint: tensor {name} is in both "
                        f"{self.tensors[name].path.name} and {path.name} of "
                        f"{directory}; which one is right? Export the checkpoint again"
                    )
                self.tensors[name] = info
        for name, file_name in weight_map.items():
            info = self.tensors.get(name)
            if info is None or info.path.name != file_name:
                found = "in no file" if info is None else f"in {info.path.name}"
                raise ValueError(
                    f"open_checkpoint: tensor {name} is {found} of {directory}, expected in "
                    f"{file_name} as the index says; download index and files from one export"
                )

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.tensors.values())

    def read(self, name: str) -> np.ndarray:
        """Reads one tensor in its stored dtype (BF16 as `ml_dtypes.bfloat16`) and shape.

        Threads may read at the same time.

        Raises:
            ValueError: NumPy has no such dtype, or the file was changed since it was opened.
        """
        info = self.tensors[name]
        where = f"Checkpoint: {info.path}: tensor {name} ({info.dtype})"
        if info.dtype not in _DTYPES:
            raise ValueError(f"{where} has a dtype that NumPy lacks, expected {', '.join(_DTYPES)}")
        data = np.empty(info.nbytes, np.uint8)
        view: Any = data  # NumPy's stubs do not tell that an array is a buffer
        done = 0
        try:
            with info.path.open("rb", buffering=0) as file:
                file.seek(info.start)
                while done < info.nbytes:
                    got = file.readinto(view[done : done + _MOST_AT_ONCE])
                    if not got:
                        break
                    done += got
        except OSError as error:
            raise ValueError(f"{where} is unreadable: {error}") from error
        if done < info.nbytes:
            raise ValueError(
                f"{where} has {done} bytes, expected {info.nbytes}; the file was changed, open the "
                f"checkpoint again"
            )
        return data.view(_DTYPES[info.dtype]).reshape(info.shape)


def _find_files(directory: pathlib.Path) -> tuple[dict[str, str], list[pathlib.Path]]:
    """The index's weight_map (empty without an index) and the files to read, in name order."""
    if not directory.is_dir():
        raise ValueError(
            f"open_checkpoint: {directory} is not a directory; pass the folder that holds "
            f"config.json"
        )
    indexes = sorted(directory.glob("*.safetensors.index.json"))
    if len(indexes) > 1:
        raise ValueError(
            f"open_checkpoint: {directory} has {len(indexes)} index files, expected one; remove "
            f"the others"
        )
    if indexes:
        weight_map = _read_weight_map(indexes[0])
        paths = [directory / name for name in sorted(set(weight_map.values()))]
    else:
        weight_map, paths = {}, _without_index(directory)
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise ValueError(f"open_checkpoint: {directory} lacks the files {missing}; download them")
    return weight_map, paths


def _read_weight_map(index: pathlib.Path) -> dict[str, str]:
    weight_map = json_file.read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(
            f"open_checkpoint: {index}: weight_map is {weight_map!r}, expected tensor names to "
            f"file names"
        )
    for name, file_name in weight_map.items():
        # A plain name only: a checkpoint must not make us read outside its own folder.
        if (
            not isinstance(file_name, str)
            or pathlib.PurePath(file_name).name != file_name
            or "\\" in file_name
            or len(file_name.encode(errors="replace")) > _MAX_NAME_BYTES
        ):
            raise ValueError(
                f"open_checkpoint: {index}: file of tensor {name} is {file_name!r}, expected a "
                f"plain file name of at most {_MAX_NAME_BYTES} bytes"
            )
    return weight_map


def _without_index(directory: pathlib.Path) -> list[pathlib.Path]:
    found = sorted(directory.glob("*.safetensors"))
    single = directory / "model.safetensors"
    if single in found:
        return [single]
    if not found:
        raise ValueError(
            f"open_checkpoint: {directory} has no .safetensors file; convert .bin or .pt weights "
            f"to safetensors first"
        )
    parts = [_NUMBERED.fullmatch(path.name) for path in found]
    if len(found) == 1 and parts[0] is None:
        return found
    if (
        any(part is None for part in parts)
        or len({(part["stem"], part["total"]) for part in parts if part}) != 1
    ):
        names = [path.name for path in found]
        raise ValueError(
            f"open_checkpoint: {directory} has {names} and no index; which files belong together?"
        )
    first = next(part for part in parts if part)
    # The numbered set is named in full, so that a file that is not there is reported as missing.
    total = int(first["total"])
    return [
        directory / f"{first['stem']}-{part:05d}-of-{total:05d}.safetensors"
        for part in range(1, total + 1)
    ]
