"""QuantSpec, CanonicalLinear, StackBuilder: what is accepted, what is refused, host memory."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from linears import SPEC, assert_dense, build, random_linear

from jax_marlin.canonical import CanonicalLinear, concat_columns
from jax_marlin.layout import unpack_columns, unpack_tiles
from jax_marlin.quant_spec import QuantSpec
from jax_marlin.stack_builder import StackBuilder


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    "group_size, k, n", [(32, 96, 80), (-1, 40, 192), (64, 160, 65), (128, 320, 7)]
)
def test_any_size_builds_and_dequantizes(bits, group_size, k, n):
    spec = QuantSpec.create(bits=bits, group_size=group_size, k=k, n=n)
    linears = [random_linear(e, spec, asymmetric=e != 1, act_order=e != 0) for e in range(3)]
    assert_dense(build(linears, spec), linears, spec)


@pytest.mark.parametrize(
    "feature, leaf", [("asymmetric", "zero_points"), ("act_order", "perm"), ("bias", "bias")]
)
def test_optional_leaves_exist_only_where_an_expert_needs_them(feature, leaf):
    plain = [random_linear(e) for e in range(3)]
    assert getattr(build(plain), leaf) is None
    option: dict[str, Any] = {feature: True}
    mixed = [plain[0], random_linear(1, **option), plain[2]]
    stack = build(mixed)
    assert getattr(stack, leaf) is not None
    assert_dense(stack, mixed)


def test_experts_without_bias_or_perm_hold_the_neutral_value():
    linears = [random_linear(0), random_linear(1, bias=True, act_order=True), random_linear(2)]
    stack = build(linears)
    assert stack.bias is not None and stack.perm is not None
    np.testing.assert_array_equal(np.asarray(stack.bias[1]), linears[1].bias)
    for e in (0, 2):
        assert not np.asarray(stack.bias[e]).any()
        np.testing.assert_array_equal(np.asarray(stack.perm[e]), np.arange(96))


def test_the_spec_tells_whether_the_permutation_is_shared():
    ordered = random_linear(0, act_order=True)
    same = dataclasses.replace(random_linear(1), perm=ordered.perm)
    other = random_linear(2, act_order=True)
    assert build([ordered, same]).spec.shared_perm
    assert build([ordered]).spec.shared_perm
    assert not build([ordered, other]).spec.shared_perm
    assert not build([ordered, random_linear(3)]).spec.shared_perm
    assert not build([random_linear(3)]).spec.shared_perm


def test_an_explicit_identity_permutation_is_dropped():
    linear = dataclasses.replace(random_linear(0), perm=np.arange(96, dtype=np.int32))
    assert build([linear, random_linear(1)]).perm is None


@pytest.mark.parametrize("bits", [4, 8])
def test_padding_decodes_to_zero(bits):
    spec = QuantSpec.create(bits=bits, group_size=64, k=80, n=70)  # a live group reaches past K
    stack = build([random_linear(0, spec, asymmetric=True), random_linear(1, spec)], spec)
    codes = unpack_tiles(np.asarray(stack.qweight), bits).astype(int)
    zeros = unpack_columns(np.asarray(stack.zero_points)).astype(int)
    scales = unpack_columns(np.asarray(stack.scales))
    assert not scales[..., 70:].any()
    np.testing.assert_array_equal(codes[:, 80:], np.broadcast_to(zeros[:, 1:], codes[:, 80:].shape))
    np.testing.assert_array_equal(codes[..., 70:], 2 ** (bits - 1))
    np.testing.assert_array_equal(zeros[..., 70:], 2 ** (bits - 1))


def test_gate_and_up_written_apart_equal_gate_up_written_whole():
    half = QuantSpec.create(bits=4, group_size=32, k=96, n=64)
    gate = random_linear(0, half, asymmetric=True, bias=True)
    up = random_linear(1, dataclasses.replace(half, n=128))
    builder = StackBuilder(1, SPEC, np.float32)
    builder.set_expert(0, gate, columns=slice(0, 64))
    builder.set_expert(0, up, columns=slice(64, None))
    apart, whole = builder.finish(), build([concat_columns(gate, up)])
    for name in ("qweight", "scales", "zero_points", "bias"):
        np.testing.assert_array_equal(
            np.asarray(getattr(apart, name)), np.asarray(getattr(whole, name))
        )


def test_halves_with_different_permutations_are_refused_and_equal_ones_accepted():
    half = QuantSpec.create(bits=4, group_size=32, k=96, n=96)
    gate, up = (random_linear(seed, half, act_order=True) for seed in (0, 1))
    with pytest.raises(ValueError, match=r"layer.up: .*keep gate and up as a pair of stacks"):
        builder = StackBuilder(2, QuantSpec.create(bits=4, group_size=32, k=96, n=160), np.float32)
        first = dataclasses.replace(gate, words=gate.words[:, :64], scales=gate.scales[:, :64])
        builder.set_expert(1, first, columns=slice(64))
        builder.set_expert(1, up, "layer.up", columns=slice(64, 160))
    with pytest.raises(ValueError, match=r"layer.e: .*keep them as a pair"):
        concat_columns(gate, up, where="layer.e")
    up.perm = gate.perm
    assert_dense(build([concat_columns(gate, up)]), [concat_columns(gate, up)])


def test_joining_a_symmetric_and_an_asymmetric_part():
    joined = concat_columns(random_linear(0, asymmetric=True), random_linear(1))
    assert joined.zero_points is not None and (joined.zero_points[:, 192:] == 8).all()
    other_k = random_linear(1, QuantSpec.create(bits=4, group_size=32, k=64, n=192))
    with pytest.raises(ValueError, match=r"have K, G, bits = \(96, 3, 4\) and \(64, 2, 4\)"):
        concat_columns(random_linear(0), other_k)


def test_leaves_are_aligned_and_handed_over_without_a_copy():
    builder = StackBuilder(2, SPEC, jnp.bfloat16)
    for e in range(2):
        builder.set_expert(e, random_linear(e, act_order=True, asymmetric=True, bias=True))
    leaves = builder._leaves
    assert leaves is not None
    addresses = {name: leaf.ctypes.data for name, leaf in leaves.items() if leaf is not None}
    stack = builder.finish()
    assert len(addresses) == 5 and not any(address % 64 for address in addresses.values())
    if jax.default_backend() == "cpu":
        for name, address in addresses.items():
            assert getattr(stack, name).unsafe_buffer_pointer() == address, f"{name} was copied"


def test_missing_experts_and_columns_are_named():
    builder = StackBuilder(4, SPEC, np.float16)
    builder.set_expert(2, random_linear(0))
    with pytest.raises(ValueError, match=re.escape("missing experts [0, 1, 3]")):
        builder.finish()
    for e in (0, 1):
        builder.set_expert(e, random_linear(e))
    half = random_linear(3, QuantSpec.create(bits=4, group_size=32, k=96, n=64))
    builder.set_expert(3, half, columns=slice(64, 128))
    with pytest.raises(ValueError, match=re.escape("experts [3] lack some of their columns")):
        builder.finish()
    builder.set_expert(3, random_linear(3))
    builder.finish()
    with pytest.raises(ValueError, match=r"finish\(\) was already called"):
        builder.finish()


BAD_LINEARS = [
    ("words", np.zeros((12, 64), np.uint32), ValueError, r"shape \(96, 64\), .*\(96, 192\)"),
    ("words", np.zeros((11, 192), np.uint32), ValueError, r"words has shape .*\(12, 192\)"),
    ("words", np.zeros((12, 192), np.int32), TypeError, "words have dtype int32, expected uint32"),
    ("bits", 8, ValueError, r"codes have 8 bits and shape \(96, 192\), expected 4"),
    ("scales", np.ones((6, 192), np.float16), ValueError, r"scales has shape \(6, .*= \(3, 192\)"),
    ("scales", np.ones((3, 192)), TypeError, "scales has dtype float64"),
    ("scales", np.full((3, 192), np.nan, np.float32), ValueError, r"576 .* not finite.*\(0, 0\)"),
    ("scales", np.full((3, 192), 7e4, np.float32), ValueError, "70000 overflow float16; use dtype"),
    ("zero_points", np.full((3, 192), 99, np.uint8), ValueError, "zero_points holds 99"),
    ("bias", np.ones((96,), np.float32), ValueError, r"bias has shape \(96,\), expected \(N,\)"),
    ("perm", np.zeros(96, np.int32), ValueError, r"perm is not a permutation of 0\.\.95"),
]


@pytest.mark.parametrize("name, array, error, message", BAD_LINEARS)
def test_bad_linears_are_refused_by_module_name(name, array, error, message):
    builder = StackBuilder(1, SPEC, np.float16)
    with pytest.raises(error, match=f"model.up_proj: .*{message}"):
        builder.set_expert(
            0, dataclasses.replace(random_linear(0), **{name: array}), "model.up_proj"
        )


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_finite_scales_and_no_others_are_taken(dtype):
    words = np.arange(2**16, dtype=np.uint16)  # every 16-bit float, or every upper half
    scales = words.view(dtype) if np.dtype(dtype).itemsize == 2 else (words.astype("u4") << 16)
    scales = scales.view(dtype).reshape(64, 1024)[:, ::-1]
    with np.errstate(invalid="ignore"):
        finite = np.isfinite(scales)
    spec = QuantSpec.create(bits=4, group_size=32, k=32, n=1024)
    for row, good in zip(scales, finite, strict=True):
        weight = CanonicalLinear(np.zeros((4, 1024), np.uint32), row[None], bits=4, k=32)
        if good.all():
            weight.check(spec, "here")
            continue
        message = rf"here: scales has {(~good).sum()} values .* first at \(0, {good.argmin()}\)"
        with pytest.raises(ValueError, match=message):
            weight.check(spec, "here")


def test_bad_codes_are_refused():
    for codes, error, message in [
        (np.zeros((96, 192), np.int32), TypeError, "codes has dtype int32, expected uint8"),
        (np.full((96, 192), 16, np.uint8), ValueError, "codes holds 16, expected values below 16"),
    ]:
        with pytest.raises(error, match=f"up_proj: {message}"):
            CanonicalLinear.from_codes(codes, np.ones((3, 192)), bits=4, where="up_proj")


def test_bad_arguments_of_the_builder_are_refused():
    with pytest.raises(ValueError, match="num_experts is 0"):
        StackBuilder(0, SPEC, np.float16)
    with pytest.raises(TypeError, match="dtype is float64, expected float16, bfloat16 or float32"):
        StackBuilder(1, SPEC, np.float64)
    builder = StackBuilder(2, SPEC, np.float16)
    with pytest.raises(IndexError, match=r"expert 2 is outside 0\.\.1"):
        builder.set_expert(2, random_linear(0))
    both = [random_linear(0), random_linear(1)]
    with pytest.raises(ValueError, match=r"^b: experts are range\(0, 4, 2\), expected a step of 1"):
        builder.set_experts(range(0, 4, 2), both, ["b", "c"])
    for columns in (slice(32, 192), slice(0, 100), slice(0, 256), slice(64, 64)):
        with pytest.raises(
            ValueError, match=r"columns are .* join the parts with canonical.concat_columns"
        ):
            builder.set_expert(0, random_linear(0), columns=columns)


@pytest.mark.parametrize(
    "group_size, normalised", [(-1, 96), (96, 96), (128, 96), (32, 32), (np.int64(64), 64)]
)
def test_group_sizes_are_normalised(group_size, normalised):
    spec = QuantSpec.create(bits=8, group_size=group_size, k=96, n=7)
    assert spec.group_size == normalised and hash(spec) == hash(dataclasses.replace(spec))
    assert (spec.num_groups, spec.k_tiles, spec.n_tiles) == (-(-96 // normalised), 2, 1)
    assert (spec.words_per_tile, spec.pack_factor, spec.symmetric_zero_point) == (1024, 4, 128)


@pytest.mark.parametrize("change, error, message", [
    ({"bits": 3}, NotImplementedError, "load: bits is 3, expected 4 or 8; requantize"),
    ({"bits": 16}, ValueError, "load: bits is 16, expected 4 or 8"),
    ({"bits": True}, TypeError, "load: bits is True, expected an integer"),
    ({"group_size": 0}, ValueError, r"load: group_size is 0, expected -1 .*or a multiple of 32"),
    ({"group_size": -2}, ValueError, "group_size is -2"),
    ({"group_size": 48}, ValueError, "group_size is 48"),
    ({"k": 0}, ValueError, "load: k is 0, expected at least 1"),
    ({"n": 1.5}, TypeError, "load: n is 1.5, expected an integer"),
])  # fmt: skip
def test_bad_specs_are_refused(change, error, message):
    with pytest.raises(error, match=message):
        QuantSpec.create(
            **{"bits": 4, "group_size": 32, "k": 96, "n": 192, "where": "load"} | change
        )
