// Shapes and rows are checked here, so that no caller makes a packer read or write past an array.

#include "packers.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>

#include <optional>

#include "../host/pack_tiles.h"
#include "../kernel/tile_config.h"

namespace nb = nanobind;

namespace jax_marlin {
namespace {

using WordArray = nb::ndarray<const uint32_t, nb::ndim<2>, nb::device::cpu>;
using OrderArray = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using TileArray = nb::ndarray<uint32_t, nb::ndim<3>, nb::device::cpu>;

Words words_of(const WordArray& words) { return {words.data(), words.stride(0), words.stride(1)}; }

PackedTiles tiles_of(const TileArray& out) {
  return {out.data(), static_cast<int64_t>(out.shape(0)), static_cast<int64_t>(out.shape(1)),
          out.stride(0), out.stride(1)};
}

void require(bool holds, const char* what) {
  if (!holds) throw nb::value_error(what);
}

void require_tiles(const TileArray& out, int64_t k, int64_t n, int bits) {
  require(bits == 4 || bits == 8, "bits is neither 4 nor 8");
  const int64_t words = int64_t{kTile} * kTile * bits / 32;
  require(static_cast<int64_t>(out.shape(0)) * kTile == n &&
              static_cast<int64_t>(out.shape(1)) * kTile == k,
          "out has not one tile for each 64 x 64 codes of words");
  require(static_cast<int64_t>(out.shape(2)) == words && out.stride(2) == 1,
          "out has no tiles of 64 x 64 codes, each contiguous");
}

void pack_words_into(const WordArray& words, const std::optional<OrderArray>& order, int bits,
                     const TileArray& out) {
  const int64_t k = bits == 0 ? 0 : static_cast<int64_t>(words.shape(0)) * 32 / bits;
  require_tiles(out, k, static_cast<int64_t>(words.shape(1)), bits);
  if (order) {
    require(words.stride(1) == 1, "words in another order must be contiguous along N");
    require(static_cast<int64_t>(order->shape(0)) == k, "order is not as long as K");
    for (int64_t i = 0; i < k; ++i) {
      require(order->data()[i] >= 0 && order->data()[i] < k,
              "order names a row outside 0 .. K - 1");
    }
  }
  const nb::gil_scoped_release threads;
  pack_words(words_of(words), order ? order->data() : nullptr, bits, tiles_of(out));
}

void pack_awq_words_into(const WordArray& words, const TileArray& out) {
  require_tiles(out, static_cast<int64_t>(words.shape(0)), static_cast<int64_t>(words.shape(1)) * 8,
                4);
  const nb::gil_scoped_release threads;
  pack_awq_words(words_of(words), tiles_of(out));
}

}  // namespace

void bind_packers(nb::module_& m) {
  m.def("pack_words", &pack_words_into, nb::arg("words"), nb::arg("order").none(), nb::arg("bits"),
        nb::arg("out").noconvert(),
        "uint32 [K / P, N], rows of codes perhaps in another order, to tiles.");
  m.def("pack_awq_words", &pack_awq_words_into, nb::arg("words"), nb::arg("out").noconvert(),
        "AWQ's uint32 [K, N / 8] to tiles.");
}

}  // namespace jax_marlin
