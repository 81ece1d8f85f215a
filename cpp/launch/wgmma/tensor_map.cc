// Only the driver encodes tensor maps; it is asked for by name, so that nothing links with it.

#include "tensor_map.h"

#include <cuda.h>

#include "../../kernel/tile_config.h"

namespace jax_marlin {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);
static_assert(sizeof(TensorMap) == sizeof(CUtensorMap) && alignof(TensorMap) >= 64);

Encode find_encode() {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
  const cudaError_t status = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found,
                                                              12000, cudaEnableDefault, &result);
#else
  const cudaError_t status =
      cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result);
#endif
  return status == cudaSuccess && result == cudaDriverEntryPointSuccess
             ? reinterpret_cast<Encode>(found)
             : nullptr;
}

Encode encode() {
  static const Encode found = find_encode();
  return found;
}

}  // namespace

bool can_encode_boxes() { return encode() != nullptr; }

cudaError_t encode_boxes(TensorMap* map, const RowMatrix& matrix, ElementType element,
                         int box_rows) {
  if (encode() == nullptr) return cudaErrorNotSupported;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(matrix.columns),
                              static_cast<cuuint64_t>(matrix.rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(matrix.stride) * 2};  // bytes, of rows
  const cuuint32_t box[] = {kTile, static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[] = {1, 1};
  const CUresult status =
      encode()(reinterpret_cast<CUtensorMap*>(map),
               element == ElementType::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
               2, const_cast<void*>(matrix.begin), sizes, strides, box, steps,
               CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
               CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return status == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace jax_marlin
