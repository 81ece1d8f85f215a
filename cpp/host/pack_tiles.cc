// Each tile from its words along K, P = 32 / bits codes of a column in each: those of the file
// where it has them side by side, else a block of them made first, which stays in the first cache.
// From there no code is taken out of its word: exchanges move fields between words, as
// jax_marlin/repack.py derives, four columns at a time in a vector of the compiler's.

#include "pack_tiles.h"

#include <cstring>
#include <initializer_list>

#include "../kernel/tile_config.h"

namespace jax_marlin {
namespace {

using Four = uint32_t __attribute__((vector_size(16)));

template <int bits>
constexpr int kFields = 32 / bits;  // of a word
template <int bits>
constexpr int kRows = kTile / kFields<bits>;  // of words in a tile

template <int bits>
struct Block {
  uint32_t of[kRows<bits>][kTile];
};

Four load(const uint32_t* at) {  // from anywhere
  Four words;
  std::memcpy(&words, at, sizeof words);
  return words;
}

// Swaps the upper fields of x with the lower fields of y, `shift` bits each.
template <int shift>
void exchange(Four& x, Four& y) {
  constexpr uint32_t kLower = shift == 4 ? 0x0f0f0f0f : shift == 8 ? 0x00ff00ff : 0x0000ffff;
  const Four differ = ((x >> shift) ^ y) & kLower;
  y ^= differ;
  x ^= differ << shift;
}

// Swaps word i of vector j with word j of vector i.
void transpose(Four* v) {
  const Four a = {v[0][0], v[1][0], v[0][1], v[1][1]}, b = {v[0][2], v[1][2], v[0][3], v[1][3]};
  const Four c = {v[2][0], v[3][0], v[2][1], v[3][1]}, d = {v[2][2], v[3][2], v[2][3], v[3][3]};
  v[0] = Four{a[0], a[1], c[0], c[1]}, v[1] = Four{a[2], a[3], c[2], c[3]};
  v[2] = Four{b[0], b[1], d[0], d[1]}, v[3] = Four{b[2], b[3], d[2], d[3]};
}

// Row k = 16 j + 8 h + 2 c + l, column n = 16 w + 8 b + g, c = 2 c1 + c0; repack.py names the bits
// that each exchange swaps. A thread's words of one c are neighbours: j, at 8 bit also l.
template <int bits>
void pack_tile(const uint32_t* words, int64_t stride, uint32_t* out) {
  constexpr int kWords = bits;
  for (int w = 0; w < 4; ++w) {
    for (int g = 0; g < 8; g += 4) {
      const auto row = [&](int r, int b) { return load(words + r * stride + 16 * w + 8 * b + g); };
      Four done[4][kWords];  // by c, and place behind one another
      for (int j = 0; j < 4; ++j) {
        if constexpr (bits == 4) {
          Four x[2][2] = {{row(2 * j, 0), row(2 * j, 1)}, {row(2 * j + 1, 0), row(2 * j + 1, 1)}};
          for (Four* h : {x[0], x[1]}) {
            exchange<4>(h[0], h[1]);   // b with l
            exchange<16>(h[0], h[1]);  // l with c1
          }
          for (int c1 = 0; c1 < 2; ++c1) {
            exchange<8>(x[0][c1], x[1][c1]);  // h with c0
            for (int c0 = 0; c0 < 2; ++c0) done[2 * c1 + c0][j] = x[c0][c1];
          }
        } else {
          for (int c1 = 0; c1 < 2; ++c1) {
            const int r = 4 * j + c1;
            Four x[2][2] = {{row(r, 0), row(r, 1)}, {row(r + 2, 0), row(r + 2, 1)}};
            for (int b = 0; b < 2; ++b) exchange<16>(x[0][b], x[1][b]);  // h with c0
            for (int c0 = 0; c0 < 2; ++c0) {
              exchange<8>(x[c0][0], x[c0][1]);  // b with l
              for (int l = 0; l < 2; ++l) done[2 * c1 + c0][2 * j + l] = x[c0][l];
            }
          }
        }
      }
      for (int c = 0; c < 4; ++c) {
        for (int place = 0; place < kWords; place += 4) {
          Four* const four = &done[c][place];
          transpose(four);
          for (int i = 0; i < 4; ++i) {
            std::memcpy(out + ((8 * w + g + i) * 4 + c) * kWords + place, &four[i], sizeof(Four));
          }
        }
      }
    }
  }
}

// Rows of codes in the order of `rows`, of 64 columns that stand side by side.
template <int bits>
void gather(const uint32_t* words, int64_t stride, const int64_t* rows, Block<bits>& block) {
  constexpr uint32_t kMask = (1u << bits) - 1;
  for (auto& row : block.of) {
    Four sum[kTile / 4] = {};
    for (int field = 0; field < kFields<bits>; ++field, ++rows) {
      const uint32_t* source = words + *rows / kFields<bits> * stride;
      const int shift = static_cast<int>(*rows % kFields<bits>) * bits;
      for (int n = 0; n < kTile; n += 4) {
        sum[n / 4] |= (load(source + n) >> shift & kMask) << bits * field;
      }
    }
    std::memcpy(row, sum, sizeof sum);
  }
}

// Neighbours along K to neighbours along N: each line of the cache is read once.
template <int bits>
void turn(const Words& words, const uint32_t* first, Block<bits>& block) {
  for (int n = 0; n < kTile; ++n) {
    for (int r = 0; r < kRows<bits>; ++r) {
      block.of[r][n] = first[r * words.row_stride + n * words.column_stride];
    }
  }
}

// AWQ's word holds eight columns of one row: 0, 2, 4, 6 in its lower nibbles, 1, 3, 5, 7 in its
// upper ones. Eight rows of them are a matrix of nibbles that exchanges transpose.
void turn_awq(const Words& words, const uint32_t* first, Block<4>& block) {
  constexpr int kColumns = 8;
  for (auto& row : block.of) {
    for (int n = 0; n < kTile; n += 4 * kColumns) {  // of four words
      const int64_t next = words.column_stride;
      Four x[kColumns] = {};  // by row of codes, then by place in the word
      for (int i = 0; i < kColumns; ++i) {
        const uint32_t* at = first + i * words.row_stride + n / kColumns * next;
        x[i] = next == 1 ? load(at) : Four{at[0], at[next], at[2 * next], at[3 * next]};
      }
      for (int i = 0; i < 4; ++i) exchange<16>(x[i], x[i + 4]);
      for (int i : {0, 1, 4, 5}) exchange<8>(x[i], x[i + 2]);
      for (int i : {0, 2, 4, 6}) exchange<4>(x[i], x[i + 1]);
      Four columns[2][4] = {{x[0], x[4], x[1], x[5]}, {x[2], x[6], x[3], x[7]}};
      for (int half = 0; half < 2; ++half) {
        transpose(columns[half]);
        for (int j = 0; j < 4; ++j) {
          std::memcpy(&row[n + j * kColumns + 4 * half], &columns[half][j], sizeof(Four));
        }
      }
    }
    first += kColumns * words.row_stride;
  }
}

// pack(k, n, tile) for each tile, in the order of memory.
template <class Pack>
void for_tiles(const PackedTiles& out, Pack pack) {
  for (int64_t nt = 0; nt < out.n_tiles; ++nt) {
    for (int64_t kt = 0; kt < out.k_tiles; ++kt) {
      pack(kt * kTile, nt * kTile, out.at + nt * out.n_stride + kt * out.k_stride);
    }
  }
}

template <int bits>
void pack(const Words& words, const int64_t* order, const PackedTiles& out) {
  for_tiles(out, [&](int64_t k, int64_t n, uint32_t* tile) {
    const uint32_t* first =
        words.at + k / kFields<bits> * words.row_stride + n * words.column_stride;
    if (order == nullptr && words.column_stride == 1) {
      return pack_tile<bits>(first, words.row_stride, tile);
    }
    Block<bits> block;
    if (order == nullptr) {
      turn<bits>(words, first, block);
    } else {
      gather<bits>(words.at + n, words.row_stride, order + k, block);
    }
    pack_tile<bits>(block.of[0], kTile, tile);
  });
}

}  // namespace

void pack_words(const Words& words, const int64_t* order, int bits, const PackedTiles& out) {
  (bits == 4 ? pack<4> : pack<8>)(words, order, out);
}

void pack_awq_words(const Words& words, const PackedTiles& out) {
  for_tiles(out, [&](int64_t k, int64_t n, uint32_t* tile) {
    Block<4> block;
    turn_awq(words, words.at + k * words.row_stride + n / 8 * words.column_stride, block);
    pack_tile<4>(block.of[0], kTile, tile);
  });
}

}  // namespace jax_marlin
