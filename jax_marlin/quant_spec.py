"""QuantSpec: the static description of one packed weight (bits, group size, logical K and N)."""

from __future__ import annotations

import dataclasses
import math
import operator

_TILE = 64  # rows and columns of a packed tile, see layout.py
_GROUP_MULTIPLE = 32  # groups end where two k16 steps of the tensor cores end


@dataclasses.dataclass(frozen=True)
class QuantSpec:
    """What a kernel must know about a weight beside its arrays; hashable, so it is pytree metadata.

    It never holds the number of experts: `jax.tree.map(lambda a: a[e], stack)`, `scan` and `vmap`
    over the expert axis keep a valid spec.

    Attributes:
        bits: 4 or 8, the width of a code.
        group_size: rows of K that share one scale, normalised: `1 <= group_size <= k`.
        k: logical reduction size, before padding to tiles.
        n: logical output features of one expert, before padding to tiles.
        shared_perm: the act-order permutation is the same for every expert, so that the activations
            are gathered once and not once for each expert.
        pair_width: gate|up columns that `shard` has paired stand in blocks of this many, each
            [part of gate | the same part of up]; None is one block, [all of gate | all of up].

    >>> QuantSpec.create(bits=4, group_size=-1, k=96, n=80)
    QuantSpec(bits=4, group_size=96, k=96, n=80, shared_perm=False, pair_width=None)
    """

    bits: int
    group_size: int
    k: int
    n: int
    shared_perm: bool = False
    pair_width: int | None = None

    @classmethod
    def create(
        cls,
        *,
        bits: int,
        group_size: int,
        k: int,
        n: int,
        shared_perm: bool = False,
        where: str = "QuantSpec",
    ) -> QuantSpec:
        """Validates and normalises; `group_size` -1 or more than `k` becomes `k` (one group).

        Args:
            bits: 4 or 8.
            group_size: -1, `k` or more, or a multiple of 32.
            k: rows of the weight, at least 1.
            n: columns of the weight, at least 1.
            shared_perm: see the class.
            where: the function or module that errors are reported for.

        Raises:
            TypeError: a size is not an integer.
            ValueError: a size is out of range; the message starts with `where`.
            NotImplementedError: 2, 3, 5, 6 or 7 bits.
        """
        bits = _integer(bits, "bits", where)
        group_size = _integer(group_size, "group_size", where)
        k = _integer(k, "k", where)
        n = _integer(n, "n", where)
        if bits in (2, 3, 5, 6, 7):
            raise NotImplementedError(
                f"{where}: bits is {bits}, expected 4 or 8; requantize the model to 4 or 8 bits"
            )
        if bits not in (4, 8):
            raise ValueError(f"{where}: bits is {bits}, expected 4 or 8")
        for name, size in (("k", k), ("n", n)):
            if size < 1:
                raise ValueError(f"{where}: {name} is {size}, expected at least 1")
        if group_size == -1 or group_size > k:
            group_size = k
        if group_size < 1 or (group_size != k and group_size % _GROUP_MULTIPLE):
            raise ValueError(
                f"{where}: group_size is {group_size}, expected -1 (one group), k = {k}, "
                f"or a multiple of {_GROUP_MULTIPLE}"
            )
        return cls(bits, group_size, k, n, bool(shared_perm))

    @property
    def num_groups(self) -> int:
        """Groups of K, G; the last one may be short."""
        return -(-self.k // self.group_size)

    @property
    def k_tiles(self) -> int:
        """64-row tiles that cover K."""
        return -(-self.k // _TILE)

    @property
    def n_tiles(self) -> int:
        """64-column tiles that cover N."""
        return -(-self.n // _TILE)

    @property
    def words_per_tile(self) -> int:
        """uint32 words of one packed 64 x 64 tile: 512 at 4 bit, 1024 at 8 bit."""
        return _TILE * _TILE * self.bits // 32

    @property
    def k_parts(self) -> int:
        """Into how many equal parts, at most, K can be cut: a part is of whole tiles and groups.

        A weight with one group has its scales in every part. A number of devices must divide this.

        >>> QuantSpec.create(bits=4, group_size=128, k=768, n=64).k_parts
        6
        """
        whole = math.lcm(_TILE, self.group_size) if self.num_groups > 1 else _TILE
        return 1 if self.k % whole else self.k // whole

    @property
    def n_parts(self) -> int:
        """Into how many equal parts, at most, N can be cut: a part is of whole tiles."""
        return 1 if self.n % _TILE else self.n // _TILE

    @property
    def pairs(self) -> int:
        """Blocks [part of gate | part of up] that the columns stand in; see `pair_width`."""
        return 1 if self.pair_width is None else self.n // self.pair_width

    def held_by(self, n_tiles: int, k_tiles: int) -> QuantSpec:
        """The spec of so many tiles: this one, or of the shard of a weight that it describes."""
        n, k = min(self.n, _TILE * n_tiles), min(self.k, _TILE * k_tiles)
        if (n, k) == (self.n, self.k):
            return self
        return dataclasses.replace(self, n=n, k=k, group_size=min(self.group_size, k))

    @property
    def pack_factor(self) -> int:
        """Codes in one 32-bit word."""
        return 32 // self.bits

    @property
    def symmetric_zero_point(self) -> int:
        """The zero point of every symmetric weight: 8 at 4 bit, 128 at 8 bit."""
        return 2 ** (self.bits - 1)


def _integer(value: object, name: str, where: str) -> int:
    """`value` as a Python int: numpy integers pass, booleans and floats do not."""
    if isinstance(value, bool):
        raise TypeError(f"{where}: {name} is {value!r}, expected an integer")
    try:
        return operator.index(value)  # pyright: ignore[reportArgumentType]
    except TypeError:
        raise TypeError(f"{where}: {name} is {value!r}, expected an integer") from None
