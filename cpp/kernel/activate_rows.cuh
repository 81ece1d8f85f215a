// The activation of a MoE layer where gate and up do not meet in one block of the product.
#pragma once

#include "activation.cuh"
#include "epilogue.cuh"

namespace jax_marlin {

constexpr int kActivateThreads = 128;
constexpr int kActivateColumns = 4 * kActivateThreads;  // four a thread

// hidden[r, j] = activation(products[r, j], products[r, columns + j]); columns is a multiple of 4.
// Rows that no route names hold what was there before, and nobody reads what becomes of them.
template <class Element>
__global__ void __launch_bounds__(kActivateThreads)
    activate_rows(const __grid_constant__ ActivateParams p) {
  ptx::wait_dependencies();
  ptx::launch_dependents();
  const int64_t row = blockIdx.x;
  const int column = (blockIdx.y * kActivateThreads + threadIdx.x) * 4;
  if (column >= p.columns) return;
  const float* product = p.products + row * 2 * p.columns + column;
  const float4 gate = *reinterpret_cast<const float4*>(product);
  const float4 up = *reinterpret_cast<const float4*>(product + p.columns);
  alignas(8) const Element hidden[4] = {static_cast<Element>(activate(p.activation, gate.x, up.x)),
                                        static_cast<Element>(activate(p.activation, gate.y, up.y)),
                                        static_cast<Element>(activate(p.activation, gate.z, up.z)),
                                        static_cast<Element>(activate(p.activation, gate.w, up.w))};
  *reinterpret_cast<uint2*>(static_cast<Element*>(p.hidden) + row * p.columns + column) =
      *reinterpret_cast<const uint2*>(hidden);
}

}  // namespace jax_marlin
