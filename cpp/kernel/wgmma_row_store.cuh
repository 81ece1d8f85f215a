// Sums of a warpgroup to whole rows of out: rounded in registers, transposed by stmatrix, and each
// row of the warpgroup's columns written by one bulk copy while the next rows are prepared.
#pragma once

#include "activation.cuh"
#include "params.h"
#include "ptx_sm90.cuh"
#include "wgmma_consumer.cuh"

namespace jax_marlin {

// What a row of out holds: the compute type, float32, or silu(gate) up in the compute type.
enum class RowKind { kNarrow, kWide, kGated };

template <class Config>
class RowStore {
  using Element = typename Config::Element;
  using Storage = WgmmaStorage<Config>;

 public:
  using Work = typename Storage::Work;

  // Whether every row of this call starts and ends at 16 bytes, in sums of one block.
  static __device__ __forceinline__ bool serves(const GemmParams& p) {
    const bool gated = p.activation != Activation::kNone;
    const bool fits = !gated || (Config::kCanGate && p.activation == Activation::kSilu);
    return fits && p.split_k == 1 && p.n % 8 == 0;
  }

  __device__ __forceinline__ RowStore(const GemmParams& p, Storage& storage, int group)
      : p_(p),
        slots_(storage.rest.rows[group].slots),
        group_(group),
        thread_(threadIdx.x % kWarpgroup) {}

  __device__ __forceinline__ void store(const Work& work, const WgmmaSums<Config>& sums) {
    if constexpr (Config::kGroupTiles == 2) {
      if (p_.activation != Activation::kNone) return store_rows<RowKind::kGated>(work, sums);
    }
    if (p_.out_is_float32) {
      store_rows<RowKind::kWide>(work, sums);
    } else {
      store_rows<RowKind::kNarrow>(work, sums);
    }
  }

  // Shared memory must outlive the copies that read it.
  __device__ __forceinline__ void finish() { ptx::bulk_store_wait_read<0>(); }

 protected:
  template <RowKind kind>
  struct Rows {
    static constexpr bool kWide = kind == RowKind::kWide;
    static constexpr int kOfSlot = kWide ? Config::kChunk / 2 : Config::kChunk;
    static constexpr int kColumns = kind == RowKind::kGated ? kTile : Config::kGroupColumns;
    static constexpr int kBytes = kWide ? 4 : 2;                 // of an element
    static constexpr int kPitch = kColumns * kBytes + kRowPadding;  // wgmma_config.cuh
    static_assert(kOfSlot * kPitch <= Config::kSlotBytes, "a slot holds the rows");
    static_assert(kWide || kOfSlot % 16 == 0, "stmatrix takes two blocks of 8 rows");
  };

  __device__ __forceinline__ void sync() const {
    ptx::named_barrier(kGroupBarrier + group_, kWarpgroup);
  }

  template <RowKind kind>
  __device__ __forceinline__ void store_rows(const Work& work, const WgmmaSums<Config>& sums) {
    using R = Rows<kind>;
    const int n = (work.column_block * Config::kGroups + group_) * R::kColumns;
    float bias[Config::kGroupTiles][2];
    load_bias<kind>(work.expert, n, bias);
    const int bytes = min(R::kColumns, p_.n - n) * R::kBytes;
    // Unrolled: registers have no run-time index.
#pragma unroll
    for (int first = 0; first < Config::kTileM; first += R::kOfSlot) {
      if (first >= work.rows) continue;
      unsigned char* slot = slots_[next_];
      next_ ^= 1;
      ptx::bulk_store_wait_read<1>();  // of the other slot at most
      sync();
      if constexpr (kind == RowKind::kWide) {
        write_wide(slot, work, sums, first, bias);
      } else {
        write_narrow<kind>(slot, work, sums, first, bias);
      }
      ptx::fence_proxy_async();
      sync();
      constexpr int kWarpRows = R::kOfSlot / 4;
      const int r = thread_ / 32 * kWarpRows + thread_ % 32;
      const int64_t row = thread_ % 32 < kWarpRows ? work.out_row[first + r] : -1;
      if (row >= 0 && bytes > 0) {
        auto* out = static_cast<unsigned char*>(p_.out) + (row * p_.n + n) * R::kBytes;
        ptx::bulk_store(out, slot + r * R::kPitch, bytes);
      }
      ptx::bulk_store_commit();
    }
  }

  // Of this thread's columns: 16w + g and + 8 of each packed tile; zero where there is none.
  template <RowKind kind>
  __device__ __forceinline__ void load_bias(int expert, int n,
                                            float (&bias)[Config::kGroupTiles][2]) const {
    const auto* of_expert = static_cast<const Element*>(p_.bias) + expert * p_.bias_stride +
                            (p_.bias_stride == 0 ? 0 : p_.first_tile * kTile);
    const int column = n + thread_ / 32 * 16 + thread_ % 32 / 4;
#pragma unroll
    for (int g = 0; g < Config::kGroupTiles; ++g) {
#pragma unroll
      for (int b = 0; b < 2; ++b) {
        const int in_half = column + 8 * b + (kind == RowKind::kGated ? 0 : kTile * g);
        const int at = in_half + (kind == RowKind::kGated ? p_.n * g : 0);
        const bool used = p_.bias != nullptr && in_half < p_.n;
        bias[g][b] = used ? Config::to_float(of_expert[at]) : 0.f;
      }
    }
  }

  // Router weights of tokens 2c and 2c + 1 of a block of 8 rows, and what sums want (dequant.cuh).
  struct Weights {
    float2 before_bias, after;
  };
  __device__ __forceinline__ Weights weights(const Work& work, int first) const {
    constexpr float kSum = Dequant<Config>::kSumScale;
    const float2 w = *reinterpret_cast<const float2*>(&work.weight[first + thread_ % 4 * 2]);
    if (p_.weights_before_bias) return {{kSum * w.x, kSum * w.y}, {1.f, 1.f}};
    return {{kSum, kSum}, w};
  }

  // sum i of 4 of a block of 8 rows: column 16w + g + 8 (i / 2), row 2c + i % 2.
  __device__ __forceinline__ float weigh(float sum, int i, const Weights& w, float bias) const {
    return i % 2 == 0 ? fmaf(sum, w.before_bias.x, bias) * w.after.x
                      : fmaf(sum, w.before_bias.y, bias) * w.after.y;
  }

  template <RowKind kind>
  __device__ __forceinline__ void write_narrow(unsigned char* slot, const Work& work,
                                               const WgmmaSums<Config>& sums, int first,
                                               const float (&bias)[Config::kGroupTiles][2]) const {
    using R = Rows<kind>;
    constexpr int kTiles = kind == RowKind::kGated ? 1 : Config::kGroupTiles;
    // Matrix j of four holds rows 8 (j / 2) .. + 7, columns 8 (j % 2) .. + 7; a lane names a row.
    const int matrix = thread_ % 32 / 8;
    unsigned char* to = slot + (matrix / 2 * 8 + thread_ % 8) * R::kPitch +
                        (thread_ / 32 * 16 + matrix % 2 * 8) * R::kBytes;
#pragma unroll
    for (int m = 0; m < R::kOfSlot; m += 16) {
      const Weights of_block[2] = {weights(work, first + m), weights(work, first + m + 8)};
#pragma unroll
      for (int g = 0; g < kTiles; ++g) {
        uint32_t matrices[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          float values[2];
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const int at = (first + m) / 2 + j / 2 * 4 + j % 2 * 2 + i;
            values[i] = weigh(sums[g][at], i, of_block[j / 2], bias[g][j % 2]);
            if constexpr (kind == RowKind::kGated) {
              const float up = weigh(sums[1][at], i, of_block[j / 2], bias[1][j % 2]);
              values[i] = activate(Activation::kSilu, values[i], up);
            }
          }
          matrices[j] = pack(values[0], values[1]);
        }
        ptx::stmatrix_transposed(to + m * R::kPitch + g * kTile * R::kBytes, matrices);
      }
    }
  }

  __device__ __forceinline__ void write_wide(unsigned char* slot, const Work& work,
                                             const WgmmaSums<Config>& sums, int first,
                                             const float (&bias)[Config::kGroupTiles][2]) const {
    using R = Rows<RowKind::kWide>;
    unsigned char* to =
        slot + thread_ % 4 * 2 * R::kPitch + (thread_ / 32 * 16 + thread_ % 32 / 4) * R::kBytes;
#pragma unroll
    for (int m = 0; m < R::kOfSlot; m += 8) {
      const Weights of_block = weights(work, first + m);
#pragma unroll
      for (int g = 0; g < Config::kGroupTiles; ++g) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float value = weigh(sums[g][(first + m) / 2 + i], i, of_block, bias[g][i / 2]);
          const int column = kTile * g + i / 2 * 8;
          *reinterpret_cast<float*>(to + (m + i % 2) * R::kPitch + column * R::kBytes) = value;
        }
      }
    }
  }

  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    const Element pair[2] = {Config::from_float(low), Config::from_float(high)};
    return *reinterpret_cast<const uint32_t*>(pair);
  }

  const GemmParams& p_;
  unsigned char (&slots_)[2][Config::kSlotBytes];
  const int group_, thread_;
  int next_ = 0;  // slot
};

}  // namespace jax_marlin
