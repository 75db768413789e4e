#include "common/poison.h"

namespace pyvtk {

__attribute__((visibility("default"))) bool& poisons_new_memory() {
  static bool value = false;
  return value;
}

}  // namespace pyvtk
