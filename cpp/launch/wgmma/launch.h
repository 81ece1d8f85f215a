// Host entry points of the wgmma kernel.
#pragma once

#include "../launch_gemm.h"

namespace jax_marlin {

// Whether the device that is current on this thread runs wgmma, and the kernels are compiled in.
bool has_wgmma();

// launch_gemm for a choice of the wgmma kernel.
cudaError_t launch_wgmma_gemm(const GemmLaunch& gemm, int sm_count, Order order,
                              cudaStream_t stream);

}  // namespace jax_marlin
