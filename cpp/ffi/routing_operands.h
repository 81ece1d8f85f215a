// What products over routing tables share: the tables, decoded into GemmParams.
#pragma once

#include "../launch/launch_gemm.h"
#include "buffer_checks.h"

namespace jax_marlin {

struct RoutingOperands {
  ffi::AnyBuffer sorted_token_ids, expert_ids, num_tokens_past_padded, topk_weights;
  int64_t moe_block_size, top_k;

  void check(BufferChecks& checks, int64_t out_rows, int64_t x_rows) const {
    const bool positive = moe_block_size > 0 && moe_block_size <= INT32_MAX && top_k > 0;
    checks.require(positive, "moe_block_size or top_k", "not positive")
        .expect(sorted_token_ids, "sorted_token_ids", ffi::S32, {kAny});
    if (!checks.ok()) return;
    const int64_t slots = sorted_token_ids.dimensions()[0];
    checks.require(slots <= INT32_MAX, "sorted_token_ids", "longer than int32 can index")
        .expect(expert_ids, "expert_ids", ffi::S32, {(slots + moe_block_size - 1) / moe_block_size})
        .expect(num_tokens_past_padded, "num_tokens_past_padded", ffi::S32, {1})
        .expect_optional(topk_weights, "topk_weights", ffi::F32, {out_rows})
        .require(out_rows == x_rows * top_k && out_rows <= INT32_MAX, "out",
                 "not of x's rows times top_k");
  }

  void fill(GemmParams& p) const {
    p.sorted_token_ids = static_cast<const int*>(sorted_token_ids.untyped_data());
    p.expert_ids = static_cast<const int*>(expert_ids.untyped_data());
    p.num_tokens_past_padded = static_cast<const int*>(num_tokens_past_padded.untyped_data());
    p.topk_weights = optional_data<const float>(topk_weights);
    p.slots = static_cast<int>(sorted_token_ids.dimensions()[0]);
    p.moe_block_size = static_cast<int>(moe_block_size);
    p.row_divisor = static_cast<int>(top_k);
  }
};

}  // namespace jax_marlin
