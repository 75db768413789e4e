// What the C++ tests of kernels make random problems of.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <random>

inline std::mt19937_64 generator(0);

// low .. high, both included
inline int64_t any(int64_t low, int64_t high) {
  return low + static_cast<int64_t>(generator() % static_cast<uint64_t>(high - low + 1));
}
inline bool chance(int percent) { return any(1, 100) <= percent; }

// malloc'ed, of exactly this size
template <class T>
struct Array {
  int64_t size;
  std::unique_ptr<T, decltype(&std::free)> memory;

  explicit Array(int64_t size)
      : size(size), memory(static_cast<T*>(std::malloc(static_cast<size_t>(size) * sizeof(T))), &std::free) {}
  T* begin() const { return memory.get(); }
  T* end() const { return begin() + size; }
  T& operator[](int64_t i) const { return begin()[i]; }
};
