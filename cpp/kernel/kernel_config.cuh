// The kernel's single template argument: element type, bits, zero points, tile; every constant that
// follows from them is derived here, once.
#pragma once

#include "tile_config.h"
#include "weight_format.cuh"

namespace jax_marlin {

template <class Element_, int bits, ZeroPoints zero_points, TileConfig tile>
struct KernelConfig : WeightFormat<Element_, bits, zero_points> {
  static constexpr int kTileM = tile.tile_m;
  static constexpr int kFragsM = tile.tile_m / 8;  // n8 fragments of tokens
  static constexpr int kFragsN = tile.frags_n;
  static constexpr int kFragments = tile.fragments;
  static constexpr int kColumns = tile.columns();
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kWarpsN = tile.warps_n();
  static constexpr int kWarpsK = tile.warps_k();
  static constexpr int kDepth = tile.depth_of(bits);
  static constexpr int kChunk = tile.chunk;
  static constexpr int kStages = tile.stages;
  static constexpr int kMinBlocks = tile.blocks_per_sm(bits);
  static constexpr bool kSumsRoutes = tile.sums_routes;
  static constexpr bool kTransposed = tile.transposed;
  static constexpr bool kCanReside = tile.can_reside();
  static constexpr int kXRows = kSumsRoutes ? 1 : kTileM;  // of x in shared memory
  // Few tokens: the sum over a packed tile is scaled (4 products for 8 tokens), many: its weights
  // (16 products of two), or where scales change along the sum.
  static constexpr bool kScaleSums = tile.tile_m <= 16 && !kTransposed;

  // 16 bytes of padding a row turn the row pitch into 4 banks modulo 32: ldmatrix has no conflict.
  static constexpr int kXPitch = kChunk * kTile + 8;
  // 4 floats of padding spread the accumulators' (token 2c, column g) over all 32 banks.
  static constexpr int kPartialPitch = kColumns + 4;

  static_assert(tile.tile_m % 8 == 0, "tokens are the 8-wide side of m16n8k16");
  static_assert(tile.depth_of(bits) % tile.chunk == 0, "the weight ring turns in whole x stages");
  static_assert(tile.fragments % tile.frags_n == 0, "warps must tile the block's columns");
  static_assert(!kTransposed || kTile / kFragment % tile.frags_n == 0, "of one packed tile");
  static_assert(kWarps % tile.warps_n() == 0, "what warps N leaves split K");
};

}  // namespace jax_marlin
