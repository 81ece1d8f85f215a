"""Bad GPTQ tensors: each is refused with a message that helps, beside a twin that is accepted."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gptq_tensors import random_tensors, stacked

from jax_marlin.gptq import load_gptq, load_gptq_stacked
from jax_marlin.weights import MarlinLinear

K, N = 128, 96  # group size 32: 4 groups, 16 rows of words, 12 columns of words


def arguments(**changes) -> dict[str, Any]:
    """Good arguments of load_gptq, with changes."""
    tensors, options, _ = random_tensors(np.random.default_rng(1), k=K, n=N, zeros="v1")
    return tensors | options | {"n": N} | changes


GOOD = arguments()
WORDS, SCALES, QZEROS = GOOD["qweight"], GOOD["scales"], GOOD["qzeros"]
GROUPS = np.arange(K, dtype=np.int32) // 32
SHUFFLED = np.random.default_rng(2).permutation(GROUPS)


def changed(a, place, value):
    a = a.copy()
    a[place] = value
    return a


def constant_zeros(stored):
    return np.full(QZEROS.shape, stored * 0x11111111, np.uint32)


# name: (what is wrong, error, message, what the twin has instead)
CASES = {
    "qweight_of_another_k": (
        {"k": 256},
        ValueError,
        "load_gptq: qweight has shape (16, 96), expected (K * bits / 32, N) = (32, 96); "
        "is k=256 right?",
        {"k": 128},
    ),
    "qweight_of_another_n": ({"n": 64}, ValueError, "qweight has shape (16, 96)", {"n": 96}),
    "qweight_not_a_matrix": (
        {"qweight": WORDS[0]}, ValueError, "qweight has shape (96,), expected two axes", {},
    ),
    "qweight_of_64_bit_words": (
        {"qweight": WORDS.astype(np.int64)},
        TypeError,
        "qweight has dtype int64, expected int32 or uint32",
        {"qweight": WORDS.view(np.uint32)},
    ),
    "qweight_missing": ({"qweight": None}, TypeError, "qweight has dtype object", {}),
    "scales_of_another_group_size": (
        {"group_size": 64},
        ValueError,
        "scales has shape (4, 96), expected (ceil(K / group_size), N) = (2, 96) for k=128; "
        "is group_size=64 right?",
        {"group_size": 32},
    ),
    "scales_of_another_n": (
        {"scales": SCALES[:, 1:]}, ValueError, "scales has shape (4, 95)", {},
    ),
    "scales_integer": (
        {"scales": SCALES.astype(np.int32)}, TypeError, "scales has dtype int32", {},
    ),
    "scales_float64_without_dtype": (
        {"scales": SCALES.astype(np.float64)},
        TypeError,
        "scales has dtype float64, expected float16, bfloat16 or float32; pass dtype=",
        {"scales": SCALES.astype(np.float64), "dtype": np.float16},
    ),
    "scales_not_finite": (
        {"scales": changed(SCALES, (2, 7), np.nan)},
        ValueError,
        "load_gptq: scales has 1 values that are not finite, the first at (2, 7)",
        {"scales": changed(SCALES, (2, 7), -0.0)},
    ),
    "scales_overflow_on_cast": (
        {"scales": changed(SCALES.astype(np.float32), (1, 2), 7e4), "dtype": np.float16},
        ValueError,
        "overflow float16; use dtype=bfloat16 or float32",
        {"scales": changed(SCALES.astype(np.float32), (1, 2), 6.5e4), "dtype": np.float16},
    ),
    "scales_overflow_from_float64": (
        {"scales": changed(SCALES.astype(np.float64), (1, 2), -1e39), "dtype": np.float32},
        ValueError,
        "load_gptq: scales up to 1e+39 overflow float32",
        {"scales": changed(SCALES.astype(np.float64), (1, 2), -1e38), "dtype": np.float32},
    ),
    "dtype_unknown": (
        {"dtype": "float99"}, TypeError, "load_gptq: dtype is 'float99', expected float16, bf",
        {"dtype": "bfloat16"},
    ),
    "symmetric_as_text": (
        {"symmetric": "yes"}, TypeError, "symmetric is 'yes', expected True, False or None", {},
    ),
    "dtype_of_integers": (
        {"dtype": np.int8},
        TypeError,
        "load_gptq: dtype is int8, expected float16, bfloat16 or float32",
        {"dtype": jnp.bfloat16},
    ),
    "qzeros_unpacked": (
        {"qzeros": np.full((4, N), 7, np.int32)},
        ValueError,
        "qzeros has shape (4, 96), expected (G, N * bits / 32) = (4, 12)",
        {},
    ),
    "qzeros_as_bytes": (
        {"qzeros": QZEROS.view(np.uint8)}, TypeError, "qzeros has dtype uint8", {},
    ),
    "qzeros_missing_though_asymmetric": (
        {"qzeros": None, "symmetric": np.False_},
        ValueError,
        "qzeros is None, expected an array with symmetric=False",
        {"qzeros": None, "symmetric": True},
    ),
    "qzeros_that_vary_though_symmetric": (
        {"symmetric": True},
        ValueError,
        "expected 7 or 8 everywhere with symmetric=True; pass symmetric=None",
        {"symmetric": False},
    ),
    "qzeros_of_9_though_symmetric": (
        {"qzeros": constant_zeros(9), "symmetric": True},
        ValueError,
        "qzeros stores 9 for group 0, column 0",
        {"qzeros": constant_zeros(9), "symmetric": None},
    ),
    "qzeros_of_7_and_8_though_symmetric": (
        {"qzeros": changed(constant_zeros(7), (2, 3), 0x77777778), "symmetric": True},
        ValueError,
        "qzeros stores 8 for group 2, column 24",
        {"qzeros": constant_zeros(7), "symmetric": True},
    ),
    "format_unknown": (
        {"checkpoint_format": "awq"},
        ValueError,
        "checkpoint_format is 'awq', expected 'gptq' or 'gptq_v2'",
        {"checkpoint_format": "gptq_v2"},
    ),
    "bits_3": (
        {"bits": 3}, NotImplementedError, "load_gptq: bits is 3, expected 4 or 8", {"bits": 4},
    ),
    "bits_0": ({"bits": 0}, ValueError, "load_gptq: bits is 0, expected 4 or 8", {}),
    "bits_8_of_4_bit_words": ({"bits": 8}, ValueError, "expected (K * bits / 32, N) = (32", {}),
    "group_size_off": (
        {"group_size": 48}, ValueError, "load_gptq: group_size is 48", {"group_size": 32},
    ),
    "g_idx_of_fewer_words": (
        {"g_idx": GROUPS[:64], "k": None}, ValueError, "(8, 96); is K = 64 of g_idx right?",
        {"g_idx": GROUPS, "k": None},
    ),
    "g_idx_too_short": (
        {"g_idx": GROUPS[1:]},
        ValueError,
        "load_gptq: g_idx has shape (127,), expected (K,) = (128,)",
        {"g_idx": GROUPS},
    ),
    "g_idx_out_of_range": (
        {"g_idx": changed(GROUPS, 5, 4)},
        ValueError,
        "g_idx[5] is 4, expected a group in [0, 4); is group_size=32 right?",
        {"g_idx": SHUFFLED},
    ),
    "g_idx_negative": (
        {"g_idx": changed(GROUPS, 9, -1)},
        ValueError,
        "g_idx[9] is -1, expected a group in [0, 4)",
        {"g_idx": SHUFFLED.astype(np.int64)},
    ),
    "g_idx_unbalanced": (
        {"g_idx": changed(GROUPS, 5, 1)},
        ValueError,
        "g_idx gives group 0 31 rows, expected 32; is group_size=32 right?",
        {"g_idx": SHUFFLED},
    ),
    "g_idx_of_floats": (
        {"g_idx": GROUPS.astype(np.float32)},
        TypeError,
        "g_idx has dtype float32, expected int32",
        {"g_idx": GROUPS.tolist()},
    ),
    "bias_of_another_n": (
        {"bias": np.ones(N - 1, np.float16)},
        ValueError,
        "bias has shape (95,), expected (N,) = (96,)",
        {"bias": np.ones(N, np.float16)},
    ),
    "bias_not_finite": (
        {"bias": np.full(N, np.inf, np.float16)},
        ValueError,
        "bias has 96 values that are not finite",
        {"bias": np.zeros(N, np.float16)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("bad, error, message, good", CASES.values(), ids=CASES)
def test_refused_with_a_twin_that_is_accepted(bad, error, message, good):
    with pytest.raises(error, match=re.escape(message)):
        load_gptq(**arguments(**bad))
    assert isinstance(load_gptq(**arguments(**good)), MarlinLinear)


def stack_arguments(**changes) -> dict[str, Any]:
    rng = np.random.default_rng(3)
    return stacked([random_tensors(rng, zeros="v1", bias=True) for _ in range(3)]) | changes


STACK = stack_arguments()
SCALES_OF_3 = STACK["scales"]

STACK_CASES = {
    "no_experts": (
        {"qweights": []}, ValueError, "load_gptq_stacked: qweights holds no experts", {},
    ),
    "too_few_scales": (
        {"scales": SCALES_OF_3[:2]},
        ValueError,
        "load_gptq_stacked: scales has 2 entries, expected one an expert: 3",
        {"scales": np.stack(SCALES_OF_3)},
    ),
    "too_many_g_idx": (
        {"g_idx": np.zeros((4, 64), np.int32)}, ValueError, "g_idx has 4 entries", {},
    ),
    "expert_with_nan": (
        {"scales": [*SCALES_OF_3[:2], SCALES_OF_3[2] + np.float16(np.nan)]},
        ValueError,
        "load_gptq_stacked: expert 2: scales has",
        {},
    ),
    "expert_of_another_size": (
        {"qweights": [*STACK["qweights"][:2], STACK["qweights"][2][:, :64]]},
        ValueError,
        "load_gptq_stacked: expert 2: qweight has shape (8, 64), expected (K * bits / 32, N) = "
        "(8, 96)",
        {},
    ),
    "expert_of_another_dtype": (
        {"scales": [SCALES_OF_3[0], SCALES_OF_3[1].astype(np.float32), SCALES_OF_3[2]]},
        TypeError,
        "load_gptq_stacked: expert 1: scales has dtype float32, expected float16, the dtype of "
        "expert 0; pass dtype=",
        {
            "scales": [SCALES_OF_3[0], SCALES_OF_3[1].astype(np.float32), SCALES_OF_3[2]],
            "dtype": np.float16,
        },
    ),
    "n_of_all_experts": (
        {"n_per_expert": 288}, ValueError, "expert 0: qweight has shape (8, 96)",
        {"n_per_expert": 96},
    ),
    "dtype_of_integers": (
        {"dtype": np.int32}, TypeError, "load_gptq_stacked: dtype is int32", {},
    ),
    "unbalanced_g_idx_of_one_expert": (
        {"g_idx": [None, np.zeros(64, np.int32), None]},
        ValueError,
        "load_gptq_stacked: expert 1: g_idx gives group 0 64 rows, expected 32",
        {"g_idx": [None, np.arange(64, dtype=np.int32) % 2, None]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("bad, error, message, good", STACK_CASES.values(), ids=STACK_CASES)
def test_stack_refused_with_a_twin_that_is_accepted(bad, error, message, good):
    with pytest.raises(error, match=re.escape(message)):
        load_gptq_stacked(**stack_arguments(**bad))
    assert load_gptq_stacked(**stack_arguments(**good)).num_experts == 3


@pytest.mark.parametrize("name", ["qweight", "scales", "qzeros", "g_idx", "bias"])
def test_tracers_are_refused_and_concrete_jax_arrays_accepted(name):
    given = arguments(g_idx=SHUFFLED, bias=np.ones(N, np.float16))
    value = jnp.asarray(given.pop(name))

    def load(a):
        return load_gptq(**given, **{name: a})

    with pytest.raises(TypeError, match=rf"load_gptq: {name} is traced .* load them outside"):
        jax.jit(load)(value)
    assert load(value).shape == (K, N)


@pytest.mark.parametrize("name", ["qweights", "scales", "qzeros", "bias", "g_idx"])
def test_traced_stacks_are_refused(name):
    given = stack_arguments(g_idx=[np.arange(64, dtype=np.int32) % 2] * 3)
    value: Any = jnp.asarray(np.stack(given.pop(name)))
    with pytest.raises(TypeError, match=rf"load_gptq_stacked: expert 0: {name[:5]}.* traced"):
        jax.jit(lambda a: load_gptq_stacked(**given | {name: a}))(value)
    assert load_gptq_stacked(**given | {name: value}).num_experts == 3
