// Which items belong to each number, in the order in which they were given. Torch-free, shared by the families that add
// rows: the rows of a selection that land on a token, the tokens of a group.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

namespace pyvtk::cpu {

struct Link {
  int64_t row, position;
};

class Links {
 public:
  // `each(visit)` calls visit(number, link) for all links, the same ones whenever it is called.
  template <class Each>
  void build(int64_t numbers, Each&& each) {
    starts_.assign(static_cast<size_t>(numbers) + 2, 0);
    // Shifted by two, so that filling in leaves every start in its place.
    each([&](int64_t number, Link) { ++starts_[static_cast<size_t>(number) + 2]; });
    for (size_t i = 2; i < starts_.size(); ++i) starts_[i] += starts_[i - 1];
    links_.resize(static_cast<size_t>(starts_.back()));
    each([&](int64_t number, Link link) {
      links_[static_cast<size_t>(starts_[static_cast<size_t>(number) + 1]++)] = link;
    });
  }

  const Link* begin(int64_t number) const { return links_.data() + starts_[static_cast<size_t>(number)]; }
  const Link* end(int64_t number) const { return links_.data() + starts_[static_cast<size_t>(number) + 1]; }

 private:
  std::vector<int64_t> starts_;
  std::vector<Link> links_;
};

// out = (base + sum over rows of weight * row) / divisor, and a . b, for rows of `size` numbers (merge.h).
using SumRows = void (*)(void* out, const void* base, const void* const* rows, const double* weights, int64_t count,
                         double divisor, int64_t size);
using Dot = double (*)(const void* a, const void* b, int64_t size);

}  // namespace pyvtk::cpu
