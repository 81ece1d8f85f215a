// What all products share: the leaves of an expert stack, decoded into GemmParams.
#pragma once

#include "../kernel/tile_config.h"
#include "../launch/launch_gemm.h"
#include "buffer_checks.h"

namespace jax_marlin {

// Kernels count the vectors of 8 elements of what they gather rows from in 32 bits.
inline bool is_countable(const ffi::AnyBuffer& x) {
  return x.element_count() < (uint64_t{8} << 32);
}
constexpr char kTooMany[] = "of 2^35 elements or more";

struct StackOperands {
  ffi::AnyBuffer x, qweight, scales, zero_points;
  int64_t bits, k, group_size;

  ElementType element() const {
    return x.element_type() == ffi::F16 ? ElementType::kFloat16 : ElementType::kBfloat16;
  }

  // Checks the leaves against each other and against x and out.
  void check(BufferChecks& checks, const ffi::AnyBuffer& out) const {
    check_leaves(checks);
    if (!checks.ok()) return;
    checks
        .require(x.dimensions()[1] >= k && x.dimensions()[1] % 8 == 0, "x",
                 "not at least k columns wide, and whole 16-byte vectors")
        .require(is_result(out) && out.dimensions()[1] <= qweight.dimensions()[1] * kTile, "out",
                 "neither of x's dtype nor float32, not of rank 2, or larger than int32 rows by "
                 "the stack's columns");
  }

  // The leaves alone, and that x is a matrix of their dtype.
  void check_leaves(BufferChecks& checks) const {
    const ffi::DataType dtype = x.element_type();
    checks.require(dtype == ffi::F16 || dtype == ffi::BF16, "x", "neither float16 nor bfloat16")
        .require(bits == 4 || bits == 8, "bits", std::to_string(bits) + ", expected 4 or 8")
        .require(k > 0 && k <= INT32_MAX, "k", std::to_string(k))
        .require(group_size > 0 && group_size <= k && (group_size == k || group_size % kHalf == 0),
                 "group_size", std::to_string(group_size) + ", expected k or a multiple of 32");
    if (!checks.ok()) return;
    checks.expect(qweight, "qweight", ffi::U32, {kAny, kAny, k_tiles(), 128 * bits})
        .expect(x, "x", dtype, {kAny, kAny});
    if (!checks.ok()) return;
    const auto tiles = qweight.dimensions();
    checks.require(is_countable(x), "x", kTooMany)
        .require(tiles[0] > 0 && tiles[0] <= INT32_MAX && tiles[1] <= INT32_MAX / kTile, "qweight",
                 "without experts, or with more than int32 can index")
        .expect(scales, "scales", dtype, {tiles[0], tiles[1], num_groups(), kTile})
        .expect_optional(zero_points, "zero_points", dtype,
                         {tiles[0], tiles[1], num_groups(), kTile});
  }

  bool is_result(const ffi::AnyBuffer& out) const {
    return (out.element_type() == x.element_type() || out.element_type() == ffi::F32) &&
           out.dimensions().size() == 2 && out.dimensions()[0] <= INT32_MAX;
  }

  // The fields that follow from the leaves; call after check.
  GemmParams params(const ffi::AnyBuffer& out) const {
    GemmParams p = {};
    p.x = x.untyped_data();
    p.x_stride = x.dimensions()[1];
    p.qweight = static_cast<const uint32_t*>(qweight.untyped_data());
    p.scales = scales.untyped_data();
    p.zero_points = optional_data<const void>(zero_points);
    p.out = out.untyped_data();
    p.out_rows = out.dimensions()[0];
    p.out_is_float32 = out.element_type() == ffi::F32;
    p.k = static_cast<int>(k);
    p.n = static_cast<int>(out.dimensions()[1]);
    p.num_experts = static_cast<int>(qweight.dimensions()[0]);
    p.stack_n_tiles = static_cast<int>(qweight.dimensions()[1]);
    p.k_tiles = static_cast<int>(k_tiles());
    p.num_groups = static_cast<int>(num_groups());
    p.group_size = static_cast<int>(group_size);
    p.groups_per_half = static_cast<float>(kHalf) / static_cast<float>(group_size);
    p.row_divisor = 1;
    return p;
  }

  int64_t k_tiles() const { return (k + kTile - 1) / kTile; }
  int64_t num_groups() const { return (k + group_size - 1) / group_size; }
};

}  // namespace jax_marlin
