// Merging rows: weighted sums of rows, and dot products of rows for the gradients. Compiled per instruction set (see
// each_isa.h). 16-bit inputs are added in float32, in the order in which the rows are given, and rounded once.
namespace pyvtk::cpu::PYVTK_ISA {

template <class T>
using Sum = std::conditional_t<std::is_same_v<T, double>, double, float>;

// sum += weight * row
template <class T>
void add_row(Sum<T>* sum, const T* row, Sum<T> weight, int64_t size) {
  if constexpr (std::is_same_v<T, double>) {
    for (int64_t i = 0; i < size; ++i) sum[i] += weight * row[i];
  } else {
    int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes) store(sum + i, load(sum + i) + weight * load(row + i));
    for (; i < size; ++i) sum[i] += weight * to_float(row[i]);
  }
}

// out = sum / divisor
template <class T>
void put_row(T* out, const Sum<T>* sum, Sum<T> divisor, int64_t size) {
  if constexpr (std::is_same_v<T, double>) {
    for (int64_t i = 0; i < size; ++i) out[i] = sum[i] / divisor;
  } else {
    int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes) store(out + i, load(sum + i) / divisor);
    for (; i < size; ++i) out[i] = from_float<T>(sum[i] / divisor);
  }
}

// out = (base + sum over rows of weight * row) / divisor; base may be null.
template <class T>
void sum_rows(void* out, const void* base, const void* const* rows, const double* weights, int64_t count,
              double divisor, int64_t size) {
  constexpr int64_t kChunk = 1024;  // stays in the first-level cache beside the rows' pieces
  alignas(64) Sum<T> sum[kChunk];
  for (int64_t at = 0; at < size; at += kChunk) {
    const int64_t part = std::min(kChunk, size - at);
    std::memset(sum, 0, static_cast<size_t>(part) * sizeof(Sum<T>));
    if (base != nullptr) add_row(sum, static_cast<const T*>(base) + at, Sum<T>{1}, part);
    for (int64_t row = 0; row < count; ++row) {
      add_row(sum, static_cast<const T*>(rows[row]) + at, static_cast<Sum<T>>(weights[row]), part);
    }
    put_row(static_cast<T*>(out) + at, sum, static_cast<Sum<T>>(divisor), part);
  }
}

template <class T>
double dot(const void* first, const void* second, int64_t size) {
  const T* a = static_cast<const T*>(first);
  const T* b = static_cast<const T*>(second);
  double sum = 0;
  int64_t i = 0;
  if constexpr (!std::is_same_v<T, double>) {
    vfloat even = splat(0.0f), odd = splat(0.0f);
    for (; i + 2 * kLanes <= size; i += 2 * kLanes) {
      even += load(a + i) * load(b + i);
      odd += load(a + i + kLanes) * load(b + i + kLanes);
    }
    sum = reduce_add(even + odd);
    for (; i < size; ++i) sum += to_float(a[i]) * to_float(b[i]);
  } else {
    for (; i < size; ++i) sum += a[i] * b[i];
  }
  return sum;
}

}  // namespace pyvtk::cpu::PYVTK_ISA
