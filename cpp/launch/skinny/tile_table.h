// Every tile the skinny kernel is built for.
#pragma once

#include "../../kernel/skinny_tile.h"

namespace jax_marlin {

// {rows, warps, depth}
constexpr SkinnyTile kSkinnyTable[] = {
    {8, 16, 2},
    // Sums and products of 16 rows take the registers of twice the warps.
    {16, 8, 4},
};
constexpr int kNumSkinnyTiles = sizeof(kSkinnyTable) / sizeof(kSkinnyTable[0]);

}  // namespace jax_marlin
