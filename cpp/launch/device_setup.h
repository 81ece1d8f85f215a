// What the driver is asked and told about a device and its kernels: once a thread, not once a call.
#pragma once

#include <cuda_runtime.h>

#include "select_tile.h"

namespace jax_marlin {

// Of the device that is current on this thread.
cudaError_t current_device(DeviceLimits* device);

// Allows `kernel` as much shared memory on the current device, whatever its later launches take.
// *overlaps: whether its code is that of sm_90 or later, and so waits for the kernel before it: it
// may start before that one ends.
cudaError_t set_up_kernel(const void* kernel, int shared_bytes, bool* overlaps);

}  // namespace jax_marlin
