// Feeds one packed tile to wgmma.m64n8k16 as its register operand, straight from the layout's
// words.
//
// The prefill kernels to come rest on this: warp w of a warpgroup holds rows 16w .. 16w + 15 of the
// 64 x 16 A operand in the fragment order of mma.m16n8k16, which is what a packed word decodes to.
// Prints how many of 512 outputs are wrong; integers make every product and sum exact.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <random>
#include <vector>

#include "../../cpp/kernel/dequant.cuh"
#include "../../cpp/kernel/kernel_config.cuh"

using jax_marlin::GroupScale;
using jax_marlin::KernelConfig;
using jax_marlin::TileConfig;
using jax_marlin::ZeroPoints;
using Config =
    KernelConfig<__nv_bfloat16, 4, ZeroPoints::kSymmetric, TileConfig{32, 8, 2, 4, 2, 4, 2}>;

constexpr int kTokens = 8, kTile = 64;

// x as wgmma wants operand B without swizzle: [k16 step, half of k16, token, 8 of k].
__global__ void multiply(const uint32_t* qweight, const __nv_bfloat16* x, float* y) {
  __shared__ __align__(128) __nv_bfloat16 xs[4][2][kTokens][8];
  const int t = threadIdx.x, warp = t / 32, g = t % 32 / 4, c = t % 4;
  for (int i = t; i < kTokens * kTile; i += blockDim.x) {
    const int m = i / kTile, k = i % kTile;
    xs[k / 16][k / 8 % 2][m][k % 8] = x[i];
  }
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncthreads();

  const GroupScale<Config> scale(__float2bfloat162_rn(1.f));
  uint32_t a[4][4];
  for (int step = 0; step < 4; ++step) {
    jax_marlin::dequantize<Config>(qweight + 4 * t + step, scale, a[step]);
  }
  float d[4] = {};
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    const uint64_t address = __cvta_generic_to_shared(&xs[step][0][0][0]);
    // Core matrices of 8 tokens by 8 of k: 128 bytes to the next along k, 256 along tokens.
    const uint64_t descriptor =
        (address & 0x3ffff) >> 4 | uint64_t{128 >> 4} << 16 | uint64_t{256 >> 4} << 32;
    asm volatile(
        "{.reg .pred p; setp.ne.b32 p, 1, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, %8, p, 1, 1, 0;}"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[step][0]), "r"(a[step][1]), "r"(a[step][2]), "r"(a[step][3]), "l"(descriptor));
  }
  asm volatile("wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;" ::: "memory");
  for (int i = 0; i < 4; ++i) {
    const float sum = d[i] * jax_marlin::Dequant<Config>::kSumScale;
    y[(2 * c + i % 2) * kTile + 16 * warp + g + 8 * (i / 2)] = sum;
  }
}

int main() {
  std::mt19937 random(3);
  std::vector<uint32_t> qweight(512);
  std::vector<__nv_bfloat16> x(kTokens * kTile);
  for (auto& word : qweight) word = random();
  for (auto& value : x) value = __float2bfloat16(static_cast<int>(random() % 9) - 4);

  uint32_t* device_qweight;
  __nv_bfloat16* device_x;
  float* device_y;
  cudaMalloc(&device_qweight, 2048);
  cudaMalloc(&device_x, x.size() * 2);
  cudaMalloc(&device_y, x.size() * 4);
  cudaMemcpy(device_qweight, qweight.data(), 2048, cudaMemcpyHostToDevice);
  cudaMemcpy(device_x, x.data(), x.size() * 2, cudaMemcpyHostToDevice);
  cudaMemset(device_y, 0xff, x.size() * 4);  // NaN
  multiply<<<1, 128>>>(device_qweight, device_x, device_y);
  std::vector<float> y(x.size());
  const cudaError_t status = cudaMemcpy(y.data(), device_y, x.size() * 4, cudaMemcpyDeviceToHost);
  if (status != cudaSuccess) {
    std::printf("CUDA: %s\n", cudaGetErrorString(status));
    return 1;
  }
  int wrong = 0;
  for (int m = 0; m < kTokens; ++m) {
    for (int n = 0; n < kTile; ++n) {
      float expected = 0;
      for (int k = 0; k < kTile; ++k) {
        // The layout's formula (README, "Packed format").
        const int j = k / 16, h = k / 8 % 2, c = k % 8 / 2, l = k % 2;
        const int w = n / 16, b = n / 8 % 2, g = n % 8;
        const uint32_t word = qweight[4 * (32 * w + 4 * g + c) + j];
        const int code = word >> (4 * (b + 2 * h + 4 * l)) & 15;
        expected += (code - 8) * __bfloat162float(x[m * kTile + k]);
      }
      wrong += expected != y[m * kTile + n];
    }
  }
  std::printf("%d of %d wrong\n", wrong, kTokens * kTile);
  return wrong != 0;
}
