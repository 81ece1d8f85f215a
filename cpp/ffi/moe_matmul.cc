// FFI handler of moe_matmul: routed rows times the experts of a stack, in one GEMM launch.

#include "handlers.h"
#include "routing_operands.h"
#include "stack_operands.h"

namespace jax_marlin {
namespace {

constexpr char kOp[] = "jax_marlin_moe_matmul_v1";

// Each routed row in its expert's act-order; afterwards slot id s reads gathered[s].
cudaError_t gather(GemmParams& p, const ffi::AnyBuffer& perm, ffi::AnyBuffer& gathered,
                   cudaStream_t stream) {
  GatherParams g = {};
  g.x = static_cast<const uint16_t*>(p.x);
  g.perm = static_cast<const int*>(perm.untyped_data());
  g.sorted_token_ids = p.sorted_token_ids;
  g.expert_ids = p.expert_ids;
  g.num_tokens_past_padded = p.num_tokens_past_padded;
  g.gathered = static_cast<uint16_t*>(gathered.untyped_data());
  g.x_stride = p.x_stride;
  g.out_rows = p.out_rows;
  g.slots = p.slots;
  g.k = p.k;
  g.num_experts = p.num_experts;
  g.moe_block_size = p.moe_block_size;
  g.row_divisor = p.row_divisor;
  p.x = g.gathered;
  p.row_divisor = 1;
  return launch_gather(g, Order::kAfter, stream);
}

ffi::Error moe_matmul(cudaStream_t stream, ffi::AnyBuffer x, ffi::AnyBuffer qweight,
                      ffi::AnyBuffer scales, ffi::AnyBuffer zero_points, ffi::AnyBuffer perm,
                      ffi::AnyBuffer bias, ffi::AnyBuffer sorted_token_ids,
                      ffi::AnyBuffer expert_ids, ffi::AnyBuffer num_tokens_past_padded,
                      ffi::AnyBuffer topk_weights, ffi::Result<ffi::AnyBuffer> out,
                      ffi::Result<ffi::AnyBuffer> scratch, ffi::Result<ffi::AnyBuffer> gathered,
                      int64_t bits, int64_t k, int64_t group_size, int64_t moe_block_size,
                      int64_t top_k, int64_t weights_before_bias, int64_t zero_output) {
  const StackOperands stack = {x, qweight, scales, zero_points, bits, k, group_size};
  const RoutingOperands routing = {sorted_token_ids, expert_ids,     num_tokens_past_padded,
                                   topk_weights,     moe_block_size, top_k};
  BufferChecks checks(kOp);
  stack.check(checks, *out);
  if (!checks.ok()) return checks.error();
  GemmParams params = stack.params(*out);
  routing.check(checks, params.out_rows, x.dimensions()[0]);
  checks.expect_optional(bias, "bias", x.element_type(), {params.num_experts, params.n})
      .expect_optional(perm, "perm", ffi::S32, {params.num_experts, k})
      .require((params.n + kTile - 1) / kTile == params.stack_n_tiles, "out",
               "not of the stack's columns");
  if (perm.element_count() != 0) {
    checks.expect(*gathered, "gathered", x.element_type(), {params.out_rows, params.x_stride})
        .require(is_countable(*gathered), "gathered", kTooMany);
  }
  if (!checks.ok()) return checks.error();
  if (out->element_count() == 0) return ffi::Error::Success();

  routing.fill(params);
  params.bias = optional_data<const void>(bias);
  params.bias_stride = params.n;
  params.weights_before_bias = weights_before_bias != 0;

  const GemmProblem problem = {params.slots,    params.moe_block_size,  params.k,
                               params.n,        static_cast<int>(bits), false,
                               params.out_rows, params.num_experts};
  GemmLaunch gemm = {params, {}, stack.element(), problem.bits, scratch->untyped_data()};
  cudaError_t status = plan_gemm(gemm, problem);
  if (status != cudaSuccess) return cuda_status(kOp, status);
  checks.require_scratch(*scratch, scratch_bytes(gemm.choice));
  if (!checks.ok()) return checks.error();

  if (perm.element_count() != 0) status = gather(gemm.params, perm, *gathered, stream);
  // Rows that no used slot names are zero by contract, and results hold arbitrary bytes.
  const int64_t out_bytes = zero_output != 0 ? static_cast<int64_t>(out->size_bytes()) : 0;
  if (status == cudaSuccess) status = launch_cleared_gemm(gemm, out_bytes, stream);
  return cuda_status(kOp, status);
}

}  // namespace
}  // namespace jax_marlin

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    jax_marlin_moe_matmul_v1, jax_marlin::moe_matmul,
    xla::ffi::Ffi::Bind()
        .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
        .Arg<xla::ffi::AnyBuffer>()  // x [T, >= K]
        .Arg<xla::ffi::AnyBuffer>()  // qweight [E, n_tiles, k_tiles, words]
        .Arg<xla::ffi::AnyBuffer>()  // scales [E, n_tiles, G, 64]
        .Arg<xla::ffi::AnyBuffer>()  // zero_points, or empty
        .Arg<xla::ffi::AnyBuffer>()  // perm [E, K], or empty
        .Arg<xla::ffi::AnyBuffer>()  // bias [E, N], or empty
        .Arg<xla::ffi::AnyBuffer>()  // sorted_token_ids [L]
        .Arg<xla::ffi::AnyBuffer>()  // expert_ids [B]
        .Arg<xla::ffi::AnyBuffer>()  // num_tokens_past_padded [1]
        .Arg<xla::ffi::AnyBuffer>()  // topk_weights [R], or empty
        .Ret<xla::ffi::AnyBuffer>()  // out [R, N]
        .Ret<xla::ffi::AnyBuffer>()  // scratch
        .Ret<xla::ffi::AnyBuffer>()  // gathered [R, >= K], or empty
        .Attr<int64_t>("bits")
        .Attr<int64_t>("k")
        .Attr<int64_t>("group_size")
        .Attr<int64_t>("moe_block_size")
        .Attr<int64_t>("top_k")
        .Attr<int64_t>("weights_before_bias")
        .Attr<int64_t>("zero_output"),
    {xla::ffi::Traits::kCmdBufferCompatible});
