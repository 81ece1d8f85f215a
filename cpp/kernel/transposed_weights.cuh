// What x W^T reads in place of W: the same packed tiles, with the sum along their N and the block's
// columns along their K.
//
// A packed tile is four runs of 16 of N, in each of which a thread's word j has the k16 step j: a
// warp that takes one tile therefore has `kFragsN` fragments of 16 of K, and each run is one k16
// step of its sum. movmatrix transposes 8 x 8 16-bit values over a warp. A 4-bit word is two of
// them, l = 0 and 1, with the nibbles of all four 8 x 8 blocks (b, h) of its 16 x 16 codes:
//
//   before  thread (g, c), half l, nibble b + 2h:  n = g + 8b,         k = 2c + l + 8h
//   after   the same                               n = 2c + l + 8b,    k = g + 8h
//
// so one instruction turns a fragment, before it is dequantized. Then operand A's rows are k and
// register b' + 2h' wants b' = h and h' = b: the middle two change places.
#pragma once

#include <type_traits>

#include "activation_ring.cuh"
#include "multiply.cuh"

namespace jax_marlin {

// A warp's words of packed tiles along N, in registers, `kDepth` tiles deep.
template <class Config>
class TransposedWeightRing {
 public:
  static constexpr int kRuns = kTile / kFragment;
  static constexpr int kWords = Config::kFragsN * Config::kStepWords;  // of a thread, in a run
  using Vector = std::conditional_t<kWords % 4 == 0, uint4, uint2>;
  static constexpr int kWide = sizeof(Vector) / 4;

  __device__ __forceinline__ TransposedWeightRing(const GemmParams& p, const WorkTile& tile,
                                                  const WarpShare& share, int warp_n)
      : remaining_(share.end - share.begin) {
    // Past the end of K the last packed tile is repeated, and never stored.
    const int k_tiles = (p.n + kTile - 1) / kTile;
    const int first = tile.column_block * Config::kFragments + warp_n * Config::kFragsN;
    const int k_tile = min(first / kRuns, k_tiles - 1);
    const int64_t n_tile =
        static_cast<int64_t>(share.expert) * p.stack_n_tiles + p.first_tile + share.begin;
    source_ = p.qweight + (n_tile * k_tiles + k_tile) * Config::kWordsPerTile +
              (threadIdx.x % 32 * kRuns + first % kRuns) * Config::kStepWords;
    stride_ = int64_t{k_tiles} * Config::kWordsPerTile;
  }

  // As those of WeightRing.
  __device__ __forceinline__ void request(int slot) {
    if (slot >= remaining_) return;
#pragma unroll
    for (int run = 0; run < kRuns; ++run) {
#pragma unroll
      for (int i = 0; i < kWords; i += kWide) {
        const auto* from = source_ + slot * stride_ + run * 32 * kRuns * Config::kStepWords + i;
        reinterpret_cast<Vector&>(ring_[slot][run][i]) =
            __ldg(reinterpret_cast<const Vector*>(from));
      }
    }
  }
  __device__ __forceinline__ void start() {
#pragma unroll
    for (int slot = 0; slot < Config::kDepth; ++slot) request(slot);
    advance();
  }
  __device__ __forceinline__ void advance() {
    remaining_ -= Config::kDepth;
    source_ += Config::kDepth * stride_;
  }

  // The codes of fragment f in run `run`, transposed, as words of the packed layout.
  __device__ __forceinline__ void load(int f, int slot, int run,
                                       uint32_t (&words)[Config::kStepWords]) const {
    const uint32_t* own = ring_[slot][run] + f * Config::kStepWords;
    if constexpr (Config::kBits == 4) {
      words[0] = ptx::movmatrix(own[0]);
    } else {
      // Word l holds the bytes of l: 16-bit values want the two of one l, here b = 0, 1, together.
      const uint32_t low = ptx::movmatrix(__byte_perm(own[0], own[1], 0x5410));
      const uint32_t high = ptx::movmatrix(__byte_perm(own[0], own[1], 0x7632));
      words[0] = __byte_perm(low, high, 0x5410);
      words[1] = __byte_perm(low, high, 0x7632);
    }
  }

 private:
  alignas(16) uint32_t ring_[Config::kDepth][kRuns][kWords] = {};
  const uint32_t* source_;
  int64_t stride_;  // words from one packed tile to the next along N
  int remaining_;  // packed tiles of this warp from source_ on
};

// One packed tile of one warp: four k16 steps of the sum, two at a time.
template <class Config>
__device__ __forceinline__ void multiply_transposed(const ActivationRing<Config>& x,
                                                    const TransposedWeightRing<Config>& weights,
                                                    int slot, Accumulator<Config>& acc) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    uint32_t a[Config::kFragsN][2][4];  // [fragment, k16 step, register]
#pragma unroll
    for (int f = 0; f < Config::kFragsN; ++f) {
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        const int run = 2 * half + step;
        uint32_t words[Config::kStepWords];
        weights.load(f, slot, run, words);
        dequantize<Config>(words, x.load_scale(f, slot, run), a[f][step]);
        const uint32_t middle = a[f][step][1];
        a[f][step][1] = a[f][step][2];
        a[f][step][2] = middle;
      }
    }
#pragma unroll
    for (int m = 0; m < Config::kFragsM; ++m) {
      uint32_t b[4];
      x.load_fragment(b, m, slot, half);
#pragma unroll
      for (int f = 0; f < Config::kFragsN; ++f) multiply_half<Config>(a[f], b, false, acc[f][m]);
    }
  }
}

}  // namespace jax_marlin
