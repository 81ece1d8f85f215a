"""A decoder language model of any family: embedding, layers, logits, with a KV cache or without."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from jax_marlin.models.config import DecoderConfig
from jax_marlin.models.decoder_layer import DecoderLayer
from jax_marlin.models.layers import DenseLinear, KVCache, Linear, linear_float32, rms_norm

_POSITIONS = 128  # a cache holds a multiple of this many


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class CausalLM:
    """A language model of any supported family; a pytree: pass it through `jax.jit` as an argument.

    `model(input_ids)` gives the logits of every position. Packed weights stay packed.

    >>> import jax, numpy as np, jax_marlin as jm
    >>> from jax_marlin.data import bundled_checkpoint
    >>> model = jm.models.load(bundled_checkpoint(), dtype="float32")
    >>> logits = jax.jit(lambda model, ids: model(ids))(model, np.array([[3, 1, 4], [1, 5, 9]]))
    >>> logits.shape, logits.dtype
    ((2, 3, 512), dtype('float32'))
    """

    embed_tokens: jax.Array  # [vocab, H]
    layers: tuple[DecoderLayer, ...]
    norm: jax.Array  # [H]
    lm_head: Linear | None  # [H, vocab]; None: the embedding, transposed
    config: DecoderConfig = dataclasses.field(metadata={"static": True})

    @property
    def dtype(self) -> jnp.dtype:
        """The compute dtype."""
        return self.embed_tokens.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of all weights as they lie in memory, packed ones packed."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))

    def __call__(self, input_ids: jax.typing.ArrayLike) -> jax.Array:
        """Logits of every position.

        Args:
            input_ids: integers `[batch, seq]`, every row from position 0 and without padding. In a
                host array an id outside the vocabulary raises; on the device it is clamped into it.

        Returns:
            float32 `[batch, seq, vocab]`.

        Raises:
            TypeError: input_ids are not integers.
            ValueError: input_ids are not `[batch, seq]`.
            IndexError: an id in a host array is outside the vocabulary.
        """
        input_ids = check_ids(input_ids, self.config.vocab_size, "CausalLM")
        return _logits_of_all(self, input_ids)

    def empty_cache(self, batch: int, capacity: int) -> KVCache:
        """A cache of zeros for `capacity` positions of `batch` sequences, and a few more.

        Rounded up, positions divide evenly among the parts in which a GPU sums over them; XLA
        would copy the whole cache into one that is.
        """
        capacity = -(-capacity // _POSITIONS) * _POSITIONS
        shapes = [(batch, *heads, capacity, features) for *heads, features in self.config.cached]
        layers = tuple(tuple(jnp.zeros(shape, self.dtype) for shape in shapes) for _ in self.layers)
        return KVCache(layers, length=jnp.zeros((), jnp.int32))

    def extend(
        self,
        input_ids: jax.Array,
        cache: KVCache,
        lengths: jax.Array | None = None,
        *,
        empty: bool = False,
    ) -> tuple[jax.Array, KVCache]:
        """Reads further tokens into the cache.

        Args:
            input_ids: integers `[batch, seq]`, at positions `cache.length` and up. The caller
                sees to it that they fit: an overflow on the device goes unnoticed here.
            cache: what earlier calls returned; donate it.
            lengths: int32 `[batch]`, how many ids of each row count, from the left, at least 1;
                from then on each row of the cache has its own length. None: all of them.
            empty: the cache holds nothing, whatever its length says: a prompt then attends to
                itself alone, and not to the whole capacity.

        Returns:
            float32 `[batch, vocab]`, the logits of the last position that counts, and the new
            cache.
        """
        batch, seq = input_ids.shape
        if empty:
            hidden, new = self._hidden(input_ids, None)
            cache = cache.begun(new)
            if lengths is None:
                return self._logits(hidden[:, -1]), cache
            cache = dataclasses.replace(cache, length=lengths)
            return self._logits(_last(hidden, lengths)), cache
        if lengths is None and cache.length.ndim == 0:
            hidden, cache = self._hidden(input_ids, cache)
            return self._logits(hidden[:, -1]), cache
        start = jnp.broadcast_to(cache.length, (batch,))
        counted = jnp.full((batch,), seq, jnp.int32) if lengths is None else lengths
        hidden, cache = self._hidden_of_rows(input_ids, dataclasses.replace(cache, length=start))
        # What was read past a row's length is never seen: the next tokens are written over it.
        cache = dataclasses.replace(cache, length=start + counted)
        return self._logits(_last(hidden, counted)), cache

    def _hidden(self, input_ids: jax.Array, cache: KVCache | None) -> tuple[jax.Array, KVCache]:
        eps, kept = self.config.rms_norm_eps, []
        start = None if cache is None else cache.length
        x = jnp.take(self.embed_tokens, input_ids, axis=0, mode="clip")  # [batch, seq, H]
        for i, layer in enumerate(self.layers):
            past = None if cache is None else cache.layers[i]
            with jax.named_scope("norms"):
                normed = rms_norm(x, layer.input_layernorm, eps)
            with jax.named_scope("self_attn"):
                attended, keeps = layer.self_attn(normed, past, start)
            with jax.named_scope("norms"):
                x = x + attended
                normed = rms_norm(x, layer.post_attention_layernorm, eps)
            with jax.named_scope("mlp"):
                x = x + layer.mlp(normed)
            kept.append(keeps)
        seq = jnp.int32(input_ids.shape[1])
        cache = KVCache(tuple(kept), length=seq if start is None else start + seq)
        with jax.named_scope("norms"):
            return rms_norm(x, self.norm, eps), cache

    def _hidden_of_rows(self, input_ids: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
        """`_hidden` for a cache whose `length` is `[batch]`: each row is a batch of one."""

        def one(ids: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
            length = cache.length
            row = dataclasses.replace(jax.tree.map(lambda a: a[None], cache), length=length)
            hidden, row = self._hidden(ids[None], row)
            length = row.length
            kept = jax.tree.map(lambda a: a[0], dataclasses.replace(row, length=length[None]))
            return hidden[0], kept

        return jax.vmap(one)(input_ids, cache)

    def _logits(self, hidden: jax.Array) -> jax.Array:
        head = DenseLinear(self.embed_tokens) if self.lm_head is None else self.lm_head
        with jax.named_scope("lm_head"):
            return linear_float32(hidden, head)


def _last(hidden: jax.Array, lengths: jax.Array) -> jax.Array:
    """Of each row the position before its length: `[batch, H]`."""
    return jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]


@functools.partial(jax.jit, inline=True)
def _logits_of_all(model: CausalLM, input_ids: jax.Array) -> jax.Array:
    """Jitted also where the caller is not: one compilation in place of hundreds of small ones."""
    hidden, _ = model._hidden(input_ids, None)
    return model._logits(hidden)


def check_ids(input_ids: jax.typing.ArrayLike, vocab_size: int, where: str) -> jax.Array:
    """Token ids as an int32 array `[batch, seq]`; see `CausalLM.__call__` for what it refuses."""
    on_host = not isinstance(input_ids, jax.Array)
    ids = np.asarray(input_ids) if on_host else input_ids
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise TypeError(f"{where}: input_ids have dtype {ids.dtype}, expected integers")
    if ids.ndim != 2 or 0 in ids.shape:
        raise ValueError(
            f"{where}: input_ids have shape {ids.shape}, expected (batch, seq), both at least 1"
        )
    if on_host and (ids.min() < 0 or ids.max() >= vocab_size):
        raise IndexError(
            f"{where}: input_ids range over {ids.min()}..{ids.max()}, expected 0..{vocab_size - 1}"
        )
    return jnp.asarray(ids).astype(jnp.int32)
