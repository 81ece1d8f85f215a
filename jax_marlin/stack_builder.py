"""StackBuilder: fills one preallocated expert stack on the host, one expert at a time."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Collection, Sequence

import jax
import numpy as np
from jax.typing import DTypeLike

from jax_marlin.canonical import SCALE_DTYPES, CanonicalLinear, is_identity, same_perm
from jax_marlin.host_arrays import aligned_zeros
from jax_marlin.layout import TILE, pack_columns
from jax_marlin.pack_canonical import pack_canonical
from jax_marlin.quant_spec import QuantSpec
from jax_marlin.weights import MarlinExpertStack


class StackBuilder:
    """Packs experts into the leaves of one stack; beside it the host holds what is set at once.

    The optional leaves (zero_points, perm, bias) come into being with the first expert that needs
    them; experts before and after hold the neutral value (`2**(bits - 1)`, the identity, zero).

    >>> import numpy as np
    >>> spec = QuantSpec.create(bits=4, group_size=32, k=64, n=80)
    >>> builder = StackBuilder(2, spec, np.float32)
    >>> codes, scales = np.full((64, 80), 11, np.uint8), np.ones((2, 80), np.float32)
    >>> weight = CanonicalLinear.from_codes(codes, scales, bits=4)
    >>> builder.set_expert(0, weight)
    >>> builder.set_expert(1, weight)
    >>> float(builder.finish().dequantize()[1, 5, 7])
    3.0
    """

    def __init__(
        self,
        num_experts: int,
        spec: QuantSpec,
        dtype: DTypeLike,
        optional_leaves: Collection[str] = (),
    ) -> None:
        """Reserves the leaves; the memory is touched only when an expert is written.

        Args:
            num_experts: E, at least 1; a dense weight is a stack of one.
            spec: what every expert is.
            dtype: compute dtype (float16, bfloat16 or float32) of scales, zero points and bias.
            optional_leaves: those of zero_points, perm and bias that exist in any case, so that
                the parts of one stack that several processes build have the same ones.

        Raises:
            ValueError: `num_experts` is below 1.
            TypeError: `dtype` is not a compute dtype.
        """
        if num_experts < 1:
            raise ValueError(f"StackBuilder: num_experts is {num_experts}, expected at least 1")
        self._dtype = np.dtype(dtype)
        if self._dtype not in SCALE_DTYPES:
            raise TypeError(
                f"StackBuilder: dtype is {self._dtype}, expected float16, bfloat16 or float32"
            )
        self._num_experts = num_experts
        self._spec = spec
        tiles = (num_experts, spec.n_tiles, spec.k_tiles, spec.words_per_tile)
        self._leaves: dict[str, np.ndarray | None] | None = {
            "qweight": aligned_zeros(tiles, np.dtype(np.uint32)),
            "scales": aligned_zeros(self._scales_shape, self._dtype),
            "zero_points": None,
            "perm": None,
            "bias": None,
        }
        self._written = np.zeros((num_experts, spec.n_tiles), bool)
        self._adding = threading.Lock()
        for name in optional_leaves:
            self._optional_leaf(name)

    @property
    def _scales_shape(self) -> tuple[int, ...]:
        return (self._num_experts, self._spec.n_tiles, self._spec.num_groups, TILE)

    def set_expert(
        self,
        e: int,
        canonical: CanonicalLinear,
        where: str | None = None,
        columns: slice | None = None,
    ) -> None:
        """Packs one expert, or some of its columns; threads may set different experts at once.

        Args:
            e: which expert, 0 <= e < E.
            canonical: its weight; [K, N], or [K, stop - start] with `columns`.
            where: the module that errors are reported for.
            columns: the columns to write, so that gate and up need not be joined first; starts at a
                multiple of 64 and ends at one, or at N.

        Raises:
            IndexError: no such expert.
            TypeError: an array of the weight has the wrong dtype.
            ValueError: the weight does not fit the spec, a scale overflows the compute dtype,
                `columns` are off the tiles, or two column ranges have different permutations.
        """
        where = f"StackBuilder.set_expert({e})" if where is None else where
        self.set_experts(range(e, e + 1), [canonical], [where], columns)

    def set_experts(
        self,
        experts: range,
        weights: Sequence[CanonicalLinear],
        wheres: Sequence[str],
        columns: slice | None = None,
    ) -> None:
        """`set_expert` of experts that follow one another; small ones are packed sooner together.

        Args:
            experts: which, one after the other, each 0 <= e < E.
            weights: of each.
            wheres: of each the module that errors are reported for.
            columns: see `set_expert`.

        Raises:
            IndexError, TypeError, ValueError: as `set_expert`.
        """
        leaves = self._open_leaves()
        start, stop = _column_range(columns, self._spec.n, wheres[0])
        spec = dataclasses.replace(self._spec, n=stop - start)
        tiles = slice(start // TILE, start // TILE + spec.n_tiles)
        if experts.step != 1:
            raise ValueError(f"{wheres[0]}: experts are {experts}, expected a step of 1")
        for e, canonical, where in zip(experts, weights, wheres, strict=True):
            if not 0 <= e < self._num_experts:
                raise IndexError(f"{where}: expert {e} is outside 0..{self._num_experts - 1}")
            canonical.check(spec, where)
        for e, canonical, where in zip(experts, weights, wheres, strict=True):
            self._set_groups(e, canonical, where, spec, tiles, slice(start, stop))
        packed = leaves["qweight"][experts.start : experts.stop, tiles]
        pack_canonical(weights, spec, packed)
        self._written[experts.start : experts.stop, tiles] = True

    def _set_groups(
        self,
        e: int,
        canonical: CanonicalLinear,
        where: str,
        spec: QuantSpec,
        tiles: slice,
        columns: slice,
    ) -> None:
        """Writes all of an expert but its codes."""
        leaves, neutral = self._open_leaves(), spec.symmetric_zero_point
        others = np.delete(self._written[e], tiles)
        self._set_perm(e, canonical.perm, bool(others.any()), where)
        scales = self._cast(canonical.scales, "scales", where)
        leaves["scales"][e, tiles] = pack_columns(_pad_columns(scales, 0))
        if canonical.zero_points is not None:
            leaf = self._optional_leaf("zero_points")
            leaf[e, tiles] = pack_columns(_pad_columns(canonical.zero_points, neutral))
        elif leaves["zero_points"] is not None:
            leaves["zero_points"][e, tiles] = neutral
        if canonical.bias is not None:
            bias = self._cast(canonical.bias, "bias", where)
            leaf = self._optional_leaf("bias")
            leaf[e, columns] = bias
        elif leaves["bias"] is not None:
            leaves["bias"][e, columns] = 0

    def finish(self) -> MarlinExpertStack:
        """Moves the leaves to the default device one by one, freeing the host's; ends the builder.

        On a CPU the aligned leaves are handed over without a copy.

        Raises:
            ValueError: experts or columns were never set, or `finish` was called before.
        """
        leaves, spec = self.take_leaves()
        arrays = {}
        for name in list(leaves):
            leaf = leaves.pop(name)
            # waiting here lets the host's copy go before the next leaf starts to travel
            arrays[name] = (
                None
                if leaf is None
                else jax.block_until_ready(jax.device_put(leaf, may_alias=True))
            )
        return MarlinExpertStack(**arrays, spec=spec)

    def take_leaves(self) -> tuple[dict[str, np.ndarray | None], QuantSpec]:
        """The leaves on the host by name, and the spec, which says if perm is shared; as `finish`.

        Raises:
            ValueError: as `finish`.
        """
        leaves = self._open_leaves()
        missing = np.flatnonzero(~self._written.any(axis=1)).tolist()
        if missing:
            raise ValueError(f"StackBuilder.finish: missing experts {missing}")
        partial = np.flatnonzero(~self._written.all(axis=1)).tolist()
        if partial:
            raise ValueError(f"StackBuilder.finish: experts {partial} lack some of their columns")
        perm = leaves["perm"]
        shared = perm is not None and bool((perm == perm[:1]).all())
        self._leaves = None
        return leaves, dataclasses.replace(self._spec, shared_perm=shared)

    def _open_leaves(self) -> dict:
        if self._leaves is None:
            raise ValueError("StackBuilder: finish() was already called; start a new builder")
        return self._leaves

    def _optional_leaf(self, name: str) -> np.ndarray:
        """The leaf, made if it is not there, with the neutral value for every expert."""
        leaves, spec = self._open_leaves(), self._spec
        shape, dtype, neutral = {
            "zero_points": (self._scales_shape, self._dtype, spec.symmetric_zero_point),
            "perm": (
                (self._num_experts, spec.k),
                np.dtype(np.int32),
                np.arange(spec.k, dtype=np.int32),
            ),
            "bias": ((self._num_experts, spec.n), self._dtype, 0),
        }[name]
        with self._adding:
            if leaves[name] is None:
                leaf = aligned_zeros(shape, dtype)
                leaf[...] = neutral
                leaves[name] = leaf
            return leaves[name]

    def _set_perm(self, e: int, perm: np.ndarray | None, must_agree: bool, where: str) -> None:
        leaf = self._open_leaves()["perm"]
        if must_agree and not same_perm(perm, None if leaf is None else leaf[e]):
            raise ValueError(
                f"{where}: these columns have another act-order permutation (g_idx) than the "
                f"columns of expert {e} set before; keep gate and up as a pair of stacks"
            )
        if leaf is None and is_identity(perm):
            return
        leaf = self._optional_leaf("perm")
        leaf[e] = np.arange(self._spec.k) if perm is None else perm

    def _cast(self, a: np.ndarray, name: str, where: str) -> np.ndarray:
        if a.dtype == self._dtype:
            return a
        with np.errstate(over="ignore"):
            cast = a.astype(self._dtype)
        if not np.isfinite(cast).all():
            largest = float(np.abs(a.astype(np.float32)).max())
            raise ValueError(
                f"{where}: {name} up to {largest:g} overflow {self._dtype}; use dtype=bfloat16 "
                "or float32"
            )
        return cast


def _column_range(columns: slice | None, n: int, where: str) -> tuple[int, int]:
    if columns is None:
        return 0, n
    start = 0 if columns.start is None else columns.start
    stop = n if columns.stop is None else columns.stop
    aligned = start % TILE == 0 and (stop % TILE == 0 or stop == n) and columns.step in (None, 1)
    if not (aligned and 0 <= start < stop <= n):
        raise ValueError(
            f"{where}: columns are {start}:{stop} of {n}, expected multiples of {TILE} or the end; "
            "join the parts with canonical.concat_columns and set the whole expert"
        )
    return start, stop


def _pad_columns(a: np.ndarray, value: int) -> np.ndarray:
    """[G, n] to [G, a multiple of 64]."""
    fill = -a.shape[1] % TILE
    return np.pad(a, ((0, 0), (0, fill)), constant_values=value) if fill else a
