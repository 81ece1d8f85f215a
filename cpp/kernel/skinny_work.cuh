// The skinny kernel's single template argument, and what a warp has to do.
#pragma once

#include "params.h"
#include "ptx_sm90.cuh"
#include "skinny_tile.h"
#include "weight_format.cuh"

namespace jax_marlin {

template <class Element_, int bits, ZeroPoints zero_points, SkinnyTile tile>
struct SkinnyConfig : WeightFormat<Element_, bits, zero_points> {
  static constexpr int kRows = tile.rows;
  static constexpr int kFragsM = kRows / 8;  // of mma.m16n8k16, whose n are tokens
  static constexpr int kFragsN = kSkinnyColumns / kFragment;
  static constexpr int kWarps = tile.warps;
  static constexpr int kThreads = tile.threads();
  static constexpr int kDepth = tile.depth;
  static constexpr bool kScaleSums = kRows == 8;  // few tokens: dequant.cuh
  static constexpr bool kSumsRoutes = false;
  static_assert(kWarps * sizeof(uint64_t) <= kSkinnyBarrierBytes);
};

// A warp's slice of K, over all pieces of its team.
template <class Config>
struct SkinnyWork {
  using Element = typename Config::Element;

  __device__ __forceinline__ explicit SkinnyWork(const GemmParams& p)
      : cut(p.skinny),
        warp(ptx::uniform(threadIdx.x / 32)),
        rows(static_cast<int>(p.out_rows)),
        part(blockIdx.z),
        slice(warp & ((1 << cut.k_shift) - 1)),
        team(warp >> cut.k_shift) {
    const int of_all = static_cast<int>(team * gridDim.x + blockIdx.x);
    first = of_all * cut.pieces + min(of_all, cut.more);
    pieces = cut.pieces + (of_all < cut.more ? 1 : 0);
    k_tile = ((part << cut.k_shift) + slice) * cut.slice_tiles;
    tiles = max(min(cut.slice_tiles, p.k_tiles - k_tile), 0);
  }

  // The slice of x, [rows, x_pitch], of all teams of the block.
  __device__ __forceinline__ Element* x(unsigned char* shared) const {
    return reinterpret_cast<Element*>(shared + kSkinnyBarrierBytes) + slice * rows * cut.x_pitch;
  }
  // It has landed.
  __device__ __forceinline__ uint64_t* x_ready(unsigned char* shared) const {
    return reinterpret_cast<uint64_t*>(shared) + slice;
  }
  // Rows whose sums meet in a block.
  __device__ __forceinline__ int sum_rows() const { return min(rows, 1 << cut.row_shift); }
  // Those of the i-th piece of the team, over slice `of_all` of all parts of K: [sum_rows, pitch].
  __device__ __forceinline__ float* sums(unsigned char* shared, int i, int of_all) const {
    const int slot = i * Config::kWarps * cut.parts + (team * cut.parts << cut.k_shift) + of_all;
    return reinterpret_cast<float*>(shared + cut.sums_at) + slot * sum_rows() * kSkinnySumPitch;
  }

  const SkinnyCut& cut;
  const int warp, rows;
  const int part, slice;  // of K: of the cluster; of the part
  const int team;  // of the block
  int first, pieces;  // of the team
  int k_tile, tiles;  // of the slice
};

}  // namespace jax_marlin
