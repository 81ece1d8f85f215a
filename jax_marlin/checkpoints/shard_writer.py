"""Writes tensors into safetensors files of bounded size, with an index if there are several."""

from __future__ import annotations

import json
import pathlib

import numpy as np
import safetensors.numpy


class ShardWriter:
    """Collects tensors and writes a file whenever the next one would make it too large.

    Host memory holds one file's tensors at a time.
    """

    def __init__(self, directory: pathlib.Path, max_shard_bytes: int) -> None:
        self._directory, self._limit = directory, max_shard_bytes
        self._pending: dict[str, np.ndarray] = {}
        self._names: list[list[str]] = []  # of each file written
        self._seen: set[str] = set()
        self._total = 0

    def add(self, tensors: dict[str, np.ndarray], where: str) -> None:
        """Takes the tensors of one module, which stay together in one file.

        Raises:
            ValueError: a tensor of this name was added before.
        """
        for name in tensors:
            if name in self._seen:
                raise ValueError(f"{where}: tensor {name} is given twice, expected once")
            self._seen.add(name)
        size = sum(array.nbytes for array in tensors.values())
        if self._pending and size + _size(self._pending) > self._limit:
            self._flush()
        self._pending |= tensors
        self._total += size

    def finish(self) -> None:
        """Writes what is left, and gives the files their final names."""
        self._flush()
        count = len(self._names)
        if count == 1:
            self._part(0).rename(self._directory / "model.safetensors")
            return
        weight_map = {}
        for i, names in enumerate(self._names):
            final = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
            self._part(i).rename(self._directory / final)
            weight_map |= dict.fromkeys(names, final)
        index = {"metadata": {"total_size": self._total}, "weight_map": weight_map}
        text = json.dumps(index, indent=2)
        (self._directory / "model.safetensors.index.json").write_text(text)

    def _part(self, i: int) -> pathlib.Path:
        return self._directory / f"part-{i}"

    def _flush(self) -> None:
        path = self._part(len(self._names))
        # transformers asks for this entry
        safetensors.numpy.save_file(self._pending, path, metadata={"format": "pt"})
        path.chmod(0o644)  # its own file is for the owner alone
        self._names.append(list(self._pending))
        self._pending = {}


def _size(tensors: dict[str, np.ndarray]) -> int:
    return sum(array.nbytes for array in tensors.values())
