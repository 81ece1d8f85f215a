// FFI handler of matmul: dense rows times one expert of a stack.

#include "handlers.h"
#include "stack_operands.h"

namespace jax_marlin {
namespace {

constexpr char kOp[] = "jax_marlin_matmul_v1";

ffi::Error matmul(cudaStream_t stream, ffi::AnyBuffer x, ffi::AnyBuffer qweight,
                  ffi::AnyBuffer scales, ffi::AnyBuffer zero_points, ffi::AnyBuffer bias,
                  ffi::AnyBuffer expert, ffi::Result<ffi::AnyBuffer> out,
                  ffi::Result<ffi::AnyBuffer> scratch, int64_t bits, int64_t k, int64_t group_size,
                  int64_t first_tile) {
  const StackOperands stack = {x, qweight, scales, zero_points, bits, k, group_size};
  BufferChecks checks(kOp);
  stack.check(checks, *out);
  if (!checks.ok()) return checks.error();
  GemmParams params = stack.params(*out);
  const bool own_bias = bias.dimensions().size() == 1;
  if (own_bias) {
    checks.expect_optional(bias, "bias", x.element_type(), {params.n});
  } else {
    checks.expect(bias, "bias", x.element_type(), {params.num_experts, kAny});
    if (!checks.ok()) return checks.error();
    checks.require(bias.dimensions()[1] >= first_tile * kTile + params.n, "bias", "too narrow");
  }
  checks.expect(expert, "expert", ffi::S32, {})
      .require(x.dimensions()[0] == params.out_rows, "out", "not of as many rows as x")
      .require(
          first_tile >= 0 && first_tile + (params.n + kTile - 1) / kTile <= params.stack_n_tiles,
          "first_tile", "past the columns of the stack");
  if (!checks.ok()) return checks.error();
  if (out->element_count() == 0) return ffi::Error::Success();

  params.first_tile = static_cast<int>(first_tile);
  // Of a single expert the kernel need not ask: its first loads wait for the answer.
  if (params.num_experts > 1) params.expert = static_cast<const int*>(expert.untyped_data());
  params.bias = optional_data<const void>(bias);
  params.bias_stride = own_bias ? 0 : bias.dimensions()[1];

  const GemmProblem problem = {params.out_rows, 0, params.k, params.n, static_cast<int>(bits)};
  GemmLaunch gemm = {params, {}, stack.element(), problem.bits, scratch->untyped_data()};
  cudaError_t status = plan_gemm(gemm, problem);
  if (status != cudaSuccess) return cuda_status(kOp, status);
  checks.require_scratch(*scratch, scratch_bytes(gemm.choice));
  if (!checks.ok()) return checks.error();
  return cuda_status(kOp, launch_cleared_gemm(gemm, 0, stream));
}

}  // namespace
}  // namespace jax_marlin

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    jax_marlin_matmul_v1, jax_marlin::matmul,
    xla::ffi::Ffi::Bind()
        .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
        .Arg<xla::ffi::AnyBuffer>()  // x [M, >= K]
        .Arg<xla::ffi::AnyBuffer>()  // qweight [E, n_tiles, k_tiles, words]
        .Arg<xla::ffi::AnyBuffer>()  // scales [E, n_tiles, G, 64]
        .Arg<xla::ffi::AnyBuffer>()  // zero_points, or empty
        .Arg<xla::ffi::AnyBuffer>()  // bias [E, N] or [n], or empty
        .Arg<xla::ffi::AnyBuffer>()  // expert []
        .Ret<xla::ffi::AnyBuffer>()  // out [M, n]
        .Ret<xla::ffi::AnyBuffer>()  // scratch
        .Attr<int64_t>("bits")
        .Attr<int64_t>("k")
        .Attr<int64_t>("group_size")
        .Attr<int64_t>("first_tile"),
    {xla::ffi::Traits::kCmdBufferCompatible});
