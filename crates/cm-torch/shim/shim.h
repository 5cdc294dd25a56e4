// What every file of the shim shares.
//
// Tensors cross the border as the at::Tensor pointers that tch holds. A function that can fail returns null on
// success and otherwise a heap string, which Rust frees with cm_free and turns into a typed error.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <cstring>
#include <exception>

using cm_tensor = at::Tensor*;

// Runs `body`; returns null, or the text of the exception that left it.
template <typename Body>
char* cm_guard(const Body& body) {
  try {
    body();
    return nullptr;
  } catch (const c10::Error& e) {
    // what() would add a backtrace of thousands of characters.
    return strdup(e.what_without_backtrace());
  } catch (const std::exception& e) {
    return strdup(e.what());
  } catch (...) {
    return strdup("unknown C++ exception");
  }
}
