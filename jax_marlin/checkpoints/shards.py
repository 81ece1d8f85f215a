"""The safetensors files of a checkpoint: which file holds a tensor, and reading that one tensor."""

from __future__ import annotations

import contextlib
import pathlib
import re

import ml_dtypes  # also registers "bfloat16": without it safetensors cannot return BF16 arrays
import numpy as np
import safetensors

from jax_marlin.checkpoints import json_file
from jax_marlin.checkpoints.safetensors_header import TensorInfo, read_bytes, read_header

# What safetensors finds no NumPy dtype for
_SMALL_FLOATS = {"F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E8M0": ml_dtypes.float8_e8m0fnu}
_NUMBERED = re.compile(r"(?P<stem>.+)-(?P<part>\d{5})-of-(?P<total>\d{5})\.safetensors")
_MAX_NAME_BYTES = 255  # of a file system


class Shards:
    """Tensors by name over all files; headers are read at once, data only in `read`."""

    def __init__(self, directory: pathlib.Path) -> None:
        weight_map, paths = _find_files(directory)
        self.paths = tuple(paths)
        self.tensors: dict[str, TensorInfo] = {}
        self._open_files: dict[pathlib.Path, safetensors.safe_open] = {}
        self._exit = contextlib.ExitStack()
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
        """Reads one tensor in its stored dtype (BF16 as `ml_dtypes.bfloat16`) and shape."""
        info = self.tensors[name]
        if info.dtype in _SMALL_FLOATS:
            return read_bytes(info).view(_SMALL_FLOATS[info.dtype]).reshape(info.shape)
        try:
            file = self._open_files.get(info.path)
            if file is None:
                file = self._exit.enter_context(
                    safetensors.safe_open(str(info.path), framework="numpy")
                )
                self._open_files[info.path] = file
            return file.get_tensor(name)
        except (safetensors.SafetensorError, TypeError) as error:
            raise ValueError(
                f"Checkpoint: {info.path}: tensor {name} ({info.dtype}) unreadable: {error}"
            ) from error

    def close(self) -> None:
        self._open_files.clear()
        self._exit.close()


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
