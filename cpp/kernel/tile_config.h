// How a thread block cuts its piece of the product. Plain C++, shared by host and device.
#pragma once

namespace jax_marlin {

constexpr int kTile = 64;       // the packed layout's tile: 64 columns (N) by 64 of K
constexpr int kFragment = 16;   // columns of one tensor-core operand: a quarter of a packed tile
constexpr int kWarps = 8;       // of a thread block
constexpr int kHalf = 32;       // scales may change every 32 of K
constexpr int kSharedOfBlock = 227 * 1024;  // of sm_90, at most
constexpr int kSharedReserve = 1024;  // of each block besides, taken by the system
constexpr int kSharedOfSm = kSharedOfBlock + kSharedReserve;
constexpr int kResidentTiles =
    2;  // column tiles whose scales a block holds: resident_activations.cuh

// tile_m rows by 16 * fragments columns. A warp owns frags_n fragments; what warps remain split K.
struct TileConfig {
  int tile_m;      // rows of x, a multiple of 8 (the token side of m16n8k16)
  int fragments;   // column fragments of one block
  int frags_n;     // column fragments of one warp: the reuse of one B fragment
  int depth;       // packed K tiles a warp has in flight, in registers: a multiple of chunk
  int chunk;       // packed K tiles of one x stage
  int stages;      // x and scale stages in shared memory
  int min_blocks;  // blocks of one SM that the register budget must allow
  // Warps of K take the routes of one token, each its own expert, instead of parts of one K: their
  // sum is the layer's.
  bool sums_routes = false;
  // x W^T: K is what the block's columns run along, and N the sum. A warp takes fragments of one
  // packed tile.
  bool transposed = false;

  // 8-bit words need twice the registers: of a ring half as deep where routes are summed, else of a
  // multiprocessor with fewer blocks.
  constexpr int depth_of(int bits) const { return sums_routes ? depth * 4 / bits : depth; }
  constexpr int blocks_per_sm(int bits) const {
    return bits == 4 || sums_routes ? min_blocks : (min_blocks + 1) / 2;
  }
  // Whether all of K may stay in shared memory (resident_activations.cuh). With more rows it rarely
  // fits, and wgmma is ahead where bulk copies exist.
  constexpr bool can_reside() const { return tile_m <= 16 && !sums_routes && !transposed; }
  constexpr int warps_n() const { return fragments / frags_n; }
  constexpr int warps_k() const { return kWarps / warps_n(); }
  constexpr int columns() const { return kFragment * fragments; }
  constexpr int elements() const { return tile_m * columns(); }
};

}  // namespace jax_marlin
