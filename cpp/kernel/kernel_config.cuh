// The kernel's single template argument: element type, bits, zero points, tile; every constant that
// follows from them is derived here, once.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "tile_config.h"

namespace jax_marlin {

enum class ZeroPoints { kSymmetric, kStored };

template <class Element_, int bits, ZeroPoints zero_points, TileConfig tile>
struct KernelConfig {
  using Element = Element_;
  static constexpr bool kBf16 = std::is_same_v<Element, __nv_bfloat16>;
  using Pair = std::conditional_t<kBf16, __nv_bfloat162, __half2>;

  static constexpr int kBits = bits;
  static constexpr bool kStoredZeroPoints = zero_points == ZeroPoints::kStored;
  static constexpr float kBase = kBf16 ? 128.f : 1024.f;  // dequant.cuh
  static constexpr float kSymmetricZeroPoint = bits == 4 ? 8.f : 128.f;

  static constexpr int kTileM = tile.tile_m;
  static constexpr int kFragsM = tile.tile_m / 8;  // n8 fragments of tokens
  static constexpr int kFragsN = tile.frags_n;
  static constexpr int kFragments = tile.fragments;
  static constexpr int kColumns = tile.columns();
  static constexpr int kThreads = 32 * tile.warps;
  static constexpr int kWarpsN = tile.warps_n();
  static constexpr int kWarpsK = tile.warps_k();
  static constexpr int kDepth = tile.depth;
  static constexpr int kChunk = tile.chunk;
  static constexpr int kStages = tile.stages;
  static constexpr int kMinBlocks = tile.blocks_per_sm(bits);
  // Few tokens: the sum over a packed tile is scaled (4 products for 8 tokens), many: its weights
  // (16 products of two).
  static constexpr bool kScaleSums = tile.tile_m <= 16;

  static constexpr int kStepWords = bits / 4;  // a thread's words of a k16 step
  static constexpr int kVectors = bits / 4;  // 16-byte loads of a K tile
  static constexpr int kWordsPerTile = kTile * kTile * bits / 32;

  // 16 bytes of padding a row turn the row pitch into 4 banks modulo 32: ldmatrix has no conflict.
  static constexpr int kXPitch = kChunk * kTile + 8;
  // 4 floats of padding spread the accumulators' (token 2c, column g) over all 32 banks.
  static constexpr int kPartialPitch = kColumns + 4;

  static_assert(bits == 4 || bits == 8, "packed codes have 4 or 8 bits");
  static_assert(tile.tile_m % 8 == 0, "tokens are the 8-wide side of m16n8k16");
  static_assert(tile.depth % tile.chunk == 0, "the weight ring turns in whole x stages");
  static_assert(tile.fragments % tile.frags_n == 0, "warps must tile the block's columns");
  static_assert(tile.warps % tile.warps_n() == 0, "what warps N leaves split K");

  static __device__ __forceinline__ Element low(Pair p) {
    if constexpr (kBf16)
      return __low2bfloat16(p);
    else
      return __low2half(p);
  }
  static __device__ __forceinline__ Element high(Pair p) {
    if constexpr (kBf16)
      return __high2bfloat16(p);
    else
      return __high2half(p);
  }
  static __device__ __forceinline__ Pair twice(Element e) {
    if constexpr (kBf16)
      return __bfloat162bfloat162(e);
    else
      return __half2half2(e);
  }
  static __device__ __forceinline__ float to_float(Element e) {
    if constexpr (kBf16)
      return __bfloat162float(e);
    else
      return __half2float(e);
  }
  static __device__ __forceinline__ Element from_float(float f) {
    if constexpr (kBf16)
      return __float2bfloat16_rn(f);
    else
      return __float2half_rn(f);
  }
};

}  // namespace jax_marlin
