// activation(gate, up) where a warpgroup multiplies half a tile of each: its first two warps hold
// 16 columns of gate each, its last two the same columns of up. Warps w and w + 2 trade sums
// through shared memory, lane for lane, and each then has both for half of the rows.
#pragma once

#include "wgmma_row_store.cuh"

namespace jax_marlin {

template <class Config>
class HalfTileStore : public RowStore<Config> {
  using Base = RowStore<Config>;
  using Work = typename Base::Work;
  using Base::group_, Base::next_, Base::p_, Base::slots_, Base::thread_;
  static constexpr int kRound = 64;                       // rows traded and stored at once
  static constexpr int kColumns = kTile / 2;              // of out
  static constexpr int kPitch = kColumns * 2 + kRowPadding;  // bytes
  // A warp sends half of its sums of a round: a float4 a lane of each block of 8 rows.
  static constexpr int kSent = kRound / 16;
  static_assert(4 * kSent * 32 * sizeof(float4) <= Config::kSlotBytes, "a slot holds what is sent");
  static_assert(kRound * kPitch <= Config::kSlotBytes, "and then the rows");

 public:
  using Base::Base;

  __device__ __forceinline__ void store(const Work& work, const WgmmaSums<Config>& sums) {
    if (p_.activation == Activation::kNone) return Base::store(work, sums);
    const int n = (work.column_block * Config::kGroups + group_) * kColumns;
    float bias[2];
    load_bias(work.expert, n, bias);
    // Unrolled: registers have no run-time index.
#pragma unroll
    for (int first = 0; first < Config::kTileM; first += kRound) {
      if (first >= work.rows) continue;
      unsigned char* slot = slots_[next_];
      next_ ^= 1;
      ptx::bulk_store_wait_read<1>();  // of the other slot at most
      Base::sync();
      float gate[kSent][4], up[kSent][4];
      trade(slot, work, sums, first, bias, gate, up);
      write(slot, gate, up);
      ptx::fence_proxy_async();
      Base::sync();
      copy_out(slot, work, first, n);
    }
  }

 private:
  __device__ __forceinline__ bool has_up() const { return thread_ >= 64; }

  // Of columns 16 (w % 2) + g and + 8: of gate, or of up.
  __device__ __forceinline__ void load_bias(int expert, int n, float (&bias)[2]) const {
    const auto* of_expert = static_cast<const typename Config::Element*>(p_.bias) +
                            expert * p_.bias_stride + (has_up() ? p_.n : 0) +
                            (p_.bias_stride == 0 ? 0 : p_.first_tile * kTile);
    const int column = n + thread_ / 32 % 2 * 16 + thread_ % 32 / 4;
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      const bool used = p_.bias != nullptr && column + 8 * b < p_.n;
      bias[b] = used ? Config::to_float(of_expert[column + 8 * b]) : 0.f;
    }
  }

  // Of each 32 rows, warps with gate finish the first 16, those with up the last: blocks of 8 rows
  // i = 0, 1 are of the first such half, 2, 3 of the second.
  __device__ __forceinline__ void trade(unsigned char* slot, const Work& work,
                                        const WgmmaSums<Config>& sums, int first,
                                        const float (&bias)[2], float (&gate)[kSent][4],
                                        float (&up)[kSent][4]) const {
    float4* traded = reinterpret_cast<float4*>(slot) + thread_ % 32;
    const int warp = thread_ / 32;
#pragma unroll
    for (int i = 0; i < kSent; ++i) {
      const int low = first + i / 2 * 32 + i % 2 * 8, high = low + 16;
      const auto of_low = Base::weights(work, low), of_high = Base::weights(work, high);
      alignas(16) float sent[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float a = Base::weigh(sums[0][low / 2 + j], j, of_low, bias[j / 2]);
        const float b = Base::weigh(sums[0][high / 2 + j], j, of_high, bias[j / 2]);
        gate[i][j] = has_up() ? b : a;  // kept: gate's or up's
        sent[j] = has_up() ? a : b;
      }
      traded[(warp * kSent + i) * 32] = *reinterpret_cast<const float4*>(sent);
    }
    Base::sync();
#pragma unroll
    for (int i = 0; i < kSent; ++i) {
      const float4 v = traded[((warp ^ 2) * kSent + i) * 32];
      const float received[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float kept = gate[i][j];
        gate[i][j] = has_up() ? received[j] : kept;
        up[i][j] = has_up() ? kept : received[j];
      }
    }
    Base::sync();  // rows of out take the same place
  }

  __device__ __forceinline__ void write(unsigned char* slot, const float (&gate)[kSent][4],
                                        const float (&up)[kSent][4]) const {
    // Matrix j of four holds rows 8 (j / 2) .. + 7, columns 8 (j % 2) .. + 7; a lane names a row.
    const int matrix = thread_ % 32 / 8;
    const int row = (has_up() ? 16 : 0) + matrix / 2 * 8 + thread_ % 8;
    unsigned char* to = slot + row * kPitch + (thread_ / 32 % 2 * 16 + matrix % 2 * 8) * 2;
#pragma unroll
    for (int i = 0; i < kSent; i += 2) {
      uint32_t matrices[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float values[2];
#pragma unroll
        for (int v = 0; v < 2; ++v) {
          const int at = j % 2 * 2 + v;
          values[v] = activate(Activation::kSilu, gate[i + j / 2][at], up[i + j / 2][at]);
        }
        matrices[j] = Base::pack(values[0], values[1]);
      }
      ptx::stmatrix_transposed(to + i / 2 * 32 * kPitch, matrices);
    }
  }

  __device__ __forceinline__ void copy_out(const unsigned char* slot, const Work& work, int first,
                                           int n) const {
    constexpr int kWarpRows = kRound / 4;
    const int r = thread_ / 32 * kWarpRows + thread_ % 32;
    const int64_t row = thread_ % 32 < kWarpRows ? work.out_row[first + r] : -1;
    const int bytes = min(kColumns, p_.n - n) * 2;
    if (row >= 0 && bytes > 0) {
      auto* out = static_cast<unsigned char*>(p_.out) + (row * p_.n + n) * 2;
      ptx::bulk_store(out, slot + r * kPitch, bytes);
    }
    ptx::bulk_store_commit();
  }
};

}  // namespace jax_marlin
