// Launches the kernels: shared-memory opt-in, scratch that must start at zero, status of each call.

#include "../kernel/gather_rows.cuh"
#include "../kernel/moe_align.cuh"
#include "instances.h"
#include "launch_gemm.h"
#include "tile_table.h"

namespace jax_marlin {
namespace {

constexpr int kDefaultSharedBytes = 48 * 1024;  // more must be asked for, kernel by kernel

// Idempotent, so it may run again when XLA re-captures the call.
template <class Kernel>
cudaError_t allow_shared(Kernel kernel, int shared_bytes) {
  if (shared_bytes <= kDefaultSharedBytes) return cudaSuccess;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
}

GemmKernel find_kernel(ElementType element, int bits, int tile, bool stored) {
  if (element == ElementType::kFloat16) {
    return bits == 4 ? gemm_kernel_fp16_w4(tile, stored) : gemm_kernel_fp16_w8(tile, stored);
  }
  return bits == 4 ? gemm_kernel_bf16_w4(tile, stored) : gemm_kernel_bf16_w8(tile, stored);
}

}  // namespace

cudaError_t launch_gemm(GemmParams params, const TileChoice& choice, ElementType element, int bits,
                        void* scratch, cudaStream_t stream) {
  const int64_t blocks = choice.row_blocks * choice.n_blocks * choice.split_k;
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  params.n_blocks = choice.n_blocks;
  params.split_k = choice.split_k;
  params.sub_blocks = choice.sub_blocks;
  if (choice.split_k > 1) {
    params.arrivals = static_cast<int*>(scratch);
    params.partials =
        reinterpret_cast<float*>(static_cast<char*>(scratch) + arrivals_bytes(choice));
    const cudaError_t cleared = cudaMemsetAsync(params.arrivals, 0, arrivals_bytes(choice), stream);
    if (cleared != cudaSuccess) return cleared;
  }
  const GemmKernel kernel = find_kernel(element, bits, choice.tile, params.zero_points != nullptr);
  const cudaError_t allowed = allow_shared(kernel.function, kernel.shared_bytes);
  if (allowed != cudaSuccess) return allowed;
  kernel.function<<<static_cast<unsigned>(blocks), kThreads, kernel.shared_bytes, stream>>>(params);
  return cudaGetLastError();
}

cudaError_t launch_gather(const GatherParams& params, cudaStream_t stream) {
  if (params.slots == 0) return cudaSuccess;
  gather_rows<<<params.slots, 256, 0, stream>>>(params);
  return cudaGetLastError();
}

cudaError_t launch_align(const AlignParams& params, cudaStream_t stream) {
  const int shared_bytes = params.num_experts * static_cast<int>(sizeof(int));
  moe_align<<<params.num_experts, kAlignThreads, shared_bytes, stream>>>(params);
  return cudaGetLastError();
}

cudaError_t current_sm_count(int* sm_count) {
  int device = 0;
  const cudaError_t found = cudaGetDevice(&device);
  if (found != cudaSuccess) return found;
  return cudaDeviceGetAttribute(sm_count, cudaDevAttrMultiProcessorCount, device);
}

}  // namespace jax_marlin
