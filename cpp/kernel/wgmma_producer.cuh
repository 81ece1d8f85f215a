// The warpgroups that copy: rows of x, packed weights, scales and zero points into a ring of
// stages, as far ahead of the products as the ring is long, across pieces of work.
//
// A lane of each warp requests one column tile's weights as a bulk copy, and a box of x where rows
// are neighbours. Other rows all threads gather with cp.async, as they do scales: a stage costs the
// products 500 to 1000 clocks and must cost less here, so every thread keeps the place of each
// of its rows.
#pragma once

#include "wgmma_copies.cuh"

namespace jax_marlin {

template <class Config>
class Producer {
  using Request = WorkRequest<Config>;
  using Storage = WgmmaStorage<Config>;
  static constexpr int kRows = kThreadRows<Config>;
  static_assert(Config::kColumnTiles <= Config::kCopyThreads / 32, "a warp each");

 public:
  __device__ __forceinline__ Producer(const GemmParams& p, Storage& storage)
      : p_(p), storage_(storage), thread_(threadIdx.x), k_(k_range(p)) {}

  __device__ __forceinline__ void run() {
    const WorkOrder<Config> order(p_);
    const int cluster = p_.split_k * p_.share_x;
    const int clusters = gridDim.x / cluster;
    int index = blockIdx.x / cluster;
    Request next;
    if (index < order.count()) next.load(p_, order, index, first_row());
    while (index < order.count()) {
      Request work = next;
      work.check(p_);
      work.expert = ptx::uniform(work.expert);
      index += clusters;
      // Routing tables of the next piece arrive while this one is copied.
      if (index < order.count()) next.load(p_, order, index, first_row());
      if (work.expert < 0) continue;
      const int rows = count_rows(work);
      if (rows == 0) continue;
      publish(work, rows);
      if constexpr (Config::kInBoxes) {
        copy(work, XBoxes<Config>(p_, work, rows, thread_));
      } else {
        copy(work, XRows<Config>(p_, work, k_, rows, thread_));
      }
    }
    Request end;
    end.expert = -1;
    publish(end, 0);
  }

 private:
  // Of the rows that this thread copies, kRowStep apart.
  __device__ __forceinline__ int first_row() const { return thread_ / kTileVectors; }

  // How many rows lie up to the tile's last used one, for all threads.
  __device__ __forceinline__ int count_rows(const Request& work) {
    int last = 0;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (work.row[i] >= 0) last = first_row() + kRowStep<Config> * i + 1;
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
    if (rows > 0 && thread_ % kTileVectors == 0) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const int at = first_row() + kRowStep<Config> * i, row = request.row[i];
        work.out_row[at] = p_.out_by_slot && row >= 0 ? request.first + at : row;
        work.weight[at] = p_.topk_weights != nullptr && row >= 0 ? p_.topk_weights[row] : 1.f;
      }
    }
    ptx::mbarrier_arrive(&storage_.rest.work_full[work_at_.slot]);
    work_at_.advance();
  }

  // All stages of one piece of work; x: XBoxes or XRows.
  template <class X>
  __device__ __forceinline__ void copy(const Request& work, X x) {
    const int warp = ptx::uniform(thread_ / 32);
    WeightRun<Config> weights(p_, work, k_.begin, warp);
    ScaleRun<Config> scales(p_, work, k_.begin, Config::kCopyThreads - 1 - thread_);
    const bool copies_weights = thread_ % 32 == 0 && warp < Config::kColumnTiles;
    for (int k_tile = k_.begin; k_tile < k_.end; k_tile += Config::kStageTiles) {
      const int k_tiles = min(k_.end - k_tile, Config::kStageTiles);
      auto& stage = storage_.stages[at_.slot];
      uint64_t* full = &storage_.full[at_.slot];
      ptx::mbarrier_wait(&storage_.empty[at_.slot], at_.parity ^ 1);  // in all that share x
      if (thread_ == 0) {
        const int of_weights = Config::kColumnTiles * k_tiles * kTileBytes<Config>;
        ptx::mbarrier_arrive_expect(full, of_weights + x.bytes());
      }
      weights.copy(stage, k_tiles, warp, full, copies_weights);
      x.copy(stage, k_tile, full);
      scales.copy(stage);
      ptx::mbarrier_arrive_after_copies(full);
      at_.advance();
    }
  }

  const GemmParams& p_;
  Storage& storage_;
  const int thread_;
  const KRange k_;
  RingPosition<Storage::kStages> at_;
  RingPosition<kWorkSlots> work_at_;
  int counts_ = 0;
};

}  // namespace jax_marlin
