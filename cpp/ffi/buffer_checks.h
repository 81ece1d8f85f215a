// Checks of XLA buffers that name the op, the buffer, what was got and what was expected.
//
// Python has checked the same at trace time with better words; these guard an exported program, or
// one built by hand, from reading out of bounds.
#pragma once

#include <cuda_runtime.h>

#include <initializer_list>
#include <string>

#include "xla/ffi/api/ffi.h"

namespace jax_marlin {

namespace ffi = xla::ffi;

constexpr int64_t kAny = -1;  // a dimension that may have any size

class BufferChecks {
 public:
  explicit BufferChecks(const char* op) : op_(op) {}

  // Shape and dtype of a buffer; the first failure is kept.
  template <class Buffer>
  BufferChecks& expect(const Buffer& buffer, const char* name, ffi::DataType dtype,
                       std::initializer_list<int64_t> shape) {
    const auto dims = buffer.dimensions();
    bool same = buffer.element_type() == dtype && dims.size() == shape.size();
    size_t i = 0;
    for (int64_t expected : shape) {
      same = same && (expected == kAny || dims[i] == expected);
      ++i;
    }
    if (!same)
      fail(name, describe(dims, buffer.element_type()) + ", expected " + describe(shape, dtype));
    return *this;
  }

  // The same for an operand that may be absent, which is an empty array.
  template <class Buffer>
  BufferChecks& expect_optional(const Buffer& buffer, const char* name, ffi::DataType dtype,
                                std::initializer_list<int64_t> shape) {
    return buffer.element_count() == 0 ? *this : expect(buffer, name, dtype, shape);
  }

  BufferChecks& require(bool condition, const char* name, const std::string& what) {
    if (!condition) fail(name, what);
    return *this;
  }

  template <class Buffer>
  BufferChecks& require_scratch(const Buffer& scratch, int64_t bytes) {
    return require(static_cast<int64_t>(scratch.size_bytes()) >= bytes, "scratch",
                   "smaller than " + std::to_string(bytes) + " bytes");
  }

  bool ok() const { return message_.empty(); }
  ffi::Error error() const { return ffi::Error::InvalidArgument(message_); }

 private:
  void fail(const char* name, const std::string& what) {
    if (message_.empty()) message_ = std::string(op_) + ": " + name + " is " + what;
  }

  template <class Dims>
  static std::string describe(const Dims& dims, ffi::DataType dtype) {
    std::string text = "type " + std::to_string(static_cast<int>(dtype)) + " [";
    for (int64_t d : dims)
      text += (text.back() == '[' ? "" : ", ") + (d == kAny ? "any" : std::to_string(d));
    return text + "]";
  }

  const char* op_;
  std::string message_;
};

// CUDA's status as FFI's, with the op's name.
inline ffi::Error cuda_status(const char* op, cudaError_t status) {
  if (status == cudaSuccess) return ffi::Error::Success();
  return ffi::Error::Internal(std::string(op) + ": CUDA: " + cudaGetErrorString(status));
}

// Pointer of an operand that may be absent.
template <class T, class Buffer>
T* optional_data(const Buffer& buffer) {
  return buffer.element_count() == 0 ? nullptr : static_cast<T*>(buffer.untyped_data());
}

}  // namespace jax_marlin
