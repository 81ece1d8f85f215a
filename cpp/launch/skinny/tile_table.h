// Every tile the skinny kernel is built for.
#pragma once

#include "../../kernel/skinny_tile.h"

namespace jax_marlin {

// {rows, warps, depth}
constexpr SkinnyTile kSkinnyTable[] = {
    {8, 16, 2},
    {16, 16, 2},
    // Sums of 32 rows take the registers of twice the warps.
    {32, 8, 2},
};
constexpr int kNumSkinnyTiles = sizeof(kSkinnyTable) / sizeof(kSkinnyTable[0]);

}  // namespace jax_marlin
