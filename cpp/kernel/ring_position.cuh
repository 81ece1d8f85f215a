// Where a reader or writer of a ring of stages stands, and the parity of the barrier it waits for.
#pragma once

namespace jax_marlin {

template <int slots>
struct RingPosition {
  int slot = 0, parity = 0;
  __device__ __forceinline__ void advance() {
    if (++slot == slots) {
      slot = 0;
      parity ^= 1;
    }
  }
};

}  // namespace jax_marlin
