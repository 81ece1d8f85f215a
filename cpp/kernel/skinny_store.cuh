// Sums of the slices of K to rows of out: added in order, scaled, stored.
#pragma once

#include "epilogue.cuh"
#include "skinny_work.cuh"

namespace jax_marlin {

// One warp's sums of a piece, to where those of its rows meet. Column 16f + 8b + g of a row lies at
// 4g + 2f + b: what a thread has of a token are neighbours.
template <class Config>
__device__ __forceinline__ void share_slice(const Accumulator<Config>& acc,
                                            const SkinnyWork<Config>& work, unsigned char* shared,
                                            int piece) {
  static_assert(Config::kFragsN == 2);
  constexpr float kScale = Dequant<Config>::kSumScale;
  const int g = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
  float* to = work.sums(shared, piece, (work.part << work.cut.k_shift) + work.slice) + 4 * g;
#pragma unroll
  for (int m = 0; m < Config::kFragsM; ++m) {
#pragma unroll
    for (int token = 0; token < 2; ++token) {
      // c[16x8]: rows g, g + 8 are columns of out, columns 2c, 2c + 1 are tokens.
      const int row = 8 * m + 2 * c + token;
      const float4 sums = {kScale * acc[0][m][token], kScale * acc[0][m][token + 2],
                           kScale * acc[1][m][token], kScale * acc[1][m][token + 2]};
      if (row >= work.rows) continue;
      if (work.cut.parts == 1) {
        *reinterpret_cast<float4*>(to + row * kSkinnySumPitch) = sums;
      } else {
        const int owner = row >> work.cut.row_shift, at = row - (owner << work.cut.row_shift);
        ptx::store_remote(reinterpret_cast<float4*>(to + at * kSkinnySumPitch), owner, sums);
      }
    }
  }
}

// All pieces of this warp's team, the rows of this block, by the threads of the team.
template <class Config>
__device__ __forceinline__ void store_pieces(const GemmParams& p, const SkinnyWork<Config>& work,
                                             unsigned char* shared, int expert) {
  constexpr int kVectors = kSkinnyColumns / 4;  // of a row of a piece
  const int threads = 32 << work.cut.k_shift;
  const int sum_rows = work.sum_rows(), first_row = work.part << work.cut.row_shift;
  const int rows = min(work.rows - first_row, sum_rows);
  if (rows <= 0) return;
  for (int i = threadIdx.x & (threads - 1); i < work.pieces * rows * kVectors; i += threads) {
    const int at = i / kVectors, column = i % kVectors * 4;
    const int piece = static_cast<unsigned>(at) / rows, row = at - piece * rows;
    const int n = (work.first + piece) * kSkinnyColumns + column;
    if (n >= p.n) continue;
    // Columns 4j .. 4j + 3 are g = 4 (j % 2) .. of the fragment's half j / 2.
    const float* from =
        work.sums(shared, piece, 0) + row * kSkinnySumPitch + column % 8 * 4 + column / 8;
    float4 sum = {};
#pragma unroll 4
    for (int slice = 0; slice < work.cut.slices; ++slice) {
      add(sum, float4{from[0], from[4], from[8], from[12]});
      from += sum_rows * kSkinnySumPitch;
    }
    store<Config>(p, expert, first_row + row, n, sum);
  }
}

}  // namespace jax_marlin
