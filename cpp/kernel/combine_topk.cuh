// The last step of a MoE layer: out[t] = sum over slots of rows[t * top_k + slot], slot by slot.
#pragma once

#include <type_traits>

#include "params.h"
#include "ptx.cuh"

namespace jax_marlin {

constexpr int kCombineThreads = 128;
constexpr int kCombineSlots = 8;  // fetched at once
constexpr int kCombineBlocks = 8;  // of one SM: 128 KB on their way fill the memory's latency

// Columns of a thread: those of one 16-byte load.
template <class Row>
constexpr int kCombineColumns = sizeof(uint4) / sizeof(Row);

// Bit i: slot first + i names an expert of the stack. Rows of other ids were never written.
__device__ __forceinline__ unsigned named_slots(const CombineParams& p, const int* ids, int first) {
  unsigned named = 0;
#pragma unroll
  for (int i = 0; i < kCombineSlots; ++i) {
    if (first + i >= p.top_k) continue;
    const int id = ids[first + i];
    if (id >= 0 && id < p.num_experts) named |= 1u << i;
  }
  return named;
}

// A thread's columns of the named rows: requests of all of them first. `left`: how many columns the
// rows still have; rows that are no multiple of 16 bytes apart are not aligned for one load.
template <class Row>
__device__ __forceinline__ void load_parts(const Row* row, int64_t row_stride, unsigned named,
                                           int left, uint4 (&parts)[kCombineSlots]) {
  constexpr int kColumns = kCombineColumns<Row>;
  if (row_stride % kColumns == 0) {
#pragma unroll
    for (int i = 0; i < kCombineSlots; ++i) {
      if (named >> i & 1) parts[i] = *reinterpret_cast<const uint4*>(row + i * row_stride);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kCombineSlots; ++i) {
    Row* part = reinterpret_cast<Row*>(parts + i);
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      if ((named >> i & 1) && c < left) part[c] = row[i * row_stride + c];
    }
  }
}

template <class Element, class Row>
__global__ void __launch_bounds__(kCombineThreads, kCombineBlocks)
    combine_topk(const __grid_constant__ CombineParams p) {
  constexpr int kColumns = kCombineColumns<Row>;
  const int64_t token = blockIdx.x;
  const int column = (blockIdx.y * kCombineThreads + threadIdx.x) * kColumns;
  const int left = p.columns - column;
  const int* ids = p.topk_ids + token * p.top_k;
  const Row* row = static_cast<const Row*>(p.rows) + token * p.top_k * p.row_stride + column;
  unsigned named = named_slots(p, ids, 0);  // ids are older than the kernel that writes rows
  ptx::wait_dependencies();
  if (left <= 0) return;
  float sums[kColumns] = {};
  for (int first = 0; first < p.top_k; first += kCombineSlots) {
    if (first > 0) named = named_slots(p, ids, first);
    uint4 parts[kCombineSlots] = {};
    load_parts(row + first * p.row_stride, p.row_stride, named, left, parts);
#pragma unroll
    for (int i = 0; i < kCombineSlots; ++i) {
      const Row* part = reinterpret_cast<const Row*>(parts + i);
#pragma unroll
      for (int c = 0; c < kColumns; ++c) sums[c] += static_cast<float>(part[c]);
    }
  }
  using Vector = std::conditional_t<kColumns * sizeof(Element) == sizeof(uint4), uint4, uint2>;
  alignas(Vector) Element narrow[kColumns];
#pragma unroll
  for (int c = 0; c < kColumns; ++c) narrow[c] = static_cast<Element>(sums[c]);
  Element* out = static_cast<Element*>(p.out) + token * p.columns + column;
  if (p.columns % kColumns == 0) {
    *reinterpret_cast<Vector*>(out) = *reinterpret_cast<const Vector*>(narrow);
    return;
  }
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
    if (c < left) out[c] = narrow[c];
  }
}

}  // namespace jax_marlin
