"""What decoders read from a config.json: either generation of key names, or a refusal with why."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jax_marlin.models.config_keys import flag, indices, layers, names, number, section, size
from jax_marlin.models.llama3_rope import Llama3Rope
from jax_marlin.models.rope import Rope
from jax_marlin.models.yarn_rope import YarnRope

# transformers' name of an activation -> the name `moe_ffn` knows it by
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
}
# by the type that config.json names
_ROPES: dict[str, type[Rope]] = {"default": Rope, "llama3": Llama3Rope, "yarn": YarnRope}
_COMMON_ROPE_KEYS = {"rope_theta", "rope_type", "type", "partial_rotary_factor"}


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """What a decoder's arithmetic depends on; frozen and hashable, so it can be pytree metadata.

    Sizes are counts of features, heads, experts or layers. `sparse_layers[i]` says whether layer i
    is a mixture of experts (else one dense MLP of `intermediate_size`). `hidden_act` is a name of
    `moe_ffn`'s. A family that needs more derives its own class.
    """

    model_type: str
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
    rope: Rope
    qkv_bias: bool
    o_bias: bool
    tie_word_embeddings: bool
    max_position_embeddings: int
    sparse_layers: tuple[bool, ...]
    mlp_bias: bool = dataclasses.field(default=False, kw_only=True)  # of dense MLPs

    @property
    def value_head_dim(self) -> int:
        """Features of a value head."""
        return self.head_dim

    @property
    def cached(self) -> tuple[tuple[int, ...], ...]:
        """(heads, features) of each array that a layer keeps in a `KVCache`: keys, values."""
        kept = (self.num_key_value_heads, self.head_dim)
        return (kept, kept)


def decoder_fields(
    config: Mapping[str, Any], *, rms_norm_eps: float = 1e-6, rope_theta: float = 10000.0
) -> dict[str, Any]:
    """The fields of `DecoderConfig` that all families call by the same names.

    Args:
        config: the dictionary of a checkpoint's config.json.
        rms_norm_eps: the family's default, where the key is absent.
        rope_theta: the family's default, where neither generation's key is there.

    Raises:
        NotImplementedError: an unknown or partial rope, or an unknown activation.
        ValueError: a key is missing, or two keys contradict each other.
    """
    heads, kv_heads = size(config, "num_attention_heads"), size(config, "num_key_value_heads")
    if heads % kv_heads:
        raise ValueError(
            f"models.load: config.json has num_attention_heads {heads} and num_key_value_heads "
            f"{kv_heads}, expected a multiple of it"
        )
    return {
        "model_type": config["model_type"],
        "vocab_size": size(config, "vocab_size"),
        "hidden_size": size(config, "hidden_size"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": size(config, "head_dim", size(config, "hidden_size") // heads),
        "hidden_act": _activation(config),
        "rms_norm_eps": number(config, "rms_norm_eps", rms_norm_eps),
        "rope": _rope(config, rope_theta),
        "tie_word_embeddings": flag(config, "tie_word_embeddings", False),
        "max_position_embeddings": size(config, "max_position_embeddings"),
    }


def expert_counts(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields `num_experts` and `num_experts_per_tok` of a model that has experts."""
    experts, top_k = num_experts(config), size(config, "num_experts_per_tok")
    if top_k > experts:
        raise ValueError(
            f"models.load: config.json has num_experts_per_tok {top_k}, expected at most the "
            f"number of experts, {experts}"
        )
    return {"num_experts": experts, "num_experts_per_tok": top_k}


def dense_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields about MLPs of a model that has no experts."""
    return {
        "num_experts": 0,
        "num_experts_per_tok": 0,
        "intermediate_size": size(config, "intermediate_size"),
        "moe_intermediate_size": 0,
        "norm_topk_prob": False,
        "sparse_layers": (False,) * layers(config, "num_hidden_layers"),
    }


def qwen_moe_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields about MLPs as the Qwen families name them: layers may be sparse or dense."""
    check_full_attention(config)
    # Every layer's MLP is sparse except those listed or skipped by the step.
    dense = set(indices(config, "mlp_only_layers"))
    step, experts = size(config, "decoder_sparse_step", 1), num_experts(config)
    sparse = tuple(
        experts > 0 and i not in dense and (i + 1) % step == 0
        for i in range(layers(config, "num_hidden_layers"))
    )
    counts = {"num_experts": experts, "num_experts_per_tok": 0}
    return {
        **(expert_counts(config) if any(sparse) else counts),
        "intermediate_size": 0 if all(sparse) else size(config, "intermediate_size"),
        "moe_intermediate_size": size(config, "moe_intermediate_size") if any(sparse) else 0,
        "norm_topk_prob": flag(config, "norm_topk_prob", False),
        "sparse_layers": sparse,
    }


def num_experts(config: Mapping[str, Any]) -> int:
    """A key that transformers renamed; both names may stand there if they agree."""
    keys = ("num_experts", "num_local_experts", "n_routed_experts")
    values = [size(config, key, least=0) for key in keys if config.get(key) is not None]
    if len(set(values)) != 1:
        got = {key: config.get(key) for key in keys}
        raise ValueError(f"models.load: config.json has {got}, expected one number under any name")
    return values[0]


def check_full_attention(config: Mapping[str, Any]) -> None:
    """A sliding window that is written down but switched off is normal; one in use is refused."""
    used = flag(config, "use_sliding_window", False)
    windowed = used and config.get("sliding_window") is not None
    other = sorted(set(names(config, "layer_types") or ()) - {"full_attention"})
    if windowed or other:
        raise NotImplementedError(
            f"models.load: config.json asks for {other or 'a sliding window'} attention, expected "
            "full attention in every layer (use_sliding_window false); no other kind is implemented"
        )


def _activation(config: Mapping[str, Any]) -> str:
    name = config.get("hidden_act", "silu")
    if not isinstance(name, str) or name not in _ACTIVATIONS:
        raise NotImplementedError(
            f"models.load: config.json has hidden_act {name!r}, expected one of "
            f"{sorted(_ACTIVATIONS)}"
        )
    return _ACTIVATIONS[name]


def _rope(config: Mapping[str, Any], default_theta: float) -> Rope:
    """The rope, from `rope_parameters`, or the older `rope_scaling` and `rope_theta`."""
    rope = {**section(config, "rope_scaling"), **section(config, "rope_parameters")}
    rope = {key: value for key, value in rope.items() if value is not None}
    kind = rope.get("rope_type", rope.get("type", "default"))
    partial = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    if partial != 1.0 or kind not in tuple(_ROPES):
        raise NotImplementedError(
            f"models.load: config.json asks for rope parameters {rope} and partial_rotary_factor "
            f"{partial}, expected one of rope_type {sorted(_ROPES)} over whole heads; no other is "
            "implemented"
        )
    known = _COMMON_ROPE_KEYS | set(_ROPES[kind].keys)
    if set(rope) - known:
        raise NotImplementedError(
            f"models.load: config.json has rope parameters {rope}, expected for rope_type {kind!r} "
            f"only the keys {sorted(known)}"
        )
    old, new = (
        None if keys.get("rope_theta") is None else number(keys, "rope_theta")
        for keys in (config, rope)
    )
    if old is not None and new is not None and old != new:
        raise ValueError(
            f"models.load: config.json has rope_theta {old} and rope_parameters.rope_theta {new}, "
            "expected the same number"
        )
    theta = next((theta for theta in (new, old) if theta is not None), default_theta)
    return _ROPES[kind].parse(rope, theta, size(config, "max_position_embeddings"))
