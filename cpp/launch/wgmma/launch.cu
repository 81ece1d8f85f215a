// Launches the wgmma kernel: blocks that stay, in clusters where they split K or share rows of x.

#include <algorithm>

#include "../device_setup.h"
#include "instances.h"
#include "launch.h"
#include "tensor_map.h"
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
// for others, which a driver may be told to compile in its place, has no kernel body. Drivers older
// than CUDA 12 have no tensor maps.
bool has_wgmma() {
#ifndef JAX_MARLIN_HAS_WGMMA
  return false;
#endif
  int device = 0, major = 0, minor = 0;
  cudaFuncAttributes code = {};
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
         cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess &&
         major == 9 && minor == 0 && can_encode_boxes() &&
         cudaFuncGetAttributes(&code, wgmma_kernel_bf16_w4(0, false).function) == cudaSuccess &&
         code.ptxVersion >= 90;
}

cudaError_t launch_wgmma_gemm(const GemmLaunch& gemm, int sm_count, Order order,
                              cudaStream_t stream) {
  const TileChoice& choice = gemm.choice;
  GemmParams params = gemm.params;
  const int64_t tiles = choice.row_blocks * choice.n_blocks;
  if (tiles == 0) return cudaSuccess;
  if (tiles > INT32_MAX) return cudaErrorInvalidConfiguration;
  params.n_blocks = choice.n_blocks;
  params.split_k = choice.split_k;
  params.sub_blocks = choice.sub_blocks;
  params.share_x = choice.share_x;
  const WgmmaTile& tile = kWgmmaTable[choice.tile].tile;
  if (tile.in_boxes) {
    const RowMatrix x = {params.x, params.x_by_slot ? params.slots : params.out_rows, params.k,
                         params.x_stride};
    const cudaError_t encoded = encode_boxes(&params.x_boxes, x, gemm.element, tile.width_step());
    if (encoded != cudaSuccess) return encoded;
  }
  const GemmKernel kernel = find_kernel(gemm);
  bool overlaps = false;
  const cudaError_t ready =
      set_up_kernel(reinterpret_cast<const void*>(kernel.function), kernel.shared_bytes, &overlaps);
  if (ready != cudaSuccess) return ready;

  // Blocks of a cluster are parts of K, or share rows of x; then they take a tile each.
  const int blocks = choice.split_k * choice.share_x;
  const int64_t pieces =
      choice.row_blocks * ((choice.n_blocks + choice.share_x - 1) / choice.share_x);
  const int64_t resident = static_cast<int64_t>(sm_count) * tile.min_blocks / blocks;
  const int64_t clusters = std::min(pieces, std::max<int64_t>(resident, 1));
  cudaLaunchAttribute attributes[2] = {};
  int count = 0;
  if (blocks > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count++].val.clusterDim = {static_cast<unsigned>(blocks), 1, 1};
  }
  // Blocks that share a multiprocessor could come to lie two here and none there, where those of
  // the kernel before this one end.
  if (order == Order::kOverlap && overlaps && tile.min_blocks == 1) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(clusters * blocks));
  config.blockDim = dim3(kernel.threads);
  config.dynamicSmemBytes = kernel.shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = count;
  return cudaLaunchKernelEx(&config, kernel.function, params);
}

}  // namespace jax_marlin
