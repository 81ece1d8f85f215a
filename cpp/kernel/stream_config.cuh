// The streaming kernel's single template argument, every constant that follows, and its shared
// memory.
#pragma once

#include "ring_position.cuh"
#include "stream_tile.h"
#include "unnamed_rows.cuh"
#include "weight_format.cuh"

namespace jax_marlin {

template <class Element_, int bits, ZeroPoints zero_points, StreamTile tile>
struct StreamConfig : WeightFormat<Element_, bits, zero_points> {
  static constexpr int kFragsM = kStreamRows / 8;  // of mma.m16n8k16, whose n are tokens
  static constexpr int kFragsN = kStreamColumnTiles;
  static constexpr int kStageTiles = tile.stage_tiles_of(bits);
  static constexpr int kMinBlocks = tile.min_blocks;
  static constexpr bool kScaleSums = true;  // few tokens: dequant.cuh

  // 16 bytes of padding a row turn the row pitch into 4 banks modulo 32: ldmatrix has no conflict.
  static constexpr int kXPitch = kStageTiles * kTile + 8;
};

template <class Config>
struct StreamStorage {
  using Element = typename Config::Element;
  static constexpr int kHalves = 2 * Config::kStageTiles;  // scales may change every 32 of K
  static constexpr int kScaleSets = Config::kStoredZeroPoints ? 2 : 1;

  // What one piece of work has in one stage. It says itself what it is.
  struct alignas(128) Stage {
    uint32_t weights[kStreamColumnTiles][Config::kStageTiles][Config::kWordsPerTile];
    alignas(16) Element x[kStreamRows][Config::kXPitch];
    alignas(16) Element scales[kScaleSets][kStreamColumnTiles][kHalves][kTile];
    int expert;  // -1: no more work
    int column_block;
    int out_row[kStreamRows];  // -1 for padding
  };

  static constexpr int kBudget =
      kSharedOfSm / Config::kMinBlocks - kSharedReserve - 128 - static_cast<int>(sizeof(NamedRows));
  static constexpr int kStages = kBudget / (static_cast<int>(sizeof(Stage)) + 16);
  static_assert(kStages >= 2, "copies run ahead of the products");

  Stage stages[kStages];
  uint64_t full[kStages], empty[kStages];
  NamedRows named;
};

}  // namespace jax_marlin
