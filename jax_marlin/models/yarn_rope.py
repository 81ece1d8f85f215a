"""YaRN: rotary frequencies of a context longer than the model was first trained on.

Source: Peng et al., "YaRN: Efficient Context Window Extension of Large Language Models" (2023),
with the keys and defaults of `modeling_rope_utils.py` of huggingface/transformers.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import numpy as np

from jax_marlin.models.config_keys import flag
from jax_marlin.models.rope import Rope, positive_number

_REQUIRED = ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow")
_OPTIONAL = ("attention_factor", "mscale", "mscale_all_dim")


@dataclasses.dataclass(frozen=True)
class YarnRope(Rope):
    """A feature that turns slowly is slowed down by `factor`, a fast one is not.

    Attributes:
        factor: how much longer the context is than `original_context`.
        original_context: positions of the first training.
        beta_fast: features with more turns than this over the original context keep their speed.
        beta_slow: those with fewer are slowed down by `factor`; between the two it is a ramp.
        truncate: the ramp begins and ends at whole features.
        given_factor: `attention_factor`, where config.json has that key.
        mscale: with mscale_all_dim, what `attention_factor` follows from otherwise.
        mscale_all_dim: also what `softmax_factor` follows from.
    """

    keys: ClassVar[tuple[str, ...]] = (*_REQUIRED, "truncate", *_OPTIONAL)

    factor: float
    original_context: float
    beta_fast: float
    beta_slow: float
    truncate: bool
    given_factor: float | None
    mscale: float | None
    mscale_all_dim: float | None

    @classmethod
    def parse(cls, rope: Mapping[str, Any], theta: float, context: int) -> Self:
        """As `Rope.parse`; only `factor` must be there."""
        defaults = {"original_max_position_embeddings": context, "beta_fast": 32, "beta_slow": 1}
        given = defaults | dict(rope)
        required = (positive_number(given, key, "yarn") for key in _REQUIRED)
        # 0 stands for an absent key.
        optional = (positive_number(rope, k, "yarn") if rope.get(k) else None for k in _OPTIONAL)
        if not theta > 1:  # its logarithm is divided by
            raise ValueError(
                f"models.load: config.json has rope_theta {theta} for its rope of type 'yarn', "
                "expected more than 1"
            )
        values: list[Any] = [*required, flag(rope, "truncate", True), *optional]
        return cls(theta, *values)

    def frequencies(self, dim: int) -> np.ndarray:
        """Radians a position, float64 `[dim / 2]`."""

        def feature(turns: float) -> float:
            """The pair of features that makes so many turns over the original context."""
            wavelength = self.original_context / (turns * 2 * math.pi)
            return dim * math.log(wavelength) / (2 * math.log(self.theta))

        first, last = feature(self.beta_fast), feature(self.beta_slow)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, dim - 1)
        slowed = np.clip((np.arange(dim // 2) - first) / max(last - first, 0.001), 0, 1)
        return super().frequencies(dim) * (slowed / self.factor + 1 - slowed)

    @property
    def attention_factor(self) -> float:
        """What cosines and sines are multiplied by."""
        if self.given_factor is not None:
            return self.given_factor
        if self.mscale is not None and self.mscale_all_dim is not None:
            return self._temperature(self.mscale) / self._temperature(self.mscale_all_dim)
        return self._temperature(1.0)

    @property
    def softmax_factor(self) -> float:
        """What DeepSeek's attention scores are multiplied by beside `head_dim**-0.5`."""
        return 1.0 if self.mscale_all_dim is None else self._temperature(self.mscale_all_dim) ** 2

    def _temperature(self, mscale: float) -> float:
        return 1.0 if self.factor <= 1 else 0.1 * mscale * math.log(self.factor) + 1.0
