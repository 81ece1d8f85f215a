// The streaming kernel of a choice.
#pragma once

#include "../instances.h"
#include "../launch_gemm.h"

namespace jax_marlin {

struct StreamKernel {
  GemmKernel kernel;
  int blocks_per_sm;  // that stay
};

StreamKernel stream_kernel(const GemmLaunch& gemm);

}  // namespace jax_marlin
