// What every function of the shim shares: tensors cross as the at::Tensor pointers that tch holds, and a C++
// exception becomes a heap string (freed with cm_free_error) that Rust turns into a typed error.
#pragma once

#include <ATen/Tensor.h>

#include <cstring>
#include <exception>

using cm_tensor = at::Tensor*;

// Runs `body`; returns null, or the text of the exception that left it.
template <typename Body>
char* cm_guard(const Body& body) {
  try {
    body();
    return nullptr;
  } catch (const std::exception& e) {
    return strdup(e.what());
  } catch (...) {
    return strdup("unknown C++ exception");
  }
}
