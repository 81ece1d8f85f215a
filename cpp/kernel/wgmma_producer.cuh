// The warpgroup that copies: rows of x, packed weights, scales and zero points into a ring of
// stages, as far ahead of the products as the ring is long, across pieces of work.
//
// All its threads gather x and scales with cp.async; a lane of each warp requests one column tile's
// weights as a bulk copy. A stage costs the products 500 to 1000 clocks and must cost less here:
// every thread keeps an offset for each of its rows.
#pragma once

#include "ptx_sm90.cuh"
#include "wgmma_scheduler.cuh"

namespace jax_marlin {

template <class Config>
class Producer {
  using Element = typename Config::Element;
  using Storage = WgmmaStorage<Config>;
  static constexpr int kVector = 8;                // 16-bit elements of one 16-byte copy
  static constexpr int kRowStep = Config::kCopyThreads / 8;  // 8 threads copy 64 of K of a row
  static constexpr int kRows = Config::kTileM / kRowStep;

 public:
  __device__ __forceinline__ Producer(const GemmParams& p, Storage& storage)
      : p_(p), storage_(storage), thread_(threadIdx.x), k_(k_range(p)) {}

  __device__ __forceinline__ void run() {
    const WorkOrder<Config> order(p_);
    const int clusters = gridDim.x / p_.split_k;
    int index = blockIdx.x / p_.split_k;
    Request next;
    if (index < order.count()) next.load(p_, order, index, thread_ / 8);
    while (index < order.count()) {
      Request work = next;
      work.check(p_);
      index += clusters;
      // Routing tables of the next piece arrive while this one is copied.
      if (index < order.count()) next.load(p_, order, index, thread_ / 8);
      if (work.expert < 0) continue;
      const int rows = count_rows(work);
      if (rows == 0) continue;
      publish(work, rows);
      copy(work);
    }
    Request end;
    end.expert = -1;
    publish(end, 0);
  }

 private:
  // A piece of work, and this thread's rows of out in it.
  struct Request {
    int expert, column_block;
    int row[kRows];

    __device__ __forceinline__ void load(const GemmParams& p, const WorkOrder<Config>& order,
                                         int index, int first_row) {
      int row_block;
      order.seek(index, row_block, column_block);
      const RowBlock<Config> block(p, row_block, expert);
#pragma unroll
      for (int i = 0; i < kRows; ++i) row[i] = block.row(first_row + kRowStep * i);
    }
    __device__ __forceinline__ void check(const GemmParams& p) {
      expert = checked_expert(p, expert);
#pragma unroll
      for (int i = 0; i < kRows; ++i) row[i] = checked_row(p, row[i]);
    }
  };

  // How many rows lie up to the tile's last used one, for all threads.
  __device__ __forceinline__ int count_rows(const Request& work) {
    int last = 0;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (work.row[i] >= 0) last = thread_ / 8 + kRowStep * i + 1;
    }
    last = __reduce_max_sync(0xffffffffu, last);
    auto& warp_rows = storage_.rest.warp_rows[counts_++ % kWorkSlots];
    if (thread_ % 32 == 0) warp_rows[thread_ / 32] = last;
    ptx::named_barrier(kProducerBarrier, Config::kCopyThreads);
#pragma unroll
    for (int warp = 0; warp < Config::kCopyThreads / 32; ++warp) last = max(last, warp_rows[warp]);
    return last;
  }

  __device__ __forceinline__ void publish(const Request& request, int rows) {
    ptx::mbarrier_wait(&storage_.rest.work_empty[work_at_.slot], work_at_.parity ^ 1);
    auto& work = storage_.rest.work[work_at_.slot];
    if (thread_ == 0) {
      work.expert = request.expert;
      work.column_block = request.column_block;
      work.rows = rows;
    }
    if (rows > 0 && thread_ % 8 == 0) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) work.out_row[thread_ / 8 + kRowStep * i] = request.row[i];
    }
    ptx::mbarrier_arrive(&storage_.rest.work_full[work_at_.slot]);
    work_at_.advance();
  }

  // All stages of one piece of work.
  __device__ __forceinline__ void copy(const Request& work) {
    const int warp = thread_ / 32;
    WeightRun weights(p_, work, k_.begin, warp);
    ScaleRun scales(p_, work, k_.begin, Config::kCopyThreads - 1 - thread_);
    const XRows x(p_, work, thread_);
    const bool copies_weights = thread_ % 32 == 0 && warp < Config::kColumnTiles;
    const int x_end = min(k_.end * kTile, p_.k);
    for (int k_tile = k_.begin; k_tile < k_.end; k_tile += Config::kStageTiles) {
      const int k_tiles = min(k_.end - k_tile, Config::kStageTiles);
      auto& stage = storage_.stages[at_.slot];
      uint64_t* full = &storage_.full[at_.slot];
      ptx::mbarrier_wait(&storage_.empty[at_.slot], at_.parity ^ 1);
      if (thread_ == 0) {
        ptx::mbarrier_arrive_expect(full, Config::kColumnTiles * k_tiles * kTileBytes);
      }
      if (copies_weights) weights.copy(stage, k_tiles, warp, full);
      if ((k_tile + Config::kStageTiles) * kTile <= x_end) {
        x.copy(p_, stage, k_tile);
      } else {
        x.copy_end(p_, stage, k_tile, x_end);
      }
      scales.copy(stage);
      ptx::mbarrier_arrive_after_copies(full);
      at_.advance();
    }
  }

  // Rows of x that this thread gathers, one vector of each every 64 of K. Padding rows keep what
  // they held: only their own columns of the product depend on it, and those are not stored.
  struct XRows {
    uint32_t offset[kRows];  // from x, in vectors
    uint32_t used = 0;       // bit i: row i is no padding
    int vector, swizzled;    // place of row 0, in bytes

    __device__ __forceinline__ XRows(const GemmParams& p, const Request& work, int thread)
        : vector(thread % 8) {
      const int row = thread / 8;
      swizzled = (row * kTile + (vector ^ row % 8) * kVector) * static_cast<int>(sizeof(Element));
      const uint32_t row_vectors = static_cast<uint32_t>(p.x_stride / kVector);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        if (work.row[i] >= 0) used |= 1u << i;
        offset[i] = source_row(p, work.row[i]) * row_vectors + vector;
      }
    }

    // K tiles that are whole.
    __device__ __forceinline__ void copy(const GemmParams& p, typename Storage::Stage& stage,
                                         int k_tile) const {
      const uint32_t to = ptx::shared_address(&stage.x) + swizzled;
      const uint4* x = static_cast<const uint4*>(p.x) + k_tile * kTileVectors;
#pragma unroll
      for (int t = 0; t < Config::kStageTiles; ++t) {
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          if (used >> i & 1) {
            ptx::cp_async(to + t * kXTileBytes + i * kStepBytes, x + t * kTileVectors + offset[i]);
          }
        }
      }
    }

    // The last stage, where K ends inside it: what lies past the end is zero.
    __device__ __forceinline__ void copy_end(const GemmParams& p, typename Storage::Stage& stage,
                                             int k_tile, int k_end) const {
#pragma unroll 1
      for (int t = 0; t < Config::kStageTiles; ++t) {
        const int k = (k_tile + t) * kTile;
        const int valid = min(max(k_end - k - vector * kVector, 0), kVector);
        // A copy of 0 bytes writes zeros but still wants an address inside the array.
        const uint4* x = static_cast<const uint4*>(p.x) + (valid == 0 ? -vector : k / kVector);
        unsigned char* to = reinterpret_cast<unsigned char*>(&stage.x[t]) + swizzled;
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          if (used >> i & 1) {
            ptx::cp_async(to + i * kStepBytes, x + offset[i],
                          valid * static_cast<int>(sizeof(Element)));
          }
        }
      }
    }

   private:
    static constexpr int kTileVectors = kTile / kVector;
    static constexpr int kStepBytes = kRowStep * kTile * static_cast<int>(sizeof(Element));
    static constexpr int kXTileBytes = Config::kTileM * kTile * static_cast<int>(sizeof(Element));

    // Row of x behind row `id` of out. With m = floor((2^32 - 1) / d) + 1, id * m / 2^32 is the
    // quotient or one more, for all id < 2^31.
    static __device__ __forceinline__ uint32_t source_row(const GemmParams& p, int id) {
      const uint32_t row = static_cast<uint32_t>(max(id, 0)), divisor = p.row_divisor;
      if (divisor == 1) return row;
      const uint32_t quotient = __umulhi(row, 0xffffffffu / divisor + 1);
      return quotient - (quotient * divisor > row ? 1 : 0);
    }
  };

  // Column tiles past the end repeat the last one; the epilogue does not store them.
  static __device__ __forceinline__ int64_t stack_tile(const GemmParams& p, const Request& work,
                                                       int column_tile) {
    const int last_tile = (p.n + kTile - 1) / kTile - 1;
    const int n_tile = min(work.column_block * Config::kColumnTiles + column_tile, last_tile);
    return static_cast<int64_t>(work.expert) * p.stack_n_tiles + p.first_tile + n_tile;
  }

  static constexpr int kTileBytes = Config::kWordsPerTile * 4;

  // Packed K tiles of one column tile are contiguous. K tiles missing in the last stage keep old
  // codes: their rows of x are zero.
  struct WeightRun {
    const uint32_t* from;

    __device__ __forceinline__ WeightRun(const GemmParams& p, const Request& work, int k_tile,
                                         int column_tile) {
      const int64_t tile = stack_tile(p, work, column_tile) * p.k_tiles + k_tile;
      from = p.qweight + tile * Config::kWordsPerTile;
    }
    __device__ __forceinline__ void copy(typename Storage::Stage& stage, int k_tiles,
                                         int column_tile, uint64_t* full) {
      ptx::bulk_copy(stage.weights[column_tile], from, k_tiles * kTileBytes, full);
      from += Config::kStageTiles * Config::kWordsPerTile;
    }
  };

  // A vector of scales or zero points in every stage: 8 columns of one half K tile.
  struct ScaleRun {
    const Element* from;  // in the live group
    int to;               // place in a stage's scales, in bytes
    int k, group_size;    // k: this half's first, counted from the live group's first
    int groups_left;      // after the live one
    bool needed;

    __device__ __forceinline__ ScaleRun(const GemmParams& p, const Request& work, int k_tile,
                                        int thread)
        : to(thread * kVector * static_cast<int>(sizeof(Element))), group_size(p.group_size) {
      constexpr int kRowVectors = Config::kColumns / kVector;
      constexpr int kVectors = Storage::kScaleSets * Storage::kHalves * kRowVectors;
      static_assert(kVectors <= Config::kCopyThreads, "a thread each");
      const int column = thread % kRowVectors * kVector;
      const int half = thread / kRowVectors % Storage::kHalves;
      const bool zero_points = thread < kVectors && thread / kRowVectors >= Storage::kHalves;
      needed = thread < kVectors && (half % 2 == 0 || scales_change_inside(p));
      const int first = k_tile * kTile + half * kHalf;
      const int group = min(first / group_size, p.num_groups - 1);
      k = first - group * group_size;
      groups_left = p.num_groups - 1 - group;
      from = static_cast<const Element*>(zero_points ? p.zero_points : p.scales) +
             (stack_tile(p, work, column / kTile) * p.num_groups + group) * kTile + column % kTile;
    }

    // Past the last group that one stays live: rows of x are zero there.
    __device__ __forceinline__ void copy(typename Storage::Stage& stage) {
      if (needed) ptx::cp_async(ptx::shared_address(&stage.scales[0][0][0]) + to, from);
      k += Config::kStageTiles * kTile;
      while (k >= group_size && groups_left > 0) {
        k -= group_size;
        --groups_left;
        from += kTile;
      }
    }
  };

  const GemmParams& p_;
  Storage& storage_;
  const int thread_;
  const KRange k_;
  RingPosition<Storage::kStages> at_;
  RingPosition<kWorkSlots> work_at_;
  int counts_ = 0;
};

}  // namespace jax_marlin
