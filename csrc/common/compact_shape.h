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

// A tensor taken apart: strides (in bytes) of the axes that a selection names, and the axes that are left.
struct View {
  int64_t batch = 0, head = 0, token = 0;
  int64_t tokens = 0;
  std::vector<int64_t> sizes, strides;
};

// `batch_dim` < 0: the tensor has no batch axis. An axis of size 1 repeats, through stride 0. `strides` count elements
// of `element` bytes. false: dim and batch_dim do not fit.
inline bool take_apart(const int64_t* sizes, const int64_t* strides, int64_t rank, int64_t dim, int64_t batch_dim,
                       bool heads, int64_t element, View& view) {
  if (dim < 0 || dim >= rank || batch_dim >= rank || dim == batch_dim) return false;
  view = {};
  for (int64_t d = 0; d < rank; ++d) {
    const int64_t stride = strides[d] * element;
    if (d == dim) {
      view.token = stride;
      view.tokens = sizes[d];
    } else if (d == batch_dim) {
      view.batch = sizes[d] == 1 ? 0 : stride;
    } else if (heads && d == batch_dim + 1) {
      view.head = stride;
    } else {
      view.sizes.push_back(sizes[d]);
      view.strides.push_back(stride);
    }
  }
  return true;
}

// What the views of source, target and base (which may be the source once more) have in common: as long runs and as few
// other axes as there can be. false: they differ in an axis that only moves.
inline bool put_together(const View& source, const View& target, const View& base, int64_t element, MoveShape& shape) {
  if (source.sizes != target.sizes || source.sizes != base.sizes) return false;
  shape = {};
  shape.batch = {0, source.batch, target.batch, base.batch};
  shape.head = {0, source.head, target.head, base.head};
  shape.token = {0, source.token, target.token, base.token};
  shape.element = shape.run = element;
  shape.lines = 1;
  bool together = true;
  for (size_t axis = source.sizes.size(); axis-- > 0;) {
    const Axis here{source.sizes[axis], source.strides[axis], target.strides[axis], base.strides[axis]};
    if (here.size == 1) continue;
    together = together && here.source == shape.run && here.target == shape.run && here.base == shape.run;
    if (together) {
      shape.run *= here.size;
      continue;
    }
    shape.lines *= here.size;
    if (!shape.outer.empty()) {
      Axis& inner = shape.outer.front();
      const auto follows = [&](int64_t outer, int64_t stride) { return outer == inner.size * stride; };
      if (follows(here.source, inner.source) && follows(here.target, inner.target) && follows(here.base, inner.base)) {
        inner.size *= here.size;
        continue;
      }
    }
    shape.outer.insert(shape.outer.begin(), here);
  }
  return true;
}

}  // namespace pyvtk
