// Host entry points of the wgmma kernel.
#pragma once

#include "../launch_gemm.h"
#include "select_tile.h"

namespace jax_marlin {

// Whether the device that is current on this thread runs wgmma, and the kernels are compiled in.
bool has_wgmma();

// Completes the launch fields of `params` from `choice` and launches; needs no scratch.
cudaError_t launch_wgmma_gemm(GemmParams params, const WgmmaTileChoice& choice, ElementType element,
                              int bits, int sm_count, cudaStream_t stream);

}  // namespace jax_marlin
