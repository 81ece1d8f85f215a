// Launches the wgmma kernel: blocks that stay, in clusters when K is split.

#include <algorithm>

#include "../device_setup.h"
#include "instances.h"
#include "launch.h"
#include "tile_table.h"

namespace jax_marlin {
namespace {

GemmKernel find_kernel(const GemmLaunch& gemm) {
  const bool stored = gemm.params.zero_points != nullptr;
  const auto find = gemm.element == ElementType::kFloat16
                        ? (gemm.bits == 4 ? wgmma_kernel_fp16_w4 : wgmma_kernel_fp16_w8)
                        : (gemm.bits == 4 ? wgmma_kernel_bf16_w4 : wgmma_kernel_bf16_w8);
  return find(gemm.choice.tile, stored);
}

}  // namespace

// The instructions are sm_90a's alone: code for them runs on no other compute capability, and code
// for others has no kernel body.
bool has_wgmma() {
#ifndef JAX_MARLIN_HAS_WGMMA
  return false;
#endif
  int device = 0, major = 0, minor = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
         cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess &&
         major == 9 && minor == 0;
}

cudaError_t launch_wgmma_gemm(const GemmLaunch& gemm, int sm_count, cudaStream_t stream) {
  const TileChoice& choice = gemm.choice;
  GemmParams params = gemm.params;
  const int64_t tiles = choice.row_blocks * choice.n_blocks;
  if (tiles == 0) return cudaSuccess;
  if (tiles > INT32_MAX) return cudaErrorInvalidConfiguration;
  params.n_blocks = choice.n_blocks;
  params.split_k = choice.split_k;
  params.sub_blocks = choice.sub_blocks;
  const GemmKernel kernel = find_kernel(gemm);
  bool overlaps = false;
  const cudaError_t ready =
      set_up_kernel(reinterpret_cast<const void*>(kernel.function), kernel.shared_bytes, &overlaps);
  if (ready != cudaSuccess) return ready;

  const WgmmaTile& tile = kWgmmaTable[choice.tile].tile;
  const int64_t resident = static_cast<int64_t>(sm_count) * tile.min_blocks / choice.split_k;
  const int64_t clusters = std::min(tiles, std::max<int64_t>(resident, 1));
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(choice.split_k), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(clusters * choice.split_k));
  config.blockDim = dim3(kernel.threads);
  config.dynamicSmemBytes = kernel.shared_bytes;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = choice.split_k > 1 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel.function, params);
}

}  // namespace jax_marlin
