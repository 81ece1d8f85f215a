// Codes as files hold them to packed tiles, in one pass on the host. The formats are those of
// jax_marlin/repack.py and repack_rows.py, which do the same in NumPy where this is not compiled.
#pragma once

#include <cstdint>

namespace jax_marlin {

// uint32 [rows, columns], strides in words.
struct Words {
  const uint32_t* at;
  int64_t row_stride, column_stride;
};

// uint32 [n_tiles, k_tiles, 512 or 1024], each tile contiguous, strides in words.
struct PackedTiles {
  uint32_t* at;
  int64_t n_tiles, k_tiles, n_stride, k_stride;
};

// Words along K, [K / P, N] with P = 32 / bits. Row i of the tiles is row order[i] of the codes,
// for which columns must be neighbours, or row i where there is no order.
void pack_words(const Words& words, const int64_t* order, int bits, const PackedTiles& out);

// AWQ's words of 4 bit, [K, N / 8].
void pack_awq_words(const Words& words, const PackedTiles& out);

}  // namespace jax_marlin
