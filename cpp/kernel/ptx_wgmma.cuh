// wgmma.m64nNk16 with operand A in registers: d[64, n] += a[64, 16] b[16, n], float32 sums.
//
// Warp w of the warpgroup holds rows 16w .. 16w + 15 of a and d, each in the fragment order of
// mma.m16n8k16; b lies in shared memory, n rows of 16 along k (K-major), named by a descriptor.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace jax_marlin::ptx {

// Descriptor of b in rows of 128 bytes, swizzled by 128: the 16-byte vector v of row r is stored at
// v ^ (r & 7). Eight rows are 1024 bytes; `address` is that of row 0, aligned to 1024, and of the
// k16 step `step`, each 32 bytes. Its halves are put together last: no carry to compute.
__device__ __forceinline__ uint64_t swizzled_descriptor(uint32_t address, int step) {
  constexpr uint32_t kSwizzle128 = 1u << 30, kEightRows = 1024 >> 4;
  const uint32_t low = ((address & 0x3ffff) >> 4) + 2 * step;
  return uint64_t{kSwizzle128 | kEightRows} << 32 | low;
}

// Registers of d: n / 2 floats of a thread.
#define JAX_MARLIN_D8(i)                                                                      \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define JAX_MARLIN_D16(i) JAX_MARLIN_D8(i), JAX_MARLIN_D8(i + 8)
#define JAX_MARLIN_D32(i) JAX_MARLIN_D16(i), JAX_MARLIN_D16(i + 16)
#define JAX_MARLIN_D64(i) JAX_MARLIN_D32(i), JAX_MARLIN_D32(i + 32)
#define JAX_MARLIN_D128(i) JAX_MARLIN_D64(i), JAX_MARLIN_D64(i + 64)

#define JAX_MARLIN_R8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define JAX_MARLIN_R16 \
  JAX_MARLIN_R8        \
  ", %8, %9, %10, %11, %12, %13, %14, %15"
#define JAX_MARLIN_R24 \
  JAX_MARLIN_R16       \
  ", %16, %17, %18, %19, %20, %21, %22, %23"
#define JAX_MARLIN_R32 \
  JAX_MARLIN_R24       \
  ", %24, %25, %26, %27, %28, %29, %30, %31"
#define JAX_MARLIN_R48 \
  JAX_MARLIN_R32       \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define JAX_MARLIN_R64 \
  JAX_MARLIN_R48       \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define JAX_MARLIN_R72 \
  JAX_MARLIN_R64       \
  ", %64, %65, %66, %67, %68, %69, %70, %71"
#define JAX_MARLIN_R96                                                                           \
  JAX_MARLIN_R64                                                                                 \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, " \
  "%82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define JAX_MARLIN_R128                                                                        \
  JAX_MARLIN_R96                                                                               \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, "   \
  "%111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, " \
  "%126, %127"

// One width for both element types; the operands after d are a, the descriptor.
#define JAX_MARLIN_WGMMA_TYPE(type, name, n, registers, operands, a0, a1, a2, a3, b)               \
  template <int d_size>                                                                            \
  __device__ __forceinline__ void wgmma_m64k16(float (&d)[d_size], const uint32_t (&a)[4],         \
                                               uint64_t b_descriptor, Width<n>, type) {            \
    asm volatile(                                                                                  \
        "{.reg .pred accumulate; setp.ne.b32 accumulate, 1, 0;\n"                                  \
        "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." #name "." #name " {" registers "}, {" a0 \
        ", " a1 ", " a2 ", " a3 "}, " b ", accumulate, 1, 1, 0;}"                                  \
        : operands                                                                                 \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b_descriptor));                          \
  }
#define JAX_MARLIN_LIST(...) __VA_ARGS__
#define JAX_MARLIN_WGMMA(n, registers, operands, a0, a1, a2, a3, b)                               \
  JAX_MARLIN_WGMMA_TYPE(__half, f16, n, registers, JAX_MARLIN_LIST(operands), a0, a1, a2, a3, b)  \
  JAX_MARLIN_WGMMA_TYPE(__nv_bfloat16, bf16, n, registers, JAX_MARLIN_LIST(operands), a0, a1, a2, \
                        a3, b)

template <int n>
struct Width {};

JAX_MARLIN_WGMMA(16, JAX_MARLIN_R8, JAX_MARLIN_LIST(JAX_MARLIN_D8(0)), "%8", "%9", "%10", "%11",
                 "%12")
JAX_MARLIN_WGMMA(32, JAX_MARLIN_R16, JAX_MARLIN_LIST(JAX_MARLIN_D16(0)), "%16", "%17", "%18", "%19",
                 "%20")
JAX_MARLIN_WGMMA(48, JAX_MARLIN_R24, JAX_MARLIN_LIST(JAX_MARLIN_D16(0), JAX_MARLIN_D8(16)), "%24",
                 "%25", "%26", "%27", "%28")
JAX_MARLIN_WGMMA(64, JAX_MARLIN_R32, JAX_MARLIN_LIST(JAX_MARLIN_D32(0)), "%32", "%33", "%34", "%35",
                 "%36")
JAX_MARLIN_WGMMA(96, JAX_MARLIN_R48, JAX_MARLIN_LIST(JAX_MARLIN_D32(0), JAX_MARLIN_D16(32)), "%48",
                 "%49", "%50", "%51", "%52")
JAX_MARLIN_WGMMA(128, JAX_MARLIN_R64, JAX_MARLIN_LIST(JAX_MARLIN_D64(0)), "%64", "%65", "%66",
                 "%67", "%68")
JAX_MARLIN_WGMMA(144, JAX_MARLIN_R72, JAX_MARLIN_LIST(JAX_MARLIN_D64(0), JAX_MARLIN_D8(64)), "%72",
                 "%73", "%74", "%75", "%76")
JAX_MARLIN_WGMMA(192, JAX_MARLIN_R96, JAX_MARLIN_LIST(JAX_MARLIN_D64(0), JAX_MARLIN_D32(64)), "%96",
                 "%97", "%98", "%99", "%100")
JAX_MARLIN_WGMMA(256, JAX_MARLIN_R128, JAX_MARLIN_LIST(JAX_MARLIN_D128(0)), "%128", "%129", "%130",
                 "%131", "%132")

#undef JAX_MARLIN_WGMMA
#undef JAX_MARLIN_LIST
#undef JAX_MARLIN_WGMMA_TYPE
#undef JAX_MARLIN_R8
#undef JAX_MARLIN_R16
#undef JAX_MARLIN_R24
#undef JAX_MARLIN_R32
#undef JAX_MARLIN_R48
#undef JAX_MARLIN_R128
#undef JAX_MARLIN_R96
#undef JAX_MARLIN_R72
#undef JAX_MARLIN_R64
#undef JAX_MARLIN_D128
#undef JAX_MARLIN_D64
#undef JAX_MARLIN_D32
#undef JAX_MARLIN_D16
#undef JAX_MARLIN_D8

}  // namespace jax_marlin::ptx
