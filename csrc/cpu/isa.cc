#include "cpu/isa.h"

#include <atomic>

namespace pyvtk::cpu {
namespace {

std::atomic<int>& chosen() {
  static std::atomic<int> value{static_cast<int>(best_isa())};
  return value;
}

}  // namespace

#define PYVTK_EXPORT __attribute__((visibility("default")))

PYVTK_EXPORT Isa best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    return Isa::avx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    return Isa::avx2;
  }
#endif
  return Isa::portable;
}

PYVTK_EXPORT Isa isa() { return static_cast<Isa>(chosen().load(std::memory_order_relaxed)); }

PYVTK_EXPORT bool use_isa(Isa wanted) {
  if (wanted > best_isa()) return false;
  chosen().store(static_cast<int>(wanted), std::memory_order_relaxed);
  return true;
}

PYVTK_EXPORT const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    default:
      return "portable";
  }
}

}  // namespace pyvtk::cpu
