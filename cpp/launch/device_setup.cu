// Facts about devices and kernels never change: each thread keeps those it has met, without locks.

#include <map>
#include <utility>

#include "device_setup.h"
#include "wgmma/launch.h"

namespace jax_marlin {
namespace {

constexpr int kDefaultSharedBytes = 48 * 1024;  // more must be asked for, kernel by kernel

cudaError_t ask_device(int device, DeviceLimits* limits) {
  limits->has_wgmma = has_wgmma();
  return cudaDeviceGetAttribute(&limits->sm_count, cudaDevAttrMultiProcessorCount, device);
}

cudaError_t tell_kernel(const void* kernel, int shared_bytes, bool* overlaps) {
  // With one split of L1 and shared memory for all kernels, none waits for a multiprocessor to run
  // empty and change it.
  cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                            cudaSharedmemCarveoutMaxShared);
  if (status == cudaSuccess && shared_bytes > kDefaultSharedBytes) {
    status =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  }
  if (status != cudaSuccess) return status;
  // A kernel waits for the one before it in code of sm_90 alone. What the driver compiles from the
  // PTX of an older architecture, on any GPU, does not (ptx.cuh), so it must not start early.
  cudaFuncAttributes code = {};
  status = cudaFuncGetAttributes(&code, kernel);
  *overlaps = code.ptxVersion >= 90;
  return status;
}

// The value of `key`, by `find(&value)` the first time that this thread asks.
template <class Key, class Value, class Find>
cudaError_t remember(std::map<Key, Value>& known, const Key& key, Value* value, Find find) {
  const auto at = known.find(key);
  if (at != known.end()) {
    *value = at->second;
    return cudaSuccess;
  }
  const cudaError_t status = find(value);
  if (status == cudaSuccess) known.emplace(key, *value);
  return status;
}

}  // namespace

cudaError_t current_device(DeviceLimits* limits) {
  thread_local std::map<int, DeviceLimits> known;
  int device = 0;
  const cudaError_t found = cudaGetDevice(&device);
  if (found != cudaSuccess) return found;
  return remember(known, device, limits,
                  [&](DeviceLimits* asked) { return ask_device(device, asked); });
}

cudaError_t set_up_kernel(const void* kernel, int shared_bytes, bool* overlaps) {
  thread_local std::map<std::pair<int, const void*>, bool> known;
  int device = 0;
  const cudaError_t found = cudaGetDevice(&device);
  if (found != cudaSuccess) return found;
  return remember(known, {device, kernel}, overlaps,
                  [&](bool* told) { return tell_kernel(kernel, shared_bytes, told); });
}

}  // namespace jax_marlin
