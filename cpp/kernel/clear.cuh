// Zeroes what a GEMM adds to or leaves out. A kernel of ours, since the GEMM can start beside it;
// it would wait for a memset, and some microseconds more.
#pragma once

#include "params.h"
#include "ptx.cuh"

namespace jax_marlin {

constexpr int kClearThreads = 256;

__global__ void __launch_bounds__(kClearThreads) clear(const __grid_constant__ ClearParams p) {
  ptx::launch_dependents();
  constexpr int kVector = sizeof(uint4);
  const int64_t first = int64_t{blockIdx.x} * kClearThreads + threadIdx.x;
  const int64_t step = int64_t{gridDim.x} * kClearThreads;
  for (int64_t i = first; i < p.bytes / kVector; i += step) {
    reinterpret_cast<uint4*>(p.begin)[i] = make_uint4(0, 0, 0, 0);
  }
  const int64_t rest = p.bytes / kVector * kVector + first;
  if (rest < p.bytes) p.begin[rest] = 0;
}

}  // namespace jax_marlin
