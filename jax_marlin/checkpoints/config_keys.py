"""Keys of GPTQ, AWQ and AutoRound configs: acted on, needed to be neutral, or harmless.

Collected from GPTQModel's, AutoGPTQ's, transformers' and auto-round's writers. A key in none of the
three lists is refused by name, since ignoring it could change the result.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping

REMEDY = "export the model with GPTQModel as 4 or 8 bit, format gptq"

PER_MODULE = frozenset("bits group_size sym desc_act".split())
ACTED_ON = PER_MODULE | set("dynamic quant_method method format checkpoint_format".split())

# key -> the values under which it changes nothing
NEUTRAL: dict[str, tuple] = {
    "act_bits": (None, 16, 32),  # quantized activations
    "adapter": (None, {}),  # a LoRA beside the weights
    "data_type": (None, "int"),
    "extra_config": (None, {}),  # auto-round's own form of `dynamic`
    "is_marlin_format": (None, False),
    "kv_cache_scheme": (None, {}),
    "pack_dtype": (None, "int32"),
    "packing_format": (None, "auto_round:auto_gptq"),
    "rotation": (None, False, ""),
    "static_attention_dtype": (None,),
    "static_kv_dtype": (None,),
    "super_bits": (None,),  # scales that are themselves quantized
    "super_group_size": (None,),
    "transform_config": (None, {}),
}

# How and with what the weights were calibrated, and hints for other runtimes. Keys that say which
# modules are quantized (lm_head, modules_to_not_convert, ...) stand here too: the tensors say that.
HARMLESS = frozenset(
    """
    act_data_type act_dynamic act_group_aware act_group_size act_sym amp
    auto_forward_data_parallel autoround_version backend batch_size block_name_to_quantize
    cache_block_outputs damp_auto_increment damp_percent dataset dense_vram_strategy device
    disable_exllama disable_opt_rtn do_fuse duo_scaling enable_alg_ext enable_minmax_tuning
    enable_norm_bias_tuning enable_quanted_input enable_torch_compile exllama_config fail_safe
    fallback foem fuse_max_seq_len gptaq gptaq_alpha gradient_accumulate_steps hessian hyb_act
    iters lm_head low_cpu_mem_usage low_gpu_mem_usage lr max_input_length meta minmax_lr
    model_file_base_name model_name_or_path model_seqlen module_name_preceding_first_block
    modules_in_block_to_quantize modules_to_fuse modules_to_not_convert moe momentum mse nblocks
    not_use_best_mse nsamples offload_to_disk offload_to_disk_path pack_impl pad_token_id
    parallel_packing provider quant_block_list quant_lm_head quant_nontext_module scale_dtype
    seqlen static_attention_granularity static_groups static_kv_granularity supported_types
    to_quant_block_names tokenizer true_sequential use_cuda_fp16 use_exllama v2 vram_strategy
    """.split()
)


def check_known(raw: Mapping, known: Collection[str], where: str) -> None:
    """Raises for a key of `raw` that is not in `known`."""
    for key, value in raw.items():
        if key not in known:
            raise ValueError(
                f"{where}: unknown key {key!r} (value {value!r}), expected one of "
                f"{', '.join(known)}; remove it if it changes nothing"
            )


def warn_activations(where: str, what: str) -> None:
    """Warns that the config wants activations quantized, which the ops here never do."""
    warnings.warn(
        f"{where}: activations are to be quantized {what}; jax_marlin quantizes weights alone, "
        f"so results are closer to the original model",
        stacklevel=2,
    )


def check_keys(raw: Mapping, acted_on: frozenset[str], where: str) -> None:
    """Raises for a key of `raw` that is unknown or has a value that would change the result.

    Raises:
        ValueError: an unknown key.
        NotImplementedError: a known key with a value that is not neutral.
    """
    for key, value in raw.items():
        if key in NEUTRAL:
            if value not in NEUTRAL[key]:
                neutral = " or ".join(repr(option) for option in NEUTRAL[key])
                raise NotImplementedError(
                    f"{where}: {key} is {value!r}, expected {neutral}; {REMEDY}"
                )
        elif key not in acted_on and key not in HARMLESS:
            raise ValueError(
                f"{where}: unknown key {key!r} (value {value!r}), expected keys known to keep or "
                f"not to change the result; remove it if it changes nothing"
            )
