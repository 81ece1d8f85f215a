// A warp's sums to rows of out: scaled, weighed, activated, from registers.
#pragma once

#include "activation.cuh"
#include "dequant.cuh"
#include "epilogue.cuh"
#include "stream_config.cuh"

namespace jax_marlin {

// A piece of work as its last stage tells it, in registers: the stage can be filled again.
template <class Config>
struct StoredPiece {
  int expert, column_block;
  int row[Config::kFragsM][2];      // of out, of this thread's tokens 8 m + 2 c, 8 m + 2 c + 1
  int turned_row[Config::kFragsM];  // of token 8 m + g; -1 for padding

  StoredPiece() = default;
  __device__ __forceinline__ explicit StoredPiece(
      const typename StreamStorage<Config>::Stage& stage)
      : expert(stage.expert), column_block(stage.column_block) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int m = 0; m < Config::kFragsM; ++m) {
      turned_row[m] = stage.out_row[8 * m + lane / 4];
      row[m][0] = stage.out_row[8 * m + lane % 4 * 2];
      row[m][1] = stage.out_row[8 * m + lane % 4 * 2 + 1];
    }
  }
};

template <class Config>
class StreamStore {
  using Element = typename Config::Element;
  using Pair = typename Config::Pair;

 public:
  __device__ __forceinline__ StreamStore(const GemmParams& p, int warp)
      : p_(p), column_(warp * kFragment), lane_(threadIdx.x % 32) {}

  __device__ __forceinline__ void store(const StoredPiece<Config>& piece,
                                        const Accumulator<Config>& sums) const {
    if (p_.activation == Activation::kNone) {
#pragma unroll
      for (int f = 0; f < Config::kFragsN; ++f) {
        const int tile = piece.column_block * kStreamColumnTiles + f;
        store_fragment<false>(piece, tile * kTile + column_, sums[f], sums[f]);
      }
    } else {  // one fragment of gate, one of up
      store_fragment<true>(piece, piece.column_block * kTile + column_, sums[0], sums[1]);
    }
  }

 private:
  using Sums = float[Config::kFragsM][4];

  // Columns first .. first + 15.
  template <bool gated>
  __device__ __forceinline__ void store_fragment(const StoredPiece<Config>& piece, int first,
                                                 const Sums& sums, const Sums& up_sums) const {
    float bias[2], up_bias[2];
    load_bias(piece.expert, first, 0, bias);
    if (gated) load_bias(piece.expert, first, p_.n, up_bias);
#pragma unroll
    for (int m = 0; m < Config::kFragsM; ++m) {
      float weight[2] = {1.f, 1.f}, values[4], up[4];
      if (p_.topk_weights != nullptr) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (piece.row[m][i] >= 0) weight[i] = p_.topk_weights[piece.row[m][i]];
        }
      }
      // c[16x8]: rows g, g + 8 are columns of out, columns 2c, 2c + 1 are tokens.
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        values[i] = weigh(sums[m][i], weight[i % 2], bias[i / 2]);
        if (gated) up[i] = weigh(up_sums[m][i], weight[i % 2], up_bias[i / 2]);
      }
      if (gated) activate_all(values, up);
      if (p_.out_is_float32) {
        store_floats(piece.row[m], first, values);
      } else {
        store_turned(piece.turned_row[m], first, values);
      }
    }
  }

  // Of columns first + g and first + g + 8, behind `begin`.
  __device__ __forceinline__ void load_bias(int expert, int first, int begin,
                                            float (&bias)[2]) const {
    bias[0] = bias[1] = 0.f;
    if (p_.bias == nullptr) return;
    const int of_call = p_.bias_stride == 0 ? 0 : p_.first_tile * kTile;
    const auto* columns =
        static_cast<const Element*>(p_.bias) + expert * p_.bias_stride + of_call + begin;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int n = first + lane_ / 4 + 8 * i;
      if (n < p_.n) bias[i] = Config::to_float(columns[n]);
    }
  }

  __device__ __forceinline__ float weigh(float sum, float weight, float bias) const {
    sum *= Dequant<Config>::kSumScale;
    return p_.weights_before_bias ? sum * weight + bias : (sum + bias) * weight;
  }

  // One branch for all four, not one each.
  __device__ __forceinline__ void activate_all(float (&values)[4], const float (&up)[4]) const {
    const auto all = [&](Activation activation) {
#pragma unroll
      for (int i = 0; i < 4; ++i) values[i] = activate(activation, values[i], up[i]);
    };
    switch (p_.activation) {
      case Activation::kSilu:
        return all(Activation::kSilu);
      case Activation::kGelu:
        return all(Activation::kGelu);
      case Activation::kGeluTanh:
        return all(Activation::kGeluTanh);
      case Activation::kSwigluClamped:
        return all(Activation::kSwigluClamped);
      case Activation::kNone:
        return;
    }
  }

  __device__ __forceinline__ void store_floats(const int (&row)[2], int first,
                                               const float (&values)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int n = first + lane_ / 4 + 8 * (i / 2);
      if (n < p_.n && row[i % 2] >= 0) {
        static_cast<float*>(p_.out)[int64_t{row[i % 2]} * p_.n + n] = values[i];
      }
    }
  }

  // Two tokens of a column become two columns of a token, which are neighbours in memory.
  __device__ __forceinline__ void store_turned(int row, int first, const float (&values)[4]) const {
    uint32_t turned[2];  // all lanes turn, before some have nothing to store
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      Pair tokens;
      tokens.x = Config::from_float(values[2 * b]);
      tokens.y = Config::from_float(values[2 * b + 1]);
      turned[b] = ptx::movmatrix(reinterpret_cast<const uint32_t&>(tokens));
    }
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      const int n = first + 8 * b + lane_ % 4 * 2;
      if (row < 0 || n >= p_.n) continue;
      Element* out = static_cast<Element*>(p_.out) + int64_t{row} * p_.n + n;
      if (p_.n % 2 == 0) {
        *reinterpret_cast<uint32_t*>(out) = turned[b];
      } else {
        const Pair& columns = reinterpret_cast<const Pair&>(turned[b]);
        out[0] = columns.x;
        if (n + 1 < p_.n) out[1] = columns.y;
      }
    }
  }

  const GemmParams& p_;
  const int column_, lane_;  // column_: of the warp's fragments in their tiles
};

}  // namespace jax_marlin
