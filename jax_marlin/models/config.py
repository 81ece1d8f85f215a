"""Reads a Qwen3-MoE config.json: either generation of key names, or a refusal that says why."""

import dataclasses
from collections.abc import Mapping
from typing import Any

ARCHITECTURE = "Qwen3MoeForCausalLM"
MODEL_TYPE = "qwen3_moe"

# transformers' name of an activation -> the name `moe_ffn` knows it by
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
}
# Keys of a rope dictionary that say nothing beyond theta as long as the type is "default".
_PLAIN_ROPE_KEYS = {"rope_theta", "rope_type", "type", "partial_rotary_factor"}


@dataclasses.dataclass(frozen=True)
class Qwen3MoeConfig:
    """What Qwen3-MoE's arithmetic depends on; frozen and hashable, so it can be pytree metadata.

    Sizes are counts of features, heads, experts or layers. `sparse_layers[i]` says whether layer i
    is a mixture of experts (else one dense MLP of `intermediate_size`). `hidden_act` is a name of
    `moe_ffn`'s.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_experts: int
    num_experts_per_tok: int
    norm_topk_prob: bool
    hidden_act: str
    rms_norm_eps: float
    rope_theta: float
    attention_bias: bool
    tie_word_embeddings: bool
    max_position_embeddings: int
    sparse_layers: tuple[bool, ...]

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "Qwen3MoeConfig":
        """Checks a parsed config.json and keeps what the model needs.

        Both key generations are read (`num_experts` or `num_local_experts`, `rope_theta` or
        `rope_parameters`). Keys that Qwen3-MoE's published code does not read are ignored, as it
        ignores them; those that it reads and this model does not implement are refused.

        Args:
            config: the dictionary of a checkpoint's config.json.

        Returns:
            The configuration.

        Raises:
            NotImplementedError: another architecture, a scaled rope, a sliding window, an unknown
                activation.
            ValueError: a key is missing, or two keys contradict each other.
        """
        _check_architecture(config)
        _check_full_attention(config)
        heads = _size(config, "num_attention_heads")
        kv_heads = _size(config, "num_key_value_heads")
        if heads % kv_heads:
            raise ValueError(
                f"models.load: config.json has num_attention_heads {heads} and num_key_value_heads "
                f"{kv_heads}, expected a multiple of it"
            )
        # Every layer's MLP is sparse except those listed or skipped by the step.
        dense = set(config.get("mlp_only_layers") or ())
        step = config.get("decoder_sparse_step", 1)
        experts = _one_of(config, "num_experts", "num_local_experts")
        layers = range(_size(config, "num_hidden_layers"))
        sparse = tuple(experts > 0 and i not in dense and (i + 1) % step == 0 for i in layers)
        top_k = _size(config, "num_experts_per_tok") if any(sparse) else 0
        if top_k > experts:
            raise ValueError(
                f"models.load: config.json has num_experts_per_tok {top_k}, expected at most the "
                f"number of experts, {experts}"
            )
        return cls(
            vocab_size=_size(config, "vocab_size"),
            hidden_size=_size(config, "hidden_size"),
            intermediate_size=0 if all(sparse) else _size(config, "intermediate_size"),
            moe_intermediate_size=_size(config, "moe_intermediate_size") if any(sparse) else 0,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=config.get("head_dim") or _size(config, "hidden_size") // heads,
            num_experts=experts,
            num_experts_per_tok=top_k,
            norm_topk_prob=bool(config.get("norm_topk_prob", False)),
            hidden_act=_activation(config),
            rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            rope_theta=_rope_theta(config),
            attention_bias=bool(config.get("attention_bias", False)),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            max_position_embeddings=_size(config, "max_position_embeddings"),
            sparse_layers=sparse,
        )


def _size(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(
            f"models.load: config.json has {key} {value!r}, expected a positive integer"
        )
    return value


def _one_of(config: Mapping[str, Any], *keys: str) -> int:
    """The value of a key that transformers renamed; both names may stand there if they agree."""
    values = {config[key] for key in keys if config.get(key) is not None}
    if len(values) != 1:
        got = {key: config.get(key) for key in keys}
        raise ValueError(
            f"models.load: config.json has {got}, expected one number under either name"
        )
    return values.pop()


def _check_architecture(config: Mapping[str, Any]) -> None:
    model_type, names = config.get("model_type"), config.get("architectures")
    if model_type != MODEL_TYPE or (names is not None and ARCHITECTURE not in names):
        raise NotImplementedError(
            f"models.load: config.json has model_type {model_type!r} and architectures {names}, "
            f"expected {MODEL_TYPE!r} and {ARCHITECTURE!r}, the one model implemented so far"
        )


def _check_full_attention(config: Mapping[str, Any]) -> None:
    """A sliding window that is written down but switched off is normal; one in use is refused."""
    windowed = config.get("use_sliding_window") and config.get("sliding_window") is not None
    other = sorted(set(config.get("layer_types") or ()) - {"full_attention"})
    if windowed or other:
        raise NotImplementedError(
            f"models.load: config.json asks for {other or 'a sliding window'} attention, expected "
            "full attention in every layer (use_sliding_window false); no other kind is implemented"
        )


def _activation(config: Mapping[str, Any]) -> str:
    name = config.get("hidden_act", "silu")
    if name not in _ACTIVATIONS:
        raise NotImplementedError(
            f"models.load: config.json has hidden_act {name!r}, expected one of "
            f"{sorted(_ACTIVATIONS)}"
        )
    return _ACTIVATIONS[name]


def _rope_theta(config: Mapping[str, Any]) -> float:
    """Base of the rotary frequencies, from `rope_parameters`, or the older `rope_theta`."""
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    partial = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    if kind != "default" or partial != 1.0 or set(rope) - _PLAIN_ROPE_KEYS:
        raise NotImplementedError(
            f"models.load: config.json asks for rope parameters {rope} and partial_rotary_factor "
            f"{partial}, expected rope_type 'default' over whole heads; no other is implemented"
        )
    old, new = config.get("rope_theta"), rope.get("rope_theta")
    if old is not None and new is not None and old != new:
        raise ValueError(
            f"models.load: config.json has rope_theta {old} and rope_parameters.rope_theta {new}, "
            "expected the same number"
        )
    return float(next((theta for theta in (new, old) if theta is not None), 10000.0))
