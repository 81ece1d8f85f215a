// PTX of sm_90 and sm_90a, one function an instruction: barriers in shared memory, bulk copies,
// clusters, register budgets, the order of wgmma.
#pragma once

#include "params.h"
#include "ptx.cuh"

namespace jax_marlin::ptx {

__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;"
               :
               : "r"(shared_address(barrier)), "r"(arrivals)
               : "memory");
}

// fence.mbarrier_init: initial counts are visible to the cluster and to asynchronous copies.
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];"
               :
               : "r"(shared_address(barrier))
               : "memory");
}

// An arrival that also announces `bytes` of bulk copies.
__device__ __forceinline__ void mbarrier_arrive_expect(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
               :
               : "r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

// An arrival that happens once this thread's earlier cp.async have landed; counted at init.
__device__ __forceinline__ void mbarrier_arrive_after_copies(uint64_t* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];"
               :
               : "r"(shared_address(barrier))
               : "memory");
}

// An arrival at the barrier in the same place of the block `rank` of the cluster.
__device__ __forceinline__ void mbarrier_arrive_remote(uint64_t* barrier, int rank) {
  asm volatile(
      "{.reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [remote];}"
      :
      : "r"(shared_address(barrier)), "r"(rank)
      : "memory");
}

// Where the object in that place lies in the shared memory of block `rank` of the cluster.
__device__ __forceinline__ uint32_t shared_address_of(const void* shared, int rank) {
  uint32_t address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(address)
      : "r"(shared_address(shared)), "r"(rank));
  return address;
}

// An arrival by such an address that orders nothing beyond its own block: it says that shared
// memory has been read, and what was written there is of no concern to others. At the scope of the
// cluster it would wait for all of the thread's writes, wherever they go.
__device__ __forceinline__ void mbarrier_arrive_cluster(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Waits until the phase of the given parity is complete. Acquires at cluster scope when remote
// blocks arrive too.
template <bool cluster = false>
__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, int parity) {
  uint32_t done;
  do {
    if constexpr (cluster) {
      asm volatile(
          "{.reg .pred p;\n"
          "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
          "selp.u32 %0, 1, 0, p;}"
          : "=r"(done)
          : "r"(shared_address(barrier)), "r"(parity)
          : "memory");
    } else {
      asm volatile(
          "{.reg .pred p;\n"
          "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
          "selp.u32 %0, 1, 0, p;}"
          : "=r"(done)
          : "r"(shared_address(barrier)), "r"(parity)
          : "memory");
    }
  } while (done == 0);
}

// One look at the phase, to be followed by other work and then, if false, by a wait.
__device__ __forceinline__ bool mbarrier_try_wait(uint64_t* barrier, int parity) {
  uint32_t done;
  asm volatile(
      "{.reg .pred p;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;}"
      : "=r"(done)
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
  return done != 0;
}

// cp.async.bulk: contiguous bytes, a multiple of 16, completing on a barrier.
__device__ __forceinline__ void bulk_copy(void* shared, const void* global, int bytes,
                                          uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
      :
      : "r"(shared_address(shared)), "l"(global), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}

// cp.async.bulk.tensor: the box of a matrix that begins at (column, row), completing on a barrier;
// what lies outside the matrix is zero.
__device__ __forceinline__ void box_copy(void* shared, const TensorMap& map, int column, int row,
                                         uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3}], [%4];"
      :
      : "r"(shared_address(shared)), "l"(&map), "r"(column), "r"(row), "r"(shared_address(barrier))
      : "memory");
}

// The same to that place of shared memory, and barrier, in every block of the cluster in `blocks`.
__device__ __forceinline__ void box_copy_to(uint16_t blocks, void* shared, const TensorMap& map,
                                            int column, int row, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;"
      :
      : "r"(shared_address(shared)), "l"(&map), "r"(column), "r"(row), "r"(shared_address(barrier)),
        "h"(blocks)
      : "memory");
}

// cp.async.bulk the other way: a multiple of 16 contiguous bytes of this thread's current group.
__device__ __forceinline__ void bulk_store(void* global, const void* shared, int bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;"
               :
               : "l"(global), "r"(shared_address(shared)), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void bulk_store_commit() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
// cp.async.bulk.wait_group.read: all but the newest `pending` groups have read shared memory.
template <int pending>
__device__ __forceinline__ void bulk_store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(pending) : "memory");
}

// stmatrix.x4.trans: fragment j, two values down a column of each lane, becomes an 8x8 matrix in
// rows of 16 bytes; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void stmatrix_transposed(void* row, const uint32_t (&matrices)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};"
               :
               : "r"(shared_address(row)), "r"(matrices[0]), "r"(matrices[1]), "r"(matrices[2]),
                 "r"(matrices[3])
               : "memory");
}

// cp.async.cg of all 16 bytes, or of as many zeros in their place (its ignore-src): a size that
// varies costs more instructions than the copy.
__device__ __forceinline__ void cp_async_or_zero(uint32_t shared, const void* global, bool copies) {
  asm volatile(
      "{.reg .pred ignore;\n"
      "setp.eq.b32 ignore, %2, 0;\n"
      "cp.async.cg.shared.global [%0], [%1], 16, ignore;}"
      :
      : "r"(shared), "l"(global), "r"(static_cast<int>(copies))
      : "memory");
}
// The same, of bytes always.
__device__ __forceinline__ void cp_async(uint32_t shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" : : "r"(shared), "l"(global) : "memory");
}

// fence.proxy.async: shared memory that threads wrote may be read by wgmma.
__device__ __forceinline__ void fence_proxy_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Four floats of the same place in the shared memory of block `rank` of the cluster.
__device__ __forceinline__ float4 load_remote(const float4* shared, int rank) {
  float4 v;
  asm volatile(
      "{.reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %4, %5;\n"
      "ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [remote];}"
      : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
      : "r"(shared_address(shared)), "r"(rank)
      : "memory");
  return v;
}

// The other way.
__device__ __forceinline__ void store_remote(float4* shared, int rank, const float4& v) {
  asm volatile(
      "{.reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "st.shared::cluster.v4.f32 [remote], {%2, %3, %4, %5};}"
      :
      : "r"(shared_address(shared)), "r"(rank), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w)
      : "memory");
}

__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
// The same where nothing written before it is of concern to others.
__device__ __forceinline__ void cluster_arrive_relaxed() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// bar.sync among `threads` threads, whole warps, of a block; barrier 0 is __syncthreads.
__device__ __forceinline__ void named_barrier(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// bar.arrive: counts for others' bar.sync without waiting.
__device__ __forceinline__ void named_barrier_arrive(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// redux.sync.max of a value that all threads of the warp share: now the compiler knows that they
// do, keeps what follows from it in registers of the warp, and branches without a vote.
__device__ __forceinline__ int uniform(int value) { return __reduce_max_sync(0xffffffffu, value); }

// setmaxnreg: a warpgroup gives registers back, or takes what others gave.
template <int registers>
__device__ __forceinline__ void release_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
}
template <int registers>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
}

// wgmma.fence: registers written by ordinary instructions may be read by wgmma.
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// wgmma.wait_group: all but the newest `pending` groups of this warp are complete.
template <int pending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

}  // namespace jax_marlin::ptx
