"""load_gptq and load_gptq_stacked: every stored form comes back as exactly the weight it means."""

import tracemalloc
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from gptq_tensors import random_tensors, stacked

from jax_marlin.gptq import load_gptq, load_gptq_stacked
from jax_marlin.gptq_format import gptq_to_canonical

CASES = {
    "symmetric": {"k": 128, "n": 192},
    "symmetric_8bit_bfloat16": {"k": 128, "n": 192, "bits": 8, "dtype": "bfloat16"},
    "float32_scales": {"k": 128, "n": 64, "dtype": "float32", "zeros": "v1"},
    "v1_zeros_that_borrow": {"k": 128, "n": 192, "zeros": "v1"},
    "v1_zeros_that_borrow_8bit": {"k": 128, "n": 192, "bits": 8, "zeros": "v1"},
    "v2_zeros": {"k": 128, "n": 192, "zeros": "v2"},
    "v2_zeros_8bit": {"k": 64, "n": 128, "bits": 8, "zeros": "v2"},
    "group_64": {"k": 192, "n": 64, "group_size": 64, "zeros": "v1"},
    "group_96_is_no_power_of_two": {"k": 192, "n": 64, "group_size": 96, "zeros": "v1"},
    "group_128_is_all_of_k": {"k": 128, "n": 192, "group_size": 128, "zeros": "v1"},
    "one_group": {"k": 192, "n": 128, "group_size": -1, "zeros": "v2"},
    "one_group_of_odd_k": {"k": 200, "n": 72, "group_size": -1},
    "group_larger_than_k": {"k": 96, "n": 64, "group_size": 128, "zeros": "v1"},
    "last_group_is_short": {"k": 160, "n": 64, "group_size": 64, "zeros": "v1"},
    "k_and_n_off_the_tile": {"k": 96, "n": 72, "zeros": "v1"},
    "k_and_n_off_the_word": {"k": 70, "n": 77, "zeros": "v1", "bias": True},
    "k_and_n_off_the_word_8bit": {"k": 70, "n": 77, "bits": 8, "zeros": "v2"},
    "act_order": {"k": 128, "n": 192, "act_order": True},
    "act_order_v1_zeros_8bit": {"k": 96, "n": 128, "bits": 8, "zeros": "v1", "act_order": True},
    "act_order_last_group_is_short": {
        "k": 160,
        "n": 72,
        "group_size": 64,
        "zeros": "v2",
        "act_order": True,
    },
    "bias": {"k": 64, "n": 200, "bias": True},
    "bias_bfloat16_act_order": {
        "k": 128,
        "n": 72,
        "bias": True,
        "dtype": "bfloat16",
        "zeros": "v1",
        "act_order": True,
    },
}


def same_leaves(a, b) -> bool:
    """Same structure, shapes, dtypes and bits."""
    if jax.tree.structure(a) != jax.tree.structure(b):
        return False
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(x.dtype == y.dtype and bool((x == y).all()) for x, y in pairs)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_linear_is_exactly_the_stored_weight(case):
    tensors, options, weight = random_tensors(np.random.default_rng(3), **case)
    w = load_gptq(**tensors, **options, n=case["n"])
    assert w.shape == weight.shape
    assert w.dtype == tensors["scales"].dtype
    # the product of a short scale and a small integer is rounded once in float32
    np.testing.assert_array_equal(w.dequantize(jnp.float32), weight.astype(np.float32))
    if case.get("bias"):
        np.testing.assert_array_equal(np.asarray(w.stack.bias)[0], tensors["bias"])
    else:
        assert w.stack.bias is None


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_stack_packs_each_expert_by_itself(case):
    rng = np.random.default_rng(4)
    sets = [random_tensors(rng, **case) for _ in range(3)]
    stack = load_gptq_stacked(**stacked(sets), n_per_expert=case["n"])
    weights = np.stack([s.weight for s in sets])
    assert stack.shape == weights.shape
    np.testing.assert_array_equal(stack.dequantize(jnp.float32), weights.astype(np.float32))
    for expert, one in enumerate(sets):
        alone = load_gptq(**one.tensors, **one.options).stack
        np.testing.assert_array_equal(stack.qweight[expert], alone.qweight[0])
        np.testing.assert_array_equal(stack.scales[expert], alone.scales[0])


def test_v1_zero_point_0_borrows_from_its_neighbours():
    zero_points = np.array([[0, 0, 1, 8, 15, 0, 7, 0]])
    stored = np.array([[0xF5FE6FEF]], np.uint32)  # 0x070F8100 - 0x11111111, modulo 2**32
    assert (oracle.unpack_zeros(stored.view(np.int32), 4) == zero_points).all()
    qweight = np.zeros((4, 8), np.uint32)
    w = load_gptq(qweight, np.ones((1, 8), np.float32), stored, group_size=32)
    np.testing.assert_array_equal(w.dequantize()[5], -zero_points[0].astype(np.float32))


def test_v1_and_v2_differ_only_in_the_stored_words():
    v1 = random_tensors(np.random.default_rng(5), zeros="v1")
    v2 = random_tensors(np.random.default_rng(5), zeros="v2")
    assert (v1.tensors["qzeros"] != v2.tensors["qzeros"]).all()
    assert same_leaves(load_gptq(**v1.tensors, **v1.options), load_gptq(**v2.tensors, **v2.options))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("below", [0, 1])
@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2"])
def test_symmetric_accepts_both_stored_values(bits, below, checkpoint_format):
    tensors, options, weight = random_tensors(np.random.default_rng(6), bits=bits)
    stored = np.full((2, 96), 2 ** (bits - 1) - below)
    tensors["qzeros"] = oracle.pack_zeros(stored, bits, "gptq_v2")
    options["checkpoint_format"] = checkpoint_format
    w = load_gptq(**tensors, **options, symmetric=True)
    assert w.stack.zero_points is None
    np.testing.assert_array_equal(w.dequantize(jnp.float32), weight.astype(np.float32))


def test_constant_zero_points_become_the_symmetric_form_unless_declared_asymmetric():
    tensors, options, weight = random_tensors(np.random.default_rng(7))
    tensors["qzeros"] = np.full((2, 12), 0x77777777, np.uint32)
    as_stored = load_gptq(**tensors, **options)
    declared = load_gptq(**tensors, **options, symmetric=False)
    assert as_stored.stack.zero_points is None
    assert declared.stack.zero_points is not None
    for w in (as_stored, declared):
        np.testing.assert_array_equal(w.dequantize(jnp.float32), weight.astype(np.float32))


def test_zeros_are_taken_as_stored_without_a_claim():
    """v1 words of 8 mean 9: only symmetric=True may read them as 8."""
    tensors, options, _ = random_tensors(np.random.default_rng(8))
    tensors["qzeros"] = np.full((2, 12), 0x88888888, np.uint32)
    w = load_gptq(**tensors, **options)
    stored = (tensors["qweight"], tensors["scales"], tensors["qzeros"])
    expected = oracle.gptq_weight(*stored, bits=4, group_size=32)
    np.testing.assert_array_equal(w.dequantize(jnp.float32), expected.astype(np.float32))


def test_trivial_g_idx_needs_no_permutation():
    tensors, options, _ = random_tensors(np.random.default_rng(9), k=128)
    plain = load_gptq(**tensors, **options)
    tensors["g_idx"] = np.arange(128, dtype=np.int32) // 32
    assert same_leaves(load_gptq(**tensors, **options), plain)
    assert plain.stack.perm is None


def test_shared_g_idx_is_given_once_as_an_array_or_a_list():
    rng = np.random.default_rng(10)
    sets = [random_tensors(rng, act_order=True) for _ in range(3)]
    arguments = stacked(sets)
    g_idx = arguments["g_idx"][0]
    assert not load_gptq_stacked(**arguments).spec.shared_perm
    arguments["g_idx"] = np.stack([g_idx] * 3)
    repeated = load_gptq_stacked(**arguments)
    assert repeated.spec.shared_perm
    for form in (g_idx, g_idx.tolist(), jnp.asarray(g_idx)):
        arguments["g_idx"] = form
        assert same_leaves(load_gptq_stacked(**arguments), repeated)


def test_experts_may_differ_in_act_order_zeros_and_bias():
    rng = np.random.default_rng(11)
    sets = [
        random_tensors(rng, zeros="v1"),
        random_tensors(rng, act_order=True),
        random_tensors(rng, bias=True, zeros="v1"),
    ]
    stack = load_gptq_stacked(**stacked(sets))
    weights = np.stack([s.weight for s in sets]).astype(np.float32)
    np.testing.assert_array_equal(stack.dequantize(jnp.float32), weights)
    np.testing.assert_array_equal(np.asarray(stack.bias)[2], sets[2].tensors["bias"])
    assert not np.asarray(stack.bias)[:2].any()


class TorchTensor:
    """What a CPU torch tensor offers: no NumPy form of bfloat16, but DLPack."""

    def __init__(self, a):
        self.a = jnp.asarray(a)
        self.shape, self.ndim = self.a.shape, self.a.ndim

    def __getitem__(self, index):
        return TorchTensor(self.a[index])

    def __array__(self, dtype=None, copy=None):
        if self.a.dtype == jnp.bfloat16:
            raise TypeError("Got unsupported ScalarType BFloat16")
        return np.asarray(self.a)

    def __dlpack__(self, **arguments):
        return self.a.__dlpack__(**arguments)

    def __dlpack_device__(self):
        return self.a.__dlpack_device__()  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("form", [np.stack, lambda a: jnp.asarray(np.stack(a)), tuple,
                                  lambda a: TorchTensor(np.stack(a))],
                         ids=["numpy", "jax", "tuple", "torch"])  # fmt: skip
def test_arrays_with_an_expert_axis_are_as_good_as_lists(form):
    rng = np.random.default_rng(12)
    case: dict[str, Any] = {"zeros": "v1", "act_order": True, "bias": True, "dtype": "bfloat16"}
    arguments = stacked([random_tensors(rng, **case) for _ in range(3)])
    names = ("qweights", "scales", "qzeros", "g_idx", "bias")
    converted = {name: form(arguments[name]) for name in names}
    assert same_leaves(load_gptq_stacked(**arguments | converted), load_gptq_stacked(**arguments))


def test_only_one_expert_is_unpacked_at_a_time():
    one = random_tensors(np.random.default_rng(18), k=256, n=256, zeros="v1", act_order=True)
    arguments = stacked([one] * 48)
    load_gptq_stacked(**arguments)
    tracemalloc.start()
    stack = load_gptq_stacked(**arguments)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    codes_of_one = 256 * 256
    assert peak < stack.nbytes + 12 * codes_of_one  # of all 48 they would be 48 times that


def test_words_may_be_unsigned_and_strided():
    tensors, options, _ = random_tensors(np.random.default_rng(13), zeros="v1")
    plain = load_gptq(**tensors, **options)
    for name in ("qweight", "qzeros"):
        tensors[name] = np.asfortranarray(tensors[name].view(np.uint32))
    assert same_leaves(load_gptq(**tensors, **options), plain)


def test_k_and_n_are_inferred():
    tensors, options, _ = random_tensors(np.random.default_rng(14), k=128, n=72)
    del options["k"]
    assert load_gptq(**tensors, **options).shape == (128, 72)
    # 70 rows fill 9 words, the last not wholly: only g_idx tells
    tensors, options, _ = random_tensors(np.random.default_rng(15), k=70, n=72, act_order=True)
    del options["k"]
    assert load_gptq(**tensors, **options).shape == (70, 72)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, "float32"])
def test_dtype_rounds_scales_and_bias_once(dtype):
    tensors, options, _ = random_tensors(np.random.default_rng(16), dtype="float32", bias=True)
    for stored in ("float32", "float64"):
        for name in ("scales", "bias"):
            tensors[name] = tensors[name].astype(stored)
        w = load_gptq(**tensors, **options, dtype=dtype)
        assert w.dtype == jnp.dtype(dtype)
        bias = np.asarray(w.stack.bias)[0]
        np.testing.assert_array_equal(bias, tensors["bias"].astype(w.dtype))
        cast = tensors["scales"].astype(w.dtype)
        expected = oracle.gptq_weight(tensors["qweight"], cast, bits=4, group_size=32)
        np.testing.assert_array_equal(w.dequantize(jnp.float32), expected.astype(np.float32))


def test_canonical_rows_are_sorted_by_group_and_stable():
    tensors, options, weight = random_tensors(np.random.default_rng(17), zeros="v1", act_order=True)
    canonical = gptq_to_canonical(**tensors, **options, n=None, symmetric=None, where="here")
    assert canonical.perm is not None
    assert (tensors["g_idx"][canonical.perm] == np.arange(64) // 32).all()
    assert (np.diff(canonical.perm.reshape(2, 32)) > 0).all()
    group = np.arange(64) // 32
    rows = oracle.dequantize(canonical.codes, canonical.scales, canonical.zero_points, group)
    np.testing.assert_array_equal(rows, weight[canonical.perm])
