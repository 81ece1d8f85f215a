// What one thread of a copying warpgroup copies into every stage: rows of x, a column tile's
// weights, a vector of scales. Each knows its place once a piece of work and then only adds to it.
#pragma once

#include "ptx_sm90.cuh"
#include "wgmma_scheduler.cuh"

namespace jax_marlin {

constexpr int kCopyVector = 8;                         // 16-bit elements of one 16-byte copy
constexpr int kTileVectors = kTile / kCopyVector;      // threads that copy 64 of K of a row
template <class Config>
constexpr int kRowStep = Config::kCopyThreads / kTileVectors;
template <class Config>
constexpr int kThreadRows = Config::kTileM / kRowStep<Config>;
template <class Config>
constexpr int kTileBytes = Config::kWordsPerTile * 4;

// A piece of work, and this thread's rows of out in it.
template <class Config>
struct WorkRequest {
  static constexpr int kRows = kThreadRows<Config>;

  int expert, column_block;
  int first;       // of its rows where they are neighbours, in x or in out: a row, or a slot
  int row[kRows];  // of topk_weights, and of out unless that is by slot

  __device__ __forceinline__ void load(const GemmParams& p, const WorkOrder<Config>& order,
                                       int index, int first_row) {
    int row_block;
    order.seek(index, row_block, column_block);
    const RowBlock<Config> block(p, row_block, expert);
    first = block.first;
#pragma unroll
    for (int i = 0; i < kRows; ++i) row[i] = block.row(first_row + kRowStep<Config> * i);
  }
  __device__ __forceinline__ void check(const GemmParams& p) {
    expert = checked_expert(p, expert);
#pragma unroll
    for (int i = 0; i < kRows; ++i) row[i] = checked_row(p, row[i]);
  }
};

// Rows of x that are neighbours: boxes of kWidthStep rows by 64 of K, as many as the tile's rows
// need, each requested by a lane of a warp of its own. Of blocks that share x each copies its share
// to all. Padding behind the last row is whatever the boxes bring: only its own columns of the
// product depend on it, and those are not stored. Past the end of K boxes are zero.
template <class Config>
struct XBoxes {
  using Stage = typename WgmmaStorage<Config>::Stage;
  static constexpr int kBytes = Config::kWidthStep * kTile * 2;
  static_assert(Config::kWidths <= Config::kCopyThreads / 32, "a warp each");
  static_assert(Config::kStageTiles == 1, "a box a stage, and parts of K end with one");
  const GemmParams& p;
  int count, box, row;
  bool mine;

  __device__ __forceinline__ XBoxes(const GemmParams& p, const WorkRequest<Config>& work, int rows,
                                    int thread)
      : p(p),
        count((rows + Config::kWidthStep - 1) / Config::kWidthStep),
        box(thread / 32),
        row(work.first + box * Config::kWidthStep),
        mine(thread % 32 == 0 && box < count &&
             box % p.share_x == static_cast<int>(blockIdx.x) % p.share_x) {}

  // That bulk copies bring to a stage.
  __device__ __forceinline__ int bytes() const { return count * kBytes; }

  __device__ __forceinline__ void copy(Stage& stage, int k_tile, uint64_t* full) const {
    if (!mine) return;
    void* to = stage.x[0][box * Config::kWidthStep];
    const int k = k_tile * kTile;
    if (p.share_x > 1) {
      ptx::box_copy_to((1 << p.share_x) - 1, to, p.x_boxes, k, row, full);
    } else {
      ptx::box_copy(to, p.x_boxes, k, row, full);
    }
  }
};

// Rows of x that this thread gathers, one vector of each every 64 of K. Rows past the last one that
// is no padding, as far as the products reach, are zeros: what is multiplied for nothing should at
// least take little power. Padding before it is row 0. Neither is stored.
template <class Config>
struct XRows {
  using Element = typename Config::Element;
  using Stage = typename WgmmaStorage<Config>::Stage;
  static constexpr int kRows = kThreadRows<Config>;
  const uint4* x;        // this thread's vector of the live stage, in row 0
  uint32_t from[kRows];  // vectors from there to each row: pointers would take twice the registers
  int count = 0;  // up to the last row that is no padding
  int filled = 0;  // and up to the last that is multiplied
  int vector, swizzled;  // swizzled: place of row 0, in bytes
  int k_end;

  // rows: up to the tile's last that is no padding.
  __device__ __forceinline__ XRows(const GemmParams& p, const WorkRequest<Config>& work,
                                   const KRange& range, int rows, int thread)
      : vector(thread % kTileVectors), k_end(min(range.end * kTile, p.k)) {
    const int row = thread / kTileVectors;
    swizzled = (row * kTile + (vector ^ row % 8) * kCopyVector) * static_cast<int>(sizeof(Element));
    x = static_cast<const uint4*>(p.x) + range.begin * kTileVectors + vector;
    const int multiplied =
        (rows + Config::kWidthStep - 1) / Config::kWidthStep * Config::kWidthStep;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (work.row[i] >= 0) count = i + 1;
      if (row + i * kRowStep<Config> < multiplied) filled = i + 1;
      from[i] = source_row(p, work.row[i]) * static_cast<uint32_t>(p.x_stride / kCopyVector);
    }
  }

  __device__ __forceinline__ int bytes() const { return 0; }

  __device__ __forceinline__ void copy(Stage& stage, int k_tile, uint64_t*) {
    if ((k_tile + Config::kStageTiles) * kTile <= k_end) {
      copy_whole(stage);
    } else {
      copy_end(stage, k_tile);
    }
  }

 private:
  static constexpr int kStepBytes = kRowStep<Config> * kTile * static_cast<int>(sizeof(Element));
  static constexpr int kXTileBytes = Config::kTileM * kTile * static_cast<int>(sizeof(Element));

  __device__ __forceinline__ void copy_whole(Stage& stage) {
    if (filled == kRows) {  // as in most pieces: rows are not compared one by one
      copy_rows(stage, kRows);
    } else {
      copy_rows(stage, filled);
    }
    x += Config::kStageTiles * kTileVectors;
  }

  __device__ __forceinline__ void copy_rows(Stage& stage, int rows) const {
    const uint32_t to = ptx::shared_address(&stage.x) + swizzled;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (i >= rows) continue;
#pragma unroll
      for (int t = 0; t < Config::kStageTiles; ++t) {
        ptx::cp_async_or_zero(to + t * kXTileBytes + i * kStepBytes, x + from[i] + t * kTileVectors,
                              i < count);
      }
    }
  }

  // The last stage, where K ends inside it: what lies past the end is zero.
  __device__ __forceinline__ void copy_end(Stage& stage, int k_tile) const {
#pragma unroll 1
    for (int t = 0; t < Config::kStageTiles; ++t) {
      const int k = (k_tile + t) * kTile + vector * kCopyVector;
      const int valid = min(max(k_end - k, 0), kCopyVector);
      // A copy of 0 bytes writes zeros but still wants an address inside the array: the row's own.
      const int step = valid == 0 ? -(k_tile * kTileVectors + vector) : t * kTileVectors;
      unsigned char* to = reinterpret_cast<unsigned char*>(&stage.x[t]) + swizzled;
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        if (i < filled) {
          ptx::cp_async(to + i * kStepBytes, x + from[i] + step,
                        i < count ? valid * static_cast<int>(sizeof(Element)) : 0);
        }
      }
    }
  }

  // Row of x behind row `id` of out. With m = floor((2^32 - 1) / d) + 1, id * m / 2^32 is the
  // quotient or one more, for all id < 2^31.
  static __device__ __forceinline__ uint32_t source_row(const GemmParams& p, int id) {
    const uint32_t row = static_cast<uint32_t>(max(id, 0)), divisor = p.row_divisor;
    if (divisor == 1) return row;
    const uint32_t quotient = __umulhi(row, 0xffffffffu / divisor + 1);
    return quotient - (quotient * divisor > row ? 1 : 0);
  }
};

// Column tiles past the end repeat the last one; the epilogue does not store them. A gated block
// takes tiles of gate and of up in turn.
template <class Config>
__device__ __forceinline__ int64_t stack_tile(const GemmParams& p, const WorkRequest<Config>& work,
                                              int column_tile) {
  const int tiles = (p.n + kTile - 1) / kTile;
  int n_tile = work.column_block * Config::kColumnTiles + column_tile;
  if (p.activation == Activation::kNone) {
    n_tile = min(n_tile, tiles - 1);
  } else {
    n_tile = min(n_tile / 2, tiles - 1) + n_tile % 2 * tiles;
  }
  return static_cast<int64_t>(work.expert) * p.stack_n_tiles + p.first_tile + n_tile;
}

// Packed K tiles of one column tile are contiguous. K tiles missing in the last stage keep old
// codes: their rows of x are zero.
template <class Config>
struct WeightRun {
  using Stage = typename WgmmaStorage<Config>::Stage;
  const uint32_t* from;

  __device__ __forceinline__ WeightRun(const GemmParams& p, const WorkRequest<Config>& work,
                                       int k_tile, int column_tile) {
    const int64_t tile = stack_tile<Config>(p, work, column_tile) * p.k_tiles + k_tile;
    from = p.qweight + tile * Config::kWordsPerTile;
  }
  // All threads of a warp, of which one copies: `from` is then the warp's, as the copy wants it.
  __device__ __forceinline__ void copy(Stage& stage, int k_tiles, int column_tile, uint64_t* full,
                                       bool copies) {
    if (copies) {
      ptx::bulk_copy(stage.weights[column_tile], from, k_tiles * kTileBytes<Config>, full);
    }
    from += Config::kStageTiles * Config::kWordsPerTile;
  }
};

// A vector of scales in every stage, 8 columns of one half K tile, and that of zero points.
template <class Config>
struct ScaleRun {
  using Element = typename Config::Element;
  using Storage = WgmmaStorage<Config>;
  using Stage = typename Storage::Stage;
  const Element* from[Storage::kScaleSets];  // in the live group
  int to;  // place in a stage's scales, in bytes
  int k, group_size;  // k: this half's first, counted from the live group's first
  int groups_left;  // after the live one
  bool needed;

  __device__ __forceinline__ ScaleRun(const GemmParams& p, const WorkRequest<Config>& work,
                                      int k_tile, int thread)
      : to(thread * kCopyVector * static_cast<int>(sizeof(Element))), group_size(p.group_size) {
    constexpr int kRowVectors = Config::kColumns / kCopyVector;
    constexpr int kVectors = Storage::kHalves * kRowVectors;
    static_assert(kVectors <= Config::kCopyThreads, "a thread each");
    const int column = thread % kRowVectors * kCopyVector;
    const int half = thread / kRowVectors;
    needed = thread < kVectors && (half % 2 == 0 || scales_change_inside(p));
    const int first = k_tile * kTile + half * kHalf;
    const int group = min(first / group_size, p.num_groups - 1);
    k = first - group * group_size;
    groups_left = p.num_groups - 1 - group;
    const int64_t at =
        (stack_tile<Config>(p, work, column / kTile) * p.num_groups + group) * kTile +
        column % kTile;
    from[0] = static_cast<const Element*>(p.scales) + at;
    if constexpr (Config::kStoredZeroPoints) {
      from[1] = static_cast<const Element*>(p.zero_points) + at;
    }
  }

  // Past the last group that one stays live: rows of x are zero there.
  __device__ __forceinline__ void copy(Stage& stage) {
#pragma unroll
    for (int set = 0; set < Storage::kScaleSets; ++set) {
      if (needed) ptx::cp_async(ptx::shared_address(&stage.scales[set]) + to, from[set]);
    }
    k += Config::kStageTiles * kTile;
    while (k >= group_size && groups_left > 0) {
      k -= group_size;
      --groups_left;
#pragma unroll
      for (int set = 0; set < Storage::kScaleSets; ++set) from[set] += kTile;
    }
  }
};

}  // namespace jax_marlin
