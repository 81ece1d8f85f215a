// Launches the kernels: grids, scratch that must start at zero, overlap, status of each call.

#include <algorithm>
#include <utility>

#include "../kernel/clear.cuh"
#include "../kernel/combine_topk.cuh"
#include "../kernel/gather_rows.cuh"
#include "../kernel/moe_align.cuh"
#include "device_setup.h"
#include "instances.h"
#include "launch_gemm.h"
#include "residence.h"
#include "skinny/cut.h"
#include "skinny/instances.h"
#include "skinny/tile_table.h"
#include "stream/instances.h"
#include "stream/tile_table.h"
#include "tile_table.h"
#include "wgmma/launch.h"

namespace jax_marlin {
namespace {

constexpr int kMaxGridY = 65535;
constexpr int64_t kMaxClearBlocks = 1024;
constexpr int kAlignSlotsBehind = 8192;  // that the last expert may leave to one block

GemmKernel find_kernel(const GemmLaunch& gemm) {
  const bool stored = gemm.params.zero_points != nullptr;
  const auto find = gemm.element == ElementType::kFloat16
                        ? (gemm.bits == 4 ? gemm_kernel_fp16_w4 : gemm_kernel_fp16_w8)
                        : (gemm.bits == 4 ? gemm_kernel_bf16_w4 : gemm_kernel_bf16_w8);
  return find(gemm.choice.tile, stored);
}

// cluster: blocks along z that run together. most_shared: of all launches of this kernel, where
// they differ.
template <class Params>
cudaError_t launch(void (*kernel)(Params), dim3 grid, int threads, int shared_bytes, Order order,
                   cudaStream_t stream, const Params& params, int cluster = 1,
                   int most_shared = 0) {
  bool overlaps = false;
  const cudaError_t ready = set_up_kernel(reinterpret_cast<const void*>(kernel),
                                          std::max(shared_bytes, most_shared), &overlaps);
  if (ready != cudaSuccess) return ready;
  cudaLaunchAttribute attributes[2] = {};
  int count = 0;
  if (order == Order::kOverlap && overlaps) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count++].val.clusterDim = {1, 1, static_cast<unsigned>(cluster)};
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = count;
  return cudaLaunchKernelEx(&config, kernel, params);
}

cudaError_t launch_stream(const GemmLaunch& gemm, int sm_count, Order order, cudaStream_t stream) {
  GemmParams params = gemm.params;
  const bool routed = params.sorted_token_ids != nullptr || params.topk_ids != nullptr;
  if (!routed) return cudaErrorInvalidValue;
  params.n_blocks = gemm.choice.n_blocks;
  const auto find = gemm.element == ElementType::kFloat16 ? stream_kernel_fp16 : stream_kernel_bf16;
  const int tile = gemm.choice.tile;
  const GemmKernel kernel = find(gemm.bits, tile, params.zero_points != nullptr);
  const int64_t pieces = gemm.choice.row_blocks * gemm.choice.n_blocks;
  const int64_t blocks =
      std::min<int64_t>(pieces, int64_t{sm_count} * kStreamTable[tile].min_blocks);
  if (pieces + blocks > INT32_MAX) return cudaErrorInvalidConfiguration;  // indices run past them
  return launch(kernel.function, dim3(static_cast<unsigned>(blocks)), kernel.threads,
                kernel.shared_bytes, order, stream, params);
}

cudaError_t launch_skinny(const GemmLaunch& gemm, int sm_count, Order order, cudaStream_t stream) {
  GemmParams params = gemm.params;
  const int tile = gemm.choice.tile;
  const SkinnyPlan plan = cut_skinny(kSkinnyTable[tile], static_cast<int>(params.out_rows),
                                     params.k_tiles, params.n, sm_count);
  params.skinny = plan.cut;
  const uint32_t halves = params.group_size / kHalf;
  params.skinny.groups_per_half = params.num_groups == 1 ? 0 : ((1u << 31) + halves - 1) / halves;
  const auto find = gemm.element == ElementType::kFloat16 ? skinny_kernel_fp16 : skinny_kernel_bf16;
  const GemmKernel kernel = find(gemm.bits, tile, params.zero_points != nullptr);
  return launch(kernel.function, dim3(plan.clusters, 1, plan.cut.parts), kernel.threads,
                plan.shared_bytes, order, stream, params, plan.cut.parts, kSharedOfBlock);
}

cudaError_t launch_mma(const GemmLaunch& gemm, const DeviceLimits& device, Order order,
                       cudaStream_t stream) {
  const TileChoice& choice = gemm.choice;
  GemmParams params = gemm.params;
  params.split_k = choice.split_k;
  params.sub_blocks = choice.sub_blocks;
  if (choice.split_k > 1 && !choice.in_cluster) {
    params.arrivals = static_cast<int*>(gemm.scratch);
    params.partials =
        reinterpret_cast<float*>(static_cast<char*>(gemm.scratch) + arrivals_bytes(choice));
  }
  const GemmKernel kernel = find_kernel(gemm);
  const TileConfig& tile = tile_at(choice.tile);
  if (choice.row_blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  // Routed: column blocks first, so that row blocks beyond those in use, which leave at once, come
  // last. Dense: row blocks first, which share weights.
  const bool routed = params.expert_ids != nullptr || params.topk_ids != nullptr;
  const int64_t row_blocks = choice.row_blocks + (params.zeroes_rows ? 1 : 0);
  params.columns_first = routed && row_blocks <= kMaxGridY;
  dim3 grid(static_cast<unsigned>(row_blocks), choice.n_blocks, choice.split_k);
  if (params.columns_first) std::swap(grid.x, grid.y);
  if (grid.y > kMaxGridY) return cudaErrorInvalidConfiguration;
  const int cluster = choice.in_cluster ? choice.split_k : 1;
  const Residence residence =
      select_residence(params, choice, tile, gemm.bits, kernel.stages_at, device);
  const int resident_bytes = std::max(kernel.shared_bytes, kernel.stages_at + residence.bytes);
  // A kernel that starts beside this one counts on no more than the ring takes.
  if (residence.rows == 0 || (params.next_fits_beside && resident_bytes > kernel.shared_bytes)) {
    return launch(kernel.function, grid, kernel.threads, kernel.shared_bytes, order, stream, params,
                  cluster);
  }
  params.resident_rows = residence.rows;
  return launch(kernel.resident, grid, kernel.threads, resident_bytes, order, stream, params,
                cluster, kSharedOfBlock);
}

// Whether the busiest multiprocessor has as many blocks as it has room for, however they lie. Where
// it has fewer, blocks that begin while the kernel before them ends make it busier. wgmma and
// skinny blocks fill theirs alone, or are not launched early: wgmma/launch.cu.
bool fills_gpu(const GemmLaunch& gemm, int sm_count) {
  const TileChoice& choice = gemm.choice;
  if (choice.kernel != Kernel::kMma) return choice.kernel != Kernel::kStream;
  const int64_t blocks = choice.row_blocks * choice.n_blocks * choice.split_k;
  const int64_t room = tile_at(choice.tile).blocks_per_sm(gemm.bits);
  return blocks > (room - 1) * sm_count && blocks <= room * sm_count;
}

// Whether the GEMM itself can zero the rows that it does not compute.
bool can_zero_rows(const GemmLaunch& gemm) {
  const GemmParams& p = gemm.params;
  return gemm.choice.kernel != Kernel::kWgmma && p.sorted_token_ids != nullptr && p.slots > 0 &&
         p.slots <= kMaxNamedSlots && p.out_rows <= kMaxNamedRows;
}

cudaError_t launch_clear(void* begin, int64_t bytes, cudaStream_t stream) {
  if (bytes == 0) return cudaSuccess;
  const int64_t blocks = bytes / (kClearThreads * sizeof(uint4)) + 1;
  const ClearParams params = {static_cast<unsigned char*>(begin), bytes};
  return launch(clear, dim3(static_cast<unsigned>(std::min(blocks, kMaxClearBlocks))),
                kClearThreads, 0, Order::kAfter, stream, params);
}

template <class Element, class Row>
cudaError_t launch_sum(const CombineParams& params, Order order, cudaStream_t stream) {
  constexpr int kBlockColumns = kCombineThreads * kCombineColumns<Row>;
  const dim3 grid(static_cast<unsigned>(params.tokens),
                  (params.columns + kBlockColumns - 1) / kBlockColumns);
  return launch(combine_topk<Element, Row>, grid, kCombineThreads, 0, order, stream, params);
}

}  // namespace

cudaError_t plan_gemm(GemmLaunch& gemm, const GemmProblem& problem) {
  DeviceLimits device = {};
  const cudaError_t found = current_device(&device);
  if (found == cudaSuccess) gemm.choice = select_tile(problem, device);
  return found;
}

cudaError_t clear_arrivals(const GemmLaunch& gemm, cudaStream_t stream) {
  return launch_clear(gemm.scratch, arrivals_bytes(gemm.choice), stream);
}

cudaError_t launch_gemm(const GemmLaunch& gemm, Order order, cudaStream_t stream) {
  const TileChoice& choice = gemm.choice;
  if (choice.row_blocks == 0 || choice.n_blocks == 0) return cudaSuccess;
  DeviceLimits device = {};
  const cudaError_t found = current_device(&device);
  if (found != cudaSuccess) return found;
  switch (choice.kernel) {
    case Kernel::kWgmma:
      return launch_wgmma_gemm(gemm, device.sm_count, order, stream);
    case Kernel::kStream:
      return launch_stream(gemm, device.sm_count, order, stream);
    case Kernel::kSkinny:
      return launch_skinny(gemm, device.sm_count, order, stream);
    case Kernel::kMma:
      return launch_mma(gemm, device, order, stream);
  }
  return cudaErrorInvalidValue;
}

cudaError_t launch_cleared_gemm(GemmLaunch gemm, int64_t out_bytes, cudaStream_t stream) {
  if (out_bytes > 0 && can_zero_rows(gemm)) {
    gemm.params.zeroes_rows = true;
    out_bytes = 0;
  }
  cudaError_t status = launch_clear(gemm.params.out, out_bytes, stream);
  if (status == cudaSuccess) status = clear_arrivals(gemm, stream);
  const bool cleared = out_bytes > 0 || arrivals_bytes(gemm.choice) > 0;
  gemm.params.zeros_are_pending = cleared;
  DeviceLimits device = {};
  if (status == cudaSuccess) status = current_device(&device);
  // Blocks set up while the kernel before them ends, and wait for that one, whatever it is. NOTE:
  // one that itself starts early must wait for its own, as all of ours do.
  const bool starts_early = cleared || fills_gpu(gemm, device.sm_count);
  const Order order = starts_early ? Order::kOverlap : Order::kAfter;
  return status != cudaSuccess ? status : launch_gemm(gemm, order, stream);
}

cudaError_t launch_gather(const GatherParams& params, Order order, cudaStream_t stream) {
  if (params.slots == 0) return cudaSuccess;
  return launch(gather_rows, dim3(params.slots), 256, 0, order, stream, params);
}

cudaError_t launch_align(const AlignParams& params, cudaStream_t stream) {
  AlignParams p = params;
  // Lanes that count in copies of their own do not meet; no more counters than ids, or clearing
  // and summing them takes longer than counting.
  const int counters = std::min(p.routes, kMaxAlignExperts);
  for (p.copies = 1; p.copies < 32 && 2 * p.copies * p.num_experts <= counters;) p.copies *= 2;
  const int threads = (std::clamp(p.routes, 256, kMaxAlignThreads) + 31) / 32 * 32;
  const int blocks_behind = std::min(1 + (p.slots - p.routes) / kAlignSlotsBehind, 64);
  return launch(moe_align, dim3(p.num_experts + blocks_behind), threads,
                (p.num_experts + 1) * p.copies * static_cast<int>(sizeof(int)), Order::kAfter,
                stream, p);
}

cudaError_t launch_combine(const CombineParams& params, ElementType element, Order order,
                           cudaStream_t stream) {
  if (params.tokens == 0) return cudaSuccess;
  const auto wide = element == ElementType::kFloat16 ? launch_sum<__half, float>
                                                     : launch_sum<__nv_bfloat16, float>;
  const auto narrow = element == ElementType::kFloat16 ? launch_sum<__half, __half>
                                                       : launch_sum<__nv_bfloat16, __nv_bfloat16>;
  return (params.rows_are_float32 ? wide : narrow)(params, order, stream);
}

}  // namespace jax_marlin
