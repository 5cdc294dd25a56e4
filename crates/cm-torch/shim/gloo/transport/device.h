// What ProcessGroupGloo.hpp names of Gloo's transports; see ../context.h.
#pragma once

#include <memory>

namespace gloo {
namespace transport {
class Device;
class UnboundBuffer;
} // namespace transport
} // namespace gloo
