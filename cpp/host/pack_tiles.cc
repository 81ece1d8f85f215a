// Each tile by way of its 64 x 64 codes, a byte each, which stay in the first cache: whatever the
// source, what follows is the same. Inner loops are of one kind of arithmetic over neighbours, for
// the compiler to make vectors of.

#include "pack_tiles.h"

#include <cstring>

#include "../kernel/tile_config.h"

namespace jax_marlin {
namespace {

struct Codes {
  uint8_t of[kTile][kTile];  // [k, n]
};

// A row of codes from the words of its columns.
void unpack_row(const uint32_t* words, int shift, uint32_t mask, uint8_t* codes) {
  for (int n = 0; n < kTile; ++n) codes[n] = static_cast<uint8_t>(words[n] >> shift & mask);
}

// Codes that share words along K, of the tile whose first row and column are (k, n).
template <int bits>
void unpack_words(const Words& words, const int64_t* order, int64_t k, int64_t n, Codes& codes) {
  constexpr int kFields = 32 / bits, kRows = kTile / kFields;
  constexpr uint32_t kMask = (1u << bits) - 1;
  if (order != nullptr) {
    for (int i = 0; i < kTile; ++i) {
      const int64_t row = order[k + i];
      const uint32_t* source = words.at + row / kFields * words.row_stride + n;
      unpack_row(source, static_cast<int>(row % kFields) * bits, kMask, codes.of[i]);
    }
    return;
  }
  const uint32_t* first = words.at + k / kFields * words.row_stride + n * words.column_stride;
  uint32_t block[kRows][kTile];
  if (words.column_stride != 1) {  // neighbours along K: each line of the cache is read once
    for (int column = 0; column < kTile; ++column) {
      for (int row = 0; row < kRows; ++row) {
        block[row][column] = first[row * words.row_stride + column * words.column_stride];
      }
    }
  }
  for (int row = 0; row < kRows; ++row) {
    const uint32_t* source = words.column_stride == 1 ? first + row * words.row_stride : block[row];
    for (int field = 0; field < kFields; ++field) {
      unpack_row(source, field * bits, kMask, codes.of[row * kFields + field]);
    }
  }
}

// Bytes 0 and 2 of `even` and of `odd`, in this order.
uint32_t interleave(uint32_t even, uint32_t odd) {
  even &= 0x00ff00ff, odd &= 0x00ff00ff;
  return ((even | even >> 8) & 0xffff) | (odd | odd >> 8) << 16;
}

// AWQ's word holds columns 0, 2, 4, 6 in its lower four nibbles and 1, 3, 5, 7 in the upper ones:
// as bytes those of even places are columns 0, 4, 1, 5 and those of odd ones 2, 6, 3, 7.
void unpack_awq(const Words& words, int64_t k, int64_t n, Codes& codes) {
  constexpr int kFields = 8, kRowWords = kTile / kFields;
  for (int i = 0; i < kTile; ++i) {
    const uint32_t* source =
        words.at + (k + i) * words.row_stride + n / kFields * words.column_stride;
    uint32_t row[2 * kRowWords];  // four codes each, the first lowest
    for (int j = 0; j < kRowWords; ++j) {
      const uint32_t word = source[j * words.column_stride];
      const uint32_t even = word & 0x0f0f0f0f, odd = word >> 4 & 0x0f0f0f0f;
      row[2 * j] = interleave(even, odd);
      row[2 * j + 1] = interleave(even >> 8, odd >> 8);
    }
    std::memcpy(codes.of[i], row, kTile);
  }
}

// Two columns b = 0, 1 of one row, side by side in `bits` each.
template <int bits>
uint32_t pair_of(const uint8_t* row, int g) {
  return static_cast<uint32_t>(row[g]) | static_cast<uint32_t>(row[g + 8]) << bits;
}

// k = 16 j + 8 h + 2 c + l, n = 16 w + 8 b + g; layout.py says where each code goes.
template <int bits>
void pack_tile(const Codes& codes, uint32_t* out) {
  constexpr int kStepWords = bits / 4;  // of a thread: at 8 bit l chooses the word
  for (int w = 0; w < 4; ++w) {
    for (int j = 0; j < 4; ++j) {
      for (int c = 0; c < 4; ++c) {
        const uint8_t* row = &codes.of[16 * j + 2 * c][16 * w];
        constexpr int kNextL = kTile, kNextH = 8 * kTile;
        uint32_t words[kStepWords][8];
        for (int g = 0; g < 8; ++g) {
          for (int l = 0; l < kStepWords; ++l) {
            words[l][g] = pair_of<bits>(row + l * kNextL, g) |
                          pair_of<bits>(row + l * kNextL + kNextH, g) << 2 * bits;
          }
          if constexpr (bits == 4) {
            words[0][g] |= (pair_of<bits>(row + kNextL, g) | pair_of<bits>(row + kNextL + kNextH, g)
                                                                 << 2 * bits)
                           << 16;
          }
        }
        for (int g = 0; g < 8; ++g) {
          for (int l = 0; l < kStepWords; ++l) {
            out[((8 * w + g) * 4 + c) * 4 * kStepWords + j * kStepWords + l] = words[l][g];
          }
        }
      }
    }
  }
}

// unpack(k, n, codes) for each tile, in the order of memory.
template <int bits, class Unpack>
void pack_tiles(const PackedTiles& out, Unpack unpack) {
  for (int64_t nt = 0; nt < out.n_tiles; ++nt) {
    for (int64_t kt = 0; kt < out.k_tiles; ++kt) {
      Codes codes;
      unpack(kt * kTile, nt * kTile, codes);
      pack_tile<bits>(codes, out.at + nt * out.n_stride + kt * out.k_stride);
    }
  }
}

}  // namespace

void pack_words(const Words& words, const int64_t* order, int bits, const PackedTiles& out) {
  if (bits == 4) {
    pack_tiles<4>(out, [&](int64_t k, int64_t n, Codes& codes) {
      unpack_words<4>(words, order, k, n, codes);
    });
  } else {
    pack_tiles<8>(out, [&](int64_t k, int64_t n, Codes& codes) {
      unpack_words<8>(words, order, k, n, codes);
    });
  }
}

void pack_awq_words(const Words& words, const PackedTiles& out) {
  pack_tiles<4>(out, [&](int64_t k, int64_t n, Codes& codes) { unpack_awq(words, k, n, codes); });
}

}  // namespace jax_marlin
