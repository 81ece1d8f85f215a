// The packers for Python: arrays are checked, then packed without the interpreter's lock.
#pragma once

#include <nanobind/nanobind.h>

namespace jax_marlin {

void bind_packers(nanobind::module_& m);

}  // namespace jax_marlin
