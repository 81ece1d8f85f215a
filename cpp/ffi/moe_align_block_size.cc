// FFI handler of moe_align_block_size: routing tables in one launch.

#include "../launch/launch_gemm.h"
#include "buffer_checks.h"
#include "handlers.h"

namespace jax_marlin {
namespace {

constexpr char kOp[] = "jax_marlin_moe_align_block_size_v1";

ffi::Error moe_align_block_size(cudaStream_t stream, ffi::AnyBuffer topk_ids,
                                ffi::AnyBuffer expert_map,
                                ffi::Result<ffi::AnyBuffer> sorted_token_ids,
                                ffi::Result<ffi::AnyBuffer> expert_ids,
                                ffi::Result<ffi::AnyBuffer> num_tokens_past_padded,
                                int64_t moe_block_size, int64_t num_experts) {
  BufferChecks checks(kOp);
  checks
      .require(moe_block_size > 0 && moe_block_size <= INT32_MAX, "moe_block_size", "not positive")
      .require(num_experts > 0 && num_experts <= kMaxAlignExperts, "num_experts",
               "not in 1 .. " + std::to_string(kMaxAlignExperts));
  if (!checks.ok()) return checks.error();
  const int64_t routes = static_cast<int64_t>(topk_ids.element_count());
  const int64_t slots =
      routes + (routes < num_experts ? routes : num_experts) * (moe_block_size - 1);
  checks.expect(topk_ids, "topk_ids", ffi::S32, {kAny, kAny})
      .expect_optional(expert_map, "expert_map", ffi::S32, {num_experts})
      .require(slots <= INT32_MAX, "sorted_token_ids", "longer than int32 can index")
      .expect(*sorted_token_ids, "sorted_token_ids", ffi::S32, {slots})
      .expect(*expert_ids, "expert_ids", ffi::S32, {(slots + moe_block_size - 1) / moe_block_size})
      .expect(*num_tokens_past_padded, "num_tokens_past_padded", ffi::S32, {1});
  if (!checks.ok()) return checks.error();

  AlignParams params = {};
  params.topk_ids = static_cast<const int*>(topk_ids.untyped_data());
  params.expert_map = optional_data<const int>(expert_map);
  params.sorted_token_ids = static_cast<int*>(sorted_token_ids->untyped_data());
  params.expert_ids = static_cast<int*>(expert_ids->untyped_data());
  params.num_tokens_past_padded = static_cast<int*>(num_tokens_past_padded->untyped_data());
  params.routes = static_cast<int>(routes);
  params.slots = static_cast<int>(slots);
  params.blocks = static_cast<int>(expert_ids->element_count());
  params.num_experts = static_cast<int>(num_experts);
  params.moe_block_size = static_cast<int>(moe_block_size);
  return cuda_status(kOp, launch_align(params, stream));
}

}  // namespace
}  // namespace jax_marlin

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_marlin_moe_align_block_size_v1, jax_marlin::moe_align_block_size,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<xla::ffi::AnyBuffer>()  // topk_ids [T, top_k]
                                  .Arg<xla::ffi::AnyBuffer>()  // expert_map [E], or empty
                                  .Ret<xla::ffi::AnyBuffer>()  // sorted_token_ids [L]
                                  .Ret<xla::ffi::AnyBuffer>()  // expert_ids [B]
                                  .Ret<xla::ffi::AnyBuffer>()  // num_tokens_past_padded [1]
                                  .Attr<int64_t>("moe_block_size")
                                  .Attr<int64_t>("num_experts"),
                              {xla::ffi::Traits::kCmdBufferCompatible});
