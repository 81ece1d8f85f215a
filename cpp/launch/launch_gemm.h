// Host entry points of the kernels: a problem and a stream in, a CUDA status out.
#pragma once

#include <cuda_runtime.h>

#include "../kernel/params.h"
#include "select_tile.h"

namespace jax_marlin {

enum class ElementType { kFloat16, kBfloat16 };

// How a kernel follows the one before it on the stream.
enum class Order {
  kAfter,     // starts when that one and its writes are complete
  kOverlap,   // may start early, and waits in the kernel; as kAfter on GPUs that cannot
};

struct GemmLaunch {
  GemmParams params;  // but for what `choice` says
  TileChoice choice;
  ElementType element;
  int bits;
  void* scratch;      // scratch_bytes(choice)
};

// Fills in `choice` for the device that is current on this thread.
cudaError_t plan_gemm(GemmLaunch& gemm, const GemmProblem& problem);
// Zeroes what a split K counts in; once before each launch_gemm, in stream order.
cudaError_t clear_arrivals(const GemmLaunch& gemm, cudaStream_t stream);
cudaError_t launch_gemm(const GemmLaunch& gemm, Order order, cudaStream_t stream);
// The same with arrivals zeroed and, where out_bytes says how large out is, all of out that it does
// not compute: before it, in a launch that it starts beside, or by itself.
cudaError_t launch_cleared_gemm(GemmLaunch gemm, int64_t out_bytes, cudaStream_t stream);
cudaError_t launch_gather(const GatherParams& params, Order order, cudaStream_t stream);
cudaError_t launch_align(const AlignParams& params, cudaStream_t stream);
cudaError_t launch_combine(const CombineParams& params, ElementType element, Order order,
                           cudaStream_t stream);

}  // namespace jax_marlin
