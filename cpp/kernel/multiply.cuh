// One packed K tile of one warp times its tokens, whatever holds the operands.
#pragma once

#include "dequant.cuh"
#include "epilogue.cuh"

namespace jax_marlin {

// sum = a b over two k16 steps, or sum += a b.
template <class Config>
__device__ __forceinline__ void multiply_half(const uint32_t (&a)[2][4], const uint32_t (&b)[4],
                                              bool first, float (&sum)[4]) {
  constexpr typename Config::Element kElement{};
  constexpr float kZero[4] = {};
  if (first) {
    ptx::mma_m16n8k16(sum, a[0], b[0], b[1], kZero, kElement);
  } else {
    ptx::mma_m16n8k16(sum, a[0], b[0], b[1], sum, kElement);
  }
  ptx::mma_m16n8k16(sum, a[1], b[2], b[3], sum, kElement);
}

// The words of k16 step `step` (0..3) of a packed tile.
template <class Config>
__device__ __forceinline__ void step_words(const uint4 (&tile)[Config::kVectors], int step,
                                           uint32_t (&words)[Config::kStepWords]) {
#pragma unroll
  for (int i = 0; i < Config::kStepWords; ++i) {
    const int at = step * Config::kStepWords + i;
    const uint4& v = tile[at / 4];
    words[i] = at % 4 == 0 ? v.x : at % 4 == 1 ? v.y : at % 4 == 2 ? v.z : v.w;
  }
}

// 4 k16 steps by kFragsN by kFragsM tensor-core products. Operands give, for `tile`:
//   load_words(f, tile, words)          the thread's words of column fragment f
//   load_scale(f, tile, half)           of half the tile's K
//   load_fragment(b, m, tile, half)     8 tokens
//   end_scale(halves)                   so many halves are done
// by_tile: both halves have the same scale.
template <class Config, bool by_tile, class Operands>
__device__ __forceinline__ void multiply_tile(Operands& operands, int tile,
                                              Accumulator<Config>& acc) {
  uint4 words[Config::kFragsN][Config::kVectors];
  float sums[Config::kFragsN][Config::kFragsM][4];  // where the sum is scaled, not the weights
#pragma unroll
  for (int f = 0; f < Config::kFragsN; ++f) operands.load_words(f, tile, words[f]);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    uint32_t a[Config::kFragsN][2][4];  // [fragment, k16 step, register]
    float scales[Config::kFragsN][2];
#pragma unroll
    for (int f = 0; f < Config::kFragsN; ++f) {
      const auto scale = operands.load_scale(f, tile, by_tile ? 0 : half);
      scales[f][0] = scale.of_sums[0], scales[f][1] = scale.of_sums[1];
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        uint32_t step_of[Config::kStepWords];
        step_words<Config>(words[f], 2 * half + step, step_of);
        dequantize<Config>(step_of, scale, a[f][step]);
      }
    }
#pragma unroll
    for (int m = 0; m < Config::kFragsM; ++m) {
      uint32_t b[4];
      operands.load_fragment(b, m, tile, half);
#pragma unroll
      for (int f = 0; f < Config::kFragsN; ++f) {
        if constexpr (!Config::kScaleSums) {
          multiply_half<Config>(a[f], b, false, acc[f][m]);
        } else {
          multiply_half<Config>(a[f], b, half == 0 || !by_tile, sums[f][m]);
          if (by_tile && half == 0) continue;
#pragma unroll
          for (int i = 0; i < 4; ++i) acc[f][m][i] += scales[f][i / 2] * sums[f][m][i];
        }
      }
    }
    if (!by_tile) operands.end_scale(1);
  }
  if (by_tile) operands.end_scale(2);
}

}  // namespace jax_marlin
