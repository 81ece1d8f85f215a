// The skinny kernel's single template argument, and what a warp has to do.
#pragma once

#include "params.h"
#include "ptx_sm90.cuh"
#include "skinny_tile.h"
#include "weight_format.cuh"

namespace jax_marlin {

template <class Element_, int bits, ZeroPoints zero_points, SkinnyTile tile>
struct SkinnyConfig : WeightFormat<Element_, bits, zero_points> {
  static constexpr int kFragsM = tile.rows / 8;  // of mma.m16n8k16, whose n are tokens
  static constexpr int kFragsN = kSkinnyColumns / kFragment;
  static constexpr int kWarps = tile.warps;
  static constexpr int kThreads = tile.threads();
  static constexpr int kDepth = tile.depth;
  static constexpr bool kScaleSums = true;  // few tokens: dequant.cuh
  static constexpr bool kSumsRoutes = false;
};

// A warp's slice of K, over all pieces of its team.
template <class Config>
struct SkinnyWork {
  using Element = typename Config::Element;

  __device__ __forceinline__ explicit SkinnyWork(const GemmParams& p)
      : cut(p.skinny), warp(threadIdx.x / 32), rows(static_cast<int>(p.out_rows)) {
    const int team = (static_cast<int>(blockIdx.x) * Config::kWarps + warp) >> cut.k_shift;
    first = team * cut.pieces + min(team, cut.more);
    pieces = ptx::uniform(cut.pieces + (team < cut.more ? 1 : 0));
    k_tile = (warp & ((1 << cut.k_shift) - 1)) * cut.slice_tiles;
    tiles = pieces == 0 ? 0 : ptx::uniform(max(min(cut.slice_tiles, p.k_tiles - k_tile), 0));
    expert = p.expert == nullptr ? 0 : min(max(*p.expert, 0), p.num_experts - 1);
  }

  // The warp's slice of x, [rows, x_pitch].
  __device__ __forceinline__ Element* x(unsigned char* shared) const {
    return reinterpret_cast<Element*>(shared) + warp * rows * cut.x_pitch;
  }
  // A warp's sums of the i-th piece of its team, [rows, kSkinnySumPitch].
  __device__ __forceinline__ float* sums(unsigned char* shared, int i, int of_warp) const {
    return reinterpret_cast<float*>(shared + cut.x_bytes) +
           (i * Config::kWarps + of_warp) * rows * kSkinnySumPitch;
  }

  const SkinnyCut& cut;
  const int warp, rows;
  int first, pieces;  // of the team
  int k_tile, tiles;  // of the slice
  int expert;
};

}  // namespace jax_marlin
