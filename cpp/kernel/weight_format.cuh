// What packed codes and compute elements are, whatever cuts the product: element type, bits, zero
// points. Kernel configurations derive from it; dequant.cuh asks no more.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "tile_config.h"

namespace jax_marlin {

enum class ZeroPoints { kSymmetric, kStored };

template <class Element_, int bits, ZeroPoints zero_points>
struct WeightFormat {
  using Element = Element_;
  static constexpr bool kBf16 = std::is_same_v<Element, __nv_bfloat16>;
  using Pair = std::conditional_t<kBf16, __nv_bfloat162, __half2>;

  static constexpr int kBits = bits;
  static constexpr bool kStoredZeroPoints = zero_points == ZeroPoints::kStored;
  static constexpr float kSymmetricZeroPoint = bits == 4 ? 8.f : 128.f;

  static constexpr int kStepWords = bits / 4;  // a thread's words of a k16 step
  static constexpr int kVectors = bits / 4;    // 16-byte loads of a K tile
  static constexpr int kWordsPerTile = kTile * kTile * bits / 32;

  static_assert(bits == 4 || bits == 8, "packed codes have 4 or 8 bits");

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
  // A constant that the format holds exactly, as an immediate: conversions are instructions. Other
  // than a zero it has 5 bits of exponent at most with fp16.
  template <float value>
  static __device__ __forceinline__ Pair twice() {
    constexpr uint32_t kFloat = __builtin_bit_cast(uint32_t, value);
    constexpr uint32_t kHalf =
        (kFloat >> 16 & 0x8000u) | ((kFloat & 0x7fffffffu) >> 13) - (112u << 10);
    constexpr uint32_t kBits16 = kBf16 ? kFloat >> 16 : value == 0 ? 0 : kHalf & 0xffffu;
    constexpr uint32_t kTwice = kBits16 * 0x10001u;
    const uint32_t twice = kTwice;
    return reinterpret_cast<const Pair&>(twice);
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
