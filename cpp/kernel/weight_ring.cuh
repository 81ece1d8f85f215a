// Operand A: packed weights, streamed from global memory into a ring of registers, `kDepth` deep.
//
// Thread t of a packed tile owns 16 (4 bit) or 32 (8 bit) contiguous bytes, so a warp reads whole
// 512-byte runs, and no thread ever needs another's weights: no shared memory, no barrier.
#pragma once

#include "ptx.cuh"
#include "scheduler.cuh"

namespace jax_marlin {

template <class Config>
class WeightRing {
 public:
  // warp_n: this warp's place along the columns.
  __device__ __forceinline__ WeightRing(const GemmParams& p, const WorkTile& tile,
                                        const WarpShare& share, int warp_n)
      : remaining_(share.end - share.begin) {
#pragma unroll
    for (int f = 0; f < Config::kFragsN; ++f) {
      const int fragment = stack_fragment<Config>(p, tile, warp_n * Config::kFragsN + f);
      const int64_t column_tile =
          static_cast<int64_t>(share.expert) * p.stack_n_tiles + fragment / 4;
      const int thread = 32 * (fragment % 4) + threadIdx.x % 32;
      source_[f] = p.qweight + (column_tile * p.k_tiles + share.begin) * Config::kWordsPerTile +
                   thread * 4 * Config::kVectors;
      // While x is still being written, the first turn of the ring can be on its way to L2. More
      // would push out what other blocks wait for. A sum over routes requests it outright.
      if (!Config::kSumsRoutes && p.x_is_pending && thread == 0 && remaining_ > 0) {
        ptx::prefetch_l2(source_[f], min(remaining_, Config::kDepth) * Config::kWordsPerTile * 4);
      }
    }
  }

  // Requests the next K tile for ring slot `slot`. Past the warp's last tile the slot keeps old
  // codes: their scales are zero in the x stage, so they add nothing.
  __device__ __forceinline__ void request(int slot) {
#pragma unroll
    for (int f = 0; f < Config::kFragsN; ++f) {
#pragma unroll
      for (int v = 0; v < Config::kVectors; ++v) {
        if (slot < remaining_) {
          ring_[slot][f][v] = ptx::load_stream(source_[f] + slot * Config::kWordsPerTile + 4 * v);
        }
      }
    }
  }

  // The ring's first turn.
  __device__ __forceinline__ void start() {
#pragma unroll
    for (int slot = 0; slot < Config::kDepth; ++slot) request(slot);
    advance();
  }

  // After all slots have been requested once: the ring's next turn.
  __device__ __forceinline__ void advance() {
    remaining_ -= Config::kDepth;
#pragma unroll
    for (int f = 0; f < Config::kFragsN; ++f) {
      source_[f] += Config::kDepth * Config::kWordsPerTile;
    }
  }

  // The thread's words of fragment f.
  __device__ __forceinline__ void load(int f, int slot, uint4 (&words)[Config::kVectors]) const {
#pragma unroll
    for (int v = 0; v < Config::kVectors; ++v) words[v] = ring_[slot][f][v];
  }

 private:
  uint4 ring_[Config::kDepth][Config::kFragsN][Config::kVectors] = {};
  const uint32_t* source_[Config::kFragsN];
  int remaining_;  // K tiles of this warp from source_ on
};

}  // namespace jax_marlin
