// FFI handler of transposed_product: routed rows times transposed experts, for gradients of x.

#include "handlers.h"
#include "routing_operands.h"
#include "stack_operands.h"

namespace jax_marlin {
namespace {

constexpr char kOp[] = "jax_marlin_transposed_product_v1";

ffi::Error transposed_product(cudaStream_t stream, ffi::AnyBuffer g, ffi::AnyBuffer qweight,
                              ffi::AnyBuffer scales, ffi::AnyBuffer zero_points,
                              ffi::AnyBuffer sorted_token_ids, ffi::AnyBuffer expert_ids,
                              ffi::AnyBuffer num_tokens_past_padded, ffi::AnyBuffer topk_weights,
                              ffi::Result<ffi::AnyBuffer> out, ffi::Result<ffi::AnyBuffer> scratch,
                              int64_t bits, int64_t k, int64_t n, int64_t group_size,
                              int64_t first_tile, int64_t moe_block_size) {
  const StackOperands stack = {g, qweight, scales, zero_points, bits, k, group_size};
  const RoutingOperands routing = {sorted_token_ids, expert_ids,     num_tokens_past_padded,
                                   topk_weights,     moe_block_size, 1};
  BufferChecks checks(kOp);
  stack.check_leaves(checks);
  if (!checks.ok()) return checks.error();
  checks
      .require(n > 0 && n <= g.dimensions()[1] && g.dimensions()[1] % 8 == 0, "g",
               "not at least n columns wide, and whole 16-byte vectors")
      .require(first_tile >= 0 && first_tile + ceil_div(n, kTile) <= qweight.dimensions()[1],
               "first_tile", "past the columns of the stack")
      .require(stack.is_result(*out) && out->dimensions()[1] == k, "out",
               "neither of g's dtype nor float32, or not of k columns");
  if (!checks.ok()) return checks.error();
  GemmParams params = stack.params(*out);
  routing.check(checks, params.out_rows, g.dimensions()[0]);
  if (!checks.ok()) return checks.error();
  if (out->element_count() == 0) return ffi::Error::Success();

  // The kernel sums along its k and writes its n columns: here the stack's N and K.
  params.k = static_cast<int>(n);
  params.k_tiles = static_cast<int>(ceil_div(n, kTile));
  params.first_tile = static_cast<int>(first_tile);
  routing.fill(params);

  // Used slots are whole blocks: a last one that is not is never used.
  params.slots = params.slots / params.moe_block_size * params.moe_block_size;
  GemmProblem problem = {params.slots, params.moe_block_size, params.k, params.n,
                         static_cast<int>(bits)};
  problem.transposed = true;
  GemmLaunch gemm = {params, {}, stack.element(), problem.bits, scratch->untyped_data()};
  cudaError_t status = plan_gemm(gemm, problem);
  if (status != cudaSuccess) return cuda_status(kOp, status);
  checks.require_scratch(*scratch, scratch_bytes(gemm.choice));
  if (!checks.ok()) return checks.error();
  // Rows that no used slot names are zero.
  return cuda_status(kOp,
                     launch_cleared_gemm(gemm, static_cast<int64_t>(out->size_bytes()), stream));
}

}  // namespace
}  // namespace jax_marlin

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    jax_marlin_transposed_product_v1, jax_marlin::transposed_product,
    xla::ffi::Ffi::Bind()
        .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
        .Arg<xla::ffi::AnyBuffer>()  // g [R, >= n]
        .Arg<xla::ffi::AnyBuffer>()  // qweight [E, n_tiles, k_tiles, words]
        .Arg<xla::ffi::AnyBuffer>()  // scales [E, n_tiles, G, 64]
        .Arg<xla::ffi::AnyBuffer>()  // zero_points, or empty
        .Arg<xla::ffi::AnyBuffer>()  // sorted_token_ids [L]
        .Arg<xla::ffi::AnyBuffer>()  // expert_ids [B]
        .Arg<xla::ffi::AnyBuffer>()  // num_tokens_past_padded [1]
        .Arg<xla::ffi::AnyBuffer>()  // topk_weights [R], or empty
        .Ret<xla::ffi::AnyBuffer>()  // out [R, K]
        .Ret<xla::ffi::AnyBuffer>()  // scratch
        .Attr<int64_t>("bits")
        .Attr<int64_t>("k")
        .Attr<int64_t>("n")
        .Attr<int64_t>("group_size")
        .Attr<int64_t>("first_tile")
        .Attr<int64_t>("moe_block_size"),
    {xla::ffi::Traits::kCmdBufferCompatible});
