// The FFI handlers of this library, one an op.
#pragma once

#include "xla/ffi/api/c_api.h"

extern "C" XLA_FFI_Error* jax_marlin_matmul_v1(XLA_FFI_CallFrame* call_frame);
extern "C" XLA_FFI_Error* jax_marlin_moe_matmul_v1(XLA_FFI_CallFrame* call_frame);
extern "C" XLA_FFI_Error* jax_marlin_transposed_product_v1(XLA_FFI_CallFrame* call_frame);
extern "C" XLA_FFI_Error* jax_marlin_moe_align_block_size_v1(XLA_FFI_CallFrame* call_frame);
extern "C" XLA_FFI_Error* jax_marlin_moe_ffn_v1(XLA_FFI_CallFrame* call_frame);
