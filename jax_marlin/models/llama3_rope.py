"""Llama 3's scaled rope: slow rotations are slowed further, so that longer contexts fit."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


@dataclasses.dataclass(frozen=True)
class Llama3Rope:
    """What config.json says beside theta; hashable. Called with frequencies, it scales them.

    A rotation that turns more than `high_freq_factor` times within the context that the model was
    first trained on stays; one that turns less than `low_freq_factor` times is slowed by `factor`;
    in between, the two are mixed in proportion to the number of turns.

    Source: `_compute_llama3_parameters` of huggingface/transformers.

    >>> rope = Llama3Rope(8.0, 1.0, 4.0, 8192)
    >>> rope(jnp.array([1.0, 1e-4])).tolist() == [1.0, jnp.float32(1e-4) / 8]
    True
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    @classmethod
    def parse(cls, rope: Mapping[str, Any]) -> "Llama3Rope":
        """Reads the dictionary `rope_scaling` or `rope_parameters` of config.json.

        Raises:
            ValueError: a key is missing or no positive number, or the limits are not in order.
        """
        values = [rope.get(key) for key in _KEYS]
        for key, value in zip(_KEYS, values, strict=True):
            if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
                raise ValueError(
                    f"models.load: config.json has {key} {value!r} for its rope of type 'llama3', "
                    "expected a positive number"
                )
        scaling = cls(*values)  # pyright: ignore[reportArgumentType]
        if not scaling.low_freq_factor < scaling.high_freq_factor:
            raise ValueError(
                f"models.load: config.json has low_freq_factor {scaling.low_freq_factor}, expected "
                f"less than high_freq_factor, {scaling.high_freq_factor}"
            )
        return scaling

    def __call__(self, frequencies: jax.Array) -> jax.Array:
        """Radians a position, float32 of any shape, to the same."""
        turns = self.original_max_position_embeddings * frequencies / (2 * math.pi)
        span = self.high_freq_factor - self.low_freq_factor
        kept = jnp.clip((turns - self.low_freq_factor) / span, 0.0, 1.0)
        return frequencies * (kept + (1.0 - kept) / self.factor)
