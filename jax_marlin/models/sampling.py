"""Choosing the next token: the likeliest, or a random one after temperature, top-k and top-p."""

import dataclasses
import math

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; a pytree, so other numbers need no other compilation.

    Attributes:
        key: None is greedy: the likeliest token, the lowest id of a tie, and nothing below counts.
        temperature: float32 scalar above 0; logits are divided by it.
        top_k: int32 scalar, only so many of the likeliest tokens stay (the lower ids of a tie).
        top_p: float32 scalar; of what top_k leaves, the fewest likeliest tokens that together reach
            this probability stay.
    """

    key: jax.Array | None = None
    temperature: jax.Array | None = None
    top_k: jax.Array | None = None
    top_p: jax.Array | None = None

    @classmethod
    def create(
        cls, temperature: float, top_k: int | None, top_p: float | None, key: jax.Array | None
    ) -> "Sampling":
        """Checks `generate`'s arguments of these names.

        Raises:
            ValueError: a number out of range, or temperature without a key.
        """
        if not (temperature >= 0 and math.isfinite(temperature)):
            raise ValueError(f"generate: temperature is {temperature}, expected 0 (greedy) or more")
        if top_k is not None and top_k < 1:
            raise ValueError(f"generate: top_k is {top_k}, expected at least 1, or None for all")
        if top_p is not None and not 0 < top_p <= 1:
            raise ValueError(f"generate: top_p is {top_p}, expected above 0 and at most 1, or None")
        if temperature == 0:
            return cls()
        if key is None:
            raise ValueError(
                f"generate: temperature {temperature} needs a key, expected "
                "key=jax.random.key(seed)"
            )
        return cls(
            key,
            jnp.float32(temperature),
            None if top_k is None else jnp.int32(min(top_k, 2**31 - 1)),
            None if top_p is None else jnp.float32(top_p),
        )

    def __call__(self, logits: jax.Array, step: jax.Array) -> jax.Array:
        """Tokens int32 `[batch]` for float32 logits `[batch, vocab]`; `step` picks the random bits.

        >>> import jax, jax.numpy as jnp
        >>> sampling = Sampling.create(1.0, 1, None, jax.random.key(0))
        >>> sampling(jnp.array([[0.0, 2.0, 1.0]]), jnp.int32(0)).tolist()
        [1]
        """
        if self.key is None or self.temperature is None:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        key, logits = jax.random.fold_in(self.key, step), logits / self.temperature
        if self.top_k is None and self.top_p is None:
            return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)
        order = jnp.argsort(-logits, axis=-1, stable=True)  # likeliest first
        ranked = jnp.take_along_axis(logits, order, axis=-1)
        if self.top_k is not None:
            rank = jnp.arange(logits.shape[-1], dtype=jnp.int32)[None, :]
            ranked = jnp.where(rank < self.top_k, ranked, -jnp.inf)
        if self.top_p is not None:
            probabilities = jax.nn.softmax(ranked, axis=-1)
            before = jnp.cumsum(probabilities, axis=-1) - probabilities  # of all likelier tokens
            ranked = jnp.where(before < self.top_p, ranked, -jnp.inf)
        chosen = jax.random.categorical(key, ranked, axis=-1)
        return jnp.take_along_axis(order, chosen[:, None], axis=-1)[:, 0].astype(jnp.int32)
