// What ProcessGroupGloo.hpp names of Gloo's contexts. Gloo itself lies inside libtorch, whose wheel ships no headers of
// it: here are declarations of what its own headers name, and never an object of these types.
#pragma once

#include <chrono>

namespace gloo {
class Context {
 public:
  void setTimeout(std::chrono::milliseconds timeout);
};
} // namespace gloo
