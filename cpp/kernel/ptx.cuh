// One function a PTX instruction, named after it, with the reason it is used. Of sm_80 if not said.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace jax_marlin::ptx {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// ld.global.nc.L1::no_allocate: packed weights are read once, so they must not evict x from L1.
__device__ __forceinline__ uint4 load_stream(const uint32_t* pointer) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(pointer));
  return v;
}

// The same where `valid`, without a branch, and not by way of .nc: such a load the assembler moves
// behind a barrier, too.
__device__ __forceinline__ void load_stream_if(bool valid, const uint32_t* pointer, uint4& v) {
  asm volatile(
      "{.reg .pred p;\n"
      "setp.ne.b32 p, %5, 0;\n"
      "@p ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];}"
      : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)
      : "l"(pointer), "r"(static_cast<int>(valid))
      : "memory");
}

// ld.global where `valid`: 4 bytes.
__device__ __forceinline__ void load_if(bool valid, const void* pointer, uint32_t& v) {
  asm volatile(
      "{.reg .pred p;\n"
      "setp.ne.b32 p, %2, 0;\n"
      "@p ld.global.u32 %0, [%1];}"
      : "+r"(v)
      : "l"(pointer), "r"(static_cast<int>(valid))
      : "memory");
}

// cp.async.cg: 16 bytes to shared memory past L1 and registers; bytes after `valid_bytes` are zero.
__device__ __forceinline__ void cp_async(void* shared, const void* global, int valid_bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(shared_address(shared)), "l"(global), "r"(valid_bytes)
               : "memory");
}

__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// cp.async.wait_group: all but the newest `pending` groups of this thread have landed.
template <int pending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// No instruction: for the compiler, if not for the assembler, the value is computed before whatever
// waits next, not behind it.
__device__ __forceinline__ void compute_now(const uint32_t*& pointer) {
  asm volatile("" : "+l"(pointer));
}
__device__ __forceinline__ void compute_now(int64_t& value) { asm volatile("" : "+l"(value)); }
__device__ __forceinline__ void compute_now(int& value) { asm volatile("" : "+r"(value)); }

// lop3 with table 0xEA: (a & mask) | bits. Written in C, both constants become immediates and two
// instructions, since one instruction holds one immediate.
__device__ __forceinline__ uint32_t and_or(uint32_t a, uint32_t mask, uint32_t bits) {
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(d) : "r"(a), "r"(mask), "r"(bits));
  return d;
}

// ldmatrix.x4: four 8x8 matrices of 16-bit values; lane l gives the row address of matrix l / 8.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}

// movmatrix.trans: the transpose of an 8x8 matrix of 16-bit values, thread 4g + c with row g's
// columns 2c and 2c + 1. Between registers, where shared memory would cost a store and a load.
__device__ __forceinline__ uint32_t movmatrix(uint32_t a) {
  uint32_t d;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(a));
  return d;
}

// mma.m16n8k16: d[16x8] = a[16x16] b[16x8] + c[16x8] with float32 accumulation.
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1, const float (&c)[4], __half) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]),
        "f"(c[2]), "f"(c[3]));
}
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1, const float (&c)[4], __nv_bfloat16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]),
        "f"(c[2]), "f"(c[3]));
}

// cp.async.bulk.prefetch.L2: `bytes` (a multiple of 16) from `global` on their way to L2; of sm_90.
__device__ __forceinline__ void prefetch_l2(const void* global, int bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(global), "r"(bytes) : "memory");
#endif
}

// griddepcontrol: programmatic dependent launch, of sm_90. Without it kernels run one by one
// anyway.
__device__ __forceinline__ void launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
// Returns once the kernels before this one are complete and their writes visible.
__device__ __forceinline__ void wait_dependencies() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace jax_marlin::ptx
