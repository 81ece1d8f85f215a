"""Packed stacks kept on disk, so that the next start reads them and packs nothing.

A stack, or the part of it that a process holds, is one safetensors file in a folder named after
what it was made from: the version of this package and of the layout, the config files' bytes, and
for each shard its name, header, size, and times of last modification and last change. The system
sets the time of change (ctime) whenever a file is written or replaced, and lets no program set it
back, so weights that were changed in any way, even under their old size and mtime, get a folder of
their own. A copied checkpoint does, too: that costs time, never correctness.

A file is written under another name and renamed when it is complete, so readers and writers may
come and go at once. It holds a CRC-32 of each piece of each leaf; a file with any other content
than was written is reported and made anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import tempfile
import warnings
import zlib
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import safetensors.numpy

from jax_marlin.checkpoints.safetensors_header import TensorInfo, read_header
from jax_marlin.checkpoints.workers import in_threads
from jax_marlin.host_arrays import aligned_zeros
from jax_marlin.layout import PACKED_VERSION

CACHE_VARIABLE = "JAX_MARLIN_CACHE"
_LEAVES = ("qweight", "scales", "zero_points", "perm", "bias")
_DTYPES = {
    "U32": np.uint32, "I32": np.int32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "F32": np.float32,
}  # fmt: skip
_PIECE = 2**23  # bytes that one CRC stands for, and that one thread reads at a time


def cache_directory() -> pathlib.Path:
    """`$JAX_MARLIN_CACHE`, or `jax_marlin` in `$XDG_CACHE_HOME`, by default `~/.cache`."""
    if own := os.environ.get(CACHE_VARIABLE):
        return pathlib.Path(own)
    base = pathlib.Path(os.environ.get("XDG_CACHE_HOME", ""))
    # the XDG specification has relative paths ignored
    return (base if base.is_absolute() else pathlib.Path.home() / ".cache") / "jax_marlin"


class PackedCache:
    """The stacks of one checkpoint in a cache directory."""

    def __init__(
        self, root: pathlib.Path, checkpoint: pathlib.Path, tensors: Mapping[str, TensorInfo]
    ) -> None:
        """Reads the state of the checkpoint's files; writes nothing.

        Args:
            root: the cache directory; made when something is stored.
            checkpoint: the checkpoint's directory.
            tensors: its tensors by name.
        """
        from jax_marlin import __version__

        state: list[Any] = [__version__, PACKED_VERSION]
        for path in sorted(checkpoint.glob("*config.json")):
            state.append((path.name, hashlib.sha256(path.read_bytes()).hexdigest()))
        for path in sorted({info.path for info in tensors.values()}):
            about = path.stat()
            state.append((path.name, about.st_size, about.st_mtime_ns, about.st_ctime_ns))
        for name, info in sorted(tensors.items()):
            state.append((name, info.dtype, info.shape, info.start, info.stop, info.path.name))
        self._folder = root / f"packed-{_digest(state)}"

    def load(self, key: Any) -> dict[str, np.ndarray | None] | None:
        """The leaves stored under `key`, or None; a damaged file is reported, and is None."""
        path = self._path(key)
        if not path.is_file():
            return None
        try:
            return _read(path)
        except (ValueError, KeyError, OSError) as error:
            warnings.warn(
                f"models.load: the cached {path} is damaged and will be made anew: {error}",
                stacklevel=2,
            )
            return None

    def store(self, key: Any, leaves: Mapping[str, np.ndarray | None]) -> None:
        """Writes leaves; where that fails a warning says why, since loading goes on without."""
        present = {name: leaf for name, leaf in leaves.items() if leaf is not None}
        path = self._path(key)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".writing-", dir=self._folder) as folder:
                partial = pathlib.Path(folder) / path.name
                sums = {f"crc32.{name}": _sums(name, leaf) for name, leaf in present.items()}
                safetensors.numpy.save_file(present | sums, partial)
                with partial.open("rb+") as file:
                    os.fsync(file.fileno())  # the name must not outlive a crash without the content
                partial.replace(path)
        except OSError as error:
            warnings.warn(f"models.load: cannot write the cache {path}: {error}", stacklevel=2)

    def _path(self, key: Any) -> pathlib.Path:
        return self._folder / f"{_digest(key)}.safetensors"


def _digest(state: Any) -> str:
    return hashlib.sha256(json.dumps(state, default=str).encode()).hexdigest()[:32]


def _sums(name: str, leaf: np.ndarray) -> np.ndarray:
    """uint32 [pieces + 1]: of each piece, and of what the header says."""
    data: Any = leaf.reshape(-1).view(np.uint8)  # NumPy's stubs do not tell that it is a buffer
    pieces = [zlib.crc32(data[at : at + _PIECE]) for at in range(0, data.size, _PIECE)]
    return np.array([*pieces, _header_sum(name, leaf)], np.uint32)


def _header_sum(name: str, leaf: np.ndarray) -> int:
    return zlib.crc32(f"{name} {leaf.dtype} {leaf.shape}".encode())


def _read(path: pathlib.Path) -> dict[str, np.ndarray | None]:
    infos = read_header(path)
    names = [name for name in infos if not name.startswith("crc32.")]
    if not set(names) <= set(_LEAVES) or not {"qweight", "scales"} <= set(names):
        raise ValueError(f"it holds {names}, expected {', '.join(_LEAVES)}")
    leaves: dict[str, np.ndarray | None] = dict.fromkeys(_LEAVES)
    for name in names:
        info = infos[name]
        leaf = aligned_zeros(info.shape, np.dtype(_DTYPES[info.dtype]))
        data: Any = leaf.reshape(-1).view(np.uint8)
        sums = _stored_sums(infos[f"crc32.{name}"])
        count = -(-data.size // _PIECE)
        if sums.shape != (count + 1,) or sums[-1] != _header_sum(name, leaf):
            raise ValueError(f"{name} is not as its checksum says")

        def read_piece(i: int, info=info, data=data, sums=sums, name=name) -> None:
            piece = data[i * _PIECE : (i + 1) * _PIECE]
            with path.open("rb", buffering=0) as file:
                file.seek(info.start + i * _PIECE)
                got = file.readinto(piece)
            if got != piece.size or zlib.crc32(piece) != sums[i]:
                raise ValueError(f"{name} is not as its checksum says")

        for _ in in_threads(read_piece, range(count)):
            pass
        leaves[name] = leaf
    return leaves


def _stored_sums(info: TensorInfo) -> np.ndarray:
    if info.dtype != "U32":
        raise ValueError(f"{info.name} is {info.dtype}, expected U32")
    with info.path.open("rb") as file:
        file.seek(info.start)
        return np.frombuffer(file.read(info.nbytes), np.uint32)
