// Sums of the slices of K to rows of out: added in order, scaled, stored.
#pragma once

#include "epilogue.cuh"
#include "skinny_work.cuh"

namespace jax_marlin {

// One warp's sums of a piece, [rows, columns].
template <class Config>
__device__ __forceinline__ void share_slice(const Accumulator<Config>& acc, int rows, float* sums) {
  const int g = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
#pragma unroll
  for (int m = 0; m < Config::kFragsM; ++m) {
#pragma unroll
    for (int token = 0; token < 2; ++token) {
      const int row = 8 * m + 2 * c + token;
      if (row >= rows) return;
      // c[16x8]: rows g, g + 8 are columns of out, columns 2c, 2c + 1 are tokens.
      float* to = sums + row * kSkinnySumPitch + g;
#pragma unroll
      for (int f = 0; f < Config::kFragsN; ++f) {
#pragma unroll
        for (int b = 0; b < 2; ++b) {
          to[f * kFragment + 8 * b] = acc[f][m][token + 2 * b] * Dequant<Config>::kSumScale;
        }
      }
    }
  }
}

// All pieces of this warp's team, by the threads of the team.
template <class Config>
__device__ __forceinline__ void store_pieces(const GemmParams& p, const SkinnyWork<Config>& work,
                                             unsigned char* shared) {
  constexpr int kVectors = kSkinnyColumns / 4;  // of a row of a piece
  const int k_shift = work.cut.k_shift, threads = 32 << k_shift;
  const int first_warp = work.warp >> k_shift << k_shift;
  for (int i = threadIdx.x & (threads - 1); i < work.pieces * work.rows * kVectors; i += threads) {
    const int at = i / kVectors, column = i % kVectors * 4;
    const int piece = static_cast<unsigned>(at) / work.rows, row = at - piece * work.rows;
    const int n = (work.first + piece) * kSkinnyColumns + column;
    if (n >= p.n) continue;
    const float* from = work.sums(shared, piece, first_warp) + row * kSkinnySumPitch + column;
    float4 sum = {};
#pragma unroll 4
    for (int slice = 0; slice < work.cut.slices; ++slice) {
      add(sum, *reinterpret_cast<const float4*>(from + slice * work.rows * kSkinnySumPitch));
    }
    store<Config>(p, work.expert, row, n, sum);
  }
}

}  // namespace jax_marlin
