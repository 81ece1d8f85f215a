"""YaRN: rotary frequencies of a context longer than the model was first trained on.

Source: Peng et al., "YaRN: Efficient Context Window Extension of Large Language Models" (2023),
with the keys and defaults of `modeling_rope_utils.py` of huggingface/transformers.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_marlin.models.layers import rotate, turn

_KEYS = {
    "rope_type", "type", "rope_theta", "partial_rotary_factor", "factor", "beta_fast", "beta_slow",
    "original_max_position_embeddings", "attention_factor", "mscale", "mscale_all_dim", "truncate",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Yarn:
    """The parameters; a feature that turns slowly is slowed down by `factor`, a fast one is not.

    Attributes:
        factor: how much longer the context is than `original_context`.
        original_context: positions of the first training.
        beta_fast: features with more turns than this over the original context keep their speed.
        beta_slow: those with fewer are slowed down by `factor`; between the two it is a ramp.
        truncate: the ramp begins and ends at whole features.
        attention_factor: what cosines and sines are multiplied by.
        softmax_factor: what attention scores are multiplied by beside `head_dim**-0.5`.
    """

    factor: float
    original_context: int
    beta_fast: float
    beta_slow: float
    truncate: bool
    attention_factor: float
    softmax_factor: float

    def frequencies(self, dim: int, theta: float) -> np.ndarray:
        """Radians a position, float32 `[dim / 2]`, for rotated heads of `dim` features."""

        def feature(turns: float) -> float:
            """The pair of features that makes so many turns over the original context."""
            wavelength = self.original_context / (turns * 2 * math.pi)
            return dim * math.log(wavelength) / (2 * math.log(theta))

        first, last = feature(self.beta_fast), feature(self.beta_slow)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, dim - 1)
        pairs = np.arange(dim // 2)
        slowed = np.clip((pairs - first) / max(last - first, 0.001), 0, 1)
        plain = theta ** (-2 * pairs / dim)
        return (plain * (slowed / self.factor + 1 - slowed)).astype(np.float32)


def rotate_scaled(x: jax.Array, positions: jax.Array, theta: float, yarn: Yarn | None) -> jax.Array:
    """`layers.rotate` with YaRN's frequencies and factor, if there is one."""
    if yarn is None:
        return rotate(x, positions, theta)
    frequencies = jnp.asarray(yarn.frequencies(x.shape[-1], theta))
    return turn(x, positions, frequencies, yarn.attention_factor)


def read_yarn(config: Mapping[str, Any]) -> Yarn | None:
    """What config.json says under `rope_parameters`, or the older `rope_scaling`; None if default.

    Raises:
        ValueError: a key is unknown or has no valid value.
    """
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    if rope.get("rope_type", rope.get("type", "default")) == "default":
        return None
    if unknown := sorted(set(rope) - _KEYS):
        raise ValueError(
            f"models.load: config.json has rope parameters {unknown}, expected for yarn only "
            f"{sorted(_KEYS)}"
        )
    context = rope.get("original_max_position_embeddings") or config["max_position_embeddings"]
    positive = {"factor": rope.get("factor"), "original_max_position_embeddings": context}
    positive |= {"beta_fast": rope.get("beta_fast") or 32, "beta_slow": rope.get("beta_slow") or 1}
    for key, value in positive.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise ValueError(
                f"models.load: config.json has {key} {value!r} for yarn, expected a positive number"
            )
    factor, attention = float(positive["factor"]), rope.get("attention_factor")
    mscale, all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
    if attention is None and mscale and all_dim:
        attention = _temperature(factor, mscale) / _temperature(factor, all_dim)
    return Yarn(
        factor,
        int(context),
        float(positive["beta_fast"]),
        float(positive["beta_slow"]),
        bool(rope.get("truncate", True)),
        _temperature(factor) if attention is None else float(attention),
        _temperature(factor, all_dim) ** 2 if all_dim else 1.0,
    )


def _temperature(factor: float, mscale: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
