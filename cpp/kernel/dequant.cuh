// Packed codes to 16-bit A fragments of m16n8k16: (q - z) s, rounded once, or q - z, exactly.
//
// A word of the packed layout holds one k16 step of one thread: rows n = g + 8b, columns
// k = 2c + l + 8h at position p = (b + 2h) + 4l (layout.py). Register r = b + 2h of the fragment
// wants the pair l = 0, 1 in its two halves, and those sit 16 bits apart:
//
//   4 bit: the pair of r = 0 at the bottom of both halves, that of r = 1 four bits up, and those of
//          r = 2, 3 likewise in word >> 8.
//   8 bit: word 2j + l holds byte p & 3 = r, so one byte permute takes one byte of each word.
//
// Masked, a half is an integer i below 256, q or 16 q, and with that a number:
//
//   bf16  Exponent fields 0, of subnormal numbers, and 1 count in the same units: i 2^-133.
//   fp16  0x6400 | i is 1024 + i. Subnormal numbers are too close to the largest to scale up.
//
// One fma makes (q - z) kStep of it, exactly, as integers of magnitude <= 256 are bf16 numbers, and
// a product with s / kStep rounds once. For bf16 and a zero point that is a power of two the fma
// could multiply by s, too: fma(i 2^-133, s 2^133, -z s), but s 2^133 is past the largest number.
// So the weight is made 2^-32 times as large, which rounds alike, and sums 2^32 times when they are
// complete. Scales below 2^27 fit, and a product of weight and activation loses no bit down to
// 2^-70.
//
// With few tokens the kernel multiplies (q - z) kStep and scales the float32 sum of 32 of K: fewer
// instructions, since a sum has 4 values a fragment and its weights 8 pairs, and no rounding.
#pragma once

#include "ptx.cuh"
#include "weight_format.cuh"

namespace jax_marlin {

template <class Config>
struct Dequant {
  // bf16: the fma multiplies by the scale.
  static constexpr bool kFolded =
      Config::kBf16 && !Config::kStoredZeroPoints && !Config::kScaleSums;
  static constexpr float kStep = Config::kBf16 ? 0x1p-6f : 1.f;
  static constexpr float kFoldedStep = 0x1p-32f;
  // What sums are multiplied by at last.
  static constexpr float kSumScale = kFolded              ? 1.f / kFoldedStep
                                     : Config::kScaleSums ? 1.f / kStep
                                                          : 1.f;

  static constexpr uint32_t kBias = Config::kBf16 ? 0 : 0x64006400u;
  static constexpr float kBiasValue = Config::kBf16 ? 0.f : 1024.f;
  static constexpr float kUnit = Config::kBf16 ? 0x1p-133f : 1.f;  // that i counts
};

// Makes weights of the two codes of a pair in place b of a fragment.
template <class Config, int b>
class PairScale {
  using Pair = typename Config::Pair;
  using D = Dequant<Config>;
  static constexpr float kStep = D::kFolded ? D::kFoldedStep : D::kStep;
  static constexpr float kUnit = kStep / D::kUnit / (Config::kBits == 4 && b == 1 ? 16.f : 1.f);

 public:
  PairScale() = default;
  // zero_points: where they are stored.
  __device__ __forceinline__ PairScale(Pair scales, Pair zero_points) {
    if constexpr (D::kFolded) {
      unit_ = __hmul2(scales, Config::template twice<kUnit>());
      offset_ = __hmul2(scales, Config::template twice<-Config::kSymmetricZeroPoint * kStep>());
    } else {
      constexpr float kNoCode = -D::kBiasValue * kUnit;
      unit_ = Config::template twice<kUnit>();
      if constexpr (Config::kStoredZeroPoints) {
        offset_ = __hfma2(zero_points, Config::template twice<-kStep>(),
                          Config::template twice<kNoCode>());
      } else {
        offset_ = Config::template twice<kNoCode - Config::kSymmetricZeroPoint * kStep>();
      }
      if constexpr (kStep == 1.f) {
        scales_ = scales;
      } else {
        scales_ = __hmul2(scales, Config::template twice<1.f / kStep>());
      }
    }
  }

  __device__ __forceinline__ uint32_t weights(uint32_t codes) const {
    Pair weights = __hfma2(reinterpret_cast<const Pair&>(codes), unit_, offset_);
    if constexpr (!D::kFolded && !Config::kScaleSums) weights = __hmul2(weights, scales_);
    return reinterpret_cast<const uint32_t&>(weights);
  }

 private:
  Pair unit_, offset_, scales_;
};

// What one thread needs of the live group: its rows g (b = 0) and g + 8 (b = 1) of one fragment.
template <class Config>
struct GroupScale {
  using Pair = typename Config::Pair;

  PairScale<Config, 0> low;  // each the same twice, for the pair l = 0, 1
  PairScale<Config, 1> high;
  float of_sums[2];

  GroupScale() = default;
  __device__ __forceinline__ explicit GroupScale(Pair scales, Pair zero_points = {})
      : low(Config::twice(Config::low(scales)), Config::twice(Config::low(zero_points))),
        high(Config::twice(Config::high(scales)), Config::twice(Config::high(zero_points))),
        of_sums{Config::to_float(Config::low(scales)), Config::to_float(Config::high(scales))} {}
};

// words: the thread's word (4 bit) or two words (8 bit) of one k16 step.
template <class Config, class Group>
__device__ __forceinline__ void dequantize(const uint32_t* words, const Group& group,
                                           uint32_t (&a)[4]) {
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const int b = r & 1;
    uint32_t codes, mask;
    if constexpr (Config::kBits == 4) {
      codes = words[0] >> (r / 2 * 8);
      mask = b == 0 ? 0x000f000fu : 0x00f000f0u;
    } else {
      // Bytes [lo.r, _, hi.r, _]; the mask clears the two that do not matter.
      codes = __byte_perm(words[0], words[1], r | (4 + r) << 8);
      mask = 0x00ff00ffu;
    }
    if constexpr (Dequant<Config>::kBias == 0) {
      codes &= mask;
    } else {
      codes = ptx::and_or(codes, mask, Dequant<Config>::kBias);
    }
    a[r] = b == 0 ? group.low.weights(codes) : group.high.weights(codes);
  }
}

}  // namespace jax_marlin
