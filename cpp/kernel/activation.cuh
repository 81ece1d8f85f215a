// The activations of a gated expert, in float32: gate and up to one value.
#pragma once

#include "params.h"

namespace jax_marlin {

// Far below zero the divisor passes 2^126 and the quotient is 0, within 2^-126 of the truth.
__device__ __forceinline__ float sigmoid(float v) { return __fdividef(1.f, 1.f + __expf(-v)); }

__device__ __forceinline__ float activate(Activation activation, float gate, float up) {
  switch (activation) {
    case Activation::kSilu:
      return gate * sigmoid(gate) * up;
    case Activation::kGelu:
      return 0.5f * gate * erfcf(gate * -0.70710678f) * up;  // 1 + erf would cancel below zero
    case Activation::kGeluTanh: {
      // 0.5 (1 + tanh(v)) = sigmoid(2 v), v = sqrt(2 / pi) (gate + 0.044715 gate^3)
      const float v = 0.79788456f * (gate + 0.044715f * gate * gate * gate);
      return gate * sigmoid(2.f * v) * up;
    }
    case Activation::kSwigluClamped:  // gpt-oss; comparisons, since fminf would drop a NaN
      gate = gate > 7.f ? 7.f : gate;
      up = up > 7.f ? 7.f : up < -7.f ? -7.f : up;
      return gate * sigmoid(1.702f * gate) * (up + 1.f);
    default:
      return gate;
  }
}

}  // namespace jax_marlin
