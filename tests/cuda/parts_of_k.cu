// Blocks that split K meet in a cluster's shared memory on sm_90, in scratch elsewhere. Both add
// the parts in the same order: here one GPU does both, at every tile of the table, and the bits
// agree. One part of all K, which meets nothing, says that they are right: those sums have another
// order.
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#include "../../cpp/launch/launch_gemm.h"
#include "../../cpp/launch/stream/instances.h"
#include "../../cpp/launch/tile_table.h"
#include "../../cpp/launch/wgmma/launch.h"

namespace jax_marlin {

// Kernels that none of these problems takes are left out of this build.
GemmKernel stream_kernel_fp16(int, int, bool) { return {}; }
GemmKernel stream_kernel_bf16(int, int, bool) { return {}; }
bool has_wgmma() { return true; }
cudaError_t launch_wgmma_gemm(const GemmLaunch&, int, Order, cudaStream_t) {
  return cudaErrorNotSupported;
}

}  // namespace jax_marlin

using namespace jax_marlin;

// 33 packed tiles: 8 parts of 5 leave the last one empty, and begin inside groups of two.
constexpr int kK = 2112, kN = 200, kGroup = 128, kExperts = 3, kTopK = 2, kRounds = 20;
constexpr int kGroups = (kK + kGroup - 1) / kGroup, kTiles = (kK + kTile - 1) / kTile;
constexpr int kColumnTiles = (kN + kTile - 1) / kTile;
constexpr DeviceLimits kH100 = {132, true};  // whatever GPU this is, the choices are the same

uint32_t hash(uint32_t i, uint32_t seed) {
  i = (i + seed) * 2654435761u;
  i = (i ^ i >> 15) * 2246822519u;
  return i ^ i >> 13;
}

template <class T>
T* on_device(const std::vector<T>& host) {
  T* data = nullptr;
  cudaMalloc(&data, host.size() * sizeof(T));
  cudaMemcpy(data, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice);
  return data;
}

// As bfloat16: magnitudes of 2^-7 to 2^-6, either sign.
uint16_t* random_numbers(size_t count, uint32_t seed) {
  std::vector<uint16_t> host(count);
  for (size_t i = 0; i < count; ++i) host[i] = (hash(i, seed) >> 16 & 0x807f) | 0x3c00;
  return on_device(host);
}

uint32_t* random_words(size_t count, uint32_t seed) {
  std::vector<uint32_t> host(count);
  for (size_t i = 0; i < count; ++i) host[i] = hash(i, seed);
  return on_device(host);
}

// Each expert's rows padded to blocks, then a block to skip; behind what is used, ids that name
// rows.
void route(GemmParams& p, int block) {
  std::vector<int> slots, experts;
  for (int expert = 0; expert < kExperts; ++expert) {
    const size_t begin = slots.size();
    for (int row = 0; row < p.out_rows; ++row) {
      if (static_cast<int>(hash(row, 5) % (kExperts + 1)) == expert) slots.push_back(row);
    }
    slots.resize(begin + ceil_div(slots.size() - begin, block) * block, p.out_rows);
    experts.resize(slots.size() / block, expert);
  }
  slots.resize(slots.size() + block, 0);
  experts.push_back(-1);
  const int used = static_cast<int>(slots.size());
  slots.resize(slots.size() + block, 1);
  experts.push_back(0);
  p.slots = static_cast<int>(slots.size());
  p.moe_block_size = block;
  p.row_divisor = kTopK;
  p.sorted_token_ids = on_device(slots);
  p.expert_ids = on_device(experts);
  p.num_tokens_past_padded = on_device(std::vector<int>{used});
}

// Out, and all of scratch, are NaN before.
std::vector<float> multiply(GemmLaunch gemm, const TileChoice& choice) {
  static cudaStream_t stream = nullptr;
  if (stream == nullptr) cudaStreamCreate(&stream);
  gemm.choice = choice;
  std::vector<float> out(gemm.params.out_rows * kN);
  const size_t out_bytes = out.size() * sizeof(float), bytes = scratch_bytes(choice);
  cudaMalloc(&gemm.scratch, bytes + 1);
  cudaMemsetAsync(gemm.scratch, 0xff, bytes + 1, stream);
  cudaMemsetAsync(gemm.params.out, 0xff, out_bytes, stream);
  // Rows that no slot names are the caller's to zero.
  const bool routed = gemm.params.sorted_token_ids != nullptr;
  cudaError_t status = launch_cleared_gemm(gemm, routed ? out_bytes : 0, stream);
  if (status == cudaSuccess) status = cudaStreamSynchronize(stream);
  if (status != cudaSuccess) std::printf("%s\n", cudaGetErrorString(status));
  cudaMemcpy(out.data(), gemm.params.out, out_bytes, cudaMemcpyDeviceToHost);
  cudaFree(gemm.scratch);
  return out;
}

// Whether two products are the same but for the order of their sums: the bound of tests/oracle.py,
// with more than |x| |w| of any element.
bool close(const std::vector<float>& a, const std::vector<float>& b) {
  const double budget = 2 * 4 * std::sqrt(kK) * std::ldexp(kK * 8., -24 - 6 - 6);
  float largest = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    if (!(std::fabs(a[i] - b[i]) <= budget)) return false;
    largest = std::max(largest, std::fabs(a[i]));
  }
  return largest > 100 * budget;
}

// 0 if right.
int check(int tile, bool routed) {
  const int tile_m = kTileTable[tile].tile_m;
  GemmLaunch gemm = {{}, {}, ElementType::kBfloat16, 4, nullptr};
  GemmParams& p = gemm.params;
  const int rows = routed ? 30 : tile_m + 3;  // dense: the second row block is short
  p.out_rows = rows;
  p.x = random_numbers(static_cast<size_t>(rows) * kK, 11);
  p.qweight = random_words(size_t{kExperts} * kColumnTiles * kTiles * 512, 23);
  p.scales = random_numbers(size_t{kExperts} * kColumnTiles * kGroups * kTile, 37);
  cudaMalloc(&p.out, static_cast<size_t>(rows) * kN * sizeof(float));
  p.out_is_float32 = true;
  p.x_stride = p.k = kK;
  p.n = kN;
  p.num_experts = kExperts;
  p.row_divisor = 1;
  p.stack_n_tiles = kColumnTiles;
  p.k_tiles = kTiles;
  p.group_size = kGroup;
  p.num_groups = kGroups;
  p.groups_per_half = float{kHalf} / kGroup;
  GemmProblem problem = {rows, 0, kK, kN, 4};
  if (routed) {
    route(p, tile_m - 1);
    problem = {p.slots, p.moe_block_size, kK, kN, 4, false, rows, kExperts};
  }
  const TileChoice in_cluster = tile_choice(problem, tile, kH100);
  TileChoice in_scratch = in_cluster, whole = in_cluster;
  in_scratch.in_cluster = whole.in_cluster = false;
  whole.split_k = 1;
  std::printf("tile %d, %s: %d parts\n", tile, routed ? "routed" : "dense", in_cluster.split_k);
  if (!in_cluster.in_cluster || scratch_bytes(in_scratch) == 0) return 1;
  const std::vector<float> expected = multiply(gemm, in_cluster);
  int wrong = !close(expected, multiply(gemm, whole));
  for (int round = 0; round < kRounds; ++round) {
    for (const TileChoice& choice : {in_cluster, in_scratch}) {
      const std::vector<float> out = multiply(gemm, choice);
      wrong += std::memcmp(out.data(), expected.data(), out.size() * sizeof(float)) != 0;
    }
  }
  return wrong;
}

int main() {
  int wrong = 0;
  for (int tile = 0; tile < kNumTiles; ++tile) {
    for (const bool routed : {false, true}) wrong += check(tile, routed) != 0;
  }
  std::printf("%d of %d wrong\n", wrong, 2 * kNumTiles);
  return wrong != 0;
}
