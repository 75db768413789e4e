// A switch for tests: new tensors of the CPU bindings are filled with 0xff bytes. Torch-free.
#pragma once

namespace pyvtk {

// NaN as a float, -1 as an integer: a test sees what a kernel left unwritten. Set through pyvtk._C.poison_new_memory.
bool& poisons_new_memory();

}  // namespace pyvtk
