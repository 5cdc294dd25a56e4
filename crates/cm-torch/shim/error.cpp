#include "shim.h"

#include <cstdlib>

extern "C" void cm_free_error(char* text) {
  std::free(text);
}
