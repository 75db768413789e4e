// How the tensors of one move lie in memory. Torch-free; one definition for all devices.
#pragma once
#include <cstdint>
#include <vector>

namespace pyvtk {

// An axis that the tensors of a move share: its strides in bytes. `base` is a third tensor, where there is one.
struct Axis {
  int64_t size, source, target, base;
};

// A tensor is rows of a selection (batch, head) x outer axes x tokens x one run of bytes.
struct MoveShape {
  Axis batch, head, token;  // strides only
  std::vector<Axis> outer;  // all other axes, except those that make up the run
  int64_t lines;            // product of the sizes of `outer`
  int64_t run;              // bytes that lie together in every tensor
  int64_t element;          // bytes of an element
};

}  // namespace pyvtk
