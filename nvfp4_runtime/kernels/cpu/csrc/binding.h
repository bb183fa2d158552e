// Addresses as the binding gets them, and its parts.
#pragma once
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include "bodies.h"

namespace nb = nanobind;
using namespace nvfp4;
using namespace nb::literals;

using Address = uintptr_t;  // 0: absent

// Raised as nvfp4_runtime.errors.KernelError.
struct Misaligned : std::runtime_error {
  explicit Misaligned(size_t size)
      : std::runtime_error("found a tensor whose address is not a multiple of its element size, expected a multiple of " +
                           std::to_string(size) + "; clone() it before the call") {}
};

template <class T>
inline T* at(Address a) {
  if (a % alignof(T)) throw Misaligned(alignof(T));
  return reinterpret_cast<T*>(a);
}
inline void* at(Address a, int type) {
  const size_t size = type_bytes(Type(type));
  if (a % size) throw Misaligned(size);
  return reinterpret_cast<void*>(a);
}

inline NormWeight norm_weight(const std::tuple<Address, int, float>& w) {
  return {at(std::get<0>(w), std::get<1>(w)), Type(std::get<1>(w)), std::get<2>(w)};
}

void bind_decoder(nb::module_& m);  // module_decoder.cpp
