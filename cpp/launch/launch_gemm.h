// Host entry points of the kernels: a problem and a stream in, a CUDA status out.
#pragma once

#include <cuda_runtime.h>

#include "../kernel/params.h"
#include "select_tile.h"

namespace jax_marlin {

enum class ElementType { kFloat16, kBfloat16 };

// Completes the launch fields of `params` from `choice`, clears what must be zero, launches.
cudaError_t launch_gemm(GemmParams params, const TileChoice& choice, ElementType element, int bits,
                        void* scratch, cudaStream_t stream);
cudaError_t launch_gather(const GatherParams& params, cudaStream_t stream);
cudaError_t launch_align(const AlignParams& params, cudaStream_t stream);

// Multiprocessors of the device that is current on this thread.
cudaError_t current_sm_count(int* sm_count);

}  // namespace jax_marlin
