// Tensor maps: what the copy engine must know of a matrix to copy boxes of it.
#pragma once

#include "../launch_gemm.h"

namespace jax_marlin {

// 16-bit elements in rows; addresses and strides are multiples of 16 bytes.
struct RowMatrix {
  const void* begin;
  int64_t rows;
  int columns;
  int64_t stride;  // elements from row to row
};

// Whether the driver can encode tensor maps.
bool can_encode_boxes();

// Boxes of `box_rows` rows by 64 columns, swizzled as wgmma reads them (ptx_wgmma.cuh).
cudaError_t encode_boxes(TensorMap* map, const RowMatrix& matrix, ElementType element,
                         int box_rows);

}  // namespace jax_marlin
