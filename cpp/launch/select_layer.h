// Which kernels a MoE layer takes, and how they follow each other: a pure function of static sizes.
#pragma once

#include "select_tile.h"

namespace jax_marlin {

struct LayerProblem {
  int64_t tokens;
  int top_k, num_experts;
  int hidden, intermediate, columns;  // gate_up is [hidden, 2 intermediate], down ends in columns
  int gate_up_bits, down_bits;
  bool down_gathers;  // rows of its own between the two products: act-order that is not folded
  int64_t slots;  // of routing tables, where there are any
  int moe_block_size;
  bool room_for_x, room_for_hidden;  // in the order of slots
};

struct LayerChoice {
  bool tables;  // routes sorted by expert, else each of gate_up's routes is a block
  bool sums_routes;  // down's blocks sum a token's routes; no launch for the sum
  bool down_fits_beside;  // gate_up leaves room for down's blocks, which start before it ends
  TileChoice gate_up, down;
};

LayerChoice select_layer(const LayerProblem& layer, const DeviceLimits& device);

}  // namespace jax_marlin
