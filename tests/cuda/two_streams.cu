// Two streams run the same split-K product at once, each with its own scratch, many times.
// The launcher keeps no state, so each result must equal the one computed alone, bit for bit.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#include "../../cpp/kernel/tile_config.h"
#include "../../cpp/launch/device_setup.h"
#include "../../cpp/launch/launch_gemm.h"

using namespace jax_marlin;

constexpr int kRows = 5, kK = 4096, kN = 320, kStreams = 2, kRounds = 500;

__global__ void fill(uint32_t* words, int count, uint32_t seed, bool as_bf16) {
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x) {
    const uint32_t hash = (i + seed) * 2654435761u ^ (i + seed) >> 3;
    // As bfloat16 pairs: magnitudes of 2^-7 to 2^-6, either sign.
    words[i] = as_bf16 ? (hash & 0x807f807fu) | 0x3c003c00u : hash;
  }
}

void multiply(const GemmLaunch& gemm, cudaStream_t stream) { launch_cleared_gemm(gemm, 0, stream); }

int main() {
  DeviceLimits device = {};
  if (current_device(&device) != cudaSuccess) return 1;
  const TileChoice choice = select_tile({kRows, 0, kK, kN, 4}, device);
  std::printf("split_k %d\n", choice.split_k);
  if (choice.split_k < 2) return 1;

  const size_t out_bytes = kRows * kN * 2;
  GemmLaunch gemms[kStreams];
  cudaStream_t streams[kStreams];
  std::vector<uint8_t> alone[kStreams];
  const auto allocate = [](size_t words, uint32_t seed, bool as_bf16) {
    uint32_t* data = nullptr;
    cudaMalloc(&data, words * 4);
    fill<<<64, 256>>>(data, static_cast<int>(words), seed, as_bf16);
    return data;
  };
  for (int s = 0; s < kStreams; ++s) {
    gemms[s] = {{}, choice, ElementType::kBfloat16, 4, nullptr};
    GemmParams& p = gemms[s].params;
    p.x = allocate(kRows * kK / 2, 11 + s, true);
    p.qweight = allocate(size_t{kK} * kN / 8, 23 + s, false);
    p.scales = allocate(kK / 128 * kN / 2, 37 + s, true);
    p.out = allocate(out_bytes / 4, 0, false);
    p.x_stride = p.k = kK;
    p.n = kN;
    p.out_rows = kRows;
    p.num_experts = p.row_divisor = 1;
    p.stack_n_tiles = kN / 64;
    p.k_tiles = kK / 64;
    p.group_size = 128;
    p.num_groups = kK / 128;
    p.groups_per_half = float{kHalf} / 128;
    gemms[s].scratch = allocate(scratch_bytes(choice) / 4 + 1, 91 + s, false);
    cudaStreamCreateWithFlags(&streams[s], cudaStreamNonBlocking);
    cudaDeviceSynchronize();
    multiply(gemms[s], streams[s]);
    alone[s].resize(out_bytes);
    cudaDeviceSynchronize();
    cudaMemcpy(alone[s].data(), p.out, out_bytes, cudaMemcpyDeviceToHost);
  }
  int wrong = 0;
  std::vector<uint8_t> out(out_bytes);
  for (int round = 0; round < kRounds; ++round) {
    for (int repeat = 0; repeat < 4; ++repeat) {
      for (int s = 0; s < kStreams; ++s) {
        multiply(gemms[s], streams[s]);
      }
    }
    if (cudaDeviceSynchronize() != cudaSuccess) return 1;
    for (int s = 0; s < kStreams; ++s) {
      cudaMemcpy(out.data(), gemms[s].params.out, out_bytes, cudaMemcpyDeviceToHost);
      wrong += std::memcmp(out.data(), alone[s].data(), out_bytes) != 0;
    }
  }
  std::printf("%d of %d wrong\n", wrong, kStreams * kRounds);
  return wrong != 0;
}
