// Packed codes to 16-bit A fragments of m16n8k16: q - z, exactly, or (q - z) * s, rounded once.
//
// A word of the packed layout holds one k16 step of one thread: rows n = g + 8b, columns
// k = 2c + l + 8h at position p = (b + 2h) + 4l (layout.py). Register r = b + 2h of the fragment
// wants the pair l = 0, 1 in its two halves, and those sit 16 bits apart:
//
//   4 bit: (word >> 4r) & 0x000f000f is both codes, each at the bottom of a 16-bit half.
//     fp16  0x6400 is 1024 with ulp 1, so 0x6400 | q = 1024 + q
//     bf16  0x4300 is  128 with ulp 1, so 0x4300 | q =  128 + q
//     Both minus (base + z) are exact: every integer of magnitude <= 256 is a bf16 number.
//   8 bit: word 2j + l holds byte p & 3 = r, so one byte permute takes one byte of each word.
//     fp16  as above: 1024 + q with q < 256 stays below 2048, where ulp is 1
//     bf16  has 7 mantissa bits, too few for 128 + q: go through float32, where
//           0x4B000000 | q = 2^23 + q
//
// With few tokens the kernel multiplies q - z and scales the float32 sum of 32 of K: fewer
// instructions, since a sum has 4 values a fragment and its weights 8 pairs, and no rounding.
#pragma once

#include "ptx.cuh"
#include "weight_format.cuh"

namespace jax_marlin {

// What one thread needs of the live group: its rows g (b = 0) and g + 8 (b = 1) of one fragment.
template <class Config>
struct GroupScale {
  using Element = typename Config::Element;
  using Pair = typename Config::Pair;
  static constexpr bool kThroughFloat = Config::kBits == 8 && Config::kBf16;

  Pair scale[2];  // each twice, for the pair l = 0, 1
  Pair base[2];   // 1024 + z or 128 + z, likewise
  float scale32[2], base32[2];

  __device__ __forceinline__ GroupScale(Pair scales, Pair zero_points) {
    const Element s[2] = {Config::low(scales), Config::high(scales)};
    const Element z[2] = {Config::low(zero_points), Config::high(zero_points)};
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      scale32[b] = Config::to_float(s[b]);
      if constexpr (kThroughFloat) {
        base32[b] = 8388608.f + Config::to_float(z[b]);
      } else {
        scale[b] = Config::twice(s[b]);
        base[b] = __hadd2(Config::twice(Config::from_float(Config::kBase)), Config::twice(z[b]));
      }
    }
  }

  // Of the weight in place l of a pair; here the same for both.
  __device__ __forceinline__ float scale_of(int b, int) const { return scale32[b]; }
  __device__ __forceinline__ float base_of(int b, int) const { return base32[b]; }
};

template <class Config, class Group>
__device__ __forceinline__ uint32_t weight_pair(uint32_t biased, const Group& group, int b) {
  using Pair = typename Config::Pair;
  Pair weight = __hsub2(reinterpret_cast<const Pair&>(biased), group.base[b]);
  if constexpr (!Config::kScaleSums) weight = __hmul2(weight, group.scale[b]);
  return reinterpret_cast<const uint32_t&>(weight);
}

// words: the thread's word (4 bit) or two words (8 bit) of one k16 step.
template <class Config, class Group>
__device__ __forceinline__ void dequantize(const uint32_t* words, const Group& group,
                                           uint32_t (&a)[4]) {
  constexpr uint32_t kBiasBits = Config::kBf16 ? 0x43004300u : 0x64006400u;
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const int b = r & 1;
    if constexpr (Config::kBits == 4) {
      const uint32_t biased = ptx::and_or(words[0] >> (4 * r), 0x000f000fu, kBiasBits);
      a[r] = weight_pair<Config>(biased, group, b);
    } else if constexpr (!Group::kThroughFloat) {
      // Bytes [lo.r, _, hi.r, _]; the mask clears the two that do not matter.
      const uint32_t codes = __byte_perm(words[0], words[1], r | (4 + r) << 8);
      a[r] = weight_pair<Config>(ptx::and_or(codes, 0x00ff00ffu, kBiasBits), group, b);
    } else {
      float w[2];
#pragma unroll
      for (int l = 0; l < 2; ++l) {
        // Bytes [q, 0, 0, 0x4B]: the float 2^23 + q.
        const float biased = __uint_as_float(__byte_perm(words[l], 0x4B000000u, 0x7540 | r));
        w[l] = biased - group.base_of(b, l);
        if constexpr (!Config::kScaleSums) w[l] *= group.scale_of(b, l);
      }
      const __nv_bfloat162 pair = __floats2bfloat162_rn(w[0], w[1]);
      a[r] = reinterpret_cast<const uint32_t&>(pair);
    }
  }
}

}  // namespace jax_marlin
