// FFI handler of moe_ffn: a whole mixture-of-experts layer in one call.

#include "../launch/device_setup.h"
#include "../launch/launch_moe_ffn.h"
#include "handlers.h"
#include "stack_operands.h"

namespace jax_marlin {
namespace {

constexpr char kOp[] = "jax_marlin_moe_ffn_v1";

// A stack's leaves beyond those of every product, and where its act-ordered rows go.
struct LayerStack {
  StackOperands leaves;
  ffi::AnyBuffer perm, bias, gathered;

  // columns: of a weight, twice those of `out` when gated.
  void check(BufferChecks& checks, const ffi::AnyBuffer& out, int64_t columns,
             int64_t routes) const {
    leaves.check(checks, out);
    if (!checks.ok()) return;
    const int64_t experts = leaves.qweight.dimensions()[0];
    checks.expect_optional(bias, "bias", leaves.x.element_type(), {experts, columns})
        .expect_optional(perm, "perm", ffi::S32, {experts, leaves.k})
        .require((columns + kTile - 1) / kTile == leaves.qweight.dimensions()[1], "qweight",
                 "not of as many columns as the layer");
    if (perm.element_count() != 0) {
      checks
          .expect(gathered, "gathered rows", leaves.x.element_type(),
                  {routes, leaves.x.dimensions()[1]})
          .require(is_countable(gathered), "gathered rows", kTooMany);
    }
  }

  GemmLaunch launch(const ffi::AnyBuffer& out, int64_t columns, void* scratch) const {
    GemmLaunch gemm = {};
    gemm.params = leaves.params(out);
    gemm.params.bias = optional_data<const void>(bias);
    gemm.params.bias_stride = columns;
    gemm.element = leaves.element();
    gemm.bits = static_cast<int>(leaves.bits);
    gemm.scratch = scratch;
    return gemm;
  }
};

struct RoutingTables {
  ffi::AnyBuffer topk_ids, topk_weights, sorted_token_ids, expert_ids, num_tokens_past_padded;
  int64_t moe_block_size;

  void check(BufferChecks& checks, int64_t tokens) const {
    checks
        .require(moe_block_size > 0 && moe_block_size <= INT32_MAX, "moe_block_size",
                 "not positive")
        .expect(topk_ids, "topk_ids", ffi::S32, {tokens, kAny})
        .expect(sorted_token_ids, "sorted_token_ids", ffi::S32, {kAny})
        .expect(num_tokens_past_padded, "num_tokens_past_padded", ffi::S32, {1});
    if (!checks.ok()) return;
    const int64_t routes = topk_ids.element_count(), slots = sorted_token_ids.element_count();
    checks.expect(topk_weights, "topk_weights", ffi::F32, {tokens, topk_ids.dimensions()[1]})
        .require(routes > 0 && slots <= INT32_MAX, "topk_ids", "empty, or more than int32 counts")
        .expect(expert_ids, "expert_ids", ffi::S32,
                {(slots + moe_block_size - 1) / moe_block_size});
  }

  // num_experts: of the stacks. Tables must hold each expert's rows padded to whole blocks.
  AlignParams params(BufferChecks& checks, int64_t num_experts) const {
    const int64_t routes = topk_ids.element_count(), slots = sorted_token_ids.element_count();
    const int64_t needed = routes + std::min(routes, num_experts) * (moe_block_size - 1);
    checks.require(slots >= needed, "sorted_token_ids", "shorter than " + std::to_string(needed))
        .require(num_experts <= kMaxAlignExperts, "qweight",
                 "of more experts than " + std::to_string(kMaxAlignExperts));
    AlignParams p = {};
    p.topk_ids = static_cast<const int*>(topk_ids.untyped_data());
    p.sorted_token_ids = static_cast<int*>(sorted_token_ids.untyped_data());
    p.expert_ids = static_cast<int*>(expert_ids.untyped_data());
    p.num_tokens_past_padded = static_cast<int*>(num_tokens_past_padded.untyped_data());
    p.routes = static_cast<int>(routes);
    p.slots = static_cast<int>(slots);
    p.blocks = static_cast<int>(expert_ids.element_count());
    p.num_experts = static_cast<int>(num_experts);
    p.moe_block_size = static_cast<int>(moe_block_size);
    return p;
  }
};

ffi::Error moe_ffn(
    cudaStream_t stream, ffi::AnyBuffer x, ffi::AnyBuffer topk_ids, ffi::AnyBuffer topk_weights,
    ffi::AnyBuffer gate_up_qweight, ffi::AnyBuffer gate_up_scales,
    ffi::AnyBuffer gate_up_zero_points, ffi::AnyBuffer gate_up_perm, ffi::AnyBuffer gate_up_bias,
    ffi::AnyBuffer down_qweight, ffi::AnyBuffer down_scales, ffi::AnyBuffer down_zero_points,
    ffi::AnyBuffer down_perm, ffi::AnyBuffer down_bias, ffi::Result<ffi::AnyBuffer> out,
    ffi::Result<ffi::AnyBuffer> hidden, ffi::Result<ffi::AnyBuffer> rows,
    ffi::Result<ffi::AnyBuffer> gathered_x, ffi::Result<ffi::AnyBuffer> gathered_hidden,
    ffi::Result<ffi::AnyBuffer> sorted_token_ids, ffi::Result<ffi::AnyBuffer> expert_ids,
    ffi::Result<ffi::AnyBuffer> num_tokens_past_padded, ffi::Result<ffi::AnyBuffer> scratch,
    int64_t gate_up_bits, int64_t gate_up_group_size, int64_t down_bits, int64_t down_group_size,
    int64_t k, int64_t intermediate, int64_t moe_block_size, int64_t activation,
    int64_t weights_on_input) {
  BufferChecks checks(kOp);
  checks.expect(x, "x", x.element_type(), {kAny, kAny})
      .require(activation > 0 && activation <= static_cast<int64_t>(Activation::kSwigluClamped),
               "activation", std::to_string(activation))
      .require(intermediate > 0 && intermediate % kFragment == 0, "intermediate",
               "not a multiple of 16");
  if (!checks.ok()) return checks.error();
  const int64_t tokens = x.dimensions()[0];
  const RoutingTables routing = {
      topk_ids,      topk_weights, *sorted_token_ids, *expert_ids, *num_tokens_past_padded,
      moe_block_size};
  routing.check(checks, tokens);
  if (!checks.ok()) return checks.error();
  const int64_t top_k = topk_ids.dimensions()[1], routes = tokens * top_k;

  const LayerStack gate_up = {{x, gate_up_qweight, gate_up_scales, gate_up_zero_points,
                               gate_up_bits, k, gate_up_group_size},
                              gate_up_perm,
                              gate_up_bias,
                              *gathered_x};
  const LayerStack down = {{*hidden, down_qweight, down_scales, down_zero_points, down_bits,
                            intermediate, down_group_size},
                           down_perm,
                           down_bias,
                           *gathered_hidden};
  checks.expect(*hidden, "hidden", x.element_type(), {kAny, intermediate})
      .expect(*out, "out", x.element_type(), {tokens, kAny});
  if (!checks.ok()) return checks.error();
  const int64_t columns = out->dimensions()[1];
  gate_up.check(checks, *hidden, 2 * intermediate, routes);
  down.check(checks, *rows, columns, routes);
  const bool wide_rows = rows->element_type() == ffi::F32;
  checks.expect(*rows, "rows", wide_rows ? ffi::F32 : x.element_type(), {kAny, columns});
  if (!checks.ok()) return checks.error();
  checks.require(hidden->dimensions()[0] >= routes, "hidden", "of fewer rows than routes")
      .require(rows->dimensions()[0] >= routes, "rows", "of fewer rows than routes");
  checks.require(down_qweight.dimensions()[0] == gate_up_qweight.dimensions()[0], "down_qweight",
                 "not of as many experts as gate_up_qweight");

  MoeFfnLaunch layer = {};
  layer.gate_up = gate_up.launch(*hidden, 2 * intermediate, nullptr);
  layer.down = down.launch(*rows, columns, scratch->untyped_data());
  layer.align = routing.params(checks, gate_up_qweight.dimensions()[0]);
  if (!checks.ok()) return checks.error();
  layer.gate_up.params.activation = static_cast<Activation>(activation);
  layer.gate_up.params.row_divisor = static_cast<int>(top_k);
  // (w x) W + b = w (x W) + b: on the input, the weight comes before the bias.
  GemmParams& weighted = weights_on_input != 0 ? layer.gate_up.params : layer.down.params;
  weighted.topk_weights = static_cast<const float*>(topk_weights.untyped_data());
  weighted.weights_before_bias = weights_on_input != 0;
  layer.combine = {rows->untyped_data(),
                   layer.align.topk_ids,
                   out->untyped_data(),
                   tokens,
                   columns,
                   static_cast<int>(columns),
                   static_cast<int>(top_k),
                   layer.align.num_experts,
                   wide_rows};
  layer.gate_up_perm = optional_data<const int>(gate_up_perm);
  layer.down_perm = optional_data<const int>(down_perm);
  layer.gathered_x = gathered_x->untyped_data();
  layer.gathered_hidden = gathered_hidden->untyped_data();
  layer.hidden_rows = hidden->dimensions()[0];
  layer.rows_bytes = static_cast<int64_t>(rows->size_bytes());

  DeviceLimits device = {};
  const cudaError_t found = current_device(&device);
  if (found != cudaSuccess) return cuda_status(kOp, found);
  plan_moe_ffn(layer, device);
  checks.require_scratch(*scratch, scratch_bytes(layer.down.choice));
  if (!checks.ok()) return checks.error();
  return cuda_status(kOp, launch_moe_ffn(layer, stream));
}

}  // namespace
}  // namespace jax_marlin

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    jax_marlin_moe_ffn_v1, jax_marlin::moe_ffn,
    xla::ffi::Ffi::Bind()
        .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
        .Arg<xla::ffi::AnyBuffer>()  // x [T, >= H]
        .Arg<xla::ffi::AnyBuffer>()  // topk_ids [T, top_k]
        .Arg<xla::ffi::AnyBuffer>()  // topk_weights [T, top_k]
        .Arg<xla::ffi::AnyBuffer>()  // gate_up: qweight [E, n_tiles, k_tiles, words]
        .Arg<xla::ffi::AnyBuffer>()  //   scales [E, n_tiles, G, 64]
        .Arg<xla::ffi::AnyBuffer>()  //   zero_points, or empty
        .Arg<xla::ffi::AnyBuffer>()  //   perm [E, H], or empty
        .Arg<xla::ffi::AnyBuffer>()  //   bias [E, 2 I], or empty
        .Arg<xla::ffi::AnyBuffer>()  // down: the same, I to N
        .Arg<xla::ffi::AnyBuffer>()
        .Arg<xla::ffi::AnyBuffer>()
        .Arg<xla::ffi::AnyBuffer>()
        .Arg<xla::ffi::AnyBuffer>()
        .Ret<xla::ffi::AnyBuffer>()  // out [T, N]
        .Ret<xla::ffi::AnyBuffer>()  // hidden [T * top_k, I], or as many rows as slots
        .Ret<xla::ffi::AnyBuffer>()  // rows [>= T * top_k, N], float32 or of the type of x
        .Ret<xla::ffi::AnyBuffer>()  // gathered x [T * top_k, >= H], or empty
        .Ret<xla::ffi::AnyBuffer>()  // gathered hidden [T * top_k, I], or empty
        .Ret<xla::ffi::AnyBuffer>()  // sorted_token_ids [L]
        .Ret<xla::ffi::AnyBuffer>()  // expert_ids [B]
        .Ret<xla::ffi::AnyBuffer>()  // num_tokens_past_padded [1]
        .Ret<xla::ffi::AnyBuffer>()  // scratch
        .Attr<int64_t>("gate_up_bits")
        .Attr<int64_t>("gate_up_group_size")
        .Attr<int64_t>("down_bits")
        .Attr<int64_t>("down_group_size")
        .Attr<int64_t>("k")
        .Attr<int64_t>("intermediate")
        .Attr<int64_t>("moe_block_size")
        .Attr<int64_t>("activation")
        .Attr<int64_t>("weights_on_input"),
    {xla::ffi::Traits::kCmdBufferCompatible});
