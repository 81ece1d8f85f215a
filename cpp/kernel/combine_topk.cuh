// The last step of a MoE layer: out[t] = sum over slots of rows[t * top_k + slot], slot by slot.
#pragma once

#include "epilogue.cuh"

namespace jax_marlin {

constexpr int kCombineThreads = 128;
constexpr int kCombineSlots = 8;  // fetched at once
constexpr int kCombineColumns = 4 * kCombineThreads;  // one float4 a thread

// Four columns, or the `left` ones that a row still has; rows that are no multiple of 16 bytes
// apart are not aligned for one load.
__device__ __forceinline__ float4 load_columns(const float* row, int left, int64_t row_stride) {
  if (row_stride % 4 == 0) return *reinterpret_cast<const float4*>(row);
  float4 v = {row[0], 0.f, 0.f, 0.f};
  if (left > 1) v.y = row[1];
  if (left > 2) v.z = row[2];
  if (left > 3) v.w = row[3];
  return v;
}

template <class Element>
__global__ void __launch_bounds__(kCombineThreads)
    combine_topk(const __grid_constant__ CombineParams p) {
  const int64_t token = blockIdx.x;
  const int column = (blockIdx.y * kCombineThreads + threadIdx.x) * 4;
  const int* ids = p.topk_ids + token * p.top_k;
  const float* row = p.rows + token * p.top_k * p.row_stride + column;
  const bool inside = column < p.columns;
  ptx::wait_dependencies();
  float4 sum = {};
  for (int first = 0; first < p.top_k; first += kCombineSlots) {
    // Requests of all slots first, then their sum in order. Rows of ids outside the stack were
    // never written.
    float4 parts[kCombineSlots] = {};
#pragma unroll
    for (int i = 0; i < kCombineSlots; ++i) {
      const int slot = first + i;
      if (slot >= p.top_k) continue;
      const int id = ids[slot];
      if (inside && id >= 0 && id < p.num_experts) {
        parts[i] = load_columns(row + slot * p.row_stride, p.columns - column, p.row_stride);
      }
    }
#pragma unroll
    for (int i = 0; i < kCombineSlots; ++i) add(sum, parts[i]);
  }
  const float sums[4] = {sum.x, sum.y, sum.z, sum.w};
  Element* out = static_cast<Element*>(p.out) + token * p.columns + column;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (column + i < p.columns) out[i] = static_cast<Element>(sums[i]);
  }
}

}  // namespace jax_marlin
